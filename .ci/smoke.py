"""Runs the smoke tests, and fails where there is a module of s5eqx of which they run no function.

python .ci/smoke.py
"""

import ast
import importlib.util
import sys
from pathlib import Path

import coverage
import pytest


def bodies(file: Path) -> list[set[int]]:
    """The lines of each function's statements but its docstring; none for a function that only declares itself."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            done = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            found.append({line for statement in done for line in range(statement.lineno, statement.end_lineno + 1)})
    return [lines for lines in found if lines]


def main() -> None:
    measured = coverage.Coverage(source_pkgs=["s5eqx"], data_file=None)
    measured.start()
    status = pytest.main(["-m", "smoke", "-n", "0", "-q"])
    measured.stop()
    if status:
        sys.exit(status)
    root = Path(importlib.util.find_spec("s5eqx").submodule_search_locations[0])
    missed = []
    for file in sorted(root.rglob("*.py")):
        ran, functions = set(measured.get_data().lines(str(file)) or ()), bodies(file)
        if functions and not any(lines & ran for lines in functions):
            missed.append(str(file.relative_to(root.parent)))
    if missed:
        sys.exit(f"of these modules no smoke test runs a function; mark one of their tests: {', '.join(missed)}")
    print("the smoke tests run a function of every module")


main()
