"""What an operator asks for: who may see what, which evidence counts, and what is accepted.

A policy is written in YAML and signed as canonical JSON. It is refused as a whole when it
contradicts itself or when it is weaker than it says: every weakening has a name, and the name
must stand under ``accept``. Errors name the line and the field.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import yaml

from placement.document import DocumentError, Encodable, Fields, decode, digest, encode
from placement.plan import (
    MAX_ROLES,
    MAX_TENSOR_PARALLEL,
    NAME,
    REGION,
    DataClass,
    Trust,
)
from placement.requirements import PINS, Requirements, read_requirements

MAX_POLICY_BYTES = 256 << 10
"""Longest policy, as YAML or as JSON, that is parsed."""

MAX_MEASUREMENTS = 256
"""Most pinned measurements for one kind of evidence."""

MACHINE_EVIDENCE = ("simulated", "sev-snp", "tdx", "azure-vtpm")
"""Kinds of evidence that speak for a machine; any accepted one admits it."""

DEVICE_EVIDENCE = ("nvidia",)
"""Kinds that speak for a device; one that is listed is demanded besides the machine's."""

ENROLLED_EVIDENCE = "enrolled"
"""The kind of an enrolled node's statement: signed by its key, proving nothing about code."""

_MEASUREMENT = r"(?:[0-9a-f]{2}){16,64}"


class PolicyError(DocumentError):
    """A policy is malformed or contradicts itself.

    Attributes:
        source: where the policy came from, usually a file name.
        line: line of the field, from 1; 0 when the policy was not text.
        field: dotted path of the field, or "" for the document.
    """

    def __init__(self, source: str, line: int, field: str, reason: str) -> None:
        self.source = source
        self.line = line
        self.field = field
        self.reason = reason
        place = f"{source}:{line}" if line else source
        super().__init__(f"{place}: {field + ': ' if field else ''}{reason}")

    def __reduce__(self) -> tuple[type[PolicyError], tuple[str, int, str, str]]:
        return (PolicyError, (self.source, self.line, self.field, self.reason))


class Weakness(StrEnum):
    """Something that makes a deployment weaker than it looks; allowed only by name."""

    SIMULATED_TEE = "simulated_tee"
    UNHARDENED = "unhardened"
    PLAIN_INGRESS = "plain_ingress"
    UNPINNED_MEASUREMENT = "unpinned_measurement"
    ACTIVATION_LEAKAGE = "activation_leakage"
    WEIGHT_ORACLE = "weight_oracle"
    UNVERIFIED_OUTPUT = "unverified_output"
    PLAIN_WEIGHTS = "plain_weights"

    @property
    def warning(self) -> str:
        """One line that says what is not protected."""
        return _WARNINGS[self]


_WARNINGS: Mapping[Weakness, str] = MappingProxyType(
    {
        Weakness.SIMULATED_TEE: "simulated TEE: protects nothing",
        Weakness.UNHARDENED: "unhardened: Ray's user can read shard memory",
        Weakness.PLAIN_INGRESS: (
            "plain ingress: the Serve replica and Ray's proxy see prompts and answers"
        ),
        Weakness.UNPINNED_MEASUREMENT: (
            "unpinned measurement: any software on a genuine machine is accepted"
        ),
        Weakness.ACTIVATION_LEAKAGE: (
            "activation leakage: enrolled machines see hidden states, and those reveal the prompt"
        ),
        Weakness.WEIGHT_ORACLE: (
            "weight oracle: an enrolled neighbour can query protected layers to copy them"
        ),
        Weakness.UNVERIFIED_OUTPUT: (
            "unverified output: an enrolled machine can steer what the model answers"
        ),
        Weakness.PLAIN_WEIGHTS: (
            "plain weights: whoever reads a node's disk reads the parts of the model that are "
            "not sealed"
        ),
    }
)


class Ingress(StrEnum):
    """How prompts reach the head shard."""

    PLAIN = "plain"
    """Over HTTP that the Serve replica reads."""
    SEALED = "sealed"
    """Encrypted by the client to the head shard's key."""


