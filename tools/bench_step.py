"""Measures a whole training step beside TRL's, on this machine and the same work.

    python -m tools.bench_step --work DIR [--tokens 16,128,512] [--steps 5] [--pairs 3]

Both train a Qwen3 with 3.2M parameters in float32 on 32 prompts x 8 samples x N new tokens a step,
with as many threads as there are cores. The model never ends a response, so every response has N
tokens. The two take turns; nothing else may run meanwhile. A run's figure is the median of its
steps after the first; printed are the medians of the runs, their ratio, and the seconds by phase.

TRL runs in an environment of its own, DIR/trl, which is made the first time (torch, trl, datasets).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_rl.observe.console import SECONDS
from megatron_rl.observe.run_log import read_metrics
from tools import make_tiny_model

ROOT = Path(__file__).parents[1]
TRL_PACKAGES = [f"torch=={torch.__version__}", "trl==1.16.0", "datasets"]
EOS = 2
MODEL = "--hidden 256 --head-dim 64 --context 1024 --initializer-range 0.02"  # 3.2M parameters
SETTINGS = """
model: {{path: {model}}}
data:
  tasks:
    - name: chain_sum
      options: {{min_terms: 2, max_terms: 2, min_digits: 2, max_digits: 2}}
      prompt_column: metadata.expression
      template: "{{prompt}}="
      verifier: exact
  num_held_out: 8
rollout:
  dtype: float32
  max_num_seqs: 256
  max_model_len: 640
  kv_cache_gib: 2
  num_threads: {threads}
  sampling: {{temperature: 1.0, max_tokens: {tokens}}}
learner: {{tokens_per_micro_batch: 4096, optimizer: {{learning_rate: 1.0e-6}}}}
loop: {{prompts_per_step: 32, samples_per_prompt: 8}}
eval: {{every: 0, at_start: false, at_end: false}}
checkpoint: {{every: 0, save_hf: false}}
"""


def write_model(folder: Path) -> None:
    """A Qwen3 with random weights that never samples the end of a sequence."""
    make_tiny_model.main([str(folder), *MODEL.split()])
    path = folder / "model.safetensors"
    tensors = load_file(path)
    # The first channel is 3 for every token, and only speaks against the end.
    tensors["model.embed_tokens.weight"][:, 0] = 3.0
    tensors["lm_head.weight"][:, 0] = 0.0
    tensors["lm_head.weight"][EOS] = 0.0
    tensors["lm_head.weight"][EOS, 0] = -5.0
    save_file(tensors, path, metadata={"format": "pt"})


def trl_python(folder: Path) -> Path:
    """The interpreter of TRL's environment, which is made if it is missing."""
    python, made = folder / "bin" / "python", folder / ".made"
    if not made.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *TRL_PACKAGES], check=True)
        made.touch()
    return python


def seconds_of_trl(python: Path, model: Path, num_tokens: int, num_steps: int) -> float:
    """The median of TRL's steps after the first."""
    command = [python, ROOT / "tools" / "bench_step_trl.py", model, num_tokens, num_steps]
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return statistics.median(json.loads(done.stdout.splitlines()[-1])[1:])


def seconds_of_ours(folder: Path, model: Path, num_tokens: int, num_steps: int) -> dict[str, float]:
    """The medians of the phases of our steps after the first, and of the whole step."""
    settings, run_dir = folder / "ours.yaml", folder / f"ours_{time.time_ns()}"
    text = SETTINGS.format(model=model, tokens=num_tokens, threads=os.cpu_count())
    settings.write_text(text)
    command = ["launch/torchrun.sh", "megatron_rl.train", settings, f"run_dir={run_dir}"]
    command += [f"loop.num_steps={num_steps}"]
    environment = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    with (folder / "ours.log").open("w") as log:
        subprocess.run(
            [*map(str, command)], cwd=ROOT, env=environment, stdout=log, stderr=log, check=True
        )
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["step"] > 1]
    phases = [
        {key.removeprefix(SECONDS): value for key, value in line.items() if key.startswith(SECONDS)}
        for line in lines
    ]
    medians = {
        name: statistics.median(each.get(name, 0.0) for each in phases) for name in phases[0]
    }
    return medians | {"step": statistics.median(sum(each.values()) for each in phases)}


def main(argv: list[str] | None = None) -> int:
    """Run the pairs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for model, TRL and runs")
    parser.add_argument("--tokens", default="16,128,512", help="new tokens a response")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args(argv)
    work = options.work.resolve()
    model = work / "model"
    if not model.exists():
        write_model(model)
    python = trl_python(work / "trl")
    print("| new tokens | TRL, s | ours, s | ratio | phases of ours, s |\n|---|---|---|---|---|")
    for num_tokens in map(int, options.tokens.split(",")):
        trl, ours = [], []
        for _ in range(options.pairs):
            trl.append(seconds_of_trl(python, model, num_tokens, options.steps))
            ours.append(seconds_of_ours(work, model, num_tokens, options.steps))
        of_trl = statistics.median(trl)
        of_step = statistics.median(each["step"] for each in ours)
        ratio = statistics.median(each["step"] / other for each, other in zip(ours, trl))
        phases = ", ".join(
            f"{name} {statistics.median(each[name] for each in ours):.2f}"
            for name in ours[0]
            if name != "step"
        )
        print(f"| {num_tokens} | {of_trl:.2f} | {of_step:.2f} | {ratio:.2f} | {phases} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
