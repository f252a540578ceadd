"""Which rank of a run holds what, and what is ended when: with stand-ins for the engine, the
learner and the process groups.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config import (
    Config,
    DataConfig,
    EvalSetConfig,
    LoopConfig,
    ModelConfig,
    RewardTerm,
    SamplingConfig,
    TaskConfig,
)
from megatron_rl.errors import ConfigError, DataError, NothingToDo
from megatron_rl.loop import engines as loop_engines
from megatron_rl.loop import run as loop_run
from megatron_rl.loop import senders as loop_senders
from megatron_rl.loop.inputs import run_inputs
from megatron_rl.loop.parts import Run
from megatron_rl.loop.preflight import prepare_data
from megatron_rl.loop.run import start_run
from megatron_rl.loop.start_lines import starting_line
from megatron_rl.process.command import Progress
from megatron_rl.rollout.live import LiveSource
from megatron_rl.rollout.replay import ReplaySource
from tests.fakes.engine import FakeEngine
from tests.fakes.learner import FakeParallel

ADDRESS = FakeEngine.address


@dataclass(kw_only=True)
class RankParallel(FakeParallel):
    """Also hands rank 0's value on, as the other ranks see it."""

    device: Any = field(default_factory=lambda: SimpleNamespace(type="cpu"))
    first_value: Any = None

    def from_first_rank(self, value: Any) -> Any:
        return value if self.rank == 0 else self.first_value


class FakeContext:
    """Stands in for scorer and publisher."""

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        self.positional, self.keywords = positional, keywords

    def __enter__(self) -> FakeContext:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def score(self, groups: Any, *, with_group_verifier: bool = False) -> list:
        return []

    score_texts = score

    def crashes(self, prompts: Any, verifier: str) -> list[str | None]:
        return ["KeyError: 'x' (own.py:3)"] * len(prompts)

    def rejections(self, prompts: Any) -> list[str | None]:
        return [None if prompt.answer == "2" else "not 2" for prompt in prompts]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a start did, in order."""
    log: list[str] = []

    def note(name: str, result: Any = None) -> Any:
        def call(*positional: Any, **keywords: Any) -> Any:
            log.append(name)
            return result

        return call

    monkeypatch.setattr(loop_engines, "start_engines_of", note("engines", [FakeEngine(log)]))
    monkeypatch.setattr(loop_engines, "register_cleanup", note("cleanup"))
    monkeypatch.setattr(loop_run, "shut_down_parallel", note("shut down"))
    monkeypatch.setattr(
        loop_run,
        "Learner",
        note(
            "learner",
            SimpleNamespace(
                implementations="own (test)",
                logprob_backend="C++ (test)",
                trained=object(),
                geometry=object(),
                parallel=RankParallel(rank=1),
            ),
        ),
    )
    monkeypatch.setattr(loop_run, "Scorer", note("scorer", FakeContext()))
    monkeypatch.setattr(loop_senders, "Publisher", FakeContext)
    return log


def make_config(folder: Path, model: Path, **changes: Any) -> Config:
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"question": "1+1=", "answer": "2"}\n')
    config = Config(
        run_dir=str(folder / "run"),
        model=ModelConfig(path=str(model)),
        data=DataConfig(tasks=[TaskConfig(path=str(prompts), verifier="exact")], num_held_out=0),
        loop=LoopConfig(num_steps=3),
    )
    rollout = replace(config.rollout, sampling=replace(config.rollout.sampling, max_tokens=32))
    evaluation = replace(config.eval, sampling=replace(config.eval.sampling, max_tokens=32))
    return replace(config, **({"rollout": rollout, "eval": evaluation} | changes))


def start_as(monkeypatch: pytest.MonkeyPatch, config: Config, parallel: RankParallel) -> Run:
    """Start and end at once; what was held in between."""
    monkeypatch.setenv("RANK", str(parallel.rank))
    monkeypatch.setattr(loop_run, "initialize_parallel", lambda *_, **__: parallel)
    with start_run(config, Progress()) as run:
        return run


def test_rank_0_starts_the_engines_and_holds_everything(
    log: list[str], monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tiny_checkpoint)
    run = start_as(monkeypatch, config, RankParallel())
    # Before the learner, so that both load at once; and they end last.
    assert log == ["engines", "cleanup", "learner", "scorer", "ready", "shut down", "stop"]
    assert isinstance(run.source, LiveSource)
    assert run.crew.serving == (ADDRESS.url,)
    assert run.link is not None and run.link.pool.urls == run.crew.serving
    assert run.evaluator is not None and run.evaluator.sets == ()
    assert (run.was_resumed, run.state.step) == (False, 0)
    assert tuple(run.verifiers) == ("prompts",)
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_the_named_sets_are_evaluated_beside_the_held_out_prompts(
    log: list[str], monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tiny_checkpoint)
    path = tmp_path / "set.jsonl"
    path.write_text('{"question": "2+2=", "answer": "4"}\n{"question": "2+3=", "answer": "5"}\n')
    one = EvalSetConfig(name="two", path=str(path), sampling=SamplingConfig(max_tokens=32))
    config = replace(config, eval=replace(config.eval, sets=[one]))
    run = start_as(monkeypatch, config, RankParallel())
    assert run.evaluator is not None
    [found] = run.evaluator.sets
    assert (found.name, [prompt.answer for prompt in found.prompts]) == ("two", ["4", "5"])
    assert tuple(run.verifiers) == ("prompts",)  # of the training data alone
    never = replace(config.eval, at_start=False, at_end=False)
    run = start_as(monkeypatch, replace(config, eval=never), RankParallel())
    assert run.evaluator is not None and run.evaluator.sets == ()


@pytest.mark.parametrize("is_head", [True, False])
def test_other_ranks_start_no_engine(
    is_head: bool,
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    parallel = RankParallel(rank=1, is_replica_head=is_head, first_value=[ADDRESS])
    run = start_as(monkeypatch, make_config(tmp_path, tiny_checkpoint), parallel)
    assert "engines" not in log
    assert run.crew.serving == (ADDRESS.url,)  # known to every rank, for the probe's errors
    assert run.link is None
    assert (run.source is not None, run.evaluator is not None) == (is_head, is_head)


def test_a_replay_has_no_engines(
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
    recorded_rollouts: Path,
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path, tiny_checkpoint, replay=str(recorded_rollouts))
    run = start_as(monkeypatch, config, RankParallel())
    assert log == ["learner", "shut down"]
    assert isinstance(run.source, ReplaySource)
    assert (run.evaluator, run.link, run.crew) == (None, None, None)


def test_an_error_ends_the_engines_and_leaves_the_groups(
    log: list[str], monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The other ranks would report a closed connection before this rank's own error."""
    parallel = RankParallel()
    monkeypatch.setattr(loop_run, "initialize_parallel", lambda *_, **__: parallel)
    with (
        pytest.raises(RuntimeError, match="in a step"),
        start_run(make_config(tmp_path, tiny_checkpoint), Progress()),
    ):
        raise RuntimeError("in a step")
    assert log[-1] == "stop" and "shut down" not in log


