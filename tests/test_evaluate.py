"""`python -m megatron_rl.evaluate` without an engine: what is asked, written and printed; and what
it refuses before anything is started.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl import evaluate as evaluate_module
from megatron_rl.config import (
    Config,
    DataConfig,
    EnvironmentConfig,
    EvalConfig,
    EvalSetConfig,
    ModelConfig,
    ParallelConfig,
    QuantizationConfig,
    RolloutConfig,
    SamplingConfig,
    TaskConfig,
)
from megatron_rl.config.file import load_config
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.errors import ConfigError, DataError, EngineError
from megatron_rl.evaluate import evaluate, new_folder
from megatron_rl.process.command import Progress
from megatron_rl.records import Score
from megatron_rl.rollout.recording import read_step
from tests.e2e.episode_tool import REPLY
from tests.fakes.engine import FakeEngine
from tests.fakes.engine_pool import FakePool
from tests.fakes.groups import make_scores

VOCABULARY = 128


class FakeScorer:
    """Every second question is answered right by its first response alone."""

    def __init__(self, config: Any, verifiers: dict[str, Any], keys: dict[str, str]) -> None:
        self.verifiers = verifiers

    def __enter__(self) -> FakeScorer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def score(self, groups: Any) -> list[tuple[Score, ...]]:
        assert {group.prompt.source for group in groups} == set(self.verifiers)
        return [
            make_scores(float(g.prompt.index % 2 == 0), *[0.0] * (len(g.rollouts) - 1))
            for g in groups
        ]

    score_texts = score

    def crashes(self, prompts: Any, verifier: str) -> list[str]:
        return ["KeyError: 'x' (own.py:3)"] * len(prompts)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was started, and the pool."""
    log: list[str] = []
    found: dict[str, Any] = {"log": log, "pool": FakePool()}

    def start(config: Config, folder: Path, **keywords: Any) -> list[FakeEngine]:
        log.append("engines")
        found.update(keywords, config=config, folder=folder)
        return [FakeEngine(log)] * config.rollout.num_engines

    def pool(addresses: Any, config: Any, **keywords: Any) -> FakePool:
        found.update(keywords, addresses=addresses)
        return found["pool"]

    monkeypatch.setattr(evaluate_module, "start_engines_of", start)
    monkeypatch.setattr(evaluate_module, "register_cleanup", lambda cleanup: None)
    monkeypatch.setattr(evaluate_module, "check_given", lambda given: None)
    monkeypatch.setattr(evaluate_module, "HttpEnginePool", pool)
    monkeypatch.setattr(evaluate_module, "Scorer", FakeScorer)
    return found


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> Config:
    """Two sets, of five and four questions."""
    lines = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(5)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = EvalSetConfig(name="sums", path=str(path), num_samples=4, pass_at=[1, 2])
    second = EvalSetConfig(name="few", path=str(path), num_rows=4)
    sampling = SamplingConfig(max_tokens=8)
    return Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_checkpoint)),
        parallel=ParallelConfig(tensor=2),
        eval=EvalConfig(
            num_samples=2,
            sets=[replace(first, sampling=sampling), replace(second, sampling=sampling)],
        ),
    )


