"""Write what four models answered to GSM8K's test questions as demonstrations, pairs and labelled answers; no question is in two parts.

Usage: python experiments/solutions/data.py EXAMPLE_MODEL_SOLUTIONS.jsonl FOLDER

The file is that of github.com/openai/grade-school-math. FOLDER gets {train,test}_{right,pairs,labelled}.jsonl: right answers, right answers
with wrong ones to the same question (at most `PAIRS`), and single answers with `label`. The calculator's marks (<<16-3=13>>) are taken out.
"""

import json
import pathlib
import random
import re
import sys

TEST, PAIRS = 330, 2


def main() -> None:
    source, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    questions = [json.loads(line) for line in source.read_text().splitlines()]
    random.Random(0).shuffle(questions)
    for part, chosen in (("test", questions[:TEST]), ("train", questions[TEST:])):
        found = {"right": [], "pairs": [], "labelled": []}
        for question in chosen:
            right, wrong = answers(question, True), answers(question, False)
            asked = {"prompt": question["question"]}
            found["right"] += [asked | {"completion": answer} for answer in right]
            found["labelled"] += [
                asked | {"completion": answer, "label": good} for good in (True, False) for answer in (wrong, right)[good]
            ]
            pairs = [asked | {"chosen": good, "rejected": bad} for good in right for bad in wrong]
            found["pairs"] += random.Random(question["question"]).sample(pairs, min(PAIRS, len(pairs)))
        for name, rows in found.items():
            (folder / f"{part}_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"{part}_{name}.jsonl: {len(rows)} rows")


def answers(question: dict, correct: bool) -> list[str]:
    """Return the different answers that are right, or wrong."""
    found = [one for one in question.values() if isinstance(one, dict) and one["is_correct"] == correct]
    return sorted({re.sub(r"<<.*?>>", "", one["solution"]).strip() for one in found})


if __name__ == "__main__":
    main()