class Objective(StrEnum):
    """What the planner optimises within the policy."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"
    COST = "cost"


@dataclass(frozen=True, slots=True)
class Protection:
    """The least trust that a machine needs to see each data class.

    Where parts of a checkpoint are sealed, they are what `weights` means; where none is, every
    stage's layers are.
    """

    prompt: Trust
    activations: Trust
    weights: Trust

    def least(self, data_class: DataClass) -> Trust:
        """The least trust for one data class."""
        return {
            DataClass.PROMPT: self.prompt,
            DataClass.ACTIVATIONS: self.activations,
            DataClass.WEIGHTS: self.weights,
        }[data_class]


@dataclass(frozen=True, slots=True)
class Objectives:
    """Service levels that the operator wants, in milliseconds; None where none is stated.

    Attributes:
        ttft_ms: time to the first token.
        tpot_ms: time per output token after the first.
    """

    ttft_ms: int | None
    tpot_ms: int | None


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that does not contradict itself.

    Attributes:
        name: name of the policy, for people.
        protect: least trust by data class.
        evidence: kinds of evidence that count as attestation, in the order written.
        measurements: accepted measurements (hex) by kind of evidence; a kind that is absent is
            not pinned.
        requirements: what else evidence must say, by kind; a kind that is absent has every pin of
            its table missing, so that nothing of that kind is accepted.
        regions: regions that shards may run in; empty means any.
        ingress: how prompts come in.
        objective: what the planner optimises.
        slo: wanted service levels.
        stages_min: fewest stages.
        stages_max: most stages.
        tensor_parallel_max: most tensor-parallel ranks in one stage.
        separate_nodes: whether every stage must be on a node of its own.
        accept: weaknesses that the operator accepts, in the order of `Weakness`.
    """

    name: str
    protect: Protection
    evidence: tuple[str, ...]
    measurements: Mapping[str, tuple[str, ...]]
    requirements: Mapping[str, Requirements]
    regions: tuple[str, ...]
    ingress: Ingress
    objective: Objective
    slo: Objectives
    stages_min: int
    stages_max: int
    tensor_parallel_max: int
    separate_nodes: bool
    accept: tuple[Weakness, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "measurements", MappingProxyType(dict(self.measurements)))
        object.__setattr__(self, "requirements", MappingProxyType(dict(self.requirements)))
        for field, reason in _contradictions(self):
            raise PolicyError("policy", 0, field, reason)

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        # A mapping proxy cannot be copied between processes; the encoding can.
        return (Policy.from_bytes, (self.to_bytes(),))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `to_bytes`."""
        return digest(self.to_bytes())

    def accepts(self, weakness: Weakness) -> bool:
        """Whether the operator accepts a weakness."""
        return weakness in self.accept

    def trust_for(self, exposes: tuple[DataClass, ...]) -> Trust:
        """The least trust for a shard that exposes these data classes."""
        needs_proof = any(self.protect.least(item) is Trust.ATTESTED for item in exposes)
        return Trust.ATTESTED if needs_proof else Trust.ENROLLED

    def evidence_for(self, trust: Trust) -> tuple[str, ...]:
        """The kinds of evidence that admit a shard needing this trust.

        An enrolled role also takes real hardware evidence, which proves more; it never takes
        simulated evidence, which anybody can make and which proves less than an enrolled key.
        """
        machine = tuple(kind for kind in self.evidence if kind in MACHINE_EVIDENCE)
        if trust is Trust.ATTESTED:
            return machine
        return (ENROLLED_EVIDENCE, *(kind for kind in machine if kind != "simulated"))

    def demanded_devices(self) -> tuple[str, ...]:
        """The kinds of device evidence that an attested shard must show besides its machine's."""
        return tuple(kind for kind in self.evidence if kind in DEVICE_EVIDENCE)

    def requirements_for(self, kind: str) -> Requirements:
        """What evidence of a kind must say; where nothing is written, nothing is open."""
        return self.requirements.get(kind, Requirements())

    def left_open(self, kinds: Collection[str]) -> tuple[str, ...]:
        """What the requirements of these kinds leave open, by names like those of weaknesses.

        ``open.KIND.NAME`` for a pin or check that the policy opens, ``roots.KIND`` where other
        roots than the vendor's count, ``declared.regions`` where regions are asked for: no evidence
        says where a machine stands, so that they are as declared.
        """
        found: list[str] = ["declared.regions"] if self.regions else []
        for kind, section in self.requirements.items():
            if kind in kinds:
                found += [f"open.{kind}.{name}" for name in section.open]
                found += [f"roots.{kind}"] if section.roots or section.rim_roots else []
        return tuple(found)

    def to_document(self) -> dict[str, Encodable]:
        """The fields as a JSON object, complete and in the shape of the YAML."""
        return {
            "version": 1,
            "name": self.name,
            "protect": {item.value: self.protect.least(item) for item in DataClass},
            "evidence": list(self.evidence),
            "measurements": {kind: list(pins) for kind, pins in self.measurements.items()},
            "requirements": {
                kind: section.to_document() for kind, section in self.requirements.items()
            },
            "regions": list(self.regions),
            "ingress": self.ingress,
            "objective": self.objective,
            "slo": {"ttft_ms": self.slo.ttft_ms, "tpot_ms": self.slo.tpot_ms},
            "stages": {"min": self.stages_min, "max": self.stages_max},
            "tensor_parallel": {"max": self.tensor_parallel_max},
            "separate_nodes": self.separate_nodes,
            "accept": list(self.accept),
        }

    def to_bytes(self) -> bytes:
        """The canonical encoding, which is what gets signed."""
        return encode(self.to_document())

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Policy:
        """Reads what `to_document` wrote; raises PolicyError with line 0."""
        return _read(document)

    @classmethod
    def from_bytes(cls, data: bytes) -> Policy:
        """Decodes `to_bytes`; raises PolicyError with line 0."""
        try:
            document = decode(data, MAX_POLICY_BYTES)
        except DocumentError as error:
            raise PolicyError("policy", 0, "", str(error)) from None
        return cls.from_document(document)


