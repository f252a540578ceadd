"""On rollouts that the recorder wrote, and a tokenizer that the project makes."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_rl.config import Config, ConstraintConfig, ModelConfig
from megatron_rl.config.file import load_config, save_config
from megatron_rl.errors import DataError
from megatron_rl.records import JudgedGroup, Prompt, Rollout, RolloutGroup, Score
from megatron_rl.rollout.recording import write_recomputed, write_step
from tools import inspect_rollouts, make_tiny_model

DIGIT = {str(digit): 3 + ord(str(digit)) - 32 for digit in range(10)}  # ids of make_tiny_model.py


def group(index: int, source: str, answers: tuple[str, ...]) -> RolloutGroup:
    prompt = (1, DIGIT["4"], DIGIT["3"])
    rollouts = tuple(
        Rollout(
            token_ids=(*prompt, DIGIT[answer], 2),
            loss_mask=(False,) * 3 + (True, True),
            rollout_logprobs=(0.0,) * 3 + (math.log(0.5), math.log(0.9)),
            weight_versions=(-1,) * 3 + (7, 7),
            finish_reason="stop",
            text=answer,
        )
        for answer in answers
    )
    return RolloutGroup(
        prompt=Prompt(index=index, source=source, text="43", token_ids=prompt, answer="7"),
        rollouts=rollouts,
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = folder / "model"
    make_tiny_model.build_tokenizer().save_pretrained(model)
    save_config(replace(Config(), model=ModelConfig(path=str(model))), folder / "config.yaml")
    groups = [group(17, "sums", ("7", "8")), group(18, "other", ("7", "9"))]
    scores = tuple(Score(reward=r, is_formatted=True, failure=None) for r in (1.0, 0.0))
    judged = [
        JudgedGroup(
            group=each,
            scores=scores,
            overlong_penalties=(0.0, 0.0),
            advantages=(1.0, -1.0),
            is_kept=(True, True),
            has_signal=True,
        )
        for each in groups
    ]
    for step in (3, 12):
        write_step(folder / "rollouts", step, 0, judged, num_ranks=1)
    gaps = (0.001, 0.002, 0.2, 0.003)  # of the first response token of each sample
    recomputed = [x for gap in gaps for x in (0.0, 0.0, 0.0, math.log(0.5 + gap), math.log(0.9))]
    write_recomputed(
        folder / "rollouts",
        12,
        0,
        prompt_index=(17, 17, 18, 18),
        sample_index=(0, 1, 0, 1),
        lengths=(5, 5, 5, 5),
        recomputed_logprobs=torch.tensor(recomputed),
    )
    return folder


@pytest.fixture
def inspect(capsys, monkeypatch):
    """Runs the tool; returns its exit status, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> tuple[int, str, str]:
        status = inspect_rollouts.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def test_numbers_of_the_last_step(run_dir, inspect):
    _, shown, _ = inspect(run_dir, "--no-color")
    assert "step 12: 4 of 4 samples" in shown
    assert (
        "prompt 17.0  sums  reward 1  advantage +1.000  stop  expected '7'  response '7'" in shown
    )
    assert (
        "prompt 17.1  sums  reward 0  advantage -1.000  stop  expected '7'  response '8'" in shown
    )
    row = next(line.split() for line in shown.splitlines() if line.startswith("'8'"))
    assert row == ["'8'", str(DIGIT["8"]), "0.50000", "0.50200", "0.00200"]
    assert "discrepancy mean 0.1000 max 0.2000" in shown


def test_of_a_long_response_the_heading_has_the_end():
    assert inspect_rollouts._shortened(" 7 ") == "7"
    assert inspect_rollouts._shortened("x" * 60 + "7") == "..." + "x" * 39 + "7"


def test_the_worst_first_and_of_one_source(run_dir, inspect):
    _, worst, _ = inspect(run_dir, "--worst", "--num", 1, "--no-color")
    assert "prompt 18.0" in worst and worst.count("prompt ") == 1
    _, other, _ = inspect(run_dir, "--source", "sums")
    assert "2 of 4 samples" in other and "prompt 18" not in other


