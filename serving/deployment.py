"""Bringing a plan up on a Ray cluster that this process is connected to, and watching it."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import ray
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ray import serve

from placement.explain import plan_table
from placement.plan import Plan
from placement.policy import Policy
from runtime.cluster.deploy import describe_pipeline, start_pipeline, stop_pipeline
from runtime.cluster.pipeline_actor import PipelineSpec, PipelineView
from security.attestation.enrolled import Enrolment, Enrolments
from security.broker.documents import Installation, sign_installation
from security.manifest import Manifest, build_manifest
from security.signing import public_bytes
from serving.app import APPLICATION, build_application
from serving.errors import CommandError
from serving.planning import VALID_S
from serving.progress import Narrator, Step

READY_TIMEOUT_S = 900.0
POLL_S = 0.3


@dataclass(frozen=True, slots=True)
class Signed:
    """A plan with what the owner signed for it.

    Attributes:
        plan: the plan.
        policy: the policy.
        installation: the signed documents for the broker.
        owner_public: the owner's public key (32 bytes).
    """

    plan: Plan
    policy: Policy
    installation: Installation
    owner_public: bytes


def hash_model(directory: Path, step: Step) -> Manifest:
    """Hashes all files of a model; the step shows how much has been read."""
    total = sum(entry.stat().st_size for entry in os.scandir(directory) if entry.is_file())
    step.update(0, 0, f"{total / 1e9:.2f} GB")
    return build_manifest(directory)


def sign_plan(
    plan: Plan,
    policy: Policy,
    manifest: Manifest,
    *,
    owner_key: Ed25519PrivateKey,
    broker_public: bytes,
    enrolled: dict[str, bytes],
) -> Signed:
    """Signs what the broker needs.

    Args:
        plan: the plan; only its template is signed.
        policy: the policy that it was made for.
        manifest: the model's manifest.
        owner_key: the owner's key.
        broker_public: the broker's public key (32 bytes).
        enrolled: node name -> public key of the nodes that the owner enrols.
    """
    expires_at = int(time.time()) + VALID_S
    nodes = tuple(Enrolment(name, key, None, expires_at) for name, key in sorted(enrolled.items()))
    installation = sign_installation(
        owner_key,
        broker_public,
        policy=policy,
        template=plan.template,
        manifest=manifest,
        enrolments=Enrolments(nodes) if nodes else None,
    )
    return Signed(plan, policy, installation, public_bytes(owner_key))


def start_shards(
    signed: Signed,
    model_directory: Path,
    broker_address: str,
    log_directory: Path,
    node_key_path: Path | None,
) -> ray.actor.ActorHandle:
    """Starts the pipeline actor and its shards; returns at once.

    Args:
        signed: the signed plan.
        model_directory: where the model is on every node.
        broker_address: "host:port" that the nodes reach.
        log_directory: where nodes keep shard logs.
        node_key_path: key file of enrolled nodes on each node; None where there is none.
    """
    plan = signed.plan
    return start_pipeline(
        PipelineSpec(
            instance=plan.binding.instance,
            template=plan.template.to_bytes(),
            policy=signed.policy.to_bytes(),
            binding=dict(plan.binding.nodes),
            model_directory=str(model_directory),
            broker_address=broker_address,
            owner_public=signed.owner_public,
            log_directory=str(log_directory),
            node_key_path=str(node_key_path) if node_key_path else "",
            plan_table=plan_table(plan),
        )
    )


def start_relay(instance: str, owner_public: bytes, host: str, port: int) -> None:
    """Starts Ray Serve's proxy on the head node and the relay behind it.

    Raises:
        CommandError: the port is taken, or Serve did not start.
    """
    # That an application is "ready" before its shards are helps nobody.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port, "request_timeout_s": None},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run(build_application(instance, owner_public), name=APPLICATION, route_prefix="/")
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise CommandError(
            f"Ray Serve on {host}:{port} did not start: {str(error).splitlines()[0][:300]}; "
            "is the port free? Choose another with --port"
        ) from None


def wait_until_serving(
    actor: ray.actor.ActorHandle, narrator: Narrator, timeout_s: float = READY_TIMEOUT_S
) -> PipelineView:
    """Waits until all shards serve, showing how far they are.

    Raises:
        CommandError: they do not within the timeout; says why.
    """
    deadline = time.monotonic() + timeout_s
    told = ""
    with narrator.step("shards: prove, load, connect") as step:
        while True:
            view = describe_pipeline(actor)
            if view["state"] == "serving":
                return view
            shards = view["shards"]
            step.update(
                sum(shard["done_bytes"] for shard in shards),
                sum(shard["total_bytes"] for shard in shards),
                ", ".join(f"{shard['role']} {shard['state']}" for shard in shards),
            )
            if view["error"] and view["error"] != told:
                told = view["error"]
                narrator.say(f"not yet: {told}")
            if time.monotonic() > deadline:
                raise CommandError(
                    f"{view['instance']}: expected all shards to serve within {timeout_s:.0f} s, "
                    f"found {view['state']}: {view['error'] or 'see `bulkhead logs`'}"
                )
            time.sleep(POLL_S)


def wait_until_reachable(endpoint: str, narrator: Narrator, timeout_s: float = 60.0) -> None:
    """Waits until the endpoint itself says that requests are answered.

    Raises:
        CommandError: it does not within the timeout.
    """
    deadline = time.monotonic() + timeout_s
    found = "nothing"
    with narrator.step("endpoint: answers"), httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            try:
                response = client.get(f"{endpoint}/bulkhead/health")
                if response.status_code == httpx.codes.OK:
                    return
                found = response.text[:300]
            except httpx.HTTPError as error:
                found = type(error).__name__
            time.sleep(POLL_S)
    raise CommandError(f"{endpoint}: expected it to answer within {timeout_s:.0f} s, found {found}")


def stop_all(instance: str) -> None:
    """Ends relay and pipeline."""
    serve.shutdown()
    stop_pipeline(instance)
