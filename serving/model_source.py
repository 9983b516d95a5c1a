"""Where a model comes from: a directory, or the Hugging Face hub; and what its config says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from placement.plan import ITEM_BYTES
from serving.errors import UsageError
from serving.progress import Step

# Weights as safetensors, tokenizer, configuration, chat template: no code and no pickles.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
HUB_ID = r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?"
MAX_CONFIG_BYTES = 4 << 20
DEFAULT_DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        directory: where its files are.
        name: the name it is served under.
        config: the parsed config.json.
    """

    directory: Path
    name: str
    config: Mapping[str, object]

    def dtype(self, asked: str | None) -> str:
        """The dtype to serve in: the one asked for, else the checkpoint's.

        Raises:
            UsageError: it is not one that can be served.
        """
        stated = self.config.get("dtype", self.config.get("torch_dtype"))
        found = asked or (str(stated) if stated else DEFAULT_DTYPE)
        found = found.removeprefix("torch.")
        if found not in ITEM_BYTES:
            raise UsageError(
                f"dtype: expected one of {', '.join(ITEM_BYTES)}, found {found[:64]!r}; "
                "choose one with --dtype"
            )
        return found


def find_model(model: str, step: Step) -> ModelSource:
    """Finds a model, downloading it if it is the id of one on the hub.

    Args:
        model: a directory, or "publisher/name".
        step: told how far a download is.

    Raises:
        UsageError: neither, or the download failed, or config.json cannot be read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        directory = path.resolve()
        return ModelSource(directory, _served_name(directory.name), read_config(directory))
    if path.is_absolute() or model.startswith((".", "~")) or not re.fullmatch(HUB_ID, model):
        raise UsageError(
            f"model: expected a directory or a hub id such as Qwen/Qwen3-0.6B, "
            f"found {model[:200]!r}, which is neither"
        )
    directory = _download(model, step)
    return ModelSource(directory, model, read_config(directory))


def read_config(directory: Path) -> Mapping[str, object]:
    """The model's config.json; raises UsageError."""
    path = directory / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UsageError(f"{path}: expected at most {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: expected the configuration of a transformers model, found: {error}"
        ) from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _download(model: str, step: Step) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    step.update(detail=f"{model} from the hub")
    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"model {model!r}: no such directory here, and the hub says: {first[:300]}; "
            "check the name, the network, and your access (`hf auth login`)"
        ) from None


def _served_name(name: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._@-]", "-", name).lstrip("-._@")
    return cleaned or "model"
