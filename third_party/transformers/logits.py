"""Writes `tests/goldens/logits_<case>.safetensors`: logits of transformers for tiny random models of each family, with their weights.

Made with transformers 5.23.0 on torch 2.13.0 (CPU, float32, eager attention). Run: `python third_party/transformers/logits.py [CASE…]`.
Each file holds the Hugging Face state dict, `tokens` int32 [b, t], `logits` float32 [b, t, v], and in its metadata the `config.json`, the
versions and the seed. Weights are drawn wide enough that every option of the config moves the logits.
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

SEED = 0
TOKENS = (2, 24)
OUT = pathlib.Path(__file__).parents[2] / "tests" / "goldens"

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA = {**SMALL, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": ("Llama", {**SMALL, "rope_parameters": LLAMA3_ROPE}),
    "llama_biased": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**SMALL, "tie_word_embeddings": True}),
    "qwen2_sliding": ("Qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2_yarn": ("Qwen2", {**SMALL, "num_hidden_layers": 1, "tie_word_embeddings": True, "rope_parameters": YARN_ROPE}),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 16}),
    "gemma2": ("Gemma2", {**GEMMA, "num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
    ),
}


def write(case: str) -> None:
    family, options = CASES[case]
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**options, max_position_embeddings=128, attn_implementation="eager", pad_token_id=None)
    torch.manual_seed(SEED)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    tokens = torch.randint(0, config.vocab_size, TOKENS)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    metadata = {
        "config": json.dumps(json.loads(config.to_json_string())),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seed": str(SEED),
    }
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    path = OUT / f"logits_{case}.safetensors"
    save_file({**tensors, "tokens": tokens.to(torch.int32), "logits": logits}, path, metadata=metadata)
    print(f"{path.name}: {path.stat().st_size:,} bytes, largest logit {logits.abs().max():.2f}")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for case in sys.argv[1:] or CASES:
        write(case)
