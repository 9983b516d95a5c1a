"""The command line: what it says, and with which exit code."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from serving.chat import converse, stream_answer
from serving.cli import make_parser, run
from serving.errors import CommandError, UsageError
from serving.home import Home, RunState
from serving.model_source import find_model
from serving.planning import ModelSettings, load_policy
from serving.progress import Step
from serving.ray_environment import local_cluster_environment
from serving.status import follow, last_lines, log_files, print_status

STATE = RunState("cluster", "http://127.0.0.1:9", "pipeline-0", "demo", "auto", "/logs", 0, 1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    monkeypatch.setenv("BULKHEAD_HOME", str(path))
    return path


@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "deploy",
        "plan",
        "chat",
        "status",
        "logs",
        "connect",
        "broker",
        "manifest",
        "seal",
        "unseal",
        "version",
    ],
)
def test_every_command_explains_itself_with_an_example_that_parses(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    example = text.split("example:\n")[1].replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in example.splitlines() if "bulkhead" in line]
    assert lines
    for line in lines:
        assert make_parser().parse_args(line.rstrip("& ").split()[1:]).command


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["plan", "--model", "/nowhere"], "expected a directory or a hub id"),
        (["plan", "--model", "m", "--policy", "nonsense"], "expected a file or one of"),
        (["serve", "--model", "m", "--policy", "nonsense"], "expected a file or one of"),
        (["deploy", "--model", "m"], "expected --broker, --broker-key, found none"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert part in error
    assert error.startswith("bulkhead: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--model", "m", "--port", "99999"],
        ["serve", "--model", "m", "--memory-fraction", "1.5"],
        ["serve", "--model", "m", "--layer-splits", "1;3"],
        ["serve", "--model", "m", "--dtype", "int4"],
        ["broker", "--listen", "nowhere"],
        ["serve"],
        [],
    ],
)
def test_bad_options_are_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("command", ["status", "chat", "logs"])
def test_nothing_runs_is_code_1(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command]) == 1
    assert "nothing runs" in capsys.readouterr().err


def test_a_plan_is_shown_and_an_impossible_one_says_why(
    checkpoint_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--model", str(checkpoint_directory)]) == 0
    shown = capsys.readouterr().out
    assert "stage-1" in shown
    assert "warning: simulated TEE: protects nothing" in shown
    assert run(["plan", "--model", str(checkpoint_directory), "--policy", "prompt-private"]) == 1
    assert "attested node" in capsys.readouterr().err


def test_a_plan_for_nodes_from_a_file(
    checkpoint_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [
        {
            "NodeID": str(number) * 56,
            "Alive": True,
            "NodeManagerAddress": f"10.0.0.{number}",
            "Resources": {"CPU": 2.0, "memory": 8e9},
            "Labels": {"bulkhead.name": f"rack-{number}", "bulkhead.tee": "simulated"},
        }
        for number in (1, 2)
    ]
    inventory = tmp_path / "nodes.json"
    inventory.write_text(json.dumps(nodes))
    plan = ["plan", "--model", str(checkpoint_directory), "--inventory", str(inventory)]
    assert run([*plan, "--stages", "2"]) == 0
    assert "rack-2" in capsys.readouterr().out
    inventory.write_text("{}")
    assert run(plan) == 2


def test_the_manifest_is_the_same_every_time(
    checkpoint_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "manifest.json"
    assert run(["manifest", str(checkpoint_directory), "-o", str(output)]) == 0
    first = capsys.readouterr().out
    assert run(["manifest", str(checkpoint_directory)]) == 0
    assert capsys.readouterr().out == first
    assert json.loads(output.read_bytes())["files"]


def test_a_policy_error_names_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "mine.yaml"
    policy.write_text("version: 1\nname: mine\nprotect: {prompt: nobody}\n")
    assert run(["serve", "--model", "m", "--policy", str(policy)]) == 2
    assert f"{policy}:3:" in capsys.readouterr().err


def test_shipped_policies_are_found_by_name() -> None:
    assert load_policy("simulated").name == "simulated"


def test_settings_pass_through_the_childs_command_line() -> None:
    arguments = make_parser().parse_args(
        ["serve", "--model", "m", "--layer-splits", "1,3", "--context", "64", "--weights", "int8"]
    )
    settings = ModelSettings.from_arguments(arguments)
    assert settings.layer_splits == (1, 3)
    assert settings.weight_format == "int8"
    assert ModelSettings.from_json(settings.to_json()) == settings


def test_home_keeps_keys_private_and_the_same(home: Path) -> None:
    first = Home()
    key = first.owner_key().private_bytes_raw()
    assert Home().owner_key().private_bytes_raw() == key
    assert (home / "owner.pem").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert first.ray_token().stat().st_mode & 0o777 == 0o600


def test_a_home_that_others_can_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UsageError, match="only you can write"):
        Home(shared)


def test_run_state_is_read_back_and_a_dead_process_is_noticed() -> None:
    home = Home()
    home.write_run_state(STATE)
    assert home.read_run_state() == STATE
    dead = RunState("local", "http://x", "pipeline-0", "demo", "x", "/logs", 2**22 + 1, 1)
    home.write_run_state(dead)
    with pytest.raises(CommandError, match="has ended"):
        home.read_run_state()
    home.clear_run_state()
    with pytest.raises(CommandError, match="nothing runs"):
        home.read_run_state()


def test_a_local_cluster_inherits_nothing_of_another_one(tmp_path: Path) -> None:
    other = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN": "theirs", "PATH": "/bin"}
    environment = local_cluster_environment(other, tmp_path / "token")
    assert "RAY_ADDRESS" not in environment
    assert "RAY_AUTH_TOKEN" not in environment
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["PATH"] == "/bin"


@pytest.mark.parametrize(
    ("config", "asked", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, None, "bfloat16"),
        ({"dtype": "float32"}, None, "float32"),
        ({}, None, "float32"),
        ({"dtype": "float16"}, "float32", "float32"),
    ],
)
def test_dtype_is_the_checkpoints_unless_asked(
    tmp_path: Path, config: dict[str, str], asked: str | None, dtype: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_model(str(tmp_path), Step()).dtype(asked) == dtype


def test_logs_of_all_roles_or_one(tmp_path: Path) -> None:
    directory = tmp_path / "pipeline-0"
    directory.mkdir()
    for role in ("stage-0", "stage-1"):
        (directory / f"{role}.log").write_text("one\ntwo\nthree\n")
    state = RunState("local", "http://x", "pipeline-0", "demo", "x", str(tmp_path), 1, 1)
    assert [path.stem for path in log_files(state, None)] == ["stage-0", "stage-1"]
    (only,) = log_files(state, "stage-1")
    assert last_lines(only, 2) == ["two", "three"]
    with pytest.raises(UsageError, match="expected one of stage-0, stage-1"):
        log_files(state, "../../etc/passwd")
    lines = follow([only])
    with only.open("a") as log:
        log.write("skipped, written before the first look\n")
    # The generator starts to look at the first `next`; what it then misses must not be lost.
    with pytest.MonkeyPatch.context() as patch:

        def write_more(seconds: float) -> None:
            with only.open("a") as log:
                log.write("four\nfi")

        patch.setattr("serving.status.time.sleep", write_more)
        assert next(lines) == ("stage-1", "four")


def _answering(body: str, status: int = 200) -> httpx.Client:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, text=body)

    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test")


def test_chat_streams_and_remembers() -> None:
    asked: list[list[dict[str, str]]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content)["messages"])
        events = [{"choices": [{"delta": {"content": piece}}]} for piece in ("Par", "is")]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx.Response(200, text=text + "data: [DONE]\n\n")

    questions = iter(["capital of France?", "  ", "sure?", None])
    written: list[str] = []
    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test") as client:
        converse(client, "demo", 16, lambda: next(questions), written.append)
    assert written == ["Par", "is", "\n"] * 2
    assert [message["content"] for message in asked[1]] == ["capital of France?", "Paris", "sure?"]


def test_chat_forgets_the_oldest_when_the_context_is_full_and_survives_errors() -> None:
    asked: list[list[str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append([item["content"] for item in json.loads(request.content)["messages"]])
        if asked[-1][-1] == "bad":
            return httpx.Response(503, json={"error": {"message": "no shard answers now"}})
        if len(asked[-1]) > 2 or asked[-1][-1] == "long":
            error = {"message": "too long", "code": "context_length_exceeded"}
            return httpx.Response(400, json={"error": error})
        event = json.dumps({"choices": [{"delta": {"content": "yes"}}]})
        return httpx.Response(200, text=f"data: {event}\n\ndata: [DONE]\n\n")

    questions = iter(["one?", "bad", "two?", "long", None])
    written: list[str] = []
    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test") as client:
        assert not converse(client, "demo", 16, lambda: next(questions), written.append)
    assert written == [
        *("yes", "\n"),
        "[503: no shard answers now]\n",
        *("yes", "\n"),
        "[400: too long]\n",
    ]
    assert asked[1:4] == [["one?", "yes", "bad"], ["one?", "yes", "two?"], ["two?"]]
    assert asked[-1] == ["long"]


def test_serve_refuses_a_taken_port_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "--model", "models/demo", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_status_fits_and_says_nothing_of_blocks_that_a_shard_does_not_have() -> None:
    shards = [
        {"role": "stage-0", "state": "serving", "free_blocks": 9, "total_blocks": 9},
        {"role": "stage-1", "state": "serving", "free_blocks": 0, "total_blocks": 0},
    ]
    text = io.StringIO()
    status = {"state": "serving", "shards": shards, "warnings": ["word " * 30 + "end"]}
    print_status(STATE, status, Console(file=text, width=80))
    assert "word " * 30 + "end" in text.getvalue()
    first, second = (line for line in text.getvalue().splitlines() if line.startswith("stage-"))
    assert first.split()[-1] == "9"
    assert second.split()[-1] == "-"


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ('{"error": {"message": "no shard answers now"}}', 503, "503: no shard answers now"),
        ('data: {"error": {"message": "interrupted"}}\n\n', 200, "interrupted"),
        ('data: {"choices": []}\n\n', 200, "broke off"),
        ("data: nonsense\n\n", 200, "expected an event"),
    ],
)
def test_chat_says_what_went_wrong(body: str, status: int, part: str) -> None:
    with _answering(body, status) as client, pytest.raises(CommandError, match=part):
        list(stream_answer(client, "demo", [], 1))


@pytest.fixture(scope="session")
def checkpoint_directory(checkpoint) -> Path:  # type: ignore[no-untyped-def]
    return checkpoint("llama")
