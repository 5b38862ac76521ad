"""Does PEFT compute from the folder of every method what we compute? Two halves, for two environments:

    python third_party/peft/check_methods.py write DIR [MODEL [METHOD …]]     # with ftjax; all methods on a tiny random Llama
    python third_party/peft/check_methods.py check DIR [DTYPE [METHOD …]]     # with torch, transformers and peft; in float32

`write` puts each method of `peft.FORMATS` and `peft.SOFT_PROMPTS`, trained tokens and the starts of LoRA that read weights or batches on
the base, away from where it starts, reads the folder back, and keeps what that gives: logits, the gradient of the mean loss of the tokens
by every trained tensor (as a folder of the same form, so under PEFT's names), and the merged matrices of the first, middle and last layer.
`check` prints PEFT's largest difference in each: of the logits relative to the largest logit (and how far the adapter moved them), of a
gradient to the largest entry of its tensor, of a merged weight to the largest change of its matrix.

LoftQ's base is written dense, as what its codes stand for: so the folder needs no bitsandbytes here. A prompt is not merged.

It printed, on the tiny Llama:

    transformers 5.23.0, peft 0.21.2, torch 2.13.0+cpu, float32
                         logits  (moved by)  gradients  merged
    adalora              1.7e-07 (0.11)      1.2e-06    1.6e-07
    boft                 1.5e-07 (0.13)      7.8e-07    8.0e-07
    delta_lora           4.8e-07 (3.23)      2.6e-06    0.0e+00
    dora                 2.6e-07 (0.81)      1.5e-06    1.7e-07
    hira                 1.9e-07 (0.02)      1.1e-06    0.0e+00
    ia3                  1.7e-07 (0.05)      6.1e-07    0.0e+00
    loftq                2.3e-07 (0.66)      1.1e-06    0.0e+00
    loha                 1.5e-07 (0.13)      9.0e-07    0.0e+00
    lokr                 1.7e-07 (0.61)      9.9e-07    1.4e-07
    lora                 5.7e-07 (2.21)      2.0e-06    0.0e+00
    lora_combined        3.3e-07 (0.84)      8.2e-07    0.0e+00
    lora_corda           3.2e-07 (1.12)      8.0e-07    0.0e+00
    lora_corda_knowledge 5.3e-07 (2.14)      1.3e-06    0.0e+00
    lora_eva             3.4e-07 (1.74)      1.7e-06    0.0e+00
    lora_fa              6.4e-07 (1.42)      1.6e-06    0.0e+00
    lora_ga              3.2e-07 (1.59)      1.2e-06    0.0e+00
    lora_layers          4.7e-07 (1.98)      6.4e-07    0.0e+00
    lora_modules_to_save 4.4e-07 (1.94)      4.3e-06    0.0e+00
    lora_olora_rslora    5.5e-07 (2.04)      1.7e-06    0.0e+00
    lora_patterns        4.2e-07 (2.85)      3.4e-06    0.0e+00
    lora_pissa           4.9e-07 (0.93)      9.5e-07    0.0e+00
    lora_tokens          2.9e-07 (0.79)      4.5e-06    0.0e+00
    miss                 2.9e-07 (2.10)      2.0e-06    0.0e+00
    oft                  2.2e-07 (0.24)      7.7e-07    4.7e-07
    p_tuning             3.0e-07 (0.46)      4.4e-07
    p_tuning_lstm        1.6e-07 (0.58)      4.9e-07
    prefix_tuning        1.8e-07 (0.42)      4.2e-07
    prefix_tuning_mlp    2.1e-07 (0.58)      5.2e-07
    prompt_tuning        1.4e-07 (0.37)      5.9e-07
    randlora             5.0e-06 (2.06)      5.5e-05    4.0e-07
    relora               6.1e-07 (2.09)      2.6e-06    0.0e+00
    shira                3.5e-07 (1.58)      1.0e-06    0.0e+00
    tokens               6.3e-08 (0.85)      2.8e-07    0.0e+00
    vera                 2.0e-07 (0.11)      1.3e-06    3.8e-07

On smollm2-135m-instruct, ours in float32 and PEFT's in float64. In float32 PEFT's own gradients of `lora` are 5.2e-04 from its own in
float64 in the worst tensor (5.5e-05 in the median one), where ours are 3.8e-05. What AdaLoRA and VeRA moved is so little that the
rounding of the weights shows beside it.

    transformers 5.23.0, peft 0.21.2, torch 2.13.0+cpu, float64
                         logits  (moved by)  gradients  merged
    adalora              2.2e-06 (0.00)      8.3e-05    8.2e-04
    boft                 2.0e-06 (0.33)      1.6e-05    3.3e-06
    delta_lora           3.8e-06 (0.08)      2.7e-05    1.4e-05
    dora                 2.0e-06 (0.09)      5.3e-05    3.6e-05
    hira                 2.2e-06 (0.01)      4.0e-05    2.8e-05
    ia3                  2.4e-06 (0.08)      1.0e-04    1.9e-06
    loftq                2.7e-06 (0.30)      3.1e-05    1.1e-06
    loha                 2.3e-06 (0.01)      3.7e-05    8.6e-05
    lokr                 2.0e-06 (0.06)      2.5e-05    1.4e-05
    lora                 3.0e-06 (0.08)      3.8e-05    1.5e-05
    lora_combined        3.4e-06 (0.04)      4.0e-05    3.6e-05
    lora_corda           1.4e-05 (1.43)      1.0e-04    2.0e-07
    lora_corda_knowledge 4.9e-06 (0.09)      6.3e-05    7.0e-06
    lora_eva             3.5e-06 (0.75)      3.2e-05    1.4e-06
    lora_fa              5.3e-06 (0.06)      2.7e-05    2.4e-05
    lora_ga              1.9e-06 (0.72)      1.2e-05    2.4e-06
    lora_layers          2.0e-06 (0.02)      2.6e-05    1.5e-05
    lora_modules_to_save 2.1e-06 (0.07)      2.0e-05    1.2e-05
    lora_olora_rslora    5.4e-06 (0.39)      3.7e-05    3.5e-07
    lora_patterns        1.9e-06 (0.11)      4.4e-05    1.8e-05
    lora_pissa           2.9e-06 (0.39)      5.8e-05    1.5e-06
    lora_tokens          1.9e-06 (0.10)      4.6e-05    1.4e-05
    miss                 2.1e-06 (0.91)      4.7e-05    3.2e-06
    oft                  1.6e-06 (0.54)      2.5e-05    2.4e-06
    p_tuning             3.4e-06 (0.68)      5.2e-06
    p_tuning_lstm        4.2e-06 (0.61)      9.5e-05
    prefix_tuning        2.7e-05 (0.75)      4.1e-04
    prefix_tuning_mlp    3.7e-06 (0.88)      1.1e-05
    prompt_tuning        1.9e-06 (0.67)      3.1e-06
    randlora             1.4e-05 (1.08)      8.4e-05    1.1e-06
    relora               2.9e-06 (0.08)      2.5e-05    1.6e-05
    shira                2.2e-06 (0.06)      3.6e-05    1.7e-06
    tokens               4.6e-06 (0.06)      1.3e-06    0.0e+00
    vera                 2.8e-06 (0.00)      3.1e-05    2.1e-04
"""

