"""The command line: `bulkhead COMMAND`. Each command's --help says what it does and shows one."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from placement.plan import WEIGHT_FORMATS
from serving.attest_options import Commands, add_attest
from serving.broker_options import add_broker_commands
from serving.errors import CommandError, UsageError
from serving.home import HOME_VARIABLE, Home, RunState
from serving.planning import ModelSettings
from serving.reporting import report_errors
from serving.sealing import add_seal, add_unseal

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
CONNECT_PORT = 8001
DEFAULT_POLICY = "simulated"
DEFAULT_INSTANCE = "pipeline-0"
ADDRESS = r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}"

Command = Callable[[argparse.Namespace], int]


def main() -> int:
    """Runs one command; returns its exit code (0 done, 1 failed, 2 bad usage or input)."""
    arguments = make_parser().parse_args()
    command: Command = arguments.command
    return report_errors(lambda: command(arguments), arguments.debug)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; parsed arguments have `command`, the function to call."""
    parser = argparse.ArgumentParser(
        prog="bulkhead",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.dedent(
            """\
            Serves large language models across machines of different trust: attested shards,
            encrypted links, one OpenAI-compatible endpoint."""
        ),
        epilog=textwrap.dedent(
            f"""\
            first steps:
              bulkhead serve --model DIR              a whole deployment on this machine
              bulkhead chat                           talk to it
              bulkhead plan --model DIR --policy P    what a policy means for a model

            files: ${HOME_VARIABLE}, else ~/.bulkhead (owner's key, logs, what runs)
            exit codes: 0 done, 1 failed, 2 bad usage or input, 130 interrupted"""
        ),
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_deploy(commands)
    _add_plan(commands)
    _add_chat(commands)
    _add_status(commands)
    _add_logs(commands)
    _add_connect(commands)
    _add_broker(commands)
    _add_manifest(commands)
    add_seal(commands, _add)
    add_unseal(commands, _add)
    add_attest(commands, _add)
    _add_version(commands)
    return parser


def _add(
    commands: Commands, name: str, command: Command, summary: str, *, about: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.dedent(about).strip(),
        epilog="example:\n" + textwrap.indent(textwrap.dedent(example).strip(), "  "),
    )
    parser.set_defaults(command=command)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
    )
    return parser


def _add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home", type=Path, help=f"Bulkhead's files (default: ${HOME_VARIABLE}, else ~/.bulkhead)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, help="directory, or hub id such as Qwen/Qwen3-0.6B"
    )
    group.add_argument(
        "--policy",
        default=DEFAULT_POLICY,
        help="policy file, or the name of one in clusters/policies (default: %(default)s)",
    )
    group.add_argument("--served-name", help="name of the model in the API (default: its own)")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision (default: the checkpoint's, as config.json says)",
    )
    group.add_argument(
        "--weights",
        choices=WEIGHT_FORMATS,
        default="plain",
        help="plain: in that precision; int8: linears and head as int8 with a scale for each "
        "output, on CPUs only: less memory, faster answers, slightly other ones "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--context",
        type=_positive,
        help="longest sequence in tokens, prompt and answer (default: the model's, at most 4096)",
    )
    group.add_argument(
        "--max-sequences",
        type=_positive,
        default=16,
        help="most requests that run at once; more wait (default: %(default)s)",
    )
    group.add_argument(
        "--memory-fraction",
        type=_fraction,
        default=0.9,
        help="share of a node's memory that shards may fill (default: %(default)s)",
    )
    group.add_argument(
        "--stages", type=_positive, help="exact number of pipeline stages (default: planned)"
    )
    group.add_argument(
        "--tensor-parallel",
        type=_positive,
        default=1,
        help="tensor-parallel ranks in every stage (default: %(default)s)",
    )
    group.add_argument(
        "--layer-splits",
        type=_splits,
        help="explicit cut points: 1,3 cuts 4 layers into stages of 1, 2 and 1",
    )


