"""Chooses the cut points of a model and a node for every stage.

The planner is clever and not trusted: `placement.verify` checks what it makes, on the broker, by
rules of its own. It is deterministic: the same arguments give the same plan.

How it goes: every number of stages that is allowed is tried, smallest first. For each, candidate
node sequences are taken in order of preference (most distinct nodes, then stages evenly over them,
then fewest hops between nodes, then the objective's), and the layers are cut so that the slowest
stage is as fast as can be, within the memory of the nodes (a dynamic programme over cut points, as
PipeDream's planner, SOSP 2019, does for training).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from placement.cost import Load, StageCost, stage_cost
from placement.inventory import HARDENED_LABEL, REGION_LABEL, TEE_LABEL, Inventory, Node
from placement.model_profile import ModelProfile
from placement.plan import (
    MAX_CACHE_BLOCKS,
    Binding,
    DataClass,
    Plan,
    PlanTemplate,
    RoleTemplate,
    StageEstimate,
    Trust,
)
from placement.policy import ENROLLED_EVIDENCE, Ingress, Objective, Policy, Weakness
from placement.sealed import SealedParts

DEFAULT_CONTEXT = 8192
"""Context, in tokens, when none is asked for and the model has more."""

_MAX_SEQUENCES_TRIED = 4096
"""Node sequences that are enumerated in full; beyond that only greedy ones are tried."""

_MAX_CUTS_TRIED = 16
"""Node sequences for which the cut points are fitted to memory, per number of stages."""

PLAIN = SealedParts()
"""Of a checkpoint in which nothing is sealed."""


class Infeasible(ValueError):
    """No plan meets the policy on these nodes.

    Attributes:
        reasons: what is missing, each with what would help.
    """

    def __init__(self, reasons: tuple[str, ...]) -> None:
        self.reasons = reasons
        super().__init__("no plan is possible: " + "; ".join(reasons))

    def __reduce__(self) -> tuple[type[Infeasible], tuple[tuple[str, ...]]]:
        return (Infeasible, (self.reasons,))


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What an operator asks of one deployment, besides the policy.

    Attributes:
        model: name under which the model is served.
        cluster: name of the cluster.
        expires_at: Unix time, in seconds, when the template expires.
        dtype: dtype to serve in; the profile must be counted in it.
        weight_format: of linears and head; the profile must be counted in it, too.
        context: longest sequence in tokens; None means the model's own, at most
            `DEFAULT_CONTEXT`.
        max_sequences: most sequences at once.
        max_step_tokens: most tokens in one step.
        block_size: tokens in a block of KV cache.
        memory_fraction: share of a node's memory that shards may fill, above 0 to 1.
        tensor_parallel: ranks in every stage.
        stages: exact number of stages; None leaves it to policy and memory.
        layer_splits: explicit cut points: (1, 3) of 4 layers makes stages of 1, 2 and 1 layers.
        step_deadline_ms: how long a step may take before a silent stage counts as broken.
        max_instances: most pipelines of the template at a time.
        generation: generation of the template; must grow.
    """

    model: str
    cluster: str
    expires_at: int
    dtype: str = "float32"
    context: int | None = None
    max_sequences: int = 16
    max_step_tokens: int = 512
    block_size: int = 16
    memory_fraction: float = 0.9
    tensor_parallel: int = 1
    stages: int | None = None
    layer_splits: tuple[int, ...] | None = None
    step_deadline_ms: int = 30_000
    max_instances: int = 1
    generation: int = 1
    weight_format: str = "plain"


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a role needs of a node, besides memory."""

    trust: Trust
    evidence: tuple[str, ...]
    regions: tuple[str, ...]
    tp: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """Stages cut and placed: boundaries[i]..boundaries[i+1] are the layers of nodes[i]."""

    boundaries: tuple[int, ...]
    nodes: tuple[Node, ...]
    costs: tuple[StageCost, ...]


@dataclass(frozen=True, slots=True)
class _Problem:
    """The arguments of one planning run, with what follows from them."""

    profile: ModelProfile
    policy: Policy
    settings: PlanSettings
    load: Load
    nodes: tuple[Node, ...]
    sealed: SealedParts
    known_costs: dict[tuple[int, int], StageCost] = field(default_factory=dict)

    @property
    def least_blocks(self) -> int:
        """Fewest cache blocks that are of use: one sequence of full length."""
        return self.load.blocks_per_sequence

    def cost(self, first: int, last: int) -> StageCost:
        """The cost of layers [first, last), computed once."""
        if (first, last) not in self.known_costs:
            self.known_costs[first, last] = stage_cost(self.profile, self.load, first, last)
        return self.known_costs[first, last]

    def room(self, node: Node) -> int:
        """Memory of a node that shards may fill, in bytes."""
        return int(node.memory_bytes * self.settings.memory_fraction)

    def trusts(self, stages: int) -> tuple[Trust, ...]:
        """The least trust of every stage.

        Enrolled stages between attested ones could steer the output, and question protected
        layers. Unless the policy accepts that, all stages are asked to be attested.
        """
        splits = self.settings.layer_splits
        boundaries = None if splits is None else (0, *splits, len(self.profile.layers))
        needed = tuple(
            self.policy.trust_for(self.exposes(stage, stages, boundaries))
            for stage in range(stages)
        )
        mixed = [Weakness.UNVERIFIED_OUTPUT]
        if self.policy.protect.weights is Trust.ATTESTED:
            mixed.append(Weakness.WEIGHT_ORACLE)
        if len(set(needed)) > 1 and not all(map(self.policy.accepts, mixed)):
            return (Trust.ATTESTED,) * stages
        return needed

    def exposes(
        self, stage: int, stages: int, boundaries: tuple[int, ...] | None
    ) -> tuple[DataClass, ...]:
        """Data classes of a stage: token ids come in at the first, logits leave at the last.

        As long as no boundaries are known, sealed parts may be in any stage.
        """
        ends = (DataClass.PROMPT,) if stage in (0, stages - 1) else ()
        if boundaries is not None and self.sealed.any:
            first, last = boundaries[stage : stage + 2]
            if not self.sealed.read_by(first, last, len(self.profile.layers)):
                return (*ends, DataClass.ACTIVATIONS)
        return (*ends, DataClass.ACTIVATIONS, DataClass.WEIGHTS)

    def hosts(self, trust: Trust) -> tuple[Node, ...]:
        """The nodes that may host a role of that trust, as far as their labels say."""
        needs = self.needs(trust)
        return tuple(node for node in self.nodes if not _unfit(node, needs, self.policy))

    def needs(self, trust: Trust) -> _Needs:
        """What a node must offer for a role of that trust."""
        return _Needs(
            trust, self.policy.evidence_for(trust), self.policy.regions, self.load.tensor_parallel
        )


def make_plan(
    profile: ModelProfile,
    policy: Policy,
    inventory: Inventory,
    settings: PlanSettings,
    *,
    manifest_digest: str,
    policy_digest: str,
    instance: str,
    sealed: SealedParts = PLAIN,
) -> Plan:
    """Makes a plan that meets the policy on the nodes there are.

    Args:
        profile: the model, counted in ``settings.dtype`` and ``settings.weight_format``.
        policy: the owner's policy.
        inventory: the nodes; their labels say where to ask for evidence, no more.
        settings: what the operator asks for.
        manifest_digest: SHA-256 (hex) of the model's manifest.
        policy_digest: SHA-256 (hex) of the policy's signed bytes.
        instance: name of the pipeline instance.
        sealed: what of the model is sealed.

    Raises:
        Infeasible: with everything that is missing.
        placement.plan.PlanError: a name, digest or limit that no template can hold.
    """
    context = settings.context or min(profile.max_context, DEFAULT_CONTEXT)
    wrong = _wrong_settings(profile, policy, settings, context, sealed)
    if wrong:
        raise Infeasible(tuple(wrong))
    load = Load(
        context=context,
        sequences=settings.max_sequences,
        step_tokens=settings.max_step_tokens,
        block_size=settings.block_size,
        batch=settings.max_sequences if policy.objective is Objective.THROUGHPUT else 1,
        tensor_parallel=settings.tensor_parallel,
    )
    problem = _Problem(profile, policy, settings, load, inventory.nodes, sealed)
    reasons: list[str] = []
    for stages in _stage_counts(problem):
        # The first stage sees everything however many there are: more of them need no less trust.
        if missing := _missing_hosts(problem, stages):
            raise Infeasible(tuple(missing))
        found = _place(problem, stages)
        if isinstance(found, _Layout):
            return _plan(problem, found, manifest_digest, policy_digest, instance)
        reasons.extend(reason for reason in found if reason not in reasons)
    raise Infeasible(tuple(reasons))


def bind(
    template: PlanTemplate,
    policy: Policy,
    inventory: Inventory,
    instance: str,
    taken: Mapping[str, str],
    *,
    memory_fraction: float = 0.9,
) -> Binding:
    """Finds nodes for the roles of a template that is already signed, as after a node was lost.

    Args:
        template: the template.
        policy: the policy that it was made for.
        inventory: the nodes that are alive.
        instance: name of the pipeline instance.
        taken: node name by role, for the roles that stay where they are.
        memory_fraction: share of a node's memory that shards may fill.

    Returns:
        A binding of every role, except those in `taken` whose node is not in the inventory.

    Raises:
        Infeasible: no node qualifies for a role, or none has the memory left.
    """
    by_name = {node.name: node for node in inventory.nodes}
    free = {node.id: int(node.memory_bytes * memory_fraction) for node in inventory.nodes}
    uses: Counter[str] = Counter()
    chosen: dict[str, str] = {}
    for role in template.roles:
        if role.name in taken and taken[role.name] in by_name:
            node = by_name[taken[role.name]]
            chosen[role.name] = node.id
            free[node.id] -= role.memory_bytes
            uses[node.id] += 1
    missing: list[str] = []
    wanted = [role for role in template.roles if role.name not in taken]
    for role in sorted(wanted, key=lambda role: (-role.memory_bytes, role.stage)):
        needs = _Needs(role.trust, role.evidence, role.regions, role.tp)
        why = {node.name: _unfit(node, needs, policy) for node in inventory.nodes}
        for node in inventory.nodes:
            if not why[node.name] and policy.separate_nodes and uses[node.id]:
                why[node.name] = "it has a stage, and the policy separates nodes"
            elif not why[node.name] and free[node.id] < role.memory_bytes:
                why[node.name] = f"it has {_gib(max(0, free[node.id]))} left"
        hosts = [node for node in inventory.nodes if not why[node.name]]
        if not hosts:
            missing.append(
                f"{role.name} needs {_gib(role.memory_bytes)} on a node that qualifies "
                f"({', '.join(role.evidence)}), and none of {len(why)} does"
            )
            missing.extend(f"node {name}: {reason}" for name, reason in list(why.items())[:16])
            continue
        node = min(hosts, key=lambda node: (uses[node.id], -free[node.id], node.id))
        chosen[role.name] = node.id
        free[node.id] -= role.memory_bytes
        uses[node.id] += 1
    if missing:
        raise Infeasible(tuple(missing))
    return Binding(instance, chosen)


def _wrong_settings(
    profile: ModelProfile,
    policy: Policy,
    settings: PlanSettings,
    context: int,
    sealed: SealedParts,
) -> list[str]:
    """What no set of nodes could mend."""
    wrong: list[str] = []
    if _plain_weights(policy, sealed) and not policy.accepts(Weakness.PLAIN_WEIGHTS):
        found = "parts of the model" if sealed.any else "the whole model"
        wrong.append(
            f"weights: the policy protects them, and {found} would lie in the clear on the nodes' "
            f"disks; seal all of it (bulkhead seal --layers all), or accept "
            f"{Weakness.PLAIN_WEIGHTS}"
        )
    layers = len(profile.layers)
    tp = settings.tensor_parallel
    if settings.dtype != profile.dtype:
        wrong.append(f"dtype: the profile is counted in {profile.dtype}, not {settings.dtype}")
    if settings.weight_format != profile.weight_format:
        wrong.append(
            f"weight_format: the profile is counted in {profile.weight_format}, "
            f"not {settings.weight_format}"
        )
    if settings.weight_format == "int8" and tp > 1:
        wrong.append(f"weight_format: int8 is not sharded, expected 1 rank, found {tp}")
    if not 0 < settings.memory_fraction <= 1:
        wrong.append(f"memory_fraction: expected above 0 to 1, found {settings.memory_fraction}")
    if not 1 <= context <= profile.max_context:
        wrong.append(f"context: expected 1 to the model's {profile.max_context}, found {context}")
    for name in ("max_sequences", "max_step_tokens", "block_size"):
        if getattr(settings, name) < 1:
            wrong.append(f"{name}: expected at least 1, found {getattr(settings, name)}")
    if not 1 <= tp <= policy.tensor_parallel_max:
        wrong.append(
            f"tensor_parallel: the policy allows 1 to {policy.tensor_parallel_max}, found {tp}"
        )
    elif tp > 1 and not profile.tensor_parallel:
        wrong.append(
            f"tensor_parallel: {profile.architecture} is not sharded correctly, expected 1, "
            f"found {tp}"
        )
    elif profile.kv_heads % tp or profile.heads % tp or profile.intermediate_size % tp:
        wrong.append(
            f"tensor_parallel: expected a divisor of {profile.kv_heads} KV heads, {profile.heads} "
            f"heads and an MLP of {profile.intermediate_size}, found {tp}"
        )
    stages = settings.stages
    splits = settings.layer_splits
    if splits is not None:
        ordered = (0, *splits, layers)
        if any(a >= b for a, b in itertools.pairwise(ordered)):
            wrong.append(
                f"layer_splits: expected growing cut points between 1 and {layers - 1}, "
                f"found {', '.join(map(str, splits))}"
            )
        if stages is not None and stages != len(splits) + 1:
            wrong.append(
                f"layer_splits: expected {stages - 1} cut points for {stages} stages, "
                f"found {len(splits)}"
            )
        stages = len(splits) + 1
    if stages is not None and not policy.stages_min <= stages <= policy.stages_max:
        wrong.append(
            f"stages: the policy allows {policy.stages_min} to {policy.stages_max}, found {stages}"
        )
    if (stages or policy.stages_min) > layers:
        wrong.append(
            f"stages: the model has {layers} layers, too few for "
            f"{stages or policy.stages_min} stages"
        )
    return wrong


def _stage_counts(problem: _Problem) -> range:
    """The numbers of stages to try, smallest first."""
    settings, policy = problem.settings, problem.policy
    if settings.layer_splits is not None:
        exact = len(settings.layer_splits) + 1
        return range(exact, exact + 1)
    if settings.stages is not None:
        return range(settings.stages, settings.stages + 1)
    most = min(policy.stages_max, len(problem.profile.layers))
    # Stages beyond the number of nodes free no memory: processes only cost some.
    useful = max(policy.stages_min, len(problem.nodes))
    return range(policy.stages_min, min(most, useful) + 1)


def _place(problem: _Problem, stages: int) -> _Layout | list[str]:
    """The best layout of so many stages, or what is missing for one."""
    hosts = tuple(problem.hosts(trust) for trust in problem.trusts(stages))
    sequences = _node_sequences(problem, hosts)
    if not sequences:
        usable = len({node.id for options in hosts for node in options})
        return [
            f"{stages} stages on separate nodes need {stages} nodes that qualify, and {usable} do; "
            "add nodes or plan fewer stages"
        ]
    splits = problem.settings.layer_splits
    balanced = (
        (0, *splits, len(problem.profile.layers))
        if splits is not None
        else _cut(problem, (None,) * stages)
    )
    assert balanced is not None, "without memory limits every number of stages up to layers fits"
    for _, group in itertools.groupby(sequences, key=_spread):
        candidates = list(group)
        for nodes in candidates:
            layout = _fit(problem, balanced, nodes)
            if layout is not None:
                return layout
        if splits is None:
            fitted = (_fit_to_memory(problem, nodes) for nodes in candidates[:_MAX_CUTS_TRIED])
            layout = min((item for item in fitted if item), key=_slowest, default=None)
            if layout is not None:
                return layout
    return _missing_memory(problem, balanced, hosts)


def _unfit(node: Node, needs: _Needs, policy: Policy) -> str:
    """Everything that keeps a node from hosting a role with these needs, or "" if nothing does."""
    if node.cpus <= 0 and node.gpus <= 0:
        return "it offers no processor (num_cpus is 0)"
    reasons: list[str] = []
    if 0 < node.gpus < needs.tp:
        reasons.append(f"it has {node.gpus:g} GPUs for {needs.tp} ranks")
    if needs.regions and node.region not in needs.regions:
        reasons.append(f"its region is {node.region or 'not declared'} (label {REGION_LABEL})")
    if needs.trust is Trust.ATTESTED and node.tee not in needs.evidence:
        reasons.append(f"its TEE is {node.tee or 'not declared'} (label {TEE_LABEL})")
    if not node.hardened and not policy.accepts(Weakness.UNHARDENED):
        reasons.append(
            f"it is not hardened (label {HARDENED_LABEL}), and {Weakness.UNHARDENED} is refused"
        )
    return "; ".join(reasons)


def _missing_hosts(problem: _Problem, stages: int) -> list[str]:
    """What is missing for every role to have at least one node."""
    missing: list[str] = []
    trusts = problem.trusts(stages)
    for trust in sorted(set(trusts)):
        if problem.hosts(trust):
            continue
        roles = ", ".join(f"stage-{i}" for i, needed in enumerate(trusts) if needed is trust)
        where = f" in {' or '.join(problem.policy.regions)}" if problem.policy.regions else ""
        article = "an attested" if trust is Trust.ATTESTED else "an enrolled"
        kinds = ", ".join(problem.policy.evidence_for(trust))
        missing.append(
            f"{roles}: {article} node is needed (evidence: {kinds}){where}, "
            f"and none of {len(problem.nodes)} qualifies"
        )
        missing.extend(
            f"node {node.name}: {_unfit(node, problem.needs(trust), problem.policy)}"
            for node in problem.nodes[:16]
        )
    return missing


def _node_sequences(
    problem: _Problem, hosts: tuple[tuple[Node, ...], ...]
) -> list[tuple[Node, ...]]:
    """Sequences of nodes, one per stage, the preferred first.

    All of them where they are few; otherwise greedy ones, each starting from another node.
    """
    roomiest_first = problem.policy.objective is not Objective.COST
    ordered = sorted(
        problem.nodes,
        key=lambda node: (-problem.room(node) if roomiest_first else problem.room(node), node.id),
    )
    rank = {node.id: i for i, node in enumerate(ordered)}
    if math.prod(len(options) for options in hosts) <= _MAX_SEQUENCES_TRIED:
        sequences = list(itertools.product(*hosts))
    else:
        sequences = [
            sequence
            for start in range(len(ordered))
            for sequence in _greedy_sequences(hosts, ordered[start:] + ordered[:start])
        ]
    if problem.policy.separate_nodes:
        sequences = [nodes for nodes in sequences if _spread(nodes) == len(nodes)]
    return sorted(
        sequences,
        key=lambda nodes: (
            -_spread(nodes),
            max(Counter(node.id for node in nodes).values()),
            _hops(nodes),
            [rank[node.id] for node in nodes],
        ),
    )


def _greedy_sequences(
    hosts: tuple[tuple[Node, ...], ...], preferred: list[Node]
) -> Iterator[tuple[Node, ...]]:
    """Sequences that follow an order of preference, without looking at the alternatives.

    One goes through the nodes in runs of neighbouring stages, if the nodes can take them; the
    other gives every stage the node that is used least, the most demanding stages first.
    """
    runs = tuple(preferred[i * len(preferred) // len(hosts)] for i in range(len(hosts)))
    if all(
        any(node.id == host.id for host in options)
        for node, options in zip(runs, hosts, strict=True)
    ):
        yield runs
    preference = {node.id: i for i, node in enumerate(preferred)}
    uses: Counter[str] = Counter()
    chosen: dict[int, Node] = {}
    for stage in sorted(range(len(hosts)), key=lambda stage: (len(hosts[stage]), stage)):
        node = min(hosts[stage], key=lambda node: (uses[node.id], preference[node.id]))
        uses[node.id] += 1
        chosen[stage] = node
    yield tuple(chosen[stage] for stage in range(len(hosts)))


def _cut(problem: _Problem, limits: tuple[int | None, ...]) -> tuple[int, ...] | None:
    """Cut points that make the slowest stage as fast as possible, or None if nothing fits.

    Args:
        problem: the planning run.
        limits: memory of each stage in bytes; None means no limit.

    Returns:
        Boundaries: stage i holds the layers from boundaries[i] to boundaries[i + 1].
    """
    layers = len(problem.profile.layers)
    stages = len(limits)
    # best[end]: the slowest stage's cost, and the boundaries, of the first `stage` stages that
    # end at layer `end`.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, (0,))}
    for stage, limit in enumerate(limits):
        after: dict[int, tuple[int, tuple[int, ...]]] = {}
        left = stages - stage - 1
        ends = range(stage + 1, layers - left + 1) if left else range(layers, layers + 1)
        for end in ends:
            for start, (slowest, boundaries) in best.items():
                if start >= end:
                    continue
                cost = problem.cost(start, end)
                if limit is not None and cost.memory_bytes(problem.least_blocks) > limit:
                    continue
                worst = max(slowest, cost.step_cost)
                if end not in after or worst < after[end][0]:
                    after[end] = (worst, (*boundaries, end))
        best = after
    return best[layers][1] if layers in best else None


def _fit(problem: _Problem, boundaries: tuple[int, ...], nodes: tuple[Node, ...]) -> _Layout | None:
    """The layout of these stages on these nodes, or None if a node's memory is too small."""
    costs = tuple(problem.cost(first, last) for first, last in itertools.pairwise(boundaries))
    used: Counter[str] = Counter()
    for node, cost in zip(nodes, costs, strict=True):
        used[node.id] += cost.memory_bytes(problem.least_blocks)
    if any(used[node.id] > problem.room(node) for node in nodes):
        return None
    return _Layout(boundaries, nodes, costs)


