"""Pure functions on arrays. The only floor that knows that a kernel exists."""

from s5eqx.ops._backend import use_backend as use_backend
from s5eqx.ops._native import NativeBackend as NativeBackend
from s5eqx.ops._native import backends as backends
from s5eqx.ops._native import show_config as show_config
from s5eqx.ops._self_test import DeviceTest as DeviceTest
from s5eqx.ops._self_test import self_test as self_test
from s5eqx.ops.convolution import causal_convolution as causal_convolution
from s5eqx.ops.online_conv import tile_in_block as tile_in_block
from s5eqx.ops.online_conv import tile_of_blocks as tile_of_blocks
from s5eqx.ops.online_conv import tile_spectrum as tile_spectrum
from s5eqx.ops.scan import diagonal_scan as diagonal_scan
from s5eqx.ops.scan import diagonal_scan_pairs as diagonal_scan_pairs
from s5eqx.ops.scan import final_state as final_state
from s5eqx.ops.scan import final_state_pairs as final_state_pairs
from s5eqx.ops.sharded import entering_state_pairs as entering_state_pairs
from s5eqx.ops.sharded import sharded_scan as sharded_scan
from s5eqx.ops.sharded import sharded_scan_pairs as sharded_scan_pairs
from s5eqx.ops.ssm import ssm as ssm