def _add_endpoint(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default=DEFAULT_HOST, help="listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=port, help="listen on (default: %(default)s)")


# -- serve ---------------------------------------------------------------------------------------


def _add_serve(commands: Commands) -> None:
    parser = _add(
        commands,
        "serve",
        _serve,
        "a whole deployment on this machine, until Ctrl-C",
        about="""
        Starts a local Ray cluster with nodes that claim simulated TEEs, a key broker, and the
        model cut into shards; each shard proves itself to the broker before it gets a key, and
        all links are encrypted. Then serves the OpenAI API on http://HOST:PORT/v1.

        Ctrl-C ends everything that was started. Simulated TEEs protect nothing: the warnings at
        start say what is not protected.
        """,
        example="""
        bulkhead serve --model models/demo --port 8000
        bulkhead serve --model Qwen/Qwen3-0.6B --stages 2 --context 2048
        """,
    )
    _add_model(parser)
    _add_endpoint(parser, DEFAULT_PORT)
    _add_home(parser)


def _serve(arguments: argparse.Namespace) -> int:
    from serving.launcher import require_free_port, supervise
    from serving.planning import load_policy
    from serving.ray_environment import local_cluster_environment

    settings = ModelSettings.from_arguments(arguments)
    # What can be refused at once is refused before anything is started.
    load_policy(settings.policy)
    require_free_port(arguments.host, arguments.port)
    home = Home(arguments.home)
    command = ["--settings", settings.to_json(), "--home", str(home.path)]
    command += ["--host", arguments.host, "--port", str(arguments.port)]
    if arguments.debug:
        command.append("--debug")
    return supervise(command, local_cluster_environment(os.environ, home.ray_token()))


# -- deploy --------------------------------------------------------------------------------------


def _add_deploy(commands: Commands) -> None:
    parser = _add(
        commands,
        "deploy",
        _deploy,
        "a model on a running Ray cluster; returns when it serves",
        about="""
        Plans the model for the nodes of a running Ray cluster, signs the plan with the owner's key
        of this machine, installs it at a key broker, and starts shards and relay. Returns when the
        endpoint answers. Run it again to replace what runs; --down ends it.

        The model must lie in the same directory on every node (or give --node-model). Ray's
        authentication is read from RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH, as Ray does.
        """,
        example="""
        bulkhead broker --listen 10.0.0.5:7000 &
        bulkhead deploy --address ray://10.0.0.1:10001 --broker 10.0.0.5:7000 \\
            --broker-key broker.pub --model /models/llama --policy prompt-private.yaml
        bulkhead deploy --address ray://10.0.0.1:10001 --down
        """,
    )
    parser.add_argument(
        "--address",
        default="auto",
        help="ray://HEAD:10001, or auto on a node of the cluster (default: %(default)s)",
    )
    parser.add_argument("--instance", default=DEFAULT_INSTANCE, help="name of the pipeline")
    parser.add_argument("--cluster", default="cluster", help="name of the cluster in the plan")
    parser.add_argument("--broker", type=_address, help="HOST:PORT of the key broker")
    parser.add_argument(
        "--broker-key",
        type=Path,
        help="the broker's public key (broker.pub of its home), copied from where it runs",
    )
    parser.add_argument("--node-model", type=Path, help="the model's directory on the nodes")
    parser.add_argument("--node-key", type=Path, help="key file of enrolled nodes, on the nodes")
    parser.add_argument(
        "--enrol",
        action="append",
        default=[],
        metavar="NODE=PUBLIC_KEY_FILE",
        help="enrol a node with its public key (may be repeated)",
    )
    parser.add_argument(
        "--log-directory",
        type=Path,
        default=Path("~/.bulkhead/logs"),
        help="for shard logs, on the nodes (default: %(default)s)",
    )
    parser.add_argument("--down", action="store_true", help="end what runs, start nothing")
    _add_model(parser)
    for action in parser._actions:
        if action.dest == "model":
            action.required = False
    _add_endpoint(parser, DEFAULT_PORT)
    _add_home(parser)


def _deploy(arguments: argparse.Namespace) -> int:
    home = Home(arguments.home)
    if arguments.down:
        from serving.remote import take_down

        take_down(arguments.address, arguments.instance, home)
        return 0
    missing = [f"--{name}" for name in ("model", "broker") if getattr(arguments, name) is None]
    if arguments.broker_key is None:
        missing.append("--broker-key")
    if missing:
        raise UsageError(f"deploy: expected {', '.join(missing)}, found none; or --down")
    from serving.remote import DeploySettings, deploy

    deploy(
        DeploySettings(
            address=arguments.address,
            instance=arguments.instance,
            cluster=arguments.cluster,
            broker_address=arguments.broker,
            broker_key=arguments.broker_key,
            node_model=arguments.node_model,
            node_key=arguments.node_key,
            enrolled=tuple(_enrolment(text) for text in arguments.enrol),
            log_directory=arguments.log_directory,
            host=arguments.host,
            port=arguments.port,
        ),
        ModelSettings.from_arguments(arguments),
        home,
    )
    return 0


def _enrolment(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--enrol: expected NODE=PUBLIC_KEY_FILE, found {text[:200]!r}")
    return name, Path(path)


# -- plan ----------------------------------------------------------------------------------------


def _add_plan(commands: Commands) -> None:
    parser = _add(
        commands,
        "plan",
        _plan,
        "what a policy means for a model on some nodes; starts nothing",
        about="""
        Prints where each stage of the model would run and why. Exit code 1, with what is missing,
        where no plan meets the policy.

        The nodes come from a file (the JSON list that ray.nodes() returns) or from a running Ray
        cluster; without either, two nodes like those of `bulkhead serve` are assumed.
        """,
        example="""
        bulkhead plan --model models/demo --policy prompt-private --inventory nodes.json
        bulkhead plan --model models/demo --policy simulated --address auto
        """,
    )
    nodes = parser.add_mutually_exclusive_group()
    nodes.add_argument("--inventory", type=Path, help="file with the nodes, as JSON")
    nodes.add_argument(
        "--address",
        help="a running Ray cluster: ray://HEAD:10001, or auto on one of its nodes",
    )
    _add_model(parser)


def _plan(arguments: argparse.Namespace) -> int:
    from placement.explain import explain_plan
    from security.manifest import build_manifest
    from serving.model_source import find_model
    from serving.planning import (
        assumed_inventory,
        load_inventory,
        load_policy,
        plan_model,
    )
    from serving.progress import Narrator

    settings = ModelSettings.from_arguments(arguments)
    policy = load_policy(settings.policy)
    if arguments.inventory is not None:
        inventory = load_inventory(arguments.inventory)
    elif arguments.address is not None:
        from serving.remote import read_inventory

        inventory = read_inventory(arguments.address)
    else:
        inventory = assumed_inventory()
    with Narrator().step("model: find and hash") as step:
        source = find_model(settings.model, step)
        manifest = build_manifest(source.directory)
    plan = plan_model(
        source,
        settings,
        policy,
        inventory,
        manifest=manifest,
        instance=DEFAULT_INSTANCE,
    )
    print(explain_plan(plan))
    return 0


# -- using what runs -----------------------------------------------------------------------------


def _add_chat(commands: Commands) -> None:
    parser = _add(
        commands,
        "chat",
        _chat,
        "talk to a model on the terminal",
        about="""
        A conversation with the model that runs (see `bulkhead status`), or at another endpoint.
        Answers appear as they are made. Ctrl-C stops an answer, Ctrl-D ends the conversation.
        """,
        example="""
        bulkhead chat
        bulkhead chat --endpoint http://127.0.0.1:8001
        """,
    )
    parser.add_argument("--endpoint", help="base URL, without /v1 (default: what runs here)")
    parser.add_argument("--model", help="name of the model (default: the endpoint's first)")
    parser.add_argument(
        "--max-tokens", type=_positive, default=512, help="longest answer (default: %(default)s)"
    )
    _add_home(parser)


def _chat(arguments: argparse.Namespace) -> int:
    from serving.chat import converse, first_model, make_client

    endpoint = arguments.endpoint or Home(arguments.home).read_run_state().endpoint
    prompt = "you> " if sys.stdin.isatty() else ""

    def read() -> str | None:
        try:
            return input(prompt)
        except EOFError:
            return None

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    with make_client(endpoint) as client:
        # Asked in any case: an endpoint that takes sealed requests only must refuse before the
        # first prompt is on its way.
        served = first_model(client)
        model = arguments.model or served
        answered = converse(client, model, arguments.max_tokens, read, write)
    return 0 if answered else 1


def _add_status(commands: Commands) -> None:
    parser = _add(
        commands,
        "status",
        _status,
        "shards, their state, and what is not protected",
        about="""
        Shows what runs: every shard with its node, state and load, the plan, and a warning for each
        weakness in force. Exit code 1 when nothing runs or not all shards serve.
        """,
        example="bulkhead status",
    )
    _add_home(parser)


def _status(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from serving.status import fetch_status, print_status

    state = Home(arguments.home).read_run_state()
    status = fetch_status(state.endpoint)
    print_status(state, status, Console())
    return 0 if status.get("state") == "serving" else 1


def _add_logs(commands: Commands) -> None:
    parser = _add(
        commands,
        "logs",
        _logs,
        "what the shards write",
        about="""
        Prints the last lines of the shards' logs. Logs never hold prompts, answers or keys.
        """,
        example="""
        bulkhead logs
        bulkhead logs stage-0 -n 50 -f
        """,
    )
    parser.add_argument("role", nargs="?", help="one shard, such as stage-0 (default: all)")
    parser.add_argument(
        "-n", "--lines", type=_positive, default=20, help="how many lines (default: %(default)s)"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on as lines are written")
    _add_home(parser)


def _logs(arguments: argparse.Namespace) -> int:
    from serving.status import follow_logs, log_files, print_logs

    state = Home(arguments.home).read_run_state()
    if state.kind == "cluster":
        if arguments.follow:
            raise UsageError("logs -f: only for `bulkhead serve`; logs of a cluster come at once")
        from serving.remote import print_remote_logs

        print_remote_logs(state, arguments.role, arguments.lines)
        return 0
    files = log_files(state, arguments.role)
    print_logs(files, arguments.lines)
    if arguments.follow:
        follow_logs(files)
    return 0


def _add_connect(commands: Commands) -> None:
    parser = _add(
        commands,
        "connect",
        _connect,
        "a local OpenAI endpoint that seals prompts to the head shard",
        about="""
        Listens on this machine only, verifies the deployment's roster against the owner's public
        key, and seals every request to the head shard's key; relay, Ray and the network see bytes.
        Prints every weakness that the policy accepts. Point any OpenAI client at the printed URL.
        """,
        example="""
        bulkhead connect --endpoint https://llm.example.com --owner-key owner.pub
        """,
    )
    parser.add_argument("--endpoint", help="base URL of the deployment (default: what runs here)")
    parser.add_argument(
        "--owner-key", type=Path, help="the owner's public key (default: of this home)"
    )
    parser.add_argument("--instance", default=DEFAULT_INSTANCE, help="name of the pipeline")
    parser.add_argument(
        "--port", type=_port, default=CONNECT_PORT, help="listen on (default: %(default)s)"
    )
    _add_home(parser)


def _connect(arguments: argparse.Namespace) -> int:
    from security.signing import load_public_key
    from serving.connect import serve_locally

    home = Home(arguments.home)
    endpoint = arguments.endpoint or home.read_run_state().endpoint
    owner_public = load_public_key(arguments.owner_key or home.owner_public_path)
    asyncio.run(
        serve_locally(endpoint, arguments.instance, owner_public, DEFAULT_HOST, arguments.port)
    )
    return 0


# -- owner's side --------------------------------------------------------------------------------


def _add_broker(commands: Commands) -> None:
    parser = _add(
        commands,
        "broker",
        _broker,
        "a key broker in the foreground",
        about="""
        Runs the key broker: it verifies evidence and admits shards under what the owner has signed.
        Run it where you trust the machine. It needs the owner's public key, never the private one,
        and writes its own public key to broker.pub for `bulkhead deploy`.
        """,
        example="""
        bulkhead broker --listen 10.0.0.5:7000 --home /var/lib/bulkhead --owner-key owner.pub
        """,
    )
    parser.add_argument("--listen", type=_address, help="HOST:PORT; port 0: any")
    parser.add_argument(
        "--owner-key", type=Path, help="the owner's public key (default: of this home)"
    )
    parser.add_argument(
        "--collateral",
        type=Path,
        metavar="DIR",
        help="vendors' certificates, revocation lists, TCB info and manifests; read anew when it "
        "changes",
    )
    parser.add_argument(
        "--witness",
        type=Path,
        metavar="FILE",
        help="append signed heads of the audit log to this file, best on another machine; refuse "
        "a database that is older",
    )
    parser.add_argument("--witness-url", type=_url, help="post those heads there too")
    _add_home(parser)
    add_broker_commands(parser, _add)


def _broker(arguments: argparse.Namespace) -> int:
    if arguments.listen is None:
        raise UsageError("broker: expected --listen HOST:PORT, or a command such as audit")
    import logging
    import signal

    from security.broker.service import start_broker
    from security.signing import load_public_key, public_bytes, write_public_key

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    home = Home(arguments.home)
    if arguments.owner_key is not None:
        owner_public = load_public_key(arguments.owner_key)
    else:
        owner_public = public_bytes(home.owner_key())
    try:
        server = start_broker(
            arguments.listen,
            home.broker,
            owner_public,
            arguments.collateral,
            witness=arguments.witness,
            witness_url=arguments.witness_url or "",
        )
    except OSError as error:
        raise CommandError(str(error)) from None
    write_public_key(home.path / "broker.pub", server.public_key)
    print(f"key broker at {server.address}; public key {home.path / 'broker.pub'}")
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        server.stop()
    return 0


def _add_manifest(commands: Commands) -> None:
    parser = _add(
        commands,
        "manifest",
        _manifest,
        "hash a model, as the owner signs it",
        about="""
        Hashes every file and tensor of a model and prints the digest that plans and rosters name,
        with what was counted. Shards read nothing that is not in it.
        """,
        example="bulkhead manifest models/demo -o manifest.json",
    )
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("-o", "--output", type=Path, help="write the manifest (canonical JSON)")


def _manifest(arguments: argparse.Namespace) -> int:
    from security.manifest import build_manifest
    from serving.model_source import find_model
    from serving.progress import Narrator

    with Narrator().step("model: hash every file") as step:
        manifest = build_manifest(find_model(arguments.model, step).directory)
    size = sum(file.size for file in manifest.files)
    print(f"digest  {manifest.digest}")
    print(f"files   {len(manifest.files)}")
    print(f"tensors {len(manifest.tensors)}")
    print(f"bytes   {size}")
    if arguments.output is not None:
        arguments.output.write_bytes(manifest.to_bytes())
    return 0


def _add_version(commands: Commands) -> None:
    _add(
        commands,
        "version",
        _version,
        "versions of Bulkhead and of what it stands on",
        about="Prints the versions of Bulkhead and of the packages that decide what it does.",
        example="bulkhead version",
    )


def _version(arguments: argparse.Namespace) -> int:
    for name in ("bulkhead", "ray", "torch", "transformers", "deepspeed", "cryptography", "grpcio"):
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} (not installed)")
    return 0


# -- values of options ---------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text[:40]!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, found {text[:40]!r}")
    return int(text)


def _fraction(text: str) -> float:
    if not re.fullmatch(r"0?\.[0-9]{1,6}|1(?:\.0{1,6})?", text) or float(text) == 0:
        raise argparse.ArgumentTypeError(
            f"expected a share above 0, at most 1, found {text[:40]!r}"
        )
    return float(text)


def _splits(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,4}(?:,[0-9]{1,4})*", text):
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,3, found {text[:80]!r}")
    return tuple(int(part) for part in text.split(","))


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[!-~]{1,2000}", text):
        raise argparse.ArgumentTypeError("expected http:// or https://")
    # It is named in the log, for good.
    if "@" in text or "?" in text or "#" in text:
        raise argparse.ArgumentTypeError("expected a URL without user, password or query")
    return text


def _address(text: str) -> str:
    if not re.fullmatch(ADDRESS, text) or int(text.rpartition(":")[2]) > 2**16 - 1:
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, found {text[:80]!r}")
    return text


def run(arguments: Sequence[str]) -> int:
    """Runs one command line in this process, as `main` would; for tests and scripts."""
    parsed = make_parser().parse_args(arguments)
    command: Command = parsed.command
    return report_errors(lambda: command(parsed), parsed.debug)


__all__ = ["RunState", "main", "make_parser", "run"]


if __name__ == "__main__":
    sys.exit(main())
