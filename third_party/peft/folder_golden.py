"""Make golden PEFT folders of methods beyond LoRA over the base of lora_golden.py, with logits, gradients and merged weights.

    python third_party/peft/folder_golden.py [NAME …]

Reference: peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), seed 0. Writes tests/goldens/peft/<name>: the adapter as PEFT saves it,
`logits.npy` of TOKENS, and `check.safetensors` with `grad|<name in the folder>` of loss = Σ G ⊙ logits for every trainable tensor and
`merged|<module>` for the targeted modules of layer 0 and outside the layers.
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
    "dora": peft.LoraConfig(
        task_type="CAUSAL_LM",
        use_dora=True,
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"],
        rank_pattern={"q_proj": 3},
    ),
    "dora_layers": peft.LoraConfig(
        task_type="CAUSAL_LM", use_dora=True, r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], layers_to_transform=[2]
    ),
    "dora_modules": peft.LoraConfig(
        task_type="CAUSAL_LM",
        use_dora=True,
        r=2,
        target_modules=["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"],
    ),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"], r=5),
    "hira": peft.HiraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=3),
    "loha": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=3, alpha=6),
    "lokr": peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2, alpha=3, decompose_factor=4),
    "lokr_both": peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=1, alpha=3, decompose_both=True, decompose_factor=4),
    "ln_tuning": peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "ln_tuning_some": peft.LNTuningConfig(
        task_type="CAUSAL_LM",
        target_modules=["model.layers.0.input_layernorm", "model.layers.2.input_layernorm"],
        modules_to_save=["lm_head"],
    ),
    "miss": peft.MissConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4),
    "miss_bat": peft.MissConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], r=4, init_weights="bat"),
    "miss_mini": peft.MissConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, mini_r=3, init_weights="mini"),
    "oft": peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], oft_block_size=4),
    "oft_exact": peft.OFTConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4, use_cayley_neumann=False, block_share=True
    ),
    "boft": peft.BOFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], boft_block_size=4),
    "randlora": peft.RandLoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], r=6, randlora_alpha=12),
    "adalora": peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_r=3, target_r=2, lora_alpha=6, total_step=50
    ),
    "adalora_pruned": peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_r=3, target_r=2, total_step=50
    ),
    "tokens": peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[44, 5, 22]),
    "lora_tokens": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, trainable_token_indices=[16, 3, 0]),
    "shira": peft.ShiraConfig(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], r=2, random_seed=7),
    "vera_drawn": peft.VeraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=5, save_projection=False, projection_prng_key=3
    ),
}


def targets(model):
    """Return the modules that an adapter rides on, by the base's name of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    return {name.removesuffix(".token_adapter"): module for name, module in found.items()}


def prune(model):
    """Take some triplets out as PEFT's allocator does: zero, and not in the file. One module loses all."""
    names = sorted(name for name, _ in model.named_parameters() if "lora_E" in name)
    pattern = {name.removeprefix("base_model.model."): [n % 3 == 0, n % 2 == 1, n > 3] for n, name in enumerate(names)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                kept = torch.tensor(pattern[name.removeprefix("base_model.model.")])[:, None]
                parameter.masked_fill_(~kept, 0.0)
    model.peft_config["default"].rank_pattern = pattern


def make(name, config, *, on="base"):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDENS / on, attn_implementation="eager").float().eval()
    model = peft.get_peft_model(base, config).eval()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if name == "adalora_pruned":
        prune(model)
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_embedding_layers=False)
    logits = model(torch.tensor(TOKENS)).logits[0]
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    np.save(folder / "logits.npy", logits.detach().numpy())
    found = {"G": weight}
    for key, parameter in trained.items():
        short = key.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        found[f"grad|{short}"] = parameter.grad
    modules = [key for key in targets(model) if "layers." not in key or "layers.0." in key]
    merged = model.merge_and_unload()
    found |= {f"merged|{key}": merged.get_submodule(key).weight.detach() for key in modules}
    save_file({key: tensor.contiguous().clone() for key, tensor in found.items()}, folder / "check.safetensors")
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace(str(GOLDENS / on), on))
    (folder / "README.md").unlink()


if __name__ == "__main__":
    for name in sys.argv[1:] or ADAPTERS:
        make(name, ADAPTERS[name])
