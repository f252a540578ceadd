"""The lines about the data's expected answers, tried as responses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_rl.config import RewardTerm
from megatron_rl.errors import ConfigError
from megatron_rl.loop.expected import check_own_functions, try_expected_answers
from megatron_rl.records import Prompt


def answers(*texts: str, source: str = "sums") -> list[tuple[str, Prompt]]:
    return [
        (
            f"a.jsonl, line {line}, column 'answer'",
            Prompt(index=line, source=source, text="", token_ids=(), answer=text),
        )
        for line, text in enumerate(texts, start=1)
    ]


def verifiers(**names: str) -> dict[str, tuple[RewardTerm, ...]]:
    return {source: (RewardTerm(verifier=name),) for source, name in names.items()}


def not_seven(prompts: Sequence[Prompt]) -> list[str | None]:
    return [None if prompt.answer == "7" else "reward 0" for prompt in prompts]


def test_the_share_and_the_place_of_what_is_not_accepted():
    expected = answers(*["7"] * 6, "8", "9" * 100) + answers("7", source="words")
    assert try_expected_answers(
        expected, verifiers(sums="own:fn", words="exact", none="exact"), not_seven
    ) == [
        "sums: of 8 expected answers, tried as responses, own:fn does not accept 2 (25.0%); the "
        "first is '8' (a.jsonl, line 7, column 'answer'): reward 0",
        "words: of 1 expected answers, tried as responses, exact accepts all",
    ]


def test_an_empty_answer_is_tried_where_one_is_needed():
    for name, num_tried in (("exact", 2), ("reasoning_gym", 1), ("own:fn", 1)):
        [line] = try_expected_answers(answers("7", ""), verifiers(sums=name), not_seven)
        assert f"of {num_tried} expected answers" in line


def test_a_slow_verifier_does_not_hold_the_start_up():
    """Its first batch of 4 took 40 s."""
    seconds = [0.0]
    batches = []

    def rejections(prompts: Sequence[Prompt]) -> list[str | None]:
        batches.append(len(prompts))
        seconds[0] += 10.0 * len(prompts) if prompts[0].source == "sums" else 0.01
        return ["timeout"] * len(prompts)

    expected = answers(*["7"] * 1000)
    [line] = try_expected_answers(
        expected, verifiers(sums="own:fn"), rejections, clock=lambda: seconds[0]
    )
    assert "of 4 expected answers" in line and "does not accept 4 (100.0%)" in line
    assert batches == [4]
    seconds[0] = 0.0
    batches.clear()
    expected = answers(*["7"] * 1000, source="fast")
    [line] = try_expected_answers(
        expected, verifiers(fast="own:fn"), rejections, clock=lambda: seconds[0]
    )
    assert "of 1,000 expected answers" in line
    assert batches == [4, 8, 16, 32, 64, 128, 256, 492]


def test_a_function_that_fails_on_every_answer_ends_the_start():
    of_source = {
        "sums": (RewardTerm(verifier="exact"), RewardTerm(verifier="own:broken")),
        "words": (RewardTerm(verifier="own:fn"),),
    }
    keys = {"exact": "data.tasks[0].rewards[0].verifier", "own:fn": "data.tasks[1].verifier"}
    broken = keys | {"own:broken": "data.tasks[0].rewards[1].verifier"}
    expected = answers(*map(str, range(100))) + answers("7", "", source="words")
    asked = []

    def crashes(prompts: Sequence[Prompt], verifier: str) -> list[str | None]:
        asked.append((verifier, [prompt.answer for prompt in prompts]))
        if verifier == "own:fn":  # fails where there is no answer
            return [None if prompt.answer else "KeyError: 'x'" for prompt in prompts]
        return ["KeyError: 'no_such_column' (own.py:3)"] * len(prompts)

    check_own_functions(expected, of_source, keys, crashes)
    assert asked == [("own:fn", ["7", ""])]
    asked.clear()
    with pytest.raises(ConfigError) as caught:
        check_own_functions(expected, of_source, broken, crashes)
    assert str(caught.value) == (
        "data.tasks[0].rewards[1].verifier: expected a function that returns a finite number, got "
        "an error from own:broken on each of 4 expected answers, tried as responses; the first: "
        "KeyError: 'no_such_column' (own.py:3)"
    )
    assert asked[-1] == ("own:broken", ["0", "25", "50", "75"])
    of_groups = {"own:group": "reward.group_verifier"}
    with pytest.raises(ConfigError, match=r"reward\.group_verifier: .*a finite number for each"):
        check_own_functions(expected, of_source, of_groups, crashes)
    check_own_functions([], of_source, broken, crashes)  # nothing to try
