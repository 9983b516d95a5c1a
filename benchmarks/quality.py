"""What a precision costs: answers of bfloat16 and int8 beside those of float32.

Two models. The demo model on answers to questions in phrasings that its training never showed;
and the random checkpoint on texts that it has itself drawn in float32. The first says what a small
trained model loses; the second how far sums in another precision lead away in one of usual width.

Measured on every token of the answers: how often the most likely token is the one of float32; the
mean Kullback-Leibler divergence of the distribution from that of float32, in nats; and perplexity.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.checkpoint import ROOT
from benchmarks.options import common_parser, json_path, model_path, prompts
from benchmarks.report import print_table, write_json
from models.train_demo import KINDS, Encoder
from runtime.stage.settings import StageSettings
from runtime.stage.stage import StageRunner
from security.channel.frame import SequenceStep, StepHeader
from security.manifest import ModelFiles, build_manifest

__all__ = ["Quality", "Text", "compare", "main"]

DEMO = ROOT / "models" / "demo"
REFERENCE = ("float32", "plain")
COMPARED = (("bfloat16", "plain"), ("float32", "int8"), ("bfloat16", "int8"))
_BLOCK = 16
_SEED = 11


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, and which of them are judged: those from `first` up to, not including, `end`."""

    ids: tuple[int, ...]
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Quality:
    """How one precision does on some texts.

    Attributes:
        tokens: that were judged.
        agreement: share of them where the most likely token is the reference's.
        divergence: mean of KL(reference, this), in nats.
        perplexity: exponential of the mean negative log-likelihood of the texts' tokens.
    """

    tokens: int
    agreement: float
    divergence: float
    perplexity: float


class WholeModel:
    """One stage that has all layers.

    Args:
        model: checkpoint directory.
        dtype: "float32" or "bfloat16".
        weight_format: see `StageSettings`.
        context: longest text, in tokens.
        sequences: most texts at once.
        threads: processor cores.
    """

    def __init__(
        self,
        model: Path,
        dtype: str,
        weight_format: str,
        *,
        context: int,
        sequences: int,
        threads: int,
    ) -> None:
        config = json.loads((model / "config.json").read_text())
        layers = int(config["num_hidden_layers"])
        self._blocks = -(-context // _BLOCK)
        self._stage = StageRunner(
            ModelFiles(model, build_manifest(model)),
            StageSettings(
                first_layer=0,
                last_layer=layers,
                layers=layers,
                dtype=dtype,
                tp=1,
                block_size=_BLOCK,
                cache_blocks=self._blocks * sequences,
                max_context=context,
                hidden_size=int(config["hidden_size"]),
                threads=threads,
                weight_format=weight_format,
            ),
        )

    def logits(self, rows: Sequence[Sequence[int]], start: int = 0) -> torch.Tensor:
        """Logits [tokens, V] after each token; row i goes on at position `start` of sequence i."""
        sequences = tuple(
            SequenceStep(
                slot,
                start,
                len(row),
                tuple(range(slot * self._blocks, (slot + 1) * self._blocks)),
                False,
            )
            for slot, row in enumerate(rows)
        )
        token_ids = [token for row in rows for token in row]
        header = StepHeader(0, sequences)
        return self._stage.logits(self._stage.forward(header, token_ids=token_ids))

    def close(self) -> None:
        """Lets go of the model."""
        self._stage.close()


@contextmanager
def _opened(
    model: Path, kind: tuple[str, str], *, context: int, sequences: int, threads: int
) -> Iterator[WholeModel]:
    whole = WholeModel(model, *kind, context=context, sequences=sequences, threads=threads)
    try:
        yield whole
    finally:
        whole.close()


def demo_texts(count: int) -> list[Text]:
    """Questions that training never showed, each with the answer that is right."""
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(DEMO))
    rng = random.Random(_SEED)
    texts = []
    for make, _ in KINDS:
        for _ in range(count):
            turn = make(rng, True)
            ids, labels = encoder.chat(
                [
                    {"role": "user", "content": turn.question},
                    {"role": "assistant", "content": turn.answer},
                ]
            )
            judged = [place for place, label in enumerate(labels) if label >= 0]
            texts.append(Text(tuple(ids), judged[0], judged[-1] + 1))
    return texts


