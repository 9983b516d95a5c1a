"""What the supervisor's child does for `bulkhead serve`: a whole deployment on this machine.

Standard input is the lifeline to the supervisor (see `serving.launcher`); SIGTERM asks for an
orderly end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from serving.home import Home, RunState
from serving.launcher import follow_lifeline
from serving.planning import ModelSettings
from serving.progress import Narrator, Step
from serving.reporting import report_errors

if TYPE_CHECKING:
    import ray

    from serving.deployment import Signed

INSTANCE = "pipeline-0"
LEAST_NODES = 2
WATCH_S = 1.0
CONNECT_PORT = 8001
QUESTION = "What is the capital of France?"


class StopRequested(Exception):
    """SIGTERM or SIGINT arrived."""


def serve_locally(settings: ModelSettings, home: Home, scratch: Path, host: str, port: int) -> None:
    """Brings everything up, says so, and watches it until somebody asks for the end.

    Raises:
        CommandError: it cannot come up; says why.
    """
    from placement.explain import explain_plan
    from runtime.cluster.deploy import connect_inventory
    from security.broker.service import start_broker
    from security.signing import public_bytes
    from serving.deployment import (
        hash_model,
        sign_plan,
        start_relay,
        start_shards,
        wait_until_reachable,
        wait_until_serving,
    )
    from serving.local_cluster import LocalCluster
    from serving.model_source import find_model
    from serving.planning import load_policy, plan_model

    narrator = Narrator()
    policy = load_policy(settings.policy)
    with narrator.step("model: find") as step:
        source = find_model(settings.model, step)
    source.dtype(settings.dtype)
    owner_key = home.owner_key()
    owner_public = public_bytes(owner_key)
    nodes = LEAST_NODES
    if policy.separate_nodes:
        nodes = max(nodes, settings.stages or policy.stages_min)

    stack = contextlib.ExitStack()
    try:
        hasher = stack.enter_context(ThreadPoolExecutor(1))
        cluster = LocalCluster(scratch, nodes)
        stack.callback(cluster.stop)
        # A large model is hashed while Ray starts.
        hashing = hasher.submit(hash_model, source.directory, Step())
        with narrator.step(f"Ray: {nodes + 1} local nodes") as step:
            address = cluster.start(step)
        # Ray has put its own signal handlers in their place, which print stacks and exit.
        _raise_on_signals()
        with narrator.step("model: hash every file"):
            manifest = hashing.result()
        broker = start_broker("127.0.0.1:0", home.broker, owner_public)
        stack.callback(broker.stop)
        plan = plan_model(
            source,
            settings,
            policy,
            connect_inventory(),
            manifest=manifest,
            instance=INSTANCE,
        )
        narrator.say("\n" + explain_plan(plan) + "\n")

        node_key_path, node_public = home.node_key()
        enrolled = {f"local-{number}": node_public for number in range(1, nodes + 1)}
        signed = sign_plan(
            plan,
            policy,
            manifest,
            owner_key=owner_key,
            broker_public=broker.public_key,
            enrolled=enrolled,
        )
        broker.install(signed.installation)
        actor = start_shards(signed, source.directory, broker.address, home.logs, node_key_path)
        stack.callback(_stop_quietly)
        with narrator.step("Ray Serve: relay"):
            start_relay(INSTANCE, owner_public, host, port)
        endpoint = _endpoint(host, port)
        home.write_run_state(
            RunState(
                kind="local",
                endpoint=endpoint,
                instance=INSTANCE,
                model=plan.template.model,
                ray_address=address,
                log_directory=str(home.logs),
                pid=os.getpid(),
                started_at=int(time.time()),
            )
        )
        stack.callback(home.clear_run_state)
        wait_until_serving(actor, narrator)
        wait_until_reachable(endpoint, narrator)
        _announce(narrator, signed, endpoint, home)
        _watch(actor, narrator)
    finally:
        # Ray's last words about its own end are no news to anybody.
        with _quiet_output():
            stack.close()


def _endpoint(host: str, port: int) -> str:
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://{reached}:{port}"


def _announce(narrator: Narrator, signed: Signed, endpoint: str, home: Home) -> None:
    """Prints what a person needs to use it."""
    from placement.explain import plan_table, weakness_warnings
    from placement.policy import Ingress

    template = signed.plan.template
    body = {
        "model": template.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 64,
    }
    sealed = signed.policy.ingress is Ingress.SEALED
    # Where the policy says so, prompts are sealed before they leave the client's machine.
    reached = f"http://127.0.0.1:{CONNECT_PORT}" if sealed else endpoint
    command = _own_command()
    lines = [
        "",
        plan_table(signed.plan),
        "",
        *(f"warning: {text}" for text in weakness_warnings(template.weaknesses)),
        "",
        f"ready: {template.model} at {endpoint}/v1 (OpenAI-compatible"
        + (", sealed requests only)" if sealed else ")"),
        f"owner's public key, for clients to pin: {home.owner_public_path}",
        "try:",
        *([f"  {command} connect --port {CONNECT_PORT} &"] if sealed else []),
        f"  curl -s {reached}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}",
        *([] if sealed else [f"  {command} chat"]),
        "Ctrl-C ends everything.",
    ]
    narrator.say("\n".join(lines))


def _own_command() -> str:
    """How to call `bulkhead` from where the user is: `make serve` leaves it off the PATH."""
    own = Path(sys.executable).with_name("bulkhead")
    if shutil.which("bulkhead") == str(own):
        return "bulkhead"
    here = Path.cwd()
    return shlex.quote(str(own.relative_to(here) if own.is_relative_to(here) else own))


def _watch(actor: ray.actor.ActorHandle, narrator: Narrator) -> None:
    """Says when the pipeline's state changes; returns never."""
    from runtime.cluster.deploy import describe_pipeline

    said = "serving"
    while True:
        time.sleep(WATCH_S)
        try:
            view = describe_pipeline(actor)
        except Exception as error:
            # Whatever Ray raises here: the pipeline may be back at the next look.
            state, reason = "unreachable", type(error).__name__
        else:
            state, reason = view["state"], view["error"]
        if state != said:
            # The first line says what happened; the shard's last lines follow it.
            first, *more = reason.splitlines() or [""]
            if more:
                first = first.removesuffix("; last lines:") + " (`bulkhead logs` has more)"
            narrator.say(f"{INSTANCE}: {state}" + (f": {first}" if first else ""))
            said = state


