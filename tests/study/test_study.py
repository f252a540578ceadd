"""Which runs a study starts, and what it does after a failure. No processes here: real runs are in
tests/tools/test_study_discrepancy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rl.config.file import load_config
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.study import study as plan
from megatron_rl.study.study import Study, choose, load_studies, run_study, served_settings

STUDY = Study(
    model="",
    config="configs/quickstart.yaml",
    settings=("loop.num_steps=2",),
    seeds=(0, 1),
    more_seeds=(),
    engines={"bf16": (), "int4": ("rollout.quantization.format=int4",)},
    arms={"grpo": ("objective.constraint.enabled=false",), "dc_grpo": ()},
)


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """`run_with(study, fails, dies)` runs a study without processes; returns what was started."""

    def run_with(study: Study, fails: str = "", dies: bool = False, jobs: int = 1) -> list[str]:
        started: list[str] = []
        server = SimpleNamespace(is_alive=lambda: not (dies and fails in started))

        @contextmanager
        def engines(config: object, folder: Path, *, count: int):
            yield [server] * count

        def run(config, settings, folder, *, engine, num_threads):
            assert engine is server and num_threads >= 1
            started.append(str(folder.relative_to(tmp_path)))
            if started[-1] == fails:
                raise EngineError("expected the run to succeed")

        monkeypatch.setattr(plan, "shared_engines", engines)
        monkeypatch.setattr(plan, "run_to_the_end", run)
        try:
            run_study(study, [], tmp_path, jobs)
        except EngineError as error:
            started.append(str(error))
        return started

    return run_with


def test_every_run_of_every_engine(run_with: Callable[..., list[str]]) -> None:
    started = run_with(STUDY)
    assert started == [f"{engine}/{arm}/seed_{seed}" for engine, arm, seed in STUDY.runs()]
    assert sorted(run_with(STUDY, jobs=3)) == sorted(started)


def test_a_run_that_fails_is_told_and_the_others_go_on(run_with: Callable[..., list[str]]) -> None:
    *started, told = run_with(STUDY, fails="bf16/dc_grpo/seed_0")
    assert len(started) == 8
    assert told.endswith("got failures of bf16/dc_grpo/seed 0")


def test_a_dead_engine_ends_its_runs_and_not_another_engines(
    run_with: Callable[..., list[str]],
) -> None:
    *started, told = run_with(STUDY, fails="bf16/dc_grpo/seed_0", dies=True)
    assert started[:2] == ["bf16/grpo/seed_0", "bf16/dc_grpo/seed_0"]
    assert started[2] == "int4/grpo/seed_0"
    assert "bf16/grpo/seed 1, bf16/dc_grpo/seed 1" in told


def test_arms_share_their_engine() -> None:
    arms = {"grpo": (), "float32": ("rollout.dtype=float32",)}
    study = Study(**{**fields_of(STUDY), "arms": arms})
    with pytest.raises(ConfigError, match="arm float32: expected the rollout settings and the mo"):
        run_study(study, [], Path("nowhere"), 1)
    with pytest.raises(ConfigError, match="--jobs: expected at least 1, got 0"):
        run_study(STUDY, [], Path("nowhere"), 0)


def fields_of(study: Study) -> dict[str, object]:
    return {name: getattr(study, name) for name in Study.__dataclass_fields__}


def test_what_the_command_line_says_wins(
    run_with: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_with(STUDY)
    given: list[list[str]] = []
    monkeypatch.setattr(
        plan, "run_to_the_end", lambda _, settings, *__, **___: given.append(settings)
    )
    run_study(STUDY, ["loop.num_steps=7", "rollout.dtype=float32"], tmp_path, 1)
    assert len(given) == len(STUDY.runs())
    for settings in given:
        config = load_config(STUDY.config, settings)
        assert (config.loop.num_steps, config.rollout.dtype) == (7, "float32")


def test_a_part_of_a_study() -> None:
    assert choose(STUDY, None, None) == STUDY
    assert choose(STUDY, "int4", "grpo").runs() == [("int4", "grpo", 0), ("int4", "grpo", 1)]
    with pytest.raises(ConfigError, match="--arms: expected some of grpo, dc_grpo, got 'tis'"):
        choose(STUDY, None, "grpo,tis")


MODELS = """
models:
  small: {config: configs/quickstart.yaml, settings: [loop.seed=1]}
  large: {config: configs/gsm8k.yaml, settings: [], engines: [int4], arms: [grpo, dc_grpo]}
settings: [loop.num_steps=2]
seeds: [0, 1]
more_seeds: [2]
engines: {bf16: [], int4: [rollout.quantization.format=int4]}
arms: {grpo: [objective.constraint.enabled=false], tis: [], dc_grpo: []}
"""


def test_a_file_with_two_models_is_two_studies(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(MODELS)
    small, large = load_studies(path)
    assert (small.model, small.config) == ("small", "configs/quickstart.yaml")
    assert small.settings == ("loop.num_steps=2", "loop.seed=1")
    assert (list(small.engines), list(small.arms)) == (["bf16", "int4"], ["grpo", "tis", "dc_grpo"])
    assert (list(large.engines), list(large.arms)) == (["int4"], ["grpo", "dc_grpo"])
    assert small.seeds == (0, 1) and large.more_seeds == (2,)
    path.write_text(MODELS.replace("[grpo, dc_grpo]", "[grpo, dcgrpo]"))
    with pytest.raises(ConfigError, match=r"expected config or models, settings.*'dcgrpo'"):
        load_studies(path)


def test_a_shared_server_can_send_the_heads_that_an_arm_needs() -> None:
    centred = (
        "objective.score_centering.enabled=true",
        "objective.score_centering.num_logprobs=40",
    )
    plain = served_settings(STUDY, "bf16", [])
    assert plain.objective.score_centering.num_requested == 0
    study = Study(**{**fields_of(STUDY), "arms": {"grpo": (), "centred": centred}})
    assert served_settings(study, "bf16", []).objective.score_centering.num_requested == 40
    assert served_settings(study, "bf16", []).rollout == plain.rollout
