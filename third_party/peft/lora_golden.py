"""Make a golden PEFT adapter: a tiny random Llama, LoRA with per-module and per-layer ranks and alphas, a saved norm, and the logits.

    python third_party/peft/lora_golden.py

Reference: peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), seed 0. Writes tests/goldens/peft/{base,plain,rich,rslora}: the base in
Hugging Face's form, three adapters in PEFT's, each with `logits.npy` of TOKENS.
"""

import pathlib
import shutil

import numpy as np
import peft
import torch
import transformers

GOLDENS = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "peft"
TOKENS = (np.arange(10) * 11 % 61)[None]
CONFIG = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rich": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"gate_proj": 2, "layers.1.self_attn.q_proj": 3, "layers.2.mlp.up_proj": 8},
        "alpha_pattern": {"down_proj": 5, "layers.0.self_attn.o_proj": 1},
        "modules_to_save": ["model.norm", "input_layernorm"],
    },
    "rslora": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["k_proj", "lm_head", "embed_tokens"],
    },
}


@torch.no_grad()
def randomize(model, scale):
    """Give every adapted or saved parameter a random value: PEFT's B starts at zero, and a saved norm at the base's."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.add_(torch.randn_like(parameter) * scale)


@torch.no_grad()
def main():
    shutil.rmtree(GOLDENS, ignore_errors=True)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, initializer_range=0.3, attn_implementation="eager")
    base = transformers.LlamaForCausalLM(config).float().eval()
    for name, parameter in base.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    base.save_pretrained(GOLDENS / "base")
    np.save(GOLDENS / "base" / "logits.npy", base(torch.tensor(TOKENS)).logits[0].numpy())
    for name, options in ADAPTERS.items():
        fresh = transformers.LlamaForCausalLM.from_pretrained(GOLDENS / "base", attn_implementation="eager").float().eval()
        model = peft.get_peft_model(fresh, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        randomize(model, 0.2)
        model.save_pretrained(GOLDENS / name, save_embedding_layers=False)
        np.save(GOLDENS / name / "logits.npy", model(torch.tensor(TOKENS)).logits[0].numpy())
        config = GOLDENS / name / "adapter_config.json"
        config.write_text(config.read_text().replace(str(GOLDENS / "base"), "base"))
        (GOLDENS / name / "README.md").unlink()


if __name__ == "__main__":
    main()
