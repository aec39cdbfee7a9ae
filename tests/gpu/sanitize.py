"""A small run of every way through the CUDA kernels, to be watched by compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-regex kns=s5eqx python tests/gpu/sanitize.py

Few chains of many tiles, which look back at each other, and many chains; time-invariant and not; odd numbers of states;
resets; both directions; each element type; and `ssm`, the fused state-space step. Results are compared with the loop in
double precision as in the tests.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import ssm_problems
from scan_problems import LAYOUTS, check_all, problem


def problems(layout):
    """A block a chain, twice; tiles that look back, within a group and across groups, with an odd number of states."""
    for rows, length, states in ((3, 300, 5), (270, 20, 3), (1, 1500, 16), (2, 4500, 17)):
        for a in ((states,), (rows, length, states)):
            yield problem(layout, (rows,), length, states, a=a, reset=(rows, length), reverse=states == 17)


def check_ssm():
    """Rows of a tile and of several, and few rows that look back; the weights' gradients in one pass and in several."""
    sizes = ((3, 70, 5, 3), (2, 300, 130, 30), (1, 64 * 9 + 1, 6, 32), (1070, 10, 4, 1))
    for dtype in ("float32", "float64"):
        ssm_problems.check([ssm_problems.problem(*size, reset=size[0] > 1) for size in sizes], dtype)
    print("the state-space step: right")


def main():
    jax.config.update("jax_enable_x64", True)
    names = sys.argv[1:] or ["ssm", "complex64", "float32", "pairs32", "float64", "complex128"]
    if "ssm" in names:
        names.remove("ssm")
        check_ssm()
    for name in names:
        check_all(LAYOUTS[name], [*problems(LAYOUTS[name])])
    print(f"{len(names)} element types, each forward, backward and final state: right")


if __name__ == "__main__":
    main()
