"""Policies, configurations and nodes that the placement tests share."""

from __future__ import annotations

from placement.inventory import Inventory, Node
from placement.model_profile import ModelProfile, profile_model
from placement.plan import Plan
from placement.planner import PLAIN, PlanSettings, make_plan
from placement.policy import Policy, parse_policy
from placement.sealed import SealedParts

MANIFEST = "ab" * 32
GIB = 1 << 30

SIMULATED = """\
version: 1
name: simulated
protect: {prompt: attested, activations: attested, weights: attested}
evidence: [simulated]
ingress: plain
stages: {min: 2}
tensor_parallel: {max: 4}
accept: [simulated_tee, unhardened, plain_ingress, unpinned_measurement, plain_weights]
"""

MIXED = """\
version: 1
name: mixed
protect: {prompt: attested, activations: enrolled, weights: enrolled}
evidence: [simulated, sev-snp]
measurements: {sev-snp: ["%s"]}
regions: [eu-west-1]
ingress: sealed
stages: {min: 3, max: 4}
tensor_parallel: {max: 2}
accept: [simulated_tee, unhardened, unpinned_measurement, activation_leakage, unverified_output]
""" % ("cd" * 48)

CONFIG: dict[str, object] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 8,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def policy(text: str = SIMULATED, **changes: str) -> Policy:
    """A policy from YAML, lines of top-level fields replaced by the ones given."""
    lines = [line for line in text.splitlines() if line.split(":")[0] not in changes]
    lines += [f"{name}: {value}" for name, value in changes.items() if value]
    return parse_policy("\n".join(lines))


def profile(**changes: object) -> ModelProfile:
    return profile_model({**CONFIG, **changes}, "float32")


def node(
    name: str,
    memory: float = 16 * GIB,
    tee: str | None = "simulated",
    region: str | None = "eu-west-1",
    cpus: float = 2,
    gpus: float = 0,
    hardened: bool = False,
) -> Node:
    return Node(
        id=f"id-{name}",
        name=name,
        address="127.0.0.1",
        region=region,
        tee=tee,
        memory_bytes=int(memory),
        cpus=cpus,
        gpus=gpus,
        hardened=hardened,
        labels={},
    )


def settings(**changes: object) -> PlanSettings:
    values: dict[str, object] = {
        "model": "tiny/qwen3",
        "cluster": "test",
        "expires_at": 2_000_000_000,
    }
    return PlanSettings(**{**values, **changes})  # type: ignore[arg-type]


def plan(
    nodes: list[Node],
    with_policy: Policy | None = None,
    with_profile: ModelProfile | None = None,
    sealed: SealedParts = PLAIN,
    **changes: object,
) -> Plan:
    chosen = with_policy or policy()
    return make_plan(
        with_profile or profile(),
        chosen,
        Inventory(tuple(nodes)),
        settings(**changes),
        manifest_digest=MANIFEST,
        policy_digest=chosen.digest,
        instance="pipeline-0",
        sealed=sealed,
    )
