"""What a user can get wrong: one clear line, a non-zero exit code, nothing left running or damaged.

Most cases run as one process without ranks, where the line must be all there is to read; two are
started for real, alone and below torchrun.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.claims import Claims
from megatron_rl.process.folder import LOCK_FILE
from megatron_rl.records import TOKEN_VARIABLE
from tests.e2e.runs import training
from tests.support.ranks import run_module
from tests.support.served_engine import ServedEngine

SECONDS = 120.0  # an error that takes longer is a hang
ERROR_SECONDS = 60.0  # of one that waits for somebody else


def fail(
    config: Path, *overrides: str, num_ranks: int = 0, variables: dict[str, str] | None = None
) -> tuple[str, Path]:
    """Trains, expects failure and nothing left of it; returns the output and the run folder."""
    run_dir = config.parent / "run"
    kept = keep_something(run_dir)
    finished = run_module(  # which asserts that nothing is left
        "megatron_rl.train",
        config,
        f"run_dir={run_dir}",
        *overrides,
        ranks=num_ranks,
        must_succeed=False,
        timeout=SECONDS,
        variables=variables,
    )
    assert finished.returncode != 0, finished.stdout
    assert kept.read_text() == "of an earlier run"
    return finished.stdout, run_dir


def fail_for_real(config: Path, *overrides: str, num_ranks: int) -> str:
    """The same of a run that is started as a user starts it, below torchrun or alone."""
    run_dir = config.parent / "run"
    kept = keep_something(run_dir)
    with training(config, *overrides, num_ranks=num_ranks, run_dir=run_dir) as run:
        assert run.wait(SECONDS) != 0, run.output
        assert run.left_after(10.0) == []
        assert kept.read_text() == "of an earlier run"
        return run.output


def keep_something(run_dir: Path) -> Path:
    """A file that an earlier run left, and that no failure may touch."""
    kept = run_dir / "checkpoints" / "before" / "run_state.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("of an earlier run")
    return kept


def assert_one_line(output: str, kind: str, *fragments: str) -> None:
    # A failure of an engine comes after the line that says what is being started.
    lines = [line for line in output.splitlines() if not line.startswith("starting: ")]
    assert len(lines) == 1, output
    assert lines[0].startswith(f"{kind}: ")
    for fragment in fragments:
        assert fragment in lines[0], output


def break_model(folder: Path, sharp_checkpoint: Path, how: str) -> Path:
    """A copy of the model with something wrong."""
    model = folder / "model"
    shutil.copytree(sharp_checkpoint, model)
    weights = model / "model.safetensors"
    if how == "truncated shard":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "missing shard":
        tensors = load_file(weights)
        shards = {
            name: f"model-0000{1 + (i > 5)}-of-00002.safetensors" for i, name in enumerate(tensors)
        }
        index = {"metadata": {}, "weight_map": shards}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        first = "model-00001-of-00002.safetensors"
        save_file({n: t for n, t in tensors.items() if shards[n] == first}, model / first)
        weights.unlink()
    else:
        assert how == "larger vocabulary"
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"]["<one more>"] = len(tokenizer["model"]["vocab"])
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("loop.num_stepz=3", ("loop.num_stepz", "loop.num_steps")),
        ("lopp.num_steps=3", ("lopp", "nearest valid one is loop")),
        ("loop.num_steps=many", ("loop.num_steps", "integer", "'many'")),
        ("parallel.tensor=3", ("parallel.tensor=3", "2 attention heads")),
        ("sync.transport=ipc", ("sync.transport=ipc", "on GPUs, got none on this host")),
        (
            "parallel.tensor=2",
            ("multiple of tensor x context x pipeline = 2, got 1", "--nproc_per_node"),
        ),
        (
            "objective={preset: score_centering, score_centering: {num_logprobs: 128}}",
            ("objective.score_centering.num_logprobs", "below", "vocabulary of 128, got 128"),
        ),
        ("replay=no/such/folder", ("replay", "no/such/folder")),
        ("resume=no/such/folder", ("resume", "no/such/folder")),
        ("model.path=no/such/folder", ("model.path", "no/such/folder")),
    ],
)
def test_a_setting_that_cannot_work(
    override: str, fragments: tuple[str, ...], tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    output, run_dir = fail(write_config(tmp_path), override)
    kind = "DataError" if override.startswith(("resume", "model")) else "ConfigError"
    assert_one_line(output, kind, *fragments)
    assert not (run_dir / "logs").exists()  # no engine was started
    assert not (run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("how", "fragments"),
    [
        ("truncated shard", ("model.safetensors", "whole safetensors file")),
        ("missing shard", ("model-00002-of-00002.safetensors", "no such file")),
        ("larger vocabulary", ("vocab_size 128, got 128 ('<one more>')", "another model")),
    ],
)
def test_a_model_that_is_not_whole(
    how: str,
    fragments: tuple[str, ...],
    tmp_path: Path,
    write_config: Callable[..., Path],
    sharp_checkpoint: Path,
) -> None:
    model = break_model(tmp_path, sharp_checkpoint, how)
    output, run_dir = fail(write_config(tmp_path), f"model.path={model}")
    assert_one_line(output, "DataError", *fragments)
    assert not (run_dir / "logs").exists()


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ('{"question": "1+1=", "answer": "2"}\n{"question": "1+2=",\n', ("line 2", "JSON")),
        ("", ("empty data set",)),
        (json.dumps({"question": "1+" * 200, "answer": "9"}) + "\n", ("line 1", "156 tokens")),
    ],
    ids=["malformed line", "empty", "longer than the context"],
)
def test_a_data_file_that_cannot_be_used(
    content: str, fragments: tuple[str, ...], tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    section = {"tasks": [{"path": str(path), "verifier": "exact"}], "num_held_out": 0}
    output, run_dir = fail(write_config(tmp_path, data=section))
    assert_one_line(output, "DataError", str(path), *fragments)
    assert not (run_dir / "logs").exists()


def test_a_template_that_refuses(
    tmp_path: Path, write_config: Callable[..., Path], sharp_checkpoint: Path
) -> None:
    model = Path(shutil.copytree(sharp_checkpoint, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('no system role') }}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    output, _ = fail(write_config(tmp_path), f"model.path={model}")
    assert_one_line(output, "DataError", "no system role", "data.chat_template_file")


@pytest.mark.parametrize(
    ("path", "fragments"),
    [
        ("a file", ("File exists", "not taken by a file")),
        ("a file/run", ("Not a directory",)),
        ("/proc/nowhere", ("No such file or directory",)),
    ],
)
def test_a_run_folder_that_cannot_be_made(
    path: str, fragments: tuple[str, ...], tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    (tmp_path / "a file").write_text("kept")
    run_dir = tmp_path / path
    output, _ = fail(write_config(tmp_path), f"run_dir={run_dir}")
    assert_one_line(output, "ConfigError", f"run_dir={run_dir}", *fragments)
    assert (tmp_path / "a file").read_text() == "kept"


def test_a_temporary_folder_that_is_too_deep(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    output, _ = fail(write_config(tmp_path), variables={"TMPDIR": str(deep)})
    assert_one_line(output, "ConfigError", f"TMPDIR={deep}", "at most 70 bytes")


@pytest.mark.parametrize("num_ranks", [0, 2])
def test_a_second_run_in_the_folder_of_a_living_one(
    num_ranks: int, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    """It is refused at once, and nothing in the folder becomes another."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "error.txt").write_text("of the living run")
    (run_dir / "config.yaml").write_text("of the living run")
    with (run_dir / LOCK_FILE).open("w") as lock:
        lock.write('{"pid": 4711, "host": "node7", "launch": "another"}')
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        overrides = ["learner.optimizer.learning_rate=1e-6", f"parallel.tensor={max(num_ranks, 1)}"]
        output, _ = fail(write_config(tmp_path), *overrides, num_ranks=num_ranks)
    assert_one_line(output, "ConfigError", f"run_dir={run_dir}", "process 4711 on host node7")
    assert (run_dir / "error.txt").read_text() == "of the living run"
    assert (run_dir / "config.yaml").read_text() == "of the living run"
    assert not (run_dir / "logs").exists() and not (run_dir / "metrics.jsonl").exists()


