"""Programs of a process of their own, which XLA runs as CUDA graphs or does not."""

import sys

from test_native import run_python


def check_captured(program):
    """`program` prints the same with command buffers off, and forced for every program that may have one."""
    digests = []
    for flags in (
        "--xla_gpu_enable_command_buffer=",
        "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1",
    ):
        environment = {"JAX_PLATFORMS": "", "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = run_python(program, *filter(None, sys.path), **environment)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.splitlines()[-1])
    assert digests[0] == digests[1]
