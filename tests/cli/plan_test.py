"""`ftjax plan` counts what a run will hold, says whether it fits, and which knob would make it fit; nothing is loaded."""

import functools
import json
import math
import pathlib
import re

import jax
import pytest

from ftjax import logs, models, sharding, tree
from ftjax.cli import abstract, build, footprint, knobs, main, plan, topology
from ftjax.cli import config as configs
from ftjax.hf import load
from ftjax.train import init_state

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py") + ":smoke"


def config_with(fields):
    config = configs.load(CONFIG)
    config.update_from_flattened_dict(dict(fields))
    return config


@functools.cache
def _planned(fields):
    config = config_with(fields)
    return footprint.of(config, build.mesh(config), "cpu")


def planned(**fields):
    """Return the footprint of the smoke config with `block__field=value`."""
    return _planned(tuple((name.replace("__", "."), value) for name, value in fields.items()))


@pytest.fixture(scope="module")
def params():
    """The random model of the smoke config."""
    return jax.jit(models.build(models.preset("tiny-llama")).init)(jax.random.key(0))


@pytest.mark.parametrize("methods", [("int8", "lora_fa"), ("full",)])
def test_what_is_held_adds_up_to_the_bytes_of_real_trees(methods, params, key):
    config = config_with({"methods": methods})
    method = build.method(config)
    frozen, trainable = jax.jit(method.init)(key, params)
    moments = init_state(key, trainable, method, build.optimizer(config)).opt_state
    found = planned(methods=methods)
    assert found.base + found.scales + found.adapter == tree.num_bytes((frozen, trainable))
    assert found.optimizer == tree.num_bytes(moments) and found.batch == 4 * 4 * 4 * 128
    assert (found.scales > 0) == (methods[0] == "int8") and (found.base > 0) == (methods != ("full",))
    assert found.peak == found.held + max(found.moments.values())


@pytest.mark.parametrize(("format", "of_a_group"), [("int4", 1), ("uint4", 2)])
def test_scales_and_zeros_are_counted_apart(format, of_a_group, params):
    packed, dense = planned(methods=(format, "lora")), planned()
    numbers = sum(x.size for path, x in tree.flatten(params).items() if "_proj" in path)
    assert packed.scales == of_a_group * numbers // 16 * 4 and dense.base - packed.base == numbers * 7 // 2 and dense.scales == 0


def test_a_mesh_divides_what_its_rules_split(params):
    config = config_with({"mesh.fsdp": 4})
    mesh = build.mesh(config)
    built = abstract.built(config, mesh)
    placed = jax.tree.leaves(sharding.place(params, mesh))
    assert footprint.device_bytes(built.frozen) == sum(x.addressable_shards[0].data.nbytes for x in placed)
    assert footprint.of(config, mesh, "cpu", built).activations == planned(data__batch_size=1).activations


def test_what_the_backward_pass_needs_shrinks_with_rematerialisation_and_grows_with_rows():
    none, elementwise, full = (planned(model__remat=remat).activations for remat in ("none", "elementwise", "full"))
    assert none > 1.5 * planned().activations > 2 * full and elementwise == planned().activations
    assert planned(data__batch_size=2).activations == pytest.approx(elementwise / 2, rel=0.05)


@pytest.mark.parametrize("methods", [("lora",), ("nf4", "lora")])
def test_a_step_in_bfloat16_takes_what_its_shapes_say(methods):
    """Whatever this JAX's compiler for a CPU does with bfloat16: before 0.12 it keeps in float32 what moves."""
    fields = {"methods": methods, "model.preset": "smollm2-135m", "model.dtype": "bfloat16", "data.max_tokens": 256}
    config = config_with(fields)
    mesh = build.mesh(config)
    built = abstract.built(config, mesh)
    estimate, compiled = footprint.of(config, mesh, "cpu", built), plan.compile_step(built, topology.find("here"))
    assert estimate.peak - estimate.packed == pytest.approx(compiled.peak, rel=0.1)


def test_gradients_are_summed_where_there_are_micro_batches():
    whole, parts = planned(), planned(data__accumulation=4)
    assert parts.gradients == 2 * whole.gradients and parts.carried == whole.gradients
    assert parts.activations == planned(data__batch_size=1).activations


