"""Tokenizers from GGUF metadata: token for token what transformers makes of the same file."""

import json
from pathlib import Path

import pytest

from ftjax import hub
from ftjax.hf import gguf_file, gguf_tokenizer, tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens" / "gguf"
TEXTS = json.loads((GOLDENS / "texts.json").read_text())
FILES = sorted(path.stem for path in GOLDENS.glob("*.gguf"))


def check(found, golden):
    ids = [found(text)["input_ids"] for text in TEXTS]
    assert ids == golden["ids"]
    decoded = [golden["decoded"].get(str(n), text) for n, text in enumerate(TEXTS)]
    assert [found.decode(i) for i in ids] == decoded
    assert {role: getattr(found, role) for role in golden["special"]} == golden["special"]


def test_the_sample_is_large():
    assert len(set(TEXTS)) >= 200


@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_transformers(name):
    found = tokenizer.load(GOLDENS / f"{name}.gguf")
    assert len(found) == len(gguf_file.open_file(GOLDENS / f"{name}.gguf").metadata["tokenizer.ggml.tokens"])
    assert found.chat_template.startswith("{% for m in messages %}")
    check(found, json.loads((GOLDENS / f"{name}.json").read_text()))


@pytest.mark.slow
def test_smollm2_tokenizes_as_in_transformers():
    check(tokenizer.load(hub.find("smollm2-135m-instruct")), json.loads((GOLDENS / "smollm2.json").read_text()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "kind 'rwkv' is not supported"),
        ({"tokenizer.ggml.pre": "lama-bpe"}, "'lama-bpe'.*is not supported; nearest: 'llama-bpe'"),
        ({"tokenizer.ggml.tokens": None}, "lack tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "lack tokenizer.ggml.merges"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}, "lack both"),
    ],
)
def test_what_is_not_supported_is_an_error(change, message):
    meta = gguf_file.open_file(GOLDENS / "smollm.gguf").metadata | change
    with pytest.raises(ValueError, match=message):
        gguf_tokenizer.build({key: value for key, value in meta.items() if value is not None})


@pytest.mark.parametrize(("begins", "ends", "ids"), [(True, False, [1, 259, 2]), (False, True, [259, 2]), (True, True, [1, 259, 2])])
def test_the_flags_say_what_begins_and_ends_a_text(begins, ends, ids):
    meta = gguf_file.open_file(GOLDENS / "llama.gguf").metadata
    meta |= {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    found, _ = gguf_tokenizer.build(meta)
    assert found.encode("").ids == ([1] if begins else []) + ([2] if ends else [])


def test_no_prefix_space_where_the_file_says_so():
    meta = gguf_file.open_file(GOLDENS / "llama.gguf").metadata | {"tokenizer.ggml.add_space_prefix": False}
    found, _ = gguf_tokenizer.build(meta)
    assert not found.encode("the", add_special_tokens=False).tokens[0].startswith("▁")
    assert found.decode(found.encode(" the").ids) == " the"
