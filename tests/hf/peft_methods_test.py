"""Methods beyond LoRA in PEFT's folders: PEFT's numbers from PEFT's files, and ours back bitwise. A method joins by a line in a table."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ftjax import peft, tree, weights
from ftjax.hf import names as hf_names
from ftjax.hf import peft as hf_peft
from ftjax.hf import peft_config
from ftjax.peft.layers import chosen
from tests.hf.conftest import GOLDENS, close, logits

FOLDERS = {"dora": "dora", "dora_layers": "dora", "dora_modules": "dora", "ia3": "ia3", "vera": "vera", "vera_drawn": "vera"} | {
    name: name.partition("_")[0]
    for name in (
        "adalora",
        "boft",
        "hira",
        "loha",
        "lokr",
        "lokr_both",
        "miss",
        "miss_bat",
        "miss_mini",
        "oft",
        "oft_exact",
        "randlora",
        "shira",
    )
}
METHODS = {
    "dora": partial(peft.dora, ["q_proj", "lm_head"], rank=3, alpha=6, rank_pattern={"lm_head": 2}, dropout=0.25),
    "lora_fa": partial(peft.lora_fa, ["q_proj", "embed_tokens"], rank=3, rslora=True),
    "ia3": partial(peft.ia3),
    "ia3 without": partial(peft.ia3, ["q_proj"], feedforward=None),
    "vera": partial(peft.vera, ["q_proj", "down_proj"], rank=5, seed=3),
    "boft": partial(peft.boft, ["q_proj"], block_size=4, factors=2),
    "oft": partial(peft.oft, ["q_proj"], block_size=6),
    "oft shared": partial(peft.oft, ["q_proj", "down_proj"], block_size=4, neumann_terms=4, share=True),
    "randlora": partial(peft.randlora, ["q_proj", "down_proj"], rank=5, bases="sparse"),
    "hira": partial(peft.hira, ["q_proj"], rank=3),
    "loha": partial(peft.loha, ["q_proj", "down_proj"], rank=3, alpha=6.5),
    "lokr": partial(peft.lokr, ["q_proj", "down_proj"], rank=2, alpha=4.0),
    "lokr both": partial(peft.lokr, ["o_proj"], rank=1, decompose_both=True, decompose_factor=4),
    "miss": partial(peft.miss, ["q_proj", "down_proj"], rank=5),
    "miss bat": partial(peft.miss, ["q_proj", "up_proj"], rank=4, form="bat"),
    "miss mini": partial(peft.miss, ["q_proj"], rank=4, form="mini", mini_rank=3),
    "adalora": partial(peft.adalora, ["q_proj", "down_proj"], steps=9, init_rank=4, target_rank=2, alpha=6, final_steps=2, dropout=0.25),
    "shira": partial(peft.shira, ["q_proj", "down_proj"], rank=2, seed=3),
}
LAYERS = {
    "lora": (partial(peft.lora, ["q_proj"], rank=3, layers="last 1"), {"layers_to_transform": [2], "target_modules": ["q_proj"]}),
    "pissa": (partial(peft.lora, ["q_proj"], rank=2, init="pissa", layers=[0, 1]), {"layers_to_transform": [0, 1], "r": 4}),
    "lora_fa": (partial(peft.lora_fa, ["q_proj"], rank=3, layers=[1]), {"layers_to_transform": [1]}),
    "adalora": (partial(peft.adalora, ["q_proj"], steps=9, init_rank=4, target_rank=2, layers=[1]), {"layers_to_transform": [1]}),
    "vera": (partial(peft.vera, ["q_proj"], rank=5, layers=[0, 2]), {"layers_to_transform": [0, 2], "target_modules": ["q_proj"]}),
    "shira": (partial(peft.shira, ["q_proj"], rank=2, layers=[1]), {"target_modules": ["model.layers.1.self_attn.q_proj"]}),
    "dora": (partial(peft.dora, ["q_proj"], rank=2, layers="last 1"), {"layers_to_transform": [2], "target_modules": ["q_proj"]}),
    "ia3": (
        partial(peft.ia3, ["k_proj"], layers="last 1"),
        {"target_modules": ["model.layers.2.self_attn.k_proj"], "feedforward_modules": []},
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_gradients_and_merged_weights_are_those_of_peft(base, name):
    model, params = base
    adapter, golden = hf_peft.load_adapter(GOLDENS / name, model), safetensors.numpy.load_file(GOLDENS / name / "check.safetensors")
    assert adapter.kind == FOLDERS[name]
    frozen = adapter.join(params)

    def loss(trainable):
        got = logits(model, adapter.method.attach(frozen, trainable))
        return jnp.sum(got * golden["G"]), got

    gradient, got = jax.grad(loss, has_aux=True)(adapter.trainable)
    close(got, np.load(GOLDENS / name / "logits.npy"), 1e-5)
    form = peft.FORMATS[adapter.kind]
    theirs = {}
    for row in adapter.method.plan(params):
        flat = tree.flatten(gradient[row.method])
        for path in row.paths:
            arrays = {field: np.asarray(flat[f"{path}/{field}"]) for field in form.tensors if f"{path}/{field}" in flat}
            modules = hf_names.modules(path, tree.flatten(params)[path].shape)
            on = {modules[layer]: place for place, layer in enumerate(row.options.get("layers", range(len(modules))))}
            theirs |= hf_peft.tensors.write_leaf(path, tree.flatten(params)[path].shape, arrays, form, on=on)
    wanted = {key.removeprefix("grad|"): value for key, value in golden.items() if key.startswith("grad|")}
    assert wanted.keys() == {key for key, value in theirs.items() if value.any()}  # layers without an adapter do not move
    for key, value in wanted.items():
        close(theirs[key], value, 5e-5, key)
    merged = tree.flatten(weights.dense(adapter.method.attach(frozen, adapter.trainable)))
    for key in [key for key in golden if key.startswith("merged|")]:
        path, layer = hf_names.path(key.removeprefix("merged|") + ".weight")
        ours = merged[path] if layer is None else merged[path][layer]
        close(ours.T if hf_names.is_transposed(path) else ours, golden[key], 1e-5, key)


def trained(method, params):
    rng = np.random.default_rng(0)
    frozen, start = method.init(jax.random.key(0), params)
    return frozen, jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), start)


def save(target, model, method, params, frozen, trainable):
    hf_peft.save_adapter(target, model, trainable, method.plan(params), base_name="org/base", frozen=frozen)
    return json.loads((target / hf_peft.CONFIG).read_text()), (target / hf_peft.WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_a_round_trip_is_bitwise_and_computes_the_same(tmp_path, base, name):
    model, params = base
    method = METHODS[name]()
    frozen, trainable = trained(method, params)
    config, data = save(tmp_path / "a", model, method, params, frozen, trainable)
    adapter = hf_peft.load_adapter(tmp_path / "a", model)
    joined = adapter.join(params)
    np.testing.assert_array_equal(
        logits(model, adapter.method.attach(joined, adapter.trainable)), logits(model, method.attach(frozen, trainable))
    )
    assert save(tmp_path / "b", model, adapter.method, params, joined, adapter.trainable) == (config, data)


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in ("vera_drawn", "shira")])
def test_the_fields_and_tensors_are_those_that_peft_writes(tmp_path, base, name):
    model, params = base
    adapter = hf_peft.load_adapter(GOLDENS / name, model)
    ours, _ = save(tmp_path / "a", model, adapter.method, params, adapter.join(params), adapter.trainable)
    theirs = json.loads((GOLDENS / name / hf_peft.CONFIG).read_text())
    lists = {field: sorted(theirs[field]) for field in ("target_modules", "feedforward_modules") if field in theirs}
    assert ours == {**theirs, **lists, "base_model_name_or_path": "org/base"}
    files = [safetensors.numpy.load_file(path / hf_peft.WEIGHTS) for path in (tmp_path / "a", GOLDENS / name)]
    assert files[0].keys() == {key for key in files[1] if "_proj.randlora_A" not in key and "_proj.randlora_B" not in key}  # copies
    for key, value in [(key, files[1][key]) for key in files[0]]:
        np.testing.assert_array_equal(files[0][key], value, err_msg=key)


@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_of_some_layers_names_them(tmp_path, base, name):
    model, params = base
    make, fields = LAYERS[name]
    frozen, trainable = trained(make(), params)
    written = save(tmp_path / "a", model, make(), params, frozen, trainable)
    config, _ = written
    assert {field: config[field] for field in fields} == fields
    adapter = hf_peft.load_adapter(tmp_path / "a", model)
    assert adapter.method.plan(params)[0].options["layers"] == chosen(make.keywords["layers"], 3)
    got, want = (
        logits(model, m.attach(f, t))
        for m, f, t in ((adapter.method, adapter.join(params), adapter.trainable), (make(), frozen, trainable))
    )
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert save(tmp_path / "b", model, adapter.method, params, adapter.join(params), adapter.trainable) == written


@pytest.mark.parametrize("name", ["dora_layers", "dora_modules"])
def test_a_dora_on_some_layers_is_trained_on_and_written_without_the_others(tmp_path, base, name):
    """A magnitude of 0, for a layer without an adapter, is nothing that PEFT could read."""
    model, params = base
    adapter = hf_peft.load_adapter(GOLDENS / name, model)
    frozen = adapter.join(params)
    gradient = jax.grad(lambda trainable: jnp.sum(jnp.square(logits(model, adapter.method.attach(frozen, trainable)))))(adapter.trainable)
    trainable = jax.tree.map(lambda x, g: 0.99 * x - 1e-4 * g, adapter.trainable, gradient)
    save(tmp_path / "a", model, adapter.method, params, frozen, trainable)
    found, theirs = (safetensors.numpy.load_file(path / hf_peft.WEIGHTS) for path in (tmp_path / "a", GOLDENS / name))
    assert found.keys() == theirs.keys() and all((found[key] != theirs[key]).any() for key in theirs)
    again = hf_peft.load_adapter(tmp_path / "a", model)
    got, want = (logits(model, m.attach(frozen, t)) for m, t in ((again.method, again.trainable), (adapter.method, trainable)))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("name", "field"), [("vera", "a"), ("lora_fa", "embed_tokens/kernel/a")])
def test_what_is_kept_in_the_frozen_tree_is_asked_for(tmp_path, base, name, field):
    model, params = base
    method = METHODS[name]()
    with pytest.raises(ValueError, match=f"keeps '{field}' in the frozen tree, which was not given: pass frozen=frozen"):
        save(tmp_path / "a", model, method, params, None, trained(method, params)[1])


def test_lora_fa_is_a_lora_to_those_who_read_it(tmp_path, base):
    model, params = base
    method = METHODS["lora_fa"]()
    frozen, trainable = trained(method, params)
    save(tmp_path / "a", model, method, params, frozen, trainable)
    adapter = hf_peft.load_adapter(tmp_path / "a", model)
    assert adapter.kind == "lora"
    for path, leaf in tree.flatten(tree.combine(frozen["lora_fa"], trainable["lora_fa"])).items():
        np.testing.assert_array_equal(tree.flatten(adapter.trainable["lora"])[path], leaf)


def test_an_adalora_without_what_was_pruned_is_filled_up(base):
    """PEFT leaves pruned triplets out of its files; layers then differ, and one of them has none left."""
    model, params = base
    adapter = hf_peft.load_adapter(GOLDENS / "adalora_pruned", model)
    assert {leaf.shape[-1] for path, leaf in tree.flatten(adapter.trainable).items() if path.endswith("/e")} == {3}
    close(logits(model, adapter.method.attach(params, adapter.trainable)), np.load(GOLDENS / "adalora_pruned" / "logits.npy"), 1e-5)


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        (peft.delta_lora(["q_proj"], rank=2, alpha=3), 2),
        (peft.delta_lora(["q_proj"], rank=2, alpha=3, start_steps=5), 4),
        (peft.relora(["q_proj"], rank=2, alpha=3, restarts=3, layers=[0, 2]), 8),
    ],
    ids=["delta_lora", "delta_lora later", "relora"],
)
def test_what_is_added_to_the_weights_in_training_is_a_lora_to_those_who_read_it(tmp_path, base, method, rank):
    model, params = base
    frozen, trainable = trained(method, params)
    config, _ = save(tmp_path / "a", model, method, params, frozen, trainable)
    adapter = hf_peft.load_adapter(tmp_path / "a", model)
    assert (adapter.kind, config["r"]) == ("lora", rank)
    close(logits(model, adapter.method.attach(params, adapter.trainable)), logits(model, method.attach(frozen, trainable)), 1e-5)


def test_half_a_dora_is_listed(tmp_path, base):
    path = tmp_path / "a"
    path.mkdir()
    config = json.loads((GOLDENS / "plain" / hf_peft.CONFIG).read_text())
    (path / hf_peft.CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    (path / hf_peft.WEIGHTS).write_bytes((GOLDENS / "plain" / hf_peft.WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=r"missing: base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector \[24\]"):
        hf_peft.load_adapter(path, base[0])


@pytest.mark.parametrize("kind", peft.FORMATS)
def test_a_format_speaks_of_what_its_method_has(kind):
    """Every name in a record exists: arguments of the method, config fields among the defaults."""
    form, fields = peft.FORMATS[kind], peft_config.fields(peft.FORMATS[kind])
    arguments = peft.METHODS[kind].__kwdefaults__.keys()
    assert {*form.options, *form.lists, *form.only} <= arguments and {peft_config.PATTERNS[o] for o in form.patterns} <= arguments
    assert {
        *form.options.values(),
        *form.constants,
        *form.ignored,
        *form.refused,
        *(field for field, _ in form.lists.values()),
    } <= fields.keys()
    assert form.values.keys() <= form.options.keys() and (not form.scaled or form.scaled in form.tensors)
    assert all(set(here) - {"1"} == set(there) - {"1"} for here, there in (t.axes.split("->") for t in form.tensors.values() if not t.turn))
