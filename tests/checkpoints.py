"""Tiny random checkpoints, written the way anybody would write one: with `save_pretrained`."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
ALPHABET = [chr(code) for code in range(0x20, 0x7F)]
VOCABULARY = len(ALPHABET) + len(SPECIAL)
END = len(ALPHABET)

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": END,
    # Large enough that greedy tokens vary from step to step.
    "initializer_range": 0.2,
}

FAMILIES: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, object]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"head_dim": 16, "sliding_window": 48}),
}


def write_checkpoint(family: str, directory: Path, seed: int = 0, **changes: object) -> Path:
    """Writes a random model of that family, with tokenizer and chat template; returns the path."""
    config_class, own = FAMILIES[family]
    config = config_class(**{**_SHAPE, **own, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    model.generation_config.do_sample = False
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per printable ASCII character: text says exactly which tokens it was."""
    # Byte-level, because transformers rebuilds the tokenizers of some families that way.
    letters = ["\u0120" if letter == " " else letter for letter in ALPHABET]
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", chat_template=TEMPLATE
    )


class Oracle:
    """`transformers.generate` on the unsplit model."""

    def __init__(self, directory: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        )
        self._model.eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    @property
    def layers(self) -> int:
        return int(self._model.config.num_hidden_layers)

    def greedy(self, prompt: list[int], tokens: int, *, ignore_end: bool = False) -> list[int]:
        """What greedy `generate` appends to the prompt, end-of-sequence token included."""
        ending = {"eos_token_id": None} if ignore_end else {}
        with torch.inference_mode():
            output = self._model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=tokens,
                **ending,
            )
        return [int(token) for token in output[0, len(prompt) :]]

    def hidden_states(self, tokens: list[int]) -> list[torch.Tensor]:
        """Hidden states [T, H] before each layer and after the last, for a tap to look for."""
        with torch.inference_mode():
            output = self._model(torch.tensor([tokens]), output_hidden_states=True)
        return [state[0] for state in output.hidden_states]