def test_colours_on_a_terminal(run_dir, inspect, monkeypatch):
    for name, value in (("FORCE_COLOR", "1"), ("COLORTERM", "truecolor"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, shown, _ = inspect(run_dir)
    assert "(tolerance 0.0037)" in shown
    green, crimson = "48;2;183;228;199m", "48;2;122;15;43m"
    assert f"{green}8" in shown and f"{crimson}7" in shown and f"{crimson}9" not in shown


def test_colours_of_a_run_that_constrains_the_ratio_are_those_of_the_default(
    run_dir, inspect, monkeypatch, tmp_path
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    config = load_config(run_dir / "config.yaml", ["objective.constraint.measure=ratio"])
    constraint = replace(config.objective.constraint, tolerance=1.5)
    objective = replace(config.objective, constraint=constraint)
    save_config(replace(config, objective=objective), tmp_path / "config.yaml")
    assert "(tolerance 0.0037)" in inspect(tmp_path)[1]


def test_colours_at_a_tolerance_of_zero(run_dir):
    token = inspect_rollouts.Token(text="7", id=26, p_rollout=0.5, p_recomputed=0.5)
    other = replace(token, p_recomputed=0.6)
    shown = inspect_rollouts.colored(inspect_rollouts.Shown(line={}, tokens=(token, other)), 0.0)
    first, last = inspect_rollouts.SHADES[0][1], inspect_rollouts.SHADES[-1][1]
    assert [span.style for span in shown.spans] == [first, last]


def test_a_step_without_recomputed_logprobs_says_so(run_dir, inspect):
    assert "no recomputed log-probs were recorded" in inspect(run_dir, "--step", 3)[1]


def test_samples_of_an_evaluation(run_dir, inspect, tmp_path):
    """Of a run in rollouts/eval/, of an evaluation without a run in rollouts/."""
    shutil.copyfile(run_dir / "config.yaml", tmp_path / "config.yaml")
    for own in ("", "sums"):
        shutil.copytree(
            run_dir / "rollouts", tmp_path / "rollouts" / "eval" / own, dirs_exist_ok=True
        )
    (tmp_path / "rollouts" / "eval" / "sums" / "step_000012.rank0.jsonl").unlink()
    assert "step 12: 4 of 4 samples" in inspect(tmp_path, "--evaluation")[1]
    assert "step 3: 4 of 4 samples" in inspect(tmp_path, "--evaluation", "sums")[1]
    status, _, error = inspect(tmp_path, "--evaluation", "none")
    assert status == 1 and f"{tmp_path / 'rollouts' / 'eval' / 'none'}: expected step_" in error
    assert "step 12: 4 of 4 samples" in inspect(run_dir, "--evaluation")[1]


def test_what_is_missing_is_named(run_dir, inspect, tmp_path):
    status, _, error = inspect(run_dir, "--step", 99)
    assert status == 1
    assert "step_000099.rank0.safetensors: expected the tensors of a recorded step" in error
    status, _, error = inspect(tmp_path)
    assert status == 1 and "config.yaml: expected a readable YAML" in error


def test_a_measured_tolerance_is_read_from_the_metrics(tmp_path):
    above = ConstraintConfig(tolerance=0.004, tolerance_above="fresh_gap")
    for given in (ConstraintConfig(tolerance=0.004), replace(above, enabled=False)):
        assert inspect_rollouts.tolerance_of(given, tmp_path) == 0.004
    measured = (ConstraintConfig(tolerance="auto"), above)
    for each in measured:
        with pytest.raises(DataError, match="constraint/tolerance"):
            inspect_rollouts.tolerance_of(each, tmp_path)
    lines = ('{"step": 1}', '{"step": 2, "constraint/tolerance": 0.0031}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [inspect_rollouts.tolerance_of(each, tmp_path) for each in measured] == [0.0031] * 2