def parse_policy(text: str, source: str = "policy.yaml") -> Policy:
    """Parses a policy written in YAML.

    Only plain YAML is taken: one document of mappings, lists, text, decimal integers, true, false
    and null. Anchors, aliases, tags and duplicate keys are refused, because a reader of the file
    and the parser could disagree about them.

    Args:
        text: the file's content, at most `MAX_POLICY_BYTES` in UTF-8.
        source: name of the file, for messages.

    Raises:
        PolicyError: with ``.line`` and ``.field``; the message is
            ``FILE:LINE: field: expected ..., found ...``.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_POLICY_BYTES:
        raise PolicyError(source, 1, "", f"expected at most {MAX_POLICY_BYTES} bytes, found {size}")
    lines: dict[str, int] = {"": 1}
    try:
        _refuse_clever_yaml(text, source)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = None if root is None else _plain(root, "", source, lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if isinstance(mark, yaml.Mark) else 1
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)
        raise PolicyError(source, line, "", f"expected YAML, found {problem}") from None
    if not isinstance(document, dict):
        raise PolicyError(source, 1, "", "expected a mapping of fields, found something else")
    try:
        return Policy.from_document(document)
    except PolicyError as error:
        line = _nearest_line(lines, error.field)
        raise PolicyError(source, line, error.field, error.reason) from None


def _field_error(message: str) -> PolicyError:
    """Turns a field reader's ``policy.path: reason`` into an error that knows its field."""
    path, _, reason = message.partition(": ")
    return PolicyError("policy", 0, path.removeprefix("policy").removeprefix("."), reason)


