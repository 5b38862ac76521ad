"""Run the systems in turn, round after round, each in a process of its own, and print a table for each load.

Usage: python experiments/generation_speed/compare.py MODEL.gguf WORK.json --jax PYTHON --torch PYTHON [--rounds 3] [--rows 16,32,64]

WORK.json is from workload.py; PYTHONs are interpreters of environments in which ftjax, or torch and transformers, are installed. Every
system is run with every number of rows; its best one counts.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
PEER = HERE.parent.parent / "third_party" / "transformers" / "generation_speed.py"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("work")
    parser.add_argument("--jax", required=True)
    parser.add_argument("--torch")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rows", default="32")
    parser.add_argument("--loads", default="uniform,mixed,skewed")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results: dict[tuple[str, str], list[dict]] = {}
    for _ in range(args.rounds):
        for command in commands(args):
            output = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}).stdout
            result = json.loads(output.splitlines()[-1])
            results.setdefault((result["load"], result["system"]), []).append(result)
            print(f"{result['load']}: {result['system']}: {result['tokens'] / min(result['seconds']):.0f} tokens/s", file=sys.stderr)
    for load in args.loads.split(","):
        print(f"\n{load}\n\n| system | tokens/s, median (range) | tokens | of the floor | peak memory |\n|---|---|---|---|---|")
        for (where, system), runs in results.items():
            if where == load:
                print(row(system, runs))


def row(system: str, runs: list[dict]) -> str:
    rates = [run["tokens"] / seconds for run in runs for seconds in run["seconds"]]
    floors = [run["floor_seconds"] / seconds for run in runs if "floor_seconds" in run for seconds in run["seconds"]]
    share = f"{100 * statistics.median(floors):.0f} %" if floors else ""
    memory = statistics.median(run["peak_gb"] for run in runs)
    shown = f"{statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f})"
    return f"| {system} | {shown} | {runs[0]['tokens']:,} | {share} | {memory:.1f} GB |"


def commands(args) -> list[list[str]]:
    found = []
    for load in args.loads.split(","):
        for dtype in args.dtypes.split(","):
            for rows in args.rows.split(","):
                common = [args.model, args.work, "--load", load, "--dtype", dtype, "--rows", rows]
                found += [[args.jax, str(HERE / "side.py"), *common, "--system", system] for system in ("engine", "static")]
                found += [[args.torch, str(PEER), *common]] if args.torch else []
    return found


if __name__ == "__main__":
    main()
