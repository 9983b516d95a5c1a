"""Starts, finds and ends pipeline instances on a Ray cluster. The caller has called `ray.init`."""

from __future__ import annotations

import contextlib

import ray

from placement.inventory import Inventory, from_ray_nodes
from runtime.cluster.pipeline_actor import PipelineActor, PipelineSpec, PipelineView

NAMESPACE = "bulkhead"
STOP_TIMEOUT_S = 30.0


def connect_inventory() -> Inventory:
    """The nodes of the cluster, as their own labels describe them: hints, not evidence."""
    return from_ray_nodes(ray.nodes())


def start_pipeline(spec: PipelineSpec) -> ray.actor.ActorHandle:
    """Starts the detached pipeline actor of an instance; ends one of the same name first."""
    stop_pipeline(spec["instance"])
    actor = (
        ray.remote(PipelineActor)
        .options(
            name=spec["instance"],
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=64,
        )
        .remote(spec)
    )
    ray.get(actor.start.remote(), timeout=60)
    return actor


def find_pipeline(instance: str) -> ray.actor.ActorHandle | None:
    """The pipeline actor of that name, if there is one."""
    try:
        return ray.get_actor(instance, namespace=NAMESPACE)
    except ValueError:
        return None


def describe_pipeline(actor: ray.actor.ActorHandle) -> PipelineView:
    """What the pipeline actor says of its instance."""
    view: PipelineView = ray.get(actor.describe.remote(), timeout=15)
    return view


def stop_pipeline(instance: str) -> bool:
    """Ends an instance and waits until it is gone; False when there was none."""
    actor = find_pipeline(instance)
    if actor is None:
        return False
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
        ray.get(actor.stop.remote(), timeout=STOP_TIMEOUT_S)
    ray.kill(actor)
    return True
