"""Run the systems in turn, round after round, each in a process of its own, and print a table for each load.

Usage: python -m experiments.generation_speed.compare MODEL.gguf WORK.json --jax PYTHON … --torch PYTHON [--rounds 3] [--rows 16,32,64]

WORK.json is from workload.py; PYTHONs are interpreters of environments in which ftjax, or torch and transformers, are installed. Every
system is run with every number of rows and every dtype; its best counts.
"""

import pathlib
import statistics

from experiments import turns
from experiments.turns import Turn

HERE = pathlib.Path(__file__).parent
PEER = HERE.parent.parent / "third_party" / "transformers" / "generation_speed.py"


def main() -> None:
    parser = turns.arguments("work")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rows", default="32")
    parser.add_argument("--loads", default="uniform,mixed,skewed")
    parser.add_argument("--systems", default="engine,static", help="of ftjax")
    args = parser.parse_args()
    results = turns.run(commands(args), rounds=args.rounds)
    for load in args.loads.split(","):
        print(f"\n{load}\n\n| system | tokens/s, median (range) | tokens | of the floor | peak memory |\n|---|---|---|---|---|")
        for system, runs in turns.by_system([result for result in results if result["load"] == load]).items():
            print(row(system, runs))


def row(system: str, runs: list[dict]) -> str:
    floors = [run["floor_seconds"] / seconds for run in runs if "floor_seconds" in run for seconds in run["seconds"]]
    share = f"{100 * statistics.median(floors):.0f} %" if floors else ""
    return f"| {system} | {turns.spread(turns.rates(*runs))} | {runs[0]['tokens']:,} | {share} | {turns.middle(runs, 'peak_gb'):.1f} GB |"


def commands(args) -> list[Turn]:
    found = []
    for load in args.loads.split(","):
        for dtype in args.dtypes.split(","):
            for rows in args.rows.split(","):
                common = [args.model, args.work, "--load", load, "--dtype", dtype, "--rows", rows]
                ours = [(python, system) for python in args.jax for system in args.systems.split(",")]
                found += [Turn([python, HERE / "side.py", *common, "--system", system]) for python, system in ours]
                found += [Turn([args.torch, PEER, *common])] if args.torch else []
    return found


if __name__ == "__main__":
    main()
