"""Run GRPO steps of ftjax and of TRL in turn, round after round, each in a process of its own, and print their table.

Usage: python -m experiments.rl_speed.compare MODEL.gguf WORK.json --jax PYTHON … --torch PYTHON [--rounds 3]
         [--peers bfloat16,bfloat16+autocast,float32]

PYTHONs are interpreters of environments in which ftjax, or torch and TRL, are installed. A peer is a dtype with options of
third_party/trl/grpo_speed.py; `+keeping` has glibc keep its memory, as ours does.
"""

import pathlib
import statistics

from experiments import turns
from experiments.turns import Turn

HERE = pathlib.Path(__file__).parent
PEER = HERE.parent.parent / "third_party" / "trl" / "grpo_speed.py"


def main() -> None:
    parser = turns.arguments("work")
    parser.add_argument("--peers", default="bfloat16,bfloat16+autocast,float32")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    common = [args.model, args.work, "--steps", args.steps]
    ours = [[python, HERE / "step.py", *common, "--dtype", "bfloat16"] for python in args.jax]
    ours = [Turn([*command, *flags]) for command in ours for flags in ([], ["--apart"])]
    peers = [turns.peer([args.torch, PEER, *common], name) for name in args.peers.split(",") if args.torch]
    results = turns.run([*ours, *peers], rounds=args.rounds)
    print("| system | seconds a step, median (range) | of which sampling | sampled tokens/s | peak memory | first step | first reward |")
    print("|---|---|---|---|---|---|---|")
    for system, runs in turns.by_system(results).items():
        seconds, sampling = ([value for run in runs for value in run[name]] for name in ("seconds", "sampling"))
        memory, first = (turns.middle(runs, name) for name in ("peak_gb", "first_step"))
        rate = runs[0]["tokens"] / statistics.median(sampling)
        print(
            f"| {system} | {turns.spread(seconds, digits=1)} | {statistics.median(sampling):.1f} s | {rate:.0f} | {memory:.2f} GB "
            f"| {first:.0f} s | {runs[0]['rewards'][0]:.4f} |"
        )


if __name__ == "__main__":
    main()
