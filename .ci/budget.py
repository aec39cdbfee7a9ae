"""A plugin of pytest: prints how long the tests took and the ten longest, and fails the run where it was too long.

    PYTHONPATH=.ci pytest -p budget

The whole is bounded in processor time, that of started programs included, so that other work on the machine does not
count; where the machine is slower than the one that the bound was made for, the bound is higher. A single test is
bounded by the clock: it may spend its time waiting.
"""

import os
import time

import pytest

MOST_A_CORE = 360.0
"""Seconds of processor time, over the number of processes that run tests."""
MOST_A_TEST = 20.0
"""Seconds by the clock."""
COUNTING = 0.4
"""Seconds of processor time that `counting` takes on the machine of `MOST_A_CORE`."""


def processor_seconds() -> float:
    return sum(os.times()[:4])


def counting() -> float:
    """Seconds of processor time that a loop in Python takes now."""
    start, total = time.process_time(), 0
    for i in range(10_000_000):
        total += i
    return time.process_time() - start


class Process:
    """What one process that runs tests says in the end: its processor time, and what counting took."""

    def __init__(self):
        self.first = counting()

    def ends(self) -> tuple[float, float]:
        return processor_seconds(), (self.first + counting()) / 2


class Budget:
    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.workers: list[tuple[float, float]] = []

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self.workers.append(getattr(node, "workeroutput", {}).get("budget", (0.0, COUNTING)))

    def means(self) -> tuple[float, float]:
        """Processor seconds a process, and how many times slower the machine was than the one of the bound, or 1."""
        seconds, counted = (sum(values) / len(self.workers) for values in zip(*self.workers, strict=True))
        return seconds, max(1.0, counted / COUNTING)

    def over(self) -> list[str]:
        """What was too long."""
        a_core, slower = self.means()
        most = MOST_A_CORE * slower
        found = [f"{a_core:.0f} s of processor time a core, and {most:.0f} s is the most"] * (a_core > most)
        long = [name for name, seconds in self.seconds.items() if seconds > MOST_A_TEST]
        return found + [f"{name} took {self.seconds[name]:.1f} s, and {MOST_A_TEST:.0f} s is the most" for name in long]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if not self.workers:  # one process, without xdist
            self.workers.append(session.config.pluginmanager.get_plugin("budget-process").ends())
        if self.over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        (a_core, slower), count = self.means(), len(self.workers)
        longest = sorted(self.seconds, key=self.seconds.get, reverse=True)[:10]
        terminalreporter.section("time")
        terminalreporter.line(
            f"{a_core * count:.0f} s of processor time over {count} processes, on a machine {slower:.2f} times slower "
            "than the one of the bound; the ten longest:"
        )
        for name in longest:
            terminalreporter.line(f"{self.seconds[name]:8.1f} s  {name}")
        for line in self.over():
            terminalreporter.line(f"too long: {line}", red=True)


def pytest_configure(config):
    config.pluginmanager.register(Process(), "budget-process")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budget(), "budget-report")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["budget"] = session.config.pluginmanager.get_plugin("budget-process").ends()
