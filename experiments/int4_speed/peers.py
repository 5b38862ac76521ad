"""Other people's products with 4-bit matrices, to be timed beside ours on the same GPU: bitsandbytes' and PyTorch's own.

Each is there where its package is. A time is taken as in gpu.py: of a CUDA graph with a product for each of several matrices, less that
of a graph with almost nothing in it.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

GROUP = 64
INNER_TILES = 8
"""Of PyTorch's layout: 16 rows each."""

Run = Callable[[Any, Any], Any]


def missing() -> str | None:
    """Return why there are no peers."""
    absent = [name for name in ("torch", "bitsandbytes") if importlib.util.find_spec(name) is None]
    if absent:
        return f"no peers: {' and '.join(absent)} not installed (pip install torch bitsandbytes)"
    import torch

    return None if torch.cuda.is_available() else f"no peers: PyTorch {torch.__version__} finds no GPU"


def kernels(i: int, o: int, *, transposed: bool, device: str = "cuda") -> Iterator[tuple[str, Any, Run]]:
    """Yield what PyTorch and bitsandbytes have for x D or x Dᵀ, D `[i, o]`: a name, the matrix, and the product of rows with it.

    bitsandbytes' x Dᵀ is that of its backward pass: it dequantises, then multiplies. PyTorch's int4 has no x Dᵀ.
    """
    import torch
    from bitsandbytes import functional, matmul_4bit

    weight = torch.randn(o, i, device=device, dtype=torch.bfloat16)
    yield "PyTorch bfloat16", weight, (lambda x, w: x @ w) if transposed else (lambda x, w: x @ w.T)
    for kind in ("nf4", "fp4"):
        packed = functional.quantize_4bit(weight, quant_type=kind, blocksize=GROUP)
        backward: Run = lambda x, w: x @ functional.dequantize_4bit(*w)  # noqa: E731
        yield f"bitsandbytes {kind}", packed, backward if transposed else (lambda x, w: matmul_4bit(x, w[0], w[1]))
    if not transposed and device == "cuda":
        codes = torch.randint(0, 256, (o, i // 2), device=device, dtype=torch.uint8)
        sides = torch.randn(i // GROUP, o, 2, device=device, dtype=torch.bfloat16)
        tiled = torch.ops.aten._convert_weight_to_int4pack(codes, INNER_TILES)
        yield "PyTorch int4", (tiled, sides), lambda x, w: torch.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1])


def times(i: int, o: int, m: int, *, transposed: bool, copies: int) -> Iterator[tuple[str, float | str]]:
    """Yield the seconds of each peer's product of m rows, or what it raised."""
    import torch

    x = torch.randn(m, o if transposed else i, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for name, matrix, run in kernels(i, o, transposed=transposed):
            try:
                matrices = [copied(matrix) for _ in range(copies)]
                yield name, (_replay([lambda w=w, run=run: run(x, w) for w in matrices]) - _replay([lambda: x + 1])) / copies
            except (RuntimeError, NotImplementedError) as error:
                yield name, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def copied(matrix: Any) -> Any:
    """Return the matrix with codes of its own, so that the GPU's cache does not hold them; scales are shared, which favours the peer."""
    return (matrix[0].clone(), *matrix[1:]) if isinstance(matrix, tuple) else matrix.clone()


def _replay(products: list[Callable[[], Any]]) -> float:
    """Return the median time of nine replays of a CUDA graph of the products."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a kernel sets up at its first call, no graph may capture
        products[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [product() for product in products]
    rounds = []
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        rounds.append(time.perf_counter() - began)
    del kept
    return statistics.median(rounds[1:])
