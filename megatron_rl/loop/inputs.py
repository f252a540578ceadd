"""The inputs that a checkpoint remembers, and what a resumed run must share with it.

A cursor is an index into one stream of prompts. If the rows of the files, the starting model or the
settings behind them have changed, also if only a content did, the cursor would point into another
stream, and the run is refused. All other settings may change, and each change is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from megatron_rl.config import Config
from megatron_rl.data.evaluation_sets import EvaluationSet
from megatron_rl.data.prompts import PromptStream
from megatron_rl.errors import ConfigError
from megatron_rl.records import Prompt
from megatron_rl.weights.fingerprint import model_fingerprint

Inputs = dict[str, Any]  # plain JSON values, saved with every checkpoint
# Settings of a task that do not change its stream of questions: where its files are, of which the
# rows are compared, and how responses are judged.
_NO_STREAM_KEYS = ("path", "verifier", "rewards")
_PLACES = ("run_dir", "resume")  # settings that say where a run is, and not what it does
_HINT = "choose another run_dir"


def run_inputs(config: Config, stream: PromptStream, sets: Sequence[EvaluationSet] = ()) -> Inputs:
    """Everything of a run that its checkpoints remember besides its state.

    Args:
        stream: its prompts.
        sets: that it evaluates on.

    Raises:
        DataError: a file of a model cannot be read.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in _PLACES}
    inputs = {
        "settings": settings,
        "data": data_settings(config, stream.max_prompt_tokens),
        "rows": stream.fingerprints(),
        "sets": {each.name: _digest(each.prompts) for each in sets if each.name},
        "model": model_fingerprint(config.model.path),
        "reference": {},
    }
    if config.objective.kl.reference:
        inputs["reference"] = model_fingerprint(config.objective.kl.reference)
    return json.loads(json.dumps(inputs))


def data_settings(config: Config, max_prompt_tokens: int) -> dict[str, Any]:
    """The settings that determine which prompt an index refers to, and its seed."""
    settings = asdict(config.data) | {"sampling_seed": config.loop.seed}
    for task in settings["tasks"]:
        for key in _NO_STREAM_KEYS:
            task.pop(key, None)
    # A limit changes the stream only if longer prompts are dropped from it.
    is_dropping = settings.pop("overlong") == "drop"
    del settings["unreadable_answers"]  # the rows that are left are compared
    settings["max_prompt_tokens"] = max_prompt_tokens if is_dropping else 0
    if config.data.chat_template_file:
        content = Path(config.data.chat_template_file).read_bytes()
        settings["chat_template_file"] = f"a file with hash {xxhash.xxh3_128_hexdigest(content)}"
    return settings


def check_same_inputs(saved: Inputs, present: Inputs, folder: Path) -> None:
    """Compare the inputs of a checkpoint with those of the run that resumes from it.

    Args:
        folder: of the checkpoint.

    Raises:
        ConfigError: they differ; names what has changed.
    """
    if "rows" not in saved:
        raise ConfigError(
            f"resume: expected {folder} to say which data and model it was trained on, got a "
            f"checkpoint of an older version, which does not; {_HINT}"
        )
    before, now = dict(_leaves(saved["data"])), dict(_leaves(present["data"]))
    for key in (*now, *before):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"resume: expected the data settings of {folder}, got others in data.{key}: "
                f"{before.get(key)!r} became {now.get(key)!r}; {_HINT}"
            )
    _check_rows(saved, present, folder)
    _check_sets(saved, present, folder)
    same_reference = _reference_of(saved) == _reference_of(present)
    for what, key, is_compared in (
        ("model", "model.path", True),
        ("reference", "objective.kl.reference", same_reference),  # another one is told
    ):
        if is_compared and (changed := _changed_files(saved[what], present[what])):
            raise ConfigError(
                f"resume: expected the {what} of {folder} ({key}), got one with other contents of "
                f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}; name the former "
                f"one, or {_HINT}"
            )


def changed_settings(saved: Inputs, present: Inputs) -> list[str]:
    """One line for each setting that is not as it was: its key, its former and its present value.
    Settings that only one of the two knows are left out.
    """
    before, now = dict(_leaves(saved["settings"])), dict(_leaves(present["settings"]))
    return [
        f"{key}: {json.dumps(before[key])} became {json.dumps(now[key])}"
        for key in now
        if key in before and before[key] != now[key]
    ]


def _check_rows(saved: Inputs, present: Inputs, folder: Path) -> None:
    for number, (before, now) in enumerate(zip(saved["rows"], present["rows"], strict=True)):
        if before == now:
            continue
        task = present["settings"]["data"]["tasks"][number]
        if before.keys() != now.keys():
            what = "a file became a task, or a task a file"
        elif "digest" not in now:
            what = f"{before} became {now}"
        elif before["num_rows"] != now["num_rows"]:
            what = f"{before['num_rows']:,} different rows became {now['num_rows']:,}"
        else:
            what = f"{now['num_rows']:,} different rows with other contents, or in another order"
        raise ConfigError(
            f"resume: expected the rows that {folder} was trained on, got others in "
            f"data.tasks[{number}] ({task['path'] or task['name']}): {what} (all columns are "
            f"compared); put the former ones back, or {_HINT}"
        )


def _check_sets(saved: Inputs, present: Inputs, folder: Path) -> None:
    """The figures of a set before and after would not compare. Another number of its rows, or
    another column, is a setting, and is told.
    """
    before, now = _settings_of_sets(saved), _settings_of_sets(present)
    for name, digest in present["sets"].items():
        was = saved.get("sets", {}).get(name, digest)
        if was != digest and before.get(name) == now.get(name):
            raise ConfigError(
                f"resume: expected the questions of {folder} in the evaluation set {name}, got "
                f"others; put the former ones back, give the set another name, or {_HINT}"
            )


def _settings_of_sets(inputs: Inputs) -> dict[str, dict[str, Any]]:
    sets = inputs["settings"]["eval"].get("sets", [])
    return {
        each["name"]: {key: each[key] for key in each if key not in _NO_STREAM_KEYS}
        for each in sets
    }


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        digest.update(json.dumps([prompt.text, prompt.answer, prompt.metadata]).encode())
    return digest.hexdigest()


def _changed_files(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def _reference_of(inputs: Inputs) -> str:
    return inputs["settings"]["objective"]["kl"]["reference"]


def _leaves(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting that is no mapping and no list of mappings."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{above}.{key}" if above else str(key))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for index, item in enumerate(tree):
            yield from _leaves(item, f"{above}[{index}]")
    else:
        yield above, tree
