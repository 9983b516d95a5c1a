"""What the head shard adds to a stage: the engine, the OpenAI layer and the sealed ingress."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncGenerator

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from placement.plan import PlanTemplate
from runtime.engine.defaults import generation_defaults
from runtime.engine.engine import Engine, EngineStatus
from runtime.engine.openai import OpenAIService
from runtime.engine.scheduler import EngineLimits
from runtime.engine.tokenizer import load_tokenizer
from runtime.shard.pipeline import HeadRunner
from runtime.stage.border import RotaryBorder
from security.envelope import EnvelopeServer
from security.manifest import ModelFiles

MAX_SEALED_BYTES = 16 << 20
"""Longest sealed request: above the OpenAI layer's own limit, so that it can answer with 413."""

GENERATION_CONFIG = "generation_config.json"
CONFIG = "config.json"


class Tenants:
    """Tells tenants apart by the credential inside their sealed requests.

    Whoever sends the same Authorization header is the same tenant; all requests without one are one
    tenant, whose members share cached prefixes and a place in line with each other. Nothing else
    counts: neither OpenAI's `user`, `prompt_cache_key` and `safety_identifier`, which anybody may
    write into a body, nor the address that a request came from, which relays see. The credential is
    not checked here: it separates those who keep theirs to themselves from everybody else.

    A tenant is a keyed hash under a secret of this process, so that no credential is kept.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def of(self, credential: str) -> bytes:
        """The tenant of a request with this Authorization header, "" for none."""
        return hashlib.blake2b(credential.encode(), digest_size=16, key=self._secret).digest()


class Head:
    """Engine and OpenAI layer of one head shard; they outlive epochs.

    Args:
        files: the verified model; tokenizer, chat template and defaults are read through it.
        instance: pipeline instance, which sealed requests are bound to.
        private_key: the shard's key, which requests are sealed to.
        rotary_border: where the model changes its rotations; None where it never does.
    """

    def __init__(
        self,
        template: PlanTemplate,
        files: ModelFiles,
        instance: str,
        private_key: X25519PrivateKey,
        rotary_border: RotaryBorder | None,
    ) -> None:
        self.runner = HeadRunner(template)
        self._tokenizer = load_tokenizer(files)
        limits = EngineLimits(
            max_sequences=template.max_sequences,
            max_step_tokens=template.max_step_tokens,
            max_context=template.max_context,
            block_size=template.block_size,
            cache_blocks=template.cache_blocks,
            vocabulary=template.vocabulary,
            rotary_border=rotary_border,
        )
        self._engine = Engine(
            limits, self.runner, self._tokenizer, template.step_deadline_ms / 1000
        )
        generation = (
            files.read_file(GENERATION_CONFIG) if files.has_file(GENERATION_CONFIG) else None
        )
        self._service = OpenAIService(
            self._engine,
            self._tokenizer,
            generation_defaults(generation, files.read_file(CONFIG), self._tokenizer.eos_token_id),
            template.model,
        )
        self._envelope = EnvelopeServer(private_key, instance)
        self._tenants = Tenants()
        self._engine.start()

    @property
    def failure(self) -> str:
        """Why the engine ended by itself; empty while it has not."""
        return self._engine.status().failure

    def load(self) -> EngineStatus:
        """How busy the engine is."""
        return self._engine.status()

    async def exchange(self, sealed: bytes) -> AsyncGenerator[bytes, None]:
        """Answers one sealed request with sealed records.

        Closing the generator aborts the request and frees its slot.

        Raises:
            EnvelopeError: the request is not sealed to this head, is old or was seen before.
        """
        request, sealer = self._envelope.open(sealed, MAX_SEALED_BYTES)
        response = await self._service.handle(
            request.method,
            request.path,
            request.content_type,
            request.body,
            self._tenants.of(request.credential),
        )
        try:
            yield sealer.head(response.status, response.content_type, response.retry_after_s)
            async for chunk in response.chunks:
                yield sealer.body(chunk)
            yield sealer.end()
        finally:
            await response.chunks.aclose()

    def close(self) -> None:
        """Ends the engine; open requests get a retryable error."""
        self._engine.stop()
        self._service.close()
        self._tokenizer.close()
