"""A run over a quantised base: it resumes, its adapter finds that base again, and it is merged into the dense one or quantised anew."""

import dataclasses
import tracemalloc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from ftjax import models, peft, quant, tree, weights
from ftjax.cli import build, main, pretrained
from ftjax.cli import export as cli_export
from ftjax.hf import export, load
from ftjax.hf.lazy import LazyTensor
from ftjax.hf.tokenizer import byte_tokenizer
from ftjax.logs.writers import read_jsonl
from ftjax.quant.permuted import PermutedWeight

UP = "layers/mlp/up_proj/kernel"
FIELDS = (
    *("--config.methods=('nf4','lora')", "--config.nf4.targets=('up_proj',)", "--config.lora.targets=('up_proj',)"),  # quick to compile
    *("--config.lora.dropout=0.0", "--config.data.accumulation=1", "--config.optimizer.learning_rate=0.05"),
    *("--config.model.random=False", "--config.tokenizer="),
)


@pytest.fixture(scope="module")
def run(arguments, base, tmp_path_factory):
    """The workdir of four steps of QLoRA over a folder."""
    workdir = tmp_path_factory.mktemp("qlora") / "run"
    assert main.main(command(arguments, base, workdir)) == 0
    return workdir


def command(arguments, base, workdir, *more):
    return arguments(workdir, *FIELDS, f"--config.model.name={base.folder}", "--config.steps=4", "--config.logging.every_steps=1", *more)


def loaded(base, run, quantize="auto"):
    flags = SimpleNamespace(model=str(base.folder), adapter=[str(run)], dtype="float32", quantize=quantize, implementation="")
    return pretrained.load(flags)


def test_a_run_over_a_packed_base_resumes_bit_for_bit(run, arguments, base, tmp_path, capsys):
    assert main.main(command(arguments, base, tmp_path, "--config.steps=2")) == 0
    assert "nf4 " in capsys.readouterr().out
    assert main.main(command(arguments, base, tmp_path)) == 0
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, tmp_path))
    assert all(np.array_equal(one[name], two[name]) for name in one) and any(np.any(one[name]) for name in one if "lora_B" in name)
    losses = [[row["train/loss"] for row in read_jsonl(folder / "metrics.jsonl") if "train/loss" in row] for folder in (run, tmp_path)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_run_over_a_base_laid_out_for_hopper_learns_the_same(arguments, base, tmp_path, monkeypatch, capsys):
    """On a CPU both layouts are multiplied by the reference, in programs that JAX 0.10.2 rounds differently in the last bits."""
    model = models.build(dataclasses.replace(models.preset("tiny-llama"), hidden_size=64, intermediate_size=64))
    wide = tmp_path / "wide"
    export.export_model(wide, model, jax.jit(model.init)(jax.random.key(1)), byte_tokenizer())
    base, field, seen = base._replace(folder=wide), "--config.nf4.group=32", []
    assert main.main(command(arguments, base, tmp_path / "rows", field)) == 0

    def laid_out(params, mesh):
        assert mesh.size == 1
        laid = quant.for_hopper(params)
        seen.extend(leaf for leaf in jax.tree.leaves(laid, is_leaf=lambda leaf: isinstance(leaf, quant.HopperWeight)))
        return laid

    monkeypatch.setattr(quant, "for_device", laid_out)
    assert main.main(command(arguments, base, tmp_path / "outputs", field)) == 0
    assert any(isinstance(leaf, quant.HopperWeight) for leaf in seen)
    assert "1 packed matrices are multiplied by 'reference'" in capsys.readouterr().out
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("rows", "outputs"))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-4)
    assert max(np.abs(one[name]).max() for name in one if "lora_B" in name) > 0.05
    before = loaded(base, tmp_path / "outputs").params
    assert isinstance(tree.flatten(before)[UP].base, quant.HopperWeight)


def test_an_adapter_in_its_workdir_finds_the_base_that_it_was_trained_over(run, base, capsys):
    packed, dense = (weights.materialize(tree.flatten(loaded(base, run, quantize).params)[UP].base) for quantize in ("auto", "none"))
    assert "stored as nf4" in capsys.readouterr().err
    expected = quant.quantize(base.params["layers"]["mlp"]["up_proj"]["kernel"], "nf4", group=16, nested=True)
    np.testing.assert_array_equal(packed, expected.materialize())
    np.testing.assert_array_equal(dense, base.params["layers"]["mlp"]["up_proj"]["kernel"])


def test_a_run_is_merged_into_the_dense_base(run, base, tmp_path, capsys):
    assert main.main(["export", f"--workdir={run}", f"--output={tmp_path / 'merged'}"]) == 0
    assert main.main(["export", f"--model={base.folder}", f"--adapter={run / 'adapter'}", f"--output={tmp_path / 'same'}"]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "same"))
    assert all(np.array_equal(one[name], two[name]) for name in two) and one.keys() == two.keys()
    assert main.main(["export", f"--model={base.folder}", "--quantized", f"--output={tmp_path / 'none'}"]) == 1
    assert "trained over a quantised base" in capsys.readouterr().err


