"""What a plan says: which stages a model is cut into, what each may be trusted with, and where.

A *template* is what the owner signs: roles, their layers and the least trust each needs. It names
no machine. A *binding* says which node is meant to take which role of one instance; it is a wish
that the key broker never relies on. A *plan* is both, with the planner's estimates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType

from placement.document import MAX_INTEGER, DocumentError, Encodable, Fields, decode, digest, encode

MAX_TEMPLATE_BYTES = 1 << 20
"""Longest encoded template that is parsed."""

MAX_PLAN_BYTES = 2 << 20
"""Longest encoded plan that is parsed."""

MAX_ROLES = 128
MAX_LAYERS = 4096
MAX_TENSOR_PARALLEL = 64
MAX_CONTEXT = 1 << 24
MAX_SEQUENCES = 4096
MAX_STEP_TOKENS = 1 << 17
MAX_BLOCK_SIZE = 1024
MAX_CACHE_BLOCKS = 1 << 24
MAX_STEP_DEADLINE_MS = 3_600_000

NAME = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
"""Pattern of names of clusters, instances, nodes and evidence kinds."""

MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,255}"
"""Pattern of served model names: a name, with slashes for the publisher."""

REGION = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Pattern of region names."""

WEAKNESS = r"[a-z][a-z0-9_.-]{0,63}"
"""A name of `placement.policy.Weakness`, or of what `Policy.left_open` names."""

MAX_WEAKNESSES = 256

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
"""Bytes of one number by dtype name; also the closed list of dtypes that can be served."""


WEIGHT_FORMATS = ("plain", "int8")
"""How linears of the layers and the LM head may be held: in the dtype, or as int8 with one scale
for each output channel, which only the native decoder of the CPU computes."""


class PlanError(DocumentError):
    """A template, binding or plan contradicts itself; says the field, expected and found."""


class Trust(StrEnum):
    """How far a machine has proved itself."""

    ENROLLED = "enrolled"
    """It holds a key that the owner signed; it proves nothing about what it runs."""
    ATTESTED = "attested"
    """Fresh hardware evidence says what it runs, bound to the shard's own key."""

    def covers(self, needed: Trust) -> bool:
        """Whether this trust is at least the one needed."""
        return self is Trust.ATTESTED or needed is Trust.ENROLLED


class DataClass(StrEnum):
    """What a shard may see in the clear."""

    PROMPT = "prompt"
    """Text, token ids, logits."""
    ACTIVATIONS = "activations"
    """Hidden states and the KV cache."""
    WEIGHTS = "weights"
    """The parameters of its layers."""


