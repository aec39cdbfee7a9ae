"""A small run of every way through the CUDA kernels, to be watched by compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-regex kns=s5eqx python tests/gpu/sanitize.py

Few chains of many tiles, which look back at each other, and many chains; time-invariant and not; odd numbers of states;
resets; both directions; each element type. Results are compared with the loop in double precision as in the tests.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from scan_problems import LAYOUTS, check_all, problem


def problems(layout):
    """A block a chain, twice; tiles that look back, within a group and across groups, with an odd number of states."""
    for rows, length, states in ((3, 300, 5), (270, 20, 3), (1, 1500, 16), (2, 4500, 17)):
        for a in ((states,), (rows, length, states)):
            yield problem(layout, (rows,), length, states, a=a, reset=(rows, length), reverse=states == 17)


def main():
    jax.config.update("jax_enable_x64", True)
    names = sys.argv[1:] or ["complex64", "float32", "pairs32", "float64", "complex128"]
    for name in names:
        check_all(LAYOUTS[name], [*problems(LAYOUTS[name])])
    print(f"{len(names)} element types, each forward, backward and final state: right")


if __name__ == "__main__":
    main()
