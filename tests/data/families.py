"""Short chat templates that behave as those of the model families do, each with its special tokens and what it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import tokenizers
from transformers import PreTrainedTokenizerFast

from ftjax.hf.gguf_tokenizer import bytes_to_characters


class Family(NamedTuple):
    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None
    first: str
    """How the turn "One." is trained when others follow; "!" where it cannot be."""
    last: str
    """How the turn "Two." is trained at the end."""


LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if m.role == 'assistant' and '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set head = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set head = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (head if loop.first else '') }}"
    "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Mistral writes the system prompt into the last user message, so earlier messages change as the conversation grows.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set last = messages | selectattr('role', 'equalto', 'user') | list | last == m %}"
    "{{ '[INST] ' + (system if last else '') + m.content + '[/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
ROLES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
CHATML = ("<|im_start|>", "<|im_end|>")

FAMILIES = {
    "llama3": Family(
        LLAMA3,
        ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        "<|begin|>",
        "One.<|eot_id|>",
        "Two.<|eot_id|>",
    ),
    "qwen2.5": Family(QWEN25, (*CHATML, "<|endoftext|>"), "<|im_end|>", None, "One.<|im_end|>", "Two.<|im_end|>"),
    # the model must write the empty thought itself: the generation prompt does not hold it
    "qwen3": Family(QWEN3, (*CHATML, "<|endoftext|>"), "<|im_end|>", None, "One.<|im_end|>", "<think>\n\n</think>\n\nTwo.<|im_end|>"),
    "gemma": Family(
        GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>", "One.<end_of_turn>", "Two.<end_of_turn>"
    ),
    "mistral": Family(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>", " One.</s>", " Two.</s>"),
    # no end-of-turn token: EOS is added where the conversation ends
    "roles": Family(ROLES, ("<eos>",), "<eos>", None, " One.", " Two."),
}


@functools.cache
def byte_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes and the special tokens of a family, so that a mask over tokens is a mask over bytes."""
    family = FAMILIES[name]
    vocab = {character: byte for byte, character in enumerate(bytes_to_characters())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return _with_special(backend, family)


@functools.cache
def word_tokenizer(name: str = "qwen2.5") -> PreTrainedTokenizerFast:
    """A trained byte-level BPE whose offsets leave out leading spaces, as GPT-2's do, with real merges over the borders of words."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(
        ["the answer is the sum of the numbers \n\n  user assistant system One. Two. Sum it up, please. été 你好"] * 20, trainer
    )
    return _with_special(backend, FAMILIES[name])


def writing_bos(name: str, make: Callable[[str], PreTrainedTokenizerFast] = byte_tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that starts every text with the BOS of its family, as those of the models do."""
    plain = make(name)
    backend, bos = tokenizers.Tokenizer.from_str(plain.backend_tokenizer.to_str()), plain.bos_token
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, plain.bos_token_id)])
    template = {"chat_template": plain.chat_template, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=plain.eos_token, **template)


def _with_special(backend: tokenizers.Tokenizer, family: Family) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in family.special])
    bos = {"bos_token": family.bos} if family.bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=family.eos, chat_template=family.template, clean_up_tokenization_spaces=False, **bos
    )
