"""Poles and residues of a sequence of taps: the realisation of Ho, Kalman and Kung, in double precision by NumPy."""

import math

import numpy as np
import scipy.fft

from s5eqx._typing import Complex, Float

_OVERSAMPLING = 8  # vectors of the subspace iteration beyond the rank
_ITERATIONS = 5  # of it, at most
_ROWS = 128  # in a block of a tall matrix
_ROUNDING = 64 * np.finfo(float).eps  # of the transforms, relative to what is largest


# 1. Poles: the eigenvalues of a shift on the range of the Hankel matrix.


def find_poles(g: Float[np.ndarray, "c M"], order: int, eps: float) -> Complex[np.ndarray, " P"]:
    """At most `order` poles, on the real axis or above, for the taps 1 to `M` of one channel with `c` outputs. Below
    `eps` of what is largest, taps are noise."""
    taps = g.shape[1]
    if not np.any(g):
        return np.zeros(0, complex)
    if taps == 1:
        return np.full(1, 0.5 + 0j)  # any pole can give one tap
    U, sigma = _range(g / np.max(np.abs(g)), 2 * order)
    rank = min(2 * order, int(np.sum(sigma > max(eps, _ROUNDING) * sigma[0])))
    last = U[:, -1]
    gram = np.eye(U.shape[-1]) - last.T @ last  # of all rows but the last, since the columns are orthonormal
    shift = np.sum([_gram(block[:-1], block[1:]) for block in U], axis=0)
    # The largest rank is the best, and so is the largest whose poles do not grow over the taps: what is reflected fits
    # worse, at times by orders of magnitude.
    found = []
    for r in range(rank, 0, -1):
        eigenvalues = _apart(np.linalg.eigvals(np.linalg.lstsq(gram[:r, :r], shift[:r, :r], rcond=None)[0]), eps)
        modes = eigenvalues[np.imag(eigenvalues) >= 0]
        grows = np.max(np.abs(modes)) > 1 + 0.1 / taps
        if len(modes) <= order and not (grows and found):
            found.append(_inside(modes, eps))
            if not grows:
                break
    return min(found, key=lambda poles: _least_squares(g, poles, eps)[1]) if len(found) > 1 else found[0]


def _range(g, rank):
    """The leading left singular vectors (c, rows, r) of the Hankel matrices of `g`, one below the other, and their
    singular values; `r` is at most `rank` and what a shift by a row can act on. By block subspace iteration, from a
    seeded start; no product forms the matrix."""
    outputs, taps = g.shape
    rows = taps // 2 + 1
    columns = taps + 1 - rows
    size = int(scipy.fft.next_fast_len(taps, real=True))  # pyright: ignore[reportArgumentType]
    G = np.asarray(scipy.fft.rfft(g, size))[:, None]

    def times(X, into):
        """The sum over j of g[i+j] x[j], x along the last axis: a correlation, which does not wrap round."""
        spectrum = G * np.conj(np.asarray(scipy.fft.rfft(X, size)))
        spectrum = spectrum if X.ndim == 2 else np.sum(spectrum, axis=0)
        return np.asarray(scipy.fft.irfft(spectrum, size))[..., :into]

    rank = min(rank, outputs * (rows - 1), columns)
    block = min(rank + _OVERSAMPLING, outputs * rows, columns)
    X = np.random.default_rng(0).standard_normal((block, columns))
    sigma = np.zeros(block)
    for _ in range(_ITERATIONS):
        Y, _ = _qr(np.moveaxis(times(X, rows), 1, 2).reshape(-1, block))
        Q, R = _qr(times(np.moveaxis(Y.reshape(outputs, rows, block), 2, 1), columns).T)
        before, (rotation, sigma, _) = sigma, np.linalg.svd(R.T)
        X = Q.T
        if np.max(np.abs(sigma - before)[:rank]) <= 1e-2 * sigma[rank - 1]:
            break
    U = (_in_blocks(Y) @ rotation[:, :rank]).reshape(-1, rank)[: len(Y)]
    return U.reshape(outputs, rows, rank), sigma[:rank]


