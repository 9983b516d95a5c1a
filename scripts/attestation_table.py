"""Writes the table of checks in docs/attestation.md from the rules themselves.

    python scripts/attestation_table.py [--check]

A rule is anything in security.attestation with a name and a source. Its errors are those that it
lists, or those that its check names, itself or through what it calls. The tests are those that
name an error or its code. With --check nothing is written: exit code 1 where the table differs, or
where an error has no test.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import security.attestation  # noqa: E402
from security import errors as shared  # noqa: E402
from security.attestation import errors as named  # noqa: E402
from security.attestation.sev_snp import ReportDataRule  # noqa: E402
from security.attestation.verdict import Rule  # noqa: E402
from security.errors import AppraisalError  # noqa: E402

DOCUMENT = ROOT / "docs" / "attestation.md"
BEGIN, END = "<!-- checks: begin -->", "<!-- checks: end -->"
TESTS = ("tests/security", "tests/serving")
_DEPTH = 4
_BY_METHOD = {
    "require_pin": ("PinMissing", "PinRefused"),
    "require_measurement": ("MeasurementNotPinned", "MeasurementRefused"),
    "refuse_revoked": ("RevokedIdentity",),
}


def error_classes() -> dict[str, type[AppraisalError]]:
    """Every error that refuses evidence, by the name of its class."""
    return {
        name: item
        for module in (shared, named)
        for name, item in vars(module).items()
        if isinstance(item, type)
        and issubclass(item, AppraisalError)
        and item.code != AppraisalError.code
    }


def rules() -> dict[str, Rule[Any]]:
    """Every rule by its name, in the order of names."""
    found: dict[str, Rule[Any]] = {}
    for info in pkgutil.iter_modules(security.attestation.__path__):
        module = importlib.import_module(f"security.attestation.{info.name}")
        for value in vars(module).values():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, type) or not hasattr(item, "check"):
                    continue
                if isinstance(getattr(item, "name", None), str) and hasattr(item, "source"):
                    found.setdefault(item.name, item)
    made = ReportDataRule(None)
    found[made.name] = made
    return dict(sorted(found.items()))


def errors_of(rule: Rule[Any]) -> list[str]:
    """Codes of the errors that a rule can raise, sorted."""
    listed = getattr(rule, "errors", ())
    if listed:
        return sorted({item.code for item in listed})
    function = next(
        (getattr(rule, name) for name in ("holds", "look") if hasattr(rule, name)),
        type(rule).check,
    )
    classes = error_classes()
    return sorted({classes[name].code for name in _named(function, _DEPTH) if name in classes})


def _named(function: Callable[..., object], depth: int) -> Iterator[str]:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return
    words = set(re.findall(r"\b[A-Za-z_][A-Za-z0-9_]*\b", source))
    yield from words
    for method, classes in _BY_METHOD.items():
        if method in words:
            yield from classes
    if not depth:
        return
    known = getattr(function, "__globals__", {})
    called = [known.get(word) for word in words]
    # A method is looked for in the classes that the function's module knows.
    methods = set(re.findall(r"\.([a-z_]+)\(", source)) - {"check"}
    called += [vars(item).get(name) for item in _classes(known) for name in methods]
    for item in called:
        module = getattr(item, "__module__", "") or ""
        if inspect.isfunction(item) and module.startswith("security.attestation"):
            yield from _named(item, depth - 1)


def _classes(known: dict[str, object]) -> list[type]:
    return [
        item
        for item in known.values()
        if isinstance(item, type)
        and item.__module__.startswith("security.attestation")
        and item.__module__ != "security.attestation.verdict"
    ]


def tests_of(codes: list[str]) -> list[str]:
    """Names of the test files that name one of the errors."""
    classes = {item.code: name for name, item in error_classes().items()}
    words = [re.escape(word) for code in codes for word in (code, classes.get(code, code))]
    pattern = re.compile(rf"\b(?:{'|'.join(words)})\b")
    return [name for name, text in _test_files().items() if words and pattern.search(text)]


def nearest(rule: str, codes: list[str]) -> list[str]:
    """Those of `tests_of` that are about the rule's own kind, or all where none is."""
    kind = rule.partition(".")[0]
    found = tests_of(codes)
    return [name for name in found if kind in name or name in _OTHER_TESTS.get(kind, ())] or found


_OTHER_TESTS = {
    "snp": ("test_security_sev_snp.py",),
    "nvidia": ("test_security_rim.py", "test_security_spdm.py"),
    "policy": ("test_attest.py", "test_security_broker_hardware.py"),
}
_FILES: dict[str, str] = {}


def _test_files() -> dict[str, str]:
    if not _FILES:
        for folder in TESTS:
            for path in sorted((ROOT / folder).glob("test_*.py")):
                _FILES[path.name] = path.read_text()
    return _FILES


def untested() -> list[str]:
    """Codes of errors that no test names."""
    return [item.code for item in error_classes().values() if not tests_of([item.code])]


def table() -> str:
    """The table in Markdown."""
    lines = ["| check | source | errors | tests |", "|---|---|---|---|"]
    for name, rule in rules().items():
        codes = errors_of(rule)
        source = rule.source.replace("|", "/")
        shown = ", ".join(f"`{code}`" for code in codes)
        lines.append(f"| `{name}` | {source} | {shown} | {', '.join(nearest(name, codes))} |")
    ruled = {code for rule in rules().values() for code in errors_of(rule)}
    lines += [
        "",
        "Refused before any rule is asked, because it does not parse or nobody asked for it:",
        "",
        "| error | meaning | tests |",
        "|---|---|---|",
    ]
    for item in sorted(error_classes().values(), key=lambda item: item.code):
        if item.code not in ruled:
            meaning = (inspect.getdoc(item) or "").partition("\n")[0]
            lines.append(f"| `{item.code}` | {meaning} | {', '.join(tests_of([item.code]))} |")
    return "\n".join(lines)


def document() -> str:
    """The whole document with the table as it should be."""
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def differences() -> list[str]:
    """What the document's table says otherwise than the rules.

    Its column of tests may name fewer files than there are, as tests grow; those that it names
    have to be there and to name one of the errors.
    """
    written = _rows(DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0])
    wanted = _rows(table())
    found = [f"{name} is not in the table" for name in wanted if name not in written]
    for name, (columns, tests) in written.items():
        if name not in wanted:
            found.append(f"{name} is no check or error any more")
        elif columns != wanted[name][0]:
            found.append(f"{name} has another source or other errors")
        elif not tests or not tests <= wanted[name][1]:
            found.append(f"{name} names tests that do not show it, or none")
    return found


def _rows(text: str) -> dict[str, tuple[tuple[str, ...], set[str]]]:
    rows: dict[str, tuple[tuple[str, ...], set[str]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("`"):
            tests = {name for name in cells[-1].split(", ") if name}
            rows[cells[0]] = (tuple(cells[1:-1]), tests)
    return rows


def main() -> int:
    """Writes the table, or checks it."""
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(document())
        return 0
    stale = differences()
    for line in stale:
        print(f"docs/attestation.md: {line}; run scripts/attestation_table.py")
    missing = untested()
    if missing:
        print(f"errors without a test: {', '.join(missing)}")
    return 1 if stale or missing else 0


if __name__ == "__main__":
    sys.exit(main())
