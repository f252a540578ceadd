"""The gap by cause: what is switched off, what a run's gap is, and the whole on real engines."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config import Config, LoopConfig, ModelConfig, QuantizationConfig, RolloutConfig
from megatron_rl.config.rollout import SamplingConfig
from megatron_rl.records import Prompt, Rollout, RolloutGroup, Score, ScoredGroup
from megatron_rl.rollout.recording import write_recomputed, write_step
from tools import explain_discrepancy, quantize_checkpoint
from tools.explain_discrepancy import Gap, causes_of, main, measure


def names_of(config: Config) -> list[str]:
    return [cause.name for cause in causes_of(config) if cause.is_there]


def test_only_causes_that_are_there_are_switched_off():
    exact = RolloutConfig(dtype="float32", max_num_seqs=8)
    loop = LoopConfig(samples_per_prompt=8)
    assert names_of(Config(rollout=exact, loop=loop)) == ["prefix cache"]
    everything = RolloutConfig(
        kv_cache_dtype="fp8",
        quantization=QuantizationConfig(format="int4"),
        sampling=SamplingConfig(temperature=0.7),
    )
    assert names_of(Config(rollout=everything, model=ModelConfig(dtype="bfloat16"))) == [
        "raw log-probs of the engine",
        "prefix cache",
        "batch size and scheduling",
        "KV cache in fp8",
        "weights in int4",
        "engine in bfloat16",
        "learner in bfloat16",
    ]


def test_the_gap_of_a_recorded_step(tmp_path):
    served = [math.log(0.5), math.log(0.25)]
    group = RolloutGroup(
        prompt=Prompt(index=0, text="1+1=", token_ids=(5,), answer="2", source="t", metadata={}),
        rollouts=(
            Rollout(
                token_ids=(5, 6, 7),
                loss_mask=(False, True, True),
                rollout_logprobs=(0.0, *served),
                weight_versions=(-1, 0, 0),
                finish_reason="stop",
                text="2",
            ),
        ),
    )
    scores = (Score(reward=1.0, is_formatted=True, failure=None),)
    judged = ScoredGroup(group=group, scores=scores).without_judgement()
    write_step(tmp_path, 1, 0, [judged], num_ranks=1)
    write_recomputed(
        tmp_path,
        1,
        0,
        prompt_index=[0],
        sample_index=[0],
        lengths=[3],
        recomputed_logprobs=torch.tensor([0.0, math.log(0.6), math.log(0.25)]),
    )
    gap = measure(tmp_path, 1, "by hand")
    assert gap.num_tokens == 2
    assert gap.mean == pytest.approx(0.05, rel=1e-6)
    assert gap.largest == pytest.approx(0.1, rel=1e-6)
    assert gap.largest_logprob == pytest.approx(math.log(1.2), rel=1e-6)
    assert gap.standard_error == pytest.approx(0.0, abs=1e-8)  # one sequence


@pytest.mark.slow
def test_real_engines_down_to_float32(
    tmp_path: Path,
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, loop={"prompts_per_step": 8, "samples_per_prompt": 8})
    output = tmp_path / "explain"
    overrides = ["rollout.dtype=bfloat16", "rollout.sampling.temperature=0.8"]
    assert main([str(config), *overrides, "-o", str(output)]) == 0
    gaps = json.loads((output / "explain.json").read_text())
    print(capsys.readouterr().out)
    means = [gap["mean"] for gap in gaps]
    assert len(gaps) == 5
    assert means[0] > 2 * means[1]  # temperature left out
    assert means[-2] > 100 * means[-1]  # bfloat16
    assert gaps[-1]["largest_logprob"] <= 2e-5
    assert (output / "explain.png").is_file()


def test_a_checkpoint_that_the_engine_does_not_load_is_told(
    tmp_path: Path,
    write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without engines: what is measured, and what becomes of a reason."""
    calls: list[list[str]] = []

    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        is_broken = str(tmp_path / "fp8") in command
        told = "EngineError: engine 0: no kernel\nlines around it" if is_broken else ""
        return subprocess.CompletedProcess(command, int(is_broken), "", told)

    def measured(folder: Path, step: int, name: str) -> Gap:
        assert step == 1 and folder.name == "rollouts"
        figures = {"mean": 0.1, "standard_error": 0.01, "largest": 0.2, "largest_logprob": 0.3}
        return Gap(name=name, num_tokens=7, **figures)

    monkeypatch.setattr(explain_discrepancy.subprocess, "run", run)
    monkeypatch.setattr(explain_discrepancy, "measure", measured)
    output = tmp_path / "out"
    output.mkdir()
    wanted = [f"--checkpoint={tmp_path / name}" for name in ("int8", "fp8")]
    assert main([str(write_config(tmp_path)), "-o", str(output), *wanted]) == 0
    assert "fp8: not measured: EngineError: engine 0: no kernel\n" in capsys.readouterr().out
    gaps = json.loads((output / "explain.json").read_text())
    assert [gap["name"] for gap in gaps] == ["the learner's", "int8"]
    folders = [command[command.index("--checkpoint") + 1] for command in calls]
    assert folders[1:] == [str(tmp_path / "int8"), str(tmp_path / "fp8")]
    assert len({command[-1] for command in calls}) == 3  # run_dir
    twice = [*wanted, f"--checkpoint={tmp_path / 'other' / 'fp8'}"]
    assert main([str(write_config(tmp_path)), "-o", str(output), *twice]) == 1
    assert "expected folders of different names" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_engine_with_a_quantised_checkpoint(
    tmp_path: Path, write_config: Callable[..., Path], sharp_checkpoint: Path
) -> None:
    quantised, output = tmp_path / "fp8_channel", tmp_path / "explain"
    made = [str(sharp_checkpoint), "-o", str(quantised), "--format", "fp8_channel"]
    assert quantize_checkpoint.main(made) == 0
    config = write_config(tmp_path, loop={"prompts_per_step": 8, "samples_per_prompt": 8})
    assert main([str(config), "-o", str(output), "--checkpoint", str(quantised)]) == 0
    own, fp8 = json.loads((output / "explain.json").read_text())
    assert own["largest_logprob"] <= 2e-5  # float32 on both sides
    assert fp8["mean"] > 100 * own["mean"] and fp8["num_tokens"] > 100
