"""Everyday tests of the scan, once more: here they run on a CUDA device."""

# ruff: noqa: F401  # collected from here
import pytest
from test_final_state import test_derivatives_and_maps_are_those_of_the_scan, test_final_state
from test_scan import (
    layout,
    test_a_bad_channel_stays_alone,
    test_a_growing_channel_without_input_stays_zero,
    test_native_batches,
    test_native_lengths,
    test_native_numbers_of_channels,
    test_native_shapes_of_a,
    test_nothing_crosses_a_reset,
    test_plain_jax,
)
from test_scan_calls import (
    test_eager_is_jitted_and_numpy_serves,
    test_empty,
    test_the_same_bits_every_time,
    test_the_second_eager_call_compiles_nothing,
)
from test_scan_transformations import (
    test_check_grads,
    test_nested_vmap,
    test_second_derivatives_in_every_order,
    test_shard_map,
    test_vmap_over_every_subset_of_the_arguments,
)

pytestmark = pytest.mark.gpu
