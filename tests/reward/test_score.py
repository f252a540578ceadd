import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter

import pytest

from megatron_rl.config import RewardConfig, RewardTerm
from megatron_rl.errors import ConfigError
from megatron_rl.records import Score
from megatron_rl.reward.score import Scorer, best_constant_answer, rewards_of
from tests.reward.groups import make_group, make_prompt

VERIFIERS = """
import os, signal, subprocess, sys, time

def act(response, answer, metadata):
    if response == "hang":
        while True:
            pass
    if response == "hang deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        while True:
            pass
    if response == "exit":
        os._exit(0)
    if response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if response.startswith("killed once "):
        path = response.removeprefix("killed once ")
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return 7.0
    if response == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "sys.exit":
        sys.exit(3)
    if response == "raise":
        raise KeyError("a verifier's own mistake")
    if response == "nan":
        return float("nan")
    if response == "print":
        print("to standard output", flush=True)
        os.write(1, b"and below python")
    if response == "torch":
        return float("torch" in sys.modules)
    if response == "token":
        return float("MEGATRON_RL_TOKEN" in os.environ)
    if response == "pid":
        return float(os.getpid())
    if response == "child":
        subprocess.Popen(["sleep", metadata["seconds"]])
        time.sleep(60)
    return float(len(response))
"""


@pytest.fixture
def own_verifier(tmp_path, monkeypatch):
    (tmp_path / "scratch_verifiers.py").write_text(VERIFIERS)
    monkeypatch.syspath_prepend(tmp_path)
    return {"own": "scratch_verifiers:act"}


def failures(scores):
    return [score.failure for score in scores]


def test_scores_keep_their_order(own_verifier):
    texts = ["x" * n for n in range(100)]
    with Scorer(RewardConfig(num_workers=2), own_verifier) as scorer:
        first, second = scorer.score([make_group(texts), make_group(texts[::-1])])
    assert [score.reward for score in first] == list(range(100))
    assert [score.reward for score in second] == list(range(99, -1, -1))
    assert all(score.is_formatted and score.failure is None for score in first)


def test_a_hang_times_out_and_the_pool_goes_on(own_verifier, caplog):
    config = RewardConfig(num_workers=2, timeout_seconds=0.5)
    with Scorer(config, own_verifier) as scorer:
        texts = ["a", "hang", "hang deaf", "bb", "ccc"]
        (scores,) = scorer.score([make_group(texts)])
        assert failures(scores) == [None, "timeout", "timeout", None, None]
        assert [score.reward for score in scores] == [1.0, 0.0, 0.0, 2.0, 3.0]
        assert not scores[1].is_formatted
        (again,) = scorer.score([make_group(["dddd"])])
    assert again == (Score(reward=4.0, is_formatted=True, failure=None),)
    assert "2 of 5 responses could not be scored (2 timeout)" in caplog.text
    assert "prompt 5 of own, verifier scratch_verifiers:act: no answer within 0.5 s" in caplog.text


@pytest.mark.parametrize("how", ["exit", "kill", "segfault", "sys.exit", "raise", "nan"])
def test_a_crash_is_a_crash_and_the_pool_goes_on(own_verifier, how):
    with Scorer(RewardConfig(num_workers=1), own_verifier) as scorer:
        (scores,) = scorer.score([make_group(["a", how, "bb", how, "ccc"])])
    assert failures(scores) == [None, "crash", None, "crash", None]
    assert [score.reward for score in scores] == [1.0, 0.0, 2.0, 0.0, 3.0]


def test_responses_are_counted_once_if_they_have_several_verifiers(own_verifier, caplog):
    terms = [RewardTerm(verifier="exact"), RewardTerm(verifier=own_verifier["own"])]
    with Scorer(RewardConfig(num_workers=1), {"own": terms}) as scorer:
        assert scorer.last_failure == ""
        scorer.score([make_group(["raise", "a"]), make_group(["raise", "nan"])])
    assert "3 of 4 responses could not be scored (3 crash); the first: prompt 5 of" in caplog.text
    assert scorer.last_failure.startswith(
        "prompt 5 of own, verifier scratch_verifiers:act: KeyError: "
    )


def test_the_log_tells_how_it_ended(own_verifier, caplog):
    with Scorer(RewardConfig(num_workers=1), own_verifier) as scorer:
        scorer.score([make_group(["kill"])])
        assert "killed by SIGKILL" in caplog.text
        scorer.score([make_group(["raise"])])
    assert 'KeyError: "a verifier\'s own mistake"' in caplog.text


