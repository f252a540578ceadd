"""A resumed run whose data or model are not as they were, also where only a content changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.config import (
    Config,
    DataConfig,
    EvalSetConfig,
    LoopConfig,
    ModelConfig,
    TaskConfig,
)
from megatron_rl.errors import ConfigError
from megatron_rl.loop.inputs import Inputs, changed_settings, check_same_inputs, run_inputs
from megatron_rl.loop.preflight import prepare_data, prepare_model, prepare_sets

FOLDER = Path("runs/a/checkpoints/step_000002")
ROWS = [{"question": f"{n}+0", "answer": str(n), "tests": n} for n in range(100, 164)]


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> Config:
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    task = TaskConfig(path=str(tmp_path / "rows.jsonl"), verifier="exact")
    config = Config(
        model=ModelConfig(path=str(model)), data=DataConfig(tasks=[task], num_held_out=0)
    )
    rollout = replace(config.rollout, sampling=replace(config.rollout.sampling, max_tokens=32))
    evaluation = replace(config.eval, sampling=replace(config.eval.sampling, max_tokens=32))
    write_rows(config, ROWS)
    return replace(config, rollout=rollout, eval=evaluation)


def write_rows(config: Config, rows: list[dict[str, Any]]) -> None:
    path = Path(config.data.tasks[0].path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def inputs_of(config: Config) -> Inputs:
    _, _, stream = prepare_data(config)
    return json.loads(json.dumps(run_inputs(config, stream)))


def with_data(config: Config, **changes: Any) -> Config:
    return replace(config, data=replace(config.data, **changes))


def with_task(config: Config, **changes: Any) -> Config:
    return with_data(config, tasks=[replace(config.data.tasks[0], **changes)])


def test_the_same_inputs_pass(config: Config) -> None:
    saved = inputs_of(config)
    check_same_inputs(saved, inputs_of(config), FOLDER)
    assert changed_settings(saved, inputs_of(config)) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": f"{n}+9", "answer": str(n + 9)} for n in range(10)] + ROWS,
            "64 .*became 74",
        ),
        (
            [row | {"answer": "0"} for row in ROWS],
            "64 different rows with other contents, or in an",
        ),
        (ROWS[::-1], "64 different rows with other contents, or in another order"),
        ([row | {"question": row["question"] + " "} for row in ROWS], "64 .* other contents"),
        (
            [row | {"tests": 0} for row in ROWS],
            r"64 .* other contents.*\(all columns are compared\)",
        ),
        (ROWS[:-1], "64 different rows became 63"),
    ],
    ids=["in front", "answers", "order", "questions", "another column", "fewer"],
)
def test_other_rows_are_refused(rows: list[dict[str, Any]], message: str, config: Config) -> None:
    saved = inputs_of(config)
    write_rows(config, rows)
    with pytest.raises(
        ConfigError, match=rf"data\.tasks\[0\] \(.*rows\.jsonl\): {message}"
    ) as caught:
        check_same_inputs(saved, inputs_of(config), FOLDER)
    assert str(FOLDER) in str(caught.value) and "\n" not in str(caught.value)


def test_rows_that_change_no_prompt_pass(config: Config, tmp_path: Path) -> None:
    """Repeats that are taken out, another place, another format."""
    saved = inputs_of(config)
    write_rows(config, ROWS + ROWS[:5])
    check_same_inputs(saved, inputs_of(config), FOLDER)
    moved = tmp_path / "elsewhere.json"
    moved.write_text(json.dumps(ROWS))
    present = inputs_of(with_task(config, path=str(moved)))
    check_same_inputs(saved, present, FOLDER)
    [line] = changed_settings(saved, present)
    assert line.startswith("data.tasks[0].path: ") and line.endswith('elsewhere.json"')


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 3}, r"data\.seed: 0 became 3"),
        ({"num_held_out": 4}, r"data\.num_held_out: 0 became 4"),
        ({"repeats": "keep"}, r"data\.repeats: 'drop' became 'keep'"),
        ({"system_prompt": "Be brief."}, r"data\.system_prompt: '' became 'Be brief\.'"),
        ({"overlong": "drop"}, r"data\.max_prompt_tokens: 0 became 224"),
    ],
)
def test_other_data_settings_are_refused(changes: dict, key: str, config: Config) -> None:
    saved = inputs_of(config)
    with pytest.raises(ConfigError, match=rf"got others in {key}; choose another run_dir"):
        check_same_inputs(saved, inputs_of(with_data(config, **changes)), FOLDER)


def test_settings_of_a_task_too_and_the_content_of_a_template(
    config: Config, tmp_path: Path
) -> None:
    saved = inputs_of(config)
    for changes, key in (
        ({"template": "{prompt}="}, r"tasks\[0\]\.template"),
        ({"weight": 2.0}, r"tasks\[0\]\.weight"),
    ):
        with pytest.raises(ConfigError, match=rf"others in data\.{key}"):
            check_same_inputs(saved, inputs_of(with_task(config, **changes)), FOLDER)
    template = tmp_path / "a.jinja"
    template.write_text("{{ messages[0].content }}")
    config = with_data(config, chat_template_file=str(template))
    saved = inputs_of(config)
    template.write_text("{{ messages[0].content }}!")
    with pytest.raises(ConfigError, match=r"data\.chat_template_file: 'a file with hash"):
        check_same_inputs(saved, inputs_of(config), FOLDER)


def test_a_limit_matters_only_where_prompts_are_dropped(config: Config) -> None:
    saved = inputs_of(config)
    check_same_inputs(saved, inputs_of(with_data(config, max_prompt_tokens=9)), FOLDER)
    dropping = with_data(config, overlong="drop", max_prompt_tokens=9)
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens: 9 became 10"):
        longer = with_data(dropping, max_prompt_tokens=10)
        check_same_inputs(inputs_of(dropping), inputs_of(longer), FOLDER)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_another_model_is_refused_also_in_the_same_place(name: str, config: Config) -> None:
    saved = inputs_of(config)
    path = Path(config.model.path) / name
    if name == "model.safetensors":
        tensors = {key: torch.zeros_like(value) for key, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path.write_text(path.read_text() + "\n")
    with pytest.raises(ConfigError, match=rf"model of .* \(model\.path\), .* contents of {name};"):
        check_same_inputs(saved, inputs_of(config), FOLDER)


def test_a_copy_of_the_model_elsewhere_passes(config: Config, tmp_path: Path) -> None:
    copy = shutil.copytree(config.model.path, tmp_path / "copy")
    present = inputs_of(replace(config, model=ModelConfig(path=str(copy))))
    saved = inputs_of(config)
    check_same_inputs(saved, present, FOLDER)
    assert [line.partition(":")[0] for line in changed_settings(saved, present)] == ["model.path"]


def test_a_reference_with_other_contents_is_refused_and_another_one_told(
    config: Config, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def with_reference(path: Path) -> Config:
        kl = replace(config.objective.kl, reference=str(path), coefficient=0.1)
        return replace(config, objective=replace(config.objective, kl=kl))

    first = shutil.copytree(tiny_checkpoint, tmp_path / "first")
    saved = inputs_of(with_reference(first))
    second = shutil.copytree(tiny_checkpoint, tmp_path / "second")
    (second / "generation_config.json").write_text("{}")
    present = inputs_of(with_reference(second))
    check_same_inputs(saved, present, FOLDER)
    assert len(changed_settings(saved, present)) == 1
    (first / "generation_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"reference of .* \(objective\.kl\.reference\)"):
        check_same_inputs(saved, inputs_of(with_reference(first)), FOLDER)


def test_other_questions_of_an_evaluation_set_are_refused_and_other_settings_told(
    config: Config, tmp_path: Path
) -> None:
    def inputs(rows: list[dict[str, Any]], **changes: Any) -> Inputs:
        path = tmp_path / "test.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        questions = EvalSetConfig(name="sums", path=str(path), verifier="exact")
        questions = replace(questions, sampling=config.eval.sampling, **changes)
        own = replace(config, eval=replace(config.eval, sets=[questions]))
        geometry, tokenizer = prepare_model(own)
        sets = prepare_sets(own, geometry, tokenizer)
        return run_inputs(own, prepare_data(own)[2], sets)

    rows = ROWS[:9]
    saved = inputs(rows)
    check_same_inputs(saved, inputs(rows), FOLDER)
    for other in (rows[::-1], rows[1:], [row | {"tests": 0} for row in rows]):
        with pytest.raises(ConfigError, match=r"questions of .* in the evaluation set sums, got"):
            check_same_inputs(saved, inputs(other), FOLDER)
    fewer = inputs(rows, num_rows=5)
    check_same_inputs(saved, fewer, FOLDER)
    assert changed_settings(saved, fewer) == ["eval.sets[0].num_rows: 0 became 5"]


def test_other_settings_are_told_one_line_each(config: Config) -> None:
    saved = inputs_of(config)
    optimizer = replace(config.learner.optimizer, learning_rate=3e-6, betas=(0.9, 0.99))
    present = inputs_of(
        replace(
            with_task(config, verifier="numeric"),
            objective=replace(config.objective, clip_high=0.28, normalize="sequence_sum"),
            learner=replace(config.learner, optimizer=optimizer),
            loop=LoopConfig(num_steps=7),
            run_dir="runs/other",
        )
    )
    check_same_inputs(saved, present, FOLDER)
    del saved["settings"]["objective"]["entropy_coefficient"]  # as an older version knew none
    assert changed_settings(saved, present) == [
        'data.tasks[0].verifier: "exact" became "numeric"',
        f"objective.clip_high: {config.objective.clip_high} became 0.28",
        f'objective.normalize: "{config.objective.normalize}" became "sequence_sum"',
        "learner.optimizer.learning_rate: 1e-06 became 3e-06",
        "learner.optimizer.betas: [0.9, 0.95] became [0.9, 0.99]",
        "loop.num_steps: 100 became 7",
    ]


def test_a_checkpoint_that_does_not_say_its_inputs_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"older version, which does not; choose another run_dir"):
        check_same_inputs({}, inputs_of(config), FOLDER)
