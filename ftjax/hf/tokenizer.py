"""Tokenizers: from a Hugging Face folder, from a GGUF file, and one of bytes for tests and tiny models."""

from __future__ import annotations

import os
from pathlib import Path

import tokenizers

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise everybody to install PyTorch

from transformers import PreTrainedTokenizerFast  # noqa: E402

from ftjax.hf import gguf_file, gguf_tokenizer  # noqa: E402

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load(path: Path | str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a model on disk, with its chat template if it has one.

    Args:
      path: a folder with `tokenizer.json` (or a SentencePiece `tokenizer.model`, which `transformers` converts), or a `.gguf` file.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: a file is malformed, or the GGUF file's tokenizer is not supported.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return from_gguf(gguf_file.open_file(path))
    if (path / "tokenizer.json").is_file():  # which says all: no class of transformers may read it in a way of its own
        try:
            return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        except Exception as error:  # of no narrower class: the parser is not written in Python
            raise ValueError(f"tokenizer: the tokenizer files of {path} cannot be read: {error}") from error
    if not (path / "tokenizer.model").is_file():
        raise FileNotFoundError(f"tokenizer: {path} holds no tokenizer.json; copy it from where the model came from")
    from transformers import AutoTokenizer  # slow to import

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def from_gguf(file: gguf_file.File) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a GGUF file's metadata describe."""
    tokenizer, options = gguf_tokenizer.build(file.metadata)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens 0–255 are bytes, with ChatML and 260 tokens in all: for tests and tiny models.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.encode("é<|im_end|>"), len(tokenizer), tokenizer.eos_token
    ([195, 169, 257], 260, '<|im_end|>')
    """
    vocab = {character: byte for byte, character in enumerate(gguf_tokenizer.bytes_to_characters())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<|endoftext|>"]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
