"""What a run trained leaves as a Hugging Face folder, whichever way it is asked for."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ftjax import peft
from ftjax.cli import build, main, merge
from ftjax.cli import config as configs
from ftjax.hf import adapter as hf_adapter
from ftjax.hf import export as hf_export

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py") + ":smoke"


@pytest.fixture(scope="module")
def folders(arguments, tmp_path_factory):
    """A short run, the folder of its base model, and the exports of the run and of base + adapter."""
    root = tmp_path_factory.mktemp("export")
    assert main.main(arguments(root / "run", "--config.optimizer.learning_rate=0.1")) == 0
    config = configs.load(CONFIG)
    base = build.model(config, build.mesh(config))
    hf_export.export_model(root / "base", base.model, base.params, base.tokenizer)
    assert main.main(["export", f"--workdir={root / 'run'}", f"--output={root / 'of_run'}"]) == 0
    assert main.main(["merge", f"--model={root / 'base'}", f"--adapter={root / 'run' / 'adapter'}", f"--output={root / 'merged'}"]) == 0
    assert main.main(["export", f"--model={root / 'base'}", f"--output={root / 'copied'}"]) == 0
    return root


def test_a_run_exports_what_its_adapter_merges_to(folders):
    of_run, merged = load_file(folders / "of_run" / "model.safetensors"), load_file(folders / "merged" / "model.safetensors")
    assert of_run.keys() == merged.keys()
    assert all(np.array_equal(of_run[name], merged[name]) for name in merged)


def test_a_run_on_many_devices_is_exported_on_one(folders, monkeypatch):
    config = folders / "run" / "config.json"
    stored = json.loads(config.read_text())
    monkeypatch.setattr(build, "mesh", lambda config: pytest.fail("the mesh of the training was built"))
    stored["mesh"]["fsdp"] = 1024
    config.write_text(json.dumps(stored))
    assert main.main(["export", f"--workdir={folders / 'run'}", "--step=6", f"--output={folders / 'on_one'}"]) == 0
    assert (folders / "on_one" / "model.safetensors").read_bytes() == (folders / "of_run" / "model.safetensors").read_bytes()


def test_only_the_adapted_matrices_differ_from_the_base(folders):
    base, merged = load_file(folders / "base" / "model.safetensors"), load_file(folders / "merged" / "model.safetensors")
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}


def test_a_model_without_an_adapter_is_exported_as_it_is(folders):
    assert (folders / "copied" / "model.safetensors").read_bytes() == (folders / "base" / "model.safetensors").read_bytes()


STEPS = {"9": "step 9; it has 4, 6", "best": "was evaluated; use --step=last or one of [4, 6]", "first": "not 'first'"}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_is_not_there_is_an_error_that_lists_the_others(step, folders, capsys):
    assert main.main(["export", f"--workdir={folders / 'run'}", f"--step={step}", f"--output={folders / 'none'}"]) == 1
    assert STEPS[step] in capsys.readouterr().err


def test_merging_says_how_much_it_changes_and_refuses_too_much(folders, capsys):
    argv = ["merge", f"--model={folders / 'base'}", f"--adapter={folders / 'run' / 'adapter'}"]
    assert main.main([*argv, f"--output={folders / 'exact'}"]) == 0
    assert "changes the logits by" in capsys.readouterr().out
    assert main.main([*argv, f"--output={folders / 'coarse'}", "--dtype=float16", "--max_change=1e-9"]) == 1
    assert "logits change by" in capsys.readouterr().err and not (folders / "coarse").exists()


@pytest.mark.parametrize("lost, refused", [(0.063, False), (0.065, True)])
def test_a_change_beyond_a_twentieth_is_refused_unless_told(lost, refused, folders, tmp_path, monkeypatch, capsys):
    rounded = merge.rounded

    def coarse(params, dtype):
        return rounded(params, dtype) | {"norm": jax.tree.map(lambda scale: (1 - lost) * scale, params["norm"])}

    monkeypatch.setattr(merge, "rounded", coarse)  # as if the files lost so much of the last norm, and so of every logit
    argv = ["merge", f"--model={folders / 'base'}", f"--adapter={folders / 'run' / 'adapter'}"]
    assert main.main([*argv, f"--output={tmp_path / 'out'}"]) == refused
    assert (tmp_path / "out").exists() != refused
    err = capsys.readouterr().err
    if refused:
        assert "of their standard deviation, the bound is 5.0%" in err and "raise --max_change" in err
        assert main.main([*argv, f"--output={tmp_path / 'out'}", "--max_change=0.06"]) == 0 and (tmp_path / "out").exists()


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_an_adapter_of_its_own_form_is_merged_where_it_is_linear_and_refused_where_not(activation, base, tmp_path, capsys):
    methods = [["bottleneck", {"width": 2, "activation": activation}]]
    trainable = jax.tree.map(jnp.ones_like, peft.bottleneck(**methods[0][1]).init(jax.random.key(0), base.params)[1])
    hf_adapter.save_adapter(tmp_path / "adapter", methods, trainable, base_name=str(base.folder))
    code = main.main(["export", f"--adapter={tmp_path / 'adapter'}", f"--output={tmp_path / 'out'}"])
    if activation == "identity":
        got, was = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base.folder))
        changed = {name for name in was if not np.array_equal(got[name], was[name])}
        assert code == 0 and changed == {name for name in was if name.endswith(("o_proj.weight", "down_proj.weight"))}
    else:
        assert code == 1 and "cannot be merged into one" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_models_are_mixed_from_the_command_line(folders):
    both = f"--models={folders / 'base'},{folders / 'merged'}"
    assert main.main(["merge", both, "--factors=1,3", f"--output={folders / 'mixed'}"]) == 0
    base, merged, mixed = (load_file(folders / name / "model.safetensors") for name in ("base", "merged", "mixed"))
    for name, got in mixed.items():
        np.testing.assert_allclose(got, 0.25 * base[name] + 0.75 * merged[name], rtol=1e-5, atol=1e-6)
    assert (folders / "mixed" / "tokenizer.json").is_file()
    assert main.main(["merge", both, "--recipe=passthrough", "--layers=0:1,0:2", f"--output={folders / 'deep'}"]) == 0
    assert json.loads((folders / "deep" / "config.json").read_text())["num_hidden_layers"] == 3


WRONG = {
    ("export",): "--output=FOLDER is needed",
    ("merge", "--output=x"): "name what to fold in",
    ("export", "--output=x", "--workdir=y", "--model=z"): "by itself",
    ("merge", "--output=x", "--models=a,b", "--adapter=c"): "mixes whole models",
    ("export", "--output=x", "--workdir=nowhere"): "holds no run",
}


@pytest.mark.parametrize("argv", WRONG)
def test_a_command_line_that_cannot_be_meant_says_why(argv, capsys):
    assert main.main(list(argv)) == 1
    assert WRONG[argv] in capsys.readouterr().err
