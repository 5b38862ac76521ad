"""`ftjax eval` of pairs: margins as they are defined, a policy with and without a reference, a reward model, and their intervals."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import data, peft
from ftjax.cli import preferences
from ftjax.cli.main import main
from ftjax.hf import export
from ftjax.hf import peft as hf_peft
from ftjax.hf.tokenizer import byte_tokenizer
from ftjax.types import Batch, Scores

DPO = str(pathlib.Path(__file__).parents[2] / "configs" / "dpo_smollm2_hh.py") + ":smoke"
ROWS = [
    {"prompt": "a", "chosen": "yes", "rejected": "no"},
    {"prompt": "b", "chosen": "c", "rejected": "d" * 9},
    {"prompt": "e", "chosen": "f", "rejected": "f"},
]


@pytest.fixture
def judge(base, compiled, tmp_path):
    """`judge(*flags) -> result` on two pairs and one that is none."""
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def command(*flags):
        output = tmp_path / "result.json"
        common = [
            f"--data={tmp_path}/pairs.jsonl",
            f"--output={output}",
            f"--compile_cache={compiled}",
            "--dtype=float32",
            "--row_tokens=64",
        ]
        assert main(["eval", "--pairs", *common, *flags]) == 0
        return json.loads(output.read_text())

    return command


def total_logps(say, params, row, response):
    """The sum over the response's tokens of what the model says of each, one row at a time, and how many they are."""
    one = data.Example(({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[response]}))
    (encoded,) = data.make_encoder(byte_tokenizer(), max_tokens=64).encode([one])
    at, tokens = np.flatnonzero(encoded.loss_mask), np.zeros((1, 64), np.int32)
    tokens[0, : len(encoded.tokens)] = encoded.tokens
    return np.asarray(say(params, tokens))[at - 1, tokens[0, at]].sum(), len(at)


def test_a_policy_is_judged_by_itself_and_against_the_model_without_its_adapter(base, judge, tmp_path, capsys):
    folder, model, params = base
    method = peft.lora(["q_proj", "v_proj"], rank=2)
    frozen, trained = method.init(jax.random.key(0), params)
    trained = jax.tree.map(lambda x: x + 0.5, trained)
    hf_peft.save_adapter(tmp_path / "adapter", model, trained, method.plan(params), base_name=str(folder))
    found = judge(f"--adapter={tmp_path}/adapter")

    @jax.jit
    def say(params, tokens):
        return jax.nn.log_softmax(model.unembed(model.head(params), model.apply(params, tokens)[0])[0], axis=-1)

    expected = {"log-probability": [], "per token": [], "implicit reward": []}
    for row in ROWS[:2]:
        said = {}
        for name, tree in (("policy", method.attach(frozen, trained)), ("reference", params)):
            said[name] = [total_logps(say, tree, row, response) for response in ("chosen", "rejected")]
        (chosen, c), (rejected, r) = said["policy"]
        expected["log-probability"].append(chosen - rejected)
        expected["per token"].append(chosen / c - rejected / r)
        expected["implicit reward"].append(chosen - rejected - said["reference"][0][0] + said["reference"][1][0])
    assert found["preference"].keys() == expected.keys() and found["left_out"] == 1
    for name, margins in expected.items():
        one = found["preference"][name]
        assert one["margin"] == pytest.approx(np.mean(margins), abs=1e-4) and one["n"] == 2
        assert one["right"] == sum(margin > 0 for margin in margins) and one["low"] < one["share"] < one["high"]
    assert "1 left out" in capsys.readouterr().out


def test_a_reward_model_is_judged_by_its_rewards(base, judge, tmp_path):
    _, model, params = base
    head = {"kernel": jax.random.normal(jax.random.key(3), (model.config.hidden_size, 1))}
    export.export_model(tmp_path / "critic", model, params | {"value_head": head}, byte_tokenizer())
    found = judge(f"--model={tmp_path}/critic")["preference"]
    assert found.keys() == {"reward"} and found["reward"]["n"] == 2 and found["reward"]["margin"] != 0
    flipped = params | {"value_head": jax.tree.map(jnp.negative, head)}
    export.export_model(tmp_path / "contrary", model, flipped, byte_tokenizer())
    other = judge(f"--model={tmp_path}/contrary")["preference"]["reward"]
    assert other["margin"] == pytest.approx(-found["reward"]["margin"]) and other["right"] == 2 - found["reward"]["right"]


def test_a_policy_that_is_its_reference_is_right_by_half(base, judge):
    found = judge(f"--model={base.folder}", f"--reference={base.folder}")["preference"]
    assert found["implicit reward"]["share"] == 0.5 and found["implicit reward"]["margin"] == 0
    assert found["log-probability"]["margin"] != 0


def test_a_config_of_pairs_names_model_and_data(compiled, tmp_path):
    arguments = [f"--config={DPO}", "--batches=1", f"--compile_cache={compiled}", f"--output={tmp_path}/r.json"]
    assert main(["eval", *arguments]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["preference"].keys() == {"log-probability", "per token"} and found["preference"]["per token"]["n"] == 4


def test_margins_by_hand():
    """Chosen tokens are worth -1 and -2, rejected ones -1 alone: 3 less in sum by 2, and 1.5 a token against 1; the anchor adds 4."""
    mask = jnp.array([[[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]])
    ids = mask.astype(jnp.int32)
    logps, anchor = jnp.array([[[0.0, -1.0, -2.0], [0.0, -1.0, 0.0]]]), jnp.array([[[0.0, -3.0, -4.0], [0.0, -1.0, 0.0]]])
    found = preferences.margins(Scores(logps), Batch(ids, mask, ids, ids), Scores(anchor))
    assert {name: float(value[0]) for name, value in found.items()} == {"implicit reward": 4.0, "log-probability": -2.0, "per token": -0.5}


WRONG = {
    ("--data=x.jsonl", "--reference=y"): "--reference is for pairs",
    ("--data=x.jsonl", "--pairs", "--metric=exact_match"): "--metric: pairs are read",
    (f"--config={DPO}", "--examples=3"): "--examples: pairs are read",
    (f"--config={DPO.replace('dpo', 'kto')}", "--pairs"): "the config's 'kto' has no pairs held out",
}


@pytest.mark.parametrize("flags", WRONG)
def test_flags_that_do_not_belong_together_are_named(flags, capsys):
    assert main(["eval", *flags]) == 1
    assert WRONG[flags] in capsys.readouterr().err
