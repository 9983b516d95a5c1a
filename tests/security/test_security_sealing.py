"""Sealed checkpoints: what opens, what is refused, and by which name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from security import errors
from security.manifest import ModelFiles, build_manifest
from security.sealing.cipher import CHUNK_BYTES, TAG_BYTES, TensorCipher
from security.sealing.document import (
    SEALING_FILE,
    SealedTensor,
    Sealing,
    parse_selection,
    stage_units,
)
from security.sealing.keys import SEALED_KEYS_FILE, UnsealKeys, WrappedKeys, wrap_keys
from security.sealing.reader import SealedModelFiles, keys_of, open_model
from security.sealing.writer import read_wrapped_keys, seal_checkpoint, unseal_checkpoint
from security.signing import length_prefixed

OWNER = X25519PrivateKey.generate()
BROKER = X25519PrivateKey.generate()
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
OTHER_LAYER = "model.layers.1.mlp.up_proj.weight"
STORED = CHUNK_BYTES + TAG_BYTES


def public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def write_model(directory: Path, seed: int = 0) -> Path:
    """Tensors of several chunks, of none, of one byte more than a chunk."""
    directory.mkdir()
    (directory / "config.json").write_text('{"tie_word_embeddings":false}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "notes.npz").write_bytes(b"could be weights")
    tensors = {
        # Two chunks and a half, of the same shape in two tensors of a unit and in another unit.
        UP: random_tensor(640, 1024, seed=seed),
        DOWN: random_tensor(640, 1024, seed=seed + 1),
        OTHER_LAYER: random_tensor(640, 1024, seed=seed + 2),
        "model.layers.0.exact.weight": random_tensor(512, 512, seed=seed + 3),
        "model.layers.1.empty.weight": torch.empty(0, 4),
        "model.layers.1.one.weight": torch.full((CHUNK_BYTES + 1,), 7, dtype=torch.uint8),
        "model.layers.1.scalar": torch.tensor(3.5),
        "model.norm.weight": torch.ones(64),
    }
    ends = {
        "model.embed_tokens.weight": random_tensor(100, 64, dtype=torch.bfloat16, seed=seed + 4),
        "lm_head.weight": random_tensor(100, 64, dtype=torch.bfloat16, seed=seed + 5),
    }
    save_file(tensors, directory / "model-1.safetensors", {"format": "pt", "note": ""})
    save_file(ends, directory / "model-2.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def sealed_once(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sealed") / "sealed"
    seal_checkpoint(plain, output, parse_selection("0-1,embed"), [public(OWNER), public(BROKER)])
    return output


@pytest.fixture
def sealed(sealed_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed_once, tmp_path / "sealed"))


def all_keys(directory: Path) -> UnsealKeys:
    return read_wrapped_keys(directory).unwrap(OWNER)


def open_sealed(directory: Path, keys: UnsealKeys | None = None) -> ModelFiles:
    """Under a manifest of what is there now: what an attacker who could also sign would get."""
    return open_model(
        directory, build_manifest(directory), all_keys(directory) if keys is None else keys
    )


def change_stored(directory: Path, name: str, change: Callable[[bytearray], None]) -> None:
    record = next(t for t in build_manifest(directory).tensors if t.name == name)
    path = directory / record.file
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little") + record.begin
    stored = content[start : start + record.size]
    change(stored)
    assert len(stored) == record.size
    content[start : start + record.size] = stored
    path.write_bytes(content)


def change_sealing(directory: Path, change: Callable[[dict[str, object]], None]) -> None:
    document = json.loads((directory / SEALING_FILE).read_bytes())
    change(document)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    (directory / SEALING_FILE).write_text(text)


def entry(document: dict[str, object], name: str) -> dict[str, object]:
    return next(t for t in document["tensors"] if t["name"] == name)  # type: ignore[attr-defined]


def test_chunks_are_sealed_as_the_format_says() -> None:
    """A second implementation, by the words of docs/sealing.md and the module."""
    tensor = SealedTensor("a.weight", "layer-0", "U8", (2 * CHUNK_BYTES + 5,))
    unit_key, sealing_id = bytes(range(32)), bytes(range(16))
    cipher = TensorCipher(unit_key, sealing_id, tensor)
    context = length_prefixed(
        [
            b"bulkhead/v1/sealed-tensor",
            sealing_id,
            b"layer-0",
            b"a.weight",
            b"U8",
            struct.pack(">Q", 2 * CHUNK_BYTES + 5),
        ]
    )
    key = HKDF(hashes.SHA256(), 32, salt=None, info=context).derive(unit_key)
    for index, size, last in ((0, CHUNK_BYTES, 0), (1, CHUNK_BYTES, 0), (2, 5, 1)):
        nonce = bytes(7) + index.to_bytes(4, "big") + bytes([last])
        associated = hashlib.sha256(context).digest() + struct.pack(">QQ", index, 3)
        sealed = AESGCM(key).encrypt(nonce, bytes(size), associated)
        assert cipher.seal(index, bytes(size)) == sealed


def test_every_tensor_opens_and_the_others_are_as_they_were(plain: Path, sealed: Path) -> None:
    with (
        ModelFiles(plain, build_manifest(plain)) as before,
        ModelFiles(sealed, build_manifest(sealed)) as stored,
        open_sealed(sealed) as opened,
    ):
        assert opened.tensor_names() == before.tensor_names()
        for name in before.tensor_names():
            assert opened.read_tensor(name) == before.read_tensor(name), name
            assert opened.tensor_info(name).dtype == before.tensor_info(name).dtype
            assert opened.tensor_info(name).shape == before.tensor_info(name).shape
            is_plain = name in ("model.norm.weight", "lm_head.weight")
            assert (stored.read_tensor(name) == before.read_tensor(name)) == is_plain, name
        assert opened.read_file("config.json") == before.read_file("config.json")


def test_a_sealed_file_loads_tensor_by_tensor_as_safetensors(plain: Path, sealed: Path) -> None:
    tensors = load_file(sealed / "model-1.safetensors")
    assert torch.equal(tensors["model.norm.weight"], torch.ones(64))
    assert tensors[UP].dtype == torch.uint8
    assert len(tensors["model.layers.1.empty.weight"]) == TAG_BYTES
    assert len(tensors[UP]) == 640 * 1024 * 4 + 3 * TAG_BYTES


def test_nothing_of_a_sealed_tensor_is_in_the_sealed_directory(plain: Path, sealed: Path) -> None:
    secret = load_file(plain / "model-1.safetensors")[UP].numpy().tobytes()
    content = b"".join(path.read_bytes() for path in sealed.iterdir())
    assert not any(secret[i : i + 32] in content for i in range(0, len(secret), 65536))


def test_unseal_gives_back_the_same_files(plain: Path, sealed: Path, tmp_path: Path) -> None:
    report = unseal_checkpoint(sealed, tmp_path / "clear", OWNER)
    assert stat.S_IMODE((tmp_path / "clear").stat().st_mode) == 0o700
    for name in ("model-1.safetensors", "model-2.safetensors"):
        before, after = load_file(plain / name), load_file(tmp_path / "clear" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert (tmp_path / "clear" / name).read_bytes() == (plain / name).read_bytes()
    assert report.tensors == 8
    names = {path.name for path in (tmp_path / "clear").iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "model-1.safetensors",
        "model-2.safetensors",
    }


def test_what_could_hold_weights_is_not_copied(plain: Path, tmp_path: Path) -> None:
    report = seal_checkpoint(plain, tmp_path / "s", parse_selection("0"), [public(OWNER)])
    assert report.left_out == ("notes.npz",)
    assert not (tmp_path / "s" / "notes.npz").exists()
    assert report.manifest_digest == build_manifest(tmp_path / "s").digest


def test_wrapped_keys_are_private_and_no_part_of_the_manifest(sealed: Path) -> None:
    assert stat.S_IMODE((sealed / SEALED_KEYS_FILE).stat().st_mode) == 0o600
    names = [file.name for file in build_manifest(sealed).files]
    assert SEALING_FILE in names
    assert SEALED_KEYS_FILE not in names


def test_two_sealings_have_nothing_in_common(plain: Path, sealed: Path, tmp_path: Path) -> None:
    seal_checkpoint(plain, tmp_path / "again", parse_selection("0-1,embed"), [public(OWNER)])
    first = load_file(sealed / "model-1.safetensors")[UP]
    again = load_file(tmp_path / "again" / "model-1.safetensors")[UP]
    assert not torch.equal(first, again)
    with pytest.raises(errors.UnsealKeyMismatch, match="embed"):
        open_sealed(sealed, all_keys(tmp_path / "again"))


# -- tampering ----------------------------------------------------------------------------------


def flip(stored: bytearray) -> None:
    stored[STORED + 5] ^= 1


def flip_tag(stored: bytearray) -> None:
    stored[-1] ^= 0x80


def swap(stored: bytearray) -> None:
    first, second = stored[:STORED], stored[STORED : 2 * STORED]
    stored[: 2 * STORED] = second + first


def repeat(stored: bytearray) -> None:
    stored[STORED : 2 * STORED] = stored[:STORED]


def rotate_ends(stored: bytearray) -> None:
    stored[:] = stored[-100:] + stored[:-100]


def clear(stored: bytearray) -> None:
    stored[:] = bytes(len(stored))


@pytest.mark.parametrize("change", [flip, flip_tag, swap, repeat, rotate_ends, clear])
def test_a_changed_tensor_is_refused(change: Callable[[bytearray], None], sealed: Path) -> None:
    change_stored(sealed, UP, change)
    with open_sealed(sealed) as files:
        with pytest.raises(errors.SealedChunkInvalid, match=UP):
            files.read_tensor(UP)
        assert len(files.read_tensor(DOWN)) == 640 * 1024 * 4


@pytest.mark.parametrize("other", [DOWN, OTHER_LAYER])
def test_another_tensors_bytes_are_refused(other: str, sealed: Path) -> None:
    foreign = load_file(sealed / "model-1.safetensors")[other].numpy().tobytes()

    def replace(stored: bytearray) -> None:
        stored[:] = foreign

    change_stored(sealed, UP, replace)
    with open_sealed(sealed) as files, pytest.raises(errors.SealedChunkInvalid):
        files.read_tensor(UP)


def test_another_sealings_bytes_are_refused(plain: Path, sealed: Path, tmp_path: Path) -> None:
    seal_checkpoint(plain, tmp_path / "again", parse_selection("all"), [public(OWNER)])
    shutil.copy(tmp_path / "again" / "model-2.safetensors", sealed / "model-2.safetensors")
    with open_sealed(sealed) as files, pytest.raises(errors.SealedChunkInvalid):
        files.read_tensor("model.embed_tokens.weight")


@pytest.mark.parametrize("length", [2 * STORED, 2 * STORED + 40, STORED, 0])
def test_a_tensor_that_was_cut_is_refused(length: int, sealed: Path) -> None:
    path = sealed / "model-1.safetensors"
    tensors = load_file(path)
    tensors[UP] = tensors[UP][:length].clone()
    save_file(tensors, path)
    with pytest.raises(errors.SealedTensorMismatch, match="expected U8 of shape"):
        open_sealed(sealed)


def test_a_cut_tensor_with_a_shape_that_fits_is_refused(sealed: Path) -> None:
    path = sealed / "model-1.safetensors"
    tensors = load_file(path)
    tensors[UP] = tensors[UP][: 2 * STORED].clone()
    save_file(tensors, path)
    change_sealing(sealed, lambda document: entry(document, UP).update(shape=[512, 1024]))
    with open_sealed(sealed) as files, pytest.raises(errors.SealedChunkInvalid):
        files.read_tensor(UP)


def test_a_cut_file_is_refused_under_the_signed_manifest(sealed: Path) -> None:
    manifest = build_manifest(sealed)
    path = sealed / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-70])
    with open_model(sealed, manifest, all_keys(sealed)) as files:
        last = max(
            (t for t in manifest.tensors if t.file == path.name), key=lambda tensor: tensor.end
        )
        with pytest.raises((errors.ManifestMismatch, errors.SealedChunkInvalid)):
            files.read_tensor(last.name)


def test_the_signed_manifest_refuses_another_ciphertext_of_the_same_tensor(
    plain: Path, sealed: Path, tmp_path: Path
) -> None:
    manifest = build_manifest(sealed)
    seal_checkpoint(plain, tmp_path / "again", parse_selection("0-1,embed"), [public(OWNER)])
    shutil.copy(tmp_path / "again" / SEALING_FILE, sealed / SEALING_FILE)
    with pytest.raises(errors.ManifestMismatch, match=SEALING_FILE):
        open_model(sealed, manifest, all_keys(tmp_path / "again"))


@pytest.mark.parametrize(
    "changes",
    [{"shape": [1024, 640]}, {"shape": [655360]}, {"dtype": "I32"}, {"dtype": "U32"}],
)
def test_another_shape_or_dtype_is_refused(changes: dict[str, object], sealed: Path) -> None:
    change_sealing(sealed, lambda document: entry(document, UP).update(changes))
    with open_sealed(sealed) as files, pytest.raises(errors.SealedChunkInvalid):
        files.read_tensor(UP)


@pytest.mark.parametrize(
    "changes",
    [{"shape": [640, 1025]}, {"dtype": "BF16"}, {"shape": [1 << 46] * 8}, {"shape": []}],
)
def test_a_length_that_does_not_fit_is_refused_before_it_is_allocated(
    changes: dict[str, object], sealed: Path
) -> None:
    change_sealing(sealed, lambda document: entry(document, UP).update(changes))
    with pytest.raises(errors.SealedTensorMismatch):
        open_sealed(sealed)


def test_a_tensor_that_is_not_there_is_refused(sealed: Path) -> None:
    path = sealed / "model-1.safetensors"
    tensors = load_file(path)
    del tensors[DOWN]
    save_file(tensors, path)
    with pytest.raises(errors.SealedTensorMismatch, match="no such tensor"):
        open_sealed(sealed)


# -- keys ---------------------------------------------------------------------------------------


def test_a_missing_key_is_named(sealed: Path) -> None:
    with open_sealed(sealed, all_keys(sealed).only(["layer-0"])) as files:
        assert files.read_tensor(UP)
        assert files.read_tensor("lm_head.weight")
        with pytest.raises(errors.UnsealKeyMissing, match=r"layers\.1\.mlp.*key of layer-1"):
            files.read_tensor(OTHER_LAYER)


def test_another_units_key_is_refused(sealed: Path) -> None:
    keys = all_keys(sealed)
    with pytest.raises(errors.UnsealKeyMismatch, match="layer-0"):
        open_sealed(sealed, UnsealKeys({"layer-0": keys["layer-1"]}))


def test_a_key_that_passes_its_commitment_opens_no_other_tensor(sealed: Path) -> None:
    keys = all_keys(sealed)
    with open_sealed(sealed) as files:
        assert isinstance(files, SealedModelFiles)
        # As if the commitment were forged, too.
        files.keys = UnsealKeys({**keys, "layer-0": keys["layer-1"]})
        with pytest.raises(errors.SealedChunkInvalid):
            files.read_tensor(UP)


def test_the_broker_opens_what_the_owner_opens(sealed: Path) -> None:
    wrapped = read_wrapped_keys(sealed)
    assert dict(wrapped.unwrap(BROKER)) == dict(wrapped.unwrap(OWNER))
    assert list(wrapped.unwrap(BROKER, ["layer-1"])) == ["layer-1"]
    with pytest.raises(errors.UnsealKeyMissing, match="layer-7"):
        wrapped.unwrap(BROKER, ["layer-7"])


def test_a_stranger_opens_nothing(sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.NotARecipient, match="use the key"):
        unseal_checkpoint(sealed, tmp_path / "clear", X25519PrivateKey.generate())
    assert list(tmp_path.iterdir()) == [sealed]


def test_wrapped_keys_of_another_model_are_refused(
    plain: Path, sealed: Path, tmp_path: Path
) -> None:
    seal_checkpoint(plain, tmp_path / "again", parse_selection("0"), [public(OWNER)])
    shutil.copy(tmp_path / "again" / SEALED_KEYS_FILE, sealed / SEALED_KEYS_FILE)
    with pytest.raises(errors.SealedKeysForOtherModel):
        unseal_checkpoint(sealed, tmp_path / "clear", OWNER)


def test_a_wrapped_key_opens_in_its_own_place_only(sealed: Path) -> None:
    wrapped = read_wrapped_keys(sealed)
    mine = wrapped.recipients[public(OWNER)]
    for moved in (
        WrappedKeys(wrapped.sealing_id, {public(OWNER): {"layer-0": mine["layer-1"]}}),
        WrappedKeys(bytes(32), {public(OWNER): {"layer-0": mine["layer-0"]}}),
        WrappedKeys(wrapped.sealing_id, {public(OWNER): wrapped.recipients[public(BROKER)]}),
    ):
        with pytest.raises(errors.WrappedKeyInvalid):
            moved.unwrap(OWNER)


def test_keys_are_wrapped_anew_for_another_broker(sealed: Path) -> None:
    digest = build_manifest(sealed).digest
    old, broker = read_wrapped_keys(sealed), X25519PrivateKey.generate()
    new = wrap_keys(old.unwrap(OWNER), old.sealing_id, [public(OWNER), public(broker)])
    (sealed / SEALED_KEYS_FILE).write_bytes(new.to_bytes())
    assert build_manifest(sealed).digest == digest
    with open_sealed(sealed, read_wrapped_keys(sealed).unwrap(broker)) as files:
        assert files.read_tensor(UP)


def test_a_recipient_of_low_order_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.MalformedInput):
        seal_checkpoint(plain, tmp_path / "s", parse_selection("0"), [bytes(32)])
    assert list(tmp_path.iterdir()) == []


def test_keys_travel_between_processes_and_are_not_shown(sealed: Path) -> None:
    keys = all_keys(sealed)
    assert dict(UnsealKeys.from_bytes(keys.to_bytes())) == dict(keys)
    assert repr(keys) == "UnsealKeys(embed, layer-0, layer-1)"
    with open_sealed(sealed) as files:
        assert dict(keys_of(files)) == dict(keys)
    with pytest.raises(errors.SealedKeysMalformed):
        UnsealKeys.from_bytes(b'{"format":"bulkhead-unseal-keys-1","keys":{"embed":"00"}}')


def test_a_plain_model_needs_no_keys(plain: Path) -> None:
    with open_model(plain, build_manifest(plain), UnsealKeys({})) as files:
        assert type(files) is ModelFiles
        assert len(keys_of(files)) == 0


# -- sealing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("3", {"layer-3"}),
        ("0-2, embed", {"layer-0", "layer-1", "layer-2", "embed"}),
        ("norm,head,5,5", {"norm", "head", "layer-5"}),
        ("1,all", {"all"}),
    ],
)
def test_selections(text: str, units: set[str]) -> None:
    assert parse_selection(text) == units


@pytest.mark.parametrize("text", ["", ",", "2-1", "4096", "0-99999", "-1", "layer-1", "a" * 5000])
def test_selections_that_are_refused(text: str) -> None:
    with pytest.raises(errors.SelectionInvalid):
        parse_selection(text)


@pytest.mark.parametrize(("text", "part"), [("0-2", "layer-2"), ("0,7", "layers 0 to 1")])
def test_a_part_that_the_model_lacks(text: str, part: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.SelectionInvalid, match=part):
        seal_checkpoint(plain, tmp_path / "s", parse_selection(text), [public(OWNER)])


def small_model(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = small_model(
        tmp_path / "m",
        {"model.embed_tokens.weight": torch.ones(4, 4), "model.layers.0.w": torch.ones(4)},
    )
    with pytest.raises(errors.SelectionInvalid, match="seal embed"):
        seal_checkpoint(model, tmp_path / "s", parse_selection("head"), [public(OWNER)])
    assert stage_units(build_manifest(model), 0, 1, 1) == ["embed", "layer-0", "norm"]
    assert stage_units(build_manifest(model), 1, 2, 2) == ["embed", "layer-1", "norm"]


def test_the_units_of_stages(plain: Path) -> None:
    manifest = build_manifest(plain)
    assert stage_units(manifest, 0, 1, 2) == ["embed", "layer-0"]
    assert stage_units(manifest, 1, 2, 2) == ["head", "layer-1", "norm"]


@pytest.mark.parametrize("selection", ["embed", "embed,head"])
def test_a_matrix_that_would_stay_readable_is_refused(selection: str, tmp_path: Path) -> None:
    table = random_tensor(8, 8)
    model = small_model(
        tmp_path / "m", {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    )
    with pytest.raises(errors.CannotSeal, match="twice"):
        seal_checkpoint(model, tmp_path / "s", parse_selection(selection), [public(OWNER)])


def test_all_means_all(tmp_path: Path) -> None:
    model = small_model(
        tmp_path / "m", {"model.layers.0.w": torch.ones(4), "vision.w": torch.zeros(4)}
    )
    with pytest.raises(errors.CannotSeal, match=r"vision\.w"):
        seal_checkpoint(model, tmp_path / "s", parse_selection("all"), [public(OWNER)])


def test_a_sealed_model_is_not_sealed_again(sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.CannotSeal, match="unseal it"):
        seal_checkpoint(sealed, tmp_path / "s", parse_selection("0"), [public(OWNER)])


def test_nothing_is_overwritten(plain: Path, sealed: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(errors.OutputExists):
        seal_checkpoint(plain, taken, parse_selection("0"), [public(OWNER)])
    with pytest.raises(errors.OutputExists):
        unseal_checkpoint(sealed, taken, OWNER)
    with pytest.raises(errors.FileUnusable):
        seal_checkpoint(plain, tmp_path / "no" / "s", parse_selection("0"), [public(OWNER)])
    with pytest.raises(errors.FileUnusable, match="not sealed"):
        unseal_checkpoint(plain, tmp_path / "clear", OWNER)


def test_a_failed_unseal_leaves_nothing(sealed: Path, tmp_path: Path) -> None:
    change_stored(sealed, "model.layers.1.one.weight", flip_tag)
    with pytest.raises(errors.SealedChunkInvalid):
        unseal_checkpoint(sealed, tmp_path / "clear", OWNER)
    assert list(tmp_path.iterdir()) == [sealed]


# -- parsers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="bulkhead-sealing-2"),
        lambda d: d.update(sealing_id="00"),
        lambda d: d.update(more=1),
        lambda d: d["units"].pop(),
        lambda d: d["units"].append(d["units"][0]),
        lambda d: d["units"].reverse(),
        lambda d: d["units"][0].update(unit="layer-01"),
        lambda d: d["tensors"].reverse(),
        lambda d: d["tensors"].append(d["tensors"][-1]),
        lambda d: d["tensors"][0].update(dtype="F4"),
        lambda d: d["tensors"][0].update(shape=[1] * 9),
        lambda d: d["tensors"][0].update(shape=[-1]),
        lambda d: d["tensors"][0].update(shape=[1 << 47]),
        lambda d: d["tensors"][0].update(name="x" * 513),
        lambda d: d["tensors"][0].update(unit="head"),
    ],
)
def test_a_malformed_list_is_refused(change: Callable[..., None], sealed: Path) -> None:
    change_sealing(sealed, change)
    with pytest.raises(errors.SealingMalformed):
        open_sealed(sealed)


def test_long_documents_are_refused_before_they_are_parsed(sealed: Path) -> None:
    with pytest.raises(errors.SealingMalformed, match="before it was parsed"):
        Sealing.from_bytes(b" " * ((32 << 20) + 1))
    (sealed / SEALED_KEYS_FILE).write_bytes(b" " * ((32 << 20) + 1))
    with pytest.raises(errors.SealedKeysMalformed, match="at most"):
        read_wrapped_keys(sealed)
    (sealed / SEALED_KEYS_FILE).unlink()
    with pytest.raises(errors.FileUnusable):
        read_wrapped_keys(sealed)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_documents_raise_named_errors_only(sealed_once: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([SEALING_FILE, SEALED_KEYS_FILE]))
    content = bytearray((sealed_once / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(begin, min(len(content), begin + 40)))
        content[begin:end] = data.draw(st.binary(max_size=40) | st.sampled_from([b"9" * 40, b"["]))
    parse = Sealing.from_bytes if name == SEALING_FILE else WrappedKeys.from_bytes
    with contextlib.suppress(errors.SealingMalformed, errors.SealedKeysMalformed):
        assert parse(bytes(content)).to_bytes() == bytes(content)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_named_errors_only(content: bytes) -> None:
    for parse, error in (
        (Sealing.from_bytes, errors.SealingMalformed),
        (WrappedKeys.from_bytes, errors.SealedKeysMalformed),
        (UnsealKeys.from_bytes, errors.SealedKeysMalformed),
    ):
        with pytest.raises(error):
            parse(content)  # type: ignore[operator]
