"""Judged responses: what a row says, how its responses become tokens, and where they lie in a batch."""

import gzip
import json
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftjax import data
from ftjax.data import items, judged
from ftjax.data.judged_batch import crossed_with
from ftjax.data.rows import RowError
from ftjax.hf import tokenizer
from tests.data.families import word_tokenizer, writing_bos

PROMPT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "2+2"}]
ROWS = {
    "preference": {"prompt": "2+2", "chosen": "4", "rejected": "5"},
    "messages": {"prompt": PROMPT, "chosen": [{"role": "assistant", "content": "4"}], "rejected": "5", "margin": 2},
    "implicit": {"chosen": [*PROMPT, {"role": "assistant", "content": "4"}], "rejected": [*PROMPT, {"role": "assistant", "content": "45"}]},
    "dialogue": {"chosen": "\n\nHuman: 2+2\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2\n\nAssistant: 45"},
    "openai": {
        "input": {"messages": PROMPT},
        "preferred_output": [{"role": "assistant", "content": "4"}],
        "non_preferred_output": [{"role": "assistant", "content": "5"}],
    },
}


@pytest.fixture(scope="module")
def words():
    return tokenizer.byte_tokenizer()


def trained(encoder, example):
    (found,) = encoder.encode([example])
    return encoder.tokenizer.decode(found.tokens[found.loss_mask > 0])


@pytest.mark.parametrize("name", ROWS)
def test_both_responses_follow_one_prompt_of_which_nothing_is_trained(name, words):
    (pair,) = judged.parse(ROWS[name], judged.PAIRS)
    chosen, rejected = pair.responses
    assert chosen.messages[:-1] == rejected.messages[:-1] and chosen.messages[-2]["content"] == "2+2"
    encoder = data.make_encoder(words, max_tokens=200)
    assert trained(encoder, chosen) == "4<|im_end|>" and trained(encoder, rejected) in ("5<|im_end|>", "45<|im_end|>")
    assert pair.numbers == ({"margins": 2.0} if name == "messages" else {})
    labelled = judged.parse(ROWS[name], judged.LABELLED)
    assert [(one.responses[0], dict(one.numbers)) for one in labelled] == [(chosen, {"desirable": 1}), (rejected, {"desirable": 0})]


def test_a_single_response_has_a_label_that_is_true_or_false():
    (one,) = judged.parse({"prompt": "2+2", "completion": "5", "label": False}, judged.LABELLED)
    assert one.numbers == {"desirable": 0.0} and one.responses[0].messages[-1]["content"] == "5"
    for label in (1, "true", None):
        with pytest.raises(RowError, match="column 'label': must be true or false"):
            judged.parse({"prompt": "2+2", "completion": "5", "label": label}, judged.LABELLED, format="labelled")


@pytest.mark.parametrize(
    ("ratio", "reason"),
    [(0, "above 0; it is 0"), (-1.5, "above 0; it is -1.5"), (float("nan"), "finite, got nan"), pytest.param(10**400, "finite", id="huge")]
    + [(True, "must be a number, got a boolean"), ("2", "must be a number, got a string")],
)
def test_a_density_ratio_is_a_positive_number(ratio, reason):
    row = {"prompt": "2+2", "completion": "5", "label": False, "density_ratio": ratio}
    with pytest.raises(RowError, match=f"f:3: column 'density_ratio': .*{reason}"):
        judged.parse(row, judged.LABELLED, where="f:3")


