"""JSON: whether the completion is, or ends with, a value that a schema allows."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.rewards.completion import Completion, text
from ftjax.rewards.extras import require

_NONE = object()


def json_schema(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    schema: Mapping[str, Any] | str | Sequence[Mapping[str, Any] | str | None],
    partial: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    """Return 1 for each completion whose JSON the schema allows, `partial` for JSON that it does not, 0 where there is none.

    The JSON is the whole completion or its last fenced block. Strict: no NaN, no Infinity, no key twice. Schemas say their draft by
    `$schema`; without one it is 2020-12. Nothing is fetched for a `$ref`.

    Args:
      prompts: not looked at.
      completions: what the model wrote.
      schema: one for all (an option), or a column of them; each a dict or its JSON. None: the row scores None.
      partial: the score of JSON that the schema does not allow, in [0, 1].
      **columns: not looked at.
    """
    require("jsonschema")
    schemas = [schema] * len(completions) if isinstance(schema, (str, Mapping)) else schema
    scores: list[float | None] = []
    for completion, wanted in zip(completions, schemas, strict=True):
        if wanted is None:
            scores.append(None)
            continue
        validator = _validator(wanted if isinstance(wanted, str) else json.dumps(wanted))
        value = read(text(completion))
        scores.append(0.0 if value is _NONE else 1.0 if _allows(validator, value) else partial)
    return scores


def read(text: str) -> Any:
    """Return the value of the text, or of its last fenced block, or a mark that there is none."""
    for candidate in (text, *_last_fence(text)):
        try:
            return json.loads(candidate, parse_constant=_refuse, object_pairs_hook=_distinct)
        except (ValueError, RecursionError):  # ValueError too for integers of more than 4300 digits
            continue
    return _NONE


def _last_fence(text: str) -> list[str]:
    parts = text.split("```")
    inside = parts[1:-1:2] if len(parts) % 2 else parts[1::2]  # an open block at the end counts as closed
    return [inside[-1].removeprefix("json")] if inside else []


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _allows(validator: Any, value: Any) -> bool:
    try:
        return validator.is_valid(value)
    except RecursionError:  # nested more deeply than any answer is
        return False


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    import jsonschema
    import referencing

    parsed = json.loads(schema)
    kind = jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator)
    kind.check_schema(parsed)
    return kind(parsed, registry=referencing.Registry())  # an empty registry: the default one fetches
