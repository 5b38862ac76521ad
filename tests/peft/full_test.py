import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import peft, tree
from tests import toy


@pytest.fixture
def params(key):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.init(key))


def test_trained_leaves_are_float32_and_read_in_their_own_dtype(key, params):
    method = peft.full("norm/scale")
    frozen, trainable = method.init(key, params)
    assert trainable["full"]["norm"]["scale"].dtype == jnp.float32
    attached = method.attach(frozen, trainable)
    jax.tree.map(np.testing.assert_array_equal, attached, params)
    assert attached["norm"]["scale"].dtype == jnp.bfloat16


def test_the_trained_copy_shares_no_buffer_with_the_base(key):
    params = toy.init(key)
    _, trainable = peft.full("norm/scale").init(key, params)
    trainable["full"]["norm"]["scale"].delete()
    assert not params["norm"]["scale"].is_deleted()


def test_a_moved_leaf_takes_no_memory_in_the_frozen_tree(key, params):
    frozen, trainable = peft.full("everything").init(key, params)
    assert tree.num_bytes(frozen) == 0 and tree.size(trainable) == tree.size(params)


def test_reading_a_moved_leaf_says_where_it_went(key, params):
    frozen, _ = peft.full("norm/scale").init(key, params)
    with pytest.raises(ValueError, match="method.attach"):
        frozen["norm"]["scale"].materialize()


def test_exclude_leaves_frozen_what_it_names(key, params):
    _, trainable = peft.full("everything", exclude=["embed_tokens"]).init(key, params)
    assert "full/embed_tokens/kernel" not in tree.flatten(trainable)
    with pytest.raises(ValueError, match="nothing to train"):
        peft.full("norm/scale", exclude="everything").init(key, params)
    with pytest.raises(ValueError, match=r"full.exclude: no module is named 'embed_token'; nearest: 'embed_tokens'"):
        peft.full("everything", exclude=["embed_token"]).init(key, params)


def test_lora_may_ride_on_a_trained_matrix_but_not_the_other_way_round(key, params):
    target = "layers/mlp/up_proj/kernel"
    method = peft.chain(peft.full(target), peft.lora(target, rank=2))
    frozen, trainable = method.init(key, params)
    np.testing.assert_array_equal(
        peft.merge(method, frozen, trainable)["layers"]["mlp"]["up_proj"]["kernel"], params["layers"]["mlp"]["up_proj"]["kernel"]
    )
    wrong = peft.chain(peft.lora(target, rank=2), peft.full(target))
    with pytest.raises(ValueError, match="before the method that wraps it"):
        wrong.attach(*wrong.init(key, params))


def test_two_methods_of_one_name_are_refused(key, params):
    with pytest.raises(ValueError, match="name="):
        peft.chain(peft.lora("all-linear", rank=1), peft.lora("all-linear", rank=2)).init(key, params)
    both = peft.chain(peft.lora("all-linear", rank=1), peft.lora("all-linear", rank=2, name="second"))
    assert set(both.init(key, params)[1]) == {"lora", "second"}
