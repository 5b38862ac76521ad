"""Generation for rows with adapters of their own: what each adapter writes alone, padding rows and batches of any size included."""

import jax
import numpy as np
import pytest

from ftjax import peft, rollout
from ftjax.hf.tokenizer import byte_tokenizer
from tests.rollout.generate_test import complete, programs, prompts, tiny


@pytest.fixture(scope="module")
def setting():
    model, params = tiny()
    named = {}
    for n, (name, method) in enumerate({"a": peft.lora("all-linear", rank=3), "b": peft.dora(["q_proj"], rank=2)}.items()):
        frozen, start = method.init(jax.random.key(n), params)
        named[name] = method.attach(frozen, jax.tree.map(lambda x: x + 0.5 * jax.random.normal(jax.random.key(7), x.shape), start))
    return model, params, named


def test_rows_are_continued_as_by_their_adapter_alone(setting):
    model, params, named = setting
    given, names = prompts(3, 5), ["b", None, "a", None]  # the fourth row is padding
    found = complete(model, peft.mixed(params, named, names), given, num_rows=4)
    assert found.lengths.tolist() == [12, 12, 12, 0]
    for n, name in enumerate(names[:3]):
        alone = complete(model, params if name is None else named[name], given, num_rows=4)
        assert found.tokens[n].tolist() == alone.tokens[n].tolist()
        np.testing.assert_allclose(found.logps[n], alone.logps[n], atol=1e-4)
    assert len({tuple(row) for row in found.tokens[:3].tolist()}) == 3


def test_texts_come_in_the_order_of_the_prompts_whatever_the_batches(setting):
    model, params, named = setting
    given, rows = [row for row in prompts(5, 4)], [1, -1, 0, 0, 1]
    stacked, options = peft.stack_adapters(params, named), {"max_tokens": 6, "batch_size": 2}
    mixed = rollout.generate_text(model, stacked, byte_tokenizer(), given, adapters=rows, **options)
    alone = [rollout.generate_text(model, one, byte_tokenizer(), given, **options) for one in (*named.values(), params)]
    assert mixed == [alone[row][n] for n, row in enumerate(rows)]


def test_other_rows_compile_nothing(setting, monkeypatch):
    model, params, named = setting
    stacked = peft.stack_adapters(params, named)
    compiled = []
    for rows in ([0, 1, -1], [1, 1, 0]):
        complete(model, peft.assign_rows(stacked, rows), prompts(3, 5))
        compiled.append(programs._prefill._cache_size())
    assert compiled[0] == compiled[1]
