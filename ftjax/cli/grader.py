"""A language model in this process that answers a judge's questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ftjax import rollout
from ftjax.cli import pretrained

Ask = Callable[[Sequence[str]], list[str]]
"""`questions -> answers`: what `rewards.judge_model` takes as its `ask`."""


def load(name: str, *, dtype: str = "auto", batch_size: int = 8, max_tokens: int = 256) -> Ask:
    """Return how the model at a name answers: its most likely tokens, each question by itself.

    Args:
      name: a folder, a .gguf file, a hub id or a known name, or the workdir of a run that left an adapter, which is asked by the template
        of that run.
      dtype: of its weights.
      batch_size: questions at a time, which changes no answer.
      max_tokens: the most tokens of an answer.
    """
    found = pretrained.of_name(name, dtype=dtype)
    encoder = rollout.Encoder(found.model, found.tokenizer, **pretrained.template(found))

    def ask(questions: Sequence[str]) -> list[str]:
        asked = [[{"role": "user", "content": question}] if encoder.chats else question for question in questions]
        encoded = [encoder.fit(one, max_tokens=max_tokens) for one in asked]
        return rollout.generate_text(found.model, found.params, found.tokenizer, encoded, max_tokens=max_tokens, batch_size=batch_size)

    return ask
