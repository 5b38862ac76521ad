"""Strict JAX for every test: no implicit promotion of dtype or rank, eight CPU devices, warnings are errors, shapes as annotated."""

import gc
import os
import pathlib

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# The suite compiles far more than it computes: no optimisation by LLVM and, before JAX 0.12, no fusions through MLIR. Whoever names a level
# decides: XLA_FLAGS=--xla_backend_optimization_level=3 compiles as for users.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        if "optimization_level" not in os.environ.get("XLA_FLAGS", "")
        else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    )
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The shapes in the signatures of these modules are checked at every call; a new module joins by being listed.
jaxtyping.install_import_hook(
    [
        "ftjax.weights",
        "ftjax.losses",
        "ftjax.scoring",
        "ftjax.kernels.logps",
        "ftjax.kernels.per_token",
        "ftjax.kernels.product",
        "ftjax.quant.blockwise",
        "ftjax.quant.codes",
        "ftjax.quant.mean",
        "ftjax.rollout.sampling",
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",  # an int may stand for a float
)


MAPPINGS = pathlib.Path("/proc/self/maps")
"""What the kernel has mapped for this process. A compiled program takes some, and of 65,530 the next compilation is a crash."""


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """Let go of all compiled programs when there are very many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
