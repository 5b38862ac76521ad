import collections
import json
import re

import pytest

from ftjax.data import answer, encode, formats, make_encoder, read, tasks
from ftjax.rewards import exact_match
from tests.data.families import byte_tokenizer

EVERY = pytest.mark.parametrize("name", tasks.TASKS)


def rows(name, split="train", count=200):
    make = tasks.get(name)
    return [make(i, split=split) for i in range(count)]


@EVERY
def test_the_splits_share_no_problem(name):
    prompts = {split: {row["prompt"] for row in rows(name, split)} for split in tasks.SIZES}
    for split, mine in prompts.items():
        assert all(tasks.split_of(prompt) == split for prompt in mine)
        assert not any(mine & others for other, others in prompts.items() if other != split)
    assert len(prompts["test"]) > 100


@EVERY
def test_a_row_is_a_function_of_its_index(name):
    make = tasks.get(name)
    assert make(7) == make(7) == rows(name, count=8)[7]
    assert make(7) != make(7, seed=1) and make(10**9)["answer"]


def numbers(text):
    return [int(number) for number in re.findall(r"-?\d+", text)]


def listed(prompt):
    return re.search(r": ([^?]*?)[.?]", prompt)[1].split(", ")


# An independent way from the prompt to the answer.
SOLVE = {
    "arithmetic": lambda prompt: str(eval(re.search(r"What is (.*)\?", prompt)[1])),
    "compare": lambda prompt: str((max if "largest" in prompt else min)(numbers(prompt))),
    "count": lambda prompt: str(collections.Counter(listed(prompt))[re.search("the word (.*) appear", prompt)[1]]),
    "letters": lambda prompt: " ".join(word[:1] for word in listed(prompt)),
    "reverse": lambda prompt: ", ".join(reversed(listed(prompt))),
    "sort": lambda prompt: ", ".join(map(str, sorted(numbers(prompt)))),
    "sort_words": lambda prompt: ", ".join(sorted(listed(prompt))),
}


@pytest.mark.parametrize("name", SOLVE)
def test_the_answers_are_right(name):
    for row in rows(name):
        assert SOLVE[name](row["prompt"]) == row["answer"], row


def test_records_and_dates_and_units_are_right():
    for row in rows("records"):
        assert all(str(value) in row["prompt"] for value in json.loads(row["answer"]).values())
    for row in rows("dates"):
        (year, month, day), (d, name, y) = numbers(row["prompt"].replace("-", " "))[:3], row["answer"].split()
        assert (int(y), int(d)) == (year, day) and name.startswith("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()[month - 1])
    known = {"1000": ("kilo", "milli", "tonnes"), "100": ("centi", "cents", "centuries"), "10": ("millimeters", "decades")}
    for row in rows("units"):
        (amount,) = numbers(row["prompt"])
        factor = str(int(row["answer"]) // amount)
        assert int(row["answer"]) == amount * int(factor) and any(word in row["prompt"] for word in known[factor])


@EVERY
def test_the_answer_is_what_is_trained_and_what_exact_match_wants(name):
    tokenizer = byte_tokenizer("qwen2.5")
    for row in rows(name, count=5):
        (example,) = formats.parse(row)
        assert exact_match([row["prompt"]], [answer(example)], answer=[row["answer"]]) == [1.0]
    encoder = make_encoder(tokenizer, max_tokens=500)
    sequences = encode(read({"path": f"tasks:{name}", "split": "test[:1]"}), encoder)
    trained = tokenizer.decode(sequences.tokens[sequences.loss_mask > 0])
    assert trained == tasks.get(name)(0, split="test")["answer"] + "<|im_end|>"


def test_mix_takes_the_tasks_in_turn_and_plus_joins_them():
    assert [row["task"] for row in rows("mix", count=10)] == sorted(tasks.TASKS)
    assert [row["task"] for row in rows("sort+dates", count=3)] == ["sort", "dates", "sort"]
