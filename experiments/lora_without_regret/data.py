"""Write the answers to be remembered: 400 made-up names and a random number of four digits for each.

Usage: python experiments/lora_without_regret/data.py FOLDER     (the sums are those of experiments/method_table/data.py)
"""

import json
import pathlib
import random
import sys


def main() -> None:
    folder, draw = pathlib.Path(sys.argv[1]), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(4)) for _ in range(400)}
    rows = [{"prompt": f"The number of {name} is", "completion": str(draw.randrange(1000, 10_000))} for name in sorted(names)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
