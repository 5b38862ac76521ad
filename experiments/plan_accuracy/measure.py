"""Is what `ftjax plan` says of a step what the step takes? Both for some runs of SmolLM2-135M on this CPU, as rows of a table.

  python experiments/plan_accuracy/measure.py MODEL.gguf [CASE …]        with the repository on PYTHONPATH

Each case is planned, then trained for two steps in a process of its own. Before the second step freed memory is given back to the kernel
and the high-water mark of the resident memory (VmHWM) is set back, so that it is of that step alone: no loading, no tracing, no compiler.
*Outside* is what is resident then beside the arrays: the interpreter, the libraries, the tokenizer, the data, compiled programs.
"""

import ctypes
import dataclasses
import gc
import json
import pathlib
import subprocess
import sys
import tempfile

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py")
COMMON = {
    "steps": 2,
    "data.batch_size": 4,
    "data.max_tokens": 512,
    "data.sources.tasks.split": "train[:400]",
    "data.eval_sources.tasks.split": "test[:4]",
    "eval.every_steps": 0,
    "eval.generate.examples": 0,
    "logging.tensorboard": False,
}
CASES = {
    "LoRA, 4 x 512": {},
    "LoRA, 8 x 256 in 2 parts": {"data.batch_size": 8, "data.max_tokens": 256, "data.accumulation": 2},
    "LoRA, remat full": {"model.remat": "full"},
    "QLoRA": {"methods": ("nf4", "lora")},
    "full": {"methods": ("full",)},
}


def main() -> None:
    model, *names = sys.argv[1:]
    import jax

    print(f"JAX {jax.__version__}\n\n| run | from shapes | compiled | measured | outside | whole run |\n|---|---|---|---|---|---|")
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            planned, measured = (_child(what, model, name, folder) for what in ("--plan", "--train"))
        inside = measured["peak"] - measured["outside"]
        cells = [f"{planned[part] / 1e9:.2f} ({planned[part] / inside - 1:+.1%})" for part in ("shapes", "compiled")]
        cells += [f"{size / 1e9:.2f}" for size in (inside, measured["outside"], measured["whole"])]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _child(what: str, model: str, name: str, folder: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, __file__, what, model, name, folder], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def _arguments(model: str, name: str, folder: str) -> list[str]:
    fields = {"model.name": model, **COMMON, **CASES[name]}
    return [f"--config={CONFIG}", f"--compile_cache={folder}/compiled", *(f"--config.{field}={value}" for field, value in fields.items())]


def plan(model: str, name: str, folder: str) -> None:
    """Print what is planned."""
    from absl import flags as absl_flags

    from ftjax.cli import abstract, build, footprint, runtime, topology
    from ftjax.cli import plan as command

    flags = absl_flags.FlagValues()
    command.define_flags(flags, _arguments(model, name, folder))
    flags(["plan", *_arguments(model, name, folder)])
    runtime.start(flags)
    here = topology.find("here")
    config = command.resolved(flags.config, here)
    mesh = build.mesh(config, here.devices)
    built = abstract.built(config, mesh)
    estimate, compiled = footprint.of(config, mesh, here.kind, built), command.compile_step(built, here)
    print(json.dumps({"shapes": estimate.peak, "compiled": command.peak(here, estimate, compiled)}))


def train(model: str, name: str, folder: str) -> None:
    """Train two steps, and print what the second took."""
    import jax

    from ftjax.cli import main as cli
    from ftjax.cli import train as command

    found, take_steps = {}, command.take_steps

    def watched(step):
        def once(state, frozen, batch):
            if "whole" in found:
                _settle()
                before, arrays = _resident("VmRSS"), sum(x.nbytes for x in jax.live_arrays())
                found["outside"] = before - arrays
            result = jax.block_until_ready(step(state, frozen, batch))
            found["peak" if "whole" in found else "whole"] = _resident("VmHWM")
            return result

        return once

    def take(loop, state, *, start):
        return take_steps(dataclasses.replace(loop, step=watched(loop.step)), state, start=start)

    command.take_steps = take
    code = cli.main(["train", f"--workdir={folder}/run", *_arguments(model, name, folder)])
    if code:
        raise SystemExit(code)
    found["whole"] = max(found.values())
    print(json.dumps(found))


def _settle() -> None:
    """Give freed memory back, and begin a new high-water mark."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    modes = {"--plan": plan, "--train": train}
    modes[sys.argv[1]](*sys.argv[2:]) if sys.argv[1] in modes else main()
