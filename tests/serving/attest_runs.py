"""Runs `bulkhead attest` in this process and reads what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from serving import cli


@dataclass
class Answer:
    code: int
    document: dict[str, Any]
    errors: str

    @property
    def failures(self) -> set[str]:
        return {item["code"] for item in all_checks(self.document) if not item["ok"]}

    def check(self, name: str) -> dict[str, Any]:
        return next(item for item in all_checks(self.document) if item["name"] == name)


def all_checks(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from document["checks"]
    for device in document["devices"]:
        yield from all_checks(device)


def attest(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    """`attest check --json` with these arguments."""
    capsys.readouterr()
    try:
        code = cli.run(["attest", "check", "--json", *map(str, arguments)])
    except SystemExit as error:
        code = int(str(error.code))
    printed = capsys.readouterr()
    return Answer(code, json.loads(printed.out) if printed.out else {}, printed.err)
