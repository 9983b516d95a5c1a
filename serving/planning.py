"""From a model, a policy and the nodes there are to a plan and the documents the owner signs."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from placement.inventory import (
    NAME_LABEL,
    REGION_LABEL,
    TEE_LABEL,
    Inventory,
    InventoryError,
    from_ray_nodes,
)
from placement.model_profile import ProfileError, profile_model
from placement.plan import Plan, PlanError
from placement.planner import PlanSettings, make_plan
from placement.policy import Policy, PolicyError, parse_policy
from security.manifest import Manifest
from security.sealing.document import sealed_parts
from serving.errors import UsageError
from serving.model_source import ModelSource

MAX_INVENTORY_BYTES = 16 << 20
VALID_S = 30 * 24 * 3600
DEFAULT_CLUSTER = "local"
ASSUMED_NODES = 2
POLICIES = Path("clusters") / "policies"


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What an operator asks of a deployment, as options of the command line.

    Attributes:
        model: directory or hub id.
        policy: file, or the name of one under clusters/policies.
        served_name: name in the API; None takes the model's own.
        dtype: None takes the checkpoint's.
        weight_format: of linears and head, one of `placement.plan.WEIGHT_FORMATS`.
        context: longest sequence in tokens; None takes the model's own, bounded by the planner.
        memory_fraction: share of a node's memory that shards may fill.
        max_sequences: most sequences at once.
        stages: exact number of pipeline stages; None leaves it to the planner.
        tensor_parallel: ranks per stage.
        layer_splits: explicit cut points between layers.
    """

    model: str
    policy: str
    served_name: str | None
    dtype: str | None
    weight_format: str
    context: int | None
    memory_fraction: float
    max_sequences: int
    stages: int | None
    tensor_parallel: int
    layer_splits: tuple[int, ...] | None

    def to_json(self) -> str:
        """One line that `from_json` reads; nothing in it is secret."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelSettings:
        """Reads what `to_json` wrote."""
        values = json.loads(text)
        splits = values.pop("layer_splits")
        return cls(**values, layer_splits=tuple(splits) if splits is not None else None)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ModelSettings:
        """Takes them from parsed command-line arguments."""
        return cls(
            model=arguments.model,
            policy=arguments.policy,
            served_name=arguments.served_name,
            dtype=arguments.dtype,
            weight_format=arguments.weights,
            context=arguments.context,
            memory_fraction=arguments.memory_fraction,
            max_sequences=arguments.max_sequences,
            stages=arguments.stages,
            tensor_parallel=arguments.tensor_parallel,
            layer_splits=arguments.layer_splits,
        )


def load_policy(name: str) -> Policy:
    """Reads a policy: a file, or the name of one that comes with Bulkhead.

    Raises:
        UsageError: no such policy.
        PolicyError: it is malformed or contradicts itself.
    """
    shipped = Path(__file__).resolve().parent.parent / POLICIES
    candidates = [Path(name), shipped / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return parse_policy(path.read_text(encoding="utf-8", errors="replace"), str(path))
    known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml"))) or "none"
    raise UsageError(
        f"policy: expected a file or one of {known}, found {name[:200]!r}, which is neither"
    )


def load_inventory(path: Path) -> Inventory:
    """Reads an inventory file: the JSON list that `ray.nodes()` returns.

    Raises:
        UsageError: not such a file.
    """
    try:
        if path.stat().st_size > MAX_INVENTORY_BYTES:
            raise UsageError(f"{path}: expected at most {MAX_INVENTORY_BYTES} bytes")
        listed = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: expected a list of nodes as JSON, found: {error}") from None
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
        raise UsageError(f"{path}: expected a JSON list of objects, as ray.nodes() returns")
    try:
        return from_ray_nodes(listed)
    except InventoryError as error:
        raise UsageError(f"{path}: {error}") from None


def plan_model(
    source: ModelSource,
    settings: ModelSettings,
    policy: Policy,
    inventory: Inventory,
    *,
    manifest: Manifest,
    instance: str,
    cluster: str = DEFAULT_CLUSTER,
) -> Plan:
    """Makes a plan for a model on these nodes.

    The generation of its template is the time, so that a later plan always replaces an earlier.

    Raises:
        UsageError: the model or a setting is not one that can be planned.
        placement.planner.Infeasible: no plan meets the policy on these nodes.
    """
    now = int(time.time())
    dtype = source.dtype(settings.dtype)
    try:
        profile = profile_model(source.config, dtype, settings.weight_format)
        return make_plan(
            profile,
            policy,
            inventory,
            PlanSettings(
                model=settings.served_name or source.name,
                cluster=cluster,
                expires_at=now + VALID_S,
                dtype=dtype,
                context=settings.context,
                max_sequences=settings.max_sequences,
                memory_fraction=settings.memory_fraction,
                tensor_parallel=settings.tensor_parallel,
                stages=settings.stages,
                layer_splits=settings.layer_splits,
                generation=now,
                weight_format=settings.weight_format,
            ),
            manifest_digest=manifest.digest,
            policy_digest=policy.digest,
            instance=instance,
            sealed=sealed_parts(manifest),
        )
    except (ProfileError, PlanError, PolicyError) as error:
        raise UsageError(f"{source.directory}: {error}") from None


def assumed_inventory() -> Inventory:
    """Two nodes like those that `bulkhead serve` starts, with this machine's memory in halves."""
    memory = available_memory() // ASSUMED_NODES
    return from_ray_nodes(
        [
            {
                "NodeID": f"{number:056x}",
                "NodeManagerAddress": "127.0.0.1",
                "Resources": {"CPU": 1.0, "memory": float(memory)},
                "Labels": {
                    NAME_LABEL: f"local-{number}",
                    TEE_LABEL: "simulated",
                    REGION_LABEL: "local",
                },
            }
            for number in range(1, ASSUMED_NODES + 1)
        ]
    )


def available_memory() -> int:
    """MemAvailable of /proc/meminfo, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise UsageError("/proc/meminfo: expected a line MemAvailable, found none")
