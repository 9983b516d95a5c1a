"""What is not as the owner signed it gets no key, no weights' use and no peers, and says why."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import running
import torch
from checkpoints import Oracle
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from running import INSTANCE, RunningPlan, equal_nodes

from runtime.shard import control_pb2
from runtime.shard.launch import ShardProcess
from security.attestation.evidence import Binding
from security.attestation.simulated import SimulatedCollector
from security.broker import broker_pb2
from security.broker.audit import read_entries
from security.broker.candidate import request_admission
from security.broker.challenge import Challenge
from security.broker.client import BrokerClient
from security.errors import AdmissionRefused, NoCollector, PickleOnlyCheckpoint
from security.manifest import build_manifest

ROLE = "stage-1"


def audit(plan: RunningPlan) -> list[dict[str, str]]:
    entries = read_entries(plan.directory / "broker")
    return [{"event": entry.event, **entry.fields} for entry in entries]


def no_roster(plan: RunningPlan) -> bool:
    with pytest.raises(AdmissionRefused) as refused:
        plan.roster()
    return refused.value.code == "no_roster"


def flip(path: Path, offset: int) -> None:
    """Changes one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def rogue(model: Path) -> Iterator[RunningPlan]:
    """A working broker with the right documents, of another owner."""
    with RunningPlan(model, (2, 4), start=False) as plan:
        yield plan


@pytest.fixture(scope="module")
def plan(model: Path) -> Iterator[RunningPlan]:
    """A plan with all shards but one, which wait for it."""
    with RunningPlan(model, (2, 4), start=False) as running_plan:
        for role in ("stage-0", "stage-2"):
            running_plan.start_shard(role)
        yield running_plan


class Attempt:
    """One real shard process that tries to become stage-1; `status` waits until it gave up."""

    def __init__(self, plan: RunningPlan, name: str, **changes: object) -> None:
        self._shard = ShardProcess(plan.directory, plan.directory / f"{name}.log")
        self._plan = plan
        self._changes = {"role": ROLE, **changes}
        self._last = control_pb2.ShardStatus()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._shard.start(self._plan.spec(**self._changes))
        for status in self._shard.watch():
            self._last = status
            if status.state == control_pb2.SHARD_STATE_FAILED:
                return

    @property
    def status(self) -> control_pb2.ShardStatus:
        self._thread.join(100)
        assert self._last.state == control_pb2.SHARD_STATE_FAILED, self._plan.logs()
        return self._last

    def end(self) -> None:
        self._shard.kill()
        self._shard.stop(1.0)


@pytest.fixture(scope="module")
def attempts(
    plan: RunningPlan, rogue: RunningPlan, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Attempt]]:
    """All the shards that must not get in, started at the same time."""
    directory = tmp_path_factory.mktemp("changed")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(plan.model, directory / name))

    template = copy("template")
    flip(template / "chat_template.jinja", 10)
    weight = copy("weight")
    tensor = next(
        tensor
        for tensor in plan.manifest.tensors
        if tensor.name == "model.layers.3.mlp.up_proj.weight"
    )
    header = next(file.header_size for file in plan.manifest.files if file.name == tensor.file)
    flip(weight / tensor.file, header + tensor.end - 1)
    pickles = copy("pickles")
    for file in pickles.glob("*.safetensors"):
        file.unlink()
    torch.save({}, pickles / "pytorch_model.bin")
    assert rogue.broker is not None
    started = {
        "template": Attempt(plan, "template", model_directory=str(template)),
        "weight": Attempt(plan, "weight", model_directory=str(weight)),
        "pickles": Attempt(plan, "pickles", model_directory=str(pickles)),
        "missing": Attempt(plan, "missing", model_directory=str(directory / "nothing-here")),
        "role": Attempt(plan, "role", role="stage-7"),
        "rogue": Attempt(plan, "rogue", broker_address=rogue.broker.address),
    }
    yield started
    for attempt in started.values():
        attempt.end()


# -- real shards -----------------------------------------------------------------------------------


def test_changed_chat_template(plan: RunningPlan, attempts: dict[str, Attempt]) -> None:
    """One byte: no admission, no roster, and both sides name the file."""
    status = attempts["template"].status
    assert status.error_code == "wrong_manifest"
    assert "chat_template.jinja" in status.error
    refusals = [line for line in audit(plan) if line.get("code") == "wrong_manifest"]
    assert any("chat_template.jinja: expected sha256" in line["reason"] for line in refusals)
    assert no_roster(plan)


def test_changed_weight(plan: RunningPlan, attempts: dict[str, Attempt]) -> None:
    """One byte of one tensor: found when it is read, before anything is computed with it."""
    status = attempts["weight"].status
    assert status.error_code == "manifest_mismatch"
    assert "model.layers.3.mlp.up_proj.weight" in status.error
    assert "serving" not in (plan.directory / "weight.log").read_text()
    reports = [line["text"] for line in audit(plan) if line["event"] == "report"]
    assert any(
        "manifest_mismatch" in text and "model.layers.3.mlp.up_proj.weight" in text
        for text in reports
    ), reports
    assert no_roster(plan)


