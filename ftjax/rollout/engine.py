"""The engine: many requests through few slots, each slot taking the next one as soon as it is free.

The device has three programs over arrays of fixed shape (see `ftjax.rollout.slots`); here the host decides what goes where. It reads
waiting prompts packed into rows, lays them into free slots, has all slots continued for a block of tokens, and looks at what has ended.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ftjax import models, weights
from ftjax.peft.mixed import NONE, RowWise
from ftjax.rollout import packing
from ftjax.rollout import slots as programs
from ftjax.rollout.generate import refuse_keys
from ftjax.rollout.grammar import tabulate
from ftjax.rollout.prompts import bucket
from ftjax.rollout.requests import Request, Sample, check, form_of
from ftjax.rollout.slots import NOTHING, Joining, Read, Written
from ftjax.rollout.stopping import end
from ftjax.sharding import row_parts
from ftjax.types import Model, Params

MANY = 16
"""Slots up to which the next smaller number is a quarter; see `sizes`."""
WORTH_IT = 32
"""Tokens of a sample that must be left for that."""
LEAST_COLUMNS = 128
"""A ring of fewer is not worth a program of its own."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """Continues prompts by continuous batching (Yu et al., 2022, Orca, OSDI).

    What a request gets depends on its prompt, settings and key alone, not on slots, neighbours or order, up to the rounding of differently
    shaped matrix products. Calls compile nothing that an earlier call with the same features, slots and `slot_tokens` has compiled; the
    parameters may be others each time. Each number of slots (see `sizes`; on a mesh there is one) has a program of its own, and on a CPU
    each size of the ring, two for a doubling of the longest text.

    Example:
      >>> from ftjax import models, rollout
      >>> model = models.build(models.preset("tiny-llama"))
      >>> params = model.init(jax.random.key(0))
      >>> requests = [rollout.Request(np.array([5, 6, 7]), max_tokens=4), rollout.Request(np.array([8]), max_tokens=2, num_samples=3)]
      >>> [len(sample.tokens) for sample in rollout.Engine(model, slots=2).generate(params, requests)]
      [4, 2, 2, 2]
    """

    model: Model
    """On a mesh the one from `sharding.on_mesh`."""
    eos_ids: Sequence[int] = ()
    """The tokens that end a completion of any request; see `Encoder.eos_ids`."""
    _: dataclasses.KW_ONLY
    tokenizer: Any = None
    """Needed for stop texts alone."""
    slots: int = 32
    """Sequences continued at a time. On a mesh a multiple of the devices that rows are split over."""
    slot_tokens: int | None = None
    """The longest prompt and completion together; from the requests of each call if None."""
    read_tokens: int = 512
    """Columns of a row of packed prompts; a longer prompt has longer rows."""
    block: int = 16
    """The most tokens written to each slot before the host looks at them."""
    shared_stem: bool = True
    """Whether what all prompts begin with, a system message or a template, is read once a row, from `packing.LEAST_STEM` tokens on; never
    where all layers have one sliding window. A model with `group_tokens`, which is for training, wants False."""
    patience: int = 0
    """How many slots may end in a block before it is left early for waiting requests."""
    going: Callable[[], None] | None = None
    """Called before each block: what it raises ends the call, where nobody waits for the samples any more."""

    def __post_init__(self):
        for name, least in (("slots", 1), ("read_tokens", 1), ("block", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"engine: {name} is at least {least}, not {getattr(self, name)}.")

    def generate(self, params: Params, requests: Sequence[Request]) -> list[Sample]:
        """Return the samples of all requests, in order; those of one request follow each other.

        Args:
          params: the model's parameters, attached without a key: an adapter stays unmerged, dropout and noise are off.
          requests: what to continue.

        Raises:
          ValueError: a request cannot be answered (see `requests.check`), or the parameters hold a key.
        """
        samples = dict(self.stream(params, requests))
        return [samples[place] for place in sorted(samples)]

    def stream(self, params: Params, requests: Sequence[Request]) -> Iterator[tuple[int, Sample]]:
        """Yield `(place, sample)` as samples end, `place` being that in the list which `generate` returns."""
        refuse_keys("engine", params)
        longest = max((len(request.tokens) + request.max_tokens for request in requests), default=1)
        slot_tokens = self.slot_tokens or bucket(longest)
        leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, weights.Weight))
        adapters = next((leaf.count for leaf in leaves if isinstance(leaf, RowWise)), 0)
        check(
            requests, model=self.model, slot_tokens=slot_tokens, eos_ids=self.eos_ids, adapters=adapters, decodes=self.tokenizer is not None
        )
        if requests:
            yield from _Run(self, params, list(requests), slot_tokens, bool(adapters))


class _Wanted(NamedTuple):
    """A sample on its way into a slot."""

    place: int
    request: Request
    number: int
    read: Read
    row: int
    start: int


class _Begun(NamedTuple):
    """A sample in a slot: what was written so far, in the blocks that it came in."""

    place: int
    request: Request
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]

    @property
    def written(self) -> int:
        return sum(len(part[0]) for part in self.parts)


class _Run:
    """One call: what waits, what has been read, and what stands in which slot."""

    def __init__(self, engine: Engine, params: Params, requests: Sequence[Request], slot_tokens: int, mixed: bool):
        self.engine, self.params, self.requests = engine, params, requests
        self.mesh = _mesh(params)
        # A CPU would copy a layer's weights and cache at each step; see `models.apart`.
        layers_apart = jax.default_backend() == "cpu" and self.mesh is None and not mixed and models.separable(engine.model, params)
        self.written_by = models.apart(params) if layers_apart else params
        self.first = np.cumsum([0, *(request.num_samples for request in requests)])
        # The longest first, so that none is left alone at the end; likewise long prompts, so that short ones fill the rows.
        self.waiting = sorted(range(len(requests)), key=lambda at: (-requests[at].max_tokens, -len(requests[at].tokens)))
        self.ready: deque[_Wanted] = deque()
        self.begun: dict[int, _Begun] = {}
        self.size = engine.slots
        self.free = list(range(engine.slots))[::-1]
        self.form = form_of(requests, engine.eos_ids)
        settings = self.form.settings([], engine.slots)
        self.table = None
        if self.form.grammars:  # laid on the devices once, for it may be large
            table = tabulate(self.form.grammars, programs.vocabulary(engine.model, params))
            self.table = jax.device_put(table, NamedSharding(self.mesh, PartitionSpec()) if self.mesh else None)
        by_positions = isinstance(engine.model.config, models.Config) and engine.model.config.uniform_window is None
        self.stem = packing.stem([request.tokens for request in requests]) if engine.shared_stem and by_positions else 0
        self.most_columns = slot_tokens
        columns = self._columns(max(len(request.tokens) for request in requests)) if layers_apart else slot_tokens
        shape = {"num_columns": columns, "layers_apart": layers_apart, "mesh": self.mesh}
        self.slots = programs.empty(engine.model, params, settings, **shape)

    def __iter__(self) -> Iterator[tuple[int, Sample]]:
        engine = self.engine
        while self.waiting or self.ready or self.begun:
            if engine.going is not None:
                engine.going()
            while self.free and (self.waiting or self.ready):
                if not self.ready:
                    self._read()
                self._join()
            self._fit()
            patience = engine.patience if self.waiting or self.ready else self.size
            self.slots, written = programs.write(
                engine.model,
                self.written_by,
                self.slots,
                patience,
                self.table,
                impl=self.form.impl,
                num_tokens=engine.block,
                mesh=self.mesh,
            )
            yield from self._ended(Written(*map(np.asarray, written)))
            self._narrow()

    def _read(self) -> None:
        """Read some of the prompts that wait."""
        prompts = [self.requests[at].tokens for at in self.waiting]
        adapters = [self.requests[at].adapter for at in self.waiting]
        rows, stem = 1 if self.mesh is None else row_parts(self.mesh), self.stem
        lengths = [len(prompt) - stem for prompt in prompts]
        columns = packing.width(lengths, rows=rows, limit=self.engine.read_tokens, stem=stem)
        places = packing.place(lengths, adapters, rows=rows, columns=columns, stem=stem)
        owners = {place.row: adapters[place.prompt] for place in places}
        read = programs.read(
            self.engine.model,
            self.params,
            *packing.packed(prompts, places, rows=rows, columns=columns, stem=stem),
            np.int32(stem),
            np.asarray([owners.get(row, NONE) for row in range(rows)], np.int32),
        )
        for prompt, row, start in places:
            at = self.waiting[prompt]
            for number in range(self.requests[at].num_samples):
                self.ready.append(_Wanted(int(self.first[at]) + number, self.requests[at], number, read, row, start))
        taken = {place.prompt for place in places}
        self.waiting = [at for n, at in enumerate(self.waiting) if n not in taken]

    def _join(self) -> None:
        """Put samples that have been read together into free slots."""
        size, wanted, slots = self.engine.slots, [], []
        while self.free and self.ready and (not wanted or self.ready[0].read is wanted[0].read):
            wanted.append(self.ready.popleft())
            slots.append(self.free.pop())
        for slot, one in zip(slots, wanted, strict=True):
            self.begun[slot] = _Begun(one.place, one.request, [])
        self._fit()
        numbers = [one.number if np.ndim(one.request.key) == 0 else NOTHING for one in wanted]
        joining = Joining(
            np.int32(len(wanted)),
            _filled(slots, size, NOTHING),
            *(_filled(values, size, 0) for values in ([one.row for one in wanted], [one.start for one in wanted])),
            _filled([len(one.request.tokens) for one in wanted], size, 1),
            _filled(numbers, size, NOTHING),
            self.form.settings([(one.request, one.number) for one in wanted], size),
        )
        self.slots = programs.join(self.slots, wanted[0].read, joining, impl=self.form.impl, mesh=self.mesh)

    def _fit(self) -> None:
        """Have a ring that holds all texts after the next block, where layers lie apart: attention reads all of it at each step.

        It shrinks to half and less alone. A stacked cache has its full size at once, for a copy of it would stand beside it.
        """
        if not isinstance(self.slots.cache.k, tuple):
            return
        longest = max(len(begun.request.tokens) + begun.written for begun in self.begun.values())
        columns, now = self._columns(longest), programs.columns(self.slots)
        if columns > now or 2 * columns <= now:
            self.slots = programs.resize(self.slots, columns)

    def _columns(self, length: int) -> int:
        """Return the size of a ring in which a text of this length can be continued by a block."""
        return min(max(bucket(length + self.engine.block), LEAST_COLUMNS), self.most_columns)

    def _ended(self, written: Written) -> list[tuple[int, Sample]]:
        """Take in a block, and return what has ended with it."""
        found, cut = [], np.zeros((self.size,), bool)
        for slot, begun in list(self.begun.items()):
            fresh = int(np.sum(written.tokens[:, slot] != NOTHING))
            begun.parts.append(tuple(x[:fresh, slot] for x in written))
            sample = self._sample(begun, fresh)
            if sample is not None:
                found.append((begun.place, sample))
                del self.begun[slot]
                self.free.append(slot)
                cut[slot] = bool(begun.request.stop)
        if cut.any():
            self.slots = programs.leave(self.slots, cut)
        return found

    def _narrow(self) -> None:
        """Go on with fewer slots if they are enough, once nothing waits and there is much left to write."""
        if self.waiting or self.ready or not self.begun or self.mesh is not None:
            return
        left = max(begun.request.max_tokens - begun.written for begun in self.begun.values())
        size = min(one for one in sizes(self.engine.slots) if one >= len(self.begun))
        if size >= self.size or left < WORTH_IT:
            return
        chosen = [*self.begun, *(slot for slot in range(self.size) if slot not in self.begun)][:size]
        self.slots, self.size = programs.keep(self.slots, np.asarray(chosen, np.int32)), size
        self.begun = {chosen.index(slot): begun for slot, begun in self.begun.items()}

    def _sample(self, begun: _Begun, fresh: int) -> Sample | None:
        """Return the sample if it has ended; `fresh` of its tokens are new."""
        request, eos_ids = begun.request, self.engine.eos_ids
        tokens, logps, behavior_logps = (np.concatenate(x) for x in zip(*begun.parts, strict=True))
        ended = request.stop and end(
            self.engine.tokenizer.decode, tokens, request.stop, before=len(tokens) - fresh, min_tokens=request.min_tokens
        )
        if ended:
            return Sample(tokens[:ended], logps[:ended], behavior_logps[:ended], "stop")
        last = int(tokens[-1])
        if last in eos_ids or last in request.stop_ids:
            return Sample(tokens, logps, behavior_logps, "eos" if last in eos_ids else "stop")
        return Sample(tokens, logps, behavior_logps, "length") if len(tokens) == request.max_tokens else None


def sizes(slots: int) -> list[int]:
    """Return the numbers of slots in which samples are continued as fewer are left, each of which has a program of its own.

    >>> sizes(64), sizes(8)
    ([64, 48, 32, 16, 4, 1], [8, 2])
    """
    # Three quarters of many rows take three quarters of their time, for products take most of it.
    found = [slots, 3 * slots // 4] if slots > 2 * MANY else [slots]
    while fewer := slots // (2 if slots > MANY else 4):
        found.append(slots := fewer)
    return found


def _mesh(params: Params) -> Mesh | None:
    """Return the mesh that the parameters lie on, if it has more than one device."""
    places = (leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    return next((place.mesh for place in places if isinstance(place, NamedSharding) and place.mesh.size > 1), None)


def _filled(values: Sequence[int], size: int, rest: int) -> np.ndarray:
    return np.asarray([*values, *[rest] * (size - len(values))], np.int32)