@dataclass(frozen=True, slots=True)
class RoleTemplate:
    """One stage: a contiguous range of layers, and what a machine must prove to hold it.

    Attributes:
        name: "stage-{stage}".
        stage: position in the pipeline, from 0.
        first_layer: first decoder layer, inclusive.
        last_layer: end of the range, exclusive.
        tp: tensor-parallel ranks, all on one machine.
        exposes: data classes that the shard sees in the clear.
        trust: least trust that a machine needs.
        evidence: kinds of evidence that are accepted, any one of which is enough.
        regions: regions that are accepted; empty means any.
        memory_bytes: what the shard needs in all its ranks together, cache and working space
            included.
    """

    name: str
    stage: int
    first_layer: int
    last_layer: int
    tp: int
    exposes: tuple[DataClass, ...]
    trust: Trust
    evidence: tuple[str, ...]
    regions: tuple[str, ...]
    memory_bytes: int

    def __post_init__(self) -> None:
        where = f"role {self.name!r:.80}"
        _check(0 <= self.stage < MAX_ROLES, f"{where}.stage", "a stage below 128", self.stage)
        _check(self.name == f"stage-{self.stage}", where, f"'stage-{self.stage}'", self.name)
        _check(
            0 <= self.first_layer < self.last_layer <= MAX_LAYERS,
            f"{where}.layers",
            f"0 <= first < last <= {MAX_LAYERS}",
            f"[{self.first_layer}, {self.last_layer})",
        )
        _check(1 <= self.tp <= MAX_TENSOR_PARALLEL, f"{where}.tp", "1 to 64 ranks", self.tp)
        _check(
            len(set(self.exposes)) == len(self.exposes) > 0,
            f"{where}.exposes",
            "at least one data class, none twice",
            list(self.exposes),
        )
        _check(
            len(set(self.evidence)) == len(self.evidence) > 0,
            f"{where}.evidence",
            "at least one kind, none twice",
            list(self.evidence),
        )
        _check(
            all(re.fullmatch(NAME, kind) for kind in self.evidence),
            f"{where}.evidence",
            "names of evidence kinds",
            list(self.evidence),
        )
        _check(
            len(set(self.regions)) == len(self.regions)
            and all(re.fullmatch(REGION, region) for region in self.regions),
            f"{where}.regions",
            "names of regions, none twice",
            list(self.regions),
        )
        _check(
            0 < self.memory_bytes <= MAX_INTEGER,
            f"{where}.memory_bytes",
            "a positive number of bytes",
            self.memory_bytes,
        )

    @property
    def layers(self) -> int:
        """How many decoder layers the stage holds."""
        return self.last_layer - self.first_layer

    def to_document(self) -> dict[str, Encodable]:
        """The fields as a JSON object."""
        return {
            "name": self.name,
            "stage": self.stage,
            "first_layer": self.first_layer,
            "last_layer": self.last_layer,
            "tp": self.tp,
            "exposes": list(self.exposes),
            "trust": self.trust,
            "evidence": list(self.evidence),
            "regions": list(self.regions),
            "memory_bytes": self.memory_bytes,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> RoleTemplate:
        """Reads what `to_document` wrote; raises PlanError."""
        return cls._read(Fields.of(document, "role", PlanError))

    @classmethod
    def _read(cls, reader: Fields) -> RoleTemplate:
        role = cls(
            name=reader.text("name", 32),
            stage=reader.integer("stage", 0, MAX_ROLES - 1),
            first_layer=reader.integer("first_layer", 0, MAX_LAYERS),
            last_layer=reader.integer("last_layer", 0, MAX_LAYERS),
            tp=reader.integer("tp", 1, MAX_TENSOR_PARALLEL),
            exposes=reader.choices("exposes", DataClass),
            trust=reader.choice("trust", Trust),
            evidence=reader.texts("evidence", 16, 128),
            regions=reader.texts("regions", 64, 64),
            memory_bytes=reader.integer("memory_bytes", 1, MAX_INTEGER),
        )
        reader.finish()
        return role


@dataclass(frozen=True, slots=True)
class PlanTemplate:
    """What the owner signs: everything about a pipeline except the machines.

    Attributes:
        model: the name under which the model is served.
        cluster: the cluster that the template is for.
        manifest_digest: SHA-256 (hex) of the model's manifest.
        policy_digest: SHA-256 (hex) of the policy's bytes.
        dtype: "float32", "bfloat16" or "float16".
        max_context: longest sequence, in tokens, prompt and answer together.
        max_sequences: most sequences that run at once.
        max_step_tokens: most tokens that one step carries.
        block_size: tokens in one block of the KV cache.
        cache_blocks: blocks of KV cache on every stage.
        step_deadline_ms: how long a step may take before a silent stage counts as broken.
        hidden_size: width of a hidden state.
        layers: decoder layers of the whole model.
        vocabulary: rows of the embedding.
        weaknesses: names of the accepted weaknesses that apply to this template.
        roles: the stages, in order.
        max_instances: most pipelines of this template at a time.
        generation: grows with every template that the owner signs; never goes back.
        expires_at: Unix time, in seconds, after which nobody is admitted.
        weight_format: one of `WEIGHT_FORMATS`; it changes what the model answers.
    """

    model: str
    cluster: str
    manifest_digest: str
    policy_digest: str
    dtype: str
    max_context: int
    max_sequences: int
    max_step_tokens: int
    block_size: int
    cache_blocks: int
    step_deadline_ms: int
    hidden_size: int
    layers: int
    vocabulary: int
    weaknesses: tuple[str, ...]
    roles: tuple[RoleTemplate, ...]
    max_instances: int
    generation: int
    expires_at: int
    weight_format: str = "plain"

    def __post_init__(self) -> None:
        _check_text("model", self.model, MODEL_NAME)
        _check_text("cluster", self.cluster, NAME)
        _check_text("manifest_digest", self.manifest_digest, "[0-9a-f]{64}")
        _check_text("policy_digest", self.policy_digest, "[0-9a-f]{64}")
        _check(self.dtype in ITEM_BYTES, "dtype", " or ".join(ITEM_BYTES), self.dtype)
        _check(
            self.weight_format in WEIGHT_FORMATS,
            "weight_format",
            " or ".join(WEIGHT_FORMATS),
            self.weight_format,
        )
        for name, maximum in _TEMPLATE_LIMITS.items():
            value = getattr(self, name)
            _check(1 <= value <= maximum, name, f"1 to {maximum}", value)
        _check(
            self.block_size * self.cache_blocks >= self.max_context,
            "cache_blocks",
            f"room for one sequence of {self.max_context} tokens",
            f"{self.cache_blocks} blocks of {self.block_size}",
        )
        _check(
            len(set(self.weaknesses)) == len(self.weaknesses) <= MAX_WEAKNESSES
            and all(re.fullmatch(WEAKNESS, name) for name in self.weaknesses),
            "weaknesses",
            "names of weaknesses, none twice",
            list(self.weaknesses),
        )
        _check(1 <= len(self.roles) <= MAX_ROLES, "roles", f"1 to {MAX_ROLES}", len(self.roles))
        end = 0
        for stage, role in enumerate(self.roles):
            _check(role.stage == stage, f"roles[{stage}].stage", str(stage), role.stage)
            _check(
                role.first_layer == end,
                f"roles[{stage}].first_layer",
                f"{end}, where the stage before ends",
                role.first_layer,
            )
            end = role.last_layer
        _check(end == self.layers, "roles", f"stages that end at layer {self.layers}", f"end {end}")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `to_bytes`."""
        return digest(self.to_bytes())

    def role(self, name: str) -> RoleTemplate:
        """The role of that name; raises PlanError if there is none."""
        for role in self.roles:
            if role.name == name:
                return role
        raise PlanError(
            f"role: expected one of {', '.join(role.name for role in self.roles)}, "
            f"found {name[:64]!r}"
        )

    def to_document(self) -> dict[str, Encodable]:
        """The fields as a JSON object."""
        document: dict[str, Encodable] = {"format": "bulkhead-template-1"}
        for item in fields(self):
            document[item.name] = getattr(self, item.name)
        document["weaknesses"] = list(self.weaknesses)
        document["roles"] = [role.to_document() for role in self.roles]
        return document

    def to_bytes(self) -> bytes:
        """The canonical encoding, which is what gets signed."""
        return encode(self.to_document())

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> PlanTemplate:
        """Reads what `to_document` wrote; raises PlanError."""
        reader = Fields.of(document, "template", PlanError)
        reader.text("format", 32, "bulkhead-template-1")
        numbers = {
            name: reader.integer(name, 1, maximum) for name, maximum in _TEMPLATE_LIMITS.items()
        }
        template = cls(
            model=reader.text("model"),
            cluster=reader.text("cluster"),
            manifest_digest=reader.digest("manifest_digest"),
            policy_digest=reader.digest("policy_digest"),
            dtype=reader.text("dtype", 16),
            weight_format=reader.text("weight_format", 16),
            weaknesses=reader.texts("weaknesses", MAX_WEAKNESSES, 64),
            roles=tuple(RoleTemplate._read(role) for role in reader.sections("roles", MAX_ROLES)),
            **numbers,
        )
        reader.finish()
        return template

    @classmethod
    def from_bytes(cls, data: bytes) -> PlanTemplate:
        """Decodes `to_bytes`; raises PlanError."""
        return cls.from_document(_decode(data, MAX_TEMPLATE_BYTES, "template"))


_TEMPLATE_LIMITS: Mapping[str, int] = MappingProxyType(
    {
        "max_context": MAX_CONTEXT,
        "max_sequences": MAX_SEQUENCES,
        "max_step_tokens": MAX_STEP_TOKENS,
        "block_size": MAX_BLOCK_SIZE,
        "cache_blocks": MAX_CACHE_BLOCKS,
        "step_deadline_ms": MAX_STEP_DEADLINE_MS,
        "hidden_size": 1 << 20,
        "layers": MAX_LAYERS,
        "vocabulary": 1 << 24,
        "max_instances": 4096,
        "generation": 2**53,
        "expires_at": 2**53,
    }
)
"""Every integer of a template is from 1 to the number given here."""


@dataclass(frozen=True, slots=True)
class Binding:
    """Which node is meant to take which role of one instance.

    Attributes:
        instance: name of the pipeline instance.
        nodes: node id by role name.
    """

    instance: str
    nodes: Mapping[str, str]

    def __post_init__(self) -> None:
        _check_text("instance", self.instance, NAME)
        for role, node in self.nodes.items():
            _check_text("nodes (role)", role, r"stage-[0-9]{1,3}")
            _check_text(f"nodes.{role}", node, NAME)
        object.__setattr__(self, "nodes", MappingProxyType(dict(self.nodes)))

    def to_document(self) -> dict[str, Encodable]:
        """The fields as a JSON object."""
        return {"instance": self.instance, "nodes": dict(self.nodes)}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Binding:
        """Reads what `to_document` wrote; raises PlanError."""
        reader = Fields.of(document, "binding", PlanError)
        binding = cls(
            instance=reader.text("instance", 128),
            nodes=reader.text_map("nodes", MAX_ROLES, 128),
        )
        reader.finish()
        return binding

    def __hash__(self) -> int:
        return hash((self.instance, tuple(sorted(self.nodes.items()))))

    def __reduce__(self) -> tuple[type[Binding], tuple[str, dict[str, str]]]:
        # A mapping proxy cannot be copied between processes; a dict of the same content can.
        return (Binding, (self.instance, dict(self.nodes)))


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """What the planner expects of one stage on its node, and why it chose that node.

    Attributes:
        role: role name.
        node: node id.
        node_name: name of the node for people.
        weight_bytes: parameters in all ranks, replicated ones counted as often as they are held.
        cache_bytes: KV cache in all ranks.
        working_bytes: process, activations and buffers in all ranks.
        step_cost: cost of a decode step in abstract units (see `placement.cost`), for comparing
            stages with one another.
        reasons: one sentence each.
    """

    role: str
    node: str
    node_name: str
    weight_bytes: int
    cache_bytes: int
    working_bytes: int
    step_cost: int
    reasons: tuple[str, ...] = field(default=())

    @property
    def memory_bytes(self) -> int:
        """Everything the stage needs on its node."""
        return self.weight_bytes + self.cache_bytes + self.working_bytes

    def to_document(self) -> dict[str, Encodable]:
        """The fields as a JSON object."""
        return {
            "role": self.role,
            "node": self.node,
            "node_name": self.node_name,
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "working_bytes": self.working_bytes,
            "step_cost": self.step_cost,
            "reasons": list(self.reasons),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> StageEstimate:
        """Reads what `to_document` wrote; raises PlanError."""
        return cls._read(Fields.of(document, "estimate", PlanError))

    @classmethod
    def _read(cls, reader: Fields) -> StageEstimate:
        estimate = cls(
            role=reader.text("role", 32),
            node=reader.text("node", 128),
            node_name=reader.text("node_name", 256),
            weight_bytes=reader.integer("weight_bytes", 0, MAX_INTEGER),
            cache_bytes=reader.integer("cache_bytes", 0, MAX_INTEGER),
            working_bytes=reader.integer("working_bytes", 0, MAX_INTEGER),
            step_cost=reader.integer("step_cost", 0, MAX_INTEGER),
            reasons=reader.texts("reasons", 16, 512),
        )
        reader.finish()
        return estimate


@dataclass(frozen=True, slots=True)
class Plan:
    """A template, the nodes that are to take its roles, and why.

    Attributes:
        template: what the owner signs.
        binding: a node for every role.
        estimates: one per role, in order.
        notes: sentences about the plan as a whole.
    """

    template: PlanTemplate
    binding: Binding
    estimates: tuple[StageEstimate, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [role.name for role in self.template.roles]
        _check(
            sorted(self.binding.nodes) == sorted(names),
            "binding.nodes",
            f"a node for each of {', '.join(names)}",
            ", ".join(sorted(self.binding.nodes)),
        )
        _check(
            [estimate.role for estimate in self.estimates] == names,
            "estimates",
            f"one for each of {', '.join(names)}",
            ", ".join(estimate.role for estimate in self.estimates),
        )

    def to_document(self) -> dict[str, Encodable]:
        """The fields as a JSON object."""
        return {
            "format": "bulkhead-plan-1",
            "template": self.template.to_document(),
            "binding": self.binding.to_document(),
            "estimates": [estimate.to_document() for estimate in self.estimates],
            "notes": list(self.notes),
        }

    def to_bytes(self) -> bytes:
        """The canonical encoding."""
        return encode(self.to_document())

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Plan:
        """Reads what `to_document` wrote; raises PlanError."""
        reader = Fields.of(document, "plan", PlanError)
        reader.text("format", 32, "bulkhead-plan-1")
        plan = cls(
            template=PlanTemplate.from_document(reader.mapping("template")),
            binding=Binding.from_document(reader.mapping("binding")),
            estimates=tuple(
                StageEstimate._read(item) for item in reader.sections("estimates", MAX_ROLES)
            ),
            notes=reader.texts("notes", 64, 512),
        )
        reader.finish()
        return plan

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Decodes `to_bytes`; raises PlanError."""
        return cls.from_document(_decode(data, MAX_PLAN_BYTES, "plan"))


def _decode(data: bytes, max_bytes: int, what: str) -> Mapping[str, object]:
    try:
        return decode(data, max_bytes)
    except DocumentError as error:
        raise PlanError(f"{what}: {error}") from None


def _check(holds: bool, where: str, expected: str, found: object) -> None:
    if not holds:
        raise PlanError(f"{where}: expected {expected}, found {str(found)[:160]!r}")


def _check_text(where: str, value: str, pattern: str) -> None:
    _check(
        isinstance(value, str) and re.fullmatch(pattern, value) is not None,
        where,
        f"text matching {pattern}",
        value,
    )
