"""Make the golden of beam search: what transformers finds with the tiny Llama of `tests/goldens/logits_llama.safetensors`.

    python third_party/transformers/beams.py

Reference: transformers 5.23.0, torch 2.13.0 (CPU, float32, `early_stopping=False`). Writes tests/goldens/beams.json: the prompts, and for
each search its settings and, of each prompt by itself, the beams with their scores, the best first. `margin` is the least gap between two
scores of a prompt: where it is far above float32's rounding, another implementation must find the same order.
"""

import json
import pathlib

import safetensors
import torch
import transformers

GOLDENS = pathlib.Path(__file__).parents[2] / "tests" / "goldens"
LENGTHS = (4, 7, 5, 9, 3, 6)
MAX_TOKENS = 10
# Beams and ends; with many ends some searches are over after two tokens, and others go on to the last.
FORMS = ((2, 12), (4, 2), (4, 24))
LENGTH_PENALTIES = (1.0, 0.0, 2.0, -1.0)


def load():
    """Return the model and the prompts: beginnings of the golden's rows, and of what follows in them."""
    with safetensors.safe_open(GOLDENS / "logits_llama.safetensors", framework="pt") as file:
        config = transformers.LlamaConfig(**json.loads(file.metadata()["config"]), attn_implementation="eager")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    tokens = tensors.pop("tokens").tolist()
    del tensors["logits"]
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(tensors)
    return model, [tokens[n % 2][n : n + length] for n, length in enumerate(LENGTHS)]


@torch.no_grad()
def search(model, prompt, ends, *, num_beams, length_penalty):
    tokens = torch.tensor([prompt])
    found = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
        early_stopping=False,
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=model.config.vocab_size,  # no token, so that it is seen where a beam ends
        output_scores=True,
        return_dict_in_generate=True,
    )
    beams = [[token for token in row if token < model.config.vocab_size] for row in found.sequences[:, len(prompt) :].tolist()]
    return beams, [round(score, 6) for score in found.sequences_scores.tolist()]


def main():
    model, prompts = load()
    searches = []
    for num_beams, num_ends in FORMS:
        ends = [(5 * n + 3) % 64 for n in range(num_ends)]
        for length_penalty in LENGTH_PENALTIES:
            options = {"num_beams": num_beams, "length_penalty": length_penalty}
            beams, scores = zip(*(search(model, prompt, ends, **options) for prompt in prompts), strict=True)
            margin = min(one - two for row in scores for one, two in zip(row[:-1], row[1:], strict=True))
            print(f"{num_beams} beams, {num_ends} ends, length penalty {length_penalty:4}: margin {margin:.1e}")
            searches.append({**options, "eos_ids": ends, "beams": beams, "scores": scores, "margin": margin})
    golden = {"prompts": prompts, "max_tokens": MAX_TOKENS, "searches": searches}
    (GOLDENS / "beams.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
