"""The verifiers of reasoning-gym, a hundred procedural tasks (arXiv:2505.24760)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ftjax.rewards.completion import Completion, text
from ftjax.rewards.extras import check
from ftjax.rewards.think import block
from ftjax.rewards.worker import NotStarted, Worker, WorkerError

_VERIFIER = Worker("reasoning", "reasoning_gym", isolated=True)


def reasoning_gym(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    answer: Sequence[str | None],
    metadata: Sequence[Any],
    seconds: float = 5.0,
    **columns: Any,
) -> list[float | None]:
    """Return what the verifier of each row's task says of the last `<answer>` block, or of all the text, in [0, 1].

    Some verifiers call `eval` on the answer (`string_insertion`, `binary_matrix`; `sympy.parse_expr` does too), so they all run in a jail,
    each in a process of its own. An answer that is a program can still talk such a verifier into any score for itself; look at what wins.
    One that raises or takes too long scores 0: they are written for answers of the right shape.

    Args:
      prompts: not looked at.
      completions: what the model wrote.
      answer: the right answers, as the task gave them.
      metadata: the tasks' metadata, dicts or their JSON, with `source_dataset`, the task's name. None: the row scores None.
      seconds: of each verification.
      **columns: `question` is handed on, for the verifiers that read it.

    Raises:
      ValueError: there is no such task.
      sandbox.NoIsolation: the kernel does not isolate processes.
    """
    check("reasoning_gym")
    questions = columns.get("question", [""] * len(completions))
    scores: list[float | None] = []
    for completion, right, known, question in zip(completions, answer, metadata, questions, strict=True):
        known = json.loads(known) if isinstance(known, str) else known
        if known is None:
            scores.append(None)
            continue
        scores.append(_verify(text(completion), {"question": question, "answer": right, "metadata": known}, seconds))
    return scores


def _verify(said: str, entry: dict[str, Any], seconds: float) -> float:
    found, task = block(said, "answer"), entry["metadata"]["source_dataset"]
    item = {"task": task, "text": said.strip() if found is None else found, "entry": entry}
    try:
        (reply,) = _VERIFIER.ask([item], seconds=seconds, together=False)
    except NotStarted:
        raise
    except WorkerError:  # an answer that is run may end the verifier; the next one finds another
        return 0.0
    score = reply.get("value", 0.0)
    if score is None:
        raise ValueError(f"reasoning_gym: the installed version has no task {task!r}.")
    return score
