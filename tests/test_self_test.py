"""`s5eqx.self_test`: what it reports, and that it sees a wrong kernel."""

from types import SimpleNamespace

import jax
import pytest
from helpers import slow
from scan_problems import native

import s5eqx
from s5eqx.ops import _native


def on_cpu():
    (report,) = [test for test in s5eqx.self_test() if test.device.lower().removeprefix("tfrt_").startswith("cpu")]
    return report


@pytest.mark.smoke
@native
def test_it_reports_the_native_kernels():
    report = on_cpu()
    assert report.backend == "native" and 0 < report.error < 2e-6


def test_without_kernels_it_tests_plain_jax(monkeypatch):
    monkeypatch.setattr(_native, "is_live", lambda platform: False)
    assert on_cpu().backend == "jax"


@pytest.mark.parametrize(
    "platform, version, expected",
    [("gpu", "PJRT C API\nrocm 60402", False), ("gpu", "PJRT C API\ncuda 13000", True), ("tpu", "", False)],
)
def test_the_kernels_for_cuda_are_for_no_other_device(platform, version, expected, monkeypatch):
    monkeypatch.setattr(_native, "is_live", lambda platform: {"cpu": True, "cuda": True}[platform])
    client = SimpleNamespace(platform_version=version)
    assert _native.runs_native(SimpleNamespace(platform=platform, client=client)) == expected


@pytest.mark.parametrize(
    "platform, wish, expected", [("gpu", "tf32", True), ("gpu", "3xtf32", False), ("cpu", "tf32", False)]
)
def test_rounded_products_are_expected_where_they_are_asked_for(platform, wish, expected, monkeypatch):
    monkeypatch.setattr(_native, "is_live", lambda platform: True)
    monkeypatch.setenv("S5EQX_SSM_PROJECTION", wish)
    monkeypatch.setattr(_native, "_projection", _native._projection.__wrapped__)
    client = SimpleNamespace(platform_version="cuda")
    assert _native.ssm_rounds(SimpleNamespace(platform=platform, client=client)) == expected


@native
@pytest.mark.parametrize(
    "wrong, named",
    [
        ("scan_backward", {"gradient of b"}),
        ("ssm_forward", {"y", "last state"}),
        slow("scan_forward", {"states"}),
        slow("scan_final", {"final state"}),
        slow("ssm_backward", {"gradient of u"}),
    ],
)
def test_a_wrong_kernel_is_named(wrong, named, monkeypatch):
    """A scan the other way, or a step with its matrices exchanged: the native kernel is blamed, for all that it did."""
    lowering = jax.ffi.ffi_lowering

    def misled(target, **options):
        rule = lowering(target, **options)
        if target != f"s5eqx_{wrong}":
            return rule
        if "scan" in wrong:
            return lambda ctx, *operands, reverse, **rest: rule(ctx, *operands, reverse=not reverse, **rest)
        return lambda ctx, u, a, w_in, w_out, *others, **rest: rule(ctx, u, a, w_out, w_in, *others, **rest)

    monkeypatch.setattr(jax.ffi, "ffi_lowering", misled)
    with pytest.raises(RuntimeError, match=r"(?is)native kernels are wrong on .*cpu.*must be below 1e-05") as error:
        s5eqx.self_test()
    message = str(error.value)
    results = ("states", "final state", "gradient of b", "y", "last state", "gradient of u")
    assert {name for name in results if f"\n  {name} (" in message} == named
    assert "use_backend" in message and "show_config" in message