def _read(document: Mapping[str, object]) -> Policy:
    reader = Fields.of(document, "policy", _field_error)
    reader.integer("version", 1, 1)
    name = reader.text("name", 128, NAME)
    protect = _read_protection(reader)
    evidence = reader.texts("evidence", 16, 64) if "evidence" in reader else ()
    measurements = (
        reader.texts_map("measurements", 16, MAX_MEASUREMENTS) if "measurements" in reader else {}
    )
    requirements = _read_requirements(reader)
    regions = reader.texts("regions", 64, 64, REGION) if "regions" in reader else ()
    ingress = reader.choice("ingress", Ingress) if "ingress" in reader else Ingress.SEALED
    objective = (
        reader.choice("objective", Objective) if "objective" in reader else Objective.LATENCY
    )
    slo = _read_objectives(reader)
    stages_min, stages_max = _read_range(reader, "stages", MAX_ROLES)
    tensor_parallel_max = 1
    if "tensor_parallel" in reader:
        section = reader.section("tensor_parallel")
        tensor_parallel_max = section.integer("max", 1, MAX_TENSOR_PARALLEL)
        section.finish()
    separate_nodes = reader.boolean("separate_nodes") if "separate_nodes" in reader else False
    accept = reader.choices("accept", Weakness) if "accept" in reader else ()
    reader.finish()
    return Policy(
        name=name,
        protect=protect,
        evidence=evidence,
        measurements=measurements,
        requirements=requirements,
        regions=regions,
        ingress=ingress,
        objective=objective,
        slo=slo,
        stages_min=stages_min,
        stages_max=stages_max,
        tensor_parallel_max=tensor_parallel_max,
        separate_nodes=separate_nodes,
        accept=tuple(weakness for weakness in Weakness if weakness in accept),
    )


def _read_protection(reader: Fields) -> Protection:
    """A data class that the policy does not mention is protected fully."""
    section = reader.section("protect")
    least = {
        item: section.choice(item, Trust) if item in section else Trust.ATTESTED
        for item in DataClass
    }
    section.finish()
    return Protection(
        prompt=least[DataClass.PROMPT],
        activations=least[DataClass.ACTIVATIONS],
        weights=least[DataClass.WEIGHTS],
    )


def _read_requirements(reader: Fields) -> dict[str, Requirements]:
    if "requirements" not in reader:
        return {}
    section = reader.section("requirements")
    found = {
        kind: read_requirements(kind, section.section(kind)) for kind in PINS if kind in section
    }
    section.finish()
    return found


def _read_objectives(reader: Fields) -> Objectives:
    if "slo" not in reader:
        return Objectives(None, None)
    section = reader.section("slo")
    slo = Objectives(
        *(
            section.optional_integer(name, 1, 3_600_000) if name in section else None
            for name in ("ttft_ms", "tpot_ms")
        )
    )
    section.finish()
    return slo


def _read_range(reader: Fields, name: str, most: int) -> tuple[int, int]:
    if name not in reader:
        return 1, most
    section = reader.section(name)
    least = section.integer("min", 1, most) if "min" in section else 1
    limit = section.integer("max", 1, most) if "max" in section else most
    section.finish()
    return least, limit


def _contradictions(policy: Policy) -> Iterator[tuple[str, str]]:
    """Yields (field, reason) for everything that makes a policy contradict itself."""
    known = (*MACHINE_EVIDENCE, *DEVICE_EVIDENCE)
    for i, kind in enumerate(policy.evidence):
        if kind not in known:
            yield f"evidence[{i}]", f"expected one of {', '.join(known)}, found {kind[:64]!r}"
        if kind in policy.evidence[:i]:
            yield f"evidence[{i}]", f"expected each kind once, found {kind!r} again"
    for kind, pins in policy.measurements.items():
        if kind not in policy.evidence:
            yield (
                f"measurements.{kind}",
                f"expected a kind that stands under evidence, found {kind[:64]!r}",
            )
        if not pins:
            yield (
                f"measurements.{kind}",
                "expected at least one measurement, found none; leave the kind out and accept "
                f"{Weakness.UNPINNED_MEASUREMENT} if any software will do",
            )
        for i, pin in enumerate(pins):
            if re.fullmatch(_MEASUREMENT, pin) is None:
                yield (
                    f"measurements.{kind}[{i}]",
                    "expected 32 to 128 lower-case hexadecimal digits, "
                    f"found text of {len(pin)} characters",
                )
    for kind in policy.requirements:
        if kind not in policy.evidence:
            yield (
                f"requirements.{kind}",
                f"expected a kind that stands under evidence, found {kind[:64]!r}",
            )
    for i, region in enumerate(policy.regions):
        if re.fullmatch(REGION, region) is None or region in policy.regions[:i]:
            yield f"regions[{i}]", f"expected region names, each once, found {region[:64]!r}"
    if policy.stages_min > policy.stages_max:
        yield (
            "stages",
            f"expected min at most max, found {policy.stages_min} above {policy.stages_max}",
        )
    yield from _unaccepted(policy)


