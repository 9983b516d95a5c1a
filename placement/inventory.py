"""The machines there are, as Ray lists them. Every label is a hint; only evidence proves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType

from placement.plan import NAME, REGION

TEE_LABEL = "bulkhead.tee"
REGION_LABEL = "bulkhead.region"
HARDENED_LABEL = "bulkhead.hardened"
NAME_LABEL = "bulkhead.name"
MEMORY_LABEL = "bulkhead.memory-bytes"
"""Memory for shards in bytes, where it is not the memory that Ray sees (a GPU's, a share)."""

MAX_NODES = 4096


class InventoryError(ValueError):
    """The list of nodes is malformed; says the node, the field, expected and found."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine.

    Attributes:
        id: Ray's node id (hex).
        name: name for people; also the name that an enrolment would have.
        address: address that its peers reach it at.
        region: declared region, or None.
        tee: kind of evidence to ask it for, or None.
        memory_bytes: memory that shards may use.
        cpus: processors that Ray may hand out; 0 keeps shards away.
        gpus: accelerators, slices counted one each.
        hardened: whether it says that shards run apart from Ray's user.
        labels: all its labels.
    """

    id: str
    name: str
    address: str
    region: str | None
    tee: str | None
    memory_bytes: int
    cpus: float
    gpus: float
    hardened: bool
    labels: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", MappingProxyType(dict(self.labels)))

    def __reduce__(self) -> tuple[type[Node], tuple[object, ...]]:
        # A mapping proxy cannot be copied between processes; a dict of the same content can.
        values = (getattr(self, item.name) for item in fields(self) if item.name != "labels")
        return (Node, (*values, dict(self.labels)))


@dataclass(frozen=True, slots=True)
class Inventory:
    """All nodes that are alive, ordered by name and id."""

    nodes: tuple[Node, ...]


def from_ray_nodes(listed: Sequence[Mapping[str, object]]) -> Inventory:
    """Reads what ``ray.nodes()`` returns, leaving out nodes that are dead.

    Fields used (Ray 2.60): ``NodeID``, ``Alive``, ``NodeManagerAddress``, ``NodeName``,
    ``Resources`` (``memory`` in bytes, ``CPU``, ``GPU``) and ``Labels``.

    Raises:
        InventoryError: a field has the wrong type, a label is malformed, or an id or name occurs
            twice.
    """
    if len(listed) > MAX_NODES:
        raise InventoryError(f"nodes: expected at most {MAX_NODES}, found {len(listed)}")
    nodes = [_node(item) for item in listed if item.get("Alive", True) is True]
    nodes.sort(key=lambda node: (node.name, node.id))
    for field, values in (("id", [n.id for n in nodes]), ("name", [n.name for n in nodes])):
        value, times = Counter(values).most_common(1)[0] if values else ("", 0)
        if times > 1:
            raise InventoryError(
                f"nodes: expected each {field} once, found {value!r} {times} times; "
                f"set the label {NAME_LABEL} to tell nodes apart"
            )
    return Inventory(tuple(nodes))


def _node(item: Mapping[str, object]) -> Node:
    identity = _text(item, "NodeID", "node")
    where = f"node {identity[:12]}"
    address = _text(item, "NodeManagerAddress", where)
    labels = _labels(item, where)
    resources = item.get("Resources", {})
    if not isinstance(resources, Mapping):
        raise InventoryError(f"{where}.Resources: expected a mapping, found {type(resources)}")
    name = labels.get(NAME_LABEL)
    if name is None:
        # Ray names a node after its address unless told otherwise; several nodes on one address
        # are told apart by their ids.
        name = f"{address}-{identity[:8]}"
    memory = labels.get(MEMORY_LABEL)
    if memory is not None and re.fullmatch("[0-9]{1,18}", memory) is None:
        raise InventoryError(f"{where}: label {MEMORY_LABEL}: expected bytes, found {memory!r}")
    hardened = labels.get(HARDENED_LABEL, "false")
    if hardened not in ("true", "false"):
        raise InventoryError(
            f"{where}: label {HARDENED_LABEL}: expected true or false, found {hardened!r}"
        )
    region = labels.get(REGION_LABEL)
    for label, value, pattern in (
        (NAME_LABEL, name, NAME),
        (REGION_LABEL, region, REGION),
        (TEE_LABEL, labels.get(TEE_LABEL), NAME),
    ):
        if value is not None and re.fullmatch(pattern, value) is None:
            raise InventoryError(
                f"{where}: label {label}: expected text matching {pattern}, found {value[:64]!r}"
            )
    return Node(
        id=identity,
        name=name,
        address=address,
        region=region,
        tee=labels.get(TEE_LABEL),
        memory_bytes=int(memory) if memory else int(_number(resources, "memory", where)),
        cpus=_number(resources, "CPU", where),
        gpus=_number(resources, "GPU", where),
        hardened=hardened == "true",
        labels=labels,
    )


def _text(item: Mapping[str, object], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= 128:
        raise InventoryError(f"{where}.{name}: expected text, found {type(value).__name__}")
    return value


def _labels(item: Mapping[str, object], where: str) -> dict[str, str]:
    labels = item.get("Labels") or {}
    if not isinstance(labels, Mapping) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in labels.items()
    ):
        raise InventoryError(f"{where}.Labels: expected a mapping of text to text")
    return dict(labels)


def _number(resources: Mapping[object, object], name: str, where: str) -> float:
    value = resources.get(name, 0)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise InventoryError(f"{where}.Resources.{name}: expected a number, found {value!r:.64}")
    return float(value)
