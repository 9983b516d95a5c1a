"""A small model on disk, documents that an owner signs for it, and a broker over them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from placement.plan import DataClass, PlanTemplate, RoleTemplate, Trust
from placement.policy import Policy, Weakness, parse_policy
from security.attestation.enrolled import Enrolments
from security.attestation.evidence import Binding, Evidence
from security.attestation.simulated import SimulatedCollector
from security.broker.admission import AdmissionRequest
from security.broker.audit import read_entries
from security.broker.documents import Installation, sign_installation
from security.broker.key_broker import KeyBroker
from security.broker.members import member_mac, open_secret
from security.broker.store import BrokerStore
from security.broker.watcher import Watcher
from security.manifest import Manifest, build_manifest
from security.roster import Roster
from security.signing import open_signed, public_bytes

SIMULATED = """
version: 1
name: simulated
protect: {prompt: attested, activations: attested, weights: attested}
evidence: [simulated]
ingress: plain
objective: latency
stages: {min: 1}
accept: [simulated_tee, unhardened, plain_ingress, unpinned_measurement]
"""

HARDWARE = """
version: 1
name: hardware
protect: {prompt: attested, activations: attested, weights: attested}
evidence: [sev-snp]
ingress: plain
objective: latency
stages: {min: 1}
accept: [unhardened, plain_ingress, unpinned_measurement]
"""

OPEN = """
version: 1
name: open
protect: {prompt: enrolled, activations: enrolled, weights: enrolled}
evidence: []
ingress: plain
objective: latency
stages: {min: 1}
accept: [unhardened, plain_ingress]
"""


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    write_raw_safetensors(path, json.dumps(header).encode(), data)


def write_raw_safetensors(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write_model(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "model.safetensors.index.json").write_text("{}")
    (directory / "README.md").write_text("about")
    (directory / "modeling_evil.py").write_text("raise SystemExit")
    (directory / ".hidden").write_text("x")
    write_safetensors(
        directory / "model-00001-of-00002.safetensors",
        {"a": ("F32", [2, 3], bytes(range(24))), "b": ("BF16", [4], b"12345678")},
    )
    write_safetensors(
        directory / "model-00002-of-00002.safetensors",
        {"c": ("U8", [5], b"hello"), "empty": ("F32", [0], b"")},
    )
    return directory


def make_template(policy: Policy, manifest: Manifest, **changes: object) -> PlanTemplate:
    attested = policy.protect.prompt is Trust.ATTESTED
    trust = Trust.ATTESTED if attested else Trust.ENROLLED
    evidence = policy.evidence_for(trust)
    roles = tuple(
        RoleTemplate(
            name=f"stage-{i}",
            stage=i,
            first_layer=2 * i,
            last_layer=2 * i + 2,
            tp=1,
            exposes=(DataClass.PROMPT, DataClass.ACTIVATIONS, DataClass.WEIGHTS),
            trust=trust,
            evidence=evidence,
            regions=policy.regions,
            memory_bytes=1 << 20,
        )
        for i in range(2)
    )
    template = PlanTemplate(
        model="tiny",
        cluster="lab",
        manifest_digest=manifest.digest,
        policy_digest=policy.digest,
        dtype="float32",
        max_context=64,
        max_sequences=4,
        max_step_tokens=64,
        block_size=16,
        cache_blocks=16,
        step_deadline_ms=10_000,
        hidden_size=8,
        layers=4,
        vocabulary=32,
        weaknesses=(
            *(w.value for w in Weakness if policy.accepts(w)),
            *policy.left_open(policy.evidence),
        ),
        roles=roles,
        max_instances=1,
        generation=1,
        expires_at=2_000_000_000_000,
    )
    return replace(template, **changes)  # type: ignore[arg-type]


def audit_lines(home: Path) -> list[dict[str, str]]:
    """The audit log of a broker, running or not."""
    return [{"event": entry.event, **entry.fields} for entry in read_entries(home)]


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Shard:
    """A member made by hand, without a network."""

    instance: str
    role: str
    key: X25519PrivateKey
    secret: bytes

    def mac(self, method: str, payload: bytes = b"") -> bytes:
        return member_mac(self.secret, method, self.instance, self.role, payload)


@dataclass
class Lab:
    """An owner, a model and a broker."""

    path: Path
    policy_text: str = SIMULATED
    enrolments: Enrolments | None = None
    owner: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.model = write_model(self.path / "model")
        self.manifest = build_manifest(self.model)
        self.policy = parse_policy(self.policy_text)
        self.owner_public = public_bytes(self.owner)
        self.home = self.path / "broker"
        self.broker = self.start()

    def start(self) -> KeyBroker:
        """A broker on the same home; the one before, if there is one, ends."""
        self.close()
        return KeyBroker(BrokerStore(self.home), self.owner_public, clock=self.clock)

    def close(self) -> None:
        if "broker" in vars(self):
            self.broker.close()

    def template(self, **changes: object) -> PlanTemplate:
        return make_template(self.policy, self.manifest, **changes)

    def installation(self, broker_public: bytes | None = None, **changes: object) -> Installation:
        return sign_installation(
            self.owner,
            broker_public or self.broker.public_key,
            policy=self.policy,
            template=self.template(**changes),
            manifest=self.manifest,
            enrolments=self.enrolments,
        )

    def install(self, **changes: object) -> None:
        self.broker.install(self.installation(**changes), "test")

    def audit(self) -> list[dict[str, str]]:
        return audit_lines(self.home)

    def request(
        self,
        role: str = "stage-0",
        instance: str = "pipeline-0",
        *,
        key: X25519PrivateKey | None = None,
        collect: Callable[[bytes], Evidence] | None = None,
        bind: Callable[[Binding], Binding] = lambda binding: binding,
        node: str = "node-a",
    ) -> AdmissionRequest:
        """A fresh challenge answered; `bind` changes what the evidence is honestly bound to."""
        nonce, _ = self.broker.challenge(instance, role, "test")
        public = (key or X25519PrivateKey.generate()).public_key().public_bytes_raw()
        binding = bind(
            Binding(
                nonce=nonce,
                shard_key=public,
                role=role,
                cluster="lab",
                instance=instance,
                broker_key=self.broker.public_key,
                policy_digest=self.policy.digest,
                manifest_digest=self.manifest.digest,
            )
        )
        collect = collect or SimulatedCollector(node).collect
        return AdmissionRequest(
            nonce=nonce,
            instance=instance,
            role=role,
            shard_key=public,
            link_address="10.0.0.1:4000",
            ingress_address="10.0.0.1:5000" if role == "stage-0" else "",
            binding=binding,
            evidence=collect(binding.report_data()),
            notes=(),
        )

    def admit(self, role: str, instance: str = "pipeline-0", node: str = "node-a") -> Shard:
        key = X25519PrivateKey.generate()
        request = self.request(role, instance, key=key, node=node)
        sealed = self.broker.admit(request, "test")
        return Shard(instance, role, key, open_secret(sealed, key, instance, role, request.nonce))

    def watch(self, shard: Shard, known: bytes = b"") -> Watcher:
        mac = shard.mac("watch", known)
        return self.broker.watch(shard.instance, shard.role, known, mac, "test")

    def opened(self, document: bytes | None) -> Roster:
        assert document is not None
        return Roster.from_bytes(open_signed("roster", document, self.broker.public_key))
