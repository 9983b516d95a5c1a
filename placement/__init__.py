"""Decides: what a policy says, how a model is cut, where its parts go, and whether that is right.

Pure functions over plain data: no torch, no Ray, no clock, no network, no randomness. `verify` is
the part that others trust; `planner`, `cost` and `explain` are not trusted by anyone.
"""

from placement.plan import Binding, DataClass, Plan, PlanTemplate, RoleTemplate, Trust
from placement.policy import Policy, PolicyError, Weakness, parse_policy
from placement.verify import Claims, PlanRejected, Violation, verify_claims, verify_template

__all__ = [
    "Binding",
    "Claims",
    "DataClass",
    "Plan",
    "PlanRejected",
    "PlanTemplate",
    "Policy",
    "PolicyError",
    "RoleTemplate",
    "Trust",
    "Violation",
    "Weakness",
    "parse_policy",
    "verify_claims",
    "verify_template",
]
