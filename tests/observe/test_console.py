import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from megatron_rl.observe.console import StepConsole, step_line, summary_table

METRICS = {
    "reward/mean": 0.4123,
    "discrepancy/mean": 0.0041,
    "constraint/tolerance": 0.0037,
    "constraint/lambda": 0.1004,
    "learner/grad_norm": 0.7012,
    "speed/tokens_per_second": 5310.4,
    "speed/seconds/rollout": 1.24,
    "speed/seconds/learner": 0.5,
    "eval/avg_at_8": 0.55,
}


def test_a_step_is_one_line():
    assert step_line(12, METRICS).plain == (
        "step   12  reward 0.412  discrepancy 0.0041 > 0.0037  lambda 0.1004  grad 0.701"
        "  tok/s 5,310  | rollout 1.2s  learner 0.5s  avg@8 0.550"
    )
    assert step_line(3, {"reward/mean": 1.0}, width=1).plain == "step 3  reward 1.000"


def test_another_constrained_signal_stands_beside_the_discrepancy():
    metrics = {"discrepancy/mean": 0.0041, "constraint/signal/mean": 0.03}
    metrics["constraint/signal/tolerance"] = 0.05
    expected = "step 3  discrepancy 0.0041  signal 0.0300 <= 0.0500"
    assert step_line(3, metrics, width=1).plain == expected
    table = summary_table([{"step": 3} | metrics], title="run")
    labels = list(table.columns[0].cells)
    assert labels == ["discrepancy mean", "constrained signal mean", "constrained signal tolerance"]


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    console = Console(file=stream, width=40, soft_wrap=True)
    with StepConsole(num_steps=2, console=console) as shown:
        shown.show_phase("rollout")
        shown.show_step(1, METRICS)
        shown.say("saved [checkpoint]")
    first, second = stream.getvalue().splitlines()
    assert first == step_line(1, METRICS, width=1).plain
    assert second == "saved [checkpoint]"


def test_a_bar_on_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True)
    with StepConsole(num_steps=4, num_done=2, console=console) as shown:
        shown.show_step(3, {"reward/mean": 0.5})
    assert "3/4" in stream.getvalue() and "\x1b[" in stream.getvalue()


RANK = """
import time
from megatron_rl.process.lifetime import watch_signals
from megatron_rl.observe.console import StepConsole
watch_signals(lambda: "step 1")
with StepConsole(num_steps=4) as shown:
    shown.show_step(1, {"reward/mean": 0.5})
    time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_the_cursor_back(signum):
    terminal, side = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK], stdin=side, stdout=side, stderr=side, env=environment
    )
    os.close(side)
    shown = b""
    try:
        while b"1/4" not in shown:
            shown += os.read(terminal, 4096)
        assert b"\x1b[?25l" in shown
        time.sleep(0.2)  # into the sleep of the step
        rank.send_signal(signum)
        assert rank.wait(10) == 128 + signum
    finally:
        rank.kill()
        rank.wait()
    shown += read_to_the_end(terminal)
    assert b"step 1" in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def read_to_the_end(terminal: int) -> bytes:
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:  # how Linux ends a terminal whose other side is closed
        pass
    os.close(terminal)
    return shown


def test_the_table_compares_first_and_last():
    records = [{"step": 0, "eval/avg_at_8": 0.4, "speed/seconds/rollout": 51.9}]  # the start
    records += [
        {"step": step, "reward/mean": step / 20, "speed/seconds/rollout": 2.0}
        for step in range(1, 21)
    ]
    records.append({"step": 21, "eval/avg_at_8": 0.65, "reward/mean": None})
    records[-1]["speed/seconds/save"] = 3.0
    stream = io.StringIO()
    Console(file=stream, width=80).print(summary_table(records, title="runs/x"))
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:5]
        for line in stream.getvalue().splitlines()
        if "│" in line
    }
    assert [cell.strip() for cell in rows["avg@8"]] == ["0.400", "0.650", "+0.250"]
    assert [cell.strip() for cell in rows["reward mean"]] == ["0.075", "0.975", "+0.900"]
    assert [cell.strip() for cell in rows["seconds, rollout"]] == ["2.00", "2.00", "+0.00"]
    assert "seconds, save" not in rows  # of one step in 21
