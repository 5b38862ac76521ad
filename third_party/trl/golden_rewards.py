"""Write what TRL's reward functions say of some completions.

Environment: Python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, trl==1.16.0, datasets, math-verify==0.9.0,
latex2sympy2-extended==1.11.0.
Usage: python third_party/trl/golden_rewards.py tests/goldens/rewards.json
"""

import json
import random
import sys

from trl.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

ANSWERS = [r"\frac{1}{3}", "72", "$x^2+1$", r"\sqrt{2}", "none", "(1,2)", r"$\{1,2\}$", "1,234", "3.14"]
COMPLETIONS = [
    r"<think>so</think>My answer is \boxed{\frac{1}{3}}",
    r"The answer is $\frac{2}{6}$.",
    r"</think>The final answer is $72$.",
    r"\boxed{71} no, \boxed{72}",
    r"<think>a<think>b</think>$$1+x^2$$",
    r"\boxed{\sqrt{2}}",
    r"<think>\boxed{2^{1/2}}</think>\boxed{1.5}",
    r"\boxed{(1,2)}",
    r"\boxed{\{2,1\}}</think>",
    r"<think></think>\boxed{1234}",
    r"\boxed{3.14}",
    "72",
    r"\boxed{}",
    "",
]


def main(path: str) -> None:
    rng = random.Random(0)
    rows = [(completion, answer) for completion in COMPLETIONS for answer in ANSWERS][::2]
    texts, answers = [row[0] for row in rows], [row[1] for row in rows]
    ids = [[rng.randrange(4) for _ in range(rng.randrange(60))] for _ in rows]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    golden = {
        "completions": texts,
        "answers": answers,
        "completion_ids": ["".join(map(str, row)) for row in ids],
        "accuracy": accuracy_reward(messages, answers),
        "reasoning_accuracy": reasoning_accuracy_reward(messages, answers),
        "think_format": think_format_reward(messages),
        "cosine": get_cosine_scaled_reward(max_len=40)(messages, answers, ids),
        "repetition": get_repetition_penalty_reward(ngram_size=3, max_penalty=-0.5)(ids),
        "soft_overlong": get_soft_overlong_punishment(max_completion_len=50, soft_punish_cache=20)(ids),
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(golden, file, ensure_ascii=False)
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
