"""`bulkhead deploy`: a model on a Ray cluster that runs already, from the owner's machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

# Set before Ray is imported, which reads it then.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import ray

from placement.explain import explain_plan, weakness_warnings
from placement.inventory import Inventory
from runtime.cluster.deploy import (
    NAMESPACE,
    connect_inventory,
    describe_pipeline,
    find_pipeline,
)
from security.broker.client import BrokerClient
from security.signing import load_public_key, public_bytes
from serving.deployment import (
    hash_model,
    sign_plan,
    start_relay,
    start_shards,
    stop_all,
    wait_until_reachable,
    wait_until_serving,
)
from serving.errors import CommandError
from serving.home import Home, RunState
from serving.model_source import find_model
from serving.planning import ModelSettings, load_policy, plan_model
from serving.progress import Narrator

LOG_TIMEOUT_S = 15.0
CONNECT_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class DeploySettings:
    """Where to deploy.

    Attributes:
        address: Ray's address, or "auto".
        instance: name of the pipeline instance.
        cluster: name of the cluster in the plan.
        broker_address: "host:port" of the broker, as this machine and the nodes reach it.
        broker_key: file with the broker's public key, copied from where the broker runs.
        node_model: the model's directory on the nodes; None where it is the same as here.
        node_key: key file of enrolled nodes, on the nodes; None where none is enrolled.
        enrolled: node name and file with its public key, one for each enrolled node.
        log_directory: where nodes keep shard logs.
        host: address of the head node that the endpoint listens on.
        port: its port.
    """

    address: str
    instance: str
    cluster: str
    broker_address: str
    broker_key: Path
    node_model: Path | None
    node_key: Path | None
    enrolled: tuple[tuple[str, Path], ...]
    log_directory: Path
    host: str
    port: int


def connect(address: str) -> None:
    """Connects to a running Ray cluster; starts none.

    Raises:
        CommandError: there is none, or it does not let us in.
    """
    if address != "auto" and not address.startswith("ray://"):
        # Ray's own HOST:PORT is for programs on a node; elsewhere it ends the process.
        raise CommandError(
            f"Ray's address: expected ray://HEAD:10001, or auto on a node, found {address[:200]!r}"
        )
    for attempt in range(CONNECT_ATTEMPTS):
        try:
            ray.init(
                address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False
            )
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            # A busy head does not always start its side of Ray Client in time.
            if isinstance(error, ConnectionAbortedError) and attempt + 1 < CONNECT_ATTEMPTS:
                continue
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CommandError(
                f"Ray at {address}: expected a running cluster, found: {first[:300]}; check the "
                "address (ray://HEAD:10001 from outside the cluster), and the token "
                "(RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)"
            ) from None
        return


def read_inventory(address: str) -> Inventory:
    """The nodes of a running Ray cluster."""
    connect(address)
    return connect_inventory()


def deploy(settings: DeploySettings, model: ModelSettings, home: Home) -> None:
    """Plans, signs, installs and starts; returns when the endpoint answers.

    Raises:
        CommandError, SecurityError, placement.planner.Infeasible: it cannot come up; says why.
    """
    narrator = Narrator()
    policy = load_policy(model.policy)
    owner_key = home.owner_key()
    owner_public = public_bytes(owner_key)
    broker_public = load_public_key(settings.broker_key)
    enrolled = {name: load_public_key(path) for name, path in settings.enrolled}
    with narrator.step("model: find") as step:
        source = find_model(model.model, step)
    with narrator.step("model: hash every file") as step:
        manifest = hash_model(source.directory, step)
    with narrator.step(f"Ray: connect to {settings.address}"):
        connect(settings.address)
    plan = plan_model(
        source,
        model,
        policy,
        connect_inventory(),
        manifest=manifest,
        instance=settings.instance,
        cluster=settings.cluster,
    )
    narrator.say("\n" + explain_plan(plan) + "\n")
    signed = sign_plan(
        plan,
        policy,
        manifest,
        owner_key=owner_key,
        broker_public=broker_public,
        enrolled=enrolled,
    )
    with (
        narrator.step("broker: install"),
        BrokerClient(settings.broker_address, owner_public) as broker,
    ):
        broker.install(signed.installation)
    actor = start_shards(
        signed,
        settings.node_model or source.directory,
        settings.broker_address,
        settings.log_directory,
        settings.node_key,
    )
    with narrator.step("Ray Serve: relay"):
        start_relay(settings.instance, owner_public, settings.host, settings.port)
    endpoint = f"http://{_reachable_host(settings.host)}:{settings.port}"
    home.write_run_state(
        RunState(
            kind="cluster",
            endpoint=endpoint,
            instance=settings.instance,
            model=plan.template.model,
            ray_address=settings.address,
            log_directory=str(settings.log_directory),
            pid=0,
            started_at=int(time.time()),
        )
    )
    wait_until_serving(actor, narrator)
    wait_until_reachable(endpoint, narrator)
    for text in weakness_warnings(plan.template.weaknesses):
        narrator.say(f"warning: {text}")
    narrator.say(f"ready: {plan.template.model} at {endpoint}/v1 (OpenAI-compatible)")


def take_down(address: str, instance: str, home: Home) -> None:
    """Ends relay and pipeline on a running cluster."""
    connect(address)
    with Narrator().step(f"{instance}: end"):
        stop_all(instance)
    home.clear_run_state()


def print_remote_logs(state: RunState, role: str | None, lines: int) -> None:
    """Prints the last lines of shard logs, fetched through the pipeline actor.

    Raises:
        CommandError: no such pipeline or role.
    """
    connect(state.ray_address)
    actor = find_pipeline(state.instance)
    if actor is None:
        raise CommandError(f"{state.instance}: expected it to run at {state.ray_address}")
    roles = [shard["role"] for shard in describe_pipeline(actor)["shards"]]
    for name in [role] if role is not None else roles:
        try:
            text = ray.get(actor.logs.remote(name, lines), timeout=LOG_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise CommandError(f"logs of {name}: {str(error).splitlines()[-1][:300]}") from None
        for line in text.splitlines():
            print(f"{name}: {line}" if role is None else line)


def _reachable_host(host: str) -> str:
    """The host under which the endpoint is reached: Serve's proxy runs on the head node."""
    if host not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return host
    for node in ray.nodes():
        if "node:__internal_head__" in node.get("Resources", {}):
            return str(node["NodeManagerAddress"])
    return "127.0.0.1"
