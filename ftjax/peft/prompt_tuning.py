"""Prompt tuning: a few vectors before every row, trained as if they were embedded tokens."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import weights
from ftjax.peft.soft_prompt import PROMPT, Fields, SoftPrompt, soft_prompt
from ftjax.types import Transform
from ftjax.weights import Leaf

EMBEDDING = "embed_tokens/kernel"
SAMPLED_ROWS = 1024
"""Of the embedding, for its standard deviation."""


def prompt_tuning(num_tokens: int = 20, *, init: str | Sequence[int] = "vocabulary", name: str = "prompt_tuning") -> Transform:
    """Train n vectors that every row begins with; the model stays as it is.

    x' = [p_1, …, p_n, E[t_1], …, E[t_m]]

    Lester et al., 2021, arXiv 2104.08691, section 2: n d numbers, and n more tokens to compute in each row. The vectors are rows of the
    embedding, so a model that scales its embeddings (Gemma) scales these too. In a packed row they stand once and every document sees them.

    Args:
      num_tokens: n.
      init: "vocabulary" for the embeddings of tokens drawn from the whole vocabulary (the paper draws from the 5,000 most common, PEFT as
        we do); "random" for N(0, s²) with s the standard deviation of the embedding (the paper draws from U(±0.5), PEFT from N(0, 1),
        far larger than the embeddings of today's models); or the token ids of a text, repeated or cut to n as PEFT does.
      name: the key in the trainable tree.

    Raises:
      ValueError: there is less than one token, no such init, or an id that is not in the vocabulary.

    Example:
      >>> params = {"embed_tokens": {"kernel": jnp.arange(12.0).reshape(6, 2)}}
      >>> frozen, trainable = prompt_tuning(3, init=[5, 1]).init(jax.random.key(0), params)
      >>> trainable["prompt_tuning"]["prompt"]["embedding"].tolist()
      [[10.0, 11.0], [2.0, 3.0], [10.0, 11.0]]
    """
    if isinstance(init, str) and init not in ("vocabulary", "random"):
        raise ValueError(f"{name}: init is 'vocabulary', 'random' or the token ids of a text, not {init!r}.")
    ids = None if isinstance(init, str) else np.asarray(init, np.int32)
    if ids is not None and not ids.size:
        raise ValueError(f"{name}: init is an empty text.")

    def make(key: jax.Array, table: Leaf) -> Fields:
        drawn = jax.random.fold_in(key, 0)
        if ids is not None:
            if not 0 <= ids.min() <= ids.max() < table.shape[0]:
                raise ValueError(f"{name}: init has ids from {ids.min()} to {ids.max()}; the vocabulary has 0 to {table.shape[0] - 1}.")
            return {"embedding": _rows(table, jnp.asarray(np.resize(ids, num_tokens)))}
        if init == "vocabulary":
            return {"embedding": _rows(table, jax.random.randint(drawn, (num_tokens,), 0, table.shape[0]))}
        some = jax.random.randint(drawn, (SAMPLED_ROWS,), 0, table.shape[0])
        noise = jax.random.normal(jax.random.fold_in(key, 1), (num_tokens, table.shape[1]))
        return {"embedding": noise * jnp.std(_rows(table, some))}

    options = {"init": init if isinstance(init, str) else "text"}
    return soft_prompt(make, dict, name=name, kind="prompt_tuning", slot=PROMPT, reads=EMBEDDING, num_tokens=num_tokens, options=options)


def _rows(table: Leaf, ids: jax.Array) -> jax.Array:
    return weights.embed(ids, table).astype(jnp.float32)


PROMPT_TUNING = SoftPrompt(
    peft_type="PROMPT_TUNING",
    slot=PROMPT,
    feed=dict,
    defaults={
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None,
    },
    # PEFT wants the text itself where it says TEXT; a trained prompt no longer needs it.
    writes={"prompt_tuning_init": lambda options: "SAMPLE_VOCAB" if options["init"] == "vocabulary" else "RANDOM"},
    reads={"init": lambda config: "vocabulary" if config["prompt_tuning_init"] == "SAMPLE_VOCAB" else "random"},
)
