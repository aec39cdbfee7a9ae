"""The files of numbers that safari computed: how to read them, and how close to them is close enough."""

import json
from pathlib import Path

import numpy as np
from helpers import on_device, relative_error

from s5eqx.interop import from_safari, layer_from_safari, layer_to_safari, to_safari

FOLDER = Path(__file__).parent / "fixtures" / "safari"


class Fixture:
    """One file: what it is about, and its arrays by path."""

    def __init__(self, name):
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = dict(file)
        self.meta = json.loads(str(self.arrays["meta"]))
        self.kind = self.meta["kind"]
        # A smoothing weight of the reference is a constant in float32.
        self.double = 1e-7 if self.meta.get("smooth_freq") else 1e-8

    def __getitem__(self, path):
        return self.arrays[path]

    def __contains__(self, path):
        return path in self.arrays

    def params(self, dtype):
        if self.kind == "modal":
            return {path: self[path].astype(dtype) for path in ("poles", "residues", "D")}
        return {p.removeprefix("p/"): a.astype(dtype) for p, a in self.arrays.items() if p.startswith("p/")}

    def load(self, params):
        if self.kind == "lm":
            return from_safari(params, self.meta["config"])
        return layer_from_safari(self.kind, params, self.meta)

    def save(self, module):
        return to_safari(module) if self.kind == "lm" else layer_to_safari(self.kind, module)

    def inputs(self, dtype, *names):
        return [on_device(self[name], dtype) for name in names]

    def check(self, path, ours, of=lambda array: array):
        """Compares `ours` with the float64 array of a path such as `out/y`, after `of`.

        An error is the largest difference over the largest value. In float32 it is at most the larger of 2e-5 and four
        times the distance of the reference's own float32 array; where there is none, as for gradients and steps, 1e-4.
        """
        target, single = of(self[path]), path.replace("out/", "out32/")
        ours = np.asarray(ours)
        assert ours.shape == target.shape, path
        if ours.dtype in (np.float64, np.complex128):
            bound = self.double
        elif path.startswith("out/") and single in self:
            bound = max(2e-5, 4 * relative_error(of(self[single]), target))
        else:
            bound = 1e-4
        assert relative_error(ours, target) <= bound, path

    def check_gradient(self, gradient, of=lambda name, array: array):
        """Compares the gradient of every parameter that has one, as `save` names them."""
        names = [path.removeprefix("g/") for path in self.arrays if path.startswith("g/")]
        assert names
        for name in names:
            self.check(f"g/{name}", gradient[name], of=lambda array, name=name: of(name, array))
