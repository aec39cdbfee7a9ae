"""The state-space step on a GPU: as usually written, as real products around the scan kernel, and fused.

    python tests/gpu/bench_ssm.py [--tiny --platform cpu]

Medians of the forward pass and of y with all gradients, and the errors of y and of the worst gradient against the plain
step in double precision on a short problem. Products in float32 and in TF32, which XLA takes where precision is not
asked for; the fused kernel's own ways on tensor cores are timed as FFI calls. Prints markdown.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from bench import compiled, distance, median_seconds, microseconds, where

from s5eqx.ops import _native, diagonal_scan_pairs, ssm, use_backend

SHAPES = ((16, 131072, 64, 16), (16, 1024, 64, 16), (1, 1048576, 64, 16), (16, 16384, 256, 64))
TINY = ((2, 200, 6, 4),)
CHUNK = 64


def pairs(z):
    return jnp.stack([z.real, z.imag], axis=-1)


def real_weights(B, C):
    width, states = C.shape
    return pairs(B.T).reshape(width, 2 * states), jnp.moveaxis(pairs(C.conj()), 0, 2).reshape(2 * states, width)


def as_written(u, a, B, C, D):
    def combine(early, late):
        return late[0] * early[0], late[0] * early[1] + late[1]

    drive = u.astype(B.dtype) @ B.T
    x = jax.lax.associative_scan(combine, (jnp.broadcast_to(a, drive.shape), drive), axis=1)[1]
    return (x @ C.T).real + D * u


def products_and_scan(u, a, B, C, D):
    (batch, length, width), states, (w_in, w_out) = u.shape, len(a), real_weights(B, C)
    rows = u.reshape(-1, width)
    x = diagonal_scan_pairs(pairs(a), (rows @ w_in).reshape(batch, length, states, 2))
    return (x.reshape(-1, 2 * states) @ w_out + D * rows).reshape(u.shape)


def fused(u, a, B, C, D):
    with use_backend("native"):
        return ssm(u, a, B, C, D)[0]


def draw(shape, dtype=jnp.float32):
    """u, the weights with |a| = 0.999, and the cotangent of y."""
    batch, length, width, states = shape
    keys = jr.split(jr.key(0), 6)
    wide = jnp.result_type(dtype, jnp.complex64)
    a = 0.999 * jnp.exp(2j * jnp.pi * jr.uniform(keys[1], states)).astype(wide)
    weight = lambda key, *shape: jr.normal(key, shape, wide) / shape[1] ** 0.5
    B, C = weight(keys[2], states, width), weight(keys[3], width, states)
    u, g = (jr.normal(k, (batch, length, width), dtype) for k in (keys[0], keys[5]))
    return (u, a, B, C, jr.normal(keys[4], width, dtype)), g


def call(inputs, g, projection):
    """The FFI targets on tensor cores, forward, or where there is a g forward and backward."""
    u, a, B, C, D = inputs
    w_in, w_out = real_weights(B, C)
    operands = (u, pairs(a), w_in, w_out, D, jnp.zeros((len(u), len(a), 2), u.dtype), jnp.zeros((1, 0), bool))
    kept = jax.ShapeDtypeStruct((len(u), -(-u.shape[1] // CHUNK), len(a), 2), u.dtype)

    def target(name, *arrays, results):
        size = _native._backend("cuda")[1].ssm_workspace_bytes(name, *u.shape, len(a), 4, projection)
        results = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in results] + [jax.ShapeDtypeStruct((size,), jnp.uint8)]
        attributes = {"chunk": np.int64(CHUNK), "projection": np.int64(projection)}
        return jax.ffi.ffi_call(name, results)(*arrays, **attributes)

    y, last, states, _ = target("s5eqx_ssm_forward", *operands, results=(u, operands[5], kept))
    if g is None:
        return y
    also = (states, g, jnp.zeros_like(last))
    du, da, dw_in, dw_out, dD, *_ = target("s5eqx_ssm_backward", *operands, *also, results=operands[:6])
    # Gradients of pairs are JAX's of complex numbers, conjugated; w_out holds the conjugate of C.
    dB, dC = (jax.lax.complex(w[..., 0::2], w[..., 1::2]) for w in (dw_in, dw_out.T))
    return y, (du, jax.lax.complex(da[:, 0], -da[:, 1]), dB.T.conj(), dC, dD)


def both(layer, inputs, g):
    y, pull = jax.vjp(layer, *inputs)
    return y, pull(g)


def programs(on_gpu):
    """Name, precision of plain products, forward, forward and backward."""
    for name, layer in (("as written", as_written), ("products + scan", products_and_scan), ("fused", fused)):
        for precision in ("highest", "default") if layer is not fused and on_gpu else ("highest",):
            arithmetic = "TF32" if precision == "default" else "float32"
            yield f"{name}, {arithmetic}", precision, lambda z, _, f=layer: f(*z), functools.partial(both, layer)
    if on_gpu:
        for projection, arithmetic in ((1, "split TF32"), (2, "TF32")):
            run = functools.partial(call, projection=projection)
            yield f"fused, {arithmetic}", "highest", lambda z, _, f=run: f(z, None), run


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11, help="that a median is taken over")
    parser.add_argument("--platform", default="cuda", help="cpu: to try the script out")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: to try the script out")
    options = parser.parse_args()
    device = jax.devices(options.platform)[0]
    print("\n".join(f"- {name}: {value}" for name, value in where(device).items()), "\n")
    columns = ["(B, L, D, P)", "program", "forward µs", "times fused", "both µs", "times fused", "temp. MB"]
    for cells in [*columns, "error of y", "of gradients"], ["---"] * (len(columns) + 2):
        print("| " + " | ".join(cells) + " |")
    with jax.default_device(device):
        for shape in TINY if options.tiny else SHAPES:
            report(shape, list(programs(options.platform == "cuda")), options.rounds)


def report(shape, candidates, rounds):
    inputs, g = draw(shape)
    short = (inputs[0][:1, :2000], *inputs[1:])
    short_g = g[:1, :2000]
    exact_y, exact_gradients = exact(short, short_g)
    rows = {}
    for name, precision, forward, everything in candidates:
        with jax.default_matmul_precision(precision):
            try:
                one, _ = compiled(forward, inputs, g)
                two, _ = compiled(everything, inputs, g)
                seconds = [median_seconds(functools.partial(f, inputs, g), rounds)[0] for f in (one, two)]
                y, gradients = jax.device_get(jax.jit(everything)(short, short_g))
                errors = distance(y, exact_y), max(map(distance, gradients, exact_gradients))
                memory = two.memory_analysis()
                rows[name] = (*seconds, memory.temp_size_in_bytes if memory else 0, *errors)
            except jax.errors.JaxRuntimeError as failure:  # out of memory, most likely
                print(f"| {shape} | {name} | not run: {str(failure).splitlines()[0][:90]}" + " |" * 7, flush=True)
    ours = rows.get("fused, float32", (None, None))
    for name, (*seconds, temporary, y_error, error) in rows.items():
        cells = [str(shape), name]
        for s, of_ours in zip(seconds, ours[:2], strict=True):
            cells += [microseconds(s), f"{s / of_ours:.2f}" if of_ours else "–"]
        cells += [f"{temporary / 1e6:,.0f}", f"{y_error:.1e}", f"{error:.1e}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def exact(inputs, g):
    """y and the gradients, in double precision and one step after the other."""
    u, a, B, C, D, g = (np.asarray(z, np.complex128 if np.iscomplexobj(z) else np.float64) for z in (*inputs, g))

    def scan(drive):
        x = np.zeros_like(drive)
        for t in range(drive.shape[1]):
            x[:, t] = a * x[:, t - 1] + drive[:, t]  # the one before the first is the last, still zero
        return x

    x, gx = scan(u @ B.T), scan((g @ C)[:, ::-1])[:, ::-1]
    along = lambda z, w: np.einsum("btj,btk->jk", z, w)
    gradients = (gx @ B).real + D * g, np.sum(gx[:, 1:] * x[:, :-1], (0, 1)), along(gx, u), along(g, x)
    return (x @ C.T).real + D * u, (*gradients, np.sum(g * u, (0, 1)))


if __name__ == "__main__":
    main()
