"""XLA's flags for compilers on the CPU that take least time, which is most of the time of the tests."""

from importlib.metadata import version

QUICK = "--xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # newer ones have no others, and abort at a flag that they lack
