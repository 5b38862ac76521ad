"""`ftjax eval`: means over all tokens, exact match with its interval, a table and a JSON file."""

import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import data
from ftjax.cli import eval as evaluation
from ftjax.cli.main import main
from ftjax.hf.tokenizer import byte_tokenizer

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"


@pytest.fixture
def run(base, compiled):
    def command(*arguments):
        common = [f"--compile_cache={compiled}", "--max_tokens=3", "--dtype=float32", "--row_tokens=64"]
        return main(["eval", f"--model={base.folder}", *common, *arguments])

    return command


def test_loss_and_accuracy_are_those_of_each_answer_by_itself(base, run, tmp_path, capsys):
    _, model, params = base
    rows = [{"prompt": "a", "completion": "bcd"}, {"prompt": "ef", "completion": "g"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(f"--data={tmp_path}/d.jsonl", f"--output={tmp_path}/r.json") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    encoder = data.make_encoder(byte_tokenizer(), max_tokens=64)
    losses, hits = [], []
    for encoded in encoder.encode([data.parse(row)[0] for row in rows]):
        hidden, _ = model.apply(params, jnp.asarray(encoded.tokens[None]))
        logits = model.unembed(model.head(params), hidden)[0, :-1]
        at = np.flatnonzero(encoded.loss_mask[1:])
        logps = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        losses += (-logps[at, encoded.tokens[1:][at]]).tolist()
        hits += (np.asarray(jnp.argmax(logits, axis=-1))[at] == encoded.tokens[1:][at]).tolist()
    assert found["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert found["token_accuracy"] == pytest.approx(np.mean(hits), abs=1e-6)
    assert found["exact_match"]["n"] == 2
    assert "2 answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "completions", "metric", "right"),
    [
        ([("a", "yes"), ("b", "no")], ["yes", "maybe"], "exact_match", 1),
        ([("a", "1 + 1 is #### 2"), ("b", "#### 3"), ("c", "#### 4")], ["so 2", "it is 3.", "5"], "numeric_match", 2),
    ],
)
def test_right_answers_are_counted(rows, completions, metric, right, run, tmp_path, monkeypatch):
    text = "\n".join(json.dumps({"question": question, "answer": answer}) for question, answer in rows)
    (tmp_path / "d.jsonl").write_text(text)
    monkeypatch.setattr(evaluation.measure.rollout, "generate_text", lambda *_, **__: completions)
    assert run(f"--data={tmp_path}/d.jsonl", f"--output={tmp_path}/r.json") == 0
    found = json.loads((tmp_path / "r.json").read_text())[metric]
    assert (found["right"], found["n"]) == (right, len(rows))
    assert found["share"] == right / len(rows)
    assert found["low"] < found["share"] < found["high"]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("none", ["<|im_end|>"]),
        ("chatml", ["<|im_end|>"]),
        ("{{ messages[0]['content'] }}|{{ messages[-1]['content'] }}<|pad|>", ["<|im_end|>", "<|pad|>"]),
    ],
)
def test_an_answer_ends_where_the_template_of_the_encoder_ends_it(template, ends, base, monkeypatch):
    _, model, params = base
    tokenizer, found = byte_tokenizer(), []
    encoder = data.make_encoder(tokenizer, max_tokens=64, template=template)

    def engine(_, eos_ids, **__):
        found.append(eos_ids)
        return types.SimpleNamespace(generate=lambda *_: [])

    monkeypatch.setattr("ftjax.rollout.text.Engine", engine)
    monkeypatch.setattr("ftjax.cli.measure.MATCHES", {"exact_match": lambda *_, **__: []})
    examples = data.parse({"prompt": "a", "completion": "b"})
    evaluation.measure.answer(model, params, encoder, examples, max_tokens=2, batch_size=1)
    assert {tokenizer.decode([end]) for end in found[0] if end >= 256} == set(ends)


@pytest.mark.parametrize("name", ["distill_smollm2", "grpo_smollm2_sums"])
def test_a_config_names_model_and_data_and_neither_its_teacher_nor_its_rewards_are_asked(name, compiled, tmp_path):
    arguments = [
        "eval",
        f"--config={CONFIG.with_name(name + '.py')}:smoke",
        "--examples=0",
        "--batches=1",
        f"--compile_cache={compiled}",
        f"--output={tmp_path}/r.json",
    ]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert "random" in found["model"] and found["tokens"] > 0 and "exact_match" not in found


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055), (0, 0, 0.0, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_is_wilsons(right, n, low, high):
    # The last is Newcombe's example (1998, Statistics in Medicine 17, table I): 81 of 263.
    assert evaluation.measure.wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, "give either --data=PATH or --config=FILE"),
        (["--data=nowhere.jsonl"], 1, "no file or folder 'nowhere.jsonl'"),
        (["--data=tasks:sort", "--metric=exact"], 2, "metric"),
        (["--dat=x"], 2, "Did you mean: data"),
        (["--data=tasks:sort", "--examples=-1"], 2, "examples"),
        (["--data=tasks:sort", "--output=gs://b/r.json"], 1, "--output: gs://b/r.json is not on this machine"),
        (["--data=tasks:sort", "--adapter=gs://b/run"], 1, "--adapter: gs://b/run is not on this machine"),
        ([f"--config={CONFIG}:smoke", "--dtype=float32", "--split=test"], 1, "--dtype, --split: with --config"),
        ([f"--config={CONFIG}:smoke", "--row_tokens=8"], 1, "--row_tokens: with --config"),
        ([f"--config={CONFIG}:smoke", "--quantize=nf4", "--implementation=tpu"], 1, "--quantize, --implementation: with --config"),
        ([f"--config={CONFIG}:smoke", "--template_variables={}"], 1, "--template_variables: with --config"),
        (["--data=tasks:sort", "--template_variables=[1]"], 1, "--template_variables: a JSON object is expected, not '[1]'"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments, code, message, capsys):
    assert main(["eval", *arguments]) == code
    assert message in capsys.readouterr().err
