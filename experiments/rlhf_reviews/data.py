"""Write passages of reviews as demonstrations: how one begins, and how it goes on. No review is in both files.

Usage: python experiments/rlhf_reviews/data.py T0_SAMPLE.jsonl FOLDER

The file is that of github.com/yizhongw/self-instruct; its reviews of films, goods and restaurants (IMDB, Amazon, Yelp) are asked about by
P3's templates, so their first and last sentences, which may be the template's, are left out. FOLDER gets {train,test}.jsonl.
"""

import json
import pathlib
import random
import re
import sys

REVIEWS = ("imdb", "amazon_polarity", "yelp_review_full")
BEGINNING, REST = 8, range(12, 41)
"""Words that a passage begins with, and that may follow."""
TEST = 0.2


def main() -> None:
    source, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    texts = list(dict.fromkeys(row["prompt"] for row in rows if row["task"].startswith(REVIEWS)))
    random.Random(0).shuffle(texts)
    cut, seen = int(TEST * len(texts)), set()
    for name, chosen in (("test", texts[:cut]), ("train", texts[cut:])):
        found = [passage for text in chosen for passage in passages(text)]
        found = [one for one in found if one["prompt"] not in seen and not seen.add(one["prompt"])]
        random.Random(1).shuffle(found)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        print(f"{name}.jsonl: {len(found)} passages of {len(chosen)} reviews")


def passages(review: str) -> list[dict[str, str]]:
    """Return whole sentences of a review, one or several at a time, each time from where the last ended."""
    plain = re.sub(r"\s+", " ", re.sub(r"<br ?/?>|\\n|\\", " ", review))
    sentences, found, words = re.split(r"(?<=[.!?]) (?=[A-Z\"'])", plain)[1:-1], [], []
    for sentence in sentences:
        words += sentence.split()
        if len(words) - BEGINNING in REST:
            found.append({"prompt": " ".join(words[:BEGINNING]), "completion": " " + " ".join(words[BEGINNING:])})
        if len(words) - BEGINNING >= REST.start:
            words = []
    return found


if __name__ == "__main__":
    main()
