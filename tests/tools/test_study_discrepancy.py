"""The study's plan and report; its runs are those of tests/e2e."""

import csv
import json
from pathlib import Path

import pytest

from megatron_rl.config.file import load_config
from megatron_rl.errors import ConfigError
from megatron_rl.experiment import DONE_FILE
from tools.study_discrepancy import load_study, main, run_dir_of, with_error

REPOSITORY = Path(__file__).parents[2]
STUDY = """
config: configs/quickstart.yaml
settings: [loop.num_steps=2]
seeds: [0, 1]
engines: {bf16: [], int4: [rollout.quantization.format=int4]}
arms: {grpo: [objective.constraint.enabled=false], dc_grpo: []}
"""


def write_run(folder: Path, *, end: float) -> None:
    folder.mkdir(parents=True)
    (folder / DONE_FILE).write_text("{}")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(3):
            record = {"step": step, "reward/mean": 0.5, "discrepancy/mean": 0.002 * step}
            record |= {"constraint/lambda": 0.5, "advantage/abs/mean": 0.8}
            record |= {"eval/avg_at_8": 0.4 if step == 0 else end} if step != 1 else {}
            file.write(json.dumps(record) + "\n")


def test_the_shipped_study_loads_with_every_arm_on_every_engine():
    study = load_study(REPOSITORY / "configs/studies/discrepancy.yaml")
    assert len(study.runs()) == len(study.seeds) * len(study.engines) * len(study.arms)
    assert len(study.seeds) >= 3
    assert [seed for _, _, seed in study.runs()] == sorted(seed for _, _, seed in study.runs())
    for engine, arm, seed in study.runs():
        config = load_config(REPOSITORY / study.config, study.overrides(engine, arm, seed))
        assert config.loop.seed == config.data.seed == seed
        assert config.loop.num_steps >= 60


def test_the_report_says_what_the_runs_did(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    runs = tmp_path / "runs"
    write_run(run_dir_of(runs, "bf16", "grpo", 0), end=0.6)
    write_run(run_dir_of(runs, "bf16", "grpo", 1), end=0.8)
    write_run(run_dir_of(runs, "bf16", "dc_grpo", 0), end=0.9)
    unfinished = run_dir_of(runs, "int4", "grpo", 0)
    write_run(unfinished, end=0.0)
    (unfinished / DONE_FILE).unlink()
    docs = tmp_path / "docs"
    command = ["report", str(tmp_path / "study.yaml"), "-o", str(runs), "--docs", str(docs)]
    assert main(command) == 0

    report = (docs / "discrepancy-study.md").read_text()
    # avg@8 of 0.6 and 0.8; lambda x gap / |A| = 0.5 x 0.004 / 0.8.
    [line] = [line for line in report.splitlines() if line.startswith("| grpo | 2 |")]
    assert line.startswith("| grpo | 2 | 0.7 ± 0.1 | 0.3 ± 0.1 | 0.002 ± 0 |")
    assert "| 0.0025 ± 0 |" in line
    assert "| dc_grpo | 1 | 0.9 | 0.5 |" in report
    assert "## Engine: int4" not in report
    assert (docs / "discrepancy-study-bf16.png").stat().st_size > 10_000
    with (docs / "discrepancy-study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert rows[0]["eval/avg_at_8"] == "0.4" and rows[1]["eval/avg_at_8"] == ""

    (docs / "discrepancy-study.md").write_text(report + "\n## Findings\nBy hand.\n")
    assert main(command) == 0
    assert (docs / "discrepancy-study.md").read_text() == report + "\n## Findings\nBy hand.\n"


def test_what_is_no_study_and_what_has_no_runs(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("config: x\n")
    with pytest.raises(ConfigError, match="expected config, settings, seeds, engines and arms"):
        load_study(tmp_path / "study.yaml")
    (tmp_path / "study.yaml").write_text(STUDY)
    assert main(["report", str(tmp_path / "study.yaml"), "-o", str(tmp_path / "none")]) == 1
    assert "expected finished runs, got none" in capsys.readouterr().err


def test_a_mean_and_its_standard_error():
    assert with_error([1.0, 2.0, 3.0]) == "2 ± 0.6"
    assert with_error([0.25]) == "0.25"
    assert with_error([float("nan")]) == ""