def test_a_run_that_is_refused_leaves_the_settings_of_the_one_before(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step_000007").mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").write_text("step_000007")
    (run_dir / "config.yaml").write_text("of an earlier run")
    output, _ = fail(write_config(tmp_path), "resume=never")
    assert_one_line(output, "ConfigError", "resume=never")
    assert (run_dir / "config.yaml").read_text() == "of an earlier run"
    assert (run_dir / "error.txt").read_text() == output


def test_a_port_in_use(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output, _ = fail(write_config(tmp_path), f"rollout.port={port}")
    assert_one_line(output, "EngineError", "rollout.port", str(port))


def test_an_engine_that_never_answers(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    """It takes connections, as one that hangs does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        output, _ = fail(
            write_config(tmp_path),
            *("rollout.num_engines=0", f"rollout.urls=[{url}]"),
            variables={TOKEN_VARIABLE: "a token"},
        )
    assert time.monotonic() - begin < ERROR_SECONDS
    assert_one_line(output, "EngineError", f"ready at {url}, none answers", "megatron_rl.serve")


def test_an_engine_that_another_run_has_claimed(
    tmp_path: Path, write_config: Callable[..., Path], served_engine: ServedEngine
) -> None:
    address = EngineAddress(url=served_engine.url, token=served_engine.token)
    begin = time.monotonic()
    with Claims([address], tmp_path / "first"):
        overrides, variables = served_engine.overrides(), served_engine.variables()
        output, _ = fail(write_config(tmp_path), *overrides, variables=variables)
    assert time.monotonic() - begin < ERROR_SECONDS
    holder = f"claimed by the run in {tmp_path}/first on {socket.gethostname()}"
    assert_one_line(output, "EngineError", served_engine.url, holder)


def test_a_server_that_does_not_start(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    output, _ = fail(write_config(tmp_path), "rollout.extra_args=[--no-such-flag]")
    fragments = ("engine 0", "unrecognized arguments: --no-such-flag", "engine_0.log, line ")
    assert_one_line(output, "EngineError", *fragments)


def test_started_alone_the_line_is_all_there_is_to_read(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    output = fail_for_real(write_config(tmp_path), "model.path=no/such/folder", num_ranks=0)
    assert_one_line(output, "DataError", "model.path", "no/such/folder")


@pytest.mark.parametrize("override", ["loop.num_stepz=3", "parallel.tensor=4"])
def test_of_several_ranks_one_tells_it(
    override: str, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    output, _ = fail(write_config(tmp_path), override, num_ranks=2)
    assert_one_line(output, "ConfigError", override.split("=")[0])


def test_under_torchrun_the_line_is_all_there_is_to_read(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    output = fail_for_real(write_config(tmp_path), "data.tasks=[]", num_ranks=2)
    assert_one_line(output, "ConfigError", "data.tasks")
