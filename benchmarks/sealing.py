"""How fast a sealed checkpoint is read, beside the same one in the clear.

    python -m benchmarks.sealing [--megabytes 400] [--rounds 5]

Reads every tensor through the readers that stages use, from the page cache, plain and sealed in
turn, and prints the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from safetensors.torch import save_file

from security.manifest import Manifest, build_manifest
from security.sealing.document import parse_selection
from security.sealing.keys import UnsealKeys
from security.sealing.reader import open_model
from security.sealing.writer import read_wrapped_keys, seal_checkpoint

_TENSORS = 4


def main() -> None:
    """Prints GB/s of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        plain, sealed = Path(home, "plain"), Path(home, "sealed")
        _write(plain, arguments.megabytes)
        key = X25519PrivateKey.generate()
        began = time.perf_counter()
        recipient = key.public_key().public_bytes_raw()
        seal_checkpoint(plain, sealed, parse_selection("all"), [recipient])
        print(f"seal    {arguments.megabytes / 1000 / (time.perf_counter() - began):.2f} GB/s")
        keys = read_wrapped_keys(sealed).unwrap(key)
        manifests = {path: build_manifest(path) for path in (plain, sealed)}
        speeds: dict[Path, list[float]] = {plain: [], sealed: []}
        for _ in range(arguments.rounds):
            for path, manifest in manifests.items():
                speeds[path].append(_read(path, manifest, keys))
    medians = [statistics.median(found) for found in speeds.values()]
    print(f"plain   {medians[0]:.2f} GB/s\nsealed  {medians[1]:.2f} GB/s")
    print(f"ratio   {medians[1] / medians[0]:.2f}")


def _write(directory: Path, megabytes: int) -> None:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    columns = megabytes * 1_000_000 // _TENSORS // 4096 // 2
    tensors = {
        f"model.layers.{index}.mlp.up_proj.weight": torch.randn(4096, columns).to(torch.bfloat16)
        for index in range(_TENSORS)
    }
    save_file(tensors, directory / "model.safetensors")


def _read(directory: Path, manifest: Manifest, keys: UnsealKeys) -> float:
    with open_model(directory, manifest, keys) as files:
        began = time.perf_counter()
        size = sum(len(files.read_tensor(name)) for name in files.tensor_names())
        return size / (time.perf_counter() - began) / 1e9


if __name__ == "__main__":
    main()
