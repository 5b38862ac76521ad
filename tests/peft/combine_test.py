"""LoRAs into one: PEFT's numbers for every form that draws nothing, and the sum itself where it is exact."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, tree, weights
from ftjax.peft.combine import HOW
from ftjax.peft.lora import LoraWeight

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "peft_combined.npz")  # third_party/peft/combine_golden.py
FORMS = ("cat", "linear", "ties", "magnitude_prune", "svd", "ties_svd", "magnitude_prune_svd")
FACTORS = (0.7, -0.4)
P = "layers/proj/kernel"


@pytest.fixture
def adapted():
    """The golden's two adapters as the second of two layers, over a base of zeros."""

    def one(name):
        a, b = (jnp.stack([jnp.zeros_like(GOLDEN[f"{name}_{side}"]), GOLDEN[f"{name}_{side}"]]) for side in "ab")
        return tree.unflatten({P: LoraWeight(jnp.zeros((2, 10, 8)), a, b, jnp.full((2,), float(GOLDEN[f"{name}_scale"])))})

    return [one("one"), one("two")]


def change(method, trainable):
    return weights.materialize(tree.flatten(method.attach(tree.unflatten({P: jnp.zeros((2, 10, 8))}), trainable))[P])


@pytest.mark.parametrize("how", FORMS)
def test_a_form_equals_peft(how, adapted):
    got = change(*peft.combine(adapted, FACTORS, how=how))
    np.testing.assert_allclose(got[1], GOLDEN[how], atol=2e-5)
    np.testing.assert_array_equal(got[0], 0.0)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_what_is_dropped_depends_on_the_seed_and_nothing_is_where_all_is_kept(how, adapted):
    first, again, other = (change(*peft.combine(adapted, FACTORS, how=how, density=0.5, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    plain = how.replace("dare_linear_svd", "svd").replace("dare_linear", "linear").replace("dare_ties", "ties")
    np.testing.assert_allclose(
        change(*peft.combine(adapted, FACTORS, how=how, density=1.0)),
        change(*peft.combine(adapted, FACTORS, how=plain, density=1.0)),
        atol=1e-5,
    )


def test_cat_is_the_weighted_sum_of_any_ranks_and_paths(key):
    params = {name: {"kernel": jax.random.normal(key, (2, 6, 6))} for name in ("q_proj", "v_proj")}
    methods = [peft.lora(["q_proj"], rank=2, alpha=6), peft.lora(["q_proj", "v_proj"], rank=3, name="other")]
    adapted, expected = [], {path: np.zeros((2, 6, 6)) for path in tree.flatten(params)}
    for method, factor in zip(methods, (2.0, 0.5), strict=True):
        frozen, trainable = method.init(key, params)
        adapted.append(method.attach(frozen, jax.tree.map(lambda x: x + 0.3, trainable)))
        for path, leaf in tree.flatten(adapted[-1]).items():
            expected[path] += factor * (np.asarray(weights.materialize(leaf)) - np.asarray(tree.flatten(params)[path]))
    method, trainable = peft.combine(adapted, (2.0, 0.5))
    for path, leaf in tree.flatten(method.attach(params, trainable)).items():
        np.testing.assert_allclose(np.asarray(weights.materialize(leaf)) - tree.flatten(params)[path], expected[path], atol=1e-5)
    assert {path: leaf.shape[-1] for path, leaf in tree.flatten(trainable).items() if path.endswith("a")} == {
        "lora/q_proj/kernel/a": 5,
        "lora/v_proj/kernel/a": 3,
    }
    assert jax.tree.structure(method.init(key, params)[1]) == jax.tree.structure(trainable)


def test_a_cut_to_full_rank_loses_nothing(adapted):
    np.testing.assert_allclose(
        change(*peft.combine(adapted, FACTORS, how="svd", rank=6)), change(*peft.combine(adapted, FACTORS)), atol=1e-5
    )


WRONG = {
    "form": ({"how": "tie"}, "nearest: 'ties'"),
    "factors": ({"factors": (1.0,)}, "2 adapters need as many"),
    "ranks": ({"how": "linear", "uneven": True}, r"has ranks \[3, 2\]; use 'cat'"),
    "none": ({"empty": True}, "tree 1 has no LoRA"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_combined_says_why(case, adapted):
    options, message = WRONG[case]
    options = dict(options)
    if options.pop("uneven", False):
        leaf = tree.flatten(adapted[1])[P]
        adapted[1] = tree.unflatten({P: LoraWeight(leaf.base, leaf.a[..., :2], leaf.b[:, :2], leaf.scale)})
    if options.pop("empty", False):
        adapted[1] = {"norm": {"scale": jnp.ones(3)}}
    with pytest.raises(ValueError, match=message):
        peft.combine(adapted, **options)


def test_every_form_is_tried():
    assert set(HOW) == {*FORMS, "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"}
