"""Prompt tuning, P-tuning and prefix tuning: what the model is fed is the formula of what is trained."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from ftjax import models, peft, tree, weights
from ftjax.models import bridge
from tests import tiny, toy
from tests.peft.formula import close, double

N, D, LAYERS, WIDTH = 3, 16, 2, 8  # of `tests.tiny`: k c = 8


def started(method, key, dtype=jnp.float32):
    params = jax.tree.map(lambda x: x.astype(dtype), tiny.init(key))
    frozen, trainable = method.init(key, params)
    (name,) = trainable
    return params, frozen, trainable, {path.rsplit("/", 1)[1]: leaf for path, leaf in tree.flatten(trainable[name]).items()}


def test_a_prompt_is_what_was_trained_in_the_dtype_of_the_base(key):
    method = peft.prompt_tuning(N)
    _, frozen, trainable, fields = started(method, key, jnp.bfloat16)
    fed = method.attach(frozen, trainable)["prompt"]["embedding"]
    assert fed.dtype == jnp.bfloat16 and fields["embedding"].dtype == jnp.float32
    np.testing.assert_array_equal(fed, fields["embedding"].astype(jnp.bfloat16))


def test_p_tuning_is_three_layers_with_relu(key):
    method = peft.p_tuning(N, hidden_size=6)
    _, frozen, trainable, fields = started(method, key)
    f = double(dict(fields))
    first = np.maximum(f["embedding"] @ f["w1"] + f["b1"], 0)
    second = np.maximum(first @ f["w2"] + f["b2"], 0)
    close(method.attach(frozen, trainable)["prompt"]["embedding"], second @ f["w3"] + f["b3"])


def test_p_tuning_of_the_paper_is_a_bidirectional_lstm_under_two_layers(key):
    method, m = peft.p_tuning(N, hidden_size=6, encoder="lstm"), 6
    _, frozen, trainable, fields = started(method, key)
    f = double(dict(fields))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731

    def read(x, direction, layer):
        w, u, bias = (f[f"{field}{layer}"][direction] for field in ("input", "state", "bias"))
        h, c, states = np.zeros(m), np.zeros(m), []
        for row in x:
            gates = row @ w + h @ u + bias
            c = sigmoid(gates[m : 2 * m]) * c + sigmoid(gates[:m]) * np.tanh(gates[2 * m : 3 * m])
            h = sigmoid(gates[3 * m :]) * np.tanh(c)
            states.append(h)
        return np.array(states)

    x = f["embedding"]
    for layer in (1, 2):
        x = np.concatenate([read(x, 0, layer), read(x[::-1], 1, layer)[::-1]], axis=1)
    close(method.attach(frozen, trainable)["prompt"]["embedding"], np.maximum(x @ f["w1"] + f["b1"], 0) @ f["w2"] + f["b2"])


def test_prefix_tuning_is_two_layers_with_tanh_whose_output_holds_key_and_value_of_each_layer(key):
    method = peft.prefix_tuning(N, hidden_size=6)
    _, frozen, trainable, fields = started(method, key)
    f = double(dict(fields))
    flat = np.tanh(f["embedding"] @ f["w1"] + f["b1"]) @ f["w2"] + f["b2"]
    prefix = method.attach(frozen, trainable)["layers"]["slots"]["prefix"]
    for layer in range(LAYERS):
        at = 2 * layer * WIDTH
        close(prefix["key"][layer], flat[:, at : at + WIDTH])
        close(prefix["value"][layer], flat[:, at + WIDTH : at + 2 * WIDTH])


def test_a_vocabulary_start_is_rows_of_the_embedding_and_a_random_one_is_as_wide(key):
    params, _, _, fields = started(peft.prompt_tuning(N), key)
    table = params["embed_tokens"]["kernel"]
    assert all(any(np.array_equal(row, known) for known in table) for row in fields["embedding"])
    fields = started(peft.prompt_tuning(200, init="random"), key)[3]
    np.testing.assert_allclose(np.std(fields["embedding"]), np.std(table), rtol=0.1)


@pytest.mark.parametrize(("ids", "expected"), [([4, 2], [4, 2, 4]), ([4, 2, 7, 9], [4, 2, 7])], ids=["repeated", "cut"])
def test_a_text_start_is_the_text(ids, expected, key):
    params, _, _, fields = started(peft.prompt_tuning(N, init=ids), key)
    np.testing.assert_array_equal(fields["embedding"], params["embed_tokens"]["kernel"][np.array(expected)])


def test_a_zero_prefix_is_zero_and_trains(key):
    method = peft.prefix_tuning(N, hidden_size=6, init="zero")
    _, frozen, trainable, _ = started(method, key)
    tokens = toy.batch(key).tokens

    def loss(trainable):
        return jnp.sum(jnp.sin(tiny.apply(method.attach(frozen, trainable), tokens)[0]))

    prefix = method.attach(frozen, trainable)["layers"]["slots"]["prefix"]
    assert not np.any(prefix["key"]) and not np.any(prefix["value"])
    gradient = tree.flatten(jax.jit(jax.grad(loss))(trainable))
    assert all(np.any(leaf) for path, leaf in gradient.items() if path.endswith(("w2", "b2")))


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (peft.prompt_tuning(N), N * D),
        (peft.p_tuning(N, hidden_size=5), N * D + 2 * D * 5 + 25 + 10 + D),
        (peft.p_tuning(N, hidden_size=None), N * D),
        (peft.p_tuning(N, hidden_size=5, encoder="lstm", num_layers=1), N * D + 2 * (4 * 5 * (D + 5 + 1)) + 10 * 11 + 11 * D),
        (peft.prefix_tuning(N), 2 * N * LAYERS * WIDTH),
        (peft.prefix_tuning(N, hidden_size=5), N * WIDTH + (WIDTH + 1) * 5 + (5 + 1) * 2 * LAYERS * WIDTH),
    ],
)
def test_the_number_of_parameters_is_the_closed_form(method, count, key):
    assert tree.size(jax.eval_shape(method.init, key, jax.eval_shape(tiny.init, key))[1]) == count


def test_a_prompt_of_five_for_t5_xxl_is_as_small_as_its_paper_says(key):
    """Lester et al., section 2: 20,480 parameters a task."""
    shapes = {"embed_tokens": {"kernel": jax.ShapeDtypeStruct((32128, 4096), jnp.bfloat16)}}
    assert tree.size(jax.eval_shape(peft.prompt_tuning(5).init, key, shapes)[1]) == 20480


def test_a_prefix_may_begin_as_a_text(key):
    ids, tokens = jnp.array([5, 9, 2], jnp.int32), toy.batch(key).tokens
    params = tiny.init(key)
    method = peft.prefix_tuning(N, init=jax.jit(partial(models.prefix_of, tiny.MODEL))(params, ids))
    begun, _ = jax.jit(tiny.apply)(method.attach(*method.init(key, params)), tokens)
    told, _ = jax.jit(tiny.apply)(params, jnp.concatenate([jnp.broadcast_to(ids[None], (len(tokens), N)), tokens], axis=1))
    np.testing.assert_allclose(begun, told[:, N:], atol=1e-5)
    with pytest.raises(ValueError, match=r"expected a key and a value \(2, 4, 8\)"):
        peft.prefix_tuning(4, init=models.prefix_of(tiny.MODEL, params, ids)).init(key, params)


def test_a_prompt_and_a_prefix_may_be_chained_and_two_prompts_may_not(key):
    params = tiny.init(key)
    both = peft.chain(peft.prefix_tuning(2), peft.prompt_tuning(N), peft.lora("all-linear", rank=1))
    attached = both.attach(*both.init(key, params))
    assert isinstance(attached["layers"]["self_attn"]["q_proj"]["kernel"], weights.Weight)
    assert (attached["prompt"]["embedding"].shape, attached["layers"]["slots"]["prefix"]["key"].shape) == ((N, D), (LAYERS, 2, WIDTH))
    twice = peft.chain(peft.prompt_tuning(N), peft.p_tuning(N))
    with pytest.raises(ValueError, match="p_tuning: another method has filled 'prompt/embedding'"):
        twice.attach(*twice.init(key, params))


@pytest.mark.parametrize("method", [peft.prompt_tuning(N), peft.prefix_tuning(N)], ids=["prompt", "prefix"])
def test_merging_is_refused(method, key):
    params = tiny.init(key)
    with pytest.raises(ValueError, match="merge: '(prompt/embedding|layers/slots/prefix/key)' is read before every row.*keep the adapter"):
        peft.merge(method, *method.init(key, params))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(peft.prompt_tuning, 0), "num_tokens is at least 1, not 0"),
        (partial(peft.prompt_tuning, init="vocab"), "init is 'vocabulary', 'random' or the token ids of a text, not 'vocab'"),
        (partial(peft.prompt_tuning, init=[]), "init is an empty text"),
        (partial(peft.prompt_tuning, init=[3, 99]), "ids from 3 to 99; the vocabulary has 0 to 16"),
        (partial(peft.p_tuning, encoder="gru"), "the encoder is 'mlp' or 'lstm', not 'gru'"),
        (partial(peft.p_tuning, encoder="lstm", num_layers=0), "num_layers is at least 1, not 0"),
        (partial(peft.p_tuning, hidden_size=0), "hidden_size is at least 1"),
        (partial(peft.p_tuning, hidden_size="none"), "or None for no network, not 'none'"),
        (partial(peft.prefix_tuning, init="zeros"), "init is 'random', 'zero' or the keys and values of a text, not 'zeros'"),
        (partial(peft.prefix_tuning, init={}, hidden_size=3), "no network that makes them"),
    ],
)
def test_bad_options_say_what_was_expected(make, message, key):
    with pytest.raises(ValueError, match=message):
        make().init(key, tiny.init(key))


class Foreign(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        return linen.Embed(7, 4, name="embed_tokens", param_dtype=jnp.float32)(tokens)


def test_a_model_without_the_slot_says_so(key):
    model = bridge.from_linen(Foreign())
    params = model.init(key)
    with pytest.raises(ValueError, match="prompt_tuning: pattern 'embed_tokens/kernel' matched no leaf"):
        peft.prompt_tuning(N).init(key, params)
    method = peft.prompt_tuning(N)
    frozen, trainable = method.init(key, {**params, "embed_tokens": {"kernel": params["embed_tokens"]["embedding"]}})
    with pytest.raises(ValueError, match="for which this module has no place"):
        model.apply({**params, "prompt": method.attach(frozen, trainable)["prompt"]}, jnp.zeros((1, 3), jnp.int32))
