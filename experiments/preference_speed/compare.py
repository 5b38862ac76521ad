"""Run DPO steps of ftjax and of TRL in turn, round after round, each in a process of its own, and print their table.

Usage: python -m experiments.preference_speed.compare MODEL.gguf PAIRS.npz --jax PYTHON … --torch PYTHON [--rounds 3]
         [--references live,cached] [--packings shared,none] [--peers bfloat16,bfloat16+autocast,float32]

PYTHONs are interpreters of environments in which ftjax, or torch and TRL, are installed. A peer is a dtype with options of
third_party/trl/dpo_speed.py; `+keeping` has glibc keep its memory, as ours does.
"""

import itertools
import pathlib
import statistics

from experiments import turns
from experiments.turns import Turn

HERE = pathlib.Path(__file__).parent
PEER = HERE.parent.parent / "third_party" / "trl" / "dpo_speed.py"


def main() -> None:
    parser = turns.arguments("pairs")
    parser.add_argument("--references", default="live")
    parser.add_argument("--packings", default="shared,none", help="of ftjax")
    parser.add_argument("--peers", default="bfloat16,bfloat16+autocast,float32")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    results = turns.run(commands(args), rounds=args.rounds)
    print("| system | tokens/s, median (range) | seconds a step | reference pass alone | peak memory | first step | loss, first and last |")
    print("|---|---|---|---|---|---|---|")
    for system, runs in turns.by_system(results).items():
        memory, first = (turns.middle(runs, name) for name in ("peak_gb", "first_step"))
        seconds = statistics.median(seconds for run in runs for seconds in run["seconds"])
        asking = [seconds for run in runs for seconds in run.get("asking", ()) if "cached" in system]
        alone = f"{statistics.median(asking):.1f} s" if asking else ""
        losses = runs[0]["losses"]
        print(
            f"| {system} | {turns.spread(turns.rates(*runs))} | {seconds:.1f} | {alone} | {memory:.2f} GB | {first:.0f} s "
            f"| {losses[0]:.4f}, {losses[-1]:.4f} |"
        )


def commands(args) -> list[Turn]:
    found = []
    for reference in args.references.split(","):
        common = [args.model, args.pairs, "--steps", args.steps, "--reference", reference]
        for python, packing in itertools.product(args.jax, args.packings.split(",")):
            found.append(Turn([python, HERE / "step.py", *common, "--dtype", "bfloat16", "--packing", packing]))
        found += [turns.peer([args.torch, PEER, *common], name) for name in args.peers.split(",") if args.torch]
    return found


if __name__ == "__main__":
    main()
