"""Everyday tests of the long convolutions, once more: here they run on a CUDA device."""

# ruff: noqa: F401  # collected from here
import pytest
from test_butterfly_conv import (
    test_causal,
    test_circular,
    test_every_block_learns,
    test_float32_over_a_long_sequence,
    test_gradients,
    test_groups_of_channels_bound_the_memory,
    test_it_starts_as_the_causal_convolution,
    test_layers_use_what_is_chosen,
    test_measured_takes_the_fastest,
)
from test_convolution import test_causal_convolution, test_dtypes

pytestmark = pytest.mark.gpu
