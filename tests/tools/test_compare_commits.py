"""What differs between two run folders is found and named, and nothing else is; ranks start and
fail together; a commit trains like itself.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint
import yaml
from safetensors.torch import load_file, save_file

from tests.learner.recorded import NUM_PROMPTS, NUM_SAMPLES
from tools.compare_commits import ROOT, main
from tools.compare_runs import compare_runs, is_time, report_lines
from tools.compare_runs import main as compare_runs_main
from tools.warm_ranks import Job, run

STEP = Path("checkpoints/step_000005")
WEIGHT = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
METRICS = [
    {"step": 0, "loss/mean": float("nan"), "speed/seconds/learner": 0.5},
    {"step": 1, "loss/mean": 0.1, "speed/seconds/learner": 0.7, "sync/timeouts": 0.0},
]


def write_shards(run_dir: Path, moment: torch.Tensor) -> None:
    state = {"weight": WEIGHT.bfloat16(), "optimizer": {"exp_avg": moment, "step": 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of one process, and of files that are there
        dist_checkpoint.save(state, checkpoint_id=run_dir / STEP, no_dist=True)


def write_metrics(run_dir: Path, lines: list[dict[str, float]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_run(run_dir: Path) -> Path:
    """All that a finished run leaves, small."""
    (run_dir / STEP).mkdir(parents=True)
    (run_dir / "huggingface").mkdir()
    settings = {"run_dir": str(run_dir), "model": {"path": str(run_dir), "dtype": "float32"}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    write_metrics(run_dir, METRICS)
    write_shards(run_dir, WEIGHT)
    torch.save({"groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}, run_dir / STEP / "common.pt")
    tasks = [{"path": str(run_dir / "prompts.jsonl")}]
    run_state = {"step": 5, "dual": {"lambda": 0.1}, "inputs": {"data": {"tasks": tasks}}}
    state = {"run": run_state, "bytes": {"common.pt": 3}}
    (run_dir / STEP / "run_state.json").write_text(json.dumps(state))
    (run_dir / "checkpoints" / "latest").write_text("step_000005\n")
    save_file({"lm_head.weight": WEIGHT}, run_dir / "huggingface" / "model.safetensors")
    return run_dir


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "before"), write_run(tmp_path / "after")


def found(runs: tuple[Path, Path]) -> list[str]:
    return [str(each) for each in compare_runs(*runs).differences]


def test_equal_runs_are_equal_wherever_they_lie(runs, capsys):
    comparison = compare_runs(*runs)
    assert comparison.differences == ()
    assert (comparison.num_tensors, comparison.num_metrics) == (3, 3)
    assert comparison.times == ("speed/seconds/learner",)
    assert compare_runs_main([str(each) for each in runs]) == 0
    assert "same bits: 3 tensors, 3 metrics" in capsys.readouterr().out


@pytest.mark.parametrize("bit", [0, 7])
def test_one_bit_of_a_moment(runs, bit, capsys):
    moment = WEIGHT.clone()
    moment.view(torch.uint8)[2, 4] ^= 1 << bit  # the lowest byte of element [2, 1]
    write_shards(runs[1], moment)
    (line,) = found(runs)
    values = f"{WEIGHT[2, 1].item()!r} became {moment[2, 1].item()!r}"
    assert line == f"{STEP}/optimizer.exp_avg 1 of 12 elements, first [2, 1]: {values}"
    assert compare_runs_main([str(each) for each in runs]) == 1
    assert line in capsys.readouterr().out


def test_bits_that_compare_equal_or_unequal_as_numbers(runs):
    for run_dir, zero in zip(runs, (0.0, -0.0)):
        write_shards(run_dir, torch.tensor([float("nan"), zero]))
    name = f"{STEP}/optimizer.exp_avg"
    assert found(runs) == [f"{name} 1 of 2 elements, first [1]: 0.0 became -0.0"]


def test_another_shape_or_dtype(runs):
    write_shards(runs[0], WEIGHT.reshape(4, 3))
    write_shards(runs[1], WEIGHT.double())
    name = f"{STEP}/optimizer.exp_avg"
    assert found(runs) == [f"{name}: torch.float32 [4, 3] became torch.float64 [3, 4]"]


def test_the_export_by_tensor_and_by_byte(runs):
    path = runs[1] / "huggingface" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 3] += 1
    save_file(tensors, path)
    first, second = found(runs)
    assert first.startswith("huggingface/model.safetensors/lm_head.weight 1 of 12 elements")
    assert second.startswith("huggingface/model.safetensors byte ")


def test_metrics_by_the_first_line_that_differs(runs):
    lines = [dict(line) for line in METRICS]
    lines[1]["loss/mean"] = 0.1 + 2**-56  # the next float64
    write_metrics(runs[1], lines)
    assert found(runs) == [f"metrics/loss/mean line 1: 0.1 became {lines[1]['loss/mean']!r}"]


def test_a_metric_that_is_a_time_is_not_compared(runs):
    lines = [line | {"speed/seconds/learner": 9.0, "record/time/max": 1.0} for line in METRICS]
    write_metrics(runs[1], lines)
    assert found(runs) == []
    assert compare_runs(*runs).times == ("record/time/max", "speed/seconds/learner")
    assert is_time("metrics/speed/tokens_per_second")
    assert not is_time("metrics/sync/timeouts")
    assert not is_time("settings/parallel.timeout_seconds")


def test_a_renamed_metric_is_named_on_both_sides(runs):
    renamed = [
        {("loss/average" if key == "loss/mean" else key): value for key, value in line.items()}
        for line in METRICS
    ]
    renamed[1]["sync/timeouts"] = 1.0
    write_metrics(runs[1], renamed)
    assert found(runs) == [
        "metrics/sync/timeouts line 1: 0.0 became 1.0",
        "metrics/loss/mean: 2 lines became absent",
        "metrics/loss/average: absent became 2 lines",
    ]
    assert report_lines(compare_runs(*runs)) == [
        "metrics/sync/timeouts line 1: 0.0 became 1.0",
        "  and loss/mean, loss/average",
    ]


def test_the_state_of_the_run_but_not_the_sizes_of_its_files(runs):
    path = runs[1] / STEP / "run_state.json"
    edit_json(path, lambda state: state["bytes"].update({"common.pt": 4}))
    assert found(runs) == []
    edit_json(path, lambda state: state["run"]["dual"].update({"lambda": 0.2}))
    assert found(runs) == [f"{STEP}/run_state.json/run.dual.lambda: 0.1 became 0.2"]


def test_settings_and_further_state(runs):
    settings = yaml.safe_load((runs[1] / "config.yaml").read_text())
    settings["model"]["dtype"] = "bfloat16"
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(settings))
    torch.save({"groups": [{"lr": 2e-3, "betas": (0.9, 0.95)}]}, runs[1] / STEP / "common.pt")
    (runs[1] / "checkpoints" / "latest").unlink()
    assert found(runs) == [
        "settings/model.dtype: 'float32' became 'bfloat16'",
        "checkpoints/latest: 12 bytes became absent",
        f"{STEP}/common.pt/groups.0.lr: 0.001 became 0.002",
    ]


def test_a_setting_that_one_commit_does_not_know_is_listed(runs):
    settings = yaml.safe_load((runs[1] / "config.yaml").read_text())
    settings["sync"] = {"transport": "shared_memory"}
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(settings))
    comparison = compare_runs(*runs)
    assert comparison.differences == ()
    assert comparison.new_settings == ("sync.transport",)


def test_a_run_that_is_not_finished_is_named(runs, capsys):
    shutil.rmtree(runs[1] / "huggingface")
    assert compare_runs_main([str(each) for each in runs]) == 2
    assert f"{runs[1]}: expected the folder huggingface" in capsys.readouterr().err


def test_ranks_start_as_torchrun_starts_them_and_fail_together(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_rank.py").write_text(
        "import os, sys, time\n"
        "line = [__name__, *sys.argv[1:], os.environ['RANK'], os.environ['WORLD_SIZE']]\n"
        "os.write(1, (' '.join(line) + '\\n').encode())\n"  # pytest has another sys.stdout
        "if 'fail' in sys.argv:\n"
        "    sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    log = tmp_path / "log"

    def codes(argument: str, seconds: float) -> list[int | None]:
        return run(
            Job(
                module="a_rank",
                arguments=[argument],
                log=str(log),
                num_ranks=2,
                seconds=seconds,
            )
        )

    assert codes("work", 60.0) == [0, 0]
    assert sorted(log.read_text().splitlines()) == ["__main__ work 0 2", "__main__ work 1 2"]
    assert codes("fail", 60.0) == [-9, 3]
    monkeypatch.chdir("/etc")
    assert 1 in codes("work", 60.0)
    assert "a_rank: expected it below /etc" in capfd.readouterr().err


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clone of the last commit here, without what is not committed."""
    folder = tmp_path / "repository"
    subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(folder)], check=True)
    return folder


