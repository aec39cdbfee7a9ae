"""What is emitted: CUDA's call with its workspace, plain JAX with one warning, and no callback in an export."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scan_problems import native

import s5eqx
from s5eqx.ops import _native, _primitive, diagonal_scan, final_state, ssm, use_backend

INPUTS = np.arange(30, dtype=np.float32).reshape(2, 5, 3) / 30
TARGETS = ("s5eqx_scan_forward", "s5eqx_scan_backward", "s5eqx_scan_final")
cuda_built = pytest.mark.skipif(not s5eqx.backends()[1].live, reason=s5eqx.backends()[1].detail)
ALLOWED = [export.DisabledSafetyCheck.custom_call(name) for name in TARGETS]
SIZES = dict(zip(TARGETS, (7, 11, 13), strict=True))


def everything(b):
    """Forward, backward and final, on operands of their own."""
    x, pull = jax.vjp(lambda a: diagonal_scan(a, b), b[0, 0])
    return x, pull(x), final_state(b[0, 0], b)


def exported(b, *platforms):
    return export.export(jax.jit(lambda b: everything(b)), platforms=platforms, disabled_checks=ALLOWED)(b)


@pytest.fixture
def cuda_is_live(monkeypatch):
    """As on a machine with kernels for CUDA; returns what was asked of the workspace."""
    asked = []

    def workspace_bytes(platform, target, a_shape, b_shape, dtype, pairs):
        if platform == "cpu":
            return None
        asked.append((target, tuple(a_shape), tuple(b_shape), dtype, pairs))
        return SIZES[target]

    monkeypatch.setattr(_native, "is_live", lambda platform: platform == "cuda")
    monkeypatch.setattr(_native, "workspace_bytes", workspace_bytes)
    return asked


@pytest.mark.smoke
def test_cuda_calls_have_a_workspace_as_their_last_result(cuda_is_live):
    program = exported(INPUTS, "cuda")
    text = program.mlir_module()
    for target in TARGETS:
        (call,) = re.findall(rf"stablehlo.custom_call @{target}\((.*?)(?: loc\(.*)?\n", text)
        assert "{pairs = false, reverse = false}" in call
        operands, results = call.rsplit(") -> ", 1)
        assert results.removesuffix(")").endswith(f"tensor<{SIZES[target]}xui8>")
        layouts = re.search(r"operand_layouts = \[(.*)\], .*result_layouts = \[(.*)\]", operands)
        assert layouts and layouts[2].endswith("dense<0> : tensor<1xindex>")  # row-major, the workspace too
        assert layouts[1].startswith("dense<[2, 1, 0]> : tensor<3xindex>, dense<[2, 1, 0]> : tensor<3xindex>")
    assert [aval.shape for aval in program.out_avals] == [(2, 5, 3), (3,), (2, 3)]
    what = ((1, 1, 3), (2, 5, 3), jnp.float32, False)
    assert {call[0]: call[1:] for call in cuda_is_live} == dict.fromkeys(TARGETS, what)


SSM = ("s5eqx_ssm_forward", "s5eqx_ssm_backward")


def ssm_exported(width, dtype=jnp.float32):
    """The layer and all its gradients, as a program for CUDA."""
    complex_dtype = np.result_type(dtype, np.complex64)
    a, B, C = (np.ones(shape, complex_dtype) for shape in ((2,), (2, width), (width, 2)))
    skip, u = np.ones(width, dtype), np.ones((3, 130, width), dtype)
    energy = lambda *z: jnp.sum(ssm(*z)[0] ** 2)
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in (*TARGETS, *SSM)]
    gradients = jax.jit(jax.grad(energy, argnums=tuple(range(5))))
    return export.export(gradients, platforms=["cuda"], disabled_checks=allowed)(u, a, B, C, skip).mlir_module()


def test_cuda_calls_of_the_state_space_step(cuda_is_live, monkeypatch, x64):
    """Workspace, kept states and the way of the products; elsewhere the scan's kernels between matrix products."""
    monkeypatch.setattr(_native, "ssm_workspace_bytes", lambda platform, target, *_: SSM.index(target) + 17)
    monkeypatch.setattr(_native, "_projection", lambda: 1)
    for dtype, projection in ((jnp.float32, 1), (jnp.float64, 0)):
        text = ssm_exported(4, dtype)
        for i, target in enumerate(SSM):
            (call,) = re.findall(rf"stablehlo.custom_call @{target}\((.*?)(?: loc\(.*)?\n", text)
            assert f"{{chunk = 64 : i64, projection = {projection} : i64}}" in call
            assert f"tensor<{i + 17}xui8>" in call.rsplit(") -> ", 1)[1]
            assert "tensor<3x3x2x2x" in call, "three states are kept of 130"
        assert not any(f"@{target}" in text for target in TARGETS)
    wide = ssm_exported(300)
    monkeypatch.setattr(_native, "ssm_workspace_bytes", lambda *_: -1)
    for text in (wide, ssm_exported(4)):  # too wide; not taken by the kernels
        assert "@s5eqx_scan_forward" in text and "@s5eqx_scan_backward" in text and "@s5eqx_ssm" not in text


def test_the_way_of_the_products_is_one_of_three(monkeypatch):
    _native._projection.cache_clear()
    monkeypatch.setenv("S5EQX_SSM_PROJECTION", "3xtf32")
    assert (_native.ssm_projection(jnp.float32), _native.ssm_projection(jnp.float64)) == (1, 0)
    _native._projection.cache_clear()
    monkeypatch.setenv("S5EQX_SSM_PROJECTION", "bf16")
    for ask in (lambda: _native.ssm_projection(jnp.float32), _native.show_config):
        with pytest.raises(ValueError, match="must be one of float32, 3xtf32, tf32; got 'bf16'"):
            ask()
    _native._projection.cache_clear()


