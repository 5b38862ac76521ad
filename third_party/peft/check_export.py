"""Do transformers and PEFT compute from our files what we compute? Two halves, for two environments:

    python third_party/peft/check_export.py write DIR [GGUF]     # with ftjax
    python third_party/peft/check_export.py check DIR            # with torch, transformers and peft

`write` exports, for a tiny random model of each family (and SmolLM2 from its GGUF file), the base, a LoRA of mixed ranks with trained
norms over it, and the merged model, with our logits. `check` prints the largest relative difference of theirs.

It printed:

    transformers 5.23.0, peft 0.21.2, torch 2.13.0+cpu, float32
    smollm2        base 9.1e-06 merged 5.3e-05 adapter 1.8e-05 same tokens
    tiny-gemma2    base 4.1e-07 merged 8.0e-07 adapter 5.2e-07 same tokens
    tiny-gemma3    base 6.6e-07 merged 1.3e-06 adapter 1.2e-06 same tokens
    tiny-llama     base 1.9e-07 merged 2.6e-07 adapter 2.1e-07 same tokens
    tiny-mistral   base 3.0e-07 merged 2.9e-07 adapter 2.9e-07 same tokens
    tiny-qwen2     base 1.9e-07 merged 2.6e-07 adapter 2.1e-07 same tokens
    tiny-qwen3     base 3.7e-07 merged 4.7e-07 adapter 3.7e-07 same tokens
"""

import json
import pathlib
import sys

import numpy as np

TOKENS = (np.arange(16) * 37 % 257)[None].astype(np.int32)
TEXT = "Round  trip:\n\t12345 naïve 猫 <|im_end|>"


def write(folder, gguf):
    import jax
    import jax.numpy as jnp

    from ftjax import models, peft
    from ftjax.hf import export, load, tokenizer
    from ftjax.hf import peft as hf_peft

    def export_all(name, model, params, tokens):
        method = peft.chain(peft.lora(rank=4, alpha=8, rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 5}), peft.full("norms"))
        frozen, trained = method.init(jax.random.key(1), params)
        keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(trained))))
        trained = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), trained)
        adapted = method.attach(frozen, trained)
        target = folder / name
        export.export_model(target / "base", model, params, tokens)
        export.export_model(target / "merged", model, adapted, tokens, shard_bytes=60_000 if "tiny" in name else 100_000_000)
        hf_peft.save_adapter(target / "adapter", model, trained, method.plan(params), base_name=str(target / "base"))
        for kind, tree in (("base", params), ("adapter", adapted), ("merged", adapted)):
            hidden, _ = jax.jit(model.apply)(tree, jnp.asarray(TOKENS))
            np.save(target / f"{kind}.npy", np.asarray(model.unembed(model.head(tree), hidden))[0])
        (target / "ids.json").write_text(json.dumps(tokens(TEXT)["input_ids"]))

    for name in sorted(models.PRESETS):
        if name.startswith("tiny-"):
            model = models.build(models.preset(name))
            export_all(name, model, model.init(jax.random.key(0)), tokenizer.byte_tokenizer())
    if gguf:
        model, params, tokens, _ = load.load(gguf)
        export_all("smollm2", model, params, tokens)


def check(folder):
    import peft
    import torch
    import transformers

    def difference(model, golden):
        with torch.no_grad():
            logits = model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits[0].numpy()
        return np.abs(logits - golden).max() / np.abs(golden).max()

    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}, float32")
    worst = 0.0
    for target in sorted(path for path in folder.iterdir() if path.is_dir()):
        row = {}
        for kind in ("base", "merged"):
            model = transformers.AutoModelForCausalLM.from_pretrained(target / kind, dtype=torch.float32)
            row[kind] = difference(model, np.load(target / f"{kind}.npy"))
        base = transformers.AutoModelForCausalLM.from_pretrained(target / "base", dtype=torch.float32)
        row["adapter"] = difference(peft.PeftModel.from_pretrained(base, target / "adapter"), np.load(target / "adapter.npy"))
        same_ids = transformers.AutoTokenizer.from_pretrained(target / "merged")(TEXT)["input_ids"] == json.loads(
            (target / "ids.json").read_text()
        )
        print(f"{target.name:14}", *(f"{kind} {value:.1e}" for kind, value in row.items()), "same tokens" if same_ids else "OTHER TOKENS")
        worst = max(worst, *row.values()) if same_ids else float("inf")
    sys.exit(int(worst > 1e-4))


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    write(pathlib.Path(where), *rest or [None]) if command == "write" else check(pathlib.Path(where))
