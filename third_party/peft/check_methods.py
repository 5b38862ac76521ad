"""Does PEFT compute from the folder of every method what we compute? Two halves, for two environments:

    python third_party/peft/check_methods.py write DIR     # with ftjax
    python third_party/peft/check_methods.py check DIR     # with torch, transformers and peft

`write` puts each method of `peft.FORMATS` and `peft.SOFT_PROMPTS`, away from its start, on one tiny random Llama; `check` prints the
largest difference of PEFT's logits relative to the largest logit, and how far the adapter moved them.

It printed:

    transformers 5.23.0, peft 0.21.2, torch 2.13.0+cpu, float32
    adalora            1.5e-07 (moved by 0.11)
    boft               3.0e-07 (moved by 0.11)
    delta_lora         4.3e-07 (moved by 1.26)
    dora               2.2e-07 (moved by 0.33)
    hira               1.5e-07 (moved by 0.01)
    ia3                1.5e-07 (moved by 0.04)
    loha               1.5e-07 (moved by 0.25)
    lokr               2.0e-07 (moved by 0.34)
    lora               4.8e-07 (moved by 1.93)
    lora_combined      1.7e-07 (moved by 0.42)
    lora_fa            3.5e-07 (moved by 1.25)
    lora_olora_rslora  4.8e-07 (moved by 0.23)
    lora_pissa         4.2e-07 (moved by 1.15)
    miss               4.0e-07 (moved by 1.87)
    oft                1.9e-07 (moved by 0.17)
    p_tuning           1.5e-07 (moved by 0.42)
    prefix_tuning      1.5e-07 (moved by 0.25)
    prefix_tuning_mlp  1.9e-07 (moved by 0.84)
    prompt_tuning      1.5e-07 (moved by 0.26)
    randlora           2.7e-06 (moved by 2.25)
    relora             8.5e-07 (moved by 1.32)
    shira              2.8e-07 (moved by 1.18)
    vera               1.5e-07 (moved by 0.09)
"""

import pathlib
import sys
from functools import partial

import numpy as np

TOKENS = (np.arange(16) * 37 % 257)[None].astype(np.int32)


def write(folder):
    import jax
    import jax.numpy as jnp

    from ftjax import models, peft
    from ftjax.hf import export
    from ftjax.hf import peft as hf_peft

    made = {
        "lora": partial(peft.lora, rank=4, alpha=8),
        "lora_pissa": partial(peft.lora, rank=4, alpha=8, init="pissa"),
        "lora_olora_rslora": partial(peft.lora, ["q_proj", "down_proj"], rank=4, alpha=8, init="olora", rslora=True),
        "lora_combined": None,
        "dora": partial(peft.dora, rank=4, alpha=8),
        "lora_fa": partial(peft.lora_fa, rank=4, alpha=8),
        "ia3": peft.ia3,
        "vera": partial(peft.vera, rank=8),
        "hira": partial(peft.hira, rank=4),
        "loha": partial(peft.loha, rank=4),
        "lokr": partial(peft.lokr, rank=2),
        "miss": partial(peft.miss, rank=4),
        "adalora": partial(peft.adalora, steps=9, init_rank=4, target_rank=2, alpha=8),
        "delta_lora": partial(peft.delta_lora, rank=4, alpha=8, start_steps=3),
        "relora": partial(peft.relora, rank=2, alpha=4, restarts=2),
        "shira": partial(peft.shira, rank=2),
        "randlora": partial(peft.randlora, rank=4),
        "oft": partial(peft.oft, block_size=4),
        "boft": partial(peft.boft, block_size=4),
        "prompt_tuning": partial(peft.prompt_tuning, 5),
        "p_tuning": partial(peft.p_tuning, 5, hidden_size=7),
        "prefix_tuning": partial(peft.prefix_tuning, 5),
        "prefix_tuning_mlp": partial(peft.prefix_tuning, 5, hidden_size=7),
    }
    assert {*peft.FORMATS, *peft.SOFT_PROMPTS} <= set(made)
    model = models.build(models.preset("tiny-llama"))
    params = model.init(jax.random.key(0))
    export.export_model(folder / "base", model, params, None)

    def logits(tree):
        return np.asarray(model.unembed(model.head(tree), model.apply(tree, jnp.asarray(TOKENS))[0]))[0]

    def moved(method):
        frozen, trained = method.init(jax.random.key(1), params)
        keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(trained))))
        return frozen, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), trained)

    np.save(folder / "base.npy", logits(params))
    for name, make in made.items():
        if make is None:
            two = [(method, *moved(method)) for method in (peft.lora(rank=2), peft.lora(["v_proj"], rank=3, alpha=6))]
            method, trained = peft.combine([method.attach(frozen, trained) for method, frozen, trained in two], [1.0, -0.5])
            frozen = params
        else:
            method = make()
            frozen, trained = moved(method)
        hf_peft.save_adapter(folder / name, model, trained, method.plan(params), base_name=str(folder / "base"), frozen=frozen)
        np.save(folder / f"{name}.npy", logits(method.attach(frozen, trained)))


def check(folder):
    import peft
    import torch
    import transformers

    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}, float32")
    worst, untouched = 0.0, np.load(folder / "base.npy")
    for golden in sorted(folder.glob("*.npy")):
        if golden.stem == "base":
            continue
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        model, wanted = peft.PeftModel.from_pretrained(base, folder / golden.stem).eval(), np.load(golden)
        with torch.no_grad():
            logits = model(torch.tensor(TOKENS, dtype=torch.long)).logits[0, -TOKENS.shape[1] :].numpy()  # behind a prompt's
        error, distance = (np.abs(wanted - other).max() / np.abs(wanted).max() for other in (logits, untouched))
        print(f"{golden.stem:18} {error:.1e} (moved by {distance:.2f})")
        worst = max(worst, error)
    sys.exit(int(worst > 1e-4))


if __name__ == "__main__":
    command, where = sys.argv[1:]
    {"write": write, "check": check}[command](pathlib.Path(where))
