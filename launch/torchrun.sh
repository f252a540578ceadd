#!/usr/bin/env bash
# Starts the learner ranks of one node:
#   launch/torchrun.sh megatron_rl.train configs/quickstart.yaml loop.num_steps=50
#   NPROC=8 NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh megatron_rl.train CONFIG
# Uses the torchrun on the PATH, or that of this repository's .venv (tools/bootstrap.sh). On one node its
# rendezvous is replaced by one that listens on the loopback interface only (megatron_rl/process/agent.py).
# NPROC         ranks on this node; default: one per GPU, or 2 without a GPU
# NNODES        number of nodes; default 1, with which nothing listens beyond this host
# NODE_RANK     rank of this node; MASTER_ADDR and MASTER_PORT: of the first node; RDZV_ID: of the run
# LOG_DIR       folder for a log of each rank; default: all ranks print here. Then only the first does
# MAX_RESTARTS  how often the ranks are started again after a failure (resume=auto goes on); default 0
# OMP_NUM_THREADS   threads per rank; default: the cores of this node divided by its ranks, at most 8
set -euo pipefail

venv="$(dirname "${BASH_SOURCE[0]}")/../.venv"
if ! command -v torchrun >/dev/null && [ -f "$venv/bin/activate" ]; then
    source "$venv/bin/activate"
fi
if ! command -v torchrun >/dev/null; then
    echo "torchrun.sh: expected torchrun on the PATH or in .venv (tools/bootstrap.sh), got none" >&2
    exit 2
fi
python="$(dirname "$(command -v torchrun)")/python"
"$python" -m megatron_rl.process.packages # one line here instead of a traceback of each rank

num_gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)
num_ranks="${NPROC:-$((num_gpus > 0 ? num_gpus : 2))}"
if ! [[ $num_ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "torchrun.sh: NPROC: expected a number of ranks, such as NPROC=2, got '$num_ranks'" >&2
    exit 2
fi
num_threads=$(($(nproc) / num_ranks))
num_threads=$((num_threads < 1 ? 1 : num_threads > 8 ? 8 : num_threads))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$num_threads}"

launcher=("$python" -m megatron_rl.process.agent)
if [ "${NNODES:-1}" -gt 1 ]; then
    : "${MASTER_ADDR:?expected the first node of NNODES=$NNODES}"
    launcher=(
        torchrun --nnodes "$NNODES" --node_rank "${NODE_RANK:?expected 0 to NNODES-1}"
        --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}"
        --rdzv_id "${RDZV_ID:-megatron_rl}"
    )
fi
if [ -n "${LOG_DIR:-}" ]; then launcher+=(--log-dir "$LOG_DIR/ranks_of_node_${NODE_RANK:-0}" --redirects 3 --tee 0:3); fi
exec "${launcher[@]}" --max-restarts "${MAX_RESTARTS:-0}" --nproc_per_node "$num_ranks" -m "$@"
