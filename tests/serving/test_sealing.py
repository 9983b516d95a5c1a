"""`bulkhead seal` and `bulkhead unseal` on a real tiny checkpoint."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import write_checkpoint

from security.sealing.keys import create_unsealing_key, unsealing_public_pem
from security.sealing.writer import read_wrapped_keys
from serving.cli import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen3", tmp_path_factory.mktemp("cli") / "model", seed=4)


def test_a_model_is_sealed_and_unsealed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = create_unsealing_key(tmp_path / "broker.key")
    public = broker.public_key().public_bytes_raw()
    (tmp_path / "broker.pub").write_bytes(unsealing_public_pem(public))
    sealed, clear, key = tmp_path / "sealed", tmp_path / "clear", tmp_path / "recovery.key"
    seal = ["seal", str(model), str(sealed), "--layers", "0-2,embed,norm"]
    new_key = ["--new-key", str(key), "--broker-key", str(tmp_path / "broker.pub")]
    assert run([*seal, *new_key]) == 0
    text = capsys.readouterr().out
    assert "sealed  embed, layer-0, layer-1, layer-2, norm" in text
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(read_wrapped_keys(sealed).unwrap(broker)) == 5
    with pytest.raises((RuntimeError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(sealed)

    assert run(["unseal", str(sealed), str(clear), "--key", str(key)]) == 0
    before = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(clear).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    # The public half is enough to seal another one.
    again = ["seal", str(model), str(tmp_path / "again"), "--layers", "all"]
    assert run([*again, "--recovery-key", f"{key}.pub"]) == 0
    assert "only the recovery key opens this copy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--layers", "first", "--new-key", "{tmp}/k"], 2, "--layers: layers: 'first'"),
        (["--layers", "9", "--new-key", "{tmp}/k"], 1, "found layer-9"),
        (["--layers", "head", "--new-key", "{tmp}/k"], 1, "seal embed"),
        (["--layers", "0", "--recovery-key", "{tmp}/none"], 1, "could not read the key"),
        (["--layers", "0", "--new-key", "{tmp}/taken"], 1, "could not write a new key"),
        (["--layers", "0", "--new-key", "{tmp}/half"], 2, "half.pub, found one"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    code: int,
    part: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "half.pub").touch()
    filled = [text.format(tmp=tmp_path) for text in arguments]
    assert run(["seal", str(model), str(tmp_path / "s"), *filled]) == code
    assert part in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.pub", "taken"]


def test_a_wrong_key_and_a_taken_place(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sealed, key = str(tmp_path / "sealed"), str(tmp_path / "recovery.key")
    seal = ["seal", str(model), sealed, "--layers", "0"]
    assert run([*seal, "--new-key", key]) == 0
    assert run([*seal, "--recovery-key", f"{key}.pub"]) == 1
    assert "output_exists" in capsys.readouterr().err
    assert run([*seal, "--new-key", str(tmp_path / "unused.key")]) == 1
    assert not (tmp_path / "unused.key").exists()
    capsys.readouterr()
    create_unsealing_key(tmp_path / "other.key")
    other = ["--key", str(tmp_path / "other.key")]
    assert run(["unseal", sealed, str(tmp_path / "clear"), *other]) == 1
    assert "not_a_recipient" in capsys.readouterr().err
    (tmp_path / "recovery.key").chmod(0o644)
    assert run(["unseal", sealed, str(tmp_path / "clear"), "--key", key]) == 1
    assert "expected mode 0600" in capsys.readouterr().err
    assert not (tmp_path / "clear").exists()
