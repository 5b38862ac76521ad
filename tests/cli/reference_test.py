"""What the reference says of every response is asked once, kept on disk, and equal to what it would say in every step."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import losses, peft, scoring, tree
from ftjax.cli import abstract, build, main, objective, reference
from ftjax.cli import config as configs
from ftjax.data.corpus import Sequences
from ftjax.data.loader import make_loader
from ftjax.logs.writers import read_jsonl
from tests import toy

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "dpo_smollm2_hh.py") + ":smoke"
SCORE = jax.jit(partial(scoring.score, toy.MODEL, chunk_tokens=8, outputs=("logps",)))


@pytest.fixture(scope="module")
def sequences():
    """Fourteen responses, the prompts of two each alike."""
    draw, tokens, masks = np.random.default_rng(0), [], []
    for _ in range(7):
        prompt = draw.integers(0, toy.VOCAB, draw.integers(1, 5))
        for _ in range(2):
            answer = draw.integers(0, toy.VOCAB, draw.integers(1, 6))
            tokens.append(np.concatenate([prompt, answer]).astype(np.int32))
            masks.append(np.concatenate([0 * prompt, 0 * answer + 1]).astype(np.uint8))
    return Sequences(np.concatenate(tokens), np.concatenate(masks), np.cumsum([0, *map(len, tokens)]))


@pytest.fixture(scope="module")
def params():
    return toy.init(jax.random.key(0))


@pytest.fixture
def asked(params, monkeypatch):
    """The reference, which counts the batches that it is asked about; a file holds few responses."""
    monkeypatch.setattr(reference, "PART_TOKENS", 30)
    batches = []

    def look(batch):
        batches.append(batch)
        return SCORE(params, jax.tree.map(jnp.asarray, batch)).logps

    return reference.Asked(look, reference.fingerprint(toy.MODEL, params), rows=2, width=12), batches


@pytest.mark.parametrize(("packing", "rows"), [("none", 4), ("best_fit", 2), ("shared", 2)])
def test_what_was_asked_once_is_what_would_be_said_in_every_step(packing, rows, sequences, params, asked, tmp_path):
    said = reference.recall(sequences, tmp_path, asked[0], say=lambda text: None)
    options = {"batch_size": rows, "max_tokens": 12, "packing": packing, "buckets": 1, "responses": 2}
    loader = make_loader(sequences, **options).knowing(reference_logps=said)
    for batch in loader.epoch():
        live = losses.with_reference(batch, SCORE(params, jax.tree.map(jnp.asarray, batch)))
        np.testing.assert_allclose(batch.reference_logps, live.reference_logps, atol=1e-5, rtol=0)
        assert np.abs(batch.reference_logps).max() > 1 and not batch.reference_logps[batch.loss_mask == 0].any()


def test_it_is_asked_once_and_anew_for_another_model_or_other_data(sequences, asked, tmp_path):
    (one, batches), said = asked, []
    ask = partial(reference.recall, folder=tmp_path, say=said.append)
    first, count = ask(sequences, asked=one), len(batches)
    np.testing.assert_array_equal(ask(sequences, asked=one), first)
    assert len(batches) == count and "read from" in said[-1]
    other = Sequences(sequences.tokens, sequences.loss_mask, sequences.starts)._replace(tokens=(sequences.tokens + 1) % toy.VOCAB)
    assert not np.array_equal(ask(other, asked=one), first)
    ask(sequences, asked=one._replace(fingerprint="another"))
    assert len(batches) == 3 * count and "of another model (0) or of other data (1)" in said[3]
    assert "of another model (2) or of other data (0)" in said[5]


def test_a_pass_that_was_stopped_goes_on_where_it_was(sequences, asked, tmp_path):
    (one, batches), said = asked, []
    whole, count = reference.recall(sequences, tmp_path / "whole", one, say=said.append), len(batches)
    stopped = iter(("", "", "SIGTERM", "SIGTERM"))
    ask = partial(reference.recall, sequences, tmp_path, one, say=said.append)
    assert ask(stopped=lambda: next(stopped)) is None and "SIGTERM: the reference has spoken of" in said[-1]
    assert not list(tmp_path.glob("*/manifest.json")) and len(list(tmp_path.glob("*/*.npy"))) == 2
    np.testing.assert_array_equal(ask(), whole)
    assert len(batches) == 2 * count and "goes on with 14 responses" in said[-2]


def test_what_was_changed_on_disk_is_refused_by_name(sequences, asked, tmp_path):
    reference.recall(sequences, tmp_path, asked[0], say=lambda text: None)
    (path,) = tmp_path.glob("*/00001.npy")
    changed = bytearray(path.read_bytes())
    changed[-2] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(ValueError, match=r"00001.npy was changed.*Remove .*, and the reference is asked again"):
        reference.recall(sequences, tmp_path, asked[0])


def test_the_fingerprint_is_that_of_every_number_and_of_the_architecture(params):
    one = reference.fingerprint(toy.MODEL, params)
    assert reference.fingerprint(toy.MODEL, jax.tree.map(jnp.copy, params)) == one
    last = jax.tree.leaves(params)[-1]
    moved = jax.tree.map(lambda x: x.at[-1].add(1e-6) if x is last else x, params)
    assert len({one, reference.fingerprint(toy.MODEL, moved), reference.fingerprint(toy.MODEL._replace(config="other"), params)}) == 3


@pytest.mark.filterwarnings("ignore:.*persistent compilation cache.*")
def test_a_run_in_full_begins_at_log_2_and_the_next_does_not_ask(tmp_path, compiled, capsys):
    command = ["train", f"--config={CONFIG}", f"--compile_cache={compiled}", "--config.methods=full", "--config.eval.every_steps=0"]
    command += ["--config.checkpoint.every_steps=0", "--config.logging.tensorboard=False", "--config.steps=2"]
    once = ["--config.reference.logps=cached", f"--config.reference.folder={tmp_path / 'shared'}"]
    for name in ("first", "again"):
        assert main.main([*command, *once, f"--workdir={tmp_path / name}"]) == 0
        first, second = (row["train/loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl") if "train/loss" in row)
        assert first == pytest.approx(np.log(2), abs=1e-5) and 1e-6 < abs(second - np.log(2)) < 0.01
        out = capsys.readouterr().out
        assert out.count("is asked once about") == 2 * (name == "first") and out.count("read from") == 2 * (name == "again")
        assert "of other data" not in out  # of what is held out, that is, which is no reason to wonder


def test_what_cannot_be_asked_once_says_so(tmp_path, capsys):
    refused = (("orpo", "cached", "'orpo' has no reference"), ("nash_md", "cached", "'nash_md' has"), ("dpo", "cache", "nearest: 'cached'"))
    for algorithm, word, message in refused:
        more = [f"--config.algorithm={algorithm}", f"--config.reference.logps={word}", f"--workdir={tmp_path}", "--compile_cache=off"]
        assert main.main(["train", f"--config={CONFIG}", *more]) == 1
        assert message in capsys.readouterr().err


def test_several_processes_ask_in_every_step(monkeypatch):
    config = configs.load(CONFIG)
    config.reference.logps = "cached"
    objective.check_reference(config)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="'cached' is not for a run of 2 processes; set it to 'live'"):
        objective.check_reference(config)


def test_full_tuning_needs_no_copy_of_the_model():
    config, frozen = configs.load(CONFIG), {}
    config.methods = ("full",)
    for config.reference.logps in ("live", "cached"):
        frozen[config.reference.logps] = abstract.built(config, build.mesh(config)).frozen
    assert tree.num_bytes(frozen["live"]) == tree.num_bytes(frozen["live"][peft.REFERENCE]) > 0 == tree.num_bytes(frozen["cached"])
