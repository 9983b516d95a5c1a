"""The detached actor that owns one pipeline instance: placement groups, shard actors, recovery.

It is Ray's view of an instance and holds nothing secret: it says which process should run where.
Which processes belong to the instance is decided by the key broker alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import TypedDict

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement.inventory import Inventory, InventoryError, from_ray_nodes
from placement.plan import PlanTemplate
from placement.planner import Infeasible, bind
from placement.policy import Policy
from runtime.cluster.shard_actor import ShardActor, ShardEnd, ShardView
from security.broker.client import BrokerClient
from security.errors import SecurityError

log = logging.getLogger("bulkhead.cluster")

# A refusal (wrong evidence, changed model) does not heal by itself quickly: retry slower each time.
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 30.0
NODE_LOSS_WAIT_S = 20.0
NODE_CHECK_S = 5.0
VIEW_TIMEOUT_S = 3.0
RESERVE_CHECK_S = 5


class PipelineSpec(TypedDict):
    """All that a pipeline actor needs; plain values, nothing secret."""

    instance: str
    template: bytes  # payload of the signed template
    policy: bytes  # payload of the signed policy
    binding: dict[str, str]  # role -> Ray node id
    model_directory: str
    broker_address: str
    owner_public: bytes
    log_directory: str
    node_key_path: str
    plan_table: str


class PipelineView(TypedDict):
    """What status and the relay see of an instance."""

    state: str
    instance: str
    model: str
    roster: bytes
    ingress_address: str
    shards: list[ShardView]
    weaknesses: list[str]
    plan_table: str
    error: str
    restarts: int
    since: float


class _Slot:
    """One role: where it is meant to run, the bundle reserved for it, its actor."""

    def __init__(self, role: str, node: str) -> None:
        self.role = role
        self.node = node
        self.node_name = node
        self.group: PlacementGroup | None = None
        self.actor: ray.actor.ActorHandle | None = None
        self.view: ShardView | None = None
        self.error = ""


class PipelineActor:
    """Owns one pipeline instance. Detached: Serve replicas come and go, the shards stay.

    Should this actor itself be restarted by Ray, its shard actors have ended with it (they are its
    children), their processes with them (lifeline), and it starts the instance anew.
    """

    def __init__(self, spec: PipelineSpec) -> None:
        self._spec = spec
        self._template = PlanTemplate.from_bytes(spec["template"])
        self._policy = Policy.from_bytes(spec["policy"])
        self._slots = [
            _Slot(role.name, spec["binding"][role.name]) for role in self._template.roles
        ]
        self._reserved = 0
        self._stopping = asyncio.Event()
        self._restarts = 0
        self._since = time.time()
        self._broker = BrokerClient(spec["broker_address"], spec["owner_public"])
        self._roster = b""
        self._known: Inventory | None = None
        # Ray calls this on the actor's loop. A restarted actor must not wait to be asked.
        self._tasks = [asyncio.create_task(self._keep(slot)) for slot in self._slots]
        self._tasks.append(asyncio.create_task(self._follow()))

    async def start(self) -> None:
        """Returns when the actor is there; the instance comes up by itself."""

    async def describe(self) -> PipelineView:
        """The instance as status and the relay see it."""
        views = [slot.view for slot in self._slots if slot.view is not None]
        serving = len(views) == len(self._slots) and all(v["state"] == "serving" for v in views)
        errors = [slot.error for slot in self._slots if slot.error]
        state = "serving" if serving else ("failing" if errors else "starting")
        return PipelineView(
            state=state,
            instance=self._spec["instance"],
            model=self._template.model,
            roster=self._roster,
            ingress_address=views[0]["ingress_address"] if views else "",
            shards=views,
            weaknesses=list(self._template.weaknesses),
            plan_table=self._spec["plan_table"],
            error="" if serving else "\n".join(errors),
            restarts=self._restarts,
            since=self._since,
        )

    async def logs(self, role: str, lines: int) -> str:
        """The last lines of one shard's log. Raises ValueError for an unknown role."""
        for slot in self._slots:
            if slot.role == role:
                if slot.actor is None:
                    return f"(no shard runs as {role}: {slot.error or 'starting'})"
                return str(await slot.actor.read_log.remote(lines))
        known = ", ".join(slot.role for slot in self._slots)
        raise ValueError(f"role: expected one of {known}, found {role[:40]!r}")

    async def stop(self) -> None:
        """Ends all shards and gives their resources back."""
        self._stopping.set()
        actors = [slot.actor for slot in self._slots if slot.actor is not None]
        stops = [asyncio.wait_for(_stop(actor), 10) for actor in actors]
        await asyncio.gather(*stops, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        for actor in actors:
            ray.kill(actor)
        for slot in self._slots:
            self._give_back(slot)

    # -- bringing up and keeping up ------------------------------------------------------------

    async def _reserve(self, slot: _Slot) -> None:
        """Reserves the slot's memory on its node; returns when Ray has it, or the node is gone.

        Each role has a placement group of its own, of one bundle: Ray 2.60 matches the label
        selectors of a group's bundles to the wrong bundles where their resources differ, and one
        node that is missing would hold up the roles of all others.
        """
        nodes = {node.id: node for node in (await self._inventory()).nodes}
        node = nodes.get(slot.node)
        if node is not None:
            slot.node_name = node.name
        named = node is not None and "bulkhead.name" in node.labels
        # A name outlives a restart of Ray on the machine, a node id does not.
        selector = {"bulkhead.name": slot.node_name} if named else {"ray.io/node-id": slot.node}
        memory = float(self._template.role(slot.role).memory_bytes)
        self._reserved += 1
        slot.group = placement_group(
            [{"CPU": 0.01, "memory": memory}],
            bundle_label_selector=[selector],
            name=f"bulkhead-{self._spec['instance']}-{slot.role}-{self._reserved}",
        )
        while not await asyncio.to_thread(slot.group.wait, RESERVE_CHECK_S):
            present = {node.name for node in (await self._inventory()).nodes}
            if self._stopping.is_set() or slot.node_name not in present:
                return
            slot.error = (
                f"{slot.role}: waiting for Ray to reserve {memory / 2**20:.0f} MiB on "
                f"{slot.node_name}; see what else holds memory there (`ray status`)"
            )

    async def _inventory(self) -> Inventory:
        """The cluster's nodes; the last that could be read, while what Ray says makes no sense.

        A node whose raylet was restarted is listed twice until Ray notices the end of the first.
        """
        listed = await asyncio.to_thread(ray.nodes)
        try:
            self._known = from_ray_nodes(listed)
        except InventoryError as error:
            if self._known is None:
                raise
            log.warning("nodes: %s", error)
        return self._known

    async def _keep(self, slot: _Slot) -> None:
        """Runs one role for as long as the instance lives."""
        retry_s = FIRST_RETRY_S
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                if slot.group is not None:
                    await self._move_if_lost(slot)
                if slot.group is None:
                    await self._reserve(slot)
                end = await self._run_once(slot)
            except Exception as error:  # a role is never given up
                end = ShardEnd(code="internal", reason=f"{type(error).__name__}: {error}"[:2000])
            if self._stopping.is_set():
                return
            slot.actor = None
            slot.view = None
            slot.error = f"{slot.role} on {slot.node_name}: {end['code']}: {end['reason']}"
            log.warning("%s", slot.error)
            self._restarts += 1
            if time.monotonic() - started > 60:
                retry_s = FIRST_RETRY_S
            await asyncio.sleep(retry_s)
            retry_s = min(MAX_RETRY_S, retry_s * 2)

    async def _run_once(self, slot: _Slot) -> ShardEnd:
        spec = self._spec
        nodes = {node.name: node for node in (await self._inventory()).nodes}
        node = nodes.get(slot.node_name)
        sharing = sum(other.node_name == slot.node_name for other in self._slots)
        threads = max(1, int((node.cpus if node else 1) // sharing))
        try:
            slot.actor = (
                ray.remote(ShardActor)
                .options(
                    num_cpus=0.01,
                    max_concurrency=8,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        placement_group=slot.group, placement_group_bundle_index=0
                    ),
                )
                .remote(spec["instance"], slot.role, slot.node_name, spec["log_directory"])
            )
            run = slot.actor.run.remote(
                instance=spec["instance"],
                model_directory=spec["model_directory"],
                broker_address=spec["broker_address"],
                owner_public=spec["owner_public"],
                threads=threads,
                node_key_path=spec["node_key_path"],
                region=(node.region or "") if node else "",
            )
            return await self._await_end(slot, run)
        except ray.exceptions.RayError as error:
            return ShardEnd(code="actor_lost", reason=f"{type(error).__name__}: {error}"[:2000])
        finally:
            if slot.actor is not None:
                ray.kill(slot.actor)

    async def _await_end(self, slot: _Slot, run: Awaitable[ShardEnd]) -> ShardEnd:
        """Waits for the shard's end, or its node's: an actor that Ray has not placed when its node
        is lost would wait for that node for ever.
        """
        end = asyncio.ensure_future(run)
        try:
            while not (await asyncio.wait({end}, timeout=NODE_CHECK_S))[0]:
                nodes = (await self._inventory()).nodes
                if all(node.name != slot.node_name for node in nodes):
                    return ShardEnd(code="node_lost", reason="its node has left the cluster")
            return end.result()
        finally:
            end.cancel()

    async def _move_if_lost(self, slot: _Slot) -> None:
        """Finds another node for a role whose node stays away, where the template allows one."""
        deadline = time.monotonic() + NODE_LOSS_WAIT_S
        while not self._stopping.is_set():
            inventory = await self._inventory()
            if any(node.name == slot.node_name for node in inventory.nodes):
                return
            if time.monotonic() > deadline:
                others = {s.role: s.node_name for s in self._slots if s is not slot}
                try:
                    binding = bind(
                        self._template, self._policy, inventory, self._spec["instance"], others
                    )
                except Infeasible as error:
                    slot.error = f"{slot.role}: node {slot.node_name} is lost: {error}"
                else:
                    slot.node = binding.nodes[slot.role]
                    self._give_back(slot)
                    return
            await asyncio.sleep(1)

    def _give_back(self, slot: _Slot) -> None:
        """Gives the slot's memory back to Ray."""
        if slot.group is not None:
            remove_placement_group(slot.group)
            slot.group = None

    async def _follow(self) -> None:
        """Keeps what `describe` says up to date."""
        while not self._stopping.is_set():
            for slot in self._slots:
                actor = slot.actor
                if actor is None:
                    continue
                try:
                    view = await asyncio.wait_for(_view(actor), VIEW_TIMEOUT_S)
                    if slot.actor is not actor:
                        continue  # ended meanwhile
                    slot.view = view
                    if view["state"] == "serving":
                        slot.error = ""
                except (ray.exceptions.RayError, TimeoutError):
                    if slot.view is not None:
                        slot.view["state"] = "unreachable"
            try:
                self._roster = await asyncio.to_thread(
                    self._broker.get_roster, self._spec["instance"]
                )
            except SecurityError as error:
                # No roster yet, or the broker is away: the instance runs on with the last one.
                log.debug("no roster from the broker: %s", error.code)
            await asyncio.sleep(0.5)


async def _view(actor: ray.actor.ActorHandle) -> ShardView:
    view: ShardView = await actor.view.remote()
    return view


async def _stop(actor: ray.actor.ActorHandle) -> None:
    await actor.stop.remote()
