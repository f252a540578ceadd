"""Replies of an environment between two turns, with and without a chat template."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_rl.config import DataConfig
from megatron_rl.data.replies import ReplyFormat
from megatron_rl.data.tokenizer import PromptFormat
from megatron_rl.errors import ConfigError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_checkpoint: Path):
    found = AutoTokenizer.from_pretrained(tiny_checkpoint)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return found


def test_an_episode_has_the_tokens_of_the_rendered_chat(tokenizer) -> None:
    """Although nothing is rendered but the prompt, in random episodes."""
    tokenizer.chat_template = CHATML
    form, reply_ids = PromptFormat(tokenizer, DataConfig()), ReplyFormat(tokenizer, DataConfig())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chance = random.Random(0)
    for _ in range(50):
        messages = [("user", "".join(chance.choices("0123456789+-", k=5)))]
        ids = list(form.token_ids(form.text(messages)))
        for _ in range(chance.randint(1, 4)):
            said, answer = ("".join(chance.choices("0123456789=", k=4)) for _ in range(2))
            is_ended = chance.random() < 0.7  # otherwise the turn was stopped by a text
            ids += tokenizer(said, add_special_tokens=False).input_ids + [end] * is_ended
            ids += reply_ids(answer, after_stop_token=is_ended)
            messages += [("assistant", said), ("user", answer)]
        assert ids == list(form.token_ids(form.text(messages)))


def test_without_a_template_a_reply_has_a_line_of_its_own(tokenizer) -> None:
    tokenizer.chat_template = None
    ids = ReplyFormat(tokenizer, DataConfig())("84", after_stop_token=True)
    assert tokenizer.decode(ids).replace(" ", "").strip() == "84"


def test_a_template_that_leaves_turns_out_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ConfigError, match="a turn of the assistant and the user's answer"):
        ReplyFormat(tokenizer, DataConfig())
