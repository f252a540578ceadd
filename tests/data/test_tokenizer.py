import json

import pytest
from tokenizers import processors

from megatron_rl.data.tokenizer import PromptFormat, load_tokenizer
from megatron_rl.errors import ConfigError, DataError

CHAT = (("system", "Hi"), ("user", "4+3"))


def test_load_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), vocab_size=100)
    assert loaded("4+3").input_ids == [1, 23, 14, 22]
    assert loaded.eos_token_id == 2
    with pytest.raises(DataError, match=r"below the model's vocab_size 99, got 99 \('<unk>'\)"):
        load_tokenizer(str(tmp_path), vocab_size=99)


def test_an_added_token_beyond_the_vocabulary_is_refused(tokenizer, tmp_path):
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"got 100 \('<tool>'\)"):
        load_tokenizer(str(tmp_path), vocab_size=100)
    assert len(load_tokenizer(str(tmp_path), vocab_size=128)) == 101


def test_a_missing_or_broken_tokenizer(tokenizer, tmp_path):
    with pytest.raises(DataError, match="expected a checkpoint folder, got"):
        load_tokenizer(str(tmp_path / "none"), 100)
    with pytest.raises(DataError, match="expected a checkpoint folder, got ''"):
        load_tokenizer("", 100)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(DataError, match=r"expected a tokenizer \(tokenizer.json"):
        load_tokenizer(str(tmp_path), 100)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(DataError, match="expected a tokenizer that loads"):
        load_tokenizer(str(tmp_path), 100)


def test_format_without_a_chat_template(tokenizer):
    for setting in ("auto", "never"):
        prompt_format = PromptFormat(tokenizer, setting)
        assert prompt_format.text(CHAT) == "Hi\n\n4+3"
        assert prompt_format.token_ids("4+3=") == (1, 23, 14, 22, 32)
        assert prompt_format.response_ids("7") == (26, 2)
        assert prompt_format.response_ids("") == (2,)
    with pytest.raises(ConfigError, match=r"data\.chat_template: .*auto or never"):
        PromptFormat(tokenizer, "always")


def test_format_with_a_chat_template(chat_tokenizer):
    for setting in ("auto", "always"):
        prompt_format = PromptFormat(chat_tokenizer, setting)
        text = prompt_format.text(CHAT)
        assert text == "[system]Hi<eos>[user]4+3<eos>[assistant]"
        # The template writes its own special tokens; none is put before it.
        ids = prompt_format.token_ids(text)
        assert chat_tokenizer.decode(ids) == text
        assert ids[0] != 1
        assert ids.count(2) == 2
    assert PromptFormat(chat_tokenizer, "never").text(CHAT) == "Hi\n\n4+3"


def test_an_eos_that_the_tokenizer_adds_is_no_part_of_a_prompt(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    prompt_format = PromptFormat(tokenizer, "auto")
    assert tokenizer("7").input_ids == [1, 26, 2]
    assert prompt_format.token_ids("7") == (1, 26)
    assert prompt_format.response_ids("7") == (26, 2)


def test_a_response_needs_an_eos(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="a tokenizer with an eos token"):
        PromptFormat(tokenizer, "auto").response_ids("7")
