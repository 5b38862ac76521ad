"""Run the systems in turn, round after round, each in a process of its own, and print their table.

Usage: python -m experiments.sft_speed.compare MODEL.gguf TOKENS.npy --jax PYTHON … --torch PYTHON [--rounds 3] [--base nf4]

PYTHONs are interpreters of environments in which ftjax, or torch and PEFT, are installed. With `--base` each runs over the dense
matrices and over quantised ones (PEFT: with bitsandbytes, which must be installed beside it).
"""

import pathlib

from experiments import turns
from experiments.turns import Turn

HERE = pathlib.Path(__file__).parent
PEER = HERE.parent.parent / "third_party" / "peft" / "sft_speed.py"


def main() -> None:
    parser = turns.arguments("tokens")
    parser.add_argument("--base", default="", help="a format of ftjax.quant.METHODS")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    results = turns.run([Turn(command) for command in commands(args)], rounds=args.rounds)
    print("| system | tokens/s, median (range) | base | peak memory | first step | loss of steps 1 and last |")
    print("|---|---|---|---|---|---|")
    for system, runs in turns.by_system(results).items():
        base, memory, first = (turns.middle(runs, name) for name in ("base_gb", "peak_gb", "first_step"))
        losses = runs[0]["losses"]
        print(
            f"| {system} | {turns.spread(turns.rates(*runs))} | {base:.2f} GB | {memory:.2f} GB | {first:.0f} s "
            f"| {losses[0]:.4f}, {losses[-1]:.4f} |"
        )


def commands(args) -> list[list[str]]:
    common, found = [args.model, args.tokens, "--steps", str(args.steps)], []
    for python in args.jax:
        options = ["--dtype", "bfloat16", "--remat", "elementwise"]
        found.append([python, str(HERE / "step.py"), *common, *options])
    if args.torch:
        found += [[args.torch, str(PEER), *common, "--dtype", dtype] for dtype in ("bfloat16", "float32")]
    return found + [[*command, "--base", args.base] for command in found if args.base]


if __name__ == "__main__":
    main()
