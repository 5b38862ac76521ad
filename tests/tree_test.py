import jax.numpy as jnp
import pytest

from ftjax import tree

PARAMS = {
    "embed_tokens": {"kernel": jnp.zeros((7, 4))},
    "layers": {
        "self_attn": {"q_proj": {"kernel": jnp.zeros((2, 4, 4)), "bias": jnp.zeros((2, 4))}, "v_proj": {"kernel": jnp.zeros((2, 4, 2))}},
        "mlp": {"down_proj": {"kernel": jnp.zeros((2, 8, 4))}},
        "input_layernorm": {"scale": jnp.ones((2, 4))},
    },
    "norm": {"scale": jnp.ones(4)},
    "lm_head": {"kernel": jnp.zeros((4, 7))},
}
Q, V, DOWN = "layers/self_attn/q_proj/kernel", "layers/self_attn/v_proj/kernel", "layers/mlp/down_proj/kernel"


def test_unflatten_inverts_flatten():
    assert tree.flatten(tree.unflatten(tree.flatten(PARAMS))) == tree.flatten(PARAMS)


@pytest.mark.parametrize(
    "filter, expected",
    [
        (r"layers/self_attn/(q|v)_proj/kernel", {Q, V}),
        ("all-linear", {Q, V, DOWN}),
        ("attention", {Q, V}),
        ("mlp", {DOWN}),
        ("norms", {"layers/input_layernorm/scale", "norm/scale"}),
        (["q_proj", "v_proj"], {Q, V}),
        (["mlp.down_proj"], {DOWN}),
        (["norm", "lm_head"], {"norm/scale", "lm_head/kernel"}),
        (lambda path: path.endswith("bias"), {"layers/self_attn/q_proj/bias"}),
    ],
)
def test_a_filter_selects_exactly(filter, expected):
    assert set(tree.matches(PARAMS, filter, who="test")) == expected


@pytest.mark.parametrize(
    "filter, hint",
    [
        (r"layers/self_attn/q_prj/kernel", Q),
        (["qproj"], "q_proj"),
        (["q_proj", "vproj"], "v_proj"),
        ("/norm/scale", "no leading '/'"),
        ("q_proj", "q_proj"),
    ],
)
def test_a_filter_that_matches_nothing_names_the_nearest(filter, hint):
    with pytest.raises(ValueError, match=hint):
        tree.matches(PARAMS, filter, who="test")


def test_a_broken_pattern_is_named():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        tree.matches(PARAMS, "(", who="test")


def test_combine_inverts_partition_and_keeps_the_objects():
    chosen, others = tree.partition(PARAMS, [Q, "norm/scale"])
    assert set(tree.flatten(chosen)) == {Q, "norm/scale"}
    joined = tree.flatten(tree.combine(chosen, others))
    assert all(joined[path] is leaf for path, leaf in tree.flatten(PARAMS).items())


def test_combine_refuses_a_leaf_that_both_trees_hold():
    with pytest.raises(ValueError, match="both hold 'norm/scale'"):
        tree.combine(PARAMS, {"norm": {"scale": 0}})


def test_replace_refuses_an_unknown_path():
    with pytest.raises(ValueError, match="'norm/scale'"):
        tree.replace(PARAMS, {"norm/scales": 1})


def test_a_leaf_cannot_be_a_branch():
    with pytest.raises(ValueError, match="leaf"):
        tree.unflatten({"a": 1, "a/b": 2})


def test_the_first_matching_rule_wins():
    rules = [(r".*/q_proj/.*", "first"), (r".*", "second")]
    assert tree.first_match(rules, Q) == "first" and tree.first_match(rules, V) == "second"
    assert tree.first_match(rules[:1], V) is None


def test_size_and_bytes_count_arrays_and_shapes():
    assert tree.size({"a": jnp.zeros((3, 4), jnp.bfloat16)}) == 12
    assert tree.num_bytes({"a": jnp.zeros((3, 4), jnp.bfloat16)}) == 24
