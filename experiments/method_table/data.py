"""Write the task of this study: reasoning-gym's `chain_sum`, two terms of one or two digits, no problem in both files.

Usage: python experiments/method_table/data.py FOLDER          (pip install reasoning-gym; its pycosat needs a C compiler)
"""

import json
import pathlib
import sys

import reasoning_gym

TRAIN, TEST = 4000, 256


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    problems = reasoning_gym.create_dataset("chain_sum", size=14_000, seed=0, **sizes)
    unique = {problem["question"]: {"prompt": problem["question"], "completion": problem["answer"]} for problem in problems}
    rows = list(unique.values())
    if len(rows) < TRAIN + TEST:
        raise SystemExit(f"{len(rows)} different problems, {TRAIN + TEST} are needed")
    for name, chosen in (("test", rows[:TEST]), ("train", rows[TEST : TEST + TRAIN])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))


if __name__ == "__main__":
    main()
