"""Make golden PEFT folders of adapters with `bias="all"` and `"…_only"`: a tiny random Qwen2, whose q, k and v have biases.

    python third_party/peft/bias_golden.py

Reference: peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), seed 0. Writes tests/goldens/peft/base_qwen2, the base in Hugging Face's
form, and tests/goldens/peft/<name> of each of ADAPTERS, with what folder_golden.py says of it.
"""

import shutil

import peft
import torch
import transformers
from folder_golden import make
from lora_golden import CONFIG, GOLDENS

BASE = "base_qwen2"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "tie_word_embeddings": True}
ADAPTERS = {
    "lora_bias_all": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], bias="all"),
    "lora_bias_saved": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["k_proj"], bias="all"),
    "lora_bias_only": peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj", "o_proj"], layers_to_transform=[1], bias="lora_only"
    ),
    "dora_bias_only": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], use_dora=True, bias="lora_only"),
    "oft_bias_only": peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=4, target_modules=["q_proj", "o_proj"], bias="oft_only"),
}


@torch.no_grad()
def make_base():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**CONFIG | SIZES, initializer_range=0.3, attn_implementation="eager")
    base = transformers.Qwen2ForCausalLM(config).float().eval()
    for name, parameter in base.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    shutil.rmtree(GOLDENS / BASE, ignore_errors=True)
    base.save_pretrained(GOLDENS / BASE)


if __name__ == "__main__":
    make_base()
    for name, config in ADAPTERS.items():
        make(name, config, on=BASE)
