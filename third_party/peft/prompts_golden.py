"""Make golden PEFT folders of soft prompts over the base of lora_golden.py, with logits and the gradients of what PEFT trains.

    python third_party/peft/prompts_golden.py [NAME …]

Reference: peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), seed 0. Writes tests/goldens/peft/<name>: the adapter as PEFT saves it,
`logits.npy` of TOKENS, and `check.safetensors` with `parameter|<name in the prompt encoder>` and `gradient|…` of loss = Σ G ⊙ logits: a
folder holds the encoder's output alone.
"""

import shutil
import sys

import numpy as np
import peft
import torch
import transformers
from lora_golden import GOLDENS, TOKENS
from safetensors.torch import save_file

ADAPTERS = {
    "prompt_tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=5),
    "p_tuning_lstm": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=5, encoder_reparameterization_type="LSTM"
    ),
    "prefix_tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix_tuning_mlp": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=5
    ),
}


def make(name, config):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM.from_pretrained(GOLDENS / "base", attn_implementation="eager").float().eval()
    model = peft.get_peft_model(base, config).eval()
    encoder = model.prompt_encoder["default"]
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_embedding_layers=False)
    logits = model(torch.tensor(TOKENS)).logits[0, -TOKENS.shape[1] :]
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    np.save(folder / "logits.npy", logits.detach().numpy())
    found = {"G": weight}
    for key, parameter in encoder.named_parameters():
        found |= {f"parameter|{key}": parameter.detach(), f"gradient|{key}": parameter.grad}
    save_file({key: tensor.contiguous().clone() for key, tensor in found.items()}, folder / "check.safetensors")
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace(str(GOLDENS / "base"), "base"))
    (folder / "README.md").unlink()


if __name__ == "__main__":
    for name in sys.argv[1:] or ADAPTERS:
        make(name, ADAPTERS[name])