@pytest.mark.parametrize("packing", ["none", "best_fit", "shared"])
def test_density_ratios_come_with_their_responses(packing, words, tmp_path):
    """A row without one, and a source without any, count as 1; a row whose ratio is none is left out, and counted."""
    ratios = {"a": [0.25, None, 3, 0], "b": [None, None]}
    source = {
        name: write(
            tmp_path / f"{name}.jsonl.gz",
            [
                {"prompt": "?" * n + "?", "completion": f"{name}{n}", "label": n % 2 == 0, "density_ratio": ratio}
                for n, ratio in enumerate(of)
            ],
        )["rows"]
        for name, of in ratios.items()
    }
    encoder = data.make_encoder(words, max_tokens=16, template="none")
    loader, reports = data.load_judged(source, encoder, wanted=data.LABELLED, batch_size=2, packing=packing, bad_rows="skip")
    assert reports["a"].skipped == {"must be above 0": 1}
    seen = {}
    for batch in loader.epoch():
        places = [[np.flatnonzero(mask)] for mask in batch.loss_mask] if packing == "none" else batch.places[:, :, 0]
        for tokens, each, ratios in zip(batch.tokens, places, batch.density_ratios.reshape(2, -1), strict=True):
            seen |= {words.decode(tokens[at[at >= 0]]): float(ratio) for at, ratio in zip(each, ratios, strict=True)}
    seen.pop("", None)  # of rows that only fill a batch
    assert seen == {f"{name}<|im_end|>": ratio for name, ratio in {"a0": 0.25, "a1": 1, "a2": 3, "b0": 1, "b1": 1}.items()}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "column 'chosen': is an empty response"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "column 'rejected': must be a string, got a number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "column 'margin': must be a number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "column 'margin': must be finite, got nan"),
        ({"prompt": "a", "completion": "b", "label": True}, "single response, and pairs are wanted"),
        ({"chosen": PROMPT, "rejected": PROMPT[:2]}, "one conversation is the beginning of the other"),
        ({"chosen": PROMPT, "rejected": [{"role": "user", "content": "Ho"}]}, "no first message in common"),
        ({"chosen": [*PROMPT, *PROMPT[:1]], "rejected": [*PROMPT, *PROMPT[1:2]]}, "begins with a message of the user"),
        ({"chosen": "no turns", "rejected": "none"}, "is no text of turns"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "no format of judged responses"),
        ({"question": "a"}, "no format of judged responses has the columns 'question'"),
    ],
)
def test_what_is_no_pair_says_why(row, reason):
    with pytest.raises(RowError, match=f"f:3.*{reason}"):
        judged.parse(row, judged.PAIRS, where="f:3")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2", "chosen": "4", "rejected": "5", "reference": "four"},
        {
            name: [*PROMPT, {"role": "assistant", "content": said}]
            for name, said in (("chosen", "4"), ("rejected", "5"), ("reference", "four"))
        },
    ],
    ids=["prompt", "conversations"],
)
def test_a_triple_is_a_pair_and_the_best_known_response(row, words):
    (triple,) = judged.parse(row, judged.TRIPLES)
    encoder = data.make_encoder(words, max_tokens=200)
    assert [trained(encoder, one) for one in triple.responses] == ["4<|im_end|>", "5<|im_end|>", "four<|im_end|>"]
    assert len({one.messages[:-1] for one in map(hashable, triple.responses)}) == 1
    (pair,) = judged.parse(row, judged.PAIRS)
    assert pair.responses == triple.responses[:2]
    without = {name: value for name, value in row.items() if name != "reference"}
    with pytest.raises(RowError, match="format 'preference', and triples are wanted"):
        judged.parse(without, judged.TRIPLES)


def hashable(example):
    return data.Example(tuple(tuple(sorted(message.items())) for message in example.messages))


STEPS = {"prompt": "2+2-1", "completions": ["2+2=4", "4-1=2", "so 2"], "labels": [True, False, 0.25]}


@pytest.mark.parametrize("template", ["chatml", "none"])
def test_a_step_is_judged_where_it_ends(template, words):
    found = items.encode(judged.parse(STEPS, judged.STEPS), data.make_encoder(words, max_tokens=99, template=template))
    tokens, mask, labels = found.sequences.tokens, found.sequences.loss_mask, found.sequences.known["labels"]
    ends = np.flatnonzero(mask)
    read = ["".join(words.decode(tokens[: end + 1])) for end in ends]
    assert [text[text.index("2+2=4") :] for text in read] == ["2+2=4\n", "2+2=4\n4-1=2\n", "2+2=4\n4-1=2\nso 2<|im_end|>"]
    assert labels[ends].tolist() == [1, 0, 0.25] and labels.sum() == 1.25 and found.responses == 1


