"""Write the task of this study: products of two numbers, after two that a calculator was used for; no problem in both files.

Usage: python experiments/calculator/data.py FOLDER
"""

import json
import pathlib
import random
import sys

TRAIN, TEST = 4000, 256
SHOWN = ((31, 47), (608, 19))


def solved(a: int, b: int) -> list[dict[str, str]]:
    """Return how a product is asked for, computed and answered."""
    call = json.dumps({"name": "calculator", "arguments": {"expression": f"{a} * {b}"}})
    turns = (
        ("user", f"What is {a} * {b}?"),
        ("assistant", f"<tool_call>{call}</tool_call>"),
        ("tool", str(a * b)),
        ("assistant", str(a * b)),
    )
    return [{"role": role, "content": content} for role, content in turns]


def main() -> None:
    folder, draw = pathlib.Path(sys.argv[1]), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < TRAIN + TEST:
        pair = draw.randint(12, 999), draw.randint(12, 99)
        if pair not in SHOWN:
            pairs[pair] = None
    before = [message for pair in SHOWN for message in solved(*pair)]
    rows = [{"prompt": [*before, {"role": "user", "content": f"What is {a} * {b}?"}], "answer": str(a * b)} for a, b in pairs]
    for name, chosen in (("test", rows[:TEST]), ("train", rows[TEST:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))


if __name__ == "__main__":
    main()
