"""The letters of the axes, and the decorator that checks them.

Every annotation, comment and test of the project uses these letters:

    B  batch            L  length (time)      D  model width
    P  state size       H  heads              V  vocabulary
    N  filter order

`P` counts the complex entries that are kept: half the state size under conjugate symmetry.
A trailing `2` is a (real, imaginary) pair.
"""

import jax
import numpy as np
from beartype import beartype
from jaxtyping import (
    Bool,
    Complex,
    Float,
    Inexact,
    Int,
    Integer,
    PRNGKeyArray,
    PyTree,
    Shaped,
    jaxtyped,
)

__all__ = [
    "Array",
    "Bool",
    "Complex",
    "Float",
    "Inexact",
    "Int",
    "Integer",
    "PRNGKeyArray",
    "PyTree",
    "Shaped",
    "checked",
]

Array = jax.Array | np.ndarray
"""What a public call takes: numpy arrays serve as well as JAX's own. Results are JAX arrays."""

checked = jaxtyped(typechecker=beartype)
"""Checks the shapes and types of a public call. It runs when the call is traced, not when it is executed."""