import pathlib
import sys
from functools import partial

import numpy as np

GRADIENTS, BASES = "gradients", {"loftq": "base_loftq"}


def inits(params, loss, tokens):
    """Return LoRA from weights and batches, `{name: method}`; on few matrices, whose decompositions take the time."""
    from ftjax import peft
    from ftjax.peft import calibration
    from ftjax.peft import inits as starts

    targets = ["q_proj", "v_proj"]
    moments = calibration.input_moments(loss, params, [tokens], targets=targets)
    gradients = calibration.weight_gradients(loss, params, [tokens], targets=targets)
    lora = partial(peft.lora, targets, rank=4, alpha=8)
    return {
        "lora_eva": lora(init=starts.eva(moments)),
        "lora_corda": lora(init=starts.corda(moments)),
        "lora_corda_knowledge": lora(init=starts.corda(moments, keep="knowledge"), rslora=True),
        "lora_ga": lora(init=starts.lora_ga(gradients)),
        "lora_pissa": lora(init="pissa"),
        "lora_olora_rslora": lora(init="olora", rslora=True),
    }


def methods():
    """Return the others, `{name: method}`; None is a LoRA that is combined of two."""
    from ftjax import peft

    lora = partial(peft.lora, rank=4, alpha=8)
    return {
        "lora": lora(),
        "lora_combined": None,
        "lora_layers": lora(layers=[0]),
        "lora_modules_to_save": peft.chain(lora(), peft.full("norm/scale")),
        "lora_patterns": lora(rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 5}),
        "lora_tokens": peft.chain(lora(), peft.tokens([3, 111])),
        "dora": peft.dora(rank=4, alpha=8),
        "lora_fa": peft.lora_fa(rank=4, alpha=8),
        "loftq": peft.loftq(["q_proj", "v_proj"], rank=4, alpha=8),
        "ia3": peft.ia3(),
        "vera": peft.vera(rank=8),
        "hira": peft.hira(rank=4),
        "loha": peft.loha(rank=4),
        "lokr": peft.lokr(rank=2),
        "miss": peft.miss(rank=4),
        "adalora": peft.adalora(steps=9, init_rank=4, target_rank=2, alpha=8),
        "delta_lora": peft.delta_lora(rank=4, alpha=8, start_steps=3),
        "relora": peft.relora(rank=2, alpha=4, restarts=2),
        "shira": peft.shira(rank=2),
        "randlora": peft.randlora(rank=4),
        "oft": peft.oft(block_size=4),
        "boft": peft.boft(block_size=4),
        "tokens": peft.tokens([3, 111, 200]),
        "prompt_tuning": peft.prompt_tuning(5),
        "p_tuning": peft.p_tuning(5, hidden_size=7),
        "p_tuning_lstm": peft.p_tuning(5, hidden_size=6, encoder="lstm"),
        "prefix_tuning": peft.prefix_tuning(5),
        "prefix_tuning_mlp": peft.prefix_tuning(5, hidden_size=7),
    }