@cuda_built
def test_the_cuda_module_says_how_much_room_it_wants():
    """Hardly any where a block takes a whole chain; slots for tiles, groups and super-groups where tiles look back."""
    few, many = (
        _native.workspace_bytes("cuda", TARGETS[0], (1, 1, 16), (1, n, 16), jnp.complex64, False) for n in (900, 70_000)
    )
    assert few == 16
    tiles, groups, supers = 274, 18, 2  # of 256 steps, 16 tiles, 16 groups
    slots = 16 * 2 * (tiles + groups + supers) + tiles + groups  # states of 16 channels, in double; a word a reset
    assert 8 * slots <= many < 8 * slots * 1.2
    sums = _native.workspace_bytes("cuda", TARGETS[1], (1, 1, 16), (1, 70_000, 16), jnp.complex64, False)
    assert sums == many + 8 * 16 * 2 * tiles
    program = exported(np.ones((1, 70_000, 16), np.complex64), "cuda")
    assert program.mlir_module().count(f"tensor<{many}xui8>") >= 2 and f"tensor<{sums}xui8>" in program.mlir_module()


@pytest.mark.smoke
@native
def test_one_export_for_two_platforms(monkeypatch):
    """The same results, with a workspace on the one and without on the other."""
    monkeypatch.setattr(_native, "is_live", lambda platform: True)
    monkeypatch.setattr(_native, "workspace_bytes", lambda platform, *_: None if platform == "cpu" else 16)
    program = exported(INPUTS, "cpu", "cuda")
    calls = re.findall(r"custom_call @s5eqx_scan_forward\(.*", program.mlir_module())
    assert sorted("tensor<16xui8>" in call for call in calls) == [False, True]
    jax.tree.map(np.testing.assert_array_equal, program.call(INPUTS), jax.jit(everything)(INPUTS))


@native
def test_only_a_program_for_several_devices_calls_back():
    """And an export does not even then: it outlives the process."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    split = jax.device_put(INPUTS, NamedSharding(mesh, PartitionSpec("d")))
    assert "CustomSPMDPartitioning" in jax.jit(everything).lower(split).as_text()
    for text in (jax.jit(everything).lower(INPUTS).as_text(), exported(split, "cpu").mlir_module()):
        assert "CustomSPMDPartitioning" not in text
        assert all(f"@{target}" in text for target in TARGETS)
    piece = PartitionSpec("d")
    local = jax.jit(jax.shard_map(lambda b: everything(b)[0], mesh=mesh, in_specs=piece, out_specs=piece))
    text = local.lower(split).as_text()
    assert "CustomSPMDPartitioning" not in text and "@s5eqx_scan_forward" in text


@native
def test_programs_for_several_devices_differ_in_more_than_an_address():
    """For the caches of compiled programs, which may not look at it: it is another one in each process."""
    pairs = np.ones((2, 5, 2), np.float32)
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    split = jax.device_put(pairs, NamedSharding(mesh, PartitionSpec("d")))

    def text(**options):
        lowered = jax.jit(lambda b: diagonal_scan(b[0, 0], b, **options)).lower(split).as_text()
        masked, count = re.subn(r'backend_config = "\d+"', "", lowered)
        assert count == 1
        return masked

    assert text() == text()
    assert text() != text(reverse=True)


@native
def test_the_old_partitioner_gathers():
    """It knows no sharding rules, and would end the process."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    split = jax.device_put(INPUTS, NamedSharding(mesh, PartitionSpec("d")))
    shardy = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        text = jax.jit(everything).lower(split).as_text()
    finally:
        jax.config.update("jax_use_shardy_partitioner", shardy)
    assert "CustomSPMDPartitioning" not in text and all(f"@{target}" in text for target in TARGETS)


def lower_for_cuda():
    scan = jax.jit(lambda b: diagonal_scan(b[0], b))
    return scan.trace(np.ones((3, 2), np.float32)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def cuda_without_kernels(monkeypatch):
    """As on a machine with a CUDA device, and a build without kernels for it."""
    nothing = (_native.NativeBackend("cuda", False, "not built: no nvcc was found"),)
    monkeypatch.setattr(_native, "is_live", lambda platform: False)
    monkeypatch.setattr(_native, "backends", lambda: nothing)
    monkeypatch.setattr(_primitive, "_has_devices", lambda platform: True)
    _primitive._warn_of_fallback.cache_clear()
    yield
    _primitive._warn_of_fallback.cache_clear()


def test_a_cuda_device_without_kernels_warns_once(cuda_without_kernels):
    with use_backend("jax"):
        lower_for_cuda()
    expected = r"not built: no nvcc was found.*show_config.*use_backend\(\"jax\"\)"
    with pytest.warns(RuntimeWarning, match=expected) as warned:
        assert "s5eqx_scan" not in lower_for_cuda()
    assert [w.filename for w in warned] == [__file__]  # what the user wrote, and not a line of this library or of JAX
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower_for_cuda()


def test_no_warning_where_there_is_no_cuda_device(cuda_without_kernels, monkeypatch):
    monkeypatch.setattr(_primitive, "_has_devices", lambda platform: False)
    assert "s5eqx_scan" not in lower_for_cuda()
