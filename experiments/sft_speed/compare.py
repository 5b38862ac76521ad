"""Run the systems in turn, round after round, each in a process of its own, and print their table.

Usage: python experiments/sft_speed/compare.py MODEL.gguf TOKENS.npy --jax PYTHON … --torch PYTHON [--rounds 3] [--base nf4]

PYTHONs are interpreters of environments in which ftjax, or torch and PEFT, are installed; bfloat16 is run from JAX 0.12 on. With
`--base` each runs over the dense matrices and over quantised ones (PEFT: with bitsandbytes, which must be installed beside it).
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
PEER = HERE.parent.parent / "third_party" / "peft" / "sft_speed.py"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("--jax", action="append", default=[])
    parser.add_argument("--torch")
    parser.add_argument("--base", default="", help="a format of ftjax.quant.METHODS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    results: dict[str, list[dict]] = {}
    for _ in range(args.rounds):
        for command in commands(args):
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result = json.loads(output.splitlines()[-1])
            results.setdefault(result["system"], []).append(result)
            print(f"{result['system']}: {result['tokens'] / statistics.median(result['seconds']):.0f} tokens/s", file=sys.stderr)
    print("| system | tokens/s, median (range) | base | peak memory | first step | loss of steps 1 and last |")
    print("|---|---|---|---|---|---|")
    for system, runs in results.items():
        rates = [run["tokens"] / seconds for run in runs for seconds in run["seconds"]]
        base, memory, first = (statistics.median(run[name] for run in runs) for name in ("base_gb", "peak_gb", "first_step"))
        losses = runs[0]["losses"]
        print(
            f"| {system} | {statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f}) | {base:.2f} GB | {memory:.2f} GB "
            f"| {first:.0f} s "
            f"| {losses[0]:.4f}, {losses[-1]:.4f} |"
        )


def commands(args) -> list[list[str]]:
    common = [args.model, args.tokens, "--steps", str(args.steps)]
    found = []
    for python in args.jax:
        version = subprocess.run([python, "-c", "import jax; print(jax.__version__)"], capture_output=True, text=True, check=True).stdout
        dtype = "bfloat16" if tuple(map(int, version.split(".")[:2])) >= (0, 12) else "float32"
        found.append([python, str(HERE / "step.py"), *common, "--dtype", dtype, "--remat", "elementwise"])
    if args.torch:
        found += [[args.torch, str(PEER), *common, "--dtype", dtype] for dtype in ("bfloat16", "float32")]
    return found + [[*command, "--base", args.base] for command in found if args.base]


if __name__ == "__main__":
    main()
