"""Real shard processes that prove themselves through a kernel's report device, which stands in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import running
from hardware_lab import policy_text, snp_kernel, write_collateral
from running import RunningPlan, equal_nodes
from snp_machine import YEAR, SnpMachine, crl
from tsm_mount import mounted, needs_mount

from security.attestation.collateral import Collateral

pytestmark = needs_mount

HERE = Path(__file__).parent
TODAY = int(time.time())
DATES = (TODAY - YEAR, TODAY + YEAR)
MACHINE = SnpMachine(product="Genoa", leaf_dates=DATES, issuer_dates=DATES, root_dates=DATES)


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@contextmanager
def hardware_plan(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    policy: str,
    running_machine: SnpMachine = MACHINE,
) -> Iterator[RunningPlan]:
    monkeypatch.setattr(running, "POLICY", policy)
    monkeypatch.setattr(running, "equal_nodes", partial(equal_nodes, tee="sev-snp"))
    lists = (crl("Genoa", this_update=TODAY - 1000, next_update=TODAY + 100_000),)
    known = Collateral((MACHINE.issuer(), MACHINE.root()), lists)
    collateral = write_collateral(tmp_path / "collateral", known)
    with mounted(snp_kernel(running_machine), tmp_path / "tsm") as reports:
        entry = ("-I", str(HERE / "tsm_process.py"), "--configfs", str(reports))
        with RunningPlan(model, (3,), entry=entry, start=False, collateral=collateral) as plan:
            yield plan


def test_admitted_and_serving(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hardware_plan(model, tmp_path, monkeypatch, policy=policy_text(MACHINE)) as plan:
        for role in plan.template.roles:
            plan.start_shard(role.name)
        plan.wait_serving()
        claims = [entry.claims for entry in plan.roster().entries]
        assert {claim.kind for claim in claims} == {"sev-snp"}
        assert {claim.node for claim in claims} == {MACHINE.chip.ljust(64, b"\0").hex()}
        assert {claim.measurement for claim in claims} == {MACHINE.measurement.hex()}
        assert not any(claim.simulated for claim in claims)
        body = {"model": "test-model", "prompt": "x", "max_tokens": 2, "temperature": 0}
        assert plan.post("/v1/completions", body).status == 200


REFUSED = [
    (policy_text(MACHINE, requirements=MACHINE.requirements(roots=())), "snp_root_not_trusted"),
    (policy_text(MACHINE, measurement="ab" * 48), "measurement_refused"),
]


@pytest.mark.parametrize(("policy", "code"), REFUSED, ids=[code for _, code in REFUSED])
def test_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, code: str
) -> None:
    with hardware_plan(model, tmp_path, monkeypatch, policy=policy) as plan:
        plan.start_shard("stage-1")
        assert plan.wait_failed("stage-1").error_code == code


def test_machine_in_debug_mode(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debugged = replace(MACHINE, policy=MACHINE.policy | 1 << 19)
    with hardware_plan(
        model, tmp_path, monkeypatch, policy=policy_text(MACHINE), running_machine=debugged
    ) as plan:
        plan.start_shard("stage-1")
        assert plan.wait_failed("stage-1").error_code == "snp_debug_allowed"
