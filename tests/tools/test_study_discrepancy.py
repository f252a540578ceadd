"""The study's plan and report; its runs are those of tests/e2e."""

import csv
import json
from itertools import product
from pathlib import Path

import pytest

from megatron_rl.config.file import load_config
from megatron_rl.errors import ConfigError
from megatron_rl.observe.run_log import read_metrics
from megatron_rl.study import study as study_runs
from megatron_rl.study.runs import DONE_FILE
from megatron_rl.study.study import load_studies, run_dir_of, served_settings
from tools import study_discrepancy
from tools.study_discrepancy import in_pictures, main

REPOSITORY = Path(__file__).parents[2]
STUDIES = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))
STUDY = """
config: configs/quickstart.yaml
settings: [loop.num_steps=2, sync.probe_tolerance=1]
seeds: [0, 1]
engines: {bf16: [], int4: [rollout.quantization.format=int4]}
arms: {grpo: [objective.constraint.enabled=false], dc_grpo: []}
"""


def write_run(folder: Path, *, end: float, entropy: float = 0.3) -> None:
    folder.mkdir(parents=True)
    (folder / DONE_FILE).write_text("{}")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(3):
            reward = 0.4 if step == 0 else end
            record = {"step": step, "reward/mean": reward, "discrepancy/mean": 0.002 * step}
            record |= {"constraint/penalty_share/mean": 0.25, "loss/entropy/mean": entropy}
            record |= {"eval/avg_at_8": 0.4 if step == 0 else end} if step != 1 else {}
            file.write(json.dumps(record) + "\n")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_loads_with_every_arm_on_every_engine(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for study in load_studies(path):
        assert len(study.runs()) == len(study.seeds) * len(study.engines) * len(study.arms)
        assert len(study.seeds) >= 3
        # A study that is stopped has whole seeds of the engines it came to.
        first = study.runs()[: len(study.arms)]
        assert {(engine, seed) for engine, _, seed in first} == {(next(iter(study.engines)), 0)}
        for engine in study.engines:
            served = served_settings(study, engine, [])
            for arm in study.arms:
                config = load_config(study.config, study.overrides(engine, arm, 4))
                assert config.loop.seed == config.data.seed == 4
                assert config.loop.num_steps >= 60
                assert (config.model.path, config.rollout) == (served.model.path, served.rollout)


def test_the_published_regime_is_the_papers():
    for study in load_studies(REPOSITORY / "configs/studies/published_regime.yaml"):
        shares = set()
        for engine, arm in product(study.engines, study.arms):
            config = load_config(study.config, study.overrides(engine, arm, 0))
            objective, constraint = config.objective, config.objective.constraint
            assert objective.normalize == "sequence_mean" and objective.clip_high == 0.24
            assert config.learner.mini_batches_per_step == 4 and config.sync.every == 1
            assert config.loop.num_steps >= 300
            if arm == "dual_grpo":
                assert constraint.fixed_lambda == 1
            elif constraint.enabled:
                assert constraint.reference_tolerance == 0.0037
                shares.add((constraint.initial, constraint.learning_rate))
        assert shares == {(0.1, 1.0), (1.0, 10.0)}  # the paper's lambda and eta, and ten times them


def test_the_report_says_what_the_runs_did(tmp_path):
    (tmp_path / "discrepancy.yaml").write_text(STUDY)
    runs = tmp_path / "runs"
    write_run(run_dir_of(runs, "bf16", "grpo", 0), end=0.6)
    write_run(run_dir_of(runs, "bf16", "grpo", 1), end=0.8)
    write_run(run_dir_of(runs, "bf16", "dc_grpo", 0), end=0.9, entropy=0.32)
    unfinished = run_dir_of(runs, "int4", "grpo", 0)
    write_run(unfinished, end=0.0)
    (unfinished / DONE_FILE).unlink()
    docs = tmp_path / "docs"
    command = ["report", str(tmp_path / "discrepancy.yaml"), "-o", str(runs), "--docs", str(docs)]
    assert main(command) == 0

    report = (docs / "discrepancy-study.md").read_text()
    [line] = [line for line in report.splitlines() if line.startswith("| grpo | 2 |")]
    # Steps 0 to 2 have gaps of 0, 0.002 and 0.004.
    assert line.startswith("| grpo | 2 | 0.7 ± 0.1 |  | 0.7 ± 0.1 | 0.3 ± 0.1 | 0.002 ± 0 |  |")
    assert "| 0.25 ± 0 |" in line
    # GRPO never had the entropy that this arm ends with, after its first steps.
    assert "| dc_grpo | 1 | 0.9 | 0.3 | 0.9 | 0.5 | 0.002 |  |" in report
    assert "## Engine: int4" not in report
    assert (docs / "discrepancy-study-bf16.png").stat().st_size > 10_000
    with (docs / "discrepancy-study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert rows[0]["eval/avg_at_8"] == "0.4" and rows[1]["eval/avg_at_8"] == ""

    page = docs / "discrepancy-study.md"
    opening = "## By hand\nBefore.\n\n## Runs\n"
    page.write_text(
        report.replace("# discrepancy-study\n", "# A title\n").replace("## Runs\n", opening)
        + "\n## Findings\nAfter.\n\n## Last\nEnd.\n"
    )
    written = page.read_text()
    assert main(command) == 0
    assert page.read_text() == written
    assert written.startswith("# A title\n")
    assert written.index("Before.") < written.index("## Engine: bf16") < written.index("After.")


def test_arms_close_to_the_first_one_get_more_seeds(tmp_path, monkeypatch):
    """Ends of 0.6 and 0.8 have a variance of 0.02, so with 0.7 twice the standard error of the
    difference is 2 * sqrt(0.02 / 2 + 0) = 0.2.
    """
    study = STUDY.replace("{grpo:", "{grpo: [], near: [], far:").replace(
        "seeds:", "more_seeds: [5]\nseeds:"
    )
    (tmp_path / "regime.yaml").write_text(study.replace("bf16: [], ", ""))
    ends = {
        "grpo": (0.6, 0.8),
        "near": (0.899, 0.899),
        "far": (0.901, 0.901),
        "dc_grpo": (0.3, 0.3),
    }
    ran = []

    def run(study, overrides, output, jobs, known):
        ran.append((list(study.arms), study.seeds))
        for engine, arm, seed in study.runs():
            write_run(run_dir_of(output, engine, arm, seed), end=[*ends[arm]][seed % 2])

    monkeypatch.setattr(study_discrepancy, "run_study", run)
    assert main(["run", str(tmp_path / "regime.yaml"), "-o", str(tmp_path / "runs")]) == 0
    assert ran == [(["grpo", "near", "far", "dc_grpo"], (0, 1)), (["grpo", "near"], (5,))]
    options = ["report", str(tmp_path / "regime.yaml"), "-o", str(tmp_path / "runs")]
    assert main([*options, "--docs", str(tmp_path)]) == 0
    report = (tmp_path / "regime-study.md").read_text()
    assert "| grpo | 3 |" in report and "| near | 3 |" in report and "| far | 2 |" in report


def test_the_engines_of_several_models_have_their_own_tables(tmp_path, capsys):
    models = "models: {a: {config: x, settings: []}, b: {config: x, settings: []}}"
    (tmp_path / "two.yaml").write_text(STUDY.replace("config: configs/quickstart.yaml", models))
    for model in "ab":
        write_run(run_dir_of(tmp_path / "runs" / model, "bf16", "grpo", 0), end=0.5)
    options = ["report", str(tmp_path / "two.yaml"), "-o", str(tmp_path / "runs")]
    assert main([*options, "--docs", str(tmp_path)]) == 0
    report = (tmp_path / "two-study.md").read_text()
    assert report.index("## Engine: a-bf16") < report.index("## Engine: b-bf16")
    assert (tmp_path / "two-study-b-bf16.png").is_file()
    assert main([*options, "--docs", str(tmp_path), "--models", "c"]) == 1
    assert "--models: expected some of a, b, got 'c'" in capsys.readouterr().err


def test_a_study_goes_on_from_its_last_report(tmp_path, monkeypatch, capsys):
    """The first machine's runs are in the report alone; the second one runs what they lack."""
    models = "models: {a: {config: x, settings: []}}"
    (tmp_path / "two.yaml").write_text(STUDY.replace("config: configs/quickstart.yaml", models))
    first, second = tmp_path / "first", tmp_path / "second"
    for engine, arm in product(("bf16", "int4"), ("grpo", "dc_grpo")):
        write_run(run_dir_of(first / "a", engine, arm, 0), end=0.5)
    options = [str(tmp_path / "two.yaml"), "--docs", str(tmp_path)]
    assert main(["report", *options, "-o", str(first)]) == 0
    csv_of_the_first = (tmp_path / "two-study.csv").read_text()

    ran = []
    monkeypatch.setattr(
        study_runs, "unfinished", lambda study, engine, *_: [("grpo", 0), ("grpo", 1)]
    )
    monkeypatch.setattr(
        study_runs, "run_engine", lambda _, engine, runs, *__: ran.append(runs) or []
    )
    going_on = [*options, "-o", str(second), "--continue-report"]
    assert main(["run", *going_on]) == 0
    assert ran == [[("grpo", 1)], [("grpo", 1)]]

    assert main(["report", *going_on]) == 0  # with nothing new, the same report
    assert (tmp_path / "two-study.csv").read_text() == csv_of_the_first
    write_run(run_dir_of(second / "a", "bf16", "grpo", 0), end=0.9)  # preferred to the report's
    write_run(run_dir_of(second / "a", "bf16", "grpo", 1), end=0.7)
    assert main(["report", *going_on]) == 0
    report = (tmp_path / "two-study.md").read_text()
    assert "| grpo | 2 | 0.8 ± 0.1 |" in report and "| dc_grpo | 1 | 0.5 |" in report
    assert report.index("## Engine: a-bf16") < report.index("## Engine: a-int4")

    (tmp_path / "two-study.csv").write_text("a,b\n1,2\n")
    assert main(["report", *going_on]) == 1
    assert "two-study.csv: expected the CSV of a report" in capsys.readouterr().err


def test_a_picture_has_the_baseline_and_at_most_five_others():
    records = [{"arm": arm, "step": step} for arm in "abcdefgh" for step in (0, 1)]
    drawn = [dict.fromkeys(each["arm"] for each in part) for part in in_pictures(records)]
    assert ["".join(arms) for arms in drawn] == ["abcdef", "agh"]
    assert in_pictures(records[:2]) == [records[:2]]


@pytest.mark.slow
def test_a_study_of_real_runs_two_at_a_time_on_engines_that_stay(tmp_path, tiny_checkpoint):
    (tmp_path / "discrepancy.yaml").write_text(STUDY.replace("[0, 1]", "[0]"))
    command = [
        "run",
        str(tmp_path / "discrepancy.yaml"),
        "--jobs",
        "2",
        "-o",
        str(tmp_path / "runs"),
    ]
    command += [f"model.path={tiny_checkpoint}", "parallel.tensor=1", "loop.prompts_per_step=8"]
    command += ["data.num_held_out=8", "checkpoint.save_hf=false"]
    assert main(command) == 0
    [study] = load_studies(tmp_path / "discrepancy.yaml")
    for engine, arm, seed in study.runs():
        folder = run_dir_of(tmp_path / "runs", engine, arm, seed)
        assert [each["step"] for each in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2]
    assert main(command) == 0  # nothing is left to do
    assert main([*command, "loop.prompts_per_step=9"]) == 1  # finished runs of other settings


def test_what_is_no_study_and_what_has_no_runs(tmp_path, capsys):
    (tmp_path / "discrepancy.yaml").write_text("config: x\n")
    with pytest.raises(
        ConfigError, match="expected config or models, settings, seeds, engines and arms"
    ):
        load_studies(tmp_path / "discrepancy.yaml")
    (tmp_path / "discrepancy.yaml").write_text(STUDY)
    assert main(["report", str(tmp_path / "discrepancy.yaml"), "-o", str(tmp_path / "none")]) == 1
    assert "expected finished runs, got none" in capsys.readouterr().err
