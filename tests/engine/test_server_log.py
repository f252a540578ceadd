"""Why a server ended, from logs as vLLM writes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.engine.server import Engine
from megatron_rl.engine.server_log import find_cause, last_words
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


GUARD = "guard: the EngineCore process died, ending its server"
MONITOR = (
    "(APIServer pid=5) WARNING 11-29 10:55:33 [core_client.py:818] [shutdown] MPClient: engine "
    "core exited unexpectedly; starting cleanup"
)


def text_of(lines: list[str], *, is_signal: bool = False) -> str | None:
    cause = find_cause(lines, is_signal=is_signal)
    return None if cause is None else cause.text


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
        (["INFO:     Shutting down", *NOISE], None),
    ],
)
def test_other_ends(lines: list[str], text: str | None) -> None:
    assert text_of(log_of(*lines)) == text


@pytest.mark.parametrize("code", [-9, 1])
def test_a_worker_that_died(code: int) -> None:
    """One that raised an error told it before; one that was killed did not."""
    died = (
        f"Worker proc VllmWorker-1 died unexpectedly (exit code: {code}), shutting down executor."
    )
    lines = [
        f"{CORE}ValueError: of an hour ago" if code < 0 else f"(Worker_TP1 pid=9) {REASON}",
        f"(EngineCore pid=7) ERROR 11-29 10:55:33 [multiproc_executor.py:315] {died}",
        f"{CORE}RuntimeError: Executor failed.",
        f"{SERVER}{DEAD}",
    ]
    assert text_of(log_of(*lines)) == (died if code < 0 else REASON)


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ([REFUSED, GUARD], 3),  # an error of an hour ago
        # the API server refers to an error that nobody logged
        ([*[f"{SERVER}{DEAD}"] * 3, GUARD], 5),
        ([*[f"{SERVER}{DEAD}"] * 3, MONITOR], 5),
        ([f"{SERVER}{DEAD}"], 2),
        (  # killed while it loaded, before the guard knew it
            [
                f"{SERVER}RuntimeError: Engine core initialization failed. See root cause above. "
                "Failed core proc(s): {'EngineCore': -9}"
            ],
            2,
        ),
        ([REFUSED, MONITOR, *[f"{SERVER}{DEAD}"] * 3, GUARD], 3),
        ([REFUSED, MONITOR, f"{SERVER}{DEAD}", *NOISE], 3),  # the server ended before the guard saw
    ],
)
def test_an_engine_core_that_died_without_a_word(lines: list[str], line: int) -> None:
    cause = find_cause(log_of(*lines), is_signal=False)
    assert cause is not None
    assert (cause.text, cause.line) == ("", line)


def test_a_signal_has_its_cause_only_where_one_leads_to_it() -> None:
    """An error of an hour ago did not end a server that the kernel killed."""
    assert text_of(log_of(REFUSED), is_signal=True) is None
    thrown = ["terminate called after throwing an instance of 'c10::Error'", "  what():  no memory"]
    assert text_of(log_of(REFUSED, *thrown), is_signal=True) == "what():  no memory"
    fault = "Fatal Python error: Segmentation fault"
    assert text_of(log_of(fault, REFUSED), is_signal=True) == fault


def test_the_last_words_of_a_log() -> None:
    assert last_words([*STARTED, f"{CORE}loading 3 of 4", f"{CORE}", "  "]) == "loading 3 of 4"
    assert last_words(["", f"{CORE}"]) == ""


def dead_engine(log: Path, end: str, lines: list[str]) -> Engine:
    """An engine that served, wrote this log after that of an earlier engine, and ended."""
    before = "of an earlier engine\nRuntimeError: of an earlier engine\n"
    log.write_text(before + "\n".join(lines))
    engine = Engine.__new__(Engine)
    engine._guard = subprocess.Popen([sys.executable, "-c", f"import sys; {end}"])
    engine._guard.wait()
    engine._is_stopped, engine._is_ready, engine._name = False, True, "engine 0"
    engine.log_path, engine._log_start = log, len(before)
    return engine


@pytest.mark.parametrize(
    ("end", "lines", "expected"),
    [
        (
            "sys.exit(0)",
            [f"{CORE}{REASON}", f"{SERVER}{DEAD}"],
            f"exited with code 0 while serving: {REASON}; see {{log}}, line 5",
        ),
        (
            "sys.exit(137)",
            [f"{CORE}{REASON}"],
            "ended by SIGKILL while serving (killed by the kernel, if memory ran out: see dmesg); "
            f"its log {{log}} ends with: {REASON}",
        ),
        (
            "sys.exit(1)",
            [REFUSED, GUARD],
            "its EngineCore process died while serving (killed by the kernel, if memory ran out: "
            "see dmesg); see {log}, line 6",
        ),
        ("sys.exit(3)", [], "exited with code 3 while serving; its log {log} ends with: INFO:   "),
    ],
)
def test_an_engine_that_dies_while_serving_tells_its_cause_in_one_line(
    end: str, lines: list[str], expected: str, tmp_path: Path
) -> None:
    log = tmp_path / "engine_0.log"
    with pytest.raises(EngineError) as caught:
        dead_engine(log, end, log_of(*lines)).check()
    message = str(caught.value)
    assert message.startswith(f"engine 0: {expected.format(log=log)}")
    assert "\n" not in message and "earlier" not in message


def test_an_engine_that_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"exited with code 3 while serving; its log .* is empty"):
        dead_engine(tmp_path / "engine_0.log", "sys.exit(3)", []).check()
