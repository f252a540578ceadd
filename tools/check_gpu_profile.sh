#!/usr/bin/env bash
# Installs the GPU profile (requirements/gpu.lock) into a throw-away environment and imports what can be
# imported without a GPU. Takes about 15 GB of disk and a quarter of an hour; the result of a run stands
# in docs/gpu-results.md. Needs Python 3.12 with venv and a C++ compiler, but neither CUDA nor a GPU.
#   tools/check_gpu_profile.sh               PYTHON=/path/to/python3.12 tools/check_gpu_profile.sh
#   tools/check_gpu_profile.sh --build-te    also compiles transformer_engine_torch (an hour on 2 cores)
#   tools/check_gpu_profile.sh --keep        leaves the environment, .cache/gpu-profile, for another try
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly folder=.cache/gpu-profile needed_gb=20
readonly lock=requirements/gpu.lock
is_built='' is_kept=''
for option in "$@"; do
    case "$option" in
    --build-te) is_built=1 ;;
    --keep) is_kept=1 ;;
    *) echo "expected --build-te or --keep, got $option" >&2 && exit 2 ;;
    esac
done

say() { printf 'gpu profile: %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            echo "$candidate" && return
        fi
    done
    echo "expected Python 3.12, got none; set PYTHON=/its/path" >&2
    return 1
}

mkdir -p .cache
free_gb=$(df --output=avail -BG .cache | tail -1 | tr -dc 0-9)
if [ "$free_gb" -lt "$needed_gb" ]; then
    say "expected $needed_gb GB of free disk, got $free_gb"
    exit 1
fi

python=$(find_python)
[ -n "$is_kept" ] || rm -rf "$folder"
[ -d "$folder" ] || "$python" -m venv "$folder"
[ -n "$is_kept" ] || trap 'rm -rf "$folder"' EXIT
readonly pip=("$folder/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps --no-cache-dir)

started=$SECONDS
say "$("$folder/bin/python" --version), installing $(grep -c '^[a-z].*==' "$lock") packages"
# Transformer Engine's part for torch comes as source, and is compiled against the installed torch.
grep -v '^transformer-engine-torch==' "$lock" >"$folder/wheels.txt"
"${pip[@]}" -r "$folder/wheels.txt"
if [ -n "$is_built" ]; then
    say "compiling $(grep '^transformer-engine-torch==' "$lock")"
    NVTE_BUILD_USE_NVIDIA_WHEELS=1 MAX_JOBS="$(nproc)" \
        "${pip[@]}" --no-build-isolation "$(grep -o '^transformer-engine-torch==[^ ;]*' "$lock")"
fi
say "building megatron_rl (C++ kernels; CUDA's are compiled by tools/gpu_check.sh)"
PATH="$PWD/$folder/bin:$PATH" MEGATRON_RL_CUDA=0 "${pip[@]}" --no-build-isolation .
say "installed in $((SECONDS - started)) s, $(du -sh "$folder" | cut -f1)"

say "pip check: $("$folder/bin/python" -m pip check 2>&1 | tail -1)"
# Isolated, so that the installed package is imported and not the repository's.
"$folder/bin/python" -I -W ignore - ${is_built:+te} <<'PY'
import importlib
import importlib.metadata
import sys

PACKAGES = (
    "torch numpy transformers compressed_tensors triton vllm vllm.entrypoints.openai.api_server "
    "flashinfer modelopt modelopt.torch.quantization transformer_engine.common"
).split()
MEGATRON = (
    "transformer_engine.pytorch megatron.core megatron.core.optimizer mcore_bridge "
    "megatron.core.models.gpt.gpt_layer_specs megatron.core.extensions.transformer_engine"
).split()
OWN = (
    "megatron_rl megatron_rl._C megatron_rl.train megatron_rl.sft megatron_rl.serve "
    "megatron_rl.evaluate megatron_rl.sync.engine_side.plugin megatron_rl.learner.model.implementations"
).split()
failed = []


def try_all(names: list[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as error:
            failed.append(name)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"  {name}: FAILED: {reason[:300]}")
        else:
            print(f"  {name}")


try_all(PACKAGES)
if len(sys.argv) == 1:  # without its compiled part Transformer Engine cannot be imported, Megatron can
    print("  (Transformer Engine's part for torch is not compiled: Megatron is imported without it)")
    MEGATRON = [name for name in MEGATRON if "transformer_engine" not in name and name != "mcore_bridge"]
    sys.modules["transformer_engine"] = None
try_all([*MEGATRON, *OWN])
import torch

if torch.version.cuda is None:
    failed.append(f"a CUDA build of torch, got {torch.__version__}")
versions = [f"{name} {importlib.metadata.version(name)}" for name in
            ("torch", "megatron-core", "vllm", "transformer-engine", "nvidia-modelopt", "transformers")]
print(f"{', '.join(versions)}, CUDA {torch.version.cuda}: not imported: {', '.join(failed) or 'none'}")
sys.exit(bool(failed))
PY
