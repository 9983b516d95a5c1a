from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from security_samples import write_model, write_raw_safetensors, write_safetensors

from security.errors import (
    FileNotInManifest,
    MalformedInput,
    MalformedSafetensors,
    ManifestMismatch,
    NoCheckpoint,
    PickleOnlyCheckpoint,
    UnsafeFile,
)
from security.manifest import Manifest, ModelFiles, build_manifest, observe_manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def test_lists_what_is_served_and_nothing_else(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    manifest = build_manifest(model)
    assert [file.name for file in manifest.files] == [
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert [tensor.name for tensor in manifest.tensors] == ["a", "b", "c", "empty"]
    for file in manifest.files:
        content = (model / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.tensors[1].sha256 == hashlib.sha256(b"12345678").hexdigest()


def test_agrees_with_the_reference_implementation(model: Path) -> None:
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")
    values = {"x": numpy.arange(12, dtype="float32").reshape(3, 4), "y": numpy.ones(5, "int64")}
    safetensors.save_file(values, model / "more.safetensors")
    files = ModelFiles(model, build_manifest(model))
    for name, value in values.items():
        assert bytes(files.read_tensor(name)) == value.tobytes()
        assert files.tensor_info(name).shape == value.shape


def test_bytes_round_trip(model: Path) -> None:
    manifest = build_manifest(model)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert manifest.digest == hashlib.sha256(manifest.to_bytes()).hexdigest()
    with pytest.raises(MalformedInput):
        Manifest.from_bytes(manifest.to_bytes() + b" ")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: replace(m, files=m.files[::-1]),
        lambda m: replace(m, files=m.files[:2]),
        lambda m: replace(m, tensors=m.tensors[1:]),
        lambda m: replace(m, tensors=(*m.tensors, m.tensors[-1])),
        lambda m: replace(m, tensors=(replace(m.tensors[0], dtype="F64"), *m.tensors[1:])),
        lambda m: replace(m, tensors=(replace(m.tensors[0], begin=4, end=28), *m.tensors[1:])),
        lambda m: replace(m, files=(replace(m.files[0], name="../x"), *m.files[1:])),
    ],
)
def test_inconsistent_manifests_are_refused(
    model: Path, change: Callable[[Manifest], Manifest]
) -> None:
    with pytest.raises(MalformedInput):
        Manifest.from_bytes(change(build_manifest(model)).to_bytes())


def _entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> object:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": _entry(0, 4), "b": _entry(3, 8)}, 8, "overlap"),
        ({"a": _entry(0, 4), "b": _entry(5, 8)}, 8, "gap"),
        ({"a": _entry(0, 4)}, 8, "end at byte 8"),
        ({"a": _entry(0, 9)}, 8, "end at byte 8"),
        ({"a": _entry(0, 8, "F32")}, 8, "for its shape"),
        ({"a": _entry(0, 8, "F4")}, 8, "dtype"),
        ({"a": _entry(0, 8, shape=[2**40, 2**40])}, 8, "for its shape"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}}, 8, "ascending"),
        ({"a": {"dtype": "U8", "shape": [8]}}, 8, "data_offsets"),
        ({"a": {**_entry(0, 8), "extra": 1}}, 8, "extra"),  # type: ignore[dict-item]
        ({"a": 1}, 8, "object"),
    ],
)
def test_malformed_safetensors(
    model: Path, header: dict[str, object], data: int, message: str
) -> None:
    write_raw_safetensors(model / "odd.safetensors", json.dumps(header).encode(), bytes(data))
    with pytest.raises(MalformedSafetensors, match=message):
        build_manifest(model)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02",
        b"\xff" * 8,
        (10**9).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{",
    ],
)
def test_truncated_or_huge_headers(model: Path, content: bytes) -> None:
    (model / "odd.safetensors").write_bytes(content)
    with pytest.raises(MalformedSafetensors):
        build_manifest(model)


