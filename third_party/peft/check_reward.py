"""Is our reward model transformers' classifier and PEFT's SEQ_CLS adapter, and theirs ours? Three steps, for two environments:

    python third_party/peft/check_reward.py golden            # with torch and peft: tests/goldens/peft/classifier, over the base beside it
    python third_party/peft/check_reward.py write DIR         # with ftjax: LoRA and a value head on a tiny model, its rewards of texts
    python third_party/peft/check_reward.py check DIR         # with torch, transformers and peft: their rewards of the same texts

`write` leaves the base, the adapter and the merged classifier with their tokenizers. `check` pads the texts, some of which end with the
EOS, by the tokenizer of each folder, and prints the largest difference relative to the largest reward:

    transformers 5.23.0, peft 0.21.2, torch 2.13.0+cpu, float32
    classifier  7.5e-07
    adapter     5.5e-07
"""

import json
import pathlib
import shutil
import sys

import numpy as np

GOLDENS = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "peft"
TOKENS = np.arange(10)[None] * 11 % 61  # of lora_golden.py
TEXTS = ["<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>", "a", "one two three<|im_end|>\n", "end<|im_end|>"]


def golden():
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    base = transformers.LlamaForSequenceClassification.from_pretrained(GOLDENS / "base", num_labels=1, attn_implementation="eager").float()
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        logits = model(torch.tensor(TOKENS)).logits[:, 0].numpy()
    folder = GOLDENS / "classifier"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    np.save(folder / "logits.npy", logits)
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace(str(GOLDENS / "base"), "base"))
    (folder / "README.md").unlink()


def write(folder):
    import jax
    import jax.numpy as jnp

    from ftjax import losses, models, peft, scoring
    from ftjax.hf import export, tokenizer
    from ftjax.hf import peft as hf_peft
    from ftjax.types import Batch

    model = models.build(models.preset("tiny-llama"))
    tokens, params = tokenizer.byte_tokenizer(), model.init(jax.random.key(0))
    tokens.pad_token = tokens.eos_token  # as SmolLM2's
    method = peft.chain(peft.lora("all-linear", rank=4, alpha=8), peft.value_head(init="normal", bias=False))
    frozen, trained = method.init(jax.random.key(1), params)
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), trained)
    adapted = method.attach(frozen, trained)
    export.export_model(folder / "base", model, params, tokens)
    export.export_model(folder / "classifier", model, adapted, tokens)
    hf_peft.save_adapter(folder / "adapter", model, trained, method.plan(params), base_name=str(folder / "base"), tokenizer=tokens)
    rewards = []
    for text in TEXTS:
        ids = jnp.asarray(tokens(text)["input_ids"], jnp.int32)[None]
        real = jnp.ones_like(ids)
        batch = Batch(ids, real.astype(jnp.float32), jnp.arange(ids.shape[1])[None], real)
        rewards.append(float(losses.response_rewards(scoring.score(model, adapted, batch, outputs=("values",)), batch)[0]))
    (folder / "rewards.json").write_text(json.dumps(rewards))


def check(folder):
    import peft
    import torch
    import transformers

    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}, float32")
    ours, worst = np.array(json.loads((folder / "rewards.json").read_text())), 0.0
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "classifier", dtype=torch.float32)
    tokens = transformers.AutoTokenizer.from_pretrained(folder / "classifier")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = tokens.pad_token_id
    for name, model in (("classifier", classifier), ("adapter", peft.PeftModel.from_pretrained(base, folder / "adapter"))):
        with torch.no_grad():
            found = model.eval()(**tokens(TEXTS, padding=True, return_tensors="pt")).logits[:, 0].numpy()
        difference = np.abs(found - ours).max() / np.abs(ours).max()
        print(f"{name:11} {difference:.1e}")
        worst = max(worst, difference)
    sys.exit(int(worst > 1e-5))


if __name__ == "__main__":
    {"golden": golden, "write": write, "check": check}[sys.argv[1]](*map(pathlib.Path, sys.argv[2:]))
