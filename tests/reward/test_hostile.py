"""Answers that would hang, fill the memory or start processes cost their own score and no more.
Each takes at most its time limit and a second, and the workers are all there afterwards. Right
answers are never taken for wrong.

Ten hostile answers in the fast suite; 500, and 1,000 right ones, in the slow one.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.config import RewardConfig
from megatron_rl.process.worker_process import WorkerProcess
from megatron_rl.records import Score
from megatron_rl.reward.score import Scorer
from tests.reward.groups import make_prompt
from tests.support.processes import descendants_of

LIMIT_SECONDS = 1.0
NUM_WORKERS = 2
MAX_ROUNDS = 100  # of questions until every thread has had one
MARK = f"MEGATRON_RL_HOSTILE_{os.getpid()}"  # in the environment of all that a worker starts
OWN = r"""
import os, re, signal, subprocess, threading, time

def act(response, answer, metadata):
    kind, _, number = response.partition(" ")
    if kind == "loop":
        while True:
            pass
    if kind == "deaf":
        for each in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        while True:
            pass
    if kind == "pattern":
        return float(bool(re.fullmatch(r"(a+)+b", "a" * (30 + int(number)))))
    if kind == "hog":
        held = []
        while True:
            held.append(bytearray(64 * 2**20))
    if kind == "forks":
        for _ in range(20):
            if os.fork() == 0:
                time.sleep(600)
                os._exit(0)
        time.sleep(600)
    if kind == "escapes":
        for _ in range(3):
            subprocess.Popen(["sleep", "600"], start_new_session=True)
        time.sleep(600)
    if kind == "threads":
        for _ in range(50):
            threading.Thread(target=time.sleep, args=(600,)).start()
        time.sleep(600)
    if kind == "recursion":
        return act(response, answer, metadata)
    if kind == "exit":
        os._exit(int(number) % 256)
    if kind == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    return float(response == answer)
"""
OWN_KINDS = ("loop", "deaf", "pattern", "hog", "forks", "escapes", "threads")
OWN_KINDS += ("recursion", "exit", "signal")


def hostile_texts(rng: random.Random) -> Iterator[str]:
    """Texts for the built-in verifiers, without end."""
    while True:
        size = rng.randrange(20_000, 400_000)
        digit = str(rng.randrange(1, 10))
        yield digit * (5 * size)  # megabytes
        yield "\\boxed{" * size
        yield "\\boxed{" + "(" * size + digit + ")" * size + "}"
        yield "\\boxed{" + "\\frac{1}{" * (size // 10) + digit + "}" * (size // 10) + "}"
        yield f"\\boxed{{{digit}^{{9^{{9^{{9}}}}}}}}"
        yield f"The answer is {digit}e999999999999"
        yield "The answer is " + f"{digit}," * size
        yield "<answer>" * size + digit
        yield "\\boxed{" + "\\sqrt{" * 3_000 + digit + "}" * 3_000 + "}"
        yield "\\boxed{" + "+".join(f"x^{n}" for n in range(3_000)) + "}"
        yield "a" * size + "!" + "\0" * 100
        yield "\\boxed{\\begin{pmatrix}" + f"{digit} & " * 20_000 + "\\end{pmatrix}}"


def right_answers(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Verifier, response and expected answer, without end."""
    while True:
        number = rng.randrange(-(10**6), 10**6)
        part = Fraction(rng.randrange(1, 50), rng.randrange(2, 50))
        yield "numeric", f"Let me see. The answer is {number}.", str(number)
        yield "numeric", f"\\boxed{{{number:,}}}", str(number)
        yield "numeric", f"\\boxed{{{part.numerator}/{part.denominator}}}", str(part)
        yield "math_verify", f"So \\boxed{{{number}}}", str(number)
        yield (
            "math_verify",
            f"So $\\boxed{{\\frac{{{part.numerator}}}{{{part.denominator}}}}}$",
            str(part),
        )
        yield "math_verify", f"\\boxed{{2x + {number}}}", f"{number} + 2x"
        yield "exact", f"\\boxed{{{number}}}", str(number)
        yield "own", str(number), str(number)


