"""What a client is told before its first prompt leaves its machine."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
import uvicorn

from placement.policy import Ingress, Weakness
from serving import chat, cli
from serving.connect import HttpDirectory, serve_locally
from serving.errors import CommandError
from serving.relay import HeadRoute, HeadUnavailable


def _listening_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(self: uvicorn.Server) -> None:
        return

    monkeypatch.setattr(uvicorn.Server, "serve", serve)


def test_connect_shows_every_weakness_of_the_verified_roster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weaknesses = tuple(weakness.value for weakness in Weakness)

    async def route(self: HttpDirectory) -> HeadRoute:
        return HeadRoute("p", "127.0.0.1:1", b"k" * 32, "00", Ingress.SEALED, weaknesses)

    monkeypatch.setattr(HttpDirectory, "route", route)
    _listening_at_once(monkeypatch)
    asyncio.run(serve_locally("http://far", "p", b"o" * 32, "127.0.0.1", 1))
    said = capsys.readouterr().out
    for weakness in Weakness:
        assert f"warning: {weakness.warning}" in said
    assert "is sealed to http://far" in said


def test_connect_claims_nothing_for_a_roster_that_does_not_verify(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def route(self: HttpDirectory) -> HeadRoute:
        raise HeadUnavailable("roster refused")

    monkeypatch.setattr(HttpDirectory, "route", route)
    _listening_at_once(monkeypatch)
    with pytest.raises(CommandError, match="roster refused"):
        asyncio.run(serve_locally("http://far", "p", b"o" * 32, "127.0.0.1", 1))
    assert "sealed" not in capsys.readouterr().out


def test_chat_asks_the_endpoint_before_it_sends_a_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(client: object) -> str:
        raise CommandError("403: the policy says ingress: sealed")

    def converse(*arguments: object) -> None:
        raise AssertionError("a prompt would be on its way")

    monkeypatch.setattr(chat, "first_model", refuse)
    monkeypatch.setattr(chat, "converse", converse)
    arguments = ["chat", "--endpoint", "http://far", "--model", "m", "--home", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bulkhead", *arguments])
    assert cli.main() == 1