def drawn_texts(
    model: Path, count: int, length: int, *, vocabulary: int, threads: int
) -> list[Text]:
    """Random prompts of 16 tokens, gone on with what the model draws in float32."""
    generator = torch.Generator().manual_seed(_SEED)
    begun = prompts(count, _BLOCK, vocabulary, seed=_SEED)
    texts = [list(ids) for ids in begun]
    with _opened(model, REFERENCE, context=length, sequences=count, threads=threads) as whole:
        rows: list[list[int]] = [list(ids) for ids in begun]
        while len(texts[0]) < length:
            start = len(texts[0]) - len(rows[0])
            logits = whole.logits(rows, start)
            last = logits.view(count, -1, logits.shape[-1])[:, -1]
            drawn = torch.multinomial(last.softmax(-1), 1, generator=generator)
            rows = drawn.tolist()
            texts = [text + row for text, row in zip(texts, rows, strict=True)]
    return [Text(tuple(text), _BLOCK, length) for text in texts]


def compare(model: Path, texts: Sequence[Text], *, threads: int) -> dict[tuple[str, str], Quality]:
    """The quality of every precision; of the reference, too, which agrees with itself."""
    context = max(len(text.ids) for text in texts)
    exact: list[torch.Tensor] = []
    found = {}
    for kind in (REFERENCE, *COMPARED):
        hits = tokens = 0
        divergence = likelihood = 0.0
        with _opened(model, kind, context=context, sequences=1, threads=threads) as whole:
            for number, text in enumerate(texts):
                judged = slice(text.first - 1, text.end - 1)
                logs = whole.logits([text.ids])[judged].log_softmax(-1)
                if kind == REFERENCE:
                    exact.append(logs)
                wanted = torch.tensor(text.ids[text.first : text.end])
                reference = exact[number]
                tokens += len(wanted)
                hits += int((logs.argmax(-1) == reference.argmax(-1)).sum())
                divergence += float((reference.exp() * (reference - logs)).sum())
                likelihood += float(logs.gather(1, wanted[:, None]).sum())
        found[kind] = Quality(
            tokens,
            hits / tokens,
            divergence / tokens,
            float(torch.tensor(-likelihood / tokens).exp()),
        )
    return found


def main() -> None:
    """Measures and reports."""
    parser = common_parser("quality", __doc__)
    parser.add_argument("--texts", type=int, default=40, help="of each kind of question")
    parser.add_argument("--drawn", type=int, default=16, help="texts of the random checkpoint")
    parser.add_argument("--length", type=int, default=128, help="of these, in tokens")
    arguments = parser.parse_args()
    threads: int = arguments.threads
    torch.set_num_threads(threads)
    model = model_path(arguments)
    subjects = {
        "demo model": (DEMO, demo_texts(arguments.texts)),
        model.name: (
            model,
            drawn_texts(
                model,
                arguments.drawn,
                arguments.length,
                vocabulary=arguments.vocabulary,
                threads=threads,
            ),
        ),
    }
    results: list[dict[str, object]] = []
    for name, (directory, texts) in subjects.items():
        found = compare(directory, texts, threads=threads)
        tokens = found[REFERENCE].tokens
        print_table(
            f"{name}: {tokens} tokens of {len(texts)} texts",
            ("dtype, weights", "same token", "KL nats", "perplexity"),
            [
                (
                    ", ".join(kind),
                    f"{quality.agreement:.2%}",
                    f"{quality.divergence:.2e}",
                    f"{quality.perplexity:.4f}",
                )
                for kind, quality in found.items()
            ],
        )
        results += [
            {"model": name, "dtype": kind[0], "weights": kind[1], **asdict(quality)}
            for kind, quality in found.items()
        ]
    write_json(json_path(arguments), {"results": results})


if __name__ == "__main__":
    main()
