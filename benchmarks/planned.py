"""The signed documents of a benchmark's deployment, made by the product's own planner."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from placement.inventory import Inventory, Node
from placement.model_profile import profile_model
from placement.plan import PlanTemplate
from placement.planner import PlanSettings, make_plan
from placement.policy import Policy, parse_policy
from security.manifest import Manifest, build_manifest

__all__ = ["INSTANCE", "MODEL", "Deployment", "Size", "plan_deployment", "plan_one_stage"]

INSTANCE = "pipeline-0"
MODEL = "benchmark"

_POLICY = """\
version: 1
name: benchmark
protect: {prompt: attested, activations: attested, weights: attested}
evidence: [simulated]
ingress: plain
accept: [simulated_tee, unhardened, plain_ingress, unpinned_measurement, plain_weights]
"""
# So large that the cache has room for every sequence at full length.
_NODE_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class Size:
    """What a deployment has to carry.

    Attributes:
        context: longest sequence, in tokens.
        sequences: most sequences at once.
        dtype: that it computes in.
        weight_format: of linears and head.
    """

    context: int
    sequences: int
    dtype: str = "bfloat16"
    weight_format: str = "plain"


@dataclass(frozen=True, slots=True)
class Deployment:
    """A planned deployment: what the owner signs."""

    policy: Policy
    manifest: Manifest
    template: PlanTemplate


def plan_deployment(model: Path, size: Size, splits: Sequence[int] = ()) -> Deployment:
    """Plans a checkpoint in len(splits) + 1 stages, a new one beginning at each of `splits`."""
    manifest = build_manifest(model)
    policy = parse_policy(_POLICY)
    config = json.loads((model / "config.json").read_text())
    template = _template(config, size, policy, manifest.digest, splits)
    return Deployment(policy, manifest, template)


def plan_one_stage(config: Mapping[str, object], size: Size) -> PlanTemplate:
    """Plans a model that is no checkpoint, by its configuration, in one stage."""
    return _template(config, size, parse_policy(_POLICY), manifest_digest="0" * 64, splits=())


def _template(
    config: Mapping[str, object],
    size: Size,
    policy: Policy,
    manifest_digest: str,
    splits: Sequence[int],
) -> PlanTemplate:
    nodes = tuple(
        Node(
            id=f"node-{index}",
            name=f"node-{index}",
            address="127.0.0.1",
            region=None,
            tee="simulated",
            memory_bytes=_NODE_BYTES,
            cpus=1.0,
            gpus=0.0,
            hardened=False,
            labels={},
        )
        for index in range(len(splits) + 1)
    )
    return make_plan(
        profile_model(config, size.dtype, size.weight_format),
        policy,
        Inventory(nodes),
        PlanSettings(
            model=MODEL,
            cluster="benchmark",
            expires_at=int(time.time()) + 86_400,
            dtype=size.dtype,
            context=size.context,
            max_sequences=size.sequences,
            layer_splits=tuple(splits),
            weight_format=size.weight_format,
        ),
        manifest_digest=manifest_digest,
        policy_digest=policy.digest,
        instance=INSTANCE,
    ).template
