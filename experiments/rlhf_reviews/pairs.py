"""Write pairs of what the start of the study writes, the one of the higher known reward preferred: what a reward model and DPO learn from.

Usage: python -m experiments.rlhf_reviews.pairs MODEL FOLDER
FOLDER has the passages of `data.py`, and gets pairs_{train,test}.jsonl. Pairs whose rewards are equal are left out.
"""

import json
import pathlib
import sys

from experiments.rlhf_reviews.samples import Start

SAMPLES = 4


def main() -> None:
    start, folder = Start(sys.argv[1]), pathlib.Path(sys.argv[2])
    for seed, part in enumerate(("train", "test")):
        prompts = [json.loads(line)["prompt"] for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        found = start.write(start.found.params, prompts, samples=SAMPLES, seed=seed)
        pairs = []
        for at in range(0, len(found.texts), 2):
            worse, better = sorted((at, at + 1), key=lambda one: found.rewards[one])
            if found.rewards[worse] < found.rewards[better] and found.texts[worse].strip() and found.texts[better].strip():
                answers = {"chosen": found.texts[better], "rejected": found.texts[worse]}
                pairs.append({"prompt": prompts[at // SAMPLES], **answers})
        (folder / f"pairs_{part}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        print(f"pairs_{part}.jsonl: {len(pairs)} pairs; mean reward {found.rewards.mean():.3f}, {(found.rewards == 0).mean():.0%} are 0")


if __name__ == "__main__":
    main()
