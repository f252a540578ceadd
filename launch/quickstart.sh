#!/usr/bin/env bash
# From a fresh clone to a model that has learned arithmetic by RL, on two cores: environment, a small
# random model, a supervised warm start, RL with Megatron-Core and vLLM, and a plot of its curves.
#   launch/quickstart.sh                            takes a few minutes, besides downloads
#   launch/quickstart.sh loop.num_steps=10          with settings of the RL part
#   RUN_DIR=runs/second launch/quickstart.sh        another run; the same RUN_DIR resumes a run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly run_dir="${RUN_DIR:-runs/quickstart}" config=configs/quickstart.yaml
readonly initial="$run_dir/initial_model" warm="$run_dir/warm_start/checkpoint"

tools/bootstrap.sh
source .venv/bin/activate

python tools/make_tiny_model.py "$initial"
if [ ! -f "$warm/config.json" ]; then
    NPROC=2 launch/torchrun.sh megatron_rl.sft "$config" \
        run_dir="$run_dir" model.path="$initial" warm_start.output="$warm"
fi
NPROC=2 launch/torchrun.sh megatron_rl.train "$config" \
    run_dir="$run_dir" model.path="$warm" "$@"
python tools/plot_run.py "$run_dir"
