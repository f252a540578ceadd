"""A new verifier, and a new group verifier, is one file: nothing else names it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import megatron_rl

VERIFIER = """
from megatron_rl.records import Score


def verify(response, answer, metadata):
    return Score(reward=float(len(response)), is_formatted=True, failure=None)
"""
GROUP_VERIFIER = """
def group_rewards(group):
    return [score.reward - min(each.reward for each in group.scores) for score in group.scores]
"""
SCRIPT = """
from megatron_rl.config.file import load_config
from megatron_rl.records import Prompt, Rollout, RolloutGroup
from megatron_rl.reward.registry import resolve_verifiers
from megatron_rl.reward.score import Scorer

config = load_config("run.yaml", ["reward.group_verifier=spread"])
prompt = Prompt(index=0, source="mine", text="", token_ids=(1,), answer="")
rollouts = tuple(
    Rollout(token_ids=(1, 2), loss_mask=(False, True), rollout_logprobs=(0.0, -1.0),
            weight_versions=(-1, 0), finish_reason="stop", text=text)
    for text in ("abc", "a")
)
with Scorer(config.reward, resolve_verifiers(config.data.tasks)) as scorer:
    group = RolloutGroup(prompt=prompt, rollouts=rollouts)
    (scores,) = scorer.score([group], with_group_verifier=True)
print([(score.reward, score.group_reward, score.failure) for score in scores])
"""


def run(folder):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_a_new_verifier_is_one_file(tmp_path):
    package = tmp_path / "megatron_rl"
    shutil.copytree(
        Path(megatron_rl.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pyc*")
    )
    (tmp_path / "run.yaml").write_text(
        "data: {tasks: [{name: mine, path: none.jsonl, verifier: size}]}\n"
        "reward: {num_workers: 1}\n"
    )
    assert "data.tasks[0].verifier: expected auto, exact" in run(tmp_path).stderr
    (package / "reward" / "verifiers" / "size.py").write_text(VERIFIER)
    assert "reward.group_verifier: expected length or" in run(tmp_path).stderr
    (package / "reward" / "group_verifiers" / "spread.py").write_text(GROUP_VERIFIER)
    result = run(tmp_path)
    assert result.stdout == "[(3.0, 2.0, None), (1.0, 0.0, None)]\n", result.stderr