def test_pickles_in_place_of_weights(plan: RunningPlan, attempts: dict[str, Attempt]) -> None:
    status = attempts["pickles"].status
    assert status.error_code == "wrong_manifest"
    assert "model.safetensors" in status.error
    assert no_roster(plan)


def test_missing_model_directory(plan: RunningPlan, attempts: dict[str, Attempt]) -> None:
    status = attempts["missing"].status
    assert "nothing-here" in status.error
    assert "found nothing; copy it there" in status.error
    assert status.error_code == "model_directory_missing"
    assert "Traceback" not in (plan.directory / "missing.log").read_text()
    assert no_roster(plan)


def test_role_that_the_plan_does_not_have(plan: RunningPlan, attempts: dict[str, Attempt]) -> None:
    status = attempts["role"].status
    assert status.error_code == "unknown_role"
    assert any(line.get("code") == "unknown_role" for line in audit(plan))
    assert no_roster(plan)


def test_rogue_broker(plan: RunningPlan, rogue: RunningPlan, attempts: dict[str, Attempt]) -> None:
    """The shard pins its owner's key: it shows another owner's broker no evidence at all."""
    status = attempts["rogue"].status
    assert status.error_code == "signature_invalid"
    seen = [line for line in audit(rogue) if line["event"] in ("admitted", "refused")]
    assert seen == []


def test_pickle_only_checkpoint(model: Path, tmp_path: Path) -> None:
    """Not even a manifest is made of it; the owner is told how to convert."""
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    for file in copy.glob("*.safetensors"):
        file.unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(PickleOnlyCheckpoint, match="save_pretrained") as refused:
        RunningPlan(copy, start=False)
    assert "pytorch_model.bin" in str(refused.value)


def test_pickles_beside_weights_are_not_listed(model: Path, tmp_path: Path) -> None:
    """So that no shard can ever read them."""
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    torch.save({}, copy / "pytorch_model.bin")
    assert build_manifest(copy) == build_manifest(model)


# -- what no honest shard would send ---------------------------------------------------------------


class Liar:
    """Speaks the broker's protocol over the network, and lies where it is told to."""

    def __init__(self, plan: RunningPlan, client: BrokerClient) -> None:
        self._plan = plan
        self._client = client

    def challenge(self, role: str = ROLE, instance: str = INSTANCE) -> Challenge:
        return self._client.challenge(instance, role)

    def binding(self, challenge: Challenge, key: X25519PrivateKey) -> Binding:
        return challenge.binding(key.public_key().public_bytes_raw(), self._plan.manifest.digest)

    def admit(
        self,
        challenge: Challenge,
        key: X25519PrivateKey,
        evidence_over: Binding,
        stated: Binding | None = None,
    ) -> None:
        """Asks for admission with evidence over one binding, stating another."""
        stated = stated or self.binding(challenge, key)
        evidence = SimulatedCollector("node-1").collect(evidence_over.report_data())
        request = broker_pb2.AdmitRequest(
            nonce=challenge.nonce,
            instance=challenge.instance,
            role=challenge.role,
            shard_key=key.public_key().public_bytes_raw(),
            link_address="127.0.0.1:4000",
            binding=broker_pb2.StatedBinding(
                nonce=stated.nonce,
                shard_key=stated.shard_key,
                role=stated.role,
                cluster=stated.cluster,
                instance=stated.instance,
                broker_key=stated.broker_key,
                policy_digest=stated.policy_digest,
                manifest_digest=stated.manifest_digest,
            ),
            evidence_kind=evidence.kind,
            evidence=evidence.body,
        )
        self._client._call(lambda: self._client._stub.Admit(request, timeout=10))

    def refused(self, code: str, attempt: Callable[[], None]) -> None:
        """The attempt is refused with that code, which is also in the broker's log."""
        before = len(audit(self._plan))
        with pytest.raises(AdmissionRefused) as refusal:
            attempt()
        assert refusal.value.code == code
        logged = [line for line in audit(self._plan)[before:] if line["event"] == "refused"]
        # Shards of other tests may be refused at the same time.
        assert any(line["code"] == code and line["role"] for line in logged), logged


@pytest.fixture
def liar(plan: RunningPlan) -> Iterator[Liar]:
    assert plan.broker is not None
    with BrokerClient(plan.broker.address, plan.owner_public) as client:
        yield Liar(plan, client)


def test_evidence_bound_to_another_key(liar: Liar) -> None:
    """A recorded report does not admit the key of whoever recorded it, however it is presented."""
    mine, theirs = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    challenge = liar.challenge()
    other = liar.binding(challenge, theirs)
    liar.refused("evidence_not_bound", lambda: liar.admit(challenge, mine, other))
    challenge = liar.challenge()
    other = liar.binding(challenge, theirs)
    liar.refused("shard_key_swapped", lambda: liar.admit(challenge, mine, other, stated=other))


