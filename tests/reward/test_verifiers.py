"""The built-in verifiers of one response."""

import json

import pytest
import reasoning_gym

from megatron_rl.records import Score
from megatron_rl.reward.verifiers import exact, math_verify, numeric
from megatron_rl.reward.verifiers import reasoning_gym as gym_verifier


def judged(score: Score):
    assert score.failure is None
    return score.reward, score.is_formatted


def test_exact():
    assert judged(exact.verify(" 7 ", "7", {})) == (1.0, True)
    assert judged(exact.verify("<answer>7</answer>", "7", {})) == (1.0, True)
    assert judged(exact.verify("7.0", "7", {})) == (0.0, True)
    assert judged(exact.verify(" ", "7", {})) == (0.0, False)


def test_numeric():
    assert judged(numeric.verify("It makes 1000.", "1,000", {})) == (1.0, True)
    assert judged(numeric.verify("first 7, so 8", "7", {})) == (0.0, True)
    assert judged(numeric.verify("0.5", "1/2", {})) == (1.0, True)
    assert judged(numeric.verify("seven", "7", {})) == (0.0, False)
    with pytest.raises(ValueError, match="expected a number as the prompt's answer, got 'seven'"):
        numeric.verify("7", "seven", {})


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"so \boxed{0.5}", "1/2", (1.0, True)),
        ("Answer: 34", "34", (1.0, True)),
        ("Answer: $34$", "34", (1.0, True)),
        ("x=34, and so Answer: 35", "34", (0.0, True)),
        (r"\boxed{1+x}", "x+1", (1.0, True)),
        (r"<think>\boxed{3}</think>\boxed{4}", "4", (1.0, True)),
        ("I do not know", "34", (0.0, False)),
    ],
)
def test_math_verify(response, answer, expected):
    assert judged(math_verify.verify(response, answer, {})) == expected


def metadata_of(task, entry, **options):
    return json.loads(json.dumps({"task": task, "options": options, "entry": entry}))


def test_reasoning_gym_uses_the_task_and_its_entry():
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=5)[2]
    metadata = metadata_of("chain_sum", entry)
    answer = entry["answer"]
    assert judged(gym_verifier.verify(answer, answer, metadata)) == (1.0, True)
    assert judged(gym_verifier.verify(f"<answer>{answer}.0</answer>", answer, metadata)) == (
        1.0,
        True,
    )
    assert judged(gym_verifier.verify("nothing", answer, metadata)) == (0.0, False)
    with pytest.raises(ValueError, match="none of task, options, entry"):
        gym_verifier.verify("1", "1", {})


@pytest.mark.parametrize("task", ["countdown", "rearc", "arc_agi", "maze", "simple_equations"])
def test_reasoning_gym_scores_survive_json(task):
    dataset = reasoning_gym.create_dataset(task, seed=5, size=3)
    for entry in (dataset[0], dataset[1]):
        score = gym_verifier.verify(entry["answer"], entry["answer"], metadata_of(task, entry))
        assert judged(score) == (dataset.score_answer(entry["answer"], entry), True)
        assert score.reward == 1.0
