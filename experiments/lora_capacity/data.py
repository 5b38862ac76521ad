"""Write the facts of this study: keys of three letters with four random digits each, no key in two files of a draw.

Usage: python -m experiments.lora_capacity.data FOLDER
"""

import itertools
import json
import pathlib
import random
import string
import sys

from experiments.lora_capacity.config import DIGITS, DRAWS, SIZES

BASE_FACTS = 512


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    keys = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3)]
    random.Random(0).shuffle(keys)
    write(folder / "base.jsonl", keys[:BASE_FACTS], random.Random("base"))
    for draw in range(DRAWS):
        chosen = random.Random(f"draw {draw}")
        others = chosen.sample(keys[BASE_FACTS:], sum(SIZES))
        for size in SIZES:
            write(folder / f"{size}-{draw}.jsonl", [others.pop() for _ in range(size)], chosen)


def write(path: pathlib.Path, keys: list[str], draw: random.Random) -> None:
    rows = [{"prompt": key, "completion": "".join(draw.choices(string.digits, k=DIGITS))} for key in keys]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
