"""Writes `tests/goldens/rope.json`: frequencies and attention factors of transformers' `ROPE_INIT_FUNCTIONS`, each with its config.

Made with transformers 5.23.0 on torch 2.13.0 (CPU, float32). Run: `python third_party/transformers/rope_golden.py`.
"""

import json
import pathlib

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

OUT = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "rope.json"
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES = {
    "linear": ({"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}, 64),
    "llama 3.1": ({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}, 128),
    "yarn of qwen 2.5": (YARN, 128),
    "yarn of narrow heads": (YARN | {"rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 4096}, 64),
    "yarn without an original context": ({name: YARN[name] for name in YARN if name != "original_max_position_embeddings"}, 128),
    "yarn with its own bounds": (YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, 128),
    "yarn of gpt-oss": (YARN | {"rope_theta": 150000.0, "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}, 64),
    "yarn of deepseek v3": (YARN | {"rope_theta": 1e4, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}, 64),
    "yarn with two scales": (YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}, 64),
    "yarn with one scale": (YARN | {"mscale": 0.707}, 64),
    "yarn with an attention factor": (YARN | {"attention_factor": 1.25}, 64),
    "yarn of a context so short that the bounds meet": (YARN | {"original_max_position_embeddings": 8}, 8),
}


def main() -> None:
    found = {}
    for name, (parameters, head_dim) in CASES.items():
        given = dict(parameters)
        config = transformers.LlamaConfig(
            hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=32768, rope_parameters=parameters
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, torch.device("cpu"))
        found[name] = {"rope": given, "head_dim": head_dim, "frequencies": frequencies.tolist(), "attention_factor": factor}
    about = {"transformers": transformers.__version__, "torch": torch.__version__}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(case)}" for name, case in found.items())
    OUT.write_text(f'{{\n "made with": {json.dumps(about)},\n{lines}\n}}\n')
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
