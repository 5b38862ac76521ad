import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data import CHATML, Example, RowError, TemplateError, answer, inspect, make_encoder, parse
from ftjax.data.tokenize import Encoded, _token_mask, cut
from tests.data.families import FAMILIES, byte_tokenizer, word_tokenizer, writing_bos

USER, ONE, MORE, TWO = (
    {"role": role, "content": text}
    for role, text in (("user", "One?"), ("assistant", "One."), ("user", " And two? "), ("assistant", "Two."))
)
SYSTEM = {"role": "system", "content": "Be brief."}
EVERY = pytest.mark.parametrize("name", FAMILIES)


def encode(tokenizer, messages, *, max_tokens=2000, **options):
    (found,) = make_encoder(tokenizer, max_tokens=max_tokens, **options).encode([Example(tuple(messages), where="a.jsonl:1")])
    if isinstance(found, RowError):
        raise found
    return found


def trained(tokenizer, sequence):
    return [text for text, is_trained in inspect.runs(tokenizer, *sequence[:2]) if is_trained]


def with_end(tokenizer, name, text):
    return text if text.endswith(tuple(FAMILIES[name].special)) else text + tokenizer.eos_token


@EVERY
@pytest.mark.parametrize("system", [False, True])
def test_every_assistant_turn_is_trained_with_its_end_and_nothing_else(name, system):
    tokenizer, family = byte_tokenizer(name), FAMILIES[name]
    messages = [*([SYSTEM] if system else []), USER, ONE, MORE, TWO]
    first = family.first.lstrip() if (name, system) == ("mistral", True) else family.first  # see MISTRAL: the prompt itself was rewritten
    found = trained(tokenizer, encode(tokenizer, messages))
    assert found == [first, with_end(tokenizer, name, family.last)]


@EVERY
def test_tokens_are_those_of_the_template(name):
    tokenizer = byte_tokenizer(name)
    text = tokenizer.apply_chat_template([USER, ONE, MORE, TWO], tokenize=False) if "strftime" not in tokenizer.chat_template else None
    sequence = encode(tokenizer, [USER, ONE, MORE, TWO])
    decoded = tokenizer.decode(sequence.tokens)
    if text is not None:
        assert decoded in (text, text.rstrip() + tokenizer.eos_token)
    else:
        assert "Today Date: 26 Jul 2024" in decoded  # fixed, so that tomorrow's run sees the same tokens
    assert list(sequence.tokens).count(tokenizer.bos_token_id) == (FAMILIES[name].bos is not None)


@pytest.mark.parametrize("make", [byte_tokenizer, word_tokenizer])
@EVERY
def test_the_prompt_at_inference_is_what_stands_before_the_trained_turn(name, make):
    tokenizer = make(name)
    encoder = make_encoder(tokenizer, max_tokens=2000, train_on="last")
    example = Example((SYSTEM, USER, ONE, MORE, TWO))
    prompt = encoder.prompt(example)
    (sequence,) = encoder.encode([example])
    assert answer(example) == "Two."
    if (name, make) == ("llama3", word_tokenizer):  # GPT-2's pattern reads "\n\n" as two tokens before a letter and as one at the end
        assert inspect.prompt_mismatches(encoder, [example]) == (0, 1)
        return
    first = int(np.argmax(sequence.loss_mask))
    assert first == len(prompt) and list(sequence.tokens[:first]) == list(prompt)
    assert inspect.prompt_mismatches(encoder, [example]) == (0, 0)


@EVERY
def test_a_weight_of_zero_leaves_a_turn_out(name):
    tokenizer, family = byte_tokenizer(name), FAMILIES[name]
    found = encode(tokenizer, [USER, ONE | {"weight": 0}, MORE, TWO | {"weight": 1}])
    assert trained(tokenizer, found) == [with_end(tokenizer, name, family.last)]


def test_train_on_last_and_all():
    tokenizer = byte_tokenizer("qwen2.5")
    assert trained(tokenizer, encode(tokenizer, [USER, ONE, MORE, TWO], train_on="last")) == ["Two.<|im_end|>"]
    everything = encode(tokenizer, [USER, ONE, MORE, TWO], train_on="all")
    assert everything.loss_mask.tolist() == [0] + [1] * (len(everything.tokens) - 1)


def test_thinking_that_the_template_strips_is_an_error_and_not_a_wrong_target():
    tokenizer = byte_tokenizer("qwen3")
    thoughtful = ONE | {"content": "<think>\nHm.\n</think>\n\nOne."}
    with pytest.raises(RowError, match="a.jsonl:1: the chat template rewrites message 1 when others follow"):
        encode(tokenizer, [USER, thoughtful, MORE, TWO])
    found = encode(tokenizer, [USER, thoughtful])
    assert trained(tokenizer, found) == ["<think>\nHm.\n</think>\n\nOne.<|im_end|>"]
    found = encode(tokenizer, [USER, thoughtful, MORE, TWO], train_on="last")
    assert trained(tokenizer, found) == ["<think>\n\n</think>\n\nTwo.<|im_end|>"]