def _unaccepted(policy: Policy) -> Iterator[tuple[str, str]]:
    """Yields (field, reason) for every weakening that the policy does not name."""
    protect = policy.protect
    attests = Trust.ATTESTED in (protect.prompt, protect.activations, protect.weights)
    if attests and not policy.evidence_for(Trust.ATTESTED):
        yield (
            "evidence",
            f"expected at least one of {', '.join(MACHINE_EVIDENCE)}, because protect asks for "
            f"attested machines, found {', '.join(policy.evidence) or 'none'}",
        )
    if (
        protect.prompt is Trust.ATTESTED
        and protect.activations is Trust.ENROLLED
        and not policy.accepts(Weakness.ACTIVATION_LEAKAGE)
    ):
        yield (
            "protect.activations",
            "expected attested, because hidden states reveal the prompt, found enrolled; "
            f"or accept {Weakness.ACTIVATION_LEAKAGE}",
        )
    if policy.ingress is Ingress.PLAIN and not policy.accepts(Weakness.PLAIN_INGRESS):
        yield (
            "ingress",
            f"expected sealed, found plain; or accept {Weakness.PLAIN_INGRESS}",
        )
    for i, kind in enumerate(policy.evidence):
        if kind == "simulated" and not policy.accepts(Weakness.SIMULATED_TEE):
            yield (
                f"evidence[{i}]",
                "expected evidence of real hardware, found 'simulated'; "
                f"or accept {Weakness.SIMULATED_TEE}",
            )
        if (
            kind in MACHINE_EVIDENCE
            and kind not in policy.measurements
            and not policy.accepts(Weakness.UNPINNED_MEASUREMENT)
        ):
            yield (
                f"evidence[{i}]",
                f"expected measurements.{kind} to pin what the machine runs, found none; "
                f"or accept {Weakness.UNPINNED_MEASUREMENT}",
            )


def _refuse_clever_yaml(text: str, source: str) -> None:
    """Refuses deep nesting, anchors, aliases and tags before anything is built from the text."""
    depth = 0
    documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        found = ""
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            found = "an anchor or alias"
        elif getattr(event, "tag", None) is not None:
            found = "a tag"
        elif documents > 1:
            found = "a second document"
        elif depth > 8:
            found = "nesting deeper than 8 levels"
        if found:
            line = event.start_mark.line + 1 if event.start_mark is not None else 1
            raise PolicyError(source, line, "", f"expected plain YAML, found {found}")


def _plain(node: yaml.Node, path: str, source: str, lines: dict[str, int]) -> object:
    """Builds plain data from a YAML node, noting the line of every path on the way."""
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise PolicyError(source, key_line, path, "expected text as a key, found a list")
            key = str(key_node.value)
            inner = f"{path}.{key}" if path else key
            if key in found:
                raise PolicyError(
                    source,
                    key_line,
                    inner,
                    f"expected each field once, found it again (first on line {lines[inner]})",
                )
            lines[inner] = key_line
            found[key] = _plain(value_node, inner, source, lines)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{path}[{i}]", source, lines) for i, item in enumerate(node.value)]
    text = str(node.value)
    kind = node.tag.rpartition(":")[2]
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool" and text in ("true", "false"):
        return text == "true"
    if kind == "int" and re.fullmatch(r"0|[1-9][0-9]{0,18}", text):
        return int(text)
    raise PolicyError(
        source,
        line,
        path,
        f"expected text, a decimal integer, true or false, found {text[:64]!r}, which YAML reads "
        f"as {kind}; put quotes around it if it is text",
    )


def _nearest_line(lines: Mapping[str, int], field: str) -> int:
    """The line of a field, or of the closest thing around it that is in the file."""
    while field and field not in lines:
        field = field[: max(field.rfind("."), field.rfind("["), 0)]
    return lines.get(field, 1)