def test_the_figures_are_printed_and_written(
    started: dict[str, Any], config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(config, Progress())
    folder = Path(config.run_dir) / "evaluations" / "0001"
    assert started["log"] == ["engines", "ready", "stop"]
    assert started["folder"] == folder and not started["is_sent_weights"]
    assert started["config"].parallel.tensor == 1  # there is no learner
    assert 2 in started["end_token_ids"]
    results = json.loads((folder / "results.json").read_text())
    figures = results["figures"]
    assert figures["eval/sums/avg_at_4"] == pytest.approx(3 / 5 / 4)
    # One of four responses is right for three of five questions.
    assert figures["eval/sums/pass_at_2"] == pytest.approx(3 / 5 / 2)
    assert results["sets"]["sums"]["figures"]["pass_at_1"] == figures["eval/sums/pass_at_1"]
    assert results["sets"]["few"]["num_questions"] == 4
    assert results["sets"]["few"]["sampling"]["max_tokens"] == 8
    assert results["model"] == config.model.path and results["weights_version"] == 0
    mean = (figures["eval/sums/avg_at_4"] + figures["eval/few/avg_at_2"]) / 2
    assert figures["eval/mean_of_sets"] == pytest.approx(mean)
    assert len(read_step(folder / "rollouts" / "sums", 0)) == 5
    assert load_config(folder / "config.yaml").eval == config.eval
    printed = capsys.readouterr().out
    assert "avg@4 0.150" in printed and "pass@2 0.300" in printed and str(folder) in printed
    # A request of one token asked for the weights' version; then every question once.
    probe, *asked = started["pool"].requests
    assert (probe.num_samples, probe.sampling.max_tokens) == (1, 1)
    assert [request.num_samples for request in asked] == [4] * 5 + [2] * 4
    assert len({request.seed for request in asked}) == 9


def test_the_environment_of_a_run_is_that_of_its_evaluations(
    started: dict[str, Any], config: Config
) -> None:
    """The tool replies to the first two turns; each of the fake engine's turns is only its end."""
    started["pool"] = FakePool(end_probability=1.0)
    environment = EnvironmentConfig(name="tests.e2e.episode_tool:reply", num_workers=1)
    rollout = replace(config.rollout, environment=environment)
    sets = [replace(config.eval.sets[0], num_rows=1, sampling=SamplingConfig(max_tokens=32))]
    evaluate(replace(config, rollout=rollout, eval=replace(config.eval, sets=sets)), Progress())
    folder = Path(config.run_dir) / "evaluations" / "0001"
    [scored] = read_step(folder / "rollouts" / "sums", 0)
    tokenizer = load_tokenizer(config.model.path, VOCABULARY)
    num_prompt = len(scored.group.prompt.token_ids)
    for each in scored.group.rollouts:
        assert each.num_response_tokens == 3
        replies = each.token_ids[num_prompt:][~each.loss_mask[num_prompt:]]
        assert tokenizer.decode(replies).split() == [REPLY] * 2


def test_a_set_that_could_not_be_scored_is_in_the_table_and_in_one_line(
    started: dict[str, Any],
    config: Config,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(_: object, groups: Any) -> list[tuple[Score, ...]]:
        return [
            make_scores(*[None if g.prompt.source == "eval/few" else 0.0] * len(g.rollouts))
            for g in groups
        ]

    monkeypatch.setattr(FakeScorer, "score", crash)
    evaluate(config, Progress())
    folder = Path(config.run_dir) / "evaluations" / "0001"
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("│ few ") and " 1.000 " in line for line in lines) == 1
    of_few, of_sums = [line for line in lines if line.startswith("hint: ")]
    assert of_sums.startswith("hint: eval sums: the verifier found an answer in none of the")
    assert of_few.startswith("hint: eval few: its verifier could score none of the responses")
    assert of_few.endswith(f"inspect_rollouts.py {folder} --evaluation few")


def test_the_held_out_prompts_of_a_run_are_a_set_too(
    started: dict[str, Any], config: Config, tmp_path: Path
) -> None:
    task = TaskConfig(name="train", path=str(tmp_path / "sums.jsonl"))
    data = DataConfig(tasks=[task], num_held_out=2, max_prompt_tokens=20)
    short = SamplingConfig(max_tokens=8)
    config = replace(
        config,
        data=data,
        eval=replace(config.eval, skip=["few"], sampling=short),
        rollout=replace(config.rollout, sampling=short),
    )
    progress = Progress()
    evaluate(config, progress)
    results = json.loads((Path(config.run_dir) / "evaluations/0001/results.json").read_text())
    assert list(results["sets"]) == ["held-out prompts", "sums"]
    assert (
        results["figures"]["eval/avg_at_2"]
        == results["sets"]["held-out prompts"]["figures"]["avg_at_2"]
    )
    assert progress.describe() == "7 of 7 questions answered"


def test_engines_that_were_given_say_which_weights_they_serve(
    started: dict[str, Any], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_RL_TOKEN", "t")
    urls = ["http://one:1", "http://two:1"]
    config = replace(config, rollout=RolloutConfig(num_engines=0, urls=urls))
    started["pool"] = FakePool(urls, weight_version=7)
    evaluate(config, Progress())
    assert [address.url for address in started["addresses"]] == urls
    results = json.loads((Path(config.run_dir) / "evaluations/0001/results.json").read_text())
    assert results["weights_version"] == 7

    class Different(FakePool):
        def _completion(self, request: Any, seed: int) -> Any:
            self.weight_version = request.key
            return super()._completion(request, seed)

    started["pool"] = Different(urls)
    with pytest.raises(
        EngineError, match="same weights, got versions 0 at http://one:1, 1 at http://two:1"
    ):
        evaluate(config, Progress())


def test_what_it_cannot_do_is_said_before_anything_is_started(
    started: dict[str, Any], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = config.eval
    for changed, error, expected in (
        ({"replay": "x"}, ConfigError, "replay: expected none, since an evaluation samples"),
        ({"eval": EvalConfig()}, ConfigError, "eval.sets: expected a set to evaluate on, or data"),
        (
            {
                "eval": replace(
                    evaluation, sets=[replace(evaluation.sets[0], verifier="json:loads")]
                )
            },
            ConfigError,
            r"eval\.sets\[0\]\.verifier: expected a function .* json:loads on each of",
        ),
        (
            {"eval": replace(evaluation, sets=[replace(evaluation.sets[0], path="gone.jsonl")])},
            DataError,
            r"found none for sums at gone.jsonl: .* eval.skip=\[sums\]",
        ),
    ):
        with pytest.raises(error, match=expected):
            evaluate(replace(config, **changed), Progress())
    far = replace(config, rollout=replace(config.rollout, placement="nodes"))
    with pytest.raises(ConfigError, match=r"expected engines that an evaluation starts itself"):
        evaluate(far, Progress())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="expected one process, got WORLD_SIZE=2: start it with"):
        evaluate(config, Progress())
    assert started["log"] == []
    assert not Path(config.run_dir).exists()


def test_every_evaluation_has_a_folder_of_its_own(tmp_path: Path) -> None:
    names = [new_folder(tmp_path / "evaluations").name for _ in range(3)]
    assert names == ["0001", "0002", "0003"]
    with pytest.raises(ConfigError, match="run_dir=/proc/nowhere: expected a folder that can be"):
        new_folder(Path("/proc/nowhere/evaluations"))


def test_weight_only_formats_are_rounded_in_the_engines_checkpoint(
    config: Config, tmp_path: Path
) -> None:
    """No sync sends these engines the rounded weights."""
    from megatron_rl.engine.checkpoint import engine_model
    from megatron_rl.weights.huggingface import CheckpointReader
    from megatron_rl.weights.quantization import rounded

    quantization = QuantizationConfig(format="int4")
    rollout = RolloutConfig(quantization=quantization)
    model = config.model.path
    assert engine_model(rollout, model, tmp_path / "a") == model
    folder = engine_model(rollout, model, tmp_path / "a", is_sent_weights=False)
    name = "model.layers.0.mlp.down_proj.weight"
    original, written = (CheckpointReader(each).read(name, None, 0, 0) for each in (model, folder))
    assert not original.equal(written)
    assert written.equal(rounded(quantization, original))
    plain = RolloutConfig()
    assert engine_model(plain, model, tmp_path / "b", is_sent_weights=False) == model
