"""Models into one: each recipe is its formula, a model mixed with itself is itself, and what does not fit is listed."""

import json
import pathlib
import shutil
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import models
from ftjax.hf import export, folder, load, mix
from ftjax.hf.lazy import LazyTensor

CONFIG = models.preset("tiny-llama")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three models of one architecture, in folders; the first is the base of the others."""
    root = tmp_path_factory.mktemp("mix")
    model = models.build(CONFIG)
    base = model.init(jax.random.key(0))
    for name in ("base", "one", "two"):
        scale = 0.0 if name == "base" else 0.01
        keys = iter(jax.random.split(jax.random.key(len(name) + ord(name[0])), 100))
        tuned = jax.tree.map(lambda x, keys=keys, scale=scale: x + scale * jax.random.normal(next(keys), x.shape, x.dtype), base)
        export.export_model(root / name, model, tuned, None)
    return {name: folder.read(root / name) for name in ("base", "one", "two")}


def tensors(path):
    return {name: tensor.read() for name, tensor in folder.read(path).tensors.items()}


def naive(recipe, base, one, two, f):
    """Each recipe's formula in float64."""
    if recipe == "linear":
        return (f[0] * one + f[1] * two) / sum(f)
    if recipe == "slerp":
        t, angle = f[1] / sum(f), np.arccos(np.sum(one * two) / np.linalg.norm(one) / np.linalg.norm(two))
        return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)
    a, b = one - base, two - base
    if recipe == "task_arithmetic":
        return base + f[0] * a + f[1] * b
    cosine = max(0.0, np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    t = 2 * cosine / (1 + cosine)
    return t * (one + two) / 2 + (1 - t) * base


@pytest.mark.parametrize("recipe", ["linear", "slerp", "task_arithmetic", "model_stock"])
def test_a_recipe_is_its_formula(recipe, checkpoints, tmp_path):
    base = checkpoints["base"] if recipe in mix.NEED_BASE else None
    factors = (0.3, 0.9)
    mix.mix(tmp_path / "out", [checkpoints["one"], checkpoints["two"]], None, recipe=recipe, base=base, factors=factors)
    for name, got in tensors(tmp_path / "out").items():
        exact = [checkpoints[which].tensors[name].read().astype(np.float64) for which in ("base", "one", "two")]
        np.testing.assert_allclose(got, naive(recipe, *exact, factors), atol=2e-6, err_msg=name)
        assert np.abs(got - exact[1]).max() > 1e-3, name


def largest(change, density):
    """The change, and zero but for the `density` of its entries that are largest."""
    kept = np.argsort(-np.abs(change), axis=None)[: int(density * change.size)]
    return np.where(np.isin(np.arange(change.size).reshape(change.shape), kept), change, 0)


def naive_ties(changes, factors):
    """Of each entry, the mean of those whose sign is the sum's: Yadav et al., algorithm 1, steps 2 and 3."""
    changes = np.stack(changes)
    agree = np.sign(changes) == np.where(changes.sum(0) >= 0, 1, -1)
    weighted = np.array(factors).reshape(-1, *[1] * (changes.ndim - 1)) * changes * agree
    return weighted.sum(0) / np.maximum(agree.sum(0), 1)


@pytest.mark.parametrize("recipe", ["ties", "dare", "dare_ties"])
def test_a_recipe_of_a_part_of_each_change_is_its_formula(recipe, checkpoints, tmp_path):
    """Density 0.3, unequal factors; what is dropped is drawn for a tensor from the seed and the checksum of its name, model by model."""
    base, tuned, factors = checkpoints["base"], [checkpoints["one"], checkpoints["two"]], (0.4, 0.9)
    mix.mix(tmp_path / "out", tuned, None, recipe=recipe, base=base, factors=factors, density=0.3, seed=5)
    for name, got in tensors(tmp_path / "out").items():
        start = base.tensors[name].read().astype(np.float64)
        changes = [one.tensors[name].read() - start for one in tuned]
        random = np.random.default_rng([5, zlib.crc32(name.encode())])
        if recipe == "ties":
            changes = [largest(change, 0.3) for change in changes]
        else:
            changes = [change * (random.random(change.shape, np.float32) < 0.3) / 0.3 for change in changes]
        moved = factors[0] * changes[0] + factors[1] * changes[1] if recipe == "dare" else naive_ties(changes, factors)
        np.testing.assert_allclose(got, start + moved, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("recipe", ["ties", "dare", "dare_ties"])
def test_with_everything_kept_and_one_change_a_task_vector_recipe_gives_the_tuned_model_back(recipe, checkpoints, tmp_path):
    one, base = checkpoints["one"], checkpoints["base"]
    mix.mix(tmp_path / "out", [one, base], None, recipe=recipe, base=base, factors=[1, 1], density=1.0)
    for name, got in tensors(tmp_path / "out").items():
        np.testing.assert_allclose(got, one.tensors[name].read(), atol=1e-6)


@pytest.mark.parametrize("recipe", mix.RECIPES)
def test_a_model_mixed_with_itself_is_itself(recipe, checkpoints, tmp_path):
    one, base = checkpoints["one"], checkpoints["base"] if recipe in mix.NEED_BASE else None
    factors = [0.5, 0.5] if recipe in ("task_arithmetic", "dare") else [1, 1]
    mix.mix(tmp_path / "out", [one, one], None, recipe=recipe, base=base, factors=factors, density=1.0)
    for name, got in tensors(tmp_path / "out").items():
        np.testing.assert_allclose(got, one.tensors[name].read(), rtol=1e-5, atol=1e-6)


def test_what_dare_drops_depends_on_the_seed_alone(checkpoints, tmp_path):
    def run(name, seed):
        both = [checkpoints["one"], checkpoints["two"]]
        return tensors(mix.mix(tmp_path / name, both, None, recipe="dare", base=checkpoints["base"], density=0.3, seed=seed))

    first, again, other = run("a", 1), run("b", 1), run("c", 2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)


def test_layers_pass_through_into_a_deeper_model(checkpoints, tmp_path):
    out = mix.passthrough(tmp_path / "out", [(checkpoints["one"], 0, 2), (checkpoints["two"], 1, 2)], None)
    found = tensors(out)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    for name, tensor in found.items():
        if ".layers.2." in name:
            np.testing.assert_array_equal(tensor, checkpoints["two"].tensors[name.replace("layers.2.", "layers.1.")].read())
        else:
            np.testing.assert_array_equal(tensor, checkpoints["one"].tensors[name].read())
    model = models.build(models.config_from_hf(folder.read(out).config))
    params = load.load_params(folder.read(out), model)
    hidden, _ = model.apply(params, jnp.ones((1, 3), jnp.int32))
    assert np.isfinite(np.asarray(hidden)).all()


WIDTH = 256


def deep(layers):
    """A model of so many layers whose tensors exist only while somebody holds what was read, as those of a file."""

    def random(*shape):
        return LazyTensor(shape, np.dtype(np.float32), lambda index: np.random.default_rng(0).random(shape, np.float32)[index])

    kinds = {"self_attn.q_proj": (WIDTH, WIDTH), "mlp.up_proj": (2 * WIDTH, WIDTH), "input_layernorm": (WIDTH,)}
    tensors = {f"model.layers.{at}.{kind}.weight": random(*shape) for at in range(layers) for kind, shape in kinds.items()}
    return folder.Checkpoint(pathlib.Path("deep"), {"num_hidden_layers": layers}, tensors)


def peak(write, layers):
    """The most memory that arrays take while models of so many layers are mixed."""
    tracemalloc.start()
    try:
        write(deep(layers))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("recipe", [*mix.RECIPES, "passthrough"])
def test_memory_is_for_a_few_tensors_however_deep_the_models(recipe, tmp_path):
    def write(model):
        target = tmp_path / str(model.config["num_hidden_layers"])
        if recipe == "passthrough":
            return mix.passthrough(target, [(model, 0, model.config["num_hidden_layers"])] * 2, None)
        return mix.mix(target, [model, model], None, recipe=recipe, base=model if recipe in mix.NEED_BASE else None)

    matrix = 4 * WIDTH * WIDTH  # bytes, of the smaller of a layer's two
    few, many = peak(write, 2), peak(write, 12)
    assert 2 * matrix < few and many - few < matrix / 4  # ten layers more, of three such matrices each and in every model


def test_the_card_says_what_was_mixed_and_how(checkpoints, tmp_path):
    one, two, base = (checkpoints[name] for name in ("one", "two", "base"))
    mix.mix(tmp_path / "mixed", [one, two], None, recipe="task_arithmetic", base=base, factors=(0.3, -0.9))
    mix.mix(tmp_path / "shares", [one, two], None, recipe="linear")
    mix.passthrough(tmp_path / "deep", [(one, 0, 2), (two, 1, 2)], None)
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("mixed", "shares", "deep")}
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- ftjax\n- merge\n---\n\n# Model card\n\n"
    assert cards["mixed"] == f"{head}A `task_arithmetic` merge over base:\n\n- one: 0.3\n- two: -0.9\n\nWritten by `ftjax merge`.\n"
    assert cards["shares"] == f"{head}A `linear` merge:\n\n- one: 0.5\n- two: 0.5\n\nWritten by `ftjax merge`.\n"
    assert cards["deep"] == f"{head}Layers, in order:\n\n- one: 0 to 2\n- two: 1 to 2\n\nWritten by `ftjax merge`.\n"


def test_models_of_two_architectures_are_refused_and_nothing_is_written(checkpoints, tmp_path):
    shutil.copytree(checkpoints["one"].path, tmp_path / "odd")
    odd = folder.read(tmp_path / "odd")
    tensors = dict(odd.tensors)
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"2 tensors differ.*\n.*model.extra.weight: missing in one"):
        mix.mix(tmp_path / "out", [checkpoints["one"], odd._replace(tensors=tensors)], None, recipe="linear")
    assert not (tmp_path / "out").exists()


