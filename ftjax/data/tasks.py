"""Small tasks with checkable answers, made by index: `tasks:sort`, `tasks:dates`, … and `tasks:mix` of them all.

Row `i` of a split is a pure function of (task, split, seed, i), and there is no last one. Whether a problem is for training or held out
is decided by a hash of its prompt, so the splits share no problem. Every prompt says what form the answer must have, so that an
untrained model has its fair chance. A row is a prompt with its answer, and a pair too: the answer and that to another problem. It is also a
triple, of which the answer is the best known response, and a solution in two steps, of which the second is wrong.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable
from typing import Any

from ftjax import tree

SIZES = {"train": 10_000, "validation": 500, "test": 500}
"""Rows that a source of each split shows; the generator itself has no end."""

_HELD_OUT = {"validation": (0, 8), "test": (8, 16)}  # of 128 parts; the others are for training
_WORDS = (
    "apple bread candle desk engine forest garden hammer island jacket kettle lemon mirror needle orange pencil quilt river "
    "silver table umbrella valley window yellow zebra anchor bottle castle dragon eagle feather grape honey insect jungle "
    "kitchen ladder mountain notebook ocean piano queen rabbit shadow tiger uncle village whistle bridge cloud"
).split()
_NAMES = "Ana Ben Carla David Elena Felix Grace Hugo Iris Jonas Karin Liam Maria Noah Olga Pedro Rosa Simon Tara Victor".split()
_CITIES = "Lima Oslo Cairo Paris Delhi Tokyo Berlin Quito Dublin Lagos Vienna Hanoi Madrid Prague Sydney Boston Seoul Turin Zurich".split()
_JOBS = "baker nurse pilot farmer teacher painter lawyer singer plumber chemist gardener driver doctor waiter writer".split()
_MONTHS = "January February March April May June July August September October November December".split()

_UNITS = (
    ("meters", "centimeters", 100),
    ("centimeters", "millimeters", 10),
    ("kilometers", "meters", 1000),
    ("kilograms", "grams", 1000),
    ("tonnes", "kilograms", 1000),
    ("liters", "milliliters", 1000),
    ("dollars", "cents", 100),
    ("centuries", "years", 100),
    ("decades", "years", 10),
)


def arithmetic(draw: random.Random) -> tuple[str, str]:
    """Sums and differences of two or three small numbers."""
    terms = [draw.randint(1, 50) for _ in range(draw.choice((2, 2, 3)))]
    signs = [draw.choice("+-") for _ in terms[1:]]
    text = str(terms[0]) + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))
    total = terms[0] + sum(term if sign == "+" else -term for sign, term in zip(signs, terms[1:], strict=True))
    return f"What is {text}? Answer with the number only.", str(total)


def compare(draw: random.Random) -> tuple[str, str]:
    """The larger or smaller of three numbers."""
    numbers = draw.sample(range(10, 1000), 3)
    word, choose = draw.choice((("largest", max), ("smallest", min)))
    return f"Which is the {word} of {_listed(numbers)}? Answer with the number only.", str(choose(numbers))


def sort(draw: random.Random) -> tuple[str, str]:
    """Three to five numbers in order."""
    numbers = draw.sample(range(1, 100), draw.randint(3, 5))
    return f"Sort these numbers from smallest to largest: {_listed(numbers)}. Answer with the sorted list only.", _listed(sorted(numbers))


def sort_words(draw: random.Random) -> tuple[str, str]:
    """Three to five words in alphabetical order."""
    words = draw.sample(_WORDS, draw.randint(3, 5))
    return f"Sort these words alphabetically: {_listed(words)}. Answer with the sorted list only.", _listed(sorted(words))


def reverse(draw: random.Random) -> tuple[str, str]:
    """Three to five words in reverse order."""
    words = draw.sample(_WORDS, draw.randint(3, 5))
    return f"Write these words in reverse order: {_listed(words)}. Answer with the reversed list only.", _listed(words[::-1])


def letters(draw: random.Random) -> tuple[str, str]:
    """The first letters of three to five words."""
    words = draw.sample(_WORDS, draw.randint(3, 5))
    return (
        f"Write the first letter of each of these words: {_listed(words)}. Answer with the letters only, separated by spaces.",
        " ".join(word[0] for word in words),
    )


def count(draw: random.Random) -> tuple[str, str]:
    """How often a word stands in a list."""
    word, other, third = draw.sample(_WORDS, 3)
    words = [draw.choice((word, word, other, third)) for _ in range(draw.randint(3, 7))]
    return f"How many times does the word {word} appear in this list: {_listed(words)}? Answer with the number only.", str(
        words.count(word)
    )


def dates(draw: random.Random) -> tuple[str, str]:
    """A numeric date in words."""
    year, month, day = draw.randint(1900, 2099), draw.randint(1, 12), draw.randint(1, 28)
    return (
        f"Write the date {year}-{month:02d}-{day:02d} as day, month name and year, like 5 August 1987. Answer with the date only.",
        f"{day} {_MONTHS[month - 1]} {year}",
    )


def units(draw: random.Random) -> tuple[str, str]:
    """A length, weight, volume, sum or time in a unit that is ten, a hundred or a thousand times smaller."""
    big, small, factor = draw.choice(_UNITS)
    amount = draw.randint(2, 999)
    return f"How many {small} are {amount} {big}? Answer with the number only.", str(amount * factor)


def records(draw: random.Random) -> tuple[str, str]:
    """A sentence about a person as a JSON object."""
    name, city, job, age = draw.choice(_NAMES), draw.choice(_CITIES), draw.choice(_JOBS), draw.randint(18, 80)
    sentence = draw.choice(
        (
            f"{name} is {age} years old, lives in {city} and works as a {job}.",
            f"{name} works as a {job} in {city} and is {age} years old.",
            f"In {city} lives {name}, a {job} aged {age}.",
            f"At the age of {age}, {name} moved to {city} to become a {job}.",
        )
    )
    return (
        f"Write this as JSON with the keys name, age, city and job, in this order, on one line. {sentence} Answer with the JSON only.",
        f'{{"name": "{name}", "age": {age}, "city": "{city}", "job": "{job}"}}',
    )


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "arithmetic": arithmetic,
    "compare": compare,
    "count": count,
    "dates": dates,
    "letters": letters,
    "records": records,
    "reverse": reverse,
    "sort": sort,
    "sort_words": sort_words,
    "units": units,
}


def get(name: str) -> Callable[..., dict[str, Any]]:
    """Return `make(i, *, split="train", seed=0) -> row` of a task, or of several joined by `+`, or of "mix".

    Raises:
      ValueError: there is no such task.
    """
    names = sorted(TASKS) if name == "mix" else name.split("+")
    for one in names:
        if one not in TASKS:
            raise ValueError(f"data: there is no task {one!r}; nearest: {tree.nearest(one, [*TASKS, 'mix'])}")
    return functools.partial(_make, names)


def _make(names: list[str], i: int, *, split: str = "train", seed: int = 0) -> dict[str, Any]:
    name = names[i % len(names)]
    draw = random.Random(f"{name}/{split}/{seed}/{i}")
    while True:
        prompt, answer = TASKS[name](draw)
        if split_of(prompt) == split:
            wrong = _another(name, answer, random.Random(f"wrong {name}/{split}/{seed}/{i}"))
            judged = {"chosen": answer, "rejected": wrong, "reference": answer, "completions": [answer, wrong], "labels": [True, False]}
            return {"prompt": prompt, "completion": answer, "answer": answer, **judged, "task": name}


def _another(name: str, answer: str, draw: random.Random) -> str:
    """Return the answer to another problem, wrong for this one."""
    return next(other for _, other in iter(lambda: TASKS[name](draw), None) if other != answer)


def split_of(prompt: str) -> str:
    """Return the only split that this problem may appear in."""
    part = hashlib.sha256(prompt.encode()).digest()[0] % 128
    return next((split for split, (first, last) in _HELD_OUT.items() if first <= part < last), "train")


def _listed(items: list[Any]) -> str:
    return ", ".join(map(str, items))
