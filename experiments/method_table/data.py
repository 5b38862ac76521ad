"""Write the task of this study: reasoning-gym's `spell_backward`, words of three to seven letters, no word in both files.

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
    problems = reasoning_gym.create_dataset("spell_backward", size=3 * (TRAIN + TEST), seed=0, min_word_len=3, max_word_len=7)
    unique = {problem["answer"]: {"prompt": problem["question"], "completion": problem["answer"]} for problem in problems}
    rows = list(unique.values())
    if len(rows) < TRAIN + TEST:
        raise SystemExit(f"{len(rows)} different words, {TRAIN + TEST} are needed")
    for name, chosen in (("test", rows[:TEST]), ("train", rows[TEST : TEST + TRAIN])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))


if __name__ == "__main__":
    main()
