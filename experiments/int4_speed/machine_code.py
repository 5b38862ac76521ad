"""What the compiler makes of the Hopper kernels, without a GPU: registers, spills and instructions of a step of 64 codes' depth.

Usage: python experiments/int4_speed/machine_code.py     (JAX 0.12 on Linux)
It needs the libraries of CUDA that a machine with a GPU has anyway, and `ptxas` and `nvdisasm` in the search path:
pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-nvdisasm
Prints a table: a row for each kernel at the tile that would be chosen. A step is what one warpgroup does between two waits.
"""

import collections
import os
import pathlib
import re
import subprocess
import tempfile

DUMP = tempfile.mkdtemp()
os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": DUMP}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from ftjax.kernels import int4_matmul  # noqa: E402
from ftjax.kernels.int4_matmul import Packed, decode  # noqa: E402
from ftjax.kernels.int4_matmul.hopper_tiles import forward_tile, transposed_tile  # noqa: E402
from ftjax.quant import SPECS  # noqa: E402

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
UNITS = {"tensor": ("HGMMA",), "shuffle": ("SHFL",), "memory": ("LDS", "LDSM", "STS", "STSM"), "float": ("FMUL", "FFMA", "FADD", "HADD2")}
SIDE = 4096


def main() -> None:
    device = topologies.get_topology_desc(platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    print(f"JAX {jax.__version__}, sm_90a, matrices of {SIDE} x {SIDE} in groups of 64\n")
    print("| product | format | rows | tile | registers | spilled bytes | codes a thread | instructions | of these |")
    print("|---|---|---|---|---|---|---|---|---|")
    for direction, m in (*(("product", m) for m in (1, 16, 256, 2048)), ("product_transposed", 256), ("product_transposed", 2048)):
        for format in ("int4", "uint4", "nf4"):
            row(direction, format, m, sharding)


def row(direction: str, format: str, m: int, sharding: jax.sharding.Sharding) -> None:
    """Compile a product and print what it became."""
    for old in pathlib.Path(DUMP).iterdir():
        old.unlink()
    scales = jax.ShapeDtypeStruct((SIDE // 64, SIDE), jnp.float32)
    rows = Packed(jax.ShapeDtypeStruct((SIDE // 2, SIDE), jnp.uint8), scales, scales if format == "uint4" else None)
    arguments = (jax.ShapeDtypeStruct((m, SIDE), jnp.bfloat16), jax.eval_shape(decode.by_outputs, rows))
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments)
    run = jax.jit(lambda x, w: getattr(int4_matmul, direction)(x, w, SPECS[format], implementation="gpu"))
    kind = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
        run.lower(*arguments).compile()
    choose = forward_tile if direction == "product" else transposed_tile
    tile = choose(m, SIDE, SIDE, group=64, sides=len(rows) - rows.count(None) - 1)
    codes = 32 * (tile.depth if direction == "product" else tile.columns) // 64
    print(f"| {direction} | {format} | {m} | {tuple(tile)} | {resources()} | {codes} | {instructions()} |", flush=True)


def resources() -> str:
    """Return registers and spilled bytes as the assembler of the compiler reported them."""
    [report] = pathlib.Path(DUMP).glob("*.ptxas")
    text = report.read_text()
    registers, stores, loads = (
        re.search(rf"{pattern}", text)[1] for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill st", r"(\d+) bytes spill l")
    )
    return f"{registers} | {int(stores) + int(loads)}"


def instructions() -> str:
    """Return how many instructions the innermost loop with a tensor instruction has, and on which units most of them are."""
    [source] = pathlib.Path(DUMP).glob("*.ptx")
    binary = source.with_suffix(".cubin")
    subprocess.run(["ptxas", "-arch=sm_90a", str(source), "-o", str(binary)], check=True, capture_output=True)
    listing = subprocess.run(["nvdisasm", "-c", str(binary)], check=True, capture_output=True, text=True).stdout
    code, labels, loops = [], {}, []
    for line in listing.split("\n"):
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            code.append(found[1])
            target = re.search(r"BRA.*`\((\.L_\w+)\)", found[1])
            if target and target[1] in labels:
                loops.append(code[labels[target[1]] :])
    loop = min((loop for loop in loops if any("HGMMA" in one for one in loop)), key=len)
    names = collections.Counter(one.split()[0].split(".")[0] for one in loop)
    units = {unit: sum(names[name] for name in members) for unit, members in UNITS.items()}
    return f"{len(loop)} | " + ", ".join(f"{count} {unit}" for unit, count in units.items() if count)


if __name__ == "__main__":
    main()