WRONG = {
    "no such recipe": ({"recipe": "tise"}, "nearest: 'ties'"),
    "no base": ({"recipe": "ties"}, "needs the base"),
    "a base too many": ({"recipe": "linear", "with_base": True}, "takes no base"),
    "three for slerp": ({"recipe": "slerp", "count": 3}, "takes two models, not 3"),
    "one model": ({"recipe": "linear", "count": 1}, "two or more models, not 1"),
    "factors": ({"recipe": "linear", "factors": [1]}, "2 models need as many"),
    "no share": ({"recipe": "linear", "factors": [1, -1]}, "positive sum"),
    "density": ({"recipe": "ties", "with_base": True, "density": 0.0}, "density is in"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_that_cannot_be_meant_says_why(case, checkpoints, tmp_path):
    options, message = WRONG[case]
    options = dict(options)
    many = [checkpoints["one"], checkpoints["two"], checkpoints["one"]][: options.pop("count", 2)]
    base = checkpoints["base"] if options.pop("with_base", False) else None
    with pytest.raises(ValueError, match=message):
        mix.mix(tmp_path / "out", many, None, base=base, **options)
    assert not any(tmp_path.iterdir())


def test_a_slice_beyond_a_model_is_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match=r"the slice 1:9 is not inside"):
        mix.passthrough(tmp_path / "out", [(checkpoints["one"], 1, 9)], None)