def test_the_prompt_of_steps_is_cut_and_no_step(words):
    """The answer has 17 tokens, one a byte and EOS; so of the prompt's five the last one stays."""
    encoder = data.make_encoder(words, max_tokens=18, template="none")
    found = items.encode(judged.parse(STEPS, judged.STEPS), encoder)
    assert words.decode(found.sequences.tokens) == "12+2=4\n4-1=2\nso 2<|im_end|>"
    assert found.sequences.known["labels"][found.sequences.loss_mask > 0].tolist() == [1, 0, 0.25]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": [True]}, "column 'labels': has 1 labels for 3 steps"),
        ({"completions": ["a", " ", "b"]}, r"column 'completions\[1\]': is an empty step"),
        ({"labels": [True, "yes", True]}, r"column 'labels\[1\]': must be true, false or a share in \[0, 1\], got a string"),
        ({"labels": [True, 2, True]}, r"share in \[0, 1\], got 2"),
        ({"labels": []}, "column 'labels': is an empty list"),
        ({"completions": "a"}, "column 'completions': must be a list, got a string"),
    ],
)
def test_what_are_no_steps_says_why(change, reason):
    with pytest.raises(RowError, match=reason):
        judged.parse({**STEPS, **change}, judged.STEPS)


@pytest.mark.parametrize(
    ("wanted", "row"),
    [
        ("pairs", {"prompt": "a", "chosen": "b<end>", "rejected": "c<end>"}),
        (
            "pairs",
            {"chosen": [*PROMPT, {"role": "assistant", "content": "b<end>"}], "rejected": [*PROMPT, {"role": "assistant", "content": "c"}]},
        ),
        ("pairs", {"chosen": "\n\nHuman: a\n\nAssistant: b<end>", "rejected": "\n\nHuman: a\n\nAssistant: c<end>"}),
        ("labelled", {"prompt": "a", "completion": "b<end>", "label": True}),
        ("steps", {"prompt": "a", "completions": ["b<end>", "c<end>"], "labels": [True, True]}),
    ],
)
def test_the_mark_that_a_data_set_ends_with_is_taken_off(wanted, row, tmp_path):
    source = {**write(tmp_path / "d.jsonl.gz", [row])["rows"], "end_marker": "<end>"}
    (one,) = data.read_judged(source, wanted)
    assert [response.messages[-1]["content"][:1] for response in one.responses] == (["b", "c"] if wanted == "pairs" else ["b"])
    assert not any("<end>" in message["content"] for response in one.responses for message in response.messages)


def test_responses_that_differ_by_the_mark_alone_are_the_same():
    with pytest.raises(RowError, match="are the same"):
        judged.parse({"prompt": "a", "chosen": "b<end>", "rejected": "b"}, judged.PAIRS, end_marker="<end>")


def encoded(words, rows, wanted=judged.PAIRS, max_tokens=64, template="none", **options):
    found = (one for row in rows for one in judged.parse(row, wanted))
    return items.encode(found, data.make_encoder(words, max_tokens=max_tokens, template=template), **options)


def texts(tokenizer, found):
    return [tokenizer.decode(found.sequences.tokens[a:b]) for a, b in zip(found.sequences.starts, found.sequences.starts[1:], strict=False)]


def test_a_long_prompt_loses_its_front_by_as_much_for_both(words):
    found = encoded(words, [{"prompt": "0123456789", "chosen": "ab", "rejected": "abcd"}], max_tokens=10)
    assert texts(words, found) == ["56789ab<|im_end|>", "56789abcd<|im_end|>"]


@pytest.mark.parametrize("template", ["auto", "none"])
def test_each_response_has_one_bos_and_one_eos_though_its_prompt_is_cut(template):
    """Of Mistral's template, too, which writes a BOS itself; "<s>" stays where the front of the prompt goes."""
    mistral = writing_bos("mistral")
    pair = {"prompt": "0123456789", "chosen": "ab", "rejected": "abcd"}
    whole = {"auto": "<s>[INST] 0123456789[/INST] {}</s>", "none": "<s>0123456789{}</s>"}[template]
    for max_tokens, prompt in ((64, whole), (10, whole.replace("[INST] 01234567" if template == "auto" else "012345", ""))):
        found = encoded(mistral, [pair], max_tokens=max_tokens, template=template)
        assert texts(mistral, found) == [prompt.format("ab"), prompt.format("abcd")]
        for special in (mistral.bos_token_id, mistral.eos_token_id):
            assert (found.sequences.tokens == special).sum() == 2
        ends = found.sequences.starts[1:] - 1
        assert (found.sequences.tokens[ends] == mistral.eos_token_id).all() and found.sequences.loss_mask[ends].all()
        assert not found.sequences.loss_mask[found.sequences.starts[:-1]].any()