def _apart(poles, eps):
    """Poles that coincide at zero, as those of a delay do, spread on a circle round it, evenly.

    Powers of the circle's `m` poles sum to a delay of `m`, up to the `m`-th power of its radius; the residues are as
    large as one over that. Rounding moves an `m`-fold zero by the `m`-th root of itself.
    """
    m = np.arange(1, len(poles) + 1)
    coincide = np.sort(np.abs(poles)) <= _ROUNDING ** (1 / m)
    m = int(np.max(m[coincide], initial=0))
    if m < 2:
        return poles
    turn = np.arange(m // 2 + 1) / m
    sine = np.where(turn % 0.5 == 0, 0, np.sin(2 * np.pi * turn))  # a real pole is real
    circle = eps ** (0.5 / m) * (np.cos(2 * np.pi * turn) + 1j * sine)
    return np.concatenate([circle, poles[np.argsort(np.abs(poles))[m:]]])


def _inside(poles, eps):
    """Poles outside the unit circle reflected, and all kept off it and off zero by what rounding can tell."""
    size, phase = np.abs(poles), np.angle(poles)
    size = np.where(size > 1, 1 / np.maximum(size, 1), size)
    return np.clip(size, np.sqrt(eps), 1 - 2 * eps) * np.exp(1j * phase)


# 2. Residues: least squares on the powers of the poles.


def find_residues(
    g: Float[np.ndarray, "c M"], poles: Complex[np.ndarray, " P"], eps: float
) -> Complex[np.ndarray, "c P"]:
    """`R` for which `Re(sum_n R_n poles_n^t)` is nearest to tap `t`, by least squares over all taps from 1 on."""
    if not len(poles) or not g.shape[1]:
        return np.zeros((len(g), len(poles)), complex)
    return _least_squares(g, poles, eps)[0]


def _least_squares(g, poles, eps):
    """The residues, and the squared distance that they leave."""
    T = math.isqrt(g.shape[1]) + 1
    low, high = (np.exp(step * np.arange(T)[:, None] * np.log(poles)) for step in (1, T))
    powers = (high[:, None] * low[None]).reshape(-1, len(poles))[1 : g.shape[1] + 1]
    columns = np.concatenate([np.real(powers), -np.imag(powers)], axis=1)
    norms = np.linalg.norm(columns, axis=0)
    norms = np.where(norms > 0, norms, 1)
    triangle, n = np.concatenate([columns / norms, g.T], axis=1), 2 * len(poles)
    while len(triangle) > max(_ROWS, 2 * triangle.shape[1]):
        triangle = np.asarray(np.linalg.qr(_in_blocks(triangle), mode="r")).reshape(-1, triangle.shape[1])
    triangle = np.asarray(np.linalg.qr(triangle, mode="r"))
    solution = np.linalg.lstsq(triangle[:n, :n], triangle[:n, n:], rcond=eps)[0]
    left = triangle[:n, n:] - triangle[:n, :n] @ solution
    solution = solution / norms[:, None]
    return (solution[: n // 2] + 1j * solution[n // 2 :]).T, np.sum(left**2) + np.sum(triangle[n:, n:] ** 2)


# 3. Tall and thin matrices, block of rows after block of rows: they fit the cache, and BLAS gives none of them to
# several threads, which would wait for each other wherever the cores are fewer than they seem.


def _in_blocks(A):
    """(n, r) as (blocks, rows, r), with rows of zeros at the end."""
    n, r = A.shape
    rows = max(_ROWS, 2 * r)
    return np.pad(A, ((0, -n % rows), (0, 0))).reshape(-1, rows, r)


def _qr(A):
    n, r = A.shape
    if n <= max(_ROWS, 2 * r):
        return np.linalg.qr(A)
    Q, R = np.linalg.qr(_in_blocks(A))
    left, R = _qr(R.reshape(-1, r))
    return (Q @ left.reshape(-1, r, r)).reshape(-1, r)[:n], R


def _gram(A, B):
    """`A^T B`."""
    return np.sum(np.swapaxes(_in_blocks(A), 1, 2) @ _in_blocks(B), axis=0)
