"""What a run says: to the terminal, to files, and as a picture."""

from ftjax.logs.plot import ADVICE, loss_curve, sweep_curves
from ftjax.logs.terminal import Terminal, parameters, plan_table
from ftjax.logs.throughput import Meter, flops_per_batch, peak_flops, peak_memory, process_seconds
from ftjax.logs.writers import Jsonl, TensorBoard, Wandb, Writer, Writers

__all__ = [
    "ADVICE",
    "Jsonl",
    "Meter",
    "TensorBoard",
    "Terminal",
    "Wandb",
    "Writer",
    "Writers",
    "flops_per_batch",
    "loss_curve",
    "parameters",
    "peak_flops",
    "peak_memory",
    "plan_table",
    "process_seconds",
    "sweep_curves",
]
