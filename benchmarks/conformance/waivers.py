"""A pytest plugin that runs inside a suite by others: waivers, each for one test and with a reason.

CONFORMANCE_WAIVERS names a TOML file. ``[waived]``: "file::test" (parameters optional) = reason; an expected failure,
strict, so that a waiver that is no longer needed fails the run. ``[unstable]``: the same, for what may also pass.
``[any_text]``: tests that run whole but for comparing an answer with the text that the peer's own random numbers give.
Tests of models that can't be had here (``[absent]``) are not run. Imports nothing but pytest: it is loaded into the
suite's environment.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TABLES = ("waived", "unstable", "any_text", "absent")


def _tables() -> dict[str, dict[str, str]]:
    read = tomllib.loads(Path(os.environ["CONFORMANCE_WAIVERS"]).read_text("utf-8"))
    assert set(read) <= set(TABLES), f"unknown tables: {set(read) - set(TABLES)}"
    return {name: read.get(name, {}) for name in TABLES}


def _reason(table: dict[str, str], item: pytest.Item) -> str | None:
    """The reason for a test, found by its id with or without parameters."""
    whole = f"{item.path.name}::{item.name}"
    return table.get(whole, table.get(whole.partition("[")[0]))


UNSEEN = frozenset({"process", "ready", "debug", "jinja", "n_batch", "offline", "_log", "no_ui"})
"""Attributes of a ServerProcess that make no difference to the server that stands in for llama-server."""


def pytest_configure(config: pytest.Config) -> None:
    """llama.cpp's tests fetch all their models first, and start a server for each test.

    Here nothing is fetched, and tests that ask for the same server get the same one, which must bear that.
    """
    try:
        from utils import ServerPreset, ServerProcess
    except ImportError:
        return
    running: list[tuple[dict[str, Any], Any]] = []
    start, stop = ServerProcess.start, ServerProcess.stop

    def end() -> None:
        while running:
            stop(running.pop()[1])

    def started(server: Any, timeout_seconds: int = 120) -> None:
        wanted = {name: value for name, value in vars(server).items() if name not in UNSEEN}
        if not (running and running[0][0] == wanted and running[0][1].process.poll() is None):
            end()
            start(server, timeout_seconds)
            running.append((wanted, server))

    ServerPreset.load_all = staticmethod(lambda: None)
    ServerProcess.start, ServerProcess.stop = started, lambda server: None
    _ends.append(end)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tables = _tables()
    for item in items:
        waived, unstable, absent = (_reason(tables[name], item) for name in ("waived", "unstable", "absent"))
        if absent is not None:
            item.add_marker(pytest.mark.skip(reason=absent))
        elif waived is not None:
            item.add_marker(pytest.mark.xfail(reason=waived, strict=True))
        elif unstable is not None:
            item.add_marker(pytest.mark.xfail(reason=unstable, strict=False))


@pytest.fixture(autouse=True)
def _any_text(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if _reason(_tables()["any_text"], request.node) is not None:
        monkeypatch.setattr(request.module, "match_regex", lambda pattern, text: isinstance(text, str) and text != "")


_outcomes: list[dict[str, Any]] = []
_ends: list[Callable[[], None]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or (report.outcome != "passed" and report.when == "setup"):
        reason = getattr(report, "wasxfail", None)
        if report.skipped and reason is None:
            reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        outcome = "waived" if report.skipped and hasattr(report, "wasxfail") else report.outcome
        _outcomes.append({"test": report.nodeid, "outcome": outcome, "reason": reason})


def pytest_sessionfinish() -> None:
    for end in _ends:
        end()
    Path(os.environ["CONFORMANCE_OUT"]).write_text(json.dumps(_outcomes, indent=1), "utf-8")