def test_a_response_whose_process_was_killed_is_scored_once_more(own_verifier, tmp_path):
    """As by an operator, or by the kernel for the memory of another process."""
    response = f"killed once {tmp_path / 'marker'}"
    with Scorer(RewardConfig(num_workers=1), own_verifier) as scorer:
        (scores,) = scorer.score([make_group(["a", response, "bb"])])
    assert [(score.reward, score.failure) for score in scores] == [(1, None), (7, None), (2, None)]


def test_a_worker_killed_while_idle_costs_no_score(own_verifier):
    with Scorer(RewardConfig(num_workers=1), own_verifier) as scorer:
        ((score,),) = scorer.score([make_group(["pid"])])
        os.kill(int(score.reward), signal.SIGKILL)
        time.sleep(0.2)
        ((other,),) = scorer.score([make_group(["pid"])])
    assert other.failure is None
    assert other.reward != score.reward


def test_printing_does_not_disturb_and_torch_is_not_imported(own_verifier):
    with Scorer(RewardConfig(num_workers=1), own_verifier) as scorer:
        (scores,) = scorer.score([make_group(["print", "torch", "x" * 1_000_000])])
    assert [score.reward for score in scores] == [5.0, 0.0, 1_000_000.0]


def test_the_engines_token_is_not_passed_on(own_verifier, monkeypatch):
    monkeypatch.setenv("MEGATRON_RL_TOKEN", "secret")
    with Scorer(RewardConfig(num_workers=1), own_verifier) as scorer:
        (scores,) = scorer.score([make_group(["token"])])
    assert scores[0].reward == 0.0 and scores[0].failure is None


def test_what_a_verifier_started_ends_with_its_time(own_verifier):
    seconds = "987.25"
    config = RewardConfig(num_workers=1, timeout_seconds=1.0)
    with Scorer(config, own_verifier) as scorer:
        (scores,) = scorer.score([make_group(["child"], seconds=seconds)])
    assert failures(scores) == ["timeout"]
    deadline = time.monotonic() + 5
    while _processes_with(seconds) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _processes_with(seconds)


def test_truncated_reward(own_verifier):
    cut = make_group(["abc", "hang"], finish_reason="length")
    config = RewardConfig(truncated_reward=-0.5, timeout_seconds=5.0)
    with Scorer(config, own_verifier) as scorer:
        first, second = scorer.score([cut, make_group(["abc"])])
    assert first == (Score(reward=-0.5, is_formatted=False, failure=None),) * 2
    assert second[0].reward == 3.0
    with Scorer(RewardConfig(), own_verifier) as scorer:
        ((score,),) = scorer.score([make_group(["abc"], finish_reason="length")])
    assert score.reward == 3.0


