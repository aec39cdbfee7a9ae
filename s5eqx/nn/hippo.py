"""The HiPPO-LegS matrix and its eigenvectors: where the eigenvalues of S5 start.

Computed in float64 on the host, once per layer that is built.

Source: Gu et al., "HiPPO" (arXiv 2008.07669); Gupta et al., "DSS" (arXiv 2203.14343) for the normal part;
Smith et al., "S5" (arXiv 2208.04933), section 4.3 for the blocks.
"""

import numpy as np

from s5eqx._typing import Complex, Float, checked


@checked
def hippo_legs_normal(size: int) -> Float[np.ndarray, "n n"]:
    """The normal part `S` of HiPPO-LegS, with `n` and `k` from 0.

        S[n, n] = -1/2,   S[n, k] = -sqrt((n + 1/2) (k + 1/2)) for n > k, and + the same for n < k.

    HiPPO-LegS itself is `S - p p^T` with `p[n] = sqrt(n + 1/2)`: a normal matrix less one of rank 1.
    """
    p = np.sqrt(np.arange(size) + 0.5)
    lower = np.tril(np.outer(p, p), -1)
    return lower.T - lower - 0.5 * np.eye(size)


@checked
def diagonalise(
    state_size: int, num_blocks: int, *, conj_sym: bool
) -> tuple[
    Complex[np.ndarray, " P"],
    Complex[np.ndarray, "state_size P"],
    Complex[np.ndarray, "P state_size"],
]:
    """Eigenvalues and eigenvectors of `num_blocks` normal parts of HiPPO-LegS on the diagonal.

    `S V = V diag(Lambda)` and `Vinv V = I`, with `Vinv` the conjugate transpose of `V`. Every eigenvalue has
    real part -1/2. In each block they ascend in their imaginary parts; with `conj_sym` only the first half
    of them is kept, the negative one, since the other half is its conjugate.

    **Arguments:** `state_size` counts the real states, before the half is dropped. `num_blocks` divides it.
    """
    if state_size < 1 or num_blocks < 1 or state_size % num_blocks:
        raise ValueError(
            f"num_blocks must be positive and divide a positive state_size; got state_size={state_size}, "
            f"num_blocks={num_blocks}. Choose a state_size that is a multiple of num_blocks."
        )
    size = state_size // num_blocks
    if conj_sym and size % 2:
        raise ValueError(
            "conj_sym=True keeps one state of each conjugate pair, so state_size / num_blocks must be even; "
            f"got {state_size} / {num_blocks} = {size}. Change the sizes or pass conj_sym=False."
        )
    kept = size // 2 if conj_sym else size
    S = hippo_legs_normal(size)
    frequency, V = np.linalg.eigh(-1j * (S + 0.5 * np.eye(size)))
    Lambda = np.tile(-0.5 + 1j * frequency[:kept], num_blocks)
    V = np.kron(np.eye(num_blocks), V[:, :kept])
    return Lambda, V, V.conj().T
