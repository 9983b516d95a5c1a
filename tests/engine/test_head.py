"""The head tells tenants apart by the credential inside the sealed request, and by nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import VOCABULARY, write_checkpoint
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from placement.plan import DataClass, PlanTemplate, RoleTemplate, Trust
from runtime.shard.head import Head, Tenants
from runtime.shard.shard import stage_settings
from runtime.stage.border import RotaryBorder
from runtime.stage.stage import StageRunner
from security.envelope import EnvelopeClient, Request
from security.manifest import ModelFiles, build_manifest


def one_stage(manifest_digest: str) -> PlanTemplate:
    role = RoleTemplate(
        name="stage-0",
        stage=0,
        first_layer=0,
        last_layer=6,
        tp=1,
        exposes=(DataClass.PROMPT, DataClass.ACTIVATIONS, DataClass.WEIGHTS),
        trust=Trust.ATTESTED,
        evidence=("simulated",),
        regions=(),
        memory_bytes=1 << 20,
    )
    return PlanTemplate(
        model="tiny",
        cluster="lab",
        manifest_digest=manifest_digest,
        policy_digest="00" * 32,
        dtype="float32",
        max_context=64,
        max_sequences=4,
        max_step_tokens=64,
        block_size=16,
        cache_blocks=16,
        step_deadline_ms=10_000,
        hidden_size=64,
        layers=6,
        vocabulary=VOCABULARY,
        weaknesses=(),
        roles=(role,),
        max_instances=1,
        generation=1,
        expires_at=2_000_000_000_000,
    )


def test_the_credential_alone_makes_the_tenant(checkpoint: Callable[[str], Path]) -> None:
    model = checkpoint("llama")
    manifest = build_manifest(model)
    files = ModelFiles(model, manifest)
    key = X25519PrivateKey.generate()
    head = Head(one_stage(manifest.digest), files, "pipeline-0", key, None)
    client = EnvelopeClient(key.public_key().public_bytes_raw(), "pipeline-0")
    body: dict[str, object] = {"model": "tiny", "prompt": [1, 2], "max_tokens": 4, "stream": True}
    disguised = {"user": "other", "prompt_cache_key": "other", "safety_identifier": "other"}
    asked = [
        ("", body),
        ("", body | disguised),
        ("Bearer sk-one", body),
        ("Bearer sk-one", body | disguised),
        ("Bearer sk-two", body),
    ]

    async def scenario() -> list[bytes]:
        answers = []
        for credential, document in asked:
            content = json.dumps(document).encode()
            request = Request("POST", "/v1/completions", "application/json", content, credential)
            answers.append(head.exchange(client.seal(request)[0]))
            await anext(answers[-1])
        while head.load().waiting < len(asked):
            await asyncio.sleep(0.01)
        # Nothing runs: the pipeline has no epoch.
        tenants = [sequence.tenant for sequence in sorted(head._engine._posts, key=_arrival)]
        for answer in answers:
            await answer.aclose()
        return tenants

    try:
        nobody, nobody_again, one, one_again, two = asyncio.run(scenario())
    finally:
        head.close()
        files.close()
    assert nobody == nobody_again and one == one_again
    assert len({nobody, one, two}) == 3
    assert b"sk-" not in nobody + one + two


@pytest.mark.parametrize(
    ("family", "changes", "recomputes"),
    [
        ("phi3", {"original_max_position_embeddings": 40, "sliding_window": None}, True),
        ("llama", {}, False),
    ],
)
def test_the_schedule_knows_the_models_longrope_border(
    family: str, changes: dict[str, object], recomputes: bool, tmp_path: Path
) -> None:
    rotary = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 40,
    }
    shape = {"partial_rotary_factor": 1.0} if family == "phi3" else {}
    write_checkpoint(family, tmp_path, rope_parameters=rotary, **changes, **shape)
    manifest = build_manifest(tmp_path)
    files = ModelFiles(tmp_path, manifest)
    template = one_stage(manifest.digest)
    # As a shard does: the stage has parsed the model's configuration.
    stage = StageRunner(files, stage_settings(template, template.roles[0], threads=1))
    key = X25519PrivateKey.generate()
    head = Head(template, files, "pipeline-0", key, stage.rotary_border)
    head.close()
    files.close()
    assert head._engine.limits.rotary_border == RotaryBorder(40, recomputes)


def _arrival(sequence: object) -> int:
    return sequence.arrival  # type: ignore[attr-defined, no-any-return]


def test_tenants_of_another_process_have_other_names() -> None:
    assert Tenants().of("Bearer x") != Tenants().of("Bearer x")
