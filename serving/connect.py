"""`bulkhead connect`: a plain OpenAI endpoint on the client's own machine, sealed from there on.

The roster comes from the deployment, which is not trusted, and is believed only when it verifies
against the owner's key that the client pins. Prompts leave this machine sealed to the head shard.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping

import httpx
import uvicorn

from placement.explain import weakness_warnings
from placement.policy import Ingress
from security.errors import SecurityError
from serving.errors import CommandError
from serving.relay import HeadRoute, HeadUnavailable, Relay, RequestRefused
from serving.rosters import MAX_PUBLIC_BYTES, route_of

ROSTER_AGE_S = 5.0
CONNECT_TIMEOUT_S = 10.0
# A step of a large model on slow machines may be long; the head itself sends errors in time.
READ_TIMEOUT_S = 600.0


class HttpDirectory:
    """Finds the head through the deployment's own endpoint; see `serving.relay.HeadDirectory`.

    Args:
        client: has the deployment's base URL.
        instance: name of the pipeline instance that is expected.
        owner_public: the owner's public key (32 bytes), pinned.
    """

    def __init__(self, client: httpx.AsyncClient, instance: str, owner_public: bytes) -> None:
        self._client = client
        self._instance = instance
        self._owner_public = owner_public
        self._route: HeadRoute | None = None
        self._fetched_at = float("-inf")
        self._fetching = asyncio.Lock()

    async def route(self) -> HeadRoute:
        """The route of the current epoch, verified."""
        async with self._fetching:
            if self._route is None or time.monotonic() - self._fetched_at > ROSTER_AGE_S:
                public = await self.roster()
                try:
                    self._route = route_of(
                        public,
                        self._instance,
                        self._owner_public,
                        int(time.time()),
                        self._route,
                    )
                except SecurityError as error:
                    raise HeadUnavailable(f"roster refused: {error.code}: {error}") from None
                self._fetched_at = time.monotonic()
            return self._route

    def forget(self) -> None:
        """Fetches the roster again before the next request."""
        self._fetched_at = float("-inf")

    async def roster(self) -> bytes:
        """The signed documents, not verified yet."""
        try:
            async with self._client.stream("GET", "/bulkhead/roster") as response:
                content = await _read_bounded(response, MAX_PUBLIC_BYTES)
                if response.status_code != httpx.codes.OK:
                    raise HeadUnavailable(f"{self._client.base_url}: {response.status_code}")
                return content
        except httpx.HTTPError as error:
            raise _unreachable(self._client, error) from None

    async def status(self) -> Mapping[str, object]:
        """What this proxy has verified by itself."""
        try:
            route = await self.route()
        except HeadUnavailable as error:
            return {"state": "unreachable", "instance": self._instance, "error": str(error)}
        return {
            "state": "serving",
            "instance": route.instance,
            "epoch": route.epoch,
            "ingress": "sealed",
            "weaknesses": list(route.weaknesses),
            "warnings": list(weakness_warnings(route.weaknesses)),
        }


class HttpCarrier:
    """Carries sealed bytes through the deployment's endpoint; see `serving.relay.Carrier`."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def exchange(self, route: HeadRoute, sealed: bytes) -> AsyncGenerator[bytes, None]:
        """See `serving.relay.Carrier.exchange`."""
        try:
            async with self._client.stream("POST", "/bulkhead/sealed", content=sealed) as response:
                if response.status_code == httpx.codes.BAD_REQUEST:
                    raise RequestRefused("the head refused the sealed request")
                if response.status_code != httpx.codes.OK:
                    raise HeadUnavailable(f"the relay says {response.status_code}")
                async for piece in response.aiter_raw():
                    yield piece
        except httpx.HTTPError as error:
            raise _unreachable(self._client, error) from None

    async def ready(self, route: HeadRoute) -> bool:
        """See `serving.relay.Carrier.ready`."""
        try:
            response = await self._client.get("/bulkhead/health")
        except httpx.HTTPError as error:
            raise _unreachable(self._client, error) from None
        return response.status_code == httpx.codes.OK


async def _read_bounded(response: httpx.Response, limit: int) -> bytes:
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > limit:
            raise HeadUnavailable(f"expected at most {limit} bytes of signed documents")
    return bytes(content)


def _unreachable(client: httpx.AsyncClient, error: httpx.HTTPError) -> HeadUnavailable:
    return HeadUnavailable(f"{client.base_url} does not answer: {type(error).__name__}")


def make_client(endpoint: str) -> httpx.AsyncClient:
    """An HTTP client for a deployment's base URL.

    Environment variables of proxies and .netrc files are not read: what is sealed may go through
    anything, but only where the user said.
    """
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=endpoint, timeout=timeout, limits=limits, trust_env=False)


async def serve_locally(
    endpoint: str, instance: str, owner_public: bytes, host: str, port: int
) -> None:
    """Serves the local endpoint until it is stopped.

    Says where it listens and every weakness in force once the roster has been verified.

    Raises:
        CommandError: the deployment cannot be reached, or its roster does not verify.
    """
    async with make_client(endpoint) as client:
        directory = HttpDirectory(client, instance, owner_public)
        try:
            route = await directory.route()
        except HeadUnavailable as error:
            raise CommandError(
                f"{endpoint}: expected a deployment signed by the owner's key, found: {error}"
            ) from None
        relay = Relay(directory, HttpCarrier(client), frozenset(Ingress))
        for text in weakness_warnings(route.weaknesses):
            print(f"warning: {text}")
        print(f"http://{host}:{port}/v1 is sealed to {endpoint}; Ctrl-C ends it", flush=True)
        configuration = uvicorn.Config(
            relay.application,
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
        )
        await uvicorn.Server(configuration).serve()
