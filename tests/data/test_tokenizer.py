import json

import pytest
from tokenizers import processors

from megatron_rl.config import DataConfig
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
        prompt_format = PromptFormat(tokenizer, DataConfig(chat_template=setting))
        assert prompt_format.text(CHAT) == "Hi\n\n4+3"
        assert prompt_format.token_ids("4+3=") == (1, 23, 14, 22, 32)
        assert prompt_format.response_ids("7") == (26, 2)
        assert prompt_format.response_ids("") == (2,)
    with pytest.raises(ConfigError, match=r"data\.chat_template: .*auto or never"):
        PromptFormat(tokenizer, DataConfig(chat_template="always"))


def test_format_with_a_chat_template(chat_tokenizer):
    for setting in ("auto", "always"):
        prompt_format = PromptFormat(chat_tokenizer, DataConfig(chat_template=setting))
        text = prompt_format.text(CHAT)
        assert text == "[system]Hi<eos>[user]4+3<eos>[assistant]"
        # The template writes its own special tokens; none is put before it.
        ids = prompt_format.token_ids(text)
        assert chat_tokenizer.decode(ids) == text
        assert ids[0] != 1
        assert ids.count(2) == 2
    assert PromptFormat(chat_tokenizer, DataConfig(chat_template="never")).text(CHAT) == "Hi\n\n4+3"


def test_an_eos_that_the_tokenizer_adds_is_no_part_of_a_prompt(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    prompt_format = PromptFormat(tokenizer, DataConfig())
    assert tokenizer("7").input_ids == [1, 26, 2]
    assert prompt_format.token_ids("7") == (1, 26)
    assert prompt_format.response_ids("7") == (26, 2)


def test_a_response_needs_an_eos(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="a tokenizer with an eos token"):
        PromptFormat(tokenizer, DataConfig()).response_ids("7")


THINKING = (
    "{% generation %}{% endgeneration %}{% for message in messages %}[{{ message.role }}]"
    "{{ message.content }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def test_arguments_of_the_chat_template(chat_tokenizer):
    chat_tokenizer.chat_template = THINKING
    for arguments, end in (({}, ""), ({"enable_thinking": False}, "<think></think>")):
        config = DataConfig(chat_template_arguments=arguments)
        assert PromptFormat(chat_tokenizer, config).text(CHAT) == f"[system]Hi[user]4+3{end}"
    for name in ("enable_thinkin", "messages", "tokenize", "add_generation_prompt"):
        config = DataConfig(chat_template_arguments={name: True})
        with pytest.raises(
            ConfigError, match=rf"template_arguments: .*'{name}' \(nearest: enable_th"
        ):
            PromptFormat(chat_tokenizer, config)


def test_arguments_without_a_template(tokenizer):
    config = DataConfig(chat_template_arguments={"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"chat_template_arguments: expected a tokenizer with"):
        PromptFormat(tokenizer, config)
    for changes in ({"chat_template_arguments": {"a": 1}}, {"chat_template_file": "a.jinja"}):
        with pytest.raises(ConfigError, match=r"expected none with chat_template=never"):
            DataConfig(chat_template="never", **changes)


def test_a_template_file(tokenizer, chat_tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("\ufeff" + THINKING, encoding="utf-8")  # as some editors save it
    config = DataConfig(
        chat_template_file=str(path), chat_template_arguments={"enable_thinking": False}
    )
    for each in (tokenizer, chat_tokenizer):
        prompt_format = PromptFormat(each, config)
        text = prompt_format.text(CHAT)
        assert text == "[system]Hi[user]4+3<think></think>"
        assert prompt_format.token_ids(text)[0] != 1  # no bos: a template writes its own
    with pytest.raises(ConfigError, match=r"chat_template_file: expected a Jinja file at .*none"):
        PromptFormat(tokenizer, DataConfig(chat_template_file=str(tmp_path / "none.jinja")))
    path.write_text("{% if x %}\n{% endfor %}")
    with pytest.raises(ConfigError, match=r"expected a Jinja template, got .* in line 2"):
        PromptFormat(tokenizer, config)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system') }}", "{{ messages[0].content + 1 }}", "{{ missing.x }}"],
)
def test_a_template_that_fails_is_one_line(template, chat_tokenizer):
    chat_tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"row 7: expected messages that the chat") as caught:
        PromptFormat(chat_tokenizer, DataConfig()).text(CHAT, "row 7")
    assert "\n" not in str(caught.value)
