"""Messages -> tokens and the mask of those that are trained, for any chat template, without marks in it.

An assistant turn's characters are found by rendering. What the model is given before it speaks is the render of the earlier messages
with the generation prompt; if the whole conversation starts so, the turn begins there (which trains an empty `<think>` block when the
model would have to write it). Where the turn ends shows a second render, with a sentinel for its content. The end-of-turn token
belongs to the turn: what is never trained is never sampled. Both must agree with the whole render, or the row is an error.

A token on the border counts as trained if it holds at least one character of the turn: the model has to produce that character. (Where a
tokenizer merges over the border, the prompt alone has other last tokens than here; `inspect.prompt_mismatches` counts such rows.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftjax import tree
from ftjax.data.formats import Example, Message
from ftjax.data.rows import RowError
from ftjax.data.template import CHATML, ChatTemplate, TemplateError, with_variables

TRAIN_ON = ("assistant", "last", "all")
TEMPLATES = ("auto", "chatml", "none")
_SENTINEL = "\ue0f7ftjax\ue0f8"  # private-use characters: no template splits or strips them


class Encoded(NamedTuple):
    """One sequence: `tokens` int32 `[t]`, `loss_mask` uint8 `[t]`, and whether its prompt or its response was cut."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    cut: str = ""
    """"", "prompt" (from the left) or "response" (on the right)."""
    ends: np.ndarray | None = None
    """uint8 `[t]`: 1 at the last token of each of `Example.pieces`, if it has any."""
    prompt: str = ""
    """All text before the first assistant turn that is trained, whatever was cut."""


