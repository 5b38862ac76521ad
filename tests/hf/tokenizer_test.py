"""Tokenizers by path: folders give back what was saved, and bytes are bytes."""

import pytest

from ftjax.hf import tokenizer

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize("text", ["", "plain", "naïve 猫 \n\t  é\0", "<|im_start|>x<|im_end|><|pad|>"])
def test_bytes_round_trip(text):
    tokens = tokenizer.byte_tokenizer()
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text
    assert "<|" in text or ids == list(text.encode())


def test_the_byte_tokenizer_is_as_announced():
    tokens = tokenizer.byte_tokenizer()
    assert (len(tokens), tokens.bos_token, tokens.eos_token, tokens.pad_token) == (260, None, "<|im_end|>", "<|pad|>")
    text = tokens.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n<|im_start|>assistant\n"


def test_a_saved_folder_gives_the_same_tokenizer(tmp_path):
    tokens = tokenizer.byte_tokenizer()
    tokens.save_pretrained(tmp_path)
    again = tokenizer.load(tmp_path)
    text = "a  b\n<|im_end|> é"
    assert again(text)["input_ids"] == tokens(text)["input_ids"]
    assert (again.chat_template, again.eos_token_id, again.pad_token_id) == (tokens.chat_template, tokens.eos_token_id, tokens.pad_token_id)


def test_a_chat_template_file_is_read(tmp_path):
    tokenizer.byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("changed")
    assert tokenizer.load(tmp_path).chat_template == "changed"


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "nothing"}}'])
def test_a_malformed_file_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer files of .* cannot be read"):
        tokenizer.load(tmp_path)