@pytest.fixture
def counted(monkeypatch):
    """A footprint that the fields of a config make up by themselves: the search is looked at, not what it finds."""

    def of(config, mesh, kind, built=None):
        if "nf4" in config.methods and "full" in config.methods:
            raise ValueError("what is trained cannot be packed")
        data, base = config.data, {"none": 64, "int8": 32, "nf4": 16}[next((m for m in config.methods if m in ("int8", "nf4")), "none")]
        rows = data.batch_size * data.max_tokens // (data.accumulation * mesh.shape["data"] * mesh.shape["fsdp"])
        activations = rows * {"none": 4, "elementwise": 2, "full": 1}[config.model.remat] // 64
        return footprint.Footprint(base // mesh.shape["fsdp"], *(0,) * 7, activations, *(0,) * 4)

    monkeypatch.setattr(footprint, "of", of)


def tried(budget, devices=1, **fields):
    where = topology.find("here")
    found = knobs.tried(config_with(fields), where._replace(devices=where.devices[:devices]), budget=budget)
    return [(one.flags.replace("--config.", ""), one.footprint.peak) for one in found]


def test_each_knob_is_turned_until_the_step_fits_and_no_further(counted):
    assert dict(tried(84, **{"data.batch_size": 8})) == {
        "methods=\"('int8','lora')\"": 64,
        "data.accumulation=2": 80,
        "data.batch_size=4": 80,
        "model.remat=full": 80,
        "data.max_tokens=64": 80,
    }


def test_where_no_knob_suffices_those_that_leave_the_data_as_it_is_are_turned_together(counted):
    found = tried(1, **{"data.batch_size": 8})
    assert set(found[-1][0].split()) == {"model.remat=full", "data.accumulation=8", "methods=\"('nf4','lora')\""} and found[-1][1] == 18
    assert dict(found[:-1])["data.batch_size=1"] == 68
    assert not any("methods" in flags for flags, _ in tried(1, **{"methods": ("full",)}) if "nf4" in flags)


def test_several_devices_offer_to_split_the_weights(counted):
    assert ("mesh.data=2 mesh.fsdp=2", 36) in tried(40, devices=4, **{"mesh.data": -1})


def run(capsys, *arguments):
    code = main.main(["plan", f"--config={CONFIG}", "--compile_cache=off", *arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_plan_for_this_machine_compiles_the_step(capsys):
    code, out = run(capsys)
    assert code == 0 and "fits: " in out and "What would make it fit?" not in out
    assert "compiled     for it" in out and "activations kept for backward" in out


def test_a_plan_that_does_not_fit_says_what_would_make_it(capsys, counted):
    code, out = run(capsys, "--topology=gpu:2x0.00000001GB", "--compile=False", "--config.mesh.data=2", "--config.data.batch_size=8")
    assert code == plan.DOES_NOT_FIT and "does not fit" in out and "no compiler for this GPU" in out
    assert "--config.data.accumulation=4" in out and "too much" in out and "Bytes of each device" in out and "2 GPUs" in out


GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


FILES = (*(f"quantized/{kind}" for kind in ("nf4", "int8", "gptq", "gptq_sorted", "awq")), "gguf/qwen3.gguf")


@pytest.mark.parametrize("kind", FILES)
def test_a_plan_has_the_shapes_of_what_its_name_would_load(kind):
    name, fields = str(GOLDENS / kind), {"methods": ("lora",), "lora.targets": ("up_proj",)}
    config = config_with({"model.name": name, "model.random": False, "model.preset": "llama-3-8b", "tokenizer": "bytes", **fields})
    mesh = build.mesh(config)
    built = abstract.built(config, mesh)
    found = load.described(GOLDENS / kind)
    expected = load.load_params(found, models.build(load.config_of(found)), dtype="float32")
    assert jax.tree.structure(built.params) == jax.tree.structure(expected)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), built.params) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    held, own = footprint._frozen(built)  # noqa: SLF001
    assert held["base"] + held["scales"] == tree.num_bytes(expected) and own == 0 and (held["scales"] > 0) == ("gguf" not in kind)
    said = plan.model(config, built)
    assert said.startswith(f"{name}: {logs.parameters(expected):,} parameters") and ("in its files as" in said) == ("gguf" not in kind)


def test_a_plan_of_some_layers_of_a_folder_is_of_them_alone():
    config = config_with({"model.name": str(GOLDENS / "quantized/gptq"), "model.random": False, "model.layers": (1,)})
    assert {leaf.shape[0] for leaf in jax.tree.leaves(build.shapes(config, build.architecture(config)[0])["layers"])} == {1}


def test_a_config_alone_tells_a_dense_model_and_not_how_another_is_packed(tmp_path, capsys):
    raw = json.loads((GOLDENS / "quantized/gptq/config.json").read_text())
    method = raw.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    given = ["--compile=False", "--config.model.random=False", f"--config.model.name={tmp_path}", "--config.lora.targets=('up_proj',)"]
    code, out = run(capsys, *given)
    size = tree.size(jax.eval_shape(models.build(models.config_from_hf(raw)).init, jax.random.key(0)))
    assert code == 0 and f"{tmp_path}:{size:,}parameters,1,024trained" in "".join(out.split())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": method}))
    code, out = run(capsys, *given)
    assert code == 1 and "packed by 'gptq', says its config" in out and "copy them too" in out


@pytest.mark.parametrize(
    ("fields", "name", "note"),
    [
        ({"name": "meta-llama/Some-8B"}, "tiny-llama", "meta-llama/Some-8B is not on this machine, so this is model.preset=tiny-llama"),
        ({"name": "SmolLM2-135M-Instruct"}, "SmolLM2-135M-Instruct", "model.preset=tiny-llama is not asked, for model.name is known"),
        ({"name": "SmolLM2-135M-Instruct", "preset": "smollm2-135m"}, "SmolLM2-135M-Instruct", ""),
        ({"name": str(GOLDENS)}, str(GOLDENS), ""),
        ({"random": True}, "tiny-llama", ""),
    ],
)
def test_a_plan_says_where_its_architecture_comes_from(fields, name, note):
    found, said = plan.origin(config_with({"model.random": False, **{f"model.{field}": value for field, value in fields.items()}}))
    assert found == name and (note in said if note else not said)


def test_a_packaged_model_is_its_preset():
    config = config_with({"model.random": False, "model.name": "smollm2-135m-instruct"})
    assert build.architecture(config)[1].num_hidden_layers == 30


def test_a_step_is_compiled_for_a_slice_of_tpus(capsys):
    """The command of the documentation, on a machine without a TPU."""
    pytest.importorskip("libtpu")
    code, out = run(capsys, "--topology=v5p:2x2x1", "--config.mesh.data=4", "--config.data.max_tokens=64")
    assert code == 0 and "fits: " in out and "on v5p:2x2x1, 4 × TPU v5 with 95.73 GiB each" in out
    assert "Bytes of each device" in out and re.search(r"compiled     for it in \d+ s, \d+\.\d MB: \d+\.\d MB of arguments", out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology=gpu:48"], "'gpu:48GB'"),
        (["--topology=v5q:2x2x1"], "'v5p:2x2x1'"),
        (["--topology=gpu:9x1GB"], "needs 9 devices"),
        (["--config.data.batch_size=3", "--config.data.accumulation=2"], "choose a multiple of 2"),
        (["--config.model.preset=lama-3-8b"], "'llama-3-8b'"),
        (["--config.methods=('lorra',)"], "'lora'"),
        (["--config.methods=lora+bitfit"], "commas between them: nf4,lora"),
        (["--config.methods="], "name at least one"),
    ],
)
def test_errors_name_the_nearest(capsys, arguments, said):
    code, out = run(capsys, "--compile=False", *arguments)
    assert code == 1 and said in out


def test_a_tpu_without_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install libtpu.*gpu:4x96GB"):
        topology.find("v5p:2x2x1")


def test_a_compiler_that_stops_for_want_of_memory_has_said_how_much():
    says = "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) exceeds"
    said = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.60G of 15.75G hbm."
    assert plan.wanted(says) == 20 * 2**30 and plan.wanted(said) == math.floor(20.6 * 2**30) and plan.wanted("INTERNAL: Used 1G") is None


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_65_billion_parameters_are_trained_in_48_gigabytes(optimizer, capsys):
    """QLoRA's claim (arXiv:2305.14314, section 1), by compilation: one v5p chip stands for the GPU."""
    pytest.importorskip("libtpu")
    config = str(pathlib.Path(__file__).parents[2] / "configs" / "qlora_llama3_70b.py")
    shape = {"model.preset": "llama-65b", "lora.rank": 64, "data.batch_size": 1, "data.accumulation": 1, "data.max_tokens": 512}
    fields = [f"--config.{name}={value}" for name, value in (shape | {"optimizer.name": optimizer}).items()]
    assert main.main(["plan", f"--config={config}", "--topology=gpu:48GB", "--compile_cache=off", *fields]) == 0
    assert "compiled     for one v5p chip" in capsys.readouterr().out