def test_wrong_settings_are_found_before_a_process_is_started(
    log: list[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tiny_checkpoint, replay=str(tmp_path / "nowhere"))
    expected = pytest.raises(ConfigError, match="replay: expected a run's rollouts/ folder")
    with expected, start_run(config, Progress()):
        pass
    assert log == []


@pytest.mark.parametrize("changes", [{"verifier": "no_such.module:f"}, {"group": "no_such"}])
def test_an_unknown_verifier_is_found_before_a_process_is_started(
    changes: dict[str, str], log: list[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tiny_checkpoint)
    if "verifier" in changes:
        task = replace(config.data.tasks[0], verifier=changes["verifier"])
        config = replace(config, data=replace(config.data, tasks=[task]))
    else:
        config = replace(config, reward=replace(config.reward, group_verifier="no_such.module:f"))
    expected = pytest.raises(ConfigError, match=r"verifier: expected .* no module 'no_such.module'")
    with expected, start_run(config, Progress()):
        pass
    assert log == []


def test_the_expected_answers_are_checked(
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(tmp_path, tiny_checkpoint)
    start_as(monkeypatch, config, RankParallel())
    tried = "prompts: of 1 expected answers, tried as responses, exact accepts all"
    assert tried in capsys.readouterr().out
    log.clear()
    rows = ('{"question": "1+1=", "answer": "2"}', '{"question": "1+x=", "answer": "x+1"}')
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    task = replace(config.data.tasks[0], verifier="numeric")
    config = replace(config, data=replace(config.data, tasks=[task]))
    expected = r"prompts.jsonl, line 2: column 'answer' .* expected a number, got 'x\+1'"
    with pytest.raises(DataError, match=expected), start_run(config, Progress()):
        pass
    assert log == []


def test_a_function_that_fails_on_every_expected_answer_ends_the_start(
    log: list[str], monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tiny_checkpoint)
    terms = [RewardTerm(verifier="exact"), RewardTerm(verifier="json:loads")]
    task = replace(config.data.tasks[0], verifier="auto", rewards=terms)
    config = replace(config, data=replace(config.data, tasks=[task]))
    expected = r"^data\.tasks\[0\]\.rewards\[1\]\.verifier: .* json:loads .* KeyError: 'x' \(own"
    with pytest.raises(ConfigError, match=expected):
        start_as(monkeypatch, config, RankParallel())


def test_a_resumed_run_takes_the_state_and_forgets_later_steps(
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(tmp_path, tiny_checkpoint)
    run_dir = tmp_path / "run"
    step = run_dir / "checkpoints" / "step_000002"
    step.mkdir(parents=True)
    prompts = prepare_data(config)[2]
    saved = {
        "step": 2,
        "next_prompt": 128,
        "dual": {"value": 0.7, "num_updates": 2},
        "inputs": run_inputs(config, prompts),
    }
    saved["inputs"]["settings"]["objective"]["clip_high"] = 0.1
    (step / "run_state.json").write_text(json.dumps({"run": saved}))
    (run_dir / "checkpoints" / "latest").write_text("step_000002\n")
    (run_dir / "sync.jsonl").write_text('{"version": 1}\n{"version": 2}\n')
    monkeypatch.setattr(loop_run, "load_checkpoint", lambda folder, trained: saved)
    run = start_as(monkeypatch, config, RankParallel())
    assert run.was_resumed and run.inputs["rows"] == prompts.fingerprints()
    said = capsys.readouterr().out.splitlines()
    assert said[:5] == [
        f"starting: 1 engine (logs in {run_dir / 'logs'}) and the learner on 1 rank",
        f"engines: {ADDRESS.url} (given)",
        "checkpoint step_000002: not verified, as it has no SHA256SUMS",
        f"resumed after step 2, at prompt 128, from {step}",
        "changed since then: objective.clip_high: 0.1 became 0.24",
    ]
    assert (run.state.step, run.state.next_prompt, run.state.dual.value) == (2, 128, 0.7)
    assert (run_dir / "sync.jsonl").read_text() == '{"version": 1}\n'
    log.clear()
    checkpoint = replace(config.checkpoint, save_hf=False)
    with pytest.raises(NothingToDo, match="all 2 steps are done"):
        finished = replace(config, loop=LoopConfig(num_steps=2), checkpoint=checkpoint)
        start_as(monkeypatch, finished, RankParallel())
    assert log == []  # neither engines nor a learner
    saved["inputs"]["data"]["seed"] = 7
    (step / "run_state.json").write_text(json.dumps({"run": saved}))
    with pytest.raises(ConfigError, match=r"others in data\.seed: 7 became 0"):
        start_as(monkeypatch, config, RankParallel())
    (step / "run_state.json").write_text("{")
    with pytest.raises(DataError, match=r"step_000002: expected a whole run_state\.json"):
        start_as(monkeypatch, config, RankParallel())
    assert log == []  # before a process was started


def test_what_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = replace(Config(), run_dir="runs/x")
    two = replace(config, rollout=replace(config.rollout, num_engines=2))
    learner = "the learner on 4 ranks"
    assert starting_line(two) == f"starting: 2 engines (logs in runs/x/logs) and {learner}"
    assert starting_line(replace(config, replay="runs/y/rollouts")) == f"starting: {learner}"
    given = replace(config.rollout, num_engines=0, urls=["http://a:1"])
    told = f"starting: {learner}; the engines of rollout.urls are given"
    assert starting_line(replace(config, rollout=given)) == told


def test_the_last_words_say_where_the_run_is(
    log: list[str], monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    progress, parallel = Progress(), RankParallel()
    monkeypatch.setattr(loop_run, "initialize_parallel", lambda *_, **__: parallel)
    with start_run(make_config(tmp_path, tiny_checkpoint), progress) as run:
        next(run.state.steps(3))
        with run.stopwatch.time("learner"):
            words = progress.describe()
    assert words == "in step 1, phase learner; no checkpoint was written yet"
