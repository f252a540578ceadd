"""Writes the weights of a run's checkpoint as a Hugging Face checkpoint:

    python tools/hf_checkpoint.py runs/a/checkpoints/step_000050

writes runs/a/huggingface_steps/step_000050. It reads the weights without the optimizer's state and
runs on the CPU in one process, so that it can be used beside a run, whatever the run's layout is.
The host needs memory for one copy of the weights. Model, dtype and chat template are those of the
settings that the checkpoint remembers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: a run may need all of the GPU's memory.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from megatron_rl.config import ModelConfig, ParallelConfig
from megatron_rl.data.tokenizer import read_template
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.learner.layout.parallel import initialize_parallel, shut_down_parallel
from megatron_rl.learner.model.checkpoint_files import saved_run_state
from megatron_rl.learner.model.saved_weights import saved_tensors
from megatron_rl.loop.hf_checkpoints import OF_STEPS
from megatron_rl.weights.huggingface import write_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Make a Hugging Face checkpoint of a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="<run_dir>/checkpoints/step_...")
    parser.add_argument(
        "-o", "--output", type=Path, help=f"default: <run_dir>/{OF_STEPS}/<name of the checkpoint>"
    )
    parser.add_argument("--model", help="the folder that model.path named, if it has moved")
    arguments = parser.parse_args(argv)
    checkpoint = arguments.checkpoint.resolve()
    output = arguments.output or checkpoint.parents[1] / OF_STEPS / checkpoint.name
    try:
        if output.exists():
            raise ConfigError(f"--output: expected a folder that does not exist, got {output}")
        settings = settings_of(checkpoint)
        model = ModelConfig(
            path=arguments.model or settings["model"]["path"], dtype=settings["model"]["dtype"]
        )
        parallel = initialize_parallel(ParallelConfig(), seed=0)
        write_checkpoint(
            output,
            saved_tensors(checkpoint, model, parallel),
            like=model.path,
            chat_template=read_template(settings["data"].get("chat_template_file", "")),
        )
        shut_down_parallel()
    except (ConfigError, DataError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that saved a checkpoint, as plain JSON values.

    Raises:
        DataError: the checkpoint is none, or does not say them.
    """
    settings = saved_run_state(checkpoint).get("inputs", {}).get("settings", {})
    if not settings:
        raise DataError(
            f"{checkpoint}: expected a checkpoint that says which model it is of, got one of an "
            "older version, which does not"
        )
    return settings


if __name__ == "__main__":
    sys.exit(main())