def _fit_to_memory(problem: _Problem, nodes: tuple[Node, ...]) -> _Layout | None:
    """Cut points for which these nodes have the memory.

    Stages that share a node share its memory: first as they come, then in equal parts.
    """
    shared = Counter(node.id for node in nodes)
    for parts in (Counter(dict.fromkeys(shared, 1)), shared):
        limits = tuple(problem.room(node) // parts[node.id] for node in nodes)
        boundaries = _cut(problem, limits)
        layout = None if boundaries is None else _fit(problem, boundaries, nodes)
        if layout is not None:
            return layout
    return None


def _missing_memory(
    problem: _Problem, boundaries: tuple[int, ...], hosts: tuple[tuple[Node, ...], ...]
) -> list[str]:
    """The memory that is missing for this number of stages."""
    costs = [problem.cost(first, last) for first, last in itertools.pairwise(boundaries)]
    needs = [cost.memory_bytes(problem.least_blocks) for cost in costs]
    usable = {node.id: problem.room(node) for options in hosts for node in options}
    have, need = sum(usable.values()), sum(needs)
    stages = f"{len(needs)} stage{'s' if len(needs) > 1 else ''}"
    text = (
        f"{stages} with cache for one sequence of {problem.load.context} tokens: "
        f"{_gib(need)} are needed, and the nodes that qualify offer {_gib(have)}"
    )
    if need > have:
        return [f"{text}: {_gib(need - have)} more is missing"]
    largest = max(range(len(needs)), key=needs.__getitem__)
    return [
        f"{text}, but not where it is needed: stage-{largest} (layers {boundaries[largest]} to "
        f"{boundaries[largest + 1]}) alone needs {_gib(needs[largest])} and the largest node has "
        f"{_gib(max(usable.values()))}"
    ]


def _plan(
    problem: _Problem, layout: _Layout, manifest_digest: str, policy_digest: str, instance: str
) -> Plan:
    """Writes a layout down as a plan."""
    profile, policy, settings, load = (
        problem.profile,
        problem.policy,
        problem.settings,
        problem.load,
    )
    blocks = _cache_blocks(problem, layout)
    stages = len(layout.nodes)
    trusts = problem.trusts(stages)
    roles = tuple(
        RoleTemplate(
            name=f"stage-{stage}",
            stage=stage,
            first_layer=layout.boundaries[stage],
            last_layer=layout.boundaries[stage + 1],
            tp=settings.tensor_parallel,
            exposes=problem.exposes(stage, stages, layout.boundaries),
            trust=trusts[stage],
            evidence=policy.evidence_for(trusts[stage]),
            regions=policy.regions,
            memory_bytes=layout.costs[stage].memory_bytes(blocks),
        )
        for stage in range(stages)
    )
    template = PlanTemplate(
        model=settings.model,
        cluster=settings.cluster,
        manifest_digest=manifest_digest,
        policy_digest=policy_digest,
        dtype=settings.dtype,
        max_context=load.context,
        max_sequences=load.sequences,
        max_step_tokens=load.step_tokens,
        block_size=load.block_size,
        cache_blocks=blocks,
        step_deadline_ms=settings.step_deadline_ms,
        hidden_size=profile.hidden_size,
        layers=len(profile.layers),
        vocabulary=profile.vocabulary,
        weaknesses=_weaknesses(policy, roles, problem.sealed),
        roles=roles,
        max_instances=settings.max_instances,
        generation=settings.generation,
        expires_at=settings.expires_at,
        weight_format=settings.weight_format,
    )
    return Plan(
        template=template,
        binding=Binding(instance, {role.name: layout.nodes[role.stage].id for role in roles}),
        estimates=tuple(_estimate(problem, layout, role, blocks) for role in roles),
        notes=tuple(_notes(problem, blocks)),
    )


def _cache_blocks(problem: _Problem, layout: _Layout) -> int:
    """Blocks that the fullest node has memory for, at most what all sequences can use."""
    blocks = min(problem.load.sequences * problem.least_blocks, MAX_CACHE_BLOCKS)
    for node in layout.nodes:
        costs = [c for n, c in zip(layout.nodes, layout.costs, strict=True) if n.id == node.id]
        free = problem.room(node) - sum(cost.memory_bytes(0) for cost in costs)
        blocks = min(blocks, free // sum(cost.block_bytes for cost in costs))
    return blocks


def _plain_weights(policy: Policy, sealed: SealedParts) -> bool:
    """Whether weights that the policy protects are readable on a disk."""
    return policy.protect.weights is Trust.ATTESTED and not sealed.complete


def _weaknesses(
    policy: Policy, roles: tuple[RoleTemplate, ...], sealed: SealedParts
) -> tuple[str, ...]:
    """Names of the accepted weaknesses that this template has, in the order of `Weakness`."""
    trusts = {role.trust for role in roles}
    kinds = {kind for role in roles for kind in role.evidence} - {ENROLLED_EVIDENCE}
    applies = {
        Weakness.SIMULATED_TEE: "simulated" in kinds,
        Weakness.UNHARDENED: policy.accepts(Weakness.UNHARDENED),
        Weakness.PLAIN_INGRESS: policy.ingress is Ingress.PLAIN,
        Weakness.UNPINNED_MEASUREMENT: any(kind not in policy.measurements for kind in kinds),
        Weakness.ACTIVATION_LEAKAGE: policy.protect.prompt is Trust.ATTESTED
        and Trust.ENROLLED in trusts,
        Weakness.WEIGHT_ORACLE: policy.protect.weights is Trust.ATTESTED and len(trusts) > 1,
        Weakness.UNVERIFIED_OUTPUT: len(trusts) > 1,
        Weakness.PLAIN_WEIGHTS: _plain_weights(policy, sealed),
    }
    shown = tuple(weakness.value for weakness, holds in applies.items() if holds)
    devices = policy.demanded_devices() if Trust.ATTESTED in trusts else ()
    return shown + policy.left_open({*kinds, *devices})


def _estimate(problem: _Problem, layout: _Layout, role: RoleTemplate, blocks: int) -> StageEstimate:
    node, cost = layout.nodes[role.stage], layout.costs[role.stage]
    hosts = problem.hosts(role.trust)
    needs = "an attested node" if role.trust is Trust.ATTESTED else "an enrolled node"
    reasons = [
        f"sees {', '.join(role.exposes)}, so it needs {needs} ({', '.join(role.evidence)})",
        f"{len(hosts)} of {len(problem.nodes)} nodes qualify; {node.name} offers "
        f"{_gib(problem.room(node))}"
        + (f", TEE {node.tee} by its label" if node.tee else "")
        + (f", region {node.region} as declared" if node.region else ""),
    ]
    others = [
        f"stage-{i}"
        for i, other in enumerate(layout.nodes)
        if other.id == node.id and i != role.stage
    ]
    if others:
        reasons.append(f"shares the node with {', '.join(others)[:256]}")
    return StageEstimate(
        role=role.name,
        node=node.id,
        node_name=node.name,
        weight_bytes=cost.weight_bytes,
        cache_bytes=blocks * cost.block_bytes,
        working_bytes=cost.working_bytes,
        step_cost=cost.step_cost,
        reasons=tuple(reasons),
    )


def _notes(problem: _Problem, blocks: int) -> Iterator[str]:
    load, profile, policy = problem.load, problem.profile, problem.policy
    yield (
        f"the cache holds {blocks * load.block_size} tokens: "
        f"{blocks // problem.least_blocks} of {load.sequences} sequences at full length"
    )
    if problem.settings.context is None and load.context < profile.max_context:
        yield (
            f"the context is {load.context} tokens; the model takes up to {profile.max_context} "
            "if it is asked for"
        )
    if problem.sealed.any and not problem.sealed.complete and problem.settings.layer_splits is None:
        yield (
            "parts of the model are sealed: every stage is planned as if it had some of them; "
            "with explicit cut points (layer_splits) those without need no more than the others"
        )
    wanted = [
        f"{name} {value} ms"
        for name, value in (("ttft", policy.slo.ttft_ms), ("tpot", policy.slo.tpot_ms))
        if value is not None
    ]
    if wanted:
        yield f"wanted: {', '.join(wanted)}; the plan does not know the nodes' speed, so measure it"


def _slowest(layout: _Layout) -> int:
    return max(cost.step_cost for cost in layout.costs)


def _spread(nodes: tuple[Node, ...]) -> int:
    return len({node.id for node in nodes})


def _hops(nodes: tuple[Node, ...]) -> int:
    """How often a step goes from one node to another, the way back to the head included."""
    return sum(a.id != b.id for a, b in itertools.pairwise((*nodes, nodes[0])))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
