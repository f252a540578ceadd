#!/usr/bin/env bash
# All checks of the log-prob kernels that need a GPU: builds the kernels, compares their bits with the
# CPU's, and measures their speed. Needs Python with a CUDA build of torch, nvcc (CUDA_HOME), pytest.
#   tools/gpu_check.sh                    PYTHON=python3.12 tools/gpu_check.sh
#   tools/gpu_check.sh --no-build         uses the kernels that are already built
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly python="${PYTHON:-python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Requires the CUDA kernels: without them the build fails, and so does loading the extension.
export MEGATRON_RL_CUDA=1

step() { printf '\n== %s\n' "$*"; }

step "machine"
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
fi
"$python" - <<'PY'
import torch

print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
if not torch.cuda.is_available():
    raise SystemExit("expected a CUDA device that torch sees, got none")
print(f"compute capability {torch.cuda.get_device_capability()}")
PY

if [ "${1:-}" != --no-build ]; then
    step "build"
    build_log=$(mktemp)
    if ! "$python" setup.py build_ext --inplace >"$build_log" 2>&1; then
        tail -n 40 "$build_log"
        exit 1
    fi
    grep '^megatron_rl:' "$build_log"
    rm "$build_log"
fi

# Every part runs, also after another one failed; the exit code is 1 if any part failed.
failed=0
part() {
    step "$1"
    shift
    "$@" || { failed=1; printf 'FAILED: %s\n' "$*"; }
}

part "bits: tests on the GPU" "$python" -m pytest -m gpu -rs tests/ops
part "bits: against those stored from a CPU, N = 1, 8, 64" "$python" -m tests.ops.vectors --device cuda
part "bits: the CPU of this machine" "$python" -m tests.ops.vectors
part "log-probs of logits" "$python" -W ignore tools/bench_logprobs.py --device cuda \
    --rows 64 4096 --vocab 151936
part "log-probs of logits, other shapes" "$python" -W ignore tools/bench_logprobs.py --device cuda \
    --no-compile --rows 1 64 1024 4096 --vocab 32000 262144
part "log-probs of hidden states" "$python" -W ignore tools/bench_linear_logprobs.py --device cuda
exit "$failed"
