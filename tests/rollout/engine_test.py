"""The engine: slots, neighbours, order and the size of the batch change nothing; what it writes is what a static batch writes."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, quant, rollout, scoring, sharding
from ftjax.hf.tokenizer import byte_tokenizer
from ftjax.rollout import Grammar, Request, packing, settings
from ftjax.rollout import engine as engines
from ftjax.rollout import slots as programs
from ftjax.rollout.requests import form_of
from ftjax.types import Batch
from tests.rollout.generate_test import complete, prompts, tiny

SIZE = {"slots": 3, "slot_tokens": 48, "read_tokens": 32, "block": 5}
DRAWN = settings(temperature=1.0, top_p=0.9)


def engine(family="llama", **options):
    return rollout.Engine(tiny(family)[0], **{**SIZE, **options})


def asked(key, count=7, **options):
    """Requests of unequal prompts, lengths and keys."""
    return [
        Request(row, max_tokens=3 + 3 * (n % 4), sampling=DRAWN, key=jax.random.fold_in(key, n)[None], **options)
        for n, row in enumerate(prompts(count, 3))
    ]


def tokens(samples):
    return [sample.tokens.tolist() for sample in samples]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_written_is_what_a_static_batch_writes(family, key):
    model, params = tiny(family)
    requests = asked(key)
    found = engine(family).generate(params, requests)
    for request, sample in zip(requests, found, strict=True):
        alone = complete(model, params, [request.tokens], key=request.key[np.zeros(3, int)], temperature=1.0, top_p=0.9)
        count = request.max_tokens
        assert sample.tokens.tolist() == alone.tokens[0, :count].tolist() and sample.reason == "length"
        np.testing.assert_allclose(sample.logps, alone.logps[0, :count], atol=1e-5)
        np.testing.assert_allclose(sample.behavior_logps, alone.behavior_logps[0, :count], atol=1e-5)
    assert len({tuple(sample.tokens[:4]) for sample in found}) == len(found)


def test_who_waits_for_nothing_any_more_ends_it_between_two_blocks(key):
    blocks = []

    def going():
        blocks.append(len(blocks))
        if len(blocks) == 3:
            raise InterruptedError

    samples = []
    with pytest.raises(InterruptedError):
        for _, sample in engine(going=going).stream(tiny()[1], asked(key)):
            samples.append(sample)
    assert 0 < len(samples) < 7 and blocks == [0, 1, 2]


def test_slots_order_and_neighbours_change_nothing(key):
    params = tiny()[1]
    requests = asked(key)
    found = tokens(engine().generate(params, requests))
    assert tokens(engine().generate(params, requests[::-1])) == found[::-1]
    assert tokens(engine().generate(params, requests[2:5])) == found[2:5]
    assert tokens(engine(slots=5, read_tokens=64, block=3, patience=2).generate(params, requests)) == found


def test_the_last_samples_go_on_in_fewer_slots(key, monkeypatch):
    params, sizes = tiny()[1], []
    monkeypatch.setattr(
        programs,
        "write",
        lambda *arguments, write_=programs.write, **rest: sizes.append(arguments[2].live.size) or write_(*arguments, **rest),
    )
    requests = [Request(row, 40 if n in (2, 5) else 2, sampling=DRAWN, key=key[None]) for n, row in enumerate(prompts(9, 3))]
    found = tokens(engine(slots=8).generate(params, requests))
    assert set(sizes) == {8, 2} and sizes == sorted(sizes, reverse=True)
    assert tokens(engine(slots=3).generate(params, requests)) == found and list(map(len, found)) == [2, 2, 40, 2, 2, 40, 2, 2, 2]
    sizes.clear()
    assert len(engine(slots=8).generate(params, [dataclasses.replace(requests[2], max_tokens=9)])) == 1
    assert set(sizes) == {8}  # too little is left


def test_many_slots_become_three_quarters_first(key, monkeypatch):
    params, kept = tiny()[1], []
    monkeypatch.setattr(programs, "keep", lambda slots, chosen, keep=programs.keep: kept.append(len(chosen)) or keep(slots, chosen))
    requests = [Request(row, 40 if n < 26 else 2, sampling=DRAWN, key=key[None]) for n, row in enumerate(prompts(36, 3))]
    found = tokens(engine(slots=36, slot_tokens=96).generate(params, requests))
    assert kept == [27] and tokens(engine(slots=16, slot_tokens=96).generate(params, requests)) == found


def test_a_ring_is_as_long_as_its_texts_and_changes_nothing(key, monkeypatch):
    sizes = []

    def resize(slots, num_columns, resize=programs.resize):
        sizes.append((programs.columns(slots), num_columns))
        return resize(slots, num_columns)

    monkeypatch.setattr(programs, "resize", resize)
    lengths = [70, 4, 4, 30, 4, 4, 4, 4, 4, 20]
    requests = [
        Request(row, max_tokens=count, sampling=DRAWN, key=jax.random.fold_in(key, n)[None])
        for n, (row, count) in enumerate(zip(prompts(len(lengths), 3), lengths, strict=True))
    ]
    model, params = tiny()
    method = peft.prefix_tuning(num_tokens=3)
    for given in (params, method.attach(*method.init(key, params))):
        found = []
        for least in (128, 8):
            monkeypatch.setattr(engines, "LEAST_COLUMNS", least)
            found.append(engine(slots=2, slot_tokens=96).generate(given, requests))
        assert tokens(found[0]) == tokens(found[1])
        for one, other in zip(*found, strict=True):
            np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
    assert any(now < then for now, then in sizes) and any(now > then for now, then in sizes), sizes


def test_samples_of_a_group_are_those_of_requests_alone(key):
    params = tiny()[1]
    first, second = prompts(2, 5)
    group = Request(first, max_tokens=6, sampling=DRAWN, key=key, num_samples=4)
    other = Request(second, max_tokens=4, sampling=DRAWN, key=key[None])
    keys = [jax.random.fold_in(key, n) for n in range(4)]
    alone = [Request(first, max_tokens=6, sampling=DRAWN, key=one[None]) for one in keys]
    found = tokens(engine().generate(params, [group, other]))
    assert found == tokens(engine().generate(params, [*alone, other]))
    assert found[:4] == tokens(
        engine().generate(params, [Request(first, max_tokens=6, sampling=DRAWN, key=jnp.stack(keys), num_samples=4)])
    )
    assert len(set(map(tuple, found))) == 5


def test_prompts_of_a_group_are_read_once(key, monkeypatch):
    read = []
    monkeypatch.setattr(programs, "read", lambda *arguments, read_=programs.read: read.append(arguments[2]) or read_(*arguments))
    group = Request(prompts(1, 7)[0], max_tokens=3, sampling=DRAWN, key=key, num_samples=5)
    assert len(engine().generate(tiny()[1], [group])) == 5
    assert [int(np.count_nonzero(row)) for row in read] == [7]


def with_stem(size, count, seed=0):
    """Prompts that begin with the same tokens, one of them with nothing but one more."""
    random = np.random.default_rng(seed)
    shared = random.integers(1, 250, size)
    return [np.concatenate([shared, [n + 1], random.integers(1, 250, 3 * n)]).astype(np.int32) for n in range(count)]


def reads(monkeypatch):
    """The segments of all rows that are read."""
    found = []
    monkeypatch.setattr(programs, "read", lambda *arguments, read_=programs.read: found.append(arguments[4]) or read_(*arguments))
    return found


def changes(monkeypatch):
    """The names of the programs that give the slots another shape, as often as they run."""
    found, real = [], {name: getattr(programs, name) for name in ("resize", "keep")}
    for name in real:
        monkeypatch.setattr(programs, name, lambda *given, name=name: found.append(name) or real[name](*given))
    return found


@pytest.mark.parametrize("before", [[], ["prefix_tuning"], ["prompt_tuning"]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_all_prompts_begin_with_is_read_once_a_row(family, before, key, monkeypatch):
    model, params = tiny(family)
    for make in before:
        method = getattr(peft, make)(3)
        params = method.attach(*method.init(key, params))
    given = with_stem(18, 5)
    penalties = settings(temperature=1.0, repetition_penalty=1.5, frequency_penalty=0.2)
    requests = [Request(prompt, 8, sampling=penalties, key=jax.random.fold_in(key, n)[None]) for n, prompt in enumerate(given)]
    segments, found = reads(monkeypatch), []
    for shared in (True, False):
        found.append(engine(family, slot_tokens=64, read_tokens=64, shared_stem=shared).generate(params, requests))
        read = sum(np.count_nonzero(rows) for rows in segments)
        assert read == sum(map(len, given)) - (18 * (len(given) - len(segments)) if shared else 0)
        segments.clear()
    assert tokens(found[0]) == tokens(found[1])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
        np.testing.assert_allclose(one.behavior_logps, other.behavior_logps, atol=1e-5)


@pytest.mark.parametrize("several", [False, True], ids=["one model", "adapters"])
def test_a_stem_rings_and_slots_change_nothing_of_penalties_grammars_and_adapters(several, key, monkeypatch):
    """All of these at a time, in layers that look back by windows; beside an engine that does none of them."""
    model, params = tiny("gemma3")
    if several:
        method = peft.lora("all-linear", rank=2, init="gaussian")
        moved = [method.init(jax.random.fold_in(key, n), params) for n in range(2)]
        adapted = {f"{n}": method.attach(frozen, jax.tree.map(lambda x: x + 0.1, own)) for n, (frozen, own) in enumerate(moved)}
        params = peft.stack_adapters(params, adapted)
    penalties = settings(temperature=1.0, repetition_penalty=1.5, frequency_penalty=0.2)
    end = 2
    held = Grammar([{7: 1}, {8: 2, end: 1}, {7: 1}], end)  # 7, 8, 7, 8, … as long as it likes
    asked = [{"max_tokens": 70, "sampling": penalties}, {"max_tokens": 60, "min_tokens": 45}, {"max_tokens": 50, "grammar": held}]
    asked += [{"max_tokens": 3, "num_samples": 3}, {"max_tokens": 4, "sampling": penalties}]
    requests = [
        Request(prompt, **{"sampling": DRAWN, "key": jax.random.fold_in(key, n), "adapter": n % 3 - 1 if several else -1, **options})
        for n, (prompt, options) in enumerate(zip(with_stem(18, 5), asked, strict=True))
    ]
    plain = engine("gemma3", eos_ids=(end,), slots=4, slot_tokens=128, shared_stem=False).generate(params, requests)
    monkeypatch.setattr(engines, "LEAST_COLUMNS", 32)
    changed = changes(monkeypatch)
    found = engine("gemma3", eos_ids=(end,), slots=12, slot_tokens=128, read_tokens=24).generate(params, requests)
    assert set(changed) == ({"keep"} if several else {"keep", "resize"})
    assert tokens(found) == tokens(plain) and len({tuple(one.tokens[:3]) for one in found}) > 4
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
        np.testing.assert_allclose(one.behavior_logps, other.behavior_logps, atol=1e-5)


def test_no_more_prompts_are_read_together_than_can_branch_off_a_stem():
    places = packing.place([1] * 5000, [0] * 5000, rows=2, columns=3000, stem=16)
    _, _, segments = packing.packed([np.arange(17)] * 5000, places, rows=2, columns=3000, stem=16)
    assert len(places) == 2047 and segments.min() == 0 and len(np.unique(segments)) == 2 + 2047
    assert len(packing.place([1] * 5000, [0] * 5000, rows=2, columns=300, stem=16)) == 2 * 284


def test_a_short_beginning_and_a_sliding_window_are_read_as_they_stand(key, monkeypatch):
    segments = reads(monkeypatch)
    for family, size in (("llama", 15), ("mistral", 18)):
        model, params = tiny(family)
        assert (set(model.config.windows) == {None}) == (family == "llama")
        given = with_stem(size, 3)
        found = engine(family, slot_tokens=64, read_tokens=96).generate(params, [Request(prompt, 8) for prompt in given])
        assert np.unique(segments.pop()).tolist() == [0, 1, 2, 3]
        assert tokens(found) == [complete(model, params, [prompt], width=32).tokens[0, :8].tolist() for prompt in given]


def test_the_example_of_the_page_runs():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "online.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page.partition("\n## Generation by itself\n")[2], flags=re.DOTALL)
    said = {}
    exec(example, said)
    assert said["greedy"].reason in ("eos", "stop", "length") and not said["greedy"].behavior_logps.any()
    assert len(said["first"].tokens) == len(said["first"].behavior_logps) and said["first"].behavior_logps.all()


def test_samples_are_yielded_as_they_end(key):
    requests = asked(key)
    places = [place for place, _ in engine().stream(tiny()[1], requests)]
    assert sorted(places) == list(range(7)) and places != sorted(places)


def test_hundreds_of_requests_of_other_lengths_and_settings_compile_nothing(key):
    model, params = tiny()
    everything = (programs.empty, programs.read, programs.join, programs.write)
    random = np.random.default_rng(0)

    def some(count):
        for n in range(count):
            most = int(random.integers(1, 9))
            sampling = settings(temperature=float(random.random()) + 0.1, top_p=0.5 + 0.4 * float(random.random()))
            yield Request(random.integers(0, 250, random.integers(1, 30)), most, sampling=sampling, key=key, num_samples=1 + n % 3)

    engine(eos_ids=(7,)).generate(params, [*some(9), Request([3], 2, sampling=DRAWN, key=key)])
    before = [program._cache_size() for program in everything]
    found = engine(eos_ids=(7, 8)).generate(jax.tree.map(lambda x: x * 0.9, params), list(some(110)))
    assert len(found) == 219 and {sample.reason for sample in found} == {"eos", "length"}
    assert [program._cache_size() for program in everything] == before


def test_rings_that_grow_and_slots_that_get_fewer_compile_a_handful_once(key, monkeypatch):
    monkeypatch.setattr(engines, "LEAST_COLUMNS", 32)
    model, params = tiny()
    lengths = [70, *[3] * 9]
    requests = [Request(row, count, sampling=DRAWN, key=key[None]) for row, count in zip(prompts(len(lengths), 3), lengths, strict=True)]
    changed = changes(monkeypatch)
    everything = (programs.empty, programs.read, programs.join, programs.write)

    def compiled():
        return np.asarray([program._cache_size() for program in everything])

    counts, found = [compiled()], []
    for _ in range(2):
        found.append(tokens(engine(slots=7, slot_tokens=96, block=6).generate(params, requests)))  # as nothing else here
        counts.append(compiled())
    assert set(changed) == {"resize", "keep"} and found[0] == found[1] and list(map(len, found[0])) == lengths
    first, again = np.diff(counts, axis=0)
    assert not again.any() and (first <= [1, 2, 4, 6]).all() and first[3] >= 3, first


def test_a_row_ends_at_an_eos_a_stop_id_or_a_stop_text(key):
    params, tokenizer = tiny()[1], byte_tokenizer()
    (request,) = asked(key, 1)
    request = dataclasses.replace(request, max_tokens=12)
    (free,) = engine().generate(params, [request])
    end = next(n for n, token in enumerate(free.tokens.tolist()) if 32 < token < 127)  # one of ASCII, whose text is its own
    token, length = int(free.tokens[end]), end + 1
    ways = {
        "eos": (engine(eos_ids=(token,)), request),
        "stop": (engine(), dataclasses.replace(request, stop_ids=(token,))),
        "stop text": (engine(tokenizer=tokenizer), dataclasses.replace(request, stop=("no such text", chr(token)))),
    }
    for reason, (through, request) in ways.items():
        (found,) = through.generate(params, [request])
        assert found.tokens.tolist() == free.tokens[:length].tolist() and len(found.logps) == length < 12
        assert found.reason == reason.split()[0] and found.finished


def test_until_min_tokens_are_written_nothing_that_ends_a_row_is_chosen(key):
    params = tiny()[1]
    request = Request(prompts(1, 4)[0], 12, sampling=DRAWN, key=key)
    (free,) = engine().generate(params, [request])
    ends = free.tokens[:2].tolist()
    found = engine(eos_ids=ends).generate(params, [dataclasses.replace(request, min_tokens=least) for least in (0, 5, 12)])
    assert len(found[0].tokens) == 1
    for least, sample in zip((5, 12), found[1:], strict=True):
        assert len(sample.tokens) >= least and not set(ends) & set(sample.tokens[: least - 1].tolist())


def test_penalties_count_prompt_and_completion(key):
    model, params = tiny()
    row, other = prompts(2, 6)
    penalties = settings(repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=0.2)
    found = engine(slots=2).generate(params, [Request(other, 12), Request(row, 12, sampling=penalties), Request(row, 12)])

    @jax.jit
    def logits_at(tokens, at):
        return model.unembed(model.head(params), model.apply(params, tokens)[0][0, at])

    expected = []
    for at in range(len(row), len(row) + 12):
        tokens = np.zeros((1, 28), np.int32)
        tokens[0, :at] = [*row, *expected]
        logits = np.asarray(logits_at(tokens, at - 1)).copy()
        before, counts = np.unique(tokens[0, :at]), np.bincount(np.asarray(expected, int), minlength=len(logits))
        logits[before] = np.where(logits[before] > 0, logits[before] / 1.7, logits[before] * 1.7)
        expected.append(int(np.argmax(logits - 0.3 * counts - 0.2 * (counts > 0))))
    assert found[1].tokens.tolist() == expected != found[2].tokens.tolist()


@pytest.mark.parametrize("num_samples", [1, 4])
def test_logps_are_those_of_scoring(num_samples, key):
    """Those of a group as well, whose prompt is read once and copied into slots that become free at other times."""
    model, params = tiny()
    requests = [dataclasses.replace(request, key=request.key[0], num_samples=num_samples) for request in asked(key)]
    found, count = engine().generate(params, requests), 7 * num_samples
    assert len({tuple(sample.tokens) for sample in found}) == count
    tokens, mask, segments = np.zeros((count, 24), np.int32), np.zeros((count, 24), np.float32), np.zeros((count, 24), np.int32)
    for n, sample in enumerate(found):
        request = requests[n // num_samples]
        whole = np.concatenate([request.tokens, sample.tokens])
        tokens[n, : len(whole)], mask[n, len(request.tokens) : len(whole)], segments[n, : len(whole)] = whole, 1, 1
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    scores = scoring.score(model, params, Batch(*map(jnp.asarray, (tokens, mask, positions, segments))))
    for row, counted, sample in zip(scores.logps, mask, found, strict=True):
        np.testing.assert_allclose(sample.logps, np.asarray(row)[counted > 0], atol=1e-5)


def test_a_greedy_row_beside_drawn_ones_is_greedy(key):
    model, params = tiny()
    rows = prompts(2, 5)
    drawn = Request(rows[1], 9, sampling=DRAWN, key=key)
    found = engine().generate(params, [Request(rows[0], 12), drawn])
    assert found[0].tokens.tolist() == complete(model, params, rows).tokens[0].tolist()
    assert not found[0].behavior_logps.any() and found[1].behavior_logps.all()


def test_any_method_is_generated_with_unmerged(key):
    model, params = tiny()
    lora = peft.lora("all-linear", rank=4, alpha=64)
    method = peft.chain(quant.int8("all-linear"), lora, peft.prefix_tuning(3), peft.prompt_tuning(4))
    frozen, trainable = method.init(key, params)
    attached = method.attach(frozen, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), trainable))
    rows = prompts(3, 6)
    found = engine(slots=2).generate(attached, [Request(row, 12) for row in rows])
    expected = complete(model, attached, rows)
    assert tokens(found) == expected.tokens.tolist() != complete(model, params, rows).tokens.tolist()
    np.testing.assert_allclose(np.stack([sample.logps for sample in found]), expected.logps, atol=1e-4)


def test_each_request_has_its_adapter(key):
    model, params = tiny()
    method, adapters = peft.lora("all-linear", rank=4, alpha=64), {}
    for n, name in enumerate("ab"):
        frozen, start = method.init(jax.random.key(n), params)
        adapters[name] = method.attach(frozen, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape), start))
    rows, chosen = prompts(5, 4), [1, -1, 0, 0, 1]
    stacked = peft.stack_adapters(params, adapters)
    found = engine(slots=2).generate(stacked, [Request(row, 8, adapter=at) for row, at in zip(rows, chosen, strict=True)])
    for row, at, sample in zip(rows, chosen, found, strict=True):
        alone = complete(model, (*adapters.values(), params)[at], [row])
        assert sample.tokens.tolist() == alone.tokens[0, :8].tolist()


@pytest.mark.parametrize("given", [prompts(6, 3), with_stem(18, 6)], ids=["prompts", "prompts that begin alike"])
def test_eight_devices_write_what_one_writes(given, key):
    model, params = tiny()
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    requests = [Request(row, 3 + 3 * (n % 4), sampling=DRAWN, key=jax.random.fold_in(key, n)[None]) for n, row in enumerate(given)]
    spread = rollout.Engine(sharding.on_mesh(model, mesh), **{**SIZE, "slots": 4})
    placed = sharding.place(jax.tree.map(np.asarray, params), mesh)
    found = spread.generate(placed, requests)
    for one, other in zip(found, engine(shared_stem=False).generate(params, requests), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
    before = [program._cache_size() for program in (programs.join, programs.write)]
    assert tokens(spread.generate(placed, requests)) == tokens(found)
    assert [program._cache_size() for program in (programs.join, programs.write)] == before


METHODS = {
    "NF4 and LoRA": peft.chain(quant.nf4("all-linear", group=16), peft.lora("all-linear", rank=2, alpha=16)),
    "prefix tuning": peft.prefix_tuning(3),
}


@pytest.mark.parametrize(("method", "family"), [("NF4 and LoRA", "llama"), ("prefix tuning", "llama"), ("NF4 and LoRA", "gemma3")])
def test_eight_devices_write_with_any_method_what_one_writes(method, family, key):
    """Packed matrices, what stands before every row, and windows."""
    model, params = tiny(family)
    frozen, start = METHODS[method].init(key, params)
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape, x.dtype), start)
    mesh, attach = sharding.make_mesh(data=2, fsdp=2, tensor=2), METHODS[method].attach
    spread = rollout.Engine(sharding.on_mesh(model, mesh), **{**SIZE, "slots": 4})
    placed = (sharding.place(jax.tree.map(np.asarray, part), mesh) for part in (frozen, moved))
    wanted = engine(family).generate(attach(frozen, moved), asked(key, 4))
    for one, other in zip(spread.generate(attach(*placed), asked(key, 4)), wanted, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
    assert tokens(engine(family).generate(params, asked(key, 4))) != tokens(wanted)


@pytest.mark.parametrize(("slots", "parts"), [(4, (4, 2)), (3, (1, 2))])
def test_a_mesh_splits_the_cache_over_rows_and_heads(slots, parts, key):
    model, params = tiny()
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    form = form_of(asked(key, 1), ())
    placed = sharding.place(jax.tree.map(np.asarray, params), mesh)
    cache = programs.empty(sharding.on_mesh(model, mesh), placed, form.settings([], slots), num_columns=32, mesh=mesh).cache
    layers, rows, heads, *rest = cache.k.shape
    assert cache.k.sharding.shard_shape(cache.k.shape) == (layers, rows // parts[0], heads // parts[1], *rest)
    assert cache.v.sharding == cache.k.sharding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": []}, "request 2 of 2: the prompt is empty"),
        ({"max_tokens": 0}, "max_tokens is at least 1, not 0"),
        ({"max_tokens": 47}, "2 tokens and max_tokens 47 exceed the 48 of a slot"),
        ({"min_tokens": 4}, "min_tokens is from 0 to max_tokens 3, not 4"),
        ({"grammar": Grammar([{7: 0}], 7)}, r"its grammar ends by token 7, which ends no completion: pass eos_id=one of \(.*\) to it"),
        ({"num_samples": 0}, "num_samples is at least 1"),
        ({"sampling": DRAWN}, "needs a key"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"the key is one, or 1 of them, not \(3,\)"),
        ({"stop": ["x"]}, "need an engine with a tokenizer"),
        ({"stop": "x"}, "stop is a tuple of texts that are not empty.*, not 'x'"),
        ({"stop": ("x", "")}, "stop is a tuple of texts that are not empty"),
        ({"tokens": [1, 260]}, r"token \[260\] is none of the model's 260"),
        ({"tokens": [-1]}, r"token \[-1\] is none of the model's 260"),
        ({"key": jax.random.PRNGKey(0)}, r"of the old kind; make it by jax\.random\.key"),
        ({"adapter": 0}, "the parameters are not those of peft.stack_adapters"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_request_that_cannot_be_answered_is_named(options, message):
    wrong = Request(**{"tokens": [1, 2], "max_tokens": 3, **options})
    with pytest.raises(ValueError, match=message):
        engine().generate(tiny()[1], [Request([1], 1), wrong])


def test_an_adapter_that_is_none_of_those_in_the_parameters_is_named(key):
    model, params = tiny()
    method = peft.lora("all-linear", rank=2)
    stacked = peft.stack_adapters(params, {name: method.attach(*method.init(key, params)) for name in "ab"})
    assert engine().generate(stacked, [Request([1], 1, adapter=1)])
    for adapter in (2, -2):
        with pytest.raises(ValueError, match=f"request 1 of 1: its adapter is from -1, none, to 1, not {adapter}"):
            engine().generate(stacked, [Request([1], 1, adapter=adapter)])


@pytest.mark.parametrize("name, least", [("slots", 1), ("block", 1), ("read_tokens", 1), ("patience", 0)])
def test_an_engine_that_could_write_nothing_is_refused(name, least):
    with pytest.raises(ValueError, match=f"engine: {name} is at least {least}, not {least - 1}"):
        engine(**{name: least - 1})


def test_what_is_longer_than_the_models_context_is_named():
    wide = dataclasses.replace(engine(), slot_tokens=2048)
    context = wide.model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"request 1 of 1: 2 tokens and max_tokens {context - 1:,} exceed the {context:,} of the model's"):
        wide.generate(tiny()[1], [Request([1, 2], context - 1)])


def test_no_requests_give_no_samples_and_dropout_is_refused(key):
    model, params = tiny()
    assert engine().generate(params, []) == []
    method = peft.lora("all-linear", rank=4, dropout=0.5)
    with pytest.raises(ValueError, match="without a key"):
        engine().generate(method.attach(*method.init(key, params), key=key), [Request([1], 1)])
