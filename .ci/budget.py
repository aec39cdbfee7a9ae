"""A plugin of pytest: prints how long the tests took and the ten longest, and fails the run where it was too long.

    PYTHONPATH=.ci pytest -p budget

The bounds are of processor time, that of started programs included, so that other work on the machine does not count,
but for a single test, which may also spend its time waiting.
"""

import os

import pytest

MOST_A_CORE = 360.0
"""Seconds of processor time, over the number of processes that run tests."""
MOST_A_TEST = 20.0
"""Seconds by the clock."""


def processor_seconds() -> float:
    return sum(os.times()[:4])


class Budget:
    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.workers: list[float] = []

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self.workers.append(getattr(node, "workeroutput", {}).get("processor_seconds", 0.0))

    def over(self) -> list[str]:
        """What was too long."""
        a_core = sum(self.workers) / len(self.workers)
        found = [f"{a_core:.0f} s of processor time a core, and {MOST_A_CORE:.0f} s is the most"] * (
            a_core > MOST_A_CORE
        )
        long = [name for name, seconds in self.seconds.items() if seconds > MOST_A_TEST]
        return found + [f"{name} took {self.seconds[name]:.1f} s, and {MOST_A_TEST:.0f} s is the most" for name in long]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if not self.workers:  # one process, without xdist
            self.workers.append(processor_seconds())
        if self.over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        total, longest = sum(self.workers), sorted(self.seconds, key=self.seconds.get, reverse=True)[:10]
        terminalreporter.section("time")
        terminalreporter.line(f"{total:.0f} s of processor time over {len(self.workers)} processes; the ten longest:")
        for name in longest:
            terminalreporter.line(f"{self.seconds[name]:8.1f} s  {name}")
        for line in self.over():
            terminalreporter.line(f"too long: {line}", red=True)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budget(), "budget-report")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["processor_seconds"] = processor_seconds()