MERGED = {
    "one": ("the ans", "wer is", "x"),  # " answer" is a token, and " ans" with nothing behind it is " an" and "s"
    "both": ("the ans", "wer is", "wers"),
    "neither": ("the answer", " is", " x"),
}


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("bos", [False, True])
def test_both_responses_follow_the_same_tokens_of_their_prompt(name, bos):
    """Where the tokenizer joins the prompt's end to a response, both begin before it, and no token is cut."""
    prompt, chosen, rejected = MERGED[name]
    merging = writing_bos("mistral", word_tokenizer) if bos else word_tokenizer()
    found = encoded(merging, [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    tokens, masks = (np.split(values, found.sequences.starts[1:-1]) for values in (found.sequences.tokens, found.sequences.loss_mask))
    firsts = [int(np.argmax(mask)) for mask in masks]
    np.testing.assert_array_equal(tokens[0][: firsts[0]], tokens[1][: firsts[1]])
    assert all(mask[first:].all() for mask, first in zip(masks, firsts, strict=True))
    kept = merging.decode(tokens[0][bos : firsts[0]])
    assert kept == (prompt if name == "neither" else "the")
    for answer, row in zip((chosen, rejected), tokens, strict=True):
        joint = merging.backend_tokenizer.encode(prompt + answer, add_special_tokens=False).ids
        assert row.tolist() == [*[merging.bos_token_id] * bos, *joint, merging.eos_token_id]


def test_a_prompt_of_which_nothing_is_left_before_one_response_is_refused():
    merging = word_tokenizer()
    with pytest.raises(RowError, match="f:3.*joins all of the prompt to a response"):
        found = judged.parse({"prompt": "t", "chosen": "he", "rejected": "x"}, judged.PAIRS, where="f:3")
        items.encode(found, data.make_encoder(merging, max_tokens=64, template="none"))


def test_a_response_is_never_cut(words):
    rows, report = [{"prompt": "x", "chosen": "a" * 9, "rejected": "b"}, {"prompt": "x", "chosen": "a", "rejected": "b"}], data.Report()
    assert len(encoded(words, rows, max_tokens=10, report=report).lengths) == 1
    assert report.skipped == {"a response does not fit max_tokens=10": 1}
    with pytest.raises(RowError, match="does not fit"):
        encoded(words, rows, max_tokens=10, too_long="raise")


def write(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return {"rows": {"path": str(path)}}


def test_pairs_are_an_axis_and_every_pair_comes_once(words, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "c" * (1 + n), "rejected": "r", "margin": n} for n in range(7)]
    encoder = data.make_encoder(words, max_tokens=32, template="none")
    loader, _ = data.load_judged(write(tmp_path / "d.jsonl.gz", rows), encoder, wanted=data.PAIRS, batch_size=2)
    seen = []
    for batch in loader.epoch():
        assert batch.tokens.shape[:2] == (2, 2) and batch.margins.dtype == np.float32
        for row in range(2):
            if batch.segment_ids[row].any():
                seen.append(int(batch.margins[row]))
                answers = [words.decode(batch.tokens[row, at][batch.loss_mask[row, at] > 0]) for at in range(2)]
                assert answers == ["c" * (1 + seen[-1]) + "<|im_end|>", "r<|im_end|>"]
            else:
                assert not batch.loss_mask[row].any() and batch.margins[row] == 0
    assert sorted(seen) == list(range(7))
    halves = [loader.shard(n, 2).batch(1) for n in range(2)]
    np.testing.assert_array_equal(np.concatenate([half.tokens for half in halves]), loader.batch(1).tokens)


def mismatched(tokenizer, folder, rows, *, max_tokens=32, batch_size=4, template="none"):
    """The texts of the first batch's mismatched rows, and the loader."""
    options = {"wanted": data.LABELLED, "batch_size": batch_size, "shuffle": False, "mismatched": True}
    encoder = data.make_encoder(tokenizer, max_tokens=max_tokens, template=template)
    loader, _ = data.load_judged(write(folder / "d.jsonl.gz", rows), encoder, **options)
    batch = loader.batch(0).mismatched
    return [tokenizer.decode(row[segment > 0]) for row, segment in zip(batch.tokens, batch.segment_ids, strict=True)], loader


def test_a_mismatched_row_is_a_prompt_with_the_response_of_the_next_item(words, tmp_path):
    rows = [{"prompt": f"{n}?", "completion": chr(97 + n), "label": n % 2 == 0} for n in range(3)]
    found, loader = mismatched(words, tmp_path, rows)
    batch = loader.batch(0)
    assert found == ["0?b<|im_end|>", "1?c<|im_end|>", "2?a<|im_end|>", ""] and batch.desirable.tolist() == [1, 0, 1, 0]
    assert [words.decode(t[m > 0]) for t, m in zip(batch.mismatched.tokens, batch.mismatched.loss_mask, strict=True)][0] == "b<|im_end|>"
    np.testing.assert_array_equal(loader.shard(1, 2).batch(0).mismatched.tokens, batch.mismatched.tokens[2:])


def test_a_mismatched_prompt_that_loses_its_front_keeps_its_bos(tmp_path):
    """Nine tokens a row: the prompt 01234 with the five tokens of the other's response keeps three of its five, "<s>" among them."""
    mistral = writing_bos("mistral")
    rows = [{"prompt": "01234", "completion": "a", "label": True}, {"prompt": "5", "completion": "bcdefg", "label": False}]
    found, loader = mismatched(mistral, tmp_path, rows, max_tokens=9, batch_size=2)
    assert found == ["<s>4bcdefg</s>", "<s>5a</s>"]
    for mask in loader.batch(0).mismatched.loss_mask:
        assert not mask[:2].any() and mask[2:4].all()


def test_a_sibling_is_no_other_prompts_response(words, tmp_path):
    """Pairs turned into single responses lie side by side; one prompt is cut by more than its sibling and is the same nonetheless."""
    rows = [{"prompt": f"{n}" * 9 + "?", "chosen": "a" * (n + 1), "rejected": "b"} for n in range(2)]
    found, _ = mismatched(words, tmp_path, rows, max_tokens=12)
    assert found == ["00000000?aa<|im_end|>", "000000000?b<|im_end|>", "11111111?a<|im_end|>", "111111111?b<|im_end|>"]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([7, 8, 9], [1, 2, 0]),
        ([7, 7, 8, 8], [2, 3, 0, 1]),
        ([7, 8, 7, 9], [1, 0, 3, 2]),  # in the order 7 7 8 9 each is two on
        ([7, 7, 8], [2, -1, 1]),  # more than half have one prompt: as many as there are others are crossed
        ([7, 7], [-1, -1]),
        ([7], [-1]),
        ([], []),
    ],
)
def test_responses_go_to_other_prompts_each_to_one(prompts, expected):
    assert crossed_with(np.asarray(prompts, np.int64)).tolist() == expected


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_no_response_goes_to_its_own_prompt_or_twice(prompts):
    prompts = np.asarray(prompts)
    found = crossed_with(prompts)
    used = found[found >= 0]
    largest = np.bincount(prompts).max()
    assert len(used) == len(set(used.tolist())) == min(len(prompts), 2 * (len(prompts) - largest))
    assert (prompts[used] != prompts[found >= 0]).all()


