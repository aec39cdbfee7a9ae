#!/usr/bin/env bash
# What only a machine with a CUDA device can show, in five parts of at most eight minutes each, without network.
#
#   tests/gpu/check.sh build      builds for the devices of this machine, installs, runs s5eqx.self_test
#   tests/gpu/check.sh tests      pytest -m gpu, and the same bits again and again on a busy device
#   tests/gpu/check.sh sanitize   compute-sanitizer over every way through the kernels
#   tests/gpu/check.sh bench      times, errors and memory beside what else does the same; also bench.md, bench.json
#   tests/gpu/check.sh recall     recall over 131,072 tokens: a step beside the usual one, then seven minutes of training;
#                                 again and again, until it is trained. Needs what the experiments import as well
#
# Needs nvcc, a C++ compiler, and in $PYTHON (python3) what s5eqx imports, with cmake, ninja, pybind11, setuptools and
# pytest. `build` comes first; the other parts use what it installed. Everything is written to $S5EQX_CHECK_DIR
# (a folder of the user's under /tmp), logs included. Each part ends in a table and fails if a row of it does.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
work=${S5EQX_CHECK_DIR:-${TMPDIR:-/tmp}/s5eqx_gpu_check_$(id -u)}
installed=$work/installed
part=${1:-}
limit=480 # seconds

die() { printf '%s\n' "$*" >&2; exit 2; }

[[ $part =~ ^(build|tests|sanitize|bench|recall)$ ]] || die "usage: tests/gpu/check.sh build|tests|sanitize|bench|recall"
command -v nvidia-smi >/dev/null || die "no GPU here: nvidia-smi is not on PATH"
gpu=$(nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader 2>&1) || die "no GPU here: $gpu"
[ -n "$gpu" ] || die "no GPU here: nvidia-smi lists none"

[ "$part" = build ] || [ -d "$installed/s5eqx" ] || die "nothing is in $installed: run tests/gpu/check.sh build first"
sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer) || [ "$part" != sanitize ] ||
  die "no compute-sanitizer on PATH or in \$CUDA_HOME/bin; it comes with the CUDA toolkit"

mkdir -p "$work/logs"
cd "$work" # away from the sources, whose folder `s5eqx` would be imported in place of what was built
# What is already on PYTHONPATH stays: it may hold what s5eqx imports.
export PYTHONPATH=$installed${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

rows=("| device | | $(head -n 1 <<<"$gpu") |") failed=0
table() {
  local row
  printf '\n%s, %s s\n| what | result | figure |\n| --- | --- | --- |\n' "$part" "$SECONDS"
  for row in "${rows[@]}"; do printf '%s\n' "$row"; done
}
trap table EXIT

# step NAME COMMAND...: runs it in the time that is left; the last line it prints is its figure.
step() {
  local figure name=$1 log="$work/logs/$part-${1//[^a-zA-Z0-9]/_}.log" begun=$SECONDS code=0 result=ok
  shift
  printf '\n=== %s\n' "$name"
  timeout --kill-after=10 $((limit - SECONDS > 1 ? limit - SECONDS : 1)) "$@" 2>&1 | tee "$log" || code=${PIPESTATUS[0]}
  if ((code)); then
    result="FAILED ($code)" failed=1
    ((code != 124)) || result="OUT OF TIME"
  fi
  figure=$({ grep -v '^ *$' "$log" || true; } | tail -n 1 | tr '|' '/' | cut -c 1-160)
  rows+=("| $name | $result, $((SECONDS - begun)) s | $figure |")
  return "$code"
}

py() { step "$1" "$python" "${@:2}"; }

says_what_it_is='
import pathlib, sys, s5eqx
assert pathlib.Path(s5eqx.__file__).is_relative_to(sys.argv[1]), f"{s5eqx.__file__} is not what was built"
cuda = {backend.platform: backend for backend in s5eqx.backends()}["cuda"]
s5eqx.show_config()
assert cuda.live, f"the CUDA kernels are not live: {cuda.detail}"
print(cuda.detail)
'

case $part in
build)
  architectures=$(cut -d, -f2 <<<"$gpu" | tr -d ' .' | sort -u | paste -sd ';')
  rm -rf "$work/source" "$installed"
  mkdir "$work/source"
  tar -C "$root" -c --exclude='*.so' --exclude='_*.txt' --exclude=__pycache__ \
    setup.py CMakeLists.txt MANIFEST.in pyproject.toml README.md LICENSE csrc s5eqx | tar -x -C "$work/source"
  export S5EQX_CUDA=ON S5EQX_CUDA_ARCHS=$architectures
  py "what s5eqx imports" -c 'import beartype, equinox, jax, jaxtyping; print(jax.__version__, jax.devices("cuda"))'
  py "pip install, CUDA $architectures" -m pip install --no-build-isolation --no-deps --no-index \
    --disable-pip-version-check --target "$installed" -v "$work/source"
  unset S5EQX_CUDA S5EQX_CUDA_ARCHS
  py "show_config" -c "$says_what_it_is" "$installed"
  py "self_test" -c 'import s5eqx; print(*s5eqx.self_test(), sep="; ")'
  ;;
tests)
  py "what is tested" -c "$says_what_it_is" "$installed"
  S5EQX_REQUIRE_GPU=1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.6 py "pytest -m gpu" -m pytest -q -m gpu --durations=10 \
    -o "addopts=--strict-markers --import-mode=importlib --jaxtyping-packages=s5eqx,beartype.beartype" \
    -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" "$root/tests/gpu" || true
  XLA_PYTHON_CLIENT_PREALLOCATE=false py "same bits" "$root/tests/gpu/same_bits.py" || true
  ;;
sanitize)
  py "what is tested" -c "$says_what_it_is" "$installed"
  # Every buffer an allocation of its own, so that a step beyond one of them is seen. Errors of calls to the driver are
  # not counted: jax asks it for what it may not have.
  export XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_PYTHON_CLIENT_PREALLOCATE=false
  sanitized() { # TOOL KERNELS ELEMENT-TYPES...
    local tool=$1 kernels=$2
    shift 2
    step "$tool" "$sanitizer" --tool "$tool" $kernels --report-api-errors no --error-exitcode 9 \
      --target-processes all "$python" "$root/tests/gpu/sanitize.py" "$@" || true
  }
  sanitized memcheck ""
  sanitized racecheck "--kernel-regex kns=s5eqx" # jax's own reductions are not ours to judge
  sanitized synccheck "--kernel-regex kns=s5eqx" ssm complex64 float64
  sanitized initcheck "" ssm complex64 float32 # all kernels: what jax's have written counts as written
  ;;
bench)
  py "what is timed" -c "$says_what_it_is" "$installed"
  py "bench" "$root/tests/gpu/bench.py" --json "$work/bench.json" --seconds $((limit - 250 - SECONDS)) || true
  py "bench ssm" "$root/tests/gpu/bench_ssm.py" || true
  py "bench conv" "$root/tests/gpu/bench_conv.py" --seconds $((limit - 30 - SECONDS)) || true
  sed -n '/^- date/,$p' "$work"/logs/bench-bench{,_ssm,_conv}.log >"$work/bench.md"
  rows+=("| table | | $work/bench.md |")
  ;;
recall)
  py "what is trained" -c "$says_what_it_is" "$installed"
  py "recall" "$root/tests/gpu/recall_131k.py" --run "$work/recall" --seconds $((limit - 60 - SECONDS)) || true
  ;;
esac
exit "$failed"
