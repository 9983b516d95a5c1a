"""Plans in words and columns, for people at a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from placement.plan import Plan
from placement.planner import Infeasible
from placement.policy import Weakness

_COLUMNS = ("stage", "layers", "tp", "node", "trust", "evidence", "weights", "cache", "memory")


def plan_table(plan: Plan) -> str:
    """A table of the plan, one line per stage, ending in a line of totals."""
    template = plan.template
    rows = [_COLUMNS]
    rows.extend(
        (
            role.name,
            f"{role.first_layer}-{role.last_layer - 1}",
            str(role.tp),
            estimate.node_name,
            role.trust.value,
            ",".join(role.evidence),
            _size(estimate.weight_bytes),
            _size(estimate.cache_bytes),
            _size(estimate.memory_bytes),
        )
        for role, estimate in zip(template.roles, plan.estimates, strict=True)
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    numbers = template.dtype
    if template.weight_format != "plain":
        numbers += f" with {template.weight_format} weights"
    nodes = len(set(plan.binding.nodes.values()))
    lines.append(
        f"{template.model}: {template.layers} layers in {numbers} on {nodes} "
        f"node{'s' if nodes > 1 else ''}, {template.max_sequences} sequences of up to "
        f"{template.max_context} tokens"
    )
    return "\n".join(lines)


def explain_plan(plan: Plan) -> str:
    """The table, why every stage is where it is, notes, and what is not protected."""
    lines = [plan_table(plan), ""]
    for estimate in plan.estimates:
        lines.append(f"{estimate.role} on {estimate.node_name}:")
        lines.extend(f"  - {reason}" for reason in estimate.reasons)
    lines.extend(f"note: {note}" for note in plan.notes)
    lines.extend(f"warning: {text}" for text in weakness_warnings(plan.template.weaknesses))
    return "\n".join(lines)


def explain_infeasible(error: Infeasible) -> str:
    """Why there is no plan, one reason a line."""
    return "\n".join(["No plan is possible:", *(f"  - {reason}" for reason in error.reasons)])


def weakness_warnings(names: Sequence[str]) -> tuple[str, ...]:
    """One line per weakness, and one per kind of evidence for all that a policy leaves open.

    A name from a newer version is shown as it is.
    """
    known = {weakness.value: weakness.warning for weakness in Weakness}
    lines: list[str] = []
    opened: dict[str, list[str]] = {}
    for name in names:
        what, _, rest = name.partition(".")
        if what == "open" and "." in rest:
            kind, _, pin = rest.partition(".")
            opened.setdefault(kind, []).append(pin)
        elif name == "declared.regions":
            lines.append("regions are as nodes declare them: nothing proves where a machine stands")
        elif what == "roots" and rest:
            lines.append(f"{rest} evidence: roots that the policy names count, not the vendor's")
        else:
            lines.append(known.get(name, name))
    for kind, pins in opened.items():
        lines.append(f"{kind} evidence: the policy leaves open {', '.join(pins)}")
    return tuple(lines)


def _size(size: int) -> str:
    """A size in the unit that keeps it short."""
    if size >= 10 << 30:
        return f"{size / 2**30:.1f} GiB"
    if size >= 1 << 30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB"