def test_a_batch_of_one_row_has_nothing_to_cross(words, tmp_path):
    rows = [{"prompt": f"{n}?", "completion": "a", "label": n == 0} for n in range(3)]
    with pytest.raises(ValueError, match="batch_size is 1, and a prompt gets the response of another one of its batch; set it to 2"):
        mismatched(words, tmp_path, rows, batch_size=1)
    _, loader = mismatched(words, tmp_path, rows, batch_size=2)
    alone = loader.batch(1)
    assert alone.loss_mask.any() and not alone.mismatched.loss_mask.any() and not alone.mismatched.segment_ids.any()


def test_labels_of_one_class_are_refused(words, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": True}] * 3
    with pytest.raises(ValueError, match="all 3 responses are desirable"):
        data.load_judged(write(tmp_path / "d.jsonl.gz", rows), data.make_encoder(words, max_tokens=32), wanted=data.LABELLED, batch_size=2)


def test_what_is_to_be_forgotten_needs_nothing_to_keep(words, tmp_path):
    options = {"wanted": data.LABELLED, "batch_size": 2, "both_classes": False}
    for label in (False, True):
        source = write(tmp_path / f"{label}.jsonl.gz", [{"prompt": "a", "completion": "b", "label": label}] * 3)
        load = partial(data.load_judged, source, data.make_encoder(words, max_tokens=32), **options)
        if label:
            with pytest.raises(ValueError, match="all 3 responses are desirable.*what is to be forgotten has the label false"):
                load()
        else:
            assert [batch.desirable.tolist() for batch in load()[0].epoch()] == [[0, 0], [0, 0]]
