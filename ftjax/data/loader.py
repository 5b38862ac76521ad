"""Batches by index: `Loader.batch(step)` is a pure function of (sequences, settings, seed, step).

An epoch is a plan made from (seed, epoch) alone. To find the epoch of a step only the sizes of the plans before it are needed; without
weights every epoch has the same, so any step is reached at once, and with weights at the price of planning (not reading) the epochs
before it. The last batch of an epoch is filled with empty rows (segment 0, mask 0), so every sequence comes exactly once an epoch
and every batch has the same shape, or one of a few bucket widths.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ftjax.data.corpus import Sequences
from ftjax.data.judged_batch import Crossing, Room, common, judged_batch, packed_batch, padded, sequences_row
from ftjax.data.mixture import Mixture
from ftjax.data.packing import Plan, make_plan
from ftjax.types import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Loader:
    """Make one with `make_loader(…)`; `shard` returns another that holds one host's rows."""

    sequences: Sequences
    mixture: Mixture
    first: np.ndarray
    """int `[sources]`: the first sequence of each source."""
    batch_size: int
    max_tokens: int
    packing: str
    buckets: int
    rows: tuple[int, int]
    """The rows of each global batch that this loader returns."""
    responses: int = 1
    """Sequences that an item has, which then lie on an axis of their own: batches are `[rows, responses, width]`."""
    numbers: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """`{field of Batch: float32 [items]}`."""
    room: Room | None = None
    """Of packed rows of items."""
    stems: np.ndarray | None = None
    """int `[items]`: of packed rows of items, how many tokens stand once for all responses of an item."""
    heard: Sequences | None = None
    """The same texts in a teacher's own tokens."""
    crossing: Crossing | None = None
    """Where a batch has, beside its rows, each prompt with the response of another."""
    plans: dict[int, tuple[np.ndarray, Plan]] = dataclasses.field(default_factory=dict)
    """The order and the plan of the latest epochs: a cache, never a state."""
    ends: list[int] = dataclasses.field(default_factory=list)
    """The steps up to the end of epoch 0, 1, …, as far as anyone asked: a cache too."""
    lock: Any = dataclasses.field(default_factory=threading.RLock)
    """For the caches: the thread of `iterate` and its user may both ask."""

    def plan(self, epoch: int) -> tuple[np.ndarray, Plan]:
        """Return `(order, plan)` of an epoch; the plan numbers sequences by their place in the order."""
        with self.lock:
            if epoch not in self.plans:
                order = self.order(epoch)
                plan = make_plan(
                    self.lengths[order],
                    batch_size=self.batch_size,
                    max_tokens=self.max_tokens,
                    packing=self.packing,
                    generator=np.random.default_rng([self.mixture.seed % 2**63, epoch]),
                    buckets=self.buckets,
                    shuffle=self.mixture.shuffle,
                )
                for old in list(self.plans)[:-1]:
                    del self.plans[old]
                self.plans[epoch] = order, plan
            return self.plans[epoch]

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[items]`: tokens of an item: those that it has in a packed row, else of its longest sequence."""
        each = self.sequences.lengths.reshape(-1, self.responses)
        return each.max(axis=1) if self.stems is None else each.sum(axis=1) - (self.responses - 1) * self.stems

    def order(self, epoch: int) -> np.ndarray:
        """Return the items of an epoch `[epoch_size]` in the order in which they are drawn."""
        size = self.mixture.epoch_size
        source, row = self.mixture.draw(np.arange(epoch * size, (epoch + 1) * size))
        return self.first[source] + row

    @property
    def steps_per_epoch(self) -> int:
        """Batches in the first epoch (in every epoch, unless the sources have weights)."""
        return self._end(0)

    def locate(self, step: int) -> tuple[int, int]:
        """Return `(epoch, step within it)`."""
        if step < 0:
            raise ValueError(f"data: there is no step {step}")
        if self.mixture.weights is None:
            return divmod(step, self.steps_per_epoch)
        epoch = 0
        while self._end(epoch) <= step:
            epoch += 1
        return epoch, step - (self._end(epoch - 1) if epoch else 0)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step: NumPy arrays `[rows, width]`, or with an axis of responses before the last."""
        epoch, within = self.locate(step)
        order, plan = self.plan(epoch)
        width, of_all, mine = int(plan.widths[within]), plan.batches[within], slice(*self.rows)
        if self.responses == 1 and not self.numbers:
            batch = assemble(self.sequences, plan, of_all[mine], order, width=width)
            return batch if self.heard is None else dataclasses.replace(batch, teacher=self._heard(plan, of_all[mine], order))
        if self.room:
            found = [order[plan.rows.pieces[slice(*plan.rows.starts[[row, row + 1]]), 0]] if row >= 0 else [] for row in of_all[mine]]
            options = {"width": width, "room": self.room, "stems": self.stems}
            return packed_batch(self.sequences, found, self.responses, self.numbers, **options)
        items = np.where(of_all < 0, -1, order[plan.rows.pieces[of_all, 0]])
        return judged_batch(self.sequences, items, mine, self.responses, self.numbers, width=width, crossing=self.crossing)

    def shard(self, process_index: int, process_count: int) -> Loader:
        """Return the loader of one host: its consecutive share of each batch's rows."""
        first, last = self.rows
        if (last - first) % process_count or not 0 <= process_index < process_count:
            raise ValueError(f"data: {last - first} rows cannot be shared by {process_count} processes (this is number {process_index})")
        share = (last - first) // process_count
        return dataclasses.replace(self, rows=(first + share * process_index, first + share * (process_index + 1)))

    def knowing(self, **values: np.ndarray) -> Loader:
        """Return the loader whose batches have these fields too: of each token of all sequences, `[all tokens, ...]`."""
        return dataclasses.replace(self, sequences=self.sequences._replace(known={**self.sequences.known, **values}))

    def hearing(self, heard: Sequences) -> Loader:
        """Return the loader whose batches have `teacher`, the same texts in other tokens: of rows with one whole text each.

        Raises:
          ValueError: rows share texts, texts are cut into rows, or there are not as many of them.
        """
        if self.packing != "none" or int(self.lengths.max()) > self.max_tokens or len(heard.lengths) != len(self.sequences.lengths):
            raise ValueError(
                "data: a teacher with other tokens reads rows of one whole text each: set packing to 'none', and max_tokens higher."
            )
        return dataclasses.replace(self, heard=heard)

    def _heard(self, plan: Plan, rows: np.ndarray, order: np.ndarray) -> Batch:
        """Return the texts of some rows as the teacher has them, as wide as the longest of all."""
        chosen = [int(order[plan.rows.pieces[plan.rows.starts[row], 0]]) if row >= 0 else -1 for row in rows.tolist()]
        texts = [sequences_row(self.heard, text) if text >= 0 else None for text in chosen]
        return padded(texts, int(self.heard.lengths.max()), (len(texts),))

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch: how to go through evaluation data once."""
        first = self._end(epoch - 1) if epoch else 0
        for step in range(first, self._end(epoch)):
            yield self.batch(step)

    def iterate(self, start_step: int = 0, *, ahead: int = 2) -> Iterator[Batch]:
        """Yield batches from `start_step` on for ever, made in a thread that keeps `ahead` of them ready.

        Close the iterator (or drop it) to end the thread. An error in the thread is raised here.
        """
        ready: queue.Queue = queue.Queue(maxsize=ahead)
        stopped = threading.Event()

        def put(item) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            step = start_step
            try:
                while not stopped.is_set():
                    put(self.batch(step))
                    step += 1
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="ftjax-data", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    @property
    def efficiency(self) -> float:
        """The share of all batch positions of the first epoch that hold a token."""
        _, plan = self.plan(0)
        used = int((plan.rows.pieces[:, 2] - plan.rows.pieces[:, 1]).sum())
        if self.responses == 1 or self.room:
            return used / (int(plan.widths.sum()) * self.batch_size)
        return int(self.sequences.lengths.sum()) / (int(plan.widths.sum()) * self.batch_size * self.responses)

    def _end(self, epoch: int) -> int:
        with self.lock:
            while len(self.ends) <= epoch:
                at = len(self.ends)
                steps = self.ends[0] if at and self.mixture.weights is None else len(self.plan(at)[1].batches)
                self.ends.append(steps + (self.ends[-1] if at else 0))
            return self.ends[epoch]


def make_loader(
    sequences: Sequences,
    *,
    batch_size: int,
    max_tokens: int,
    packing: str = "best_fit",
    seed: int = 0,
    sizes: tuple[int, ...] | None = None,
    weights: tuple[float, ...] | None = None,
    shuffle: bool = True,
    buckets: int = 4,
    responses: int = 1,
    numbers: Mapping[str, np.ndarray] = {},
    crossing: Crossing | None = None,
) -> Loader:
    """Return the loader of some sequences.

    Args:
      sequences: all sources, one after the other.
      batch_size: rows of a batch, over all hosts.
      max_tokens: tokens of a row.
      packing: "best_fit", "none" or "wrapped": see `packing.make_plan`; of judged responses "shared" too, "best_fit" with a prompt once for
        all responses to it.
      seed: of the order.
      sizes: sequences of each source; all are one source by default.
      weights: the share of each source, or None for all rows of all sources once an epoch.
      shuffle: False keeps the order of the sources.
      buckets: with packing "none", the most different widths.
      responses: sequences of an item, for judged responses: of these too, as the next two, packing is "none".
      numbers: what is known of each item.
      crossing: add each prompt with the response of another one of its batch, so `batch_size` is 2 or more.
    """
    count = len(sequences.lengths) // responses
    sizes = sizes or (count,)
    if sum(sizes) != count:
        raise ValueError(f"data: sizes {sizes} do not add up to {count} sequences")
    judged = responses > 1 or bool(numbers)
    if judged and packing not in ("none", "best_fit", "shared") or crossing and packing != "none":
        raise ValueError(f"data: packing is {packing!r}; judged responses {'of this objective ' if crossing else ''}take 'none'.")
    if batch_size < 1:
        raise ValueError(f"data: batch_size is {batch_size}")
    if crossing and batch_size < 2:
        raise ValueError("data: batch_size is 1, and a prompt gets the response of another one of its batch; set it to 2 or more.")
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    mixture = Mixture(tuple(sizes), weights, seed, shuffle)
    loader = Loader(sequences, mixture, first, batch_size, max_tokens, packing, buckets, (0, batch_size), responses, numbers)
    if judged and packing != "none":
        # A response's first trained token is predicted by the prompt's last one, which therefore stands before each of them.
        stems = np.maximum(common(sequences, responses) - 1, 0) if packing == "shared" and responses > 1 else np.zeros(count, np.int64)
        return _with_room(dataclasses.replace(loader, max_tokens=max_tokens * responses, packing="best_fit", stems=stems))
    return dataclasses.replace(loader, crossing=crossing)


def _with_room(loader: Loader) -> Loader:
    """Return the loader with packed rows: room for the longest response, and for as many of the shortest items as a row can hold."""
    sequences, starts = loader.sequences, loader.sequences.starts
    firsts = [int(np.argmax(sequences.loss_mask[a:b])) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    items = max(1, int(np.searchsorted(np.cumsum(np.sort(loader.lengths)), loader.max_tokens, side="right")))
    # Where no two fit into a row, none is wider than the longest.
    width = loader.max_tokens if items > 1 else min(loader.max_tokens, -(-int(loader.lengths.max()) // 16) * 16)
    return dataclasses.replace(loader, max_tokens=width, room=Room(items, int((sequences.lengths - firsts).max())))


def assemble(sequences: Sequences, plan: Plan, rows: np.ndarray, order: np.ndarray, *, width: int) -> Batch:
    """Return the batch `[len(rows), width]` of some rows of a plan."""
    shape = (len(rows), width)
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    loss_mask = np.zeros(shape, np.float32)
    known = {name: np.zeros((*shape, *values.shape[1:]), values.dtype) for name, values in sequences.known.items()}
    for at, row in enumerate(rows.tolist()):
        if row < 0:
            continue
        column = 0
        for segment, (sequence, begin, end) in enumerate(plan.rows.pieces[plan.rows.starts[row] : plan.rows.starts[row + 1]].tolist(), 1):
            source = slice(int(sequences.starts[order[sequence]]) + begin, int(sequences.starts[order[sequence]]) + end)
            target = slice(column, column + end - begin)
            tokens[at, target] = sequences.tokens[source]
            loss_mask[at, target] = sequences.loss_mask[source]
            loss_mask[at, column] = 0  # the first token of a segment has nothing before it
            positions[at, target] = np.arange(end - begin)
            segment_ids[at, target] = segment
            for name, values in sequences.known.items():
                known[name][at, target] = values[source]
            column = target.stop
    return Batch(tokens=tokens, loss_mask=loss_mask, positions=positions, segment_ids=segment_ids, **known)


def once(sequences: Sequences, *, rows: int, width: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield batches in which every sequence stands once, several in a row, and which of all tokens stands where, int `[rows, width]`.

    Padding is told from tokens by `segment_ids` alone. What else is known of the tokens is left out.

    Args:
      sequences: each no longer than `width`.
      rows: of a batch.
      width: tokens of a row.
    """
    bare, order = sequences._replace(known={}), np.arange(len(sequences.lengths))
    numbered = bare._replace(tokens=np.arange(len(sequences.tokens), dtype=np.int32))
    settings = {"packing": "best_fit", "generator": np.random.default_rng(0), "shuffle": False}
    plan = make_plan(sequences.lengths, batch_size=rows, max_tokens=width, **settings)
    for chosen in plan.batches:
        batch, at = (assemble(given, plan, chosen, order, width=width) for given in (bare, numbered))
        yield batch, at.tokens
