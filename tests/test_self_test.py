"""`s5eqx.self_test`: what it reports, and that it sees a wrong kernel."""

import jax
import pytest

import s5eqx
from s5eqx.ops import _native

CPU = s5eqx.backends()[0]
native = pytest.mark.skipif(not CPU.live, reason=CPU.detail)


def on_cpu():
    (report,) = [test for test in s5eqx.self_test() if test.device.lower().removeprefix("tfrt_").startswith("cpu")]
    return report


@native
def test_it_reports_the_native_kernels():
    report = on_cpu()
    assert report.backend == "native" and 0 < report.error < 2e-6


def test_without_kernels_it_tests_plain_jax(monkeypatch):
    monkeypatch.setattr(_native, "is_live", lambda platform: False)
    assert on_cpu().backend == "jax"


@native
@pytest.mark.parametrize("wrong", ["forward", "backward", "final"])
def test_a_wrong_kernel_is_named(wrong, monkeypatch):
    """One that runs the other way: the native kernel, not the loop, is blamed, and for all that it did."""
    lowering = jax.ffi.ffi_lowering

    def misled(target, **options):
        rule, flip = lowering(target, **options), target == f"s5eqx_scan_{wrong}"
        return lambda ctx, *operands, reverse, **attributes: rule(ctx, *operands, reverse=reverse != flip, **attributes)

    monkeypatch.setattr(jax.ffi, "ffi_lowering", misled)
    with pytest.raises(RuntimeError, match=r"native kernels are wrong on .*cpu.*must be below") as error:
        s5eqx.self_test()
    message = str(error.value)
    assert {name for name in ("\n  states", "\n  final state", "\n  gradient of b") if name in message} == {
        "forward": {"\n  states"},
        "backward": {"\n  gradient of b"},
        "final": {"\n  final state"},
    }[wrong]
    assert "use_backend" in message and "show_config" in message
