"""Prompts as arrays: text and messages to token ids, and lists of unequal length to rectangles of few shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftjax import data
from ftjax.data.formats import ROLES
from ftjax.tree import nearest
from ftjax.types import Model

Prompt = str | Sequence[Mapping[str, Any]] | np.ndarray
"""A text to continue as it is, the messages of a conversation to answer, or token ids int `[t]`."""


class Encoder:
    """Turns prompts of one model into token ids, and knows which tokens end a completion.

    Args:
      model: whose context bounds a prompt.
      tokenizer: of the model.
      template: how messages become text: see `data.make_encoder`.
      template_variables: what the template reads beside the messages: see there too.
    """

    def __init__(self, model: Model, tokenizer: Any, *, template: str = "auto", template_variables: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.context = int(model.config.max_position_embeddings)
        self._encoder = data.make_encoder(tokenizer, max_tokens=self.context, template=template, template_variables=template_variables)
        self.chats = self._encoder.template is not None
        configured = model.config.eos_token_id
        self.eos_ids = tuple(sorted({*_as_tuple(configured), *_as_tuple(tokenizer.eos_token_id), *self._end_of_turn()}))
        """The end-of-sequence tokens of config and tokenizer, and the one that the template puts after an assistant's message."""

    def encode(self, prompt: Prompt) -> np.ndarray:
        """Return the token ids int32 `[t]` that the model is given.

        Raises:
          ValueError: the prompt is empty, or its messages are malformed or refused by the template.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif isinstance(prompt, np.ndarray):
            ids = prompt
        else:
            ids = self._encoder.prompt(data.Example(messages=tuple(map(_message, prompt))))
        if not len(ids):
            raise ValueError("the prompt is empty")
        return np.asarray(ids, np.int32)

    def fit(self, prompt: Prompt, *, max_tokens: int) -> np.ndarray:
        """Return `encode(prompt)`, uncut; a prompt too long to leave room for `max_tokens` in the model's context is a ValueError."""
        ids = self.encode(prompt)
        if len(ids) + max_tokens > self.context:
            raise ValueError(
                f"{len(ids):,} tokens and max_tokens {max_tokens:,} exceed the model's context of {self.context:,}; "
                "shorten the prompt or lower max_tokens"
            )
        return ids

    def _end_of_turn(self) -> tuple[int, ...]:
        """Return the special token that ends an assistant's message: the last one that training on it would train."""
        turn = data.Example(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}))
        encoded = self._encoder.encode([turn])[0]
        if isinstance(encoded, data.RowError):
            return ()
        last = int(encoded.tokens[np.flatnonzero(encoded.loss_mask)[-1]])
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return (last,) if last in special else ()


def bucket(length: int) -> int:
    """Return the width of the rows that hold `length` tokens: 16, 24, 32, 48, 64, 96, …: two widths for each doubling.

    >>> [bucket(length) for length in (1, 16, 17, 33, 100, 129)]
    [16, 16, 24, 48, 128, 192]
    """
    power = 16
    while power < length:
        power *= 2
    return power * 3 // 4 if 16 < power and length <= power * 3 // 4 else power


def pad(prompts: Sequence[np.ndarray], *, rows: int | None = None, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts as `(tokens, segment_ids)`, int32 `[rows, width]` each, padded on the left; missing rows are padding alone.

    Args:
      prompts: int `[t]` each.
      rows: of the rectangle; as many as there are prompts if None.
      width: of the rectangle; the bucket of the longest prompt if None.
    """
    width = width or bucket(max(map(len, prompts)))
    tokens, segment_ids = (np.zeros((rows or len(prompts), width), np.int32) for _ in range(2))
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segment_ids[row, width - len(prompt) :] = 1
    return tokens, segment_ids


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        raise ValueError(f"a message is an object with role and content, not {message!r}")
    if message.get("role") not in ROLES:
        raise ValueError(f"there is no role {message.get('role')!r}; nearest: {nearest(str(message.get('role')), ROLES)}")
    return dict(message)


def _as_tuple(ids: Any) -> tuple[int, ...]:
    return () if ids is None else tuple(ids) if isinstance(ids, (tuple, list)) else (ids,)
