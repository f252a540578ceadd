"""Real processes, real signals: children end with their parent, ranks end while blocked in C++."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.processes import is_alive


def start(program: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_child_ends_with_a_killed_parent() -> None:
    parent = start(
        """
        import os, sys, time
        from megatron_rl.process.lifetime import die_with_parent
        pid = os.getpid()
        child = os.fork()
        if child == 0:
            die_with_parent(parent_pid=pid)
            print(os.getpid(), flush=True)
        time.sleep(60)
        """
    )
    child_pid = int(parent.stdout.readline())
    assert is_alive(child_pid)
    parent.kill()
    assert wait_until_gone(child_pid, 2.0)
    parent.wait()


def test_child_whose_parent_is_gone_already_ends_itself() -> None:
    other_pid = os.getppid()  # of this process, which is not the child's parent
    child = start(
        f"""
        from megatron_rl.process.lifetime import die_with_parent
        die_with_parent(parent_pid={other_pid})
        print("still here")
        """
    )
    output, _ = child.communicate(timeout=20)
    assert child.returncode == -signal.SIGKILL
    assert output == ""


FORKING = """
import multiprocessing, time
from megatron_rl.process.lifetime import bind_forked_children, watch_signals
bind_forked_children()
watch_signals(lambda: "in the parent")
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
print(child.pid, flush=True)
child.join()
print("joined", child.exitcode, flush=True)
"""


def test_forked_child_dies_with_a_killed_parent() -> None:
    parent = start(FORKING)
    child_pid = int(parent.stdout.readline())
    parent.kill()
    assert wait_until_gone(child_pid, 2.0)
    parent.wait()


def test_signal_to_a_forked_child_ends_the_child_alone() -> None:
    # Sent at once: it often reaches the child before the child has left its parent's handlers.
    parent = start(
        """
        import os, signal, time
        from megatron_rl.process.lifetime import bind_forked_children, watch_signals
        bind_forked_children()
        watch_signals(lambda: "in the parent")
        for _ in range(50):
            child_pid = os.fork()
            if child_pid == 0:
                time.sleep(60)
                os._exit(0)
            os.kill(child_pid, signal.SIGTERM)
            print(os.WTERMSIG(os.waitpid(child_pid, 0)[1]))
        """
    )
    output, errors = parent.communicate(timeout=20)
    assert (output.split(), errors) == ([str(int(signal.SIGTERM))] * 50, "")
    assert parent.returncode == 0


def test_subreaper_adopts_orphans() -> None:
    reaper = start(
        """
        import os, subprocess, sys
        from megatron_rl.process.lifetime import become_subreaper
        become_subreaper()
        middle = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=2).pid)"
        orphan = int(subprocess.check_output([sys.executable, "-c", middle]))
        status = open(f"/proc/{orphan}/stat").read().rsplit(")", 1)[1].split()
        print(int(status[1]) == os.getpid())
        os.kill(orphan, 9)
        """
    )
    output, errors = reaper.communicate(timeout=20)
    assert output.strip() == "True", errors


BLOCKED_RANK = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from megatron_rl.process.lifetime import register_cleanup, watch_signals

rank, store, note = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
if rank == 1:
    print("ready", flush=True)
    sys.stdin.read()  # never joins the collective
register_cleanup(lambda: open(note, "w").write("cleaned"))
register_cleanup(lambda: 1 / 0)
watch_signals(lambda: "step 3, phase rollout")
print("ready", flush=True)
dist.all_reduce(torch.ones(4))
print("joined")
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_rank_that_is_blocked_in_a_collective(tmp_path: Path, signum: int) -> None:
    note = tmp_path / "note"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", BLOCKED_RANK, str(rank), str(tmp_path / "store"), str(note)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["ready\n", "ready\n"]
        time.sleep(0.5)  # into the collective
        started = time.monotonic()
        ranks[0].send_signal(signum)
        output, errors = ranks[0].communicate(timeout=20)
        assert time.monotonic() - started < 2.0
        assert ranks[0].returncode == 128 + signum
        assert output == ""  # it never joined
        assert f"stopped by {signal.Signals(signum).name}: step 3, phase rollout\n" in errors
        assert "failed: ZeroDivisionError" in errors  # a bad cleanup is told, the next one ran
        assert note.read_text() == "cleaned"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