class _Drawn(NamedTuple):
    """An example as text: the character spans that are trained, and whether EOS must be added."""

    text: str
    spans: list[tuple[int, int]]
    needs_eos: bool
    whole: bool = False
    ends: tuple[int, ...] = ()
    """After which character each piece ends; one past the text where EOS is its end."""
    prompt: str = ""
    """The text before the first assistant turn that is trained."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How examples become tokens. Make one with `make_encoder(…)`."""

    tokenizer: Any
    template: ChatTemplate | None
    max_tokens: int
    train_on: str
    ends: tuple[str, ...]
    """The special tokens that may end a turn, as text."""
    end_of_turn: re.Pattern[str]
    """One of `ends`, perhaps after white space."""
    control: tuple[str, ...]
    """All special tokens, as text."""
    bos: tuple[int, ...]
    """The BOS token if this tokenizer starts every text with one, else nothing."""

    def encode(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """Return the sequence of each example, or why it has none. A document is never cut here: a plan splits the long ones."""
        drawn = [self._draw(example) for example in examples]
        texts = [one.text for one in drawn if isinstance(one, _Drawn)]
        encodings = iter(self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
        return [one if isinstance(one, RowError) else self._encoded(one, next(encodings)) for one in drawn]

    def prompt(self, example: Example) -> np.ndarray:
        """Return the tokens `[t]` that a model is given to write the last assistant message of `example` (or the next one)."""
        messages = _before_answer(example)
        text = (
            _plain(messages) if self.template is None else self.template.render(messages, add_generation_prompt=True, tools=example.tools)
        )
        ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(self._with_bos(ids), np.int32)

    def holds_control(self, example: Example) -> bool:
        """Return whether the text of an example holds special tokens itself."""
        pieces = [example.text or "", *(message["content"] for message in example.messages)]
        return any(token in piece for piece in pieces for token in self.control)

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if not self.bos or ids[:1] == list(self.bos) else [*self.bos, *ids]

    def _draw(self, example: Example) -> _Drawn | RowError:
        try:
            if example.text is not None:
                drawn = _Drawn(example.text, [(0, len(example.text))], self._needs_eos(example.text), whole=True)
            else:
                drawn = self._plain_pair(example) if self.template is None else self._conversation(example)
            if drawn.needs_eos and self.tokenizer.eos_token_id is None:
                raise RowError("the tokenizer has no EOS token to end a sequence with")
            if example.pieces:
                drawn = drawn._replace(ends=_piece_ends(drawn, example.pieces))
            drawn = drawn._replace(prompt=drawn.text[: drawn.spans[0][0]] if drawn.spans else drawn.text)
            return drawn._replace(spans=[(0, len(drawn.text))]) if self.train_on == "all" else drawn
        except RowError as error:
            return error.at(example.where)
        except TemplateError as error:
            return RowError(str(error), where=example.where)

    def _needs_eos(self, text: str) -> bool:
        return not text.endswith(self.tokenizer.eos_token or "\0")

    def _plain_pair(self, example: Example) -> _Drawn:
        if [message["role"] for message in example.messages] != ["user", "assistant"]:
            raise RowError("a conversation needs a chat template, and template='none' is set; say template='chatml' or give one")
        prompt, completion = (message["content"] for message in example.messages)
        return _Drawn(prompt + completion, [(len(prompt), len(prompt) + len(completion))], self._needs_eos(completion))

    def _conversation(self, example: Example) -> _Drawn:
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in example.messages]
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        turns = turns[-1:] if self.train_on == "last" else turns
        turns = [at for at in turns if example.messages[at].get("weight", 1) != 0]
        text = self.template.render(messages, tools=example.tools)
        if _SENTINEL in text:
            raise RowError("holds the private-use characters U+E0F7 ftjax U+E0F8, which mark turns")
        spans = [self._turn(text, messages, at, example.tools) for at in turns]
        if not turns or turns[-1] < len(messages) - 1 or text[: spans[-1][1]].endswith(self.ends or "\0"):
            return _Drawn(text, spans, needs_eos=False)
        end = spans[-1][1]  # of the last message, and the template has no end-of-turn token: EOS takes its place
        if text[end:].strip():
            raise RowError(
                f"the chat template ends a turn with {text[end:].strip()[:20]!r}, which is no special token of this tokenizer, "
                "so the model could not learn to stop; choose another template, or add the token to the tokenizer"
            )
        return _Drawn(text[:end], spans, needs_eos=True)

    def _turn(self, text: str, messages: list[Message], at: int, tools: Sequence[Any] | None) -> tuple[int, int]:
        """Return the characters of message `at` in `text`, its end-of-turn token included."""
        before, after = self._around(text, messages, at, tools)
        start = self._prompt_end(text, messages[:at], tools)
        if start is None or (after is not None and start > after):
            start = before
        if start is None or after is None:
            raise RowError(f"the chat template does not show where message {at} begins and ends; try train_on='last' or another template")
        wanted = [messages[at]["content"], messages[at].get("reasoning_content", "")]
        shown = _squeeze(text[start:after])
        if not all(_squeeze(part) in shown for part in wanted if isinstance(part, str)):
            raise RowError(
                f"the chat template rewrites message {at} when others follow (it strips the thinking of earlier turns, perhaps): "
                "what would be trained is not what the model would write; say train_on='last', or set the message's weight to 0"
            )
        end = self.end_of_turn.match(text, after)
        return start, end.end() if end else after

    def _around(self, text: str, messages: list[Message], at: int, tools: Any) -> tuple[int | None, int | None]:
        """Return where the content of message `at` begins and ends, as a render with a sentinel in its place shows."""
        if messages[at].get("tool_calls"):
            through = self.template.render(messages[: at + 1], tools=tools)
            inside = list(self.end_of_turn.finditer(through)) if text.startswith(through) else []
            return None, inside[-1].start() if inside else None
        marked = [*messages[:at], {**messages[at], "content": _SENTINEL}, *messages[at + 1 :]]
        before, *rest = self.template.render(marked, tools=tools).split(_SENTINEL)
        if len(rest) != 1:
            return None, None
        after = rest[0]
        fits = len(before) + len(after) <= len(text)
        return len(before) if fits and text.startswith(before) else None, len(text) - len(after) if text.endswith(after) else None

    def _prompt_end(self, text: str, messages: list[Message], tools: Any) -> int | None:
        try:
            prompt = self.template.render(messages, add_generation_prompt=True, tools=tools)
        except TemplateError:  # some templates refuse a conversation without a user
            return None
        return len(prompt) if text.startswith(prompt) else None

    def _encoded(self, drawn: _Drawn, encoding: Any) -> Encoded:
        ids, mask = encoding.ids, _token_mask(encoding.offsets, drawn.spans)
        ends = _last_tokens(encoding.offsets, drawn.ends)
        if drawn.needs_eos:
            ids, mask = [*ids, self.tokenizer.eos_token_id], np.append(mask, np.uint8(1))
        ids = self._with_bos(ids)
        mask = np.concatenate([np.zeros(len(ids) - len(mask), np.uint8), mask])
        sequence = _first_masked(np.asarray(ids, np.int32), mask)._replace(prompt=drawn.prompt)
        if drawn.ends:
            bos = len(ids) - len(encoding.ids) - drawn.needs_eos
            sequence = sequence._replace(ends=np.isin(np.arange(len(ids)), ends + bos).astype(np.uint8))
        keep = len(self.bos) if ids[: len(self.bos)] == list(self.bos) else 0
        return sequence if drawn.whole else cut(sequence, max_tokens=self.max_tokens, keep=keep)


def make_encoder(
    tokenizer: Any,
    *,
    max_tokens: int,
    template: str = "auto",
    train_on: str = "assistant",
    template_variables: Mapping[str, Any] | None = None,
) -> Encoder:
    """Return the encoder of a tokenizer.

    Args:
      tokenizer: a `transformers.PreTrainedTokenizerFast`, or what looks like one.
      max_tokens: longer sequences are cut: prompts from the left, then responses on the right.
      template: "auto" (the tokenizer's own; if it has none, prompt and completion are joined as they are), "chatml" (the built-in one,
        with EOS as the end of a turn if `<|im_end|>` is no token of this tokenizer),
        "none" (join prompt and completion, whatever the tokenizer has), or the Jinja text itself.
      train_on: "assistant" (every assistant message whose weight is not 0), "last" (the last one only) or "all" (prompts too).
      template_variables: what the template reads beside the messages, such as `{"enable_thinking": False}`: see `template.with_variables`.

    Raises:
      ValueError: an unknown `train_on` or `template`, or `max_tokens` below 2.
      TemplateError: the template cannot be compiled, reads no such variable, or there is none to read it.
    """
    if train_on not in TRAIN_ON:
        raise ValueError(f"data: train_on is {train_on!r}; nearest: {tree.nearest(train_on, TRAIN_ON)}")
    if max_tokens < 2:
        raise ValueError(f"data: max_tokens is {max_tokens}, and a sequence needs a token to predict from and one to predict")
    if template not in TEMPLATES and "{" not in template:
        raise ValueError(f"data: template {template!r} is neither Jinja nor a name; nearest: {tree.nearest(template, TEMPLATES)}")
    special = {name: getattr(tokenizer, name, None) or "" for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | {special["eos_token"]}
    chatml = CHATML if "<|im_end|>" in added else CHATML.replace("<|im_end|>", special["eos_token"])
    source = {"auto": getattr(tokenizer, "chat_template", None), "chatml": chatml, "none": None}.get(template, template)
    if isinstance(source, dict):  # several named templates
        source = source.get("default")
    if template_variables and not source:
        raise TemplateError(f"template_variables: there is no chat template to read {', '.join(template_variables)}; set one")
    if template_variables:
        source = with_variables(source, template_variables)
    chat = ChatTemplate(source, variables=special) if source else None
    ends = tuple(sorted(added - {"", special["bos_token"]}, key=len, reverse=True))
    end_of_turn = re.compile(rf"\s*({'|'.join(map(re.escape, ends))})" if ends else "(?!)")
    starts = tokenizer("a")["input_ids"][:1]
    bos = tuple(starts) if starts and starts[0] == tokenizer.bos_token_id else ()
    return Encoder(tokenizer, chat, max_tokens, train_on, ends, end_of_turn, tuple(added - {""}), bos)


def answer(example: Example) -> str:
    """Return the content of the last assistant message: what `Encoder.prompt` asks for."""
    last = example.messages[-1:] if example.messages and example.messages[-1]["role"] == "assistant" else ()
    return last[0]["content"] if last else ""


def right_answer(example: Example) -> Any:
    """Return what counts as right: the row's own `answer`, else what the last assistant message says; None where there is neither."""
    own = example.columns.get("answer")
    return answer(example) or None if own is None or own == "" else own


def cut(sequence: Encoded, *, max_tokens: int, keep: int = 0) -> Encoded:
    """Return the sequence in at most `max_tokens`: first the prompt is cut from the left, then the response on the right.

    The response is everything from the last trained run of tokens on. At least one token before it stays, to predict it from.

    Args:
      sequence: what to cut.
      max_tokens: the most that stays, at least 2.
      keep: so many tokens at the front stay whatever is cut (BOS).
    """
    tokens, mask, *_ = sequence
    if len(tokens) <= max_tokens:
        return sequence
    starts = np.flatnonzero(np.diff(mask, prepend=np.uint8(0)) == 1)
    response = int(starts[-1]) if len(starts) else len(tokens)
    first = min(len(tokens) - max_tokens + keep, max(response - (not keep), keep))
    kept = np.concatenate([np.arange(keep), np.arange(first, len(tokens))])
    lost = len(kept) > max_tokens and bool(mask[kept[max_tokens:]].any())
    kept = kept[:max_tokens]
    ends = None if sequence.ends is None else sequence.ends[kept]
    return _first_masked(tokens[kept], mask[kept])._replace(cut="response" if lost else "prompt", ends=ends, prompt=sequence.prompt)


def _first_masked(tokens: np.ndarray, mask: np.ndarray) -> Encoded:
    mask = mask.copy()
    mask[:1] = 0  # nothing comes before the first token that could predict it
    return Encoded(tokens, mask)


def _token_mask(offsets: Iterable[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return 1 for each token that holds a character of one of `spans`.

    Only where tokens end is believed: byte-level tokenizers trim white space from the start of their offsets, and the pieces of
    one character all end with it.
    """
    ends = np.maximum.accumulate(np.fromiter((stop for _, stop in offsets), np.int64))
    begins = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
    begins = np.minimum(begins, np.maximum(ends - 1, 0))
    mask = np.zeros(len(ends), np.uint8)
    for start, stop in spans:
        mask |= ((ends > start) & (begins < stop)).astype(np.uint8)
    return mask


def _piece_ends(drawn: _Drawn, pieces: Sequence[str]) -> tuple[int, ...]:
    """Return after which character of the text each piece ends: a piece ends where the next one begins, the last with the turn."""
    start, stop = drawn.spans[-1]
    begins = []
    for piece in pieces:
        begins.append(drawn.text.find(piece, start, stop))
        if begins[-1] < 0:
            raise RowError(f"the chat template rewrites the answer: {piece[:40]!r} is not in it")
        start = begins[-1] + len(piece)
    return (*begins[1:], stop + drawn.needs_eos)


def _last_tokens(offsets: Sequence[tuple[int, int]], ends: Sequence[int]) -> np.ndarray:
    """Return the token that holds the last character of each piece; the one after all where it ends past the text."""
    stops = np.maximum.accumulate(np.fromiter((stop for _, stop in offsets), np.int64))
    return np.searchsorted(stops, np.asarray(ends, np.int64))


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _before_answer(example: Example) -> list[Message]:
    messages = example.messages[:-1] if example.messages and example.messages[-1]["role"] == "assistant" else example.messages
    if example.text is not None or not messages:
        raise RowError("has no prompt to answer", where=example.where)
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _plain(messages: Sequence[Message]) -> str:
    if len(messages) != 1:
        raise RowError("a conversation needs a chat template, and template='none' is set; say template='chatml' or give one")
    return messages[0]["content"]
