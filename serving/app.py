"""The Ray Serve deployment: replicas that relay between HTTP and the head shard. No torch here.

A replica holds no model and no key of its own, so it starts in seconds and may be restarted or
multiplied at any time. It finds the pipeline through the detached pipeline actor and believes only
what verifies against the owner's key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import cast

import ray
from ray import serve
from ray.actor import ActorHandle
from starlette.types import ASGIApp

from placement.explain import weakness_warnings
from placement.policy import Ingress
from runtime.cluster.deploy import NAMESPACE
from runtime.cluster.pipeline_actor import PipelineView
from security.errors import SecurityError
from serving.relay import GrpcCarrier, HeadRoute, HeadUnavailable, Relay
from serving.rosters import route_of

log = logging.getLogger("bulkhead.serving")

APPLICATION = "bulkhead"
DEPLOYMENT = "Relay"
HEAD_NODE = "node:__internal_head__"
"""Ray's name for the resource that its head node alone has."""
MAX_ONGOING_REQUESTS = 1024
VIEW_AGE_S = 1.0
VIEW_TIMEOUT_S = 10.0
LOOP_SILENCE_S = 30.0


class ActorDirectory:
    """Finds the head through the pipeline actor; see `serving.relay.HeadDirectory`.

    Args:
        instance: name of the pipeline instance.
        owner_public: the owner's public key (32 bytes), which everything must verify against.
    """

    def __init__(self, instance: str, owner_public: bytes) -> None:
        self._instance = instance
        self._owner_public = owner_public
        self._actor: ActorHandle | None = None
        self._view: PipelineView | None = None
        self._asked_at = float("-inf")
        self._route: HeadRoute | None = None
        self._routed_from = b""
        self._asking = asyncio.Lock()

    async def route(self) -> HeadRoute:
        """The route of the current epoch."""
        view = await self._current()
        if not view["roster"]:
            raise HeadUnavailable(f"{self._instance} is {view['state']}")
        if self._route is None or self._routed_from != view["roster"]:
            try:
                self._route = route_of(
                    view["roster"],
                    self._instance,
                    self._owner_public,
                    int(time.time()),
                    self._route,
                )
            except SecurityError as error:
                raise HeadUnavailable(f"roster refused: {error.code}: {error}") from None
            self._routed_from = view["roster"]
        return self._route

    def forget(self) -> None:
        """Asks the actor again before the next request."""
        self._asked_at = float("-inf")

    async def roster(self) -> bytes:
        """The signed documents."""
        view = await self._current()
        if not view["roster"]:
            raise HeadUnavailable(f"{self._instance} is {view['state']}")
        return view["roster"]

    async def status(self) -> Mapping[str, object]:
        """State, shards, plan and weaknesses."""
        try:
            view = await self._current()
        except HeadUnavailable as error:
            return {"state": "unreachable", "instance": self._instance, "error": str(error)}
        shown: dict[str, object] = {name: value for name, value in view.items() if name != "roster"}
        try:
            # What is in force is what the owner signed, not what Ray's side says.
            weaknesses = list((await self.route()).weaknesses)
        except HeadUnavailable:
            weaknesses = view["weaknesses"]
        shown["weaknesses"] = weaknesses
        shown["warnings"] = list(weakness_warnings(weaknesses))
        return shown

    async def _current(self) -> PipelineView:
        async with self._asking:
            if self._view is not None and time.monotonic() - self._asked_at < VIEW_AGE_S:
                return self._view
            try:
                if self._actor is None:
                    self._actor = await asyncio.to_thread(
                        ray.get_actor, self._instance, namespace=NAMESPACE
                    )
                view = await asyncio.wait_for(_describe(self._actor), VIEW_TIMEOUT_S)
            except (ValueError, TimeoutError, ray.exceptions.RayError) as error:
                self._actor = None
                raise HeadUnavailable(
                    f"pipeline {self._instance} does not answer: {type(error).__name__}"
                ) from None
            self._view = view
            self._asked_at = time.monotonic()
            return view


async def _describe(actor: ActorHandle) -> PipelineView:
    return cast(PipelineView, await actor.describe.remote())


class RelayReplica:
    """One replica.

    Args:
        instance: name of the pipeline instance.
        owner_public: the owner's public key (32 bytes).
    """

    def __init__(self, instance: str, owner_public: bytes) -> None:
        # Plain requests are sealed here only where the policy lets Ray's side read them.
        self._relay = Relay(
            ActorDirectory(instance, owner_public), GrpcCarrier(), frozenset({Ingress.PLAIN})
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve once the replica is initialised."""
        return self._relay.application

    async def check_health(self) -> None:
        """The control loop is alive when this runs; readiness is GET /bulkhead/health."""


def build_application(instance: str, owner_public: bytes, replicas: int = 1) -> serve.Application:
    """The Serve application for one pipeline instance.

    Args:
        instance: name of the pipeline instance.
        owner_public: the owner's public key (32 bytes).
        replicas: how many relays.
    """
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        # Beside the proxy: a plain request does not cross a network between the two.
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE: 0.0001}},
        health_check_period_s=10,
        health_check_timeout_s=LOOP_SILENCE_S,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
    )(serve.ingress()(RelayReplica))
    return deployment.bind(instance, owner_public)
