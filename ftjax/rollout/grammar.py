"""Grammars: which tokens may follow, as an automaton over tokens that the device walks; a state is a row of a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NOTHING = -1
"""No state: the token may not follow."""


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """An automaton that begins in state 0: for each state the tokens that may follow, and the state that each leads to."""

    transitions: Sequence[Mapping[int, int]]
    eos_id: int | None = None
    """The token that may follow where a text is whole, as far as there is one."""

    def __post_init__(self):
        if dead := [state for state, following in enumerate(self.transitions) if not following]:
            raise ValueError(f"grammar: after state {dead[0]} no token may follow; where a text is whole that is its eos_id.")


def choice(texts: Sequence[str], tokenizer: Any, *, eos_id: int) -> Grammar:
    """Return the grammar of a few texts, each in the tokens that the tokenizer makes of it, then `eos_id`.

    Raises:
      ValueError: there is no text, or an empty one.
    """
    if not texts or not all(texts):
        raise ValueError(f"choice: texts that are not empty, at least one, not {list(texts)}.")
    states: list[dict[int, int]] = [{}]
    for text in texts:
        state = 0
        for token in tokenizer.encode(text, add_special_tokens=False):
            if token not in states[state]:
                states.append({})
                states[state][token] = len(states) - 1
            state = states[state][token]
        states[state][eos_id] = state
    return Grammar(states, eos_id)


def regex(pattern: str, tokenizer: Any, *, eos_id: int) -> Grammar:
    """Return the grammar of all texts that match a regular expression as a whole, then `eos_id` (Willard and Louf, 2023, arXiv 2307.09702).

    Needs `pip install outlines-core`. A token that is part of a character alone is never chosen.

    Raises:
      ValueError: the pattern is none, or no tokens can match it.
    """
    from outlines_core import Index, Vocabulary  # an extra

    index = Index(pattern, Vocabulary(eos_id, _texts(tokenizer, eos_id)))
    transitions, start = index.get_transitions(), index.get_initial_state()
    numbers = {state: n for n, state in enumerate([start, *(state for state in transitions if state != start)])}
    return Grammar([{token: numbers[there] for token, there in transitions[state].items()} for state in numbers], eos_id)


def json_schema(schema: Mapping[str, Any], tokenizer: Any, *, eos_id: int) -> Grammar:
    """Return the grammar of JSON of a schema, as far as `outlines-core` knows it; see `regex`."""
    from outlines_core.json_schema import build_regex_from_schema

    return regex(build_regex_from_schema(json.dumps(schema)), tokenizer, eos_id=eos_id)


def starts(grammars: Sequence[Grammar]) -> tuple[int, ...]:
    """Return where each of some grammars begins in their table, behind state 0, which allows everything."""
    return tuple(np.cumsum([1, *(len(grammar.transitions) for grammar in grammars)])[:-1].tolist())


def tabulate(grammars: Sequence[Grammar], vocabulary: int) -> np.ndarray:
    """Return the states of all grammars in one table `[n, v]`: `table[state, token]` is the next state, or `NOTHING`.

    Its rows are a power of two, so that grammars of like size are one program.

    Raises:
      ValueError: a grammar has a token that is not of the vocabulary.
    """
    rows = 1 + sum(len(grammar.transitions) for grammar in grammars)
    table = np.full((2 ** (rows - 1).bit_length(), vocabulary), NOTHING, np.int32)
    table[0] = 0
    for start, grammar in zip(starts(grammars), grammars, strict=True):
        for state, following in enumerate(grammar.transitions):
            if stray := [token for token in following if not 0 <= token < vocabulary]:
                raise ValueError(
                    f"grammar: token {stray[0]} is none of the model's {vocabulary:,}; was it made with this model's tokenizer?"
                )
            table[start + state, list(following)] = np.asarray(list(following.values()), np.int32) + start
    return table


def _texts(tokenizer: Any, eos_id: int) -> dict[str, list[int]]:
    """Return the tokens of each text that is one token, as it reads behind another token."""
    before = tokenizer.encode("a", add_special_tokens=False)
    skip, texts = len(tokenizer.decode(before)), {}
    special = set(tokenizer.all_special_ids) | {eos_id}
    for token in range(len(tokenizer)):
        text = "" if token in special else tokenizer.decode([*before, token], clean_up_tokenization_spaces=False)[skip:]
        if text and "\ufffd" not in text:
            texts.setdefault(text, []).append(token)
    return texts