def test_what_the_generation_prompt_holds_is_not_trained():
    tokenizer = byte_tokenizer("qwen3")
    assert trained(tokenizer, encode(tokenizer, [USER, TWO], template_variables={"enable_thinking": False})) == ["Two.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "variables", "message"),
    [
        ("auto", {"enable_thinkin": False}, "reads no 'enable_thinkin'; nearest: 'enable_thinking'"),
        ("auto", {"bos_token": "x"}, "reads no 'bos_token'"),
        ("auto", {"enable_thinking": {1, 2}}, "plain data is expected"),
        ("auto", "enable_thinking", "a dict is expected"),
        ("none", {"enable_thinking": False}, "there is no chat template to read enable_thinking"),
    ],
)
def test_variables_that_no_template_reads_or_of_a_wrong_type_are_refused(template, variables, message):
    with pytest.raises(TemplateError, match=message):
        make_encoder(byte_tokenizer("qwen3"), max_tokens=9, template=template, template_variables=variables)


def test_a_prompt_that_the_template_ends_otherwise_than_it_begins_an_answer_is_counted():
    template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    encoder = make_encoder(byte_tokenizer("qwen2.5"), max_tokens=99, template=template)
    examples = [Example((USER, ONE)), Example((USER,)), Example((ONE,)), Example((), text="One.")]
    assert inspect.prompt_mismatches(encoder, examples) == (1, 0)
    assert "1 of the first 4 examples have something else before the answer" in inspect.prompt_problems(encoder, examples)[0]


def test_a_template_that_refuses_the_conversation_names_the_row():
    with pytest.raises(RowError, match="a.jsonl:1: the chat template refused this conversation: roles must alternate"):
        encode(byte_tokenizer("gemma"), [USER, USER, TWO])


def test_a_template_that_hides_what_the_assistant_says_is_an_error():
    template = "{% for m in messages %}{{ m.role }}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(RowError, match="message 1"):
        encode(byte_tokenizer("qwen2.5"), [USER, ONE], template=template)


def test_tool_calls_are_trained_up_to_the_end_of_turn():
    tokenizer = byte_tokenizer("qwen2.5")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    (example,) = parse(
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "2"}, TWO]}
    )
    found = trained(tokenizer, encode(tokenizer, example.messages, template=template))
    assert found == ['<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>', "Two.<|im_end|>"]


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ue0f7\ue0f8"), max_size=12).filter(
    lambda text: "<|" not in text
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_the_mask_decodes_to_exactly_the_answers(turns):
    """ChatML renders content as it is, so the trained text is the content, character for character, with its end."""
    tokenizer = byte_tokenizer("qwen2.5")
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    assert trained(tokenizer, encode(tokenizer, messages)) == [f"{said}<|im_end|>" for _, said in turns]


@settings(max_examples=60, deadline=None)
@given(WORDS)
def test_merged_tokens_lose_no_character_of_the_answer(said):
    tokenizer = word_tokenizer()
    (text,) = trained(tokenizer, encode(tokenizer, [USER, {"role": "assistant", "content": said}]))
    assert text.removeprefix("\n") in (
        f"{said}<|im_end|>",
        f"{said}<|im_end|>".removeprefix("\n"),
    )  # "\n\n" may be one token over the border


@pytest.mark.parametrize("prompt, completion", [("the ans", "wer is"), ("a", " \n b"), ("x ", "y"), ("é", "é")])
def test_a_token_over_the_border_is_trained(prompt, completion):
    tokenizer = word_tokenizer()
    sequence = encode(tokenizer, [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], template="none")
    assert tokenizer.decode(sequence.tokens) == prompt + completion + "<|im_end|>"
    (text,) = trained(tokenizer, sequence)
    assert text.endswith(completion + "<|im_end|>") and (prompt + completion + "<|im_end|>").endswith(text)


def test_the_built_in_template_ends_turns_with_a_token_that_the_tokenizer_has():
    for name, end in (("qwen2.5", "<|im_end|>"), ("gemma", "<eos>")):
        tokenizer = byte_tokenizer(name)
        found = encode(tokenizer, [USER, ONE, MORE, TWO], template="chatml")
        assert trained(tokenizer, found) == [f"One.{end}", f"Two.{end}"]


def test_a_template_whose_end_of_turn_is_no_token_is_an_error():
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}</turn>{% endfor %}"
    with pytest.raises(RowError, match="ends a turn with '</turn>', which is no special token"):
        encode(byte_tokenizer("qwen2.5"), [USER, ONE], template=template)


