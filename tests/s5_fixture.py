"""The files of numbers that the S5 branch computed: how to read them, and how close to them is close enough."""

import json
from pathlib import Path

import numpy as np
from helpers import on_device, relative_error

from s5eqx.interop import from_s5, layer_from_s5

FOLDER = Path(__file__).parent / "fixtures" / "s5"


class Fixture:
    """One file: its configuration, and its arrays by path."""

    def __init__(self, name):
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = dict(file)
        self.config = json.loads(str(self.arrays["config"]))

    def __getitem__(self, path):
        return self.arrays[path]

    def __contains__(self, path):
        return path in self.arrays

    def params(self, dtype):
        complex_dtype = np.result_type(dtype, np.complex64)
        arrays = {p.removeprefix("param/"): a for p, a in self.arrays.items() if p.startswith("param/")}
        return {p: a.astype(complex_dtype if np.iscomplexobj(a) else dtype) for p, a in arrays.items()}

    def load(self, params):
        kind = self.config["kind"]
        if kind in ("lm", "opt"):
            return from_s5(params, self.config)
        return layer_from_s5(kind, params, self.config)

    def inputs(self, dtype, *names):
        return [on_device(self[f"in/{name}"], dtype) for name in names]

    def check(self, path, ours, of=lambda array: array):
        """Compares `ours` with the float64 array of a path such as `out/y`, after `of`.

        An error is the largest difference over the largest value. In float64 it is 1e-8 at most, in float32 the
        larger of 2e-5 and four times the distance of the reference's own float32 array.
        """
        root, name = path.split("/", 1)
        target, single = of(self[f"{root}64/{name}"]), of(self[path])
        ours = np.asarray(ours)
        assert ours.shape == target.shape, path
        double = ours.dtype in (np.float64, np.complex128)
        bound = 1e-8 if double else max(2e-5, 4 * relative_error(single, target))
        assert relative_error(ours, target) <= bound, path

    def check_gradient(self, gradient):
        """Compares the gradient of every parameter, as `to_s5` names them."""
        assert gradient.keys() == self.params(np.float32).keys()
        for path, g in gradient.items():
            if np.iscomplexobj(self[f"param/{path}"]):
                self.check(f"grad/param/{path}", g, of=gradient_of_pairs)
            else:
                self.check(f"grad/param/{path}", g)


def gradient_of_pairs(g):
    """Of (Re C~, Im C~) with C~ = C[..., 0] + i C[..., 1], from JAX's conjugate one of a complex C."""
    return np.stack([g[..., 0].real, -g[..., 0].imag], axis=-1)


def names(pattern):
    """The names of the files that match, sorted."""
    found = sorted(path.stem for path in FOLDER.glob(f"{pattern}.npz"))
    assert found, f"no fixture {pattern} in {FOLDER}"
    return found
