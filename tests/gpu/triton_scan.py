"""Anchors of `bench.py` in PyTorch: a complex scan in Triton, and the kernels of accelerated-scan where installed.

    python tests/gpu/triton_scan.py '[[[1, 131072, 512], true, "forward", "complex64"]]'

Prints a line of JSON for each measurement. All scan (B, P, L) arrays, time last, which is their own layout: what a
transposition to it would cost is not counted. Each block takes one batch row and state, one part of the time after
the other. Only time-varying multipliers: none of them knows the other case.
"""

import json
import sys

import numpy as np
import torch
import triton
import triton.language as tl

BLOCK = 2048
SAMPLED = 16  # states on which the error is measured


@triton.jit
def _combine(a_re, a_im, b_re, b_im, c_re, c_im, d_re, d_im):
    """First x -> a x + b, then x -> c x + d."""
    return (
        c_re * a_re - c_im * a_im,
        c_re * a_im + c_im * a_re,
        c_re * b_re - c_im * b_im + d_re,
        c_re * b_im + c_im * b_re + d_im,
    )


@triton.jit
def scan_kernel(a, b, x, length, BLOCK: tl.constexpr):
    """x[t] = a[t] x[t-1] + b[t] of complex numbers as pairs of floats; `length` is a multiple of BLOCK."""
    row = tl.program_id(0).to(tl.int64) * length * 2
    last = tl.arange(0, BLOCK) == BLOCK - 1
    x_re = 0.0
    x_im = 0.0
    for start in range(0, length, BLOCK):
        at = row + 2 * start + tl.arange(0, 2 * BLOCK)
        a_re, a_im = tl.split(tl.reshape(tl.load(a + at), (BLOCK, 2)))
        b_re, b_im = tl.split(tl.reshape(tl.load(b + at), (BLOCK, 2)))
        a_re, a_im, b_re, b_im = tl.associative_scan((a_re, a_im, b_re, b_im), 0, _combine)
        re = a_re * x_re - a_im * x_im + b_re
        im = a_re * x_im + a_im * x_re + b_im
        tl.store(x + at, tl.reshape(tl.join(re, im), (2 * BLOCK,)))
        x_re = tl.sum(tl.where(last, re, 0.0), 0)
        x_im = tl.sum(tl.where(last, im, 0.0), 0)


def draw(shape, dtype):
    """a, b and the cotangent of the states, time last, |a| = 1 - 1/L."""
    batch, length, states = shape
    generator = torch.Generator("cuda").manual_seed(0)
    normal = lambda: torch.randn(batch, states, length, dtype=dtype, device="cuda", generator=generator)
    a = normal()
    return a / a.abs() * (1 - 1 / length), normal(), normal()


def error(x, a, b):
    """Relative L2 distance from a loop in double precision, on some states of the first row."""
    step = max(1, a.shape[1] // SAMPLED)
    x, a, b = (z[0, ::step].cpu().numpy().T for z in (x, a, b))
    exact = np.empty(b.shape, np.result_type(b, np.float64))
    state = np.zeros(b.shape[1:], exact.dtype)
    for t in range(len(b)):
        state = a[t] * state + b[t]
        exact[t] = state
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def triton_forward(a, b, g):
    pairs = [torch.view_as_real(z) for z in (a, b)]
    x = torch.empty_like(pairs[1])

    def run():
        scan_kernel[(a.shape[0] * a.shape[1],)](*pairs, x, a.shape[2], BLOCK)

    return run, torch.view_as_complex(x)


def accelerated_complex(a, b, g, backward):
    from accelerated_scan.complex import backward_scan, forward_scan

    a_pairs, b_pairs, g_pairs = (torch.view_as_real(z).contiguous() for z in (a, b, g))
    x, da, db = (torch.empty_like(b_pairs) for _ in range(3))
    grid, options = a.shape[:2], {"seqlen": a.shape[2], "BLOCK": BLOCK, "enable_fp_fusion": False}

    def forward():
        forward_scan[grid](a_pairs, b_pairs, x, **options)

    if not backward:
        return forward, torch.view_as_complex(x)
    forward()
    return lambda: backward_scan[grid](a_pairs, x, g_pairs, db, da, **options), None


def accelerated_warp(a, b, g, backward):
    from accelerated_scan.warp import warpscan_backward, warpscan_forward

    x, da, db = (torch.empty_like(b) for _ in range(3))
    if not backward:
        return lambda: warpscan_forward(a, b, x, False), x
    warpscan_forward(a, b, x, False)
    return lambda: warpscan_backward(a, x, g, da, db), None


def anchors(shape, direction, dtype):
    length, backward = shape[1], direction == "backward"
    if dtype == "complex64" and length % BLOCK == 0:
        if not backward:
            yield "Triton, one program a state", triton_forward
        yield "accelerated-scan complex", lambda *z: accelerated_complex(*z, backward)
    if dtype == "float32" and length & (length - 1) == 0 and length <= 65536:
        yield "accelerated-scan warp", lambda *z: accelerated_warp(*z, backward)


def main():
    for index, (shape, varying, direction, dtype) in enumerate(json.loads(sys.argv[1])):
        for name, prepare in anchors(shape, direction, dtype) if varying else ():
            row = {"case": index, "program": name}
            try:
                a, b, g = draw(shape, getattr(torch, dtype))
                run, x = prepare(a, b, g)
                run()
                row["error"] = None if x is None else error(x, a, b)
                row["seconds"] = triton.testing.do_bench(run, warmup=50, rep=300, return_mode="median") / 1e3
            except Exception as problem:
                row["remark"] = (
                    f"not run: {type(problem).__name__}: {(str(problem).strip() or repr(problem)).splitlines()[0][:90]}"
                )
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
