"""LoRAs in folders become one on the command line: what `peft.combine` makes of them, in a folder that PEFT reads."""

import json

import jax
import numpy as np
import pytest

from ftjax import peft, tree, weights
from ftjax.cli.main import main
from ftjax.hf import adapter as hf_adapter
from ftjax.hf import peft as hf_peft

FACTORS = [0.7, -0.4]
FORMS = {"cat": {}, "ties": {"density": 0.3, "sign": "frequency"}, "dare_linear": {"density": 0.6, "seed": 5}, "svd": {"rank": 2}}


def moved(method, params, seed):
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    return jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), method.init(jax.random.key(seed), params)[1])


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Two LoRAs as trees and, by name, their folders; beside them what no LoRA is."""
    root = tmp_path_factory.mktemp("adapters")
    methods = {"a": peft.lora(["q_proj", "v_proj"], rank=3, alpha=5), "b": peft.lora(["q_proj"], rank=3)}
    others = {"dora": peft.dora(rank=2), "more": peft.chain(peft.lora(rank=2), peft.full("norm/scale"))}
    adapted = {}
    for seed, (name, method) in enumerate((methods | others).items()):
        trainable = moved(method, base.params, seed)
        hf_peft.save_adapter(root / name, base.model, trainable, method.plan(base.params), base_name=str(base.folder))
        adapted[name] = method.attach(method.init(jax.random.key(0), base.params)[0], trainable)
    own = [["bottleneck", {"width": 2}]]
    hf_adapter.save_adapter(root / "own", own, moved(peft.bottleneck(width=2), base.params, 9), base_name=str(base.folder))
    (a,) = (root / "a").glob("adapter_config.json")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / a.name).write_text(json.dumps(json.loads(a.read_text()) | {"base_model_name_or_path": "org/other"}))
    return root, [adapted[name] for name in methods]


@pytest.mark.parametrize("how", FORMS)
def test_adapters_with_names_become_one_folder(how, base, adapters, tmp_path):
    root, adapted = adapters
    options = [f"--{name}={value}" for name, value in FORMS[how].items()]
    given = [f"--adapter={name}={root / name}" for name in "ab"]
    assert main(["merge", *given, f"--how={how}", "--factors=0.7,-0.4", *options, f"--output={tmp_path / 'out'}"]) == 0
    method, trainable = peft.combine(adapted, FACTORS, how=how, **FORMS[how])
    read = hf_peft.load_adapter(tmp_path / "out", base.model)
    got, expected, before = (
        tree.flatten(params)
        for params in (
            read.method.attach(read.join(base.params), read.trainable),
            method.attach(base.params, trainable),
            base.params,
        )
    )
    assert read.base_name == str(base.folder) and (tmp_path / "out" / "tokenizer.json").is_file()
    for path, leaf in expected.items():
        np.testing.assert_allclose(weights.materialize(got[path]), weights.materialize(leaf), atol=1e-6)
    assert {path for path, leaf in got.items() if isinstance(leaf, weights.Weight)} == {p for p in before if "q_proj" in p or "v_proj" in p}


REFUSED = {
    "another method": (["b", "dora"], [], "'dora' holds dora, and LoRAs alone can be combined"),
    "something beside it": (["b", "more"], [], "'more' holds full, lora"),
    "ftjax's own form": (["b", "own"], [], "'own' is in ftjax's own form"),
    "two bases": (["b", "elsewhere"], [], "if that is one model by several names, say which by --model"),
    "ranks and no cut": (["a", "b"], ["--rank=2"], "--rank is for the svd forms of --how, not for 'cat'"),
    "too few factors": (["a", "b"], ["--factors=1"], "2 adapters need as many factors, not 1"),
    "a run beside them": (["a", "b"], ["--workdir=runs/x"], "leave --workdir out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_says_why_and_writes_nothing(case, adapters, tmp_path, capsys):
    (names, options, message), root = REFUSED[case], adapters[0]
    given = [f"--adapter={name}={root / name}" for name in names]
    assert main(["merge", *given, *options, f"--output={tmp_path / 'out'}"]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_export_has_one_adapter(adapters, tmp_path, capsys):
    assert main(["export", f"--adapter=a={adapters[0] / 'a'}", f"--output={tmp_path / 'out'}"]) == 1
    assert "one folder without a name" in capsys.readouterr().err
