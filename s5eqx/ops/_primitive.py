"""What the operations' JAX primitives have in common: binding, batching, lowering, derivatives by composition."""

import sys
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from s5eqx._varying import varying_axes, varying_over
from s5eqx.ops import _native
from s5eqx.ops._partition import partitioned, sees_devices

Arrays = Sequence[jax.Array]
STATIC = ("reverse", "pairs", "chunk", "backend")
_LIBRARIES = (str(Path(__file__).parents[1]), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))


def bind(primitive: Primitive, *operands: Any, **params: Any) -> list[jax.Array]:
    """Binds with all operands lifted to the union of their varying axes.

    The lift's transpose is the sum over devices that the gradient of a replicated operand needs. Without it
    that gradient is silently one device's share.
    """
    union = frozenset().union(*map(varying_axes, operands))
    return primitive.bind(*(varying_over(union, x) for x in operands), **params)


def new_primitive(name: str, outputs: Callable[..., list[Any]]) -> Primitive:
    """A primitive of several results; `outputs` maps abstract operands to abstract results."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(outputs)
    sees_devices(primitive)
    # One jit for all eager calls: a fresh one each time would compile each time.
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=STATIC))
    return primitive


def like(aval: Any, shape: tuple[int, ...]) -> Any:
    """The abstract value of a result: `aval` with another shape, varying over the same mesh axes."""
    return aval.update(shape=shape, weak_type=False)


def wanted(operands: Sequence[Any], cotangents: Arrays) -> list[jax.Array | None]:
    """The cotangents of those operands that are being transposed."""
    return [ct if ad.is_undefined_primal(x) else None for x, ct in zip(operands, cotangents, strict=True)]


def lower_plainly(primitive: Primitive, implementation: Callable[..., Arrays]) -> None:
    """Runs `implementation`, a function of primitives that have lowerings of their own, on every platform."""
    mlir.register_lowering(primitive, mlir.lower_fun(implementation, multiple_results=True))


def lower_natively(
    primitive: Primitive,
    target: str,
    axes: str,
    *,
    lead: int,
    split: str,
    on_cpu: Callable[..., Arrays],
    elsewhere: Callable[..., Arrays],
    workspace: Callable[..., int | None],
    attributes: Callable[..., dict[str, Any] | None] = lambda platform, *operands, **params: params,
) -> None:
    """Calls the FFI `target` on every platform whose kernels are live, and runs plain JAX on the others.

    `axes` are the letters of operands and results, as in "BLP BP -> BLP": a program for several devices calls the
    kernel on what each of them holds of the axes in `split`, as operand `lead` says. `on_cpu` is the plain form for
    XLA's CPU backend, `elsewhere` the one for any other. `workspace(platform, target, *operands, **params)` is the size
    of the room that the target wants to work in, None if it wants none, -1 if it does not take such operands;
    `attributes(platform, *operands, **params)` are those of the call, None where the plain form is meant.
    """

    def rule_for(platform, plain):
        def rule(ctx, *operands, backend, **params):
            live = platform is not None and _native.is_live(platform)
            given = attributes(platform, *ctx.avals_in, **params)
            plainly = mlir.lower_fun(partial(plain, backend=backend, **params), multiple_results=True)
            if given is None or backend == "jax" or (backend == "auto" and not live):
                if given is not None and backend == "auto" and platform == "cuda" and _has_devices(platform):
                    _warn_of_fallback(platform, _why_not_live(platform))
                return plainly(ctx, *operands)
            if not live:
                raise RuntimeError(
                    f"The native kernels are not live on {' or '.join(ctx.module_context.platforms)} "
                    f'({_why_not_live(platform)}), and use_backend("native") asks for them. Use "auto" to fall back on '
                    "plain JAX."
                )
            spread = partitioned(ctx, primitive, axes, lead, split, {"backend": backend, **params})
            if spread is not None:
                return mlir.lower_fun(spread, multiple_results=True)(ctx, *operands)
            results, size = ctx.avals_out, workspace(platform, target, *ctx.avals_in, **params)
            if size == -1:
                return plainly(ctx, *operands)
            if size is not None:
                ctx = ctx.replace(avals_out=[*results, ShapedArray((size,), jnp.uint8)])
            return jax.ffi.ffi_lowering(target)(ctx, *operands, **given)[: len(results)]

        return rule

    mlir.register_lowering(primitive, rule_for(None, elsewhere))
    mlir.register_lowering(primitive, rule_for("cpu", on_cpu), platform="cpu")
    mlir.register_lowering(primitive, rule_for("cuda", elsewhere), platform="cuda")


def _why_not_live(platform):
    return next((b.detail for b in _native.backends() if b.platform == platform and not b.live), "there are none")


def _has_devices(platform):
    try:
        return bool(jax.devices(platform))
    except RuntimeError:  # lowered for a platform that is not here
        return False


@cache
def _warn_of_fallback(platform, why):
    frame, level = sys._getframe(), 1
    while frame and frame.f_code.co_filename.startswith((*_LIBRARIES, "<@beartype")):  # to the user's own code
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"s5eqx has no kernels for this {platform} device and runs plain JAX, which is slower: {why}. "
        '`s5eqx.show_config()` tells what is there; `use_backend("jax")` asks for plain JAX and does not warn.',
        RuntimeWarning,
        stacklevel=level,
    )


def differentiate_by(primitive: Primitive, composition: Callable[..., Arrays]) -> None:
    """Gives `primitive` the derivative of `composition`, an equal function made of differentiable pieces."""

    def jvp(primals, tangents, **params):
        outputs = bind(primitive, *primals, **params)
        tangents = [ad.instantiate_zeros(t) for t in tangents]
        _, output_tangents = jax.jvp(partial(composition, **params), tuple(primals), tuple(tangents))
        return outputs, list(output_tangents)

    ad.primitive_jvps[primitive] = jvp


def map_reference(primitive: Primitive, reference: Callable[..., Arrays]) -> None:
    """Batches by mapping `reference`, an equal function made of pieces that have batching rules."""

    batching.primitive_batchers[primitive] = partial(_mapped, reference)


def _mapped(reference, operands, dims, **params):
    axes = tuple(dims)
    outputs = jax.vmap(partial(reference, **params), in_axes=axes)(*operands)
    return outputs, [0] * len(outputs)


def fold_batches(
    primitive: Primitive,
    *,
    batched: int,
    shareable: Sequence[int] = (),
    unbatched: Sequence[int] = (),
    reference: Callable[..., Arrays] | None = None,
) -> None:
    """Batches by folding the mapped axis into the leading axis, so that a vmap costs no extra kernel.

    The mapped axis leads. Of the two, XLA can therefore keep only this one split over devices; where the rows are what
    is split it gathers them, or JAX raises if the mesh is explicit. No order serves both, and the outermost `vmap` is
    mostly the one over the batch.

    Operand `batched` has the full batch. Operands in `shareable` may lead with 1 instead, and stay so where they are
    not mapped. Operands in `unbatched` have no batch axis: where one of them is mapped, `reference` is mapped instead.
    """

    def rule(operands, dims, **params):
        mapped = [d is not None for d in dims]
        if any(mapped[i] for i in unbatched):
            return _mapped(reference, operands, dims, **params)
        operands = [jnp.moveaxis(x, d, 0) if m else x for x, d, m in zip(operands, dims, mapped, strict=True)]
        size = operands[mapped.index(True)].shape[0]
        rows = operands[batched].shape[1 if mapped[batched] else 0]

        def fold(i, x):
            if i in unbatched or (i in shareable and not mapped[i] and x.shape[0] == 1):
                return x
            x = x if mapped[i] else x[None]
            return jnp.broadcast_to(x, (size, rows, *x.shape[2:])).reshape(size * rows, *x.shape[2:])

        outputs = bind(primitive, *(fold(i, x) for i, x in enumerate(operands)), **params)
        return [y.reshape(size, rows, *y.shape[1:]) for y in outputs], [0] * len(outputs)

    batching.primitive_batchers[primitive] = rule
