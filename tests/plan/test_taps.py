"""Nothing of a prompt, an answer or a hidden state leaves the shards in clear."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import string
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from checkpoints import ALPHABET
from running import INSTANCE, RunningPlan
from tap import LoopbackTap, Secrets, SocketTap, search

from runtime.shard import control_pb2, control_pb2_grpc
from runtime.shard.launch import ShardProcess
from security.envelope import EnvelopeClient, Request

HERE = Path(__file__).parent
SPLITS = (2, 4)
HIDDEN_BYTES = 64 * 4


class TappedPlan(RunningPlan):
    """A plan with a spy in every shard and a tap on every control socket."""

    def __init__(self, model: Path, entry: str, spied: Path) -> None:
        super().__init__(
            model, SPLITS, entry=("-I", str(HERE / entry), "--tap", str(spied)), step_tokens=48
        )
        self.spied = spied
        self.controls: dict[str, SocketTap] = {}

    def make_process(self, role: str) -> ShardProcess:
        shard = super().make_process(role)
        directory = shard._directory
        self.controls[role] = SocketTap(
            directory / "control.sock", directory / "real" / "control.sock"
        )
        return shard


class Run:
    """One tapped plan after one prompt: what is secret, and what went over which wire."""

    def __init__(self, plan: TappedPlan, tap: LoopbackTap) -> None:
        letters = string.ascii_letters + string.digits + " "
        chance = random.Random(os.urandom(8))
        self.prompt = "".join(chance.choice(letters) for _ in range(96))
        self.ids = tuple(ALPHABET.index(letter) for letter in self.prompt)
        self.credential = "Bearer sk-" + "".join(chance.sample(letters[:-1], 40))
        # Values of the kind that a client writes, each unmistakable among random bytes.
        self.seed = chance.getrandbits(64)
        self.numbers = {
            name: round(chance.uniform(low, low + 0.3), 12)
            for name, low in (
                ("temperature", 0.9),
                ("top_p", 0.6),
                ("presence_penalty", 0.1),
                ("frequency_penalty", 0.1),
                ("repetition_penalty", 1.05),
            )
        }
        self.bias = round(chance.uniform(-0.5, 0.5), 12)
        roster = plan.roster()
        self.sealed, opener = EnvelopeClient(roster.head.shard_key, INSTANCE).seal(
            Request(
                "POST",
                "/v1/completions",
                "application/json",
                json.dumps(
                    {
                        "model": "test-model",
                        "prompt": self.prompt,
                        "max_tokens": 64,
                        "seed": self.seed,
                        "logit_bias": {str(ALPHABET.index("q")): self.bias},
                        "logprobs": 4,
                        "ignore_eos": True,
                        **self.numbers,
                    }
                ).encode(),
                self.credential,
            )
        )
        self.ingress = roster.head.ingress_address
        body = b""
        for record in self.exchange():
            for event in opener.feed(record.record):
                body += event if isinstance(event, bytes) else b""
        opener.finish()
        self.answer = json.loads(body)["choices"][0]["text"]
        answer_ids = tuple(ALPHABET.index(letter) for letter in self.answer if letter in ALPHABET)
        # The spy must have seen the very prompt, or its hidden states would say nothing.
        lines = (plan.spied / "tokens.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert [token for step in steps for token in step][: len(self.ids)] == list(self.ids)

        self.tensors = {
            f"stage-{stage}": (plan.spied / f"layer-{first}.bin").read_bytes()
            for stage, first in enumerate((0, *SPLITS))
        }
        self.secrets = Secrets(
            texts=(self.prompt, self.answer, self.credential),
            tokens=(self.ids, answer_ids),
            tensors=tuple(self.tensors.items()),
        )
        self.streams = tap.streams()
        self.links = {
            entry.role: int(entry.link_address.rpartition(":")[2]) for entry in roster.entries
        }
        assert plan.broker is not None
        self.broker_port = int(plan.broker.address.rpartition(":")[2])
        self.files = bytes(64).join(
            path.read_bytes() for path in plan.directory.rglob("*") if path.is_file()
        )
        self.controls = {role: bytes(tap.recorded) for role, tap in plan.controls.items()}
        self.messages = {
            role: (plan.spied / f"messages-{role}.bin").read_bytes() for role in plan.controls
        }
        self.parameters = {
            "seed": struct.pack("<Q", self.seed),
            "logit_bias": struct.pack("<d", self.bias),
            **{name: struct.pack("<d", number) for name, number in self.numbers.items()},
        }

    def exchange(self) -> Iterator[control_pb2.SealedRecord]:
        with grpc.insecure_channel(self.ingress) as channel:
            stub = control_pb2_grpc.IngressStub(channel)
            yield from stub.Exchange(control_pb2.SealedRequest(sealed=self.sealed))

    def towards(self, port: int) -> bytes:
        """Both directions of all connections to a port."""
        return bytes(64).join(s for ports, s in self.streams.items() if port in ports)

    @property
    def ingress_port(self) -> int:
        return int(self.ingress.rpartition(":")[2])


@contextlib.contextmanager
def tapped(model: Path, entry: str, spied: Path) -> Iterator[Run]:
    try:
        tap = LoopbackTap()
    except PermissionError:
        pytest.skip("a tap on the loopback needs root (CAP_NET_RAW)")
    with tap, TappedPlan(model, entry, spied) as plan:
        yield Run(plan, tap)


@pytest.fixture(scope="module")
def run(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """The product, as it is."""
    with tapped(
        checkpoint("llama"), "tapped_process.py", tmp_path_factory.mktemp("spied")
    ) as found:
        yield found


def test_every_wire_was_tapped(run: Run) -> None:
    """Without this the tests below could be silent because the tap was."""
    rows = len(run.ids) + 63
    for role in ("stage-1", "stage-2"):
        assert len(run.towards(run.links[role])) > rows * HIDDEN_BYTES, role
    assert len(run.towards(run.links["stage-0"])) > 64 * 4
    assert run.sealed in run.towards(run.ingress_port)
    assert len(run.towards(run.broker_port)) > 10_000
    assert set(run.controls) == {"stage-0", "stage-1", "stage-2"}
    for role, recorded in run.controls.items():
        assert INSTANCE.encode() in recorded and b"serving" in recorded, role
    for role, recorded in run.tensors.items():
        assert len(recorded) >= rows * HIDDEN_BYTES, role


def test_nothing_on_any_tcp_connection(run: Run) -> None:
    everything = bytes(64).join(run.streams.values())
    assert search(everything, run.secrets) == set()


def test_nothing_of_the_request_on_the_ingress_leg(run: Run) -> None:
    """Neither prompt and answer nor the JSON around them."""
    leg = run.towards(run.ingress_port)
    assert search(leg, run.secrets) == set()
    for marker in (b"choices", b"max_tokens", b"text_completion", b"/v1/completions", b"usage"):
        assert marker not in leg


@pytest.mark.parametrize("role", ["stage-0", "stage-1", "stage-2"])
def test_nothing_on_a_control_channel(run: Run, role: str) -> None:
    assert search(run.controls[role], run.secrets) == set()


def test_nothing_in_logs_and_other_files(run: Run) -> None:
    """Of shards and broker, while they run."""
    assert b"serving" in run.files and b"admitted" in run.files
    assert search(run.files, run.secrets) == set()


def test_the_stages_between_hear_nothing_but_hidden_states(run: Run) -> None:
    """A spy in each shard reads its links' messages in clear, as a stage that is curious could.

    Admissions hold every sampling parameter and, because of the repetition penalty, the prompt:
    the head sends them, the last stage receives them, and the one between sees none of it.
    """
    said = Secrets(texts=run.secrets.texts, tokens=run.secrets.tokens)
    for role in ("stage-0", "stage-2"):
        assert "tokens as u32" in search(run.messages[role], said), role
        for name, packed in run.parameters.items():
            assert packed in run.messages[role], (role, name)
        # The credential stays in the head, whose links have no use for it.
        assert run.credential.encode() not in run.messages[role]
    between = run.messages["stage-1"]
    assert run.tensors["stage-0"][:HIDDEN_BYTES] in between
    assert search(between, said) == set()
    for name, packed in run.parameters.items():
        assert packed not in between and packed[::-1] not in between, name
        assert packed not in bytes(64).join(run.streams.values()), name


def test_replayed_request_is_refused(run: Run) -> None:
    """Whoever recorded a sealed request cannot have it answered again."""
    with pytest.raises(grpc.RpcError) as refused:
        list(run.exchange())
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "request_replayed" in refused.value.details()


def test_the_same_search_finds_hidden_states_without_encryption(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The tap can see and the search can find: only the cipher is gone, all else is the same."""
    with tapped(checkpoint("llama"), "plain_process.py", tmp_path) as plain:
        found = search(bytes(64).join(plain.streams.values()), plain.secrets)
        assert {"tensor of stage-0", "tensor of stage-1"} <= found
        for receiver, sender in (("stage-1", "stage-0"), ("stage-2", "stage-1")):
            link = plain.towards(plain.links[receiver])
            assert search(link, plain.secrets) == {f"tensor of {sender}"}
            assert plain.tensors[sender][:HIDDEN_BYTES] in link
        # Requests are sealed by another layer, which was left alone.
        assert search(plain.towards(plain.ingress_port), plain.secrets) == set()


