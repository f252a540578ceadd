"""What the agent prints when its ranks have failed or were stopped; torchrun's part is replaced."""

from __future__ import annotations

import logging
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_rl.process import agent, told
from megatron_rl.process.folder import AGENT_VARIABLE

LINE = "ConfigError: loop.num_stepz: expected loop.num_steps"
Ranks = Callable[[Path], None]  # what the ranks do, given the folder of their attempt


def failed(attempt: Path) -> ChildFailedError:
    """As torchrun raises it, where the rank that was ended comes before the one that failed."""
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(attempt / "e"))
        for rank, code in ((0, -signal.SIGTERM), (1, 1))
    }
    return ChildFailedError("train", failures)


@pytest.fixture
def launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Ranks, type[Exception], list[str]], int]:
    """`agent.main` with ranks that do as told, are warned of, and end in this exception."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def start(ranks: Ranks, kind: type[Exception], options: list[str]) -> int:
        def torchrun(arguments: list[str]) -> None:
            parsed = agent.run.parse_args(arguments)
            for number in (0, 10):  # as after restarts
                attempt = Path(parsed.log_dir, f"{parsed.rdzv_id}_x", f"attempt_{number}")
                (attempt / "1").mkdir(parents=True)
            monkeypatch.setenv(AGENT_VARIABLE, str(attempt / "1" / "error.json"))
            ranks(attempt)
            for name in agent.LOGGERS:
                logging.getLogger(name).warning("Sending process 1 closing signal")
            if kind is SignalException:
                raise SignalException("stopped", signal.SIGTERM)
            raise failed(attempt)

        monkeypatch.setattr(agent.run, "main", torchrun)
        return agent.main([*options, "--nproc_per_node=2", "-m", "megatron_rl.train"])

    return start


def test_a_told_line_is_all(launch, tmp_path, capsys, caplog) -> None:
    """The rank has printed it, also if another one was the first to end."""
    assert launch(lambda _: tell(LINE), ChildFailedError, []) == 1
    assert capsys.readouterr().err == "" and not caplog.records
    assert list(tmp_path.iterdir()) == []  # the folder of error files is gone


def test_a_line_in_a_log_of_a_rank_is_shown(launch, tmp_path, capsys) -> None:
    options = [f"--log-dir={tmp_path / 'logs'}", "--redirects=3", "--tee=0:3"]
    assert launch(lambda _: tell(LINE), ChildFailedError, options) == 1
    assert capsys.readouterr().err == LINE + "\n"
    assert (tmp_path / "logs").is_dir()  # the user's own stays


@pytest.mark.parametrize("line", ["", None], ids=["a traceback", "no word"])
def test_of_an_unknown_error_torchrun_reports(line: str | None, launch, tmp_path, caplog) -> None:
    with pytest.raises(ChildFailedError):
        launch(lambda _: None if line is None else tell(line), ChildFailedError, [])
    assert [record.name for record in caplog.records] == list(agent.LOGGERS)
    assert list(tmp_path.iterdir()) == []


def test_after_a_signal_the_words_of_the_rank_are_the_last(
    launch, tmp_path, capsys, caplog
) -> None:
    assert launch(lambda _: told.note_stop(), SignalException, []) == 1
    assert capsys.readouterr().err == "" and not caplog.records
    assert launch(lambda _: tell(LINE), SignalException, []) == 1
    assert capsys.readouterr().err == ""
    assert launch(lambda _: None, SignalException, []) == 1  # the ranks were not ready to tell
    assert capsys.readouterr().err == "stopped by SIGTERM: before the first step\n"
    assert list(tmp_path.iterdir()) == []


def tell(line: str) -> None:
    assert told.is_first_to_fail(line)
    assert not told.is_first_to_fail("of another rank")
