import threading

import numpy as np
import pytest

from ftjax import data
from ftjax.data import Sequences, make_loader
from ftjax.data.packing import PACKINGS


def sequences(lengths, seed=0):
    generator = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    mask = generator.integers(0, 2, starts[-1]).astype(np.uint8)
    mask[starts[:-1]] = 0
    return Sequences(np.arange(1, starts[-1] + 1, dtype=np.int32), mask, starts)


LENGTHS = np.random.default_rng(0).integers(1, 17, 100)


def make(packing="best_fit", **options):
    return make_loader(sequences(LENGTHS), **{"batch_size": 4, "max_tokens": 16, "packing": packing, "seed": 3} | options)


def documents(batches):
    """The (tokens, mask) of every segment."""
    found = []
    for batch in batches:
        for tokens, mask, ids in zip(batch.tokens, batch.loss_mask, batch.segment_ids, strict=True):
            found += [(tuple(tokens[ids == segment]), tuple(mask[ids == segment])) for segment in range(1, ids.max(initial=0) + 1)]
    return sorted(found)


def equal(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "loss_mask", "positions", "segment_ids"))


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_an_epoch_holds_exactly_the_sequences_and_their_masks(packing, epoch):
    whole = sequences(LENGTHS)
    wanted = [
        (tuple(whole.tokens[a:b]), tuple(whole.loss_mask[a:b].astype(float))) for a, b in zip(whole.starts, whole.starts[1:], strict=False)
    ]
    assert documents(make(packing).epoch(epoch)) == sorted(wanted)


def test_wrapped_holds_every_token_once_and_trains_all_but_the_cut_ones():
    whole, batches = sequences(LENGTHS), list(make("wrapped").epoch())
    tokens = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in batches])
    mask = np.concatenate([batch.loss_mask[batch.segment_ids > 0] for batch in batches])
    assert sorted(tokens) == whole.tokens.tolist()
    lost = whole.loss_mask[tokens - 1] - mask
    first = np.concatenate([(batch.positions == 0)[batch.segment_ids > 0] for batch in batches])
    assert not lost[~first].any() and not mask[first].any()


@pytest.mark.parametrize("packing", PACKINGS)
def test_positions_restart_and_padding_is_empty(packing):
    for batch in make(packing).epoch():
        for row in range(4):
            ids = batch.segment_ids[row]
            for segment in range(1, ids.max(initial=0) + 1):
                assert batch.positions[row][ids == segment].tolist() == list(range((ids == segment).sum()))
                assert batch.loss_mask[row][ids == segment][0] == 0
            assert (np.diff(ids[ids > 0]) >= 0).all() and not ids[np.argmin(ids > 0) :].any() or (ids > 0).all()
        empty = batch.segment_ids == 0
        assert not batch.tokens[empty].any() and not batch.loss_mask[empty].any() and not batch.positions[empty].any()
        assert (batch.tokens.dtype, batch.loss_mask.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("weights", [None, (0.75, 0.25)])
def test_a_batch_is_the_same_whatever_was_asked_before(packing, weights):
    options = {"sizes": (60, 40), "weights": weights}
    steps = [3, 200, 0, 77, 3]
    walked = make(packing, **options)
    for step, batch in zip(steps, [walked.batch(step) for step in steps], strict=True):
        assert equal(batch, make(packing, **options).batch(step))


def test_epochs_follow_each_other():
    for weights in (None, (0.75, 0.25)):
        loader = make(sizes=(60, 40), weights=weights)
        first = [loader.batch(step) for step in range(loader.steps_per_epoch)]
        second = list(loader.epoch(1))
        assert equal(loader.batch(loader.steps_per_epoch), second[0])
        assert loader.locate(loader.steps_per_epoch + len(second)) == (2, 0)
        assert not all(equal(a, b) for a, b in zip(first, second, strict=False))


def test_each_epoch_draws_anew():
    one, other = make().order(0), make().order(1)
    assert sorted(one) == sorted(other) == list(range(100)) and one.tolist() != other.tolist()
    weighted = make(sizes=(60, 40), weights=(0.5, 0.5))
    first = np.concatenate([weighted.order(epoch)[weighted.order(epoch) < 60] for epoch in range(6)])
    assert all(sorted(first[at : at + 60]) == list(range(60)) for at in range(0, 300, 60))


def test_seeds_change_the_order_and_shuffle_can_be_off():
    assert not equal(make(seed=1).batch(0), make(seed=2).batch(0))
    tokens = [batch.tokens[batch.segment_ids > 0] for batch in make("wrapped", shuffle=False).epoch()]
    assert np.concatenate(tokens).tolist() == sequences(LENGTHS).tokens.tolist()


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_shards_of_a_batch_are_the_whole_batch(packing):
    loader = make(packing)
    for step in (0, 5, loader.steps_per_epoch - 1):
        whole, parts = loader.batch(step), [loader.shard(host, 2).batch(step) for host in range(2)]
        assert [part.tokens.shape[0] for part in parts] == [2, 2]
        for name in ("tokens", "loss_mask", "positions", "segment_ids"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    with pytest.raises(ValueError, match="4 rows cannot be shared by 3 processes"):
        loader.shard(0, 3)


def test_shapes_are_few():
    assert {batch.tokens.shape for batch in make().epoch()} == {(4, 16)}
    assert {batch.tokens.shape for batch in make("none").epoch()} <= {(4, 8), (4, 16)}


def test_prefetching_gives_the_same_batches_and_ends_its_thread():
    loader = make()
    batches = loader.iterate(start_step=7)
    for step in range(7, 12):
        assert equal(next(batches), loader.batch(step))
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ftjax-data"]


def test_an_error_in_the_thread_reaches_its_user():
    with pytest.raises(ValueError, match="there is no step -1"):
        next(make().iterate(start_step=-1))


def test_efficiency_counts_every_position():
    loader = make()
    used = sum(int((batch.segment_ids > 0).sum()) for batch in loader.epoch())
    assert loader.efficiency == used / (loader.steps_per_epoch * 4 * 16) > make("none").efficiency


def test_sizes_must_add_up():
    with pytest.raises(ValueError, match="do not add up to 100"):
        make(sizes=(1, 2))


def test_load_mixes_sources_and_accounts_for_them(tmp_path):
    from tests.data.families import byte_tokenizer

    encoder = data.make_encoder(byte_tokenizer("qwen2.5"), max_tokens=512)
    sources = {
        "new": {"path": "tasks:sort", "split": "train[:30]", "weight": 3},
        "old": {"path": "tasks:dates", "split": "train[:10]", "weight": 1},
    }
    loader, reports = data.load(sources, encoder, batch_size=2)
    assert (reports["new"].rows, reports["old"].sequences, loader.mixture.epoch_size) == (30, 10, 40)
    text = "".join(encoder.tokenizer.decode(row) for batch in loader.epoch() for row in batch.tokens)
    assert (text.count("Sort these"), text.count("Write the date")) == (30, 10)
    with pytest.raises(ValueError, match="without one: \\['old'\\]"):
        data.load(sources | {"old": {"path": "tasks:dates"}}, encoder, batch_size=2)
    with pytest.raises(ValueError, match="no setting 'wieght'; nearest: 'weight'"):
        data.load({"new": {"path": "tasks:sort", "wieght": 3}}, encoder, batch_size=2)
    with pytest.raises(ValueError, match="no source is given"):
        data.load({}, encoder, batch_size=2)