def test_duplicate_tensor_names(model: Path) -> None:
    write_safetensors(model / "twin.safetensors", {"a": ("U8", [1], b"x")})
    with pytest.raises(MalformedSafetensors, match="also in"):
        build_manifest(model)
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    write_raw_safetensors(model / "twin.safetensors", f'{{"z":{entry},"z":{entry}}}'.encode(), b"x")
    with pytest.raises(MalformedSafetensors, match="twice"):
        build_manifest(model)


def test_pickle_only_checkpoint_says_how_to_convert(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(NoCheckpoint):
        build_manifest(model)
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(PickleOnlyCheckpoint, match="safe_serialization=True"):
        build_manifest(model)


def test_reads_only_what_matches(model: Path) -> None:
    files = ModelFiles(model, build_manifest(model))
    assert files.read_file("config.json") == b'{"model_type": "llama"}'
    assert bytes(files.read_tensor("a")) == bytes(range(24))
    assert files.read_tensor("empty") == b""
    for name in ("modeling_evil.py", "README.md", "../model/config.json", "nothing"):
        with pytest.raises(FileNotInManifest):
            files.read_file(name)
    with pytest.raises(FileNotInManifest):
        files.read_file("model-00001-of-00002.safetensors")
    with pytest.raises(FileNotInManifest):
        files.read_tensor("z")


def test_changed_file_and_tensor(model: Path) -> None:
    manifest = build_manifest(model)
    (model / "config.json").write_text('{"model_type": "LLAMA"}')
    weights = model / "model-00001-of-00002.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    files = ModelFiles(model, manifest)
    with pytest.raises(ManifestMismatch, match=r"config\.json"):
        files.read_file("config.json")
    assert bytes(files.read_tensor("a")) == bytes(range(24))
    with pytest.raises(ManifestMismatch, match="b"):
        files.read_tensor("b")
    weights.write_bytes(content[:-4])
    with pytest.raises(ManifestMismatch):
        ModelFiles(model, manifest).read_tensor("b")


def test_links_and_devices_are_not_read(model: Path, tmp_path: Path) -> None:
    manifest = build_manifest(model)
    (model / "config.json").rename(tmp_path / "config.json")
    (model / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(UnsafeFile, match="link"):
        ModelFiles(model, manifest).read_file("config.json")
    with pytest.raises(UnsafeFile):
        build_manifest(model)
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(UnsafeFile, match="regular"):
        ModelFiles(model, manifest).read_file("config.json")


def test_hub_cache_layout(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / "abc"
    write_model(snapshot)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / f"{number}")
        path.symlink_to(f"../../blobs/{number}")
    manifest = build_manifest(snapshot)
    assert ModelFiles(snapshot, manifest).read_file("tokenizer.json") == b"{}"
    assert observe_manifest(snapshot, manifest) == (manifest.digest, [])


def test_observation(model: Path) -> None:
    manifest = build_manifest(model)
    assert observe_manifest(model, manifest) == (manifest.digest, [])
    template = model / "chat_template.jinja"
    before = hashlib.sha256(template.read_bytes()).hexdigest()
    template.write_text("{{ evil }}")
    after = hashlib.sha256(template.read_bytes()).hexdigest()
    digest, notes = observe_manifest(model, manifest)
    assert digest != manifest.digest
    assert notes == [f"chat_template.jinja: expected sha256 {before}, found {after}"]


@pytest.mark.parametrize("damage", ["header", "size", "missing", "link", "index"])
def test_observation_of_weights(model: Path, damage: str) -> None:
    manifest = build_manifest(model)
    path = model / "model-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[12] ^= 1
        path.write_bytes(content)
    elif damage == "size":
        path.write_bytes(content + b"x")
    elif damage == "missing":
        path.unlink()
    elif damage == "link":
        path.rename(model / "elsewhere")
        path.symlink_to(model / "elsewhere")
    else:
        path = model / "model.safetensors.index.json"
        path.write_text("[]")
    digest, notes = observe_manifest(model, manifest)
    assert digest != manifest.digest
    assert len(notes) == 1 and notes[0].startswith(path.name)
