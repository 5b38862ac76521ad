"""A tokenizer from the metadata of a GGUF file: vocabulary, merges and token types, as `transformers` rebuilds them.

A GGUF file has no `tokenizer.json`. It names a kind (`tokenizer.ggml.model`) and the way text is split before merging
(`tokenizer.ggml.pre`), lists the tokens with their types, and the merges or the scores that imply them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ftjax.tree import nearest

CONTROL, USER_DEFINED = 3, 4
"""Token types of `tokenizer.ggml.token_type` that are matched whole in a text; control tokens are special as well."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `smollm` is GPT-2's split because transformers converts it so. SmolLM2's own tokenizer.json isolates digits before splitting, which
# differs in one case: a run of two or more spaces before a digit is one token there and single spaces here.
SPLITS = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
"""`tokenizer.ggml.pre` -> the regular expression whose matches are never merged across; None is GPT-2's."""


def build(meta: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer and the keywords that `PreTrainedTokenizerFast` wants beside it.

    Args:
      meta: the metadata of a GGUF file.

    Raises:
      ValueError: the kind of tokenizer or its splitting is not supported, or the metadata are incomplete.
    """
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = meta.get("tokenizer.ggml.model")
    if kind not in kinds:
        raise ValueError(f"gguf: tokenizer of kind {kind!r} is not supported; expected one of {sorted(kinds)}")
    if "tokenizer.ggml.tokens" not in meta:
        raise ValueError("gguf: the metadata lack tokenizer.ggml.tokens: the file has no vocabulary")
    tokenizer = kinds[kind](meta)
    _add_whole_tokens(tokenizer, meta)
    _add_ends(tokenizer, meta)
    return tokenizer, {name: token for name, token in _special(meta).items() if token is not None} | _chat_template(meta)


def _byte_level(meta: Mapping[str, Any]) -> Tokenizer:
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise ValueError(f"gguf: splitting {pre!r} (tokenizer.ggml.pre) is not supported; nearest: {nearest(pre, SPLITS)}.")
    if "tokenizer.ggml.merges" not in meta:
        raise ValueError("gguf: the metadata lack tokenizer.ggml.merges, which a byte-level tokenizer cannot do without")
    spelling = bytes_to_characters()
    alphabet = set(spelling)
    vocab = {
        token if set(token) <= alphabet else "".join(spelling[byte] for byte in token.encode()): i
        for i, token in enumerate(meta["tokenizer.ggml.tokens"])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(meta), fuse_unk=False))
    split = SPLITS[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        byte_level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(meta: Mapping[str, Any]) -> Tokenizer:
    """Return SentencePiece's BPE: Llama 2, Mistral and Gemma, which spells no prefix space and ranks merges by token order."""
    gemma = str(meta.get("general.architecture", "")).startswith("gemma")
    tokens = list(meta["tokenizer.ggml.tokens"])
    if gemma:  # llama.cpp spells runs of spaces as spaces; SentencePiece as "▁"
        tokens = ["▁" * len(token) if " " in token and not token.strip() else token for token in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    ranks = [-float(i) for i in range(len(tokens))] if gemma else meta.get("tokenizer.ggml.scores")
    if "tokenizer.ggml.merges" in meta:
        merges = _merges(meta)
    elif ranks is None:
        raise ValueError("gguf: the metadata lack both tokenizer.ggml.merges and tokenizer.ggml.scores")
    else:
        merges = _implied_merges(vocab, dict(zip(tokens, ranks, strict=True)))
    prefix = not gemma and meta.get("tokenizer.ggml.add_space_prefix", True)
    unknown = _special(meta)["unk_token"] if gemma else None
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unknown))
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first" if prefix else "never", split=False)
    strip = [decoders.Strip(" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def _merges(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]


def _implied_merges(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return every way to cut a token into two tokens, best score first: what SentencePiece's BPE does, written as merges."""
    found = []
    for token, score in scores.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        found += [(score, left, right) for left, right in sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _add_whole_tokens(tokenizer: Tokenizer, meta: Mapping[str, Any]) -> None:
    """Add the tokens that a text never cuts: control tokens as special ones, user-defined ones as plain ones."""
    kinds: Iterable[int] = meta.get("tokenizer.ggml.token_type", ())
    byte_level = meta["tokenizer.ggml.model"] == "gpt2"
    alphabet, vocab = set(bytes_to_characters()), tokenizer.get_vocab()
    control, plain = [], []
    for token, kind in zip(meta["tokenizer.ggml.tokens"], kinds, strict=False):
        # A control token outside the byte alphabet is respelt in the vocabulary: adding it would grow the vocabulary past the model's.
        if kind == CONTROL and (not byte_level or set(token) <= alphabet):
            control.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED and token in vocab:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(plain)


def _add_ends(tokenizer: Tokenizer, meta: Mapping[str, Any]) -> None:
    special = _special(meta)
    # Older SentencePiece files have no flag, and llama.cpp begins their texts with BOS.
    begins = meta.get("tokenizer.ggml.add_bos_token", meta["tokenizer.ggml.model"] == "llama") and special["bos_token"]
    ends = meta.get("tokenizer.ggml.add_eos_token", False) and special["eos_token"]
    if not begins and not ends:
        return
    first = f"{begins} " if begins else ""
    last = f" {ends}" if ends else ""
    second = f"{begins}:1 " if begins else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A{last}",
        pair=f"{first}$A{last} {second}$B:1{last and last + ':1'}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {begins, ends} if token],
    )


def _special(meta: Mapping[str, Any]) -> dict[str, str | None]:
    tokens = meta["tokenizer.ggml.tokens"]
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: meta.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    return {role: None if i is None or i >= len(tokens) else tokens[i] for role, i in ids.items()}


def _chat_template(meta: Mapping[str, Any]) -> dict[str, str]:
    template = meta.get("tokenizer.chat_template")
    return {"chat_template": template} if template else {}


def bytes_to_characters() -> list[str]:
    """Return GPT-2's printable character for each byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
