"""The tools that come with the package."""

from __future__ import annotations

import pytest
import reasoning_gym

from megatron_rl.records import Prompt
from megatron_rl.rollout.tools import calculator, second_try


def prompt(metadata: dict | None = None) -> Prompt:
    return Prompt(index=0, source="s", text="", token_ids=(1,), answer="", metadata=metadata or {})


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("so <calc>12*(3+4)</calc>", "84"),
        ("<calc>1</calc> and <calc>2-5</calc>", "-3"),
        ("<calc>1/3</calc>", "0.3333333333"),
        ("<calc>0.1+0.2</calc>", "0.3"),
        ("<calc>-7//2", "-4"),  # a stop text may leave out the end
        ("<calc>7%4*10</calc>", "30"),
        ("<calc>1/0</calc>", "error: Fraction(1, 0)"),
        ("<calc>9**9</calc>", "error: only numbers, parentheses and + - * / // % are known"),
        ("<calc>__import__('os')</calc>", "error: only numbers"),
        ("<calc>True+1</calc>", "error: only numbers"),
        ("<calc>1e4000*1e4000</calc>", "error: "),
        ("<calc>(((</calc>", "error: "),
    ],
)
def test_the_calculator(said: str, expected: str) -> None:
    answer = calculator.reply(prompt(), ["before", said])
    assert answer is not None and answer.startswith(f"<result>{expected}")
    assert answer.endswith("</result>")


def test_a_turn_without_a_call_ends_the_episode() -> None:
    assert calculator.reply(prompt(), ["<calc>1+1</calc>", "It is 2."]) is None


def test_a_wrong_answer_is_tried_again_and_a_right_one_ends_the_episode() -> None:
    options = {"min_terms": 2, "max_terms": 2}
    entry = reasoning_gym.create_dataset("chain_sum", seed=0, size=1, **options)[0]
    asked = prompt({"task": "chain_sum", "options": options, "entry": entry})
    assert second_try.reply(asked, ["<answer>never</answer>"]) == second_try.TRY_AGAIN
    right = entry["answer"]
    assert second_try.reply(asked, ["no", f"I see. <answer> {right} </answer>"]) is None
    assert second_try.reply(asked, [right]) is None
    with pytest.raises(ValueError, match="reasoning-gym task, got one of s"):
        second_try.reply(prompt(), ["4"])
