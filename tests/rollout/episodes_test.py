"""Episodes: what was sampled stays as it was sampled, and neither neighbours nor what an environment does reach beyond it."""

import dataclasses
import functools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import data, rollout, scoring
from ftjax.hf.tokenizer import byte_tokenizer
from ftjax.rollout import Reply, Stage, Turns, opened, play, settings
from ftjax.types import Batch
from tests.rollout.generate_test import tiny

TOKENIZER = byte_tokenizer()
TURNS = Turns(data.make_encoder(TOKENIZER, max_tokens=512))
END = TOKENIZER.eos_token_id
DRAWN = settings(temperature=1.0)


def prompt(text: str, **columns) -> data.Prompt:
    example = data.Example(({"role": "user", "content": text},), columns={"answer": text, **columns})
    return data.Prompt(TURNS.encoder.prompt(example), example)


class Parrot:
    """Says what it heard, so many times."""

    times = 2

    def reset(self, row):
        self.heard = []

    def step(self, completion):
        self.heard.append(completion)
        return Reply(f"{len(self.heard)}:{completion}", 1.0, len(self.heard) > self.times)


class Script:
    """An engine that writes what it is told to, and remembers what it was asked."""

    def __init__(self, *turns):
        self.turns, self.asked = [[*turn, END] if turn[-1] != -1 else list(turn[:-1]) for turn in turns], []

    def generate(self, params, requests):
        tokens = np.asarray(self.turns[len(self.asked)], np.int32)
        self.asked.append(requests)
        logps = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        return [rollout.Sample(tokens, logps, logps, "eos" if tokens[-1] == END else "length") for _ in requests]


def stage(engine, make=Parrot, **options) -> Stage:
    return Stage(engine, TURNS, make, **{"max_tokens": 200, "max_turns": 4, **options})


def scripted(engine, **options) -> rollout.Sample:
    (sample,) = play(stage(engine, **options), {}, [prompt("Hi")], jax.random.split(jax.random.key(0), (1, 1)), sampling=DRAWN)
    return sample


def test_the_mask_covers_exactly_what_was_sampled_and_it_is_never_written_again():
    literal = list(b"<|im_end|>")  # which read as text would be one token
    engine = Script(list(b"one"), literal, list(b"3"))
    sample = scripted(engine)
    said = [TURNS.tokens(data.Example(), [{"role": "user", "content": text}], ended=True) for text in ("1:one", "2:")]
    expected = [*b"one", END, *said[0], *literal, END, *said[1], *b"3", END]
    assert sample.tokens.tolist() == expected and sample.reason == "eos" and sample.finished
    drawn = [1] * 4 + [0] * len(said[0]) + [1] * 11 + [0] * len(said[1]) + [1] * 2
    assert sample.drawn.astype(int).tolist() == drawn
    np.testing.assert_array_equal(sample.logps[sample.drawn], [-1, -2, -3, -4, *range(-1, -12, -1), -1, -2])
    assert not sample.logps[~sample.drawn].any() and not sample.behavior_logps[~sample.drawn].any()
    whole = np.concatenate([prompt("Hi").tokens, sample.tokens])
    asked = [request.tokens for (request,) in engine.asked]
    assert all(whole[: len(tokens)].tolist() == tokens.tolist() for tokens in asked)
    assert [len(tokens) - len(asked[0]) for tokens in asked] == [0, 4 + len(said[0]), 15 + len(said[0]) + len(said[1])]
    roles = [(message["role"], message["content"]) for message in sample.episode.messages]
    assert roles == [
        ("assistant", "one"),
        ("user", "1:one"),
        ("assistant", "<|im_end|>"),
        ("user", "2:<|im_end|>"),
        ("assistant", "3"),
        ("user", "3:3"),
    ]
    assert sample.episode.reward == 3.0


