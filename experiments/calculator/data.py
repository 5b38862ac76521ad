"""Write the task of this study: products of two numbers of two or three digits, no problem in both files.

Usage: python experiments/calculator/data.py FOLDER
"""

import json
import pathlib
import random
import sys

TRAIN, TEST = 4000, 256


def main() -> None:
    folder, draw = pathlib.Path(sys.argv[1]), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < TRAIN + TEST:
        pairs[draw.randint(12, 999), draw.randint(12, 99)] = None
    rows = [{"prompt": f"What is {a} * {b}?", "answer": str(a * b)} for a, b in pairs]
    for name, chosen in (("test", rows[:TEST]), ("train", rows[TEST:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))


if __name__ == "__main__":
    main()