def test_used_nonce(liar: Liar) -> None:
    key = X25519PrivateKey.generate()
    challenge = liar.challenge()
    honest = liar.binding(challenge, key)
    wrong = replace(honest, cluster="another")
    liar.refused("evidence_not_bound", lambda: liar.admit(challenge, key, wrong))
    liar.refused("nonce_used", lambda: liar.admit(challenge, key, honest))


def test_nonce_of_another_role(liar: Liar) -> None:
    """A challenge for one role is no ticket to another."""
    key = X25519PrivateKey.generate()
    swapped = replace(liar.challenge("stage-2"), role=ROLE)
    honest = liar.binding(swapped, key)
    liar.refused("nonce_other_role", lambda: liar.admit(swapped, key, honest))


def test_evidence_for_another_role(liar: Liar) -> None:
    """Two shards cannot trade places with each other's evidence."""
    key = X25519PrivateKey.generate()
    challenge = liar.challenge()
    other = replace(liar.binding(challenge, key), role="stage-2")
    liar.refused("role_swapped", lambda: liar.admit(challenge, key, other, stated=other))
    challenge = liar.challenge()
    other = replace(liar.binding(challenge, key), role="stage-2")
    liar.refused("evidence_not_bound", lambda: liar.admit(challenge, key, other))


def test_evidence_for_another_broker(liar: Liar) -> None:
    """What was shown to a rogue broker is of no use with the real one."""
    key = X25519PrivateKey.generate()
    challenge = liar.challenge()
    other = replace(liar.binding(challenge, key), broker_key=bytes(32))
    liar.refused("wrong_broker", lambda: liar.admit(challenge, key, other, stated=other))


def test_evidence_for_another_policy_or_model(liar: Liar) -> None:
    key = X25519PrivateKey.generate()
    for field, code in (("policy_digest", "wrong_policy"), ("manifest_digest", "wrong_manifest")):
        challenge = liar.challenge()
        other = replace(liar.binding(challenge, key), **{field: "0" * 64})
        liar.refused(code, lambda c=challenge, o=other: liar.admit(c, key, o, stated=o))


def test_instance_beyond_the_template(plan: RunningPlan, liar: Liar) -> None:
    """Ray can ask for as many pipelines as it likes; the template says how many there are."""
    _wait_for_members(plan, 2)
    key = X25519PrivateKey.generate()
    challenge = liar.challenge(instance="pipeline-1")
    honest = liar.binding(challenge, key)
    assert plan.template.max_instances == 1
    liar.refused("too_many_instances", lambda: liar.admit(challenge, key, honest))


def _wait_for_members(plan: RunningPlan, count: int) -> None:
    with plan._changed:
        assert plan._changed.wait_for(
            lambda: (
                sum(s.state == control_pb2.SHARD_STATE_WAITING for s in plan.states.values())
                == count
            ),
            90,
        ), plan.logs()


def test_policy_without_simulated_evidence(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a TEE cannot pretend: neither by itself nor with simulated evidence."""
    policy = running.POLICY.replace("[simulated]", "[sev-snp]").replace("simulated_tee, ", "")
    monkeypatch.setattr(running, "POLICY", policy)
    monkeypatch.setattr(running, "equal_nodes", partial(equal_nodes, tee="sev-snp"))
    with RunningPlan(model, (2, 4), start=False) as strict:
        assert strict.broker is not None
        with pytest.raises(NoCollector, match="sev-snp"):
            request_admission(
                strict.broker.address,
                strict.owner_public,
                instance=INSTANCE,
                role=ROLE,
                node="node-1",
                model_dir=model,
                link_address="127.0.0.1:4000",
            )
        with BrokerClient(strict.broker.address, strict.owner_public) as client:
            liar = Liar(strict, client)
            key = X25519PrivateKey.generate()
            challenge = liar.challenge()
            honest = liar.binding(challenge, key)
            liar.refused("evidence_kind_refused", lambda: liar.admit(challenge, key, honest))


# -- and the counter-proof -------------------------------------------------------------------------


def test_honest_shard_completes_the_plan(
    plan: RunningPlan, attempts: dict[str, Attempt], model: Path
) -> None:
    """After all that, the one shard that was missing is let in, and the model answers."""
    for attempt in attempts.values():
        attempt.end()
    assert no_roster(plan)
    plan.start_shard(ROLE)
    plan.wait_serving()
    oracle = Oracle(model)
    prompt = [5, 17, 40, 8]
    expected = oracle.tokenizer.decode(oracle.greedy(prompt, 12), skip_special_tokens=True)
    assert plan.complete(prompt, 12)[0] == expected
