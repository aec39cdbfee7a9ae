"""Compiles every CUDA kernel for every architecture, warnings being errors, and checks registers and spills.

    python tests/cuda_host/registers.py [--write] [ARCHITECTURE ...]

A kernel that takes more registers than its line in `registers.txt` allows, or spills more bytes, is an error: it may
halve what runs at once. So is, where all architectures are compiled for, a line whose kernel is gone. Another nvcc than
the one that the file names allots them otherwise and only has to compile. Needs nvcc on PATH or in S5EQX_NVCC.
`--write` makes what was found the budget.
"""

import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUDGET = HERE / "registers.txt"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "110", "120")


def name_of(symbol):
    """A kernel's name in words: its element, channels a thread, multiplier and pass."""
    element = r"(?:NS_7ComplexI([fd])EE|([fd]))"
    if sums := re.match(rf"_ZN5s5eqx10sum_kernelI{element}E", symbol):
        return f"{_type(*sums.groups())}-sum"
    if sums := re.match(r"_ZN5s5eqx14ssm_sum_kernelI([fd])Lb(\d)E", symbol):
        return f"{_ssm(*sums.groups())}-sum"
    if ssm := re.match(r"_ZN5s5eqx10ssm_kernelI([fd])LNS_4PassE(\d)ELb(\d)E", symbol):
        return f"{_ssm(ssm[1], ssm[3])}-{('forward', 'backward')[int(ssm[2])]}"
    scan = re.match(rf"_ZN5s5eqx11scan_kernelI{element}Li(\d)ELb(\d)ELNS_4PassE(\d)E", symbol)
    complex_of, real, vector, varying, backward = scan.groups()
    multiplier, way = ("invariant", "varying")[int(varying)], ("forward", "backward")[int(backward)]
    return f"{_type(complex_of, real)}x{vector}-{multiplier}-{way}"


def _ssm(real, tensor):
    return f"ssm-{_type(None, real)}" + "-tensor" * int(tensor)


def _type(complex_of, real):
    return {"f": "complex64", "d": "complex128"}[complex_of] if complex_of else {"f": "float32", "d": "float64"}[real]


def compile_for(nvcc, source, architecture, folder):
    """Lines `(architecture, kernel) -> (registers, bytes spilled)` of one file."""
    command = [nvcc, "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-c", str(source)]
    command += [f"-arch=sm_{architecture}", "-o", str(Path(folder) / f"{source.stem}_{architecture}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source.name} for sm_{architecture}:\n{done.stdout}{done.stderr}")
    found, kernel, spilled = {}, None, 0
    for line in (done.stdout + done.stderr).splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = name_of(entry.group(1))
        elif stores := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = max(map(int, stores.groups()))
        elif used := re.search(r"Used (\d+) registers", line):
            found[f"sm_{architecture}", kernel] = int(used.group(1)), spilled
    return found


def main(arguments):
    nvcc = os.environ.get("S5EQX_NVCC", "nvcc")
    version = re.search(
        r"release (\S+),", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    ).group(1)
    asked = [a for a in arguments if a != "--write"]
    architectures = asked or ARCHITECTURES
    sources = sorted(CSRC.glob("*.cu"))
    found = {}
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_for, nvcc, source, a, folder) for source in sources for a in architectures]
        for job in jobs:
            found |= job.result()
    if not found:
        sys.exit(f"no kernel was found in {CSRC}")
    if "--write" in arguments:
        lines = [f"{a:8}{kernel:38}{n:4}{spilled:5}\n" for (a, kernel), (n, spilled) in sorted(found.items())]
        BUDGET.write_text(f"# nvcc {version}: registers and bytes spilled, by registers.py --write\n" + "".join(lines))
    head, *rows = BUDGET.read_text().splitlines()
    if not head.startswith(f"# nvcc {version}:"):
        print(f"{len(found)} kernels compile without warnings with nvcc {version}; the budget is for another:\n{head}")
        return
    budget = {(a, kernel): (int(n), int(spilled)) for a, kernel, n, spilled in map(str.split, rows)}
    gone = [] if asked else [key for key in budget if key not in found]
    wrong = [f"{' '.join(key)} has a line in {BUDGET.name} and is no kernel: remove it" for key in gone]
    for key, (n, spilled) in found.items():
        if key not in budget:
            wrong.append(f"{' '.join(key)} has no line in {BUDGET.name}")
        elif n > budget[key][0] or spilled > budget[key][1]:
            wrong.append(f"{' '.join(key)}: {n} registers, {spilled} bytes spilled; {budget[key]} are allowed")
    if wrong:
        sys.exit("\n".join(wrong))
    most = max(n for n, _ in found.values())
    print(f"{len(found)} kernels compile without warnings, within their budgets, the largest of {most} registers")


if __name__ == "__main__":
    main(sys.argv[1:])