def _stop_quietly() -> None:
    from serving.deployment import stop_all

    # The supervisor ends whatever an orderly end leaves behind.
    with contextlib.suppress(Exception):
        stop_all(INSTANCE)


@contextlib.contextmanager
def _quiet_output() -> Iterator[None]:
    """Sends output nowhere, for libraries that write to the descriptors themselves too."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in kept:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def _raise_on_signals() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise StopRequested

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[None]:
    """Turns the first SIGTERM or SIGINT into StopRequested in the main thread; ignores more."""

    _raise_on_signals()
    try:
        yield
    except StopRequested:
        print("bulkhead: stopped", file=sys.stderr)


def main() -> int:
    """Entry of the supervisor's child."""
    parser = argparse.ArgumentParser(prog="bulkhead serve (child)", description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--settings", required=True, help="ModelSettings as JSON")
    parser.add_argument("--debug", action="store_true")
    arguments = parser.parse_args()
    follow_lifeline(arguments.scratch)

    def run() -> int:
        with _stop_on_signal():
            serve_locally(
                ModelSettings.from_json(arguments.settings),
                Home(arguments.home),
                arguments.scratch,
                arguments.host,
                arguments.port,
            )
        return 0

    code = report_errors(run, arguments.debug)
    # Threads of Ray and gRPC must not delay the end; the supervisor sweeps up.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
