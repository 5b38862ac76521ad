"""A reward model judges completions as it was trained, whatever shares their batch; the best of several is the one it says."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.best_of_n import report
from ftjax import data, peft
from ftjax.cli import critic
from ftjax.cli.main import main
from ftjax.hf import export
from ftjax.hf import peft as hf_peft
from ftjax.hf.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def head(base):
    return {"kernel": jax.random.normal(jax.random.key(3), (base.model.config.hidden_size, 1))}


@pytest.fixture(scope="module")
def folder(base, head, tmp_path_factory):
    """A classifier of one label."""
    folder = tmp_path_factory.mktemp("critic") / "model"
    return export.export_model(folder, base.model, base.params | {"value_head": head}, byte_tokenizer())


def test_a_completion_is_worth_the_value_at_the_end_of_its_conversation(base, head, folder):
    _, model, params = base
    prompts = ["a", [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}], "c" * 30]
    found = critic.load(str(folder), dtype="float32", batch_size=2)(prompts, ["x", "yy", ""])
    encoder, apply = data.make_encoder(byte_tokenizer(), max_tokens=512), jax.jit(model.apply)
    for prompt, completion, reward in zip(prompts[:2], ["x", "yy"], found, strict=False):
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        (encoded,) = encoder.encode([data.Example((*before, {"role": "assistant", "content": completion}))])
        size = len(encoded.tokens)
        hidden, _ = apply(params, jnp.pad(encoded.tokens, (0, 128 - size))[None])
        assert reward == pytest.approx(float(hidden[0, size - 1] @ head["kernel"][:, 0]), abs=1e-5)
    assert len(set(found)) == 3 and np.isfinite(found).all()


def test_an_adapter_with_a_head_is_a_reward_model_and_one_without_is_none(base, head, tmp_path):
    folder, model, params = base
    for name, method in {
        "head": peft.chain(peft.lora(["q_proj"], rank=1), peft.value_head(bias=False)),
        "none": peft.lora(["q_proj"], rank=1),
    }.items():
        _, trained = method.init(jax.random.key(0), params)
        trained |= {"value_head": head} if name == "head" else {}
        hf_peft.save_adapter(tmp_path / name / "adapter", model, trained, method.plan(params), base_name=str(folder))
    assert np.isfinite(critic.load(str(tmp_path / "head"), dtype="float32")(["a"], ["b"])[0])
    with pytest.raises(ValueError, match="is no reward model: it has no value head"):
        critic.load(str(tmp_path / "none"))


def test_what_a_run_trained_reads_conversations_as_the_run_did(base, head, tmp_path):
    folder, model, params = base
    method = peft.chain(peft.lora(["q_proj"], rank=1), peft.value_head(bias=False))
    trained = method.init(jax.random.key(0), params)[1] | {"value_head": head}
    hf_peft.save_adapter(tmp_path / "adapter", model, trained, method.plan(params), base_name=str(folder))
    found = {}
    for template in ("none", "chatml"):
        stored = {"methods": ["lora", "value_head"], "data": {"template": template, "template_variables": None}}
        (tmp_path / "config.json").write_text(json.dumps(stored))
        found[template] = critic.load(str(tmp_path), dtype="float32")(["ab"], ["c"])[0]
    expected = jax.jit(model.apply)(params, jnp.pad(jnp.array([*b"abc", byte_tokenizer().eos_token_id]), (0, 124))[None])[0][0, 3]
    assert found["none"] == pytest.approx(float(expected @ head["kernel"][:, 0]), abs=1e-5) and found["chatml"] != found["none"]


def test_the_best_of_several_completions_is_kept(base, folder, compiled, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\nand another\n")
    common = [f"--model={base.folder}", f"--compile_cache={compiled}", "--max_tokens=12", "--dtype=float32", "--temperature=1"]
    output = tmp_path / "out.jsonl"
    assert main(["generate", *common, f"--prompts={tmp_path}/prompts.txt", "--best_of=3", f"--reward={folder}", f"--output={output}"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "and another"]
    for row in rows:
        assert len(set(row["rewards"])) == 3 and row["reward"] == max(row["rewards"])
    again = critic.load(str(folder), dtype="float32")([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert again == pytest.approx([row["reward"] for row in rows], abs=1e-5)


WRONG = {
    ("--prompt=a", "--best_of=2"): "add --reward=FOLDER",
    ("--prompt=a", "--best_of=2", "--reward=x"): "at temperature 0 all --best_of completions are the same",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_choice_that_nobody_makes_is_refused(flags, capsys):
    assert main(["generate", *flags]) == 1
    assert WRONG[flags] in capsys.readouterr().err


def test_the_expected_best_of_k_is_the_mean_over_all_choices_of_k():
    rewards = [0.5, -1.0, 2.0, 0.25, 0.5]
    for k in range(1, 6):
        expected = np.mean([max(chosen) for chosen in itertools.combinations(rewards, k)])
        assert report.expected_best(rewards, k) == pytest.approx(expected)
    assert report.kl_bound(1) == 0 and report.kl_bound(4) == pytest.approx(np.log(4) - 0.75)