def test_processes_share_the_environments_and_all_have_the_whole_episodes():
    """Two threads stand for two processes: each asks half of the environments, and their engines are asked the same."""
    barrier, told, made = threading.Barrier(2, timeout=30), [None, None], [[], []]

    def gathered(index, value):
        told[index] = json.dumps(value)
        barrier.wait()
        found = [json.loads(part) for part in told]
        barrier.wait()
        return found

    def process(index, found):
        class Mine(Parrot):
            def step(self, completion):
                made[index].append(self)
                return super().step(completion)

        shared = {"part": (index, 2), "gathered": functools.partial(gathered, index)}
        found[index] = episodes(Mine, **shared)

    def episodes(make, **options):
        engine, keys = Script(b"one", b"two", b"3"), jax.random.split(jax.random.key(0), (6, 1))
        prompts = [prompt(f"Hi {number}") for number in range(6)]
        return play(stage(engine, make, **options), {}, prompts, keys, sampling=DRAWN), engine.asked

    found = [None, None]
    threads = [threading.Thread(target=process, args=(index, found)) for index in range(2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    (one, asked), (other, same) = found
    alone, _ = episodes(Parrot)
    for samples in (one, other):
        assert [x.tokens.tolist() for x in samples] == [x.tokens.tolist() for x in alone]
        assert [(x.episode.messages, x.episode.reward) for x in samples] == [(x.episode.messages, x.episode.reward) for x in alone]
    assert [len(set(map(id, mine))) for mine in made] == [3, 3] and [len(mine) for mine in made] == [9, 9]
    assert [[r.tokens.tolist() for r in call] for call in asked] == [[r.tokens.tolist() for r in call] for call in same]


@pytest.mark.parametrize(
    ("options", "reason", "turns"),
    [
        ({"max_turns": 2}, "turns", 2),
        ({"max_turns": 1}, "turns", 1),
        ({"max_turns": 3}, "eos", 3),
        ({"max_tokens": 25}, "length", 1),  # the observation leaves no room
    ],
)
def test_an_episode_that_is_cut_is_unfinished_and_ends_with_what_the_policy_wrote(options, reason, turns):
    sample = scripted(Script(b"one", b"two", b"3"), **options)
    written = sum(message["role"] == "assistant" for message in sample.episode.messages)
    assert (sample.reason, written, sample.episode.reward) == (reason, turns, float(turns))
    assert sample.finished == (reason == "eos") and sample.drawn[-1] and len(sample.tokens) <= options.get("max_tokens", 200)


def test_a_turn_that_is_cut_ends_the_episode_and_is_still_answered():
    sample = scripted(Script(b"one", [*b"tw", -1]))
    assert sample.reason == "length" and sample.tokens[-2:].tolist() == list(b"tw") and sample.episode.reward == 2.0


class Broken:
    """Does what the prompt says."""

    def reset(self, row):
        self.what = row["answer"]
        if self.what == "reset":
            raise OSError("no world")

    def step(self, completion):
        if self.what == "hang":
            threading.Event().wait(30)
        if self.what == "leave":
            raise SystemExit(1)
        answers = {"text": "text", "none": None, "fine": (None, np.float32(2), True)}
        answers |= {"role": Reply([{"role": "boss", "content": ""}]), "nan": Reply(reward=float("nan")), "word": Reply(reward="x")}
        answers |= {"list": Reply([3]), "parts": Reply([{"role": "user", "content": [1]}])}
        return answers[self.what]


def test_an_environment_that_fails_is_named_and_reaches_no_other_episode():
    problems = {
        "reset": "OSError: no world",
        "hang": "TimeoutError: did not return within 1 s",
        "leave": "SystemExit: 1",
        "text": "step returns Reply",
        "none": "step returns Reply",
        "role": "there is no role 'boss'",
        "nan": "a reward is finite",
        "word": "a reward is a number or None, not 'x'",
        "list": "an observation is a text, or messages",
        "parts": "an observation is a text, or messages",
    }
    asked = [prompt(what) for what in (*problems, "fine")]
    keys = jax.random.split(jax.random.key(0), (len(asked), 1))
    *failed, fine = play(stage(Script(b"one"), Broken, seconds=1.0), {}, asked, keys, sampling=DRAWN)
    assert (fine.reason, fine.episode.reward, fine.episode.failure) == ("eos", 2.0, "")
    for problem, sample in zip(problems.values(), failed, strict=True):
        assert sample.episode.failure.startswith(problem) and sample.reason == "failure" and not sample.finished
        assert sample.tokens.tolist() == [*b"one", END] and sample.episode.reward is None


class Opening(Parrot):
    def reset(self, row):
        super().reset(row)
        return row.get("opening")


def test_what_an_environment_says_first_is_part_of_the_prompt_and_must_not_change():
    asked = {"role": "user", "content": "Play."}
    answer = {"role": "assistant", "content": "5"}
    found = opened(data.Example((asked, answer), columns={"opening": "Begin!"}), Opening)
    assert [message["content"] for message in found.messages] == ["Play.\n\nBegin!", "5"]
    system = {"role": "system", "content": "s"}
    assert opened(data.Example((system,), columns={"opening": "Go"}), Opening).messages == (system, {"role": "user", "content": "Go"})
    same = data.Example((asked,))
    assert opened(same, Opening) is same
    keys = jax.random.split(jax.random.key(0), (1, 1))
    ready = data.Prompt(TURNS.encoder.prompt(found), found)
    (sample,) = play(stage(Script(b"1", b"2", b"3"), Opening), {}, [ready], keys, sampling=DRAWN)
    assert sample.finished
    other = ready._replace(example=dataclasses.replace(found, columns={"opening": "Something else"}))
    (sample,) = play(stage(Script(b"1"), Opening), {}, [other], keys, sampling=DRAWN)
    assert "which it did not say to the same row" in sample.episode.failure


# From here on with a model, whose turns end at a third of all bytes so that they have different lengths.
ENDS = (END, *range(0, 256, 3))
ASKED = [prompt(text) for text in ("a", "What is 2 + 3?", "Hello there", "x y")]


def engine(slots=8) -> rollout.Engine:
    return rollout.Engine(tiny()[0], ENDS, slots=slots, slot_tokens=256, read_tokens=256)


def played(prompts, keys, *, make=Parrot, slots=8, **options):
    return play(stage(engine(slots), make, **options), tiny()[1], prompts, keys, sampling=DRAWN)


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(3), (4, 2))


@pytest.fixture(scope="module")
def episodes(keys):
    return played(ASKED, keys)


def test_an_episode_of_one_turn_is_the_sample_without_an_environment_to_the_bit(keys):
    class Once(Parrot):
        times = 0

    requests = [rollout.Request(one.tokens, 200, key=key, num_samples=2, sampling=DRAWN) for one, key in zip(ASKED, keys, strict=True)]
    plain = engine().generate(tiny()[1], requests)
    for sample, other in zip(plain, played(ASKED, keys, make=Once), strict=True):
        for name in ("tokens", "logps", "behavior_logps", "reason"):
            np.testing.assert_array_equal(getattr(sample, name), getattr(other, name))
        assert other.drawn.all() and other.episode.reward == 1.0


def test_the_trainer_says_the_same_of_the_sampled_tokens(episodes):
    model, params = tiny()
    width = 256
    tokens, segments, drawn, said = (np.zeros((8, width), kind) for kind in (np.int32, np.int32, bool, np.float32))
    for row, sample in enumerate(episodes):
        whole = np.concatenate([ASKED[row // 2].tokens, sample.tokens])
        at = slice(len(whole) - len(sample.tokens), len(whole))
        tokens[row, : len(whole)], segments[row, : len(whole)] = whole, 1
        drawn[row, at], said[row, at] = sample.drawn, sample.behavior_logps
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    scores = scoring.score(model, params, Batch(*map(jnp.asarray, (tokens, drawn.astype(np.float32), positions, segments))))
    np.testing.assert_allclose(np.asarray(scores.logps)[drawn], said[drawn], atol=1e-5)
    assert drawn.sum() > 40 and all((~sample.drawn).sum() > 25 for sample in episodes)


def test_order_neighbours_and_slots_change_nothing(keys, episodes):
    def same(found, expected):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
            assert one.episode.messages == other.episode.messages

    same(played(ASKED[::-1], keys[::-1, ::-1]), episodes[::-1])
    same(played(ASKED[1:3], keys[1:3], slots=3), episodes[2:6])


def test_each_turn_draws_with_keys_of_its_own():
    engine = Script(b"one", b"two", b"3")
    scripted(engine)
    first, *later = (jax.random.wrap_key_data(jax.random.key_data(request.key)).reshape(()) for (request,) in engine.asked)
    of_tokens = jax.vmap(jax.random.fold_in, (None, 0))(first, jnp.arange(200))
    every = jax.random.key_data(jnp.concatenate([first[None], of_tokens, *(key[None] for key in later)]))
    assert len(np.unique(np.asarray(every), axis=0)) == 203


def test_more_turns_compile_nothing(keys, episodes):
    programs = rollout.slots
    everything = (programs.read, programs.join, programs.write)
    before = [program._cache_size() for program in everything]
    played(ASKED, keys, max_turns=3)
    assert [program._cache_size() for program in everything] == before