@pytest.fixture
def verifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The built-in verifiers and one of a user's, by the name of their source."""
    (tmp_path / "hostile_verifiers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(MARK, "1")
    own = {name: name for name in ("exact", "numeric", "math_verify")}
    return own | {"own": "hostile_verifiers:act"}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What each question to a process took."""
    taken: list[float] = []
    request = WorkerProcess.request

    def timed(self: WorkerProcess, *arguments: Any) -> dict[str, Any]:
        started = time.monotonic()
        try:
            return request(self, *arguments)
        finally:
            taken.append(time.monotonic() - started)

    monkeypatch.setattr(WorkerProcess, "request", timed)
    return taken


def marked() -> list[str]:
    """The command lines of the processes that a worker has started and that still run."""
    found = []
    for each in psutil.process_iter():
        try:
            if MARK in each.environ() and each.pid != os.getpid() and each.is_running():
                found.append(" ".join(each.cmdline()))
        except psutil.Error:
            continue
    return [each for each in found if each]


def score(scorer: Scorer, asked: list[tuple[str, str, str]]) -> list[Score]:
    """The scores of `(source, response, expected answer)`."""
    return scorer.score_texts(
        [(make_prompt(source=source, answer=answer), text) for source, text, answer in asked]
    )


def check_hostile(
    asked: list[tuple[str, str, str]], verifiers: dict[str, str], seconds: list[float]
) -> None:
    """Every answer within its limit, none right, and afterwards all workers and nothing else."""
    before = set(descendants_of(os.getpid()))
    config = RewardConfig(num_workers=NUM_WORKERS, timeout_seconds=LIMIT_SECONDS, memory_gib=1.0)
    with Scorer(config, verifiers) as scorer:
        scores = score(scorer, asked)
        assert len(seconds) == len(asked)
        assert max(seconds) <= LIMIT_SECONDS + 1.0
        assert not any(each.reward for each in scores)
        own = [each for each, (source, *_) in zip(scores, asked, strict=True) if source == "own"]
        assert all(each.failure in ("timeout", "crash") for each in own)
        # A process that ended is started again with the next question that its thread gets.
        for _ in range(MAX_ROUNDS):
            sound = score(scorer, [("own", "7", "7"), ("numeric", "\\boxed{7}", "7")] * NUM_WORKERS)
            assert [each.reward for each in sound] == [1.0] * 2 * NUM_WORKERS
            workers = set(descendants_of(os.getpid())) - before
            if len(workers) == NUM_WORKERS:
                break
        assert len(workers) == NUM_WORKERS, [psutil.Process(pid).cmdline() for pid in workers]
    assert set(descendants_of(os.getpid())) <= before
    assert marked() == []  # also of those that left their session


def test_ten_hostile_answers(verifiers: dict[str, str], seconds: list[float]) -> None:
    texts = hostile_texts(random.Random(1))
    asked = [(name, next(texts), "7") for name in ("numeric", "math_verify", "exact")]
    asked += [("own", f"{kind} 5", "7") for kind in ("loop", "pattern", "hog", "forks", "escapes")]
    asked += [("own", "exit 3", "7"), ("own", "recursion 0", "7")]
    assert len(asked) == 10
    check_hostile(asked, verifiers, seconds)


@pytest.mark.slow
def test_five_hundred_hostile_answers(verifiers: dict[str, str], seconds: list[float]) -> None:
    """About six minutes."""
    rng = random.Random(2)
    texts = hostile_texts(rng)
    sources = ("exact", "numeric", "math_verify")
    asked = [(rng.choice(sources), next(texts), "-7") for _ in range(250)]
    asked += [("own", f"{OWN_KINDS[n % len(OWN_KINDS)]} {n}", "-7") for n in range(250)]
    rng.shuffle(asked)
    check_hostile(asked, verifiers, seconds)
    print(f"{len(asked)} answers, the longest {max(seconds):.2f} s")


@pytest.mark.parametrize(
    "number", [40, pytest.param(1_000, marks=pytest.mark.slow)], ids="{} right answers".format
)
def test_no_right_answer_is_taken_for_wrong(number: int, verifiers: dict[str, str]) -> None:
    answers = right_answers(random.Random(3))
    asked = [next(answers) for _ in range(number)]
    with Scorer(RewardConfig(num_workers=NUM_WORKERS), verifiers) as scorer:
        scores = score(scorer, asked)
    wrong = [
        (each, got)
        for each, got in zip(asked, scores, strict=True)
        if (got.reward, got.failure) != (1.0, None)
    ]
    assert wrong == []