@pytest.mark.parametrize(
    "offsets, mask",
    [
        ([(0, 2), (2, 4), (4, 6), (6, 8)], [0, 1, 1, 0]),
        ([(0, 3), (3, 5), (5, 8)], [1, 1, 1]),  # tokens over both borders hold characters of the span
        ([(0, 2), (3, 4), (4, 4), (5, 6), (7, 8)], [0, 1, 1, 1, 0]),  # offsets that leave out a leading space, or all of a token
        ([(0, 2), (2, 5), (5, 6), (5, 6), (6, 8)], [0, 1, 1, 1, 0]),  # two bytes of the last character
        ([(0, 2), (2, 3), (2, 3), (3, 8)], [0, 1, 1, 1]),  # two bytes of the first
        ([], []),
    ],
)
def test_the_tokens_of_the_characters_from_2_to_6(offsets, mask):
    assert _token_mask(offsets, [(2, 6)]).tolist() == mask


def test_plain_pairs_and_texts_end_with_one_eos():
    tokenizer = byte_tokenizer("roles")
    encoder = make_encoder(tokenizer, max_tokens=100, template="none")
    pair = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    examples = [Example(pair), Example(text="ab"), Example(text="ab<eos>"), Example((pair[0], pair[1] | {"content": "b<eos>"}))]
    for sequence, mask in zip(encoder.encode(examples), ([0, 1, 1],) * 4, strict=True):
        assert tokenizer.decode(sequence.tokens) == "ab<eos>" and sequence.loss_mask.tolist() == mask


def test_a_conversation_without_a_template_is_an_error():
    with pytest.raises(RowError, match="needs a chat template"):
        encode(byte_tokenizer("roles"), [USER, ONE, MORE, TWO], template="none")


def test_a_tokenizer_that_writes_bos_gets_exactly_one():
    tokenizer = writing_bos("mistral")
    encoder = make_encoder(tokenizer, max_tokens=100)
    for example in (Example((USER, ONE)), Example(text="ab"), Example(text="<s>ab")):
        (sequence,) = encoder.encode([example])
        assert sequence.tokens[0] == tokenizer.bos_token_id and list(sequence.tokens).count(tokenizer.bos_token_id) == 1
    assert encoder.prompt(Example((USER,))).tolist().count(tokenizer.bos_token_id) == 1


def test_long_prompts_are_cut_from_the_left_and_responses_on_the_right():
    tokens = np.arange(10, dtype=np.int32)

    def after(prompt, max_tokens, keep=0):
        mask = (np.arange(10) >= prompt).astype(np.uint8)
        mask[:1] = 0
        found = cut(Encoded(tokens, mask), max_tokens=max_tokens, keep=keep)
        return found.tokens.tolist(), found.loss_mask.tolist(), found.cut

    assert after(6, 10) == (list(range(10)), [0] * 6 + [1] * 4, "")
    assert after(6, 6) == ([4, 5, 6, 7, 8, 9], [0, 0, 1, 1, 1, 1], "prompt")
    assert after(6, 6, keep=1) == ([0, 5, 6, 7, 8, 9], [0, 0, 1, 1, 1, 1], "prompt")
    assert after(6, 4) == ([5, 6, 7, 8], [0, 1, 1, 1], "response")
    assert after(6, 4, keep=1) == ([0, 6, 7, 8], [0, 1, 1, 1], "response")
    assert after(2, 3) == ([1, 2, 3], [0, 1, 1], "response")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(2, 30), st.integers(0, 1))
def test_cutting_keeps_the_limit_and_the_whole_last_response_if_it_fits(mask, max_tokens, keep):
    mask = np.asarray([0, *mask[1:]], np.uint8)
    tokens = np.arange(len(mask), dtype=np.int32)
    found = cut(Encoded(tokens, mask), max_tokens=max_tokens, keep=keep)
    assert len(found.tokens) == min(len(tokens), max_tokens) and found.loss_mask[0] == 0
    assert (np.diff(found.tokens) > 0).all() and (found.loss_mask <= mask[found.tokens]).all()
    starts = np.flatnonzero(np.diff(mask, prepend=np.uint8(0)) == 1)
    if len(starts) and len(mask) - starts[-1] + max(keep, 1) <= max_tokens:
        assert set(range(starts[-1], len(mask))) <= set(found.tokens.tolist())
        assert found.cut in ("", "prompt")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="train_on is 'assistent'; nearest: 'assistant'"):
        make_encoder(byte_tokenizer("roles"), max_tokens=8, train_on="assistent")
    with pytest.raises(ValueError, match="template 'chatlm' is neither Jinja nor a name; nearest: 'chatml'"):
        make_encoder(byte_tokenizer("roles"), max_tokens=8, template="chatlm")
    with pytest.raises(ValueError, match="max_tokens is 1"):
        make_encoder(byte_tokenizer("roles"), max_tokens=1)