def test_a_run_is_merged_into_the_base_quantised_anew(run, base, tmp_path, capsys):
    (tmp_path / "probe.txt").write_text("5 + 7")
    argv = ["merge", f"--workdir={run}", "--quantized", f"--probe={tmp_path / 'probe.txt'}", f"--output={tmp_path / 'packed'}"]
    assert main.main([*argv, "--max_change=1e-9"]) == 1 and "raise --max_change" in capsys.readouterr().err
    assert main.main(argv) == 0 and "changes the logits by" in capsys.readouterr().out
    leaf = tree.flatten(load.load(str(tmp_path / "packed")).params)[UP]
    assert (leaf.format, leaf.group, leaf.nested) == ("nf4", 16, True)
    trained = weights.materialize(tree.flatten(cli_export.trained(run).trained)[UP])
    expected = jax.vmap(lambda w: quant.quantize(w, "nf4", group=16, nested=True).materialize())(trained)
    np.testing.assert_allclose(leaf.materialize(), expected, rtol=1e-5)
    assert jnp.max(jnp.abs(trained - leaf.materialize())) > 1e-3


def test_the_memory_that_quantising_takes_is_that_of_a_few_tensors_whatever_the_depth(tmp_path):
    sizes, peaks = {"hidden_size": 128, "intermediate_size": 16384, "torch_dtype": "bfloat16"}, {}
    for depth in (2, 10):
        model = models.build(models.config_from_hf(models.PRESETS["tiny-llama"] | sizes | {"num_hidden_layers": depth}))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        halves = jax.tree.map(lambda x: LazyTensor(x.shape, x.dtype, lambda at, x=x: np.full(x.shape, 0.5, x.dtype)[at]), shapes)
        export.export_model(tmp_path / f"{depth}", model, halves, byte_tokenizer())
        argv = ["quantize", f"--model={tmp_path / str(depth)}", "--format=nf4", "--layout=bitsandbytes"]
        assert depth > 2 or main.main([*argv, f"--output={tmp_path / 'compiled'}"]) == 0
        tracemalloc.start()
        try:
            assert main.main([*argv, f"--output={tmp_path / f'{depth}-packed'}"]) == 0
            peaks[depth] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    largest, packed = 2 * 128 * 16384, 8 * 3 * 128 * 16384 // 2  # bytes of a dense tensor, and of the codes of eight layers more
    assert peaks[10] - peaks[2] < largest < packed / 5
    assert peaks[2] < 6 * largest


def test_a_matrix_whose_rows_are_sorted_in_the_file_is_its_own_dense_base(monkeypatch):
    """As packed again without a config's quantiser: sorted once, and not twice."""
    base = quant.quantize(jax.random.normal(jax.random.key(0), (1, 64, 8)), "uint4", group=32)
    params = tree.unflatten({UP: PermutedWeight(base, jax.random.permutation(jax.random.key(1), 64)[None])})
    loaded = build.Loaded(None, params, None, "test", False)
    config = ConfigDict({"methods": ("uint4",), "uint4": {"targets": "all-linear", "group": 32}})
    monkeypatch.setattr(build, "model", lambda *args, packed: loaded)
    method = peft.lora(["up_proj"], rank=1)
    attached = method.attach(*method.init(jax.random.key(2), params))
    found = cli_export._over_dense(config, loaded, attached)
    np.testing.assert_array_equal(weights.materialize(tree.flatten(found.params)[UP]), tree.flatten(params)[UP].materialize())
    assert found.packing == {UP: {"format": "uint4", "group": 32, "nested": False}}


@pytest.mark.parametrize(("format", "bits"), [("int4", 5), ("uint4", 6), ("uint8", 10)])
def test_a_model_is_quantised_from_the_command_line(format, bits, base, tmp_path, capsys):
    argv = ["quantize", f"--model={base.folder}", f"--format={format}", "--group=32", "--exclude=.*down_proj/kernel"]
    assert main.main([*argv, f"--output={tmp_path / 'packed'}"]) == 0
    out = capsys.readouterr().out
    assert f"bits {bits}" in out and "MB → " in out
    found = load.load(str(tmp_path / "packed")).params
    options = {"quantizer": quant.METHODS[format](group=32, exclude=".*down_proj/kernel"), "dtype": "float32"}
    jax.tree.map(np.testing.assert_array_equal, found, load.load(str(base.folder), **options).params)
    assert main.main([*argv, "--targets=layers/nothing", f"--output={tmp_path / 'none'}"]) == 1
    assert "matched no leaf; nearest" in capsys.readouterr().err
