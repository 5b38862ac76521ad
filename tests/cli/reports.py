"""What a run wrote down of itself."""

from ftjax.logs.writers import read_jsonl


def reported(workdir, name: str) -> list[float]:
    """Return one metric over the steps that have it."""
    return [row[name] for row in read_jsonl(workdir / "metrics.jsonl") if name in row]