def write(folder, base="tiny", *names):
    import jax
    import jax.numpy as jnp

    from ftjax import models, peft, tree, weights
    from ftjax.hf import export, load
    from ftjax.hf import names as hf_names
    from ftjax.hf import peft as hf_peft
    from ftjax.peft.soft_prompt import check_no_virtual_tokens

    if base == "tiny":
        sizes = {"hidden_size": 64, "intermediate_size": 128}  # in which LoftQ's groups of 64 go up
        model = models.build(models.config_from_hf(models.PRESETS["tiny-llama"] | sizes))
        params, step, tokens = model.init(jax.random.key(0)), 0.1, np.arange(16) * 37 % 257
    else:
        model, params, tokenizer, _ = load.load(base, dtype="float32")
        step, tokens = 0.02, tokenizer.encode("The capital of France is Paris, and the capital of Japan is Tokyo. " * 3)[:32]
    tokens = np.asarray(tokens, np.int32)[None]
    np.save(folder / "tokens.npy", tokens)

    def loss(params, tokens):
        logits = model.unembed(model.head(params), model.apply(params, tokens)[0])
        logps = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)), logits[0]

    def moved(method):
        frozen, trained = method.init(jax.random.key(1), params)
        keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(trained))))
        return frozen, jax.tree.map(lambda x: x + step * jax.random.normal(next(keys), x.shape), trained)

    def merged(params):
        found = {}
        for path, leaf in tree.flatten(params).items():
            if path.endswith("/kernel"):
                layers = np.asarray(leaf) if hf_names.is_stacked(path) else np.asarray(leaf)[None]
                for at in sorted({0, len(layers) // 2, len(layers) - 1}):
                    one = layers[at]
                    found[hf_names.tensors(path, leaf.shape)[at]] = one.T if hf_names.is_transposed(path) else one
        return found

    export.export_model(folder / "base", model, params, None)
    np.savez(folder / "base.npz", logits=jax.jit(loss)(params, tokens)[1])
    made = methods() | inits(params, lambda params, tokens: loss(params, tokens)[0], tokens)
    if missing := {*peft.FORMATS, *peft.SOFT_PROMPTS} - set(made):
        raise ValueError(f"check_methods: {', '.join(sorted(missing))} is not among the methods that are compared.")
    for name in names or made:
        method = made[name]
        if method is None:
            two = [(method, *moved(method)) for method in (peft.lora(rank=2), peft.lora(["v_proj"], rank=3, alpha=6))]
            method, trained = peft.combine([method.attach(frozen, trained) for method, frozen, trained in two], [1.0, -0.5])
            frozen = params
        else:
            frozen, trained = moved(method)
        if name == "loftq":
            export.export_model(folder / BASES[name], model, weights.dense(frozen), None)
        about = {"base_name": str(folder / BASES.get(name, "base")), "frozen": frozen}
        hf_peft.save_adapter(folder / name, model, trained, method.plan(params), **about)
        read = hf_peft.load_adapter(folder / name, model)
        frozen = read.join(params)

        @jax.jit
        def function(trained, frozen, read=read):
            return jax.value_and_grad(lambda trained: loss(read.method.attach(frozen, trained), tokens), has_aux=True)(trained)

        (_, logits), gradients = function(read.trainable, frozen)
        hf_peft.save_adapter(folder / name / GRADIENTS, model, gradients, read.method.plan(params), frozen=frozen)
        adapted = read.method.attach(frozen, read.trainable)
        try:
            check_no_virtual_tokens(tree.flatten(adapted), name)
            matrices = merged(weights.dense(adapted))
        except ValueError:
            matrices = {}
        np.savez(folder / f"{name}.npz", logits=logits, **matrices)
        print(name, flush=True)


def check(folder, dtype="float32", *names):
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}, {dtype}")
    print(f"{'':20} logits  (moved by)  gradients  merged")
    worst = 0.0
    for name in sorted(names or (path.stem for path in folder.glob("*.npz") if path.stem != "base")):
        row, distance = compare(folder, name, getattr(torch, dtype))
        merged = f"{row['merged']:.1e}" if "merged" in row else ""
        print(f"{name:20} {row['logits']:.1e} ({distance:.2f})      {row['gradients']:.1e}    {merged}", flush=True)
        worst = max(worst, *row.values())
    sys.exit(int(not worst <= 1e-3))


def compare(folder, name, dtype):
    """Return PEFT's differences in a method, and how far it moved the logits."""
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file

    adapter, wanted = folder / name, dict(np.load(folder / f"{name}.npz"))
    logits, tokens = wanted.pop("logits"), torch.tensor(np.load(folder / "tokens.npy"), dtype=torch.long)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / BASES.get(name, "base"), dtype=dtype)
    before = {tensor: value.clone() for tensor, value in base.state_dict().items() if tensor in wanted}
    model = peft.PeftModel.from_pretrained(base, adapter).to(dtype).eval()

    ours, written = (load_file(place / "adapter_model.safetensors") for place in (adapter / GRADIENTS, adapter))
    # What is the same in both is not trained; a layer that has no adapter was read as one of zeros.
    ours = {tensor: ours[tensor] for tensor, value in written.items() if not torch.equal(ours[tensor], value)}
    theirs = {file_name(parameter): value for parameter, value in model.named_parameters(remove_duplicate=False)}
    for tensor in ours:
        theirs[tensor].requires_grad_(True)
    found = model(tokens).logits[0, -tokens.shape[1] :]  # behind a prompt's
    torch.nn.functional.cross_entropy(found[:-1], tokens[0, 1:]).backward()

    row = {"logits": relative(found.detach().numpy(), logits, np.abs(logits).max())}
    row["gradients"] = max(relative(theirs[tensor].grad, gradient, gradient.abs().max()) for tensor, gradient in ours.items())
    if wanted:
        merged = model.merge_and_unload().state_dict()
        change = {tensor: np.abs(value - before[tensor].numpy()).max() for tensor, value in wanted.items()}
        row["merged"] = max(relative(merged[tensor].numpy(), wanted[tensor], size) for tensor, size in change.items() if size)
        assert all(np.array_equal(merged[tensor].numpy(), wanted[tensor]) for tensor, size in change.items() if not size)
    return row, np.abs(logits - np.load(folder / "base.npz")["logits"]).max() / np.abs(logits).max()


def file_name(parameter):
    """Return the name in an adapter's file of one of PEFT's parameters."""
    if parameter.startswith("prompt_encoder."):
        return "prompt_embeddings"
    for part in (".modules_to_save.default", ".default"):
        parameter = parameter.replace(part, "")
    return parameter.replace("_vector.weight", "_vector")  # DoRA's lengths


def relative(found, wanted, size):
    return float(abs(found - wanted).max() / size)


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    pathlib.Path(where).mkdir(parents=True, exist_ok=True)
    {"write": write, "check": check}[command](pathlib.Path(where), *rest)