def test_a_commit_that_is_checked_out_with_changes_is_refused(repository, tmp_path, capsys):
    (repository / "megatron_rl" / "new.py").touch()
    work = ["--work", str(tmp_path / "work"), "--repository", str(repository)]
    assert main(["HEAD", "HEAD", *work]) == 2
    message = capsys.readouterr().err
    assert "HEAD: expected a clean tree" in message
    assert "megatron_rl/new.py" in message
    assert main(["no_such_commit", "HEAD", *work]) == 2
    assert "no_such_commit" in capsys.readouterr().err


@pytest.mark.slow
def test_a_commit_trains_like_itself(
    repository, recorded_rollouts, tiny_checkpoint, tmp_path, capsys
):
    run_dir = tmp_path / "recorded"
    shutil.copytree(recorded_rollouts, run_dir / "rollouts")
    settings = {
        "loop": {"prompts_per_step": NUM_PROMPTS, "samples_per_prompt": NUM_SAMPLES},
        "learner": {"tokens_per_micro_batch": 256},
        "rollout": {"sampling": {"temperature": 1.0, "max_tokens": 32}},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["HEAD", "HEAD", "--work", str(tmp_path / "work"), "--repository", str(repository)]
    arguments += ["--rollouts", str(run_dir / "rollouts"), "--model", str(tiny_checkpoint)]
    arguments += ["--layouts", "dp2", "--dtypes", "bfloat16", "--objectives", "dc_grpo"]
    assert main([*arguments, "--steps", "2", "--again"]) == 0
    assert "0 of 1 combinations differ" in capsys.readouterr().out
    assert list((tmp_path / "work" / "worktrees").iterdir()) == []
