"""Why a server ended, from logs as vLLM writes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.engine.server import Engine
from megatron_rl.engine.server_log import Cause, excerpt, find_cause
from megatron_rl.errors import EngineError

CORE = "(EngineCore pid=7) ERROR 11-29 10:55:33 [core.py:1512] "
SERVER = "(APIServer pid=5) ERROR 11-29 10:55:33 [async_llm.py:906] "
REASON = "RuntimeError: Unsupported CPU attention configuration: head_dim=16"
DEAD = (
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace "
    "(above) for the root cause."
)
NOISE = [f' - leaked function "number_{number}"' for number in range(30)]
STARTED = ["INFO 11-29 10:50:00 [api_server.py:5] Starting", "INFO:     Application startup"]
REFUSED = f"{CORE}megatron_rl.errors.SyncError: update: expected a start before it"  # lives on


def log_of(*lines: str) -> list[str]:
    return [*STARTED, *lines]


def text_of(lines: list[str], *, is_signal: bool = False) -> str:
    cause = find_cause(lines, is_signal=is_signal)
    return "" if cause is None else cause.text


@pytest.mark.parametrize(
    "lines",
    [
        [f"{CORE}{REASON}", f"{SERVER}{DEAD}", *NOISE],
        [f"{CORE}{REASON}", *[f"{SERVER}{DEAD}"] * 20, f"{SERVER}asyncio.CancelledError", *NOISE],
        [REFUSED, *NOISE * 20, f"{CORE}{REASON}", f"{CORE}", f"{SERVER}{DEAD}"],
        [f"{CORE}ValueError: first", f"{CORE}{REASON}", f"{SERVER}{DEAD}"],  # raised from the first
        [f"{CORE}{REASON}", f"{SERVER}RuntimeError: Engine core initialization failed. See root "
         "cause above. Failed core proc(s): {}"],
        [f"(Worker_TP1 pid=9) ERROR 11-29 10:55:33 [multiproc.py:9] {REASON}", f"{SERVER}{DEAD}"],
        ["Traceback (most recent call last):", '  File "x.py", line 1, in x', REASON],
    ],
)  # fmt: skip
def test_the_error_that_others_refer_to(lines: list[str]) -> None:
    assert text_of(log_of(*lines)) == REASON


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["vllm: error: unrecognized arguments: --x"], "vllm: error: unrecognized arguments: --x"),
        ([f"{CORE}AssertionError", f"{SERVER}{DEAD}"], "AssertionError"),
        (
            ["pydantic_core.ValidationError: 1 error for ModelConfig", "  Value error, no model"],
            "pydantic_core.ValidationError: 1 error for ModelConfig  Value error, no model",
        ),
        (
            [REFUSED, "guard: the EngineCore process died, ending its server"],
            "guard: the EngineCore process died, ending its server",
        ),
        (  # EngineCore was killed, and the API server refers to an error that nobody logged
            [*[f"{SERVER}{DEAD}"] * 3, "guard: the EngineCore process died, ending its server"],
            "guard: the EngineCore process died, ending its server",
        ),
        ([f"{SERVER}{DEAD}"], ""),
        (["INFO:     Shutting down", *NOISE], ""),
    ],
)
def test_other_ends(lines: list[str], text: str) -> None:
    assert text_of(log_of(*lines)) == text


def test_a_signal_has_its_cause_only_where_one_leads_to_it() -> None:
    """An error of an hour ago did not end a server that the kernel killed."""
    assert text_of(log_of(REFUSED), is_signal=True) == ""
    thrown = ["terminate called after throwing an instance of 'c10::Error'", "  what():  no memory"]
    assert text_of(log_of(REFUSED, *thrown), is_signal=True) == "what():  no memory"
    fault = "Fatal Python error: Segmentation fault"
    assert text_of(log_of(fault, REFUSED), is_signal=True) == fault


def test_the_lines_around_the_cause_are_shown() -> None:
    lines = [f"line {number}" for number in range(100)]
    lines[50] = ""
    shown = excerpt(lines, Cause(line=49, text="x"), "a.log").splitlines()
    assert shown[0] == "lines around it in a.log:"
    assert shown[1:7] == [f"line {number}" for number in range(44, 50)]
    assert (shown[7], shown[-1], len(shown)) == ("line 51", "line 64", 21)
    shown = excerpt(lines, None, "a.log").splitlines()
    assert (shown[0], shown[1], shown[-1]) == ("last lines of a.log:", "line 80", "line 99")
    assert excerpt([], None, "a.log") == "last lines of a.log:"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (
            "sys.exit(0)",
            f"engine 0: exited with code 0 while serving: {REASON}\nlines around it in ",
        ),
        ("sys.exit(143 - 6)", "ended by SIGKILL while serving (by the kernel, if memory ran out"),
    ],
)
def test_an_engine_that_dies_while_serving_tells_its_cause(
    end: str, expected: str, tmp_path: Path
) -> None:
    log = tmp_path / "engine_0.log"
    lines = log_of(f"{CORE}{REASON}", f"{SERVER}{DEAD}")
    log.write_text("\n".join(["of an earlier engine", *lines]))
    engine = Engine.__new__(Engine)
    engine._guard = subprocess.Popen([sys.executable, "-c", f"import sys; {end}"])
    engine._guard.wait()
    engine._is_stopped, engine._is_ready, engine._name = False, True, "engine 0"
    engine.log_path, engine._log_start = log, len("of an earlier engine\n")
    with pytest.raises(EngineError) as caught:
        engine.check()
    message = str(caught.value)
    assert expected in message
    assert "of an earlier engine" not in message
