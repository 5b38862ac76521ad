"""Does PEFT compute what we compute from folders of norms, of biases beside an adapter, and of DoRA on some layers? Two halves:

    python third_party/peft/check_beside.py write DIR     # with ftjax
    python third_party/peft/check_beside.py check DIR     # with torch, transformers and peft

`write` puts each away from its start on the tiny Qwen2 of bias_golden.py; `check` prints the largest difference of PEFT's logits relative
to the largest logit, how far the adapter moved them, and whether PEFT writes the tensors again that it read.

It printed:

    transformers 5.23.0, peft 0.21.2, torch 2.13.0+cpu, float32
    adalora_bitfit       2.9e-07 (moved by 0.13) same tensors
    boft_bitfit          8.1e-07 (moved by 0.26) same tensors
    dora_bitfit          4.4e-07 (moved by 0.46) same tensors
    dora_layers          4.2e-07 (moved by 0.49) same tensors
    lora_bitfit          4.1e-07 (moved by 0.97) same tensors
    lora_bitfit_only     3.3e-07 (moved by 0.07) same tensors
    lora_full_bitfit     3.3e-07 (moved by 0.50) same tensors
    miss_bitfit          1.4e-06 (moved by 0.56) same tensors
    norm_tuning          3.1e-07 (moved by 0.28) same tensors
    norm_tuning_and_full 3.4e-07 (moved by 0.75) same tensors
    norm_tuning_and_head 3.1e-07 (moved by 0.28) same tensors
    norm_tuning_layers   3.0e-07 (moved by 0.20) same tensors
    oft_bitfit           8.9e-07 (moved by 0.91) same tensors
    randlora_bitfit      6.9e-07 (moved by 1.25) same tensors
    vera_bitfit          3.5e-07 (moved by 0.20) same tensors
"""

import pathlib
import sys
import tempfile

import numpy as np

BASE = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "peft" / "base_qwen2"
TOKENS = (np.arange(10) * 11 % 61)[None].astype(np.int32)


def write(folder):
    import jax
    import jax.numpy as jnp

    from ftjax import models, peft
    from ftjax.hf import folder as hf_folder
    from ftjax.hf import load
    from ftjax.hf import peft as hf_peft

    made = {
        "norm_tuning": peft.norm_tuning(),
        "norm_tuning_layers": peft.norm_tuning("layers/.*norm/scale", layers="last 1"),
        "norm_tuning_and_full": peft.chain(peft.norm_tuning(), peft.full("layers/self_attn/k_proj/.*")),
        "norm_tuning_and_head": peft.chain(peft.norm_tuning(), peft.value_head(bias=False)),
        "dora_layers": peft.dora(rank=4, alpha=8, layers="last 1"),
        "lora_bitfit": peft.chain(peft.lora(rank=4, alpha=8), peft.bitfit()),
        "lora_bitfit_only": peft.chain(peft.lora(["q_proj", "o_proj"], rank=4, layers=[1]), peft.bitfit(".*q_proj/bias", layers=[1])),
        "lora_full_bitfit": peft.chain(
            peft.lora(["q_proj"], rank=4), peft.full("layers/self_attn/k_proj/.*"), peft.bitfit(exclude=".*k_proj/bias")
        ),
        "dora_bitfit": peft.chain(peft.dora(rank=4), peft.bitfit()),
        "vera_bitfit": peft.chain(peft.vera(["v_proj"], rank=4), peft.bitfit(".*v_proj/bias")),
        "adalora_bitfit": peft.chain(peft.adalora(["q_proj"], steps=9, init_rank=4, target_rank=2), peft.bitfit(".*q_proj/bias")),
        "oft_bitfit": peft.chain(peft.oft(block_size=4), peft.bitfit()),
        "boft_bitfit": peft.chain(peft.boft(["q_proj"], block_size=4), peft.bitfit(".*q_proj/bias")),
        "miss_bitfit": peft.chain(peft.miss(["q_proj"], rank=4), peft.bitfit(".*q_proj/bias")),
        "randlora_bitfit": peft.chain(peft.randlora(["q_proj"], rank=4), peft.bitfit(".*q_proj/bias")),
    }
    checkpoint = hf_folder.read(BASE)
    model = models.build(models.config_from_hf(checkpoint.config))
    params = load.load_params(checkpoint, model)

    def logits(tree):
        return np.asarray(model.unembed(model.head(tree), model.apply(tree, jnp.asarray(TOKENS))[0]))[0]

    np.save(folder / "base.npy", logits(params))
    for name, method in made.items():
        frozen, trained = method.init(jax.random.key(1), params)
        keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(trained))))
        trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), trained)  # noqa: B023
        hf_peft.save_adapter(folder / name, model, trained, method.plan(params), base_name=str(BASE), frozen=frozen)
        np.save(folder / f"{name}.npy", logits(method.attach(frozen, trained)))


def check(folder):
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file

    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}, float32")
    worst, untouched = 0.0, np.load(folder / "base.npy")
    for golden in sorted(set(folder.glob("*.npy")) - {folder / "base.npy"}):
        head = golden.stem.endswith("head")
        auto, labels = (
            (transformers.AutoModelForSequenceClassification, {"num_labels": 1}) if head else (transformers.AutoModelForCausalLM, {})
        )
        base = auto.from_pretrained(BASE, dtype=torch.float32, **labels)
        model, wanted = peft.PeftModel.from_pretrained(base, folder / golden.stem).eval(), np.load(golden)
        with torch.no_grad():
            hidden = model.base_model.model.model(torch.tensor(TOKENS, dtype=torch.long)).last_hidden_state[0]
            logits = (hidden @ base.get_input_embeddings().weight.T).numpy()  # the head is the embedding
        with tempfile.TemporaryDirectory() as again:
            model.save_pretrained(again, save_embedding_layers=False)
            ours, theirs = (load_file(pathlib.Path(place) / "adapter_model.safetensors") for place in (folder / golden.stem, again))
        theirs = {key: x for key, x in theirs.items() if ".modules_to_save." not in key and ".original_module." not in key}  # copies
        same = all(torch.equal(x, theirs[key]) for key, x in ours.items()) and {*theirs} - {*ours} <= set(filter(is_copy, theirs))
        error, distance = (np.abs(wanted - other).max() / np.abs(wanted).max() for other in (logits, untouched))
        print(f"{golden.stem:20} {error:.1e} (moved by {distance:.2f}) {'same tensors' if same else 'OTHER TENSORS'}")
        worst = max(worst, error if same else np.inf)
    sys.exit(int(worst > 1e-5))


def is_copy(name):
    """Return whether a tensor is RandLoRA's basis, which PEFT writes under each module again."""
    return "_proj.randlora_" in name


if __name__ == "__main__":
    command, where = sys.argv[1:]
    {"write": write, "check": check}[command](pathlib.Path(where))
