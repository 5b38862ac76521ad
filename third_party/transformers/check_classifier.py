"""Is our value head transformers' classifier, and theirs ours? Three steps, for two environments:

    python third_party/transformers/check_classifier.py write DIR     # with ftjax: models with a value head, and their values
    python third_party/transformers/check_classifier.py check DIR     # with torch and transformers: logits of ours; saves them again
    python third_party/transformers/check_classifier.py read DIR      # with ftjax: values of theirs

Both print the largest difference at the last token of each row, relative to the largest value, rows of unequal length padded.

The first printed

    transformers 5.23.0, torch 2.13.0+cpu, float32
    tiny-gemma2    9.9e-07
    tiny-gemma3    2.2e-07
    tiny-llama     4.1e-07
    tiny-mistral   3.8e-07
    tiny-qwen2     2.7e-07
    tiny-qwen3     1.2e-06

and the second 0.0e+00 for all.
"""

import pathlib
import sys

import numpy as np

PAD, ROWS = 258, 3
LENGTHS = (9, 14, 5)
TOKENS = np.stack([np.where(np.arange(14) < n, (np.arange(14) * 37 + 11 * n) % 257, PAD) for n in LENGTHS]).astype(np.int32)


def values_of(model, params):
    import jax.numpy as jnp

    from ftjax import scoring
    from ftjax.types import Batch

    real = (np.arange(14) < np.array(LENGTHS)[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(14, dtype=np.int32), real.shape)
    batch = Batch(*(jnp.asarray(x) for x in (TOKENS, real * (positions > 0).astype(np.float32), positions, real)))
    values = np.asarray(scoring.score(model, params, batch, outputs=("values",)).values)
    return values[np.arange(ROWS), np.array(LENGTHS) - 1]


def write(folder):
    import dataclasses

    import jax

    from ftjax import models, peft
    from ftjax.hf import export

    for name in sorted(models.PRESETS):
        if name.startswith("tiny-"):
            model = models.build(dataclasses.replace(models.preset(name), pad_token_id=PAD))
            method = peft.value_head(init="normal")
            params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), model.init(jax.random.key(0)))
            params = method.attach(*method.init(jax.random.key(1), params))
            export.export_model(folder / name / "ours", model, params, None)
            np.save(folder / name / "values.npy", values_of(model, params))


def check(folder):
    import torch
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float32")

    def logits(target):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(target / "ours", dtype=torch.float32).eval()
        with torch.no_grad():
            found = model(torch.tensor(TOKENS, dtype=torch.long), attention_mask=torch.tensor(TOKENS != PAD)).logits[:, 0].numpy()
        model.save_pretrained(target / "theirs")
        return found

    report(folder, logits)


def read(folder):
    from ftjax import models
    from ftjax.hf import folder as hf_folder
    from ftjax.hf import load

    def values(target):
        checkpoint = hf_folder.read(target / "theirs")
        model = models.build(load.config_of(checkpoint))
        return values_of(model, load.load_params(checkpoint, model))

    report(folder, values)


def report(folder, function):
    worst = 0.0
    for target in sorted(path for path in folder.iterdir() if path.is_dir()):
        golden = np.load(target / "values.npy")
        difference = np.abs(function(target) - golden).max() / np.abs(golden).max()
        print(f"{target.name:14} {difference:.1e}")
        worst = max(worst, difference)
    sys.exit(int(worst > 1e-4))


if __name__ == "__main__":
    {"write": write, "check": check, "read": read}[sys.argv[1]](pathlib.Path(sys.argv[2]))
