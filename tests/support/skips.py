"""A test that should run here and was skipped makes the run fail, since nobody reads the list of skipped tests."""

from __future__ import annotations

import os

import pytest

VARIABLE = "QSR_TESTS_MAY_SKIP"
# Beginnings of reasons that no machine can do anything about, or that this one is not for.
ALLOWED = (
    "needs a GPU",
    "refused by name",
    "Windows has no pseudo-terminals",
)


class Skips:
    """A plugin: collects the reasons for which tests were skipped, in the process that reports them."""

    def __init__(self) -> None:
        self.unexpected: dict[str, list[str]] = {}  # tests by reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look_at(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look_at(report)

    def _look_at(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if not reason.startswith(ALLOWED):
                self.unexpected.setdefault(reason, []).append(report.nodeid)

    @property
    def fail(self) -> bool:
        return bool(self.unexpected) and not os.environ.get(VARIABLE)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.fail and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.fail:
            return
        terminalreporter.section("skipped, and should run here", red=True)
        for reason, tests in self.unexpected.items():
            terminalreporter.line(f"{reason}: {len(tests)} tests, {tests[0]} the first")
        terminalreporter.line(f"So this run has failed. Install what is missing, or set {VARIABLE}=1 to do without.")