def test_several_sources_from_a_thread_with_math_verify_that_hangs():
    # verl #5635: math-verify's alarms off the main thread scored every answer 0.
    # A tower of powers and a large factorial keep sympy busy for much longer than the limit.
    bad = [r"\boxed{9^{9^{9^{9}}}+1}", r"\boxed{(10^{10})!}"]
    groups = [
        make_group([r"\boxed{0.5}", *bad, "none"], source="dapo", answer="1/2"),
        make_group(["7", "8"], source="sums", answer="7"),
    ]
    verifiers = {"dapo": "math_verify", "sums": "numeric"}
    results = []

    def work():
        with Scorer(RewardConfig(num_workers=2, timeout_seconds=1.5), verifiers) as scorer:
            results.extend(scorer.score(groups))
            results.extend(scorer.score(groups[:1]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    for scores in (results[0], results[2]):
        assert scores[0] == Score(reward=1.0, is_formatted=True, failure=None)
        assert scores[3] == Score(reward=0.0, is_formatted=False, failure=None)
        assert all(score.failure in ("timeout", "crash") for score in scores[1:3]), scores
    assert Counter(failures(results[0]))["timeout"] >= 1
    assert [score.reward for score in results[1]] == [1.0, 0.0]


def test_two_threads_share_a_scorer(own_verifier):
    with Scorer(RewardConfig(num_workers=2), own_verifier) as scorer:
        results = {}

        def work(n):
            results[n] = scorer.score([make_group(["x" * n] * 50)])[0]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert {n: {score.reward for score in scores} for n, scores in results.items()} == {
        n: {float(n)} for n in range(4)
    }


def test_a_verifier_that_cannot_be_there_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="nearest: exact"):
        Scorer(RewardConfig(), {"a": "exactly"})
    (tmp_path / "broken_verifiers.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in [
        ("broken_verifiers:act", "No module named 'no_such_library'"),
        ("json:lods", r"function 'lods' in json.*nearest: loads"),
    ]:
        with (
            Scorer(RewardConfig(), {"own": name}) as scorer,
            pytest.raises(ConfigError, match=message),
        ):
            scorer.score([make_group(["a", "b", "c"])])
    with Scorer(RewardConfig(), {"own": "exact"}) as scorer:
        with pytest.raises(ConfigError, match="got a prompt from 'other'"):
            scorer.score([make_group(["a"], source="other")])
        assert scorer.score([]) == []


def test_closing_ends_the_processes_also_in_the_middle(own_verifier):
    scorer = Scorer(RewardConfig(num_workers=2, timeout_seconds=60.0), own_verifier)
    scores = scorer.score([make_group(["pid"] * 50)])[0]
    pids = {int(score.reward) for score in scores}
    errors = []

    def work():
        try:
            scorer.score([make_group(["hang"] * 4)])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.5)
    start = time.monotonic()
    scorer.close()
    scorer.close()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - start < 5
    assert len(errors) == 1
    assert not any(_is_running(pid) for pid in pids)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_is_left_when_the_parent_is_killed(own_verifier, tmp_path, signum):
    script = """
        import threading, time
        from megatron_rl.config import RewardConfig
        from megatron_rl.records import Prompt
        from megatron_rl.reward.score import Scorer
        scorer = Scorer(RewardConfig(timeout_seconds=600.0), {"own": "scratch_verifiers:act"})
        prompt = Prompt(index=0, source="own", text="", token_ids=(), answer="")
        pids = {int(score.reward) for score in scorer.score_texts([(prompt, "pid")] * 200)}
        while len(pids) < 2:
            pids |= {int(score.reward) for score in scorer.score_texts([(prompt, "pid")] * 200)}
        threading.Thread(target=scorer.score_texts, args=([(prompt, "hang")] * 8,)).start()
        time.sleep(0.5)
        print(*pids, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(_is_running(pid) for pid in pids)
    finally:
        parent.send_signal(signum)
        parent.wait()
    deadline = time.monotonic() + 5
    while any(_is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_running(pid) for pid in pids)


def test_construction_does_not_wait_for_the_processes():
    start = time.monotonic()
    with Scorer(RewardConfig(), {"a": "reasoning_gym"}):
        assert time.monotonic() - start < 0.5


def test_rewards_of_gives_a_failure_no_reward():
    def score(reward, failure=None):
        return Score(reward=reward, is_formatted=failure is None, failure=failure)

    assert rewards_of([score(1.0), score(0.0), score(1.0)]) == (1.0, 0.0, 1.0)
    rewards = rewards_of([score(1.0), score(0.0, "timeout"), score(0.0), score(0.0, "crash")])
    assert rewards == (1.0, None, 0.0, None)
    assert rewards_of([score(0.0, "crash")] * 2) == (None, None)
    assert rewards_of([]) == ()


def test_best_constant_answer_worked_by_hand():
    prompts = [make_prompt(source="n", answer=answer) for answer in ("3", "1", "3.0", "2", "1")]
    with Scorer(RewardConfig(num_workers=1), {"n": "numeric"}) as scorer:
        # "3" is right twice ("3" and "3.0"), "1" twice and more frequent as a text.
        assert best_constant_answer(prompts, scorer.score_texts) == ("1", 0.4)
        assert best_constant_answer(prompts[2:4], scorer.score_texts) == ("2", 0.5)
        assert best_constant_answer([], scorer.score_texts) == ("", 0.0)


def test_a_part_of_the_reward_is_not_right():
    """By the rule of avg@k, `Score.is_correct`."""
    rewards = {"1": 0.9, "2": 1.0}
    prompts = [make_prompt(answer="1"), make_prompt(answer="1"), make_prompt(answer="2")]

    def score_fn(responses):
        is_right = [prompt.answer == response for prompt, response in responses]
        return [
            Score(reward=rewards[response] if right else 0.8, is_formatted=True, failure=None)
            for right, (_, response) in zip(is_right, responses)
        ]

    assert best_constant_answer(prompts, score_fn) == ("2", pytest.approx(1 / 3))
    failed = Score(reward=1.0, is_formatted=True, failure="crash")
    assert not failed.is_correct


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _processes_with(text):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                words = file.read().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[:1] == ["sleep"] and text in words and _is_running(int(pid)):
            found.append(pid)
    return found


@pytest.fixture(autouse=True)
def _capture_warnings(caplog):
    caplog.set_level(logging.WARNING)
