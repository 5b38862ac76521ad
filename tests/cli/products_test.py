"""What multiplies packed matrices is said of all of them, and each is named where it is not one for all."""

import jax
import jax.numpy as jnp
import pytest

from ftjax import peft, quant, sharding
from ftjax.cli import main, products
from ftjax.quant.permuted import PermutedWeight

MLP = {"layers": {"mlp": {name: {"kernel": jnp.ones((2, 64, 128))} for name in ("gate_proj", "down_proj")}}}


def shapes(method, params=MLP):
    return jax.eval_shape(lambda params: method.attach(*method.init(jax.random.key(0), params)), params)


def test_what_multiplies_packed_matrices_is_said_and_why_nothing_faster_does():
    auto, tpu = (shapes(quant.nf4(implementation=implementation)) for implementation in ("auto", "tpu"))
    for mesh in (sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        said = products.told(auto, mesh, rows=8, dtype="float32")
        assert said.startswith("2 packed matrices are multiplied by 'reference'\n")
        assert "not by 'tpu': it runs on tpu, and the program is for cpu." in said
        with pytest.raises(ValueError, match="layers/mlp/down_proj/kernel: .*'tpu' cannot take this product: it runs on tpu"):
            products.told(tpu, mesh, rows=8, dtype="float32")
        assert not products.told(MLP, mesh, rows=8, dtype="float32")


def test_each_is_named_where_they_are_multiplied_in_different_ways():
    attention = {name: {"kernel": jnp.ones((2, 64, 64))} for name in ("q_proj", "o_proj")}
    params = {"layers": MLP["layers"] | {"self_attn": attention}, "lm_head": {"kernel": jnp.ones((64, 128))}}
    forced = quant.nf4(["q_proj", "o_proj", "gate_proj"], implementation="reference", name="forced")
    found = shapes(peft.chain(forced, quant.nf4(["lm_head", "down_proj"])), params)
    said = products.told(found, sharding.make_mesh(devices=jax.devices()[:1]), rows=8, dtype="float32").splitlines()
    assert "2 packed matrices are multiplied by 'reference': layers/mlp/down_proj/kernel, lm_head/kernel" in said
    assert "3 packed matrices are multiplied by 'reference': layers/mlp/gate_proj/kernel, layers/self_attn/(o_proj|q_proj)/kernel" in said


def test_adapters_and_sorted_rows_hide_no_matrix():
    adapted = shapes(peft.chain(quant.int4(), peft.lora(rank=1)))
    weight = adapted["layers"]["mlp"]["gate_proj"]["kernel"]
    assert not isinstance(weight, quant.PackedWeight)
    adapted["layers"]["mlp"]["down_proj"]["kernel"] = PermutedWeight(weight.base, jax.ShapeDtypeStruct((2, 64), jnp.int32))
    assert products.told(adapted, sharding.make_mesh(devices=jax.devices()[:1]), rows=8, dtype="float32").startswith("2 packed")


def test_generate_and_eval_say_it_of_decoding(base, tmp_path, capsys):
    given = [f"--model={base.folder}", "--quantize=int8", "--max_tokens=1", "--compile_cache=off"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "5 + 7", "completion": "12"}\n')
    said = "7 packed matrices are multiplied by 'reference'"
    assert main.main(["generate", "--prompt=a", *given]) == 0
    err = capsys.readouterr().err
    assert said in err and "(1 row at a time, while decoding)" in err
    data = [f"--data={tmp_path / 'rows.jsonl'}", "--split=train", "--batch_size=3"]
    assert main.main(["eval", *data, *given]) == 0
    err = capsys.readouterr().err
    assert said in err and "(3 rows at a time, while decoding)" in err


def test_generate_takes_an_implementation_and_one_that_cannot_says_why(base, capsys):
    def said(*options):
        code = main.main(["generate", f"--model={base.folder}", "--prompt=a", "--max_tokens=1", "--compile_cache=off", *options])
        return code, capsys.readouterr().err

    assert "not by 'tpu'" in said("--quantize=int8", "--implementation=auto")[1]
    code, err = said("--quantize=int8", "--implementation=reference")
    assert code == 0 and "7 packed matrices are multiplied by 'reference'" in err and "not by" not in err  # no other was asked
    code, err = said("--quantize=int8", "--implementation=tpu")
    assert code == 1 and "kernel: " in err and "'tpu'" in err
    code, err = said("--implementation=reference")
    assert code == 1 and "'reference' multiplies packed matrices, and this model has none" in err
