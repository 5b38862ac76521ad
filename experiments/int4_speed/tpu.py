"""Compile the products with a packed matrix for TPUs that are not here, and say what a device holds and how long a step's schedule is.

Usage: python experiments/int4_speed/tpu.py [--chips v5e:2x2,v6e:2x2] [--formats bfloat16,int4,nf4] [--rows 2048,16] [--tiles 512x512x512]

One matrix of 4096 x 4096 in groups of 64, beside a bfloat16 matrix in the same kernel without the decoding. *Bundles* is the length of the
static schedule of the whole kernel, in instructions issued together: one step of the grid with its prologue. It knows nothing of waiting
for memory, so it compares forms of one kernel and is no time. It comes from files that libtpu writes for undocumented flags; where they
are missing the column is empty.
"""

import argparse
import os
import re
import tempfile
from pathlib import Path
from unittest import mock

SIZE, GROUP = 4096, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chips", default="v5e:2x2,v5p:2x2x1,v6e:2x2")
    parser.add_argument("--formats", default="bfloat16,int4,nf4")
    parser.add_argument("--rows", default="2048,16")
    parser.add_argument("--tiles", default="", help="ROWSxIxO instead of those that the kernel chooses, as in 512x512x512")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            TPU_ACCELERATOR_TYPE="v5litepod-4",
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_MIN_LOG_LEVEL="3",
            ALLOW_MULTIPLE_LIBTPU_LOAD="true",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",  # read once, when libtpu is loaded
        )
        print("| chip | rows | weight | product | tiles | arguments | temporaries | bundles |")
        print("|---|---|---|---|---|---|---|---|")
        for chip in args.chips.split(","):
            for rows in map(int, args.rows.split(",")):
                for name in args.formats.split(","):
                    for transposed in (False, True):
                        print(line(chip, rows, name, transposed, args.tiles, Path(folder)), flush=True)


def line(chip: str, rows: int, name: str, transposed: bool, tiles: str, folder: Path) -> str:
    """Return the row of the table for one kernel."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from ftjax.kernels.int4_matmul import Packed, Spec, tpu
    from ftjax.quant import SPECS

    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    where = NamedSharding(Mesh(np.array([device]), ("all",)), PartitionSpec())

    def shape(*sizes: int, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    dense = name == "bfloat16"
    spec = Spec(8, None) if dense else SPECS[name]
    codes = shape(SIZE * spec.bits // 8, SIZE, dtype=jnp.bfloat16 if dense else jnp.int8 if spec.bits == 8 else jnp.uint8)
    scales = shape(SIZE // GROUP, SIZE, dtype=jnp.float32)
    w = Packed(codes, scales, scales if name == "uint4" else None)
    chosen = tpu.Tiles(*map(int, tiles.split("x"))) if tiles else tpu.choose(rows, SIZE, SIZE, GROUP)
    function = tpu.product_transposed if transposed else tpu.product
    for file in folder.iterdir():
        file.unlink()
    with mock.patch.object(tpu, "_tile", (lambda spec, codes, *rest: codes) if dense else tpu._tile):
        compiled = jax.jit(lambda x, w: function(spec, x, w, tiles=chosen)).lower(shape(rows, SIZE, dtype=jnp.bfloat16), w).compile()
    memory = compiled.memory_analysis()
    product = "dx" if transposed else "y"
    sizes = f"{memory.argument_size_in_bytes:,} | {memory.temp_size_in_bytes:,}"
    return f"| {chip} | {rows} | {name} | {product} | {'x'.join(map(str, chosen))} | {sizes} | {bundles(folder)} |"


def bundles(folder: Path) -> str:
    """Return the length of the schedule that libtpu wrote for the kernel, or nothing."""
    for file in folder.glob("*int4_product*schedule-analysis_final_bundles*"):
        if found := re.search(r"total scheduled bundles:\s*(\d+)", file.read_text()):
            return f"{int(found[1]):,}"
    return ""


if __name__ == "__main__":
    main()