def test_the_tap_puts_streams_together(tmp_path: Path) -> None:
    """Split in the middle of every secret, and still found."""
    secret = "A sentence that nobody else says: " + os.urandom(8).hex()
    try:
        tap = LoopbackTap()
    except PermissionError:
        pytest.skip("a tap on the loopback needs root (CAP_NET_RAW)")
    with tap, socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            accepted, _ = server.accept()
            with accepted:
                for at in range(0, len(secret), 5):
                    client.sendall(secret[at : at + 5].encode())
                    accepted.recv(5)
                port = client.getsockname()[1]
        stream = next(s for ports, s in tap.streams().items() if ports[0] == port)
    assert stream == secret.encode()


TOKENS = (17, 80, 3, 44, 91, 5, 62, 28, 33, 70)


@pytest.mark.parametrize(
    ("planted", "label"),
    [
        (struct.pack("<10I", *TOKENS), "tokens as u32"),
        (struct.pack(">10I", *TOKENS), "tokens as u32"),
        (struct.pack("<10q", *TOKENS), "tokens as i64"),
        (struct.pack("<10H", *TOKENS), "tokens as u16"),
        (struct.pack("<4I", *TOKENS[3:7]), "tokens as u32"),
        (bytes(TOKENS), "tokens as bytes"),
        (json.dumps(TOKENS).encode(), "tokens as decimal text"),
        (json.dumps(TOKENS, separators=(",", ":")).encode(), "tokens as decimal text"),
        (json.dumps({"prompt": "What is hidden in here?"}).encode(), "text"),
        (random.Random(1).randbytes(4096)[1000:1063], "tensor of x"),
    ],
)
def test_search_finds_what_was_planted(planted: bytes, label: str) -> None:
    secrets = Secrets(
        texts=("Tell me. What is hidden in here? Nothing.",),
        tokens=(TOKENS,),
        tensors=(("x", random.Random(1).randbytes(4096)),),
    )
    noise = random.Random(2).randbytes(50_021)
    assert search(noise, secrets) == set()
    assert label in search(noise[:12_345] + planted + noise[12_345:], secrets)


def test_search_refuses_to_prove_nothing() -> None:
    with pytest.raises(ValueError, match="nothing distinctive"):
        search(b"x" * 100, Secrets(texts=("aaaaaaaaaaaaaaaaaaaaaa",)))
