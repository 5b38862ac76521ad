"""What is said between two turns of a policy, as tokens to append: nothing that it wrote is ever written again.

A conversation that is rendered and tokenised anew has other tokens than those that were sampled (a tokenizer merges differently, a template
strips or trims), and then nobody learns from what was done. So the policy's tokens stay, and of a rendered conversation only that part is
tokenised which comes after the policy's message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ftjax import data
from ftjax.data.formats import Message

_SENTINEL = "\ue0f7ftjax\ue0f8"  # private-use characters: no template splits or strips them


@dataclasses.dataclass(frozen=True)
class Turns:
    """Turns observations into tokens as a model's template does.

    The difference of two renders: `render(prompt, turn, observation, …)` without `render(prompt, turn)`, where a sentinel stands for the
    policy's turn. Only prompt and observation are rendered, so that a template that rewrites earlier turns (Qwen 3 strips their thinking)
    changes nothing. Without a template an observation is appended as it is, and brings its own spaces and marks.
    """

    encoder: data.Encoder

    def tokens(self, prompt: data.Example, observation: Sequence[Message], *, ended: bool) -> np.ndarray:
        """Return the tokens int32 `[t]` between a turn of the policy and the next.

        Args:
          prompt: of the episode, perhaps with an answer that the policy does not see.
          observation: what is said; nothing is an empty list, after which the policy just has another turn.
          ended: whether the policy ended its turn with a token that does so; otherwise the end is appended too.

        Raises:
          data.TemplateError: the template refuses such a conversation.
          ValueError: it does not show where a turn ends.
        """
        plain = [{**message, "content": self._harmless(message["content"])} for message in observation]
        text = "".join(message["content"] for message in plain)
        if self.encoder.template is not None:
            asked = prompt.messages[:-1] if data.answer(prompt) else prompt.messages
            turn = {"role": "assistant", "content": _SENTINEL}
            whole = self.encoder.template.render([*asked, turn, *plain], add_generation_prompt=True, tools=prompt.tools)
            before, *after = whole.split(_SENTINEL)
            if len(after) != 1:
                raise ValueError("the chat template does not show a turn that others follow; choose another data.template")
            end = self.encoder.end_of_turn.match(after[0]) if ended else None
            text = after[0][end.end() :] if end else after[0]
        ids = self.encoder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, np.int32)

    def _harmless(self, text: str) -> str:
        """Return the text without special tokens, so that what a tool found cannot end its message and begin another."""
        while found := [token for token in (*self.encoder.control, _SENTINEL) if token in text]:
            for token in found:
                text = text.replace(token, "")
        return text
