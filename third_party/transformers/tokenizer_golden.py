"""Make the golden GGUF files and what transformers makes of them: token ids of every text of `tokenizer_sample`, and logits.

    python third_party/transformers/tokenizer_golden.py [SmolLM2-135M-Instruct.Q4_1.gguf]

Reference: transformers 5.23.0 (its GGUF conversion), tokenizers 0.23.3, gguf 0.19.0, torch 2.13.0.

Writes to tests/goldens/gguf/: `<name>.gguf`, tiny files with a vocabulary of their own and (but for those that only differ in the
tokenizer) random Q8_0 weights; `<name>.json` with the ids of each text of `texts.json` and what they decode to where that is another
text; `<name>.npy` with the logits at every third of TOKENS. With the path of the real file it also writes `smollm2.json`.
"""

import collections
import json
import pathlib
import sys

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from tokenizer_sample import TEXTS

GOLDENS = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "gguf"
TOKENS = np.arange(12)[None] * 7 % 300
DIM, FF, HEADS, KV_HEADS, LAYERS = 32, 64, 4, 2, 2
BYTE_LEVEL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
PIECES = ["<unk>", "<s>", "</s>", "<pad>"]

# name -> architecture, tokenizer.ggml.model, tokenizer.ggml.pre, whether there are weights
FILES = {
    "llama": ("llama", "llama", "default", True),
    "qwen2": ("qwen2", "gpt2", "qwen2", True),
    "qwen3": ("qwen3", "gpt2", "qwen2", True),
    "gemma2": ("gemma2", "llama", "default", True),
    "gemma3": ("gemma3", "llama", "default", True),
    "llama_bpe": ("llama", "gpt2", "llama-bpe", False),
    "smollm": ("llama", "gpt2", "smollm", False),
    "nemo": ("llama", "gpt2", "tekken", False),
}


def byte_level_vocabulary():
    """Return tokens, merges and token types of a byte-level BPE trained on the sample."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=BYTE_LEVEL, show_progress=False)
    model.train_from_iterator(TEXTS * 2, trainer)
    state = json.loads(model.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    merges = [" ".join(merge) for merge in state["merges"]]
    return tokens, merges, [3, 3, 3, 4] + [1] * (len(tokens) - 4)


def piece_vocabulary(gemma):
    """Return tokens, scores and token types of a SentencePiece-like BPE with byte fallback."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    counts = collections.Counter("".join(TEXTS))
    alphabet = set(sorted(counts, key=lambda character: (-counts[character], character))[:90])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=250, show_progress=False)
    model.train_from_iterator(["".join(c for c in text if c in alphabet) for text in TEXTS * 2], trainer)
    vocab = json.loads(model.to_str())["model"]["vocab"]
    pieces = [piece for piece in sorted(vocab, key=lambda p: (len(p) == 1, vocab[p])) if piece not in PIECES]
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else PIECES
    users = ["<start_of_turn>", "<end_of_turn>", "  ", "   "] if gemma else []
    tokens = special + users + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    kinds = [3] * 4 + [4] * len(users) + [6] * 256 + [1] * len(pieces)
    kinds[special.index("<unk>")] = 2
    return tokens, [0.0] * (len(tokens) - len(pieces)) + [-float(i) for i in range(len(pieces))], kinds


def head_dim(architecture):
    return 8 if architecture == "qwen2" else 16  # Qwen 2 has no other than DIM / HEADS


def write(name, architecture, model, pre, weights):
    """Write one file."""
    writer = gguf.GGUFWriter(str(GOLDENS / f"{name}.gguf"), architecture)
    writer.add_name(f"tiny {name}")
    writer.add_context_length(512)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(FF)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head_dim(architecture))
    writer.add_value_length(head_dim(architecture))
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim(architecture))
    if architecture.startswith("gemma"):
        writer.add_sliding_window(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(50000.0)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    gemma = architecture.startswith("gemma")
    if model == "gpt2":
        tokens, merges, kinds = byte_level_vocabulary()
        writer.add_token_merges(merges)
        ids = {"eos": 2, "pad": 0}
    else:
        tokens, scores, kinds = piece_vocabulary(gemma)
        writer.add_token_scores(scores)
        ids = {"bos": 2, "eos": 1, "unk": 3, "pad": 0} if gemma else {"bos": 1, "eos": 2, "unk": 0, "pad": 3}
        writer.add_add_bos_token(True)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for role, i in ids.items():
        getattr(writer, f"add_{role}_token_id")(i)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}")
    for tensor, values in tensors(architecture, len(tokens)).items() if weights else ():
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(architecture, vocab_size):
    """Return random weights by GGUF name."""
    rng = np.random.default_rng(0)
    gemma, channels = architecture.startswith("gemma"), head_dim(architecture)

    def matrix(o, i):
        return (rng.standard_normal((o, i)) / np.sqrt(i)).astype(np.float32)

    def vector(n):
        return (1 + 0.3 * rng.standard_normal(n)).astype(np.float32)

    found = {"token_embd.weight": matrix(vocab_size, DIM), "output_norm.weight": vector(DIM)}
    if architecture == "llama":
        found["output.weight"] = matrix(vocab_size, DIM)
    for block in (f"blk.{i}" for i in range(LAYERS)):
        for part, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            found[f"{block}.attn_{part}.weight"] = matrix(n * channels, DIM)
            if architecture == "qwen2":
                found[f"{block}.attn_{part}.bias"] = vector(n * channels)
        found[f"{block}.attn_output.weight"] = matrix(DIM, HEADS * channels)
        found |= {
            f"{block}.ffn_{part}.weight": matrix(*shape) for part, shape in (("gate", (FF, DIM)), ("up", (FF, DIM)), ("down", (DIM, FF)))
        }
        found |= {f"{block}.attn_norm.weight": vector(DIM), f"{block}.ffn_norm.weight": vector(DIM)}
        if architecture in ("qwen3", "gemma3"):
            found |= {f"{block}.attn_q_norm.weight": vector(channels), f"{block}.attn_k_norm.weight": vector(channels)}
        if gemma:
            found |= {f"{block}.post_attention_norm.weight": vector(DIM), f"{block}.post_ffw_norm.weight": vector(DIM)}
    return found


def write_json(name, value):
    (GOLDENS / f"{name}.json").write_text(json.dumps(value, separators=(",", ":")).replace("],[", "],\n[") + "\n")


def write_ids(name, tokenizer):
    """Write what a tokenizer makes of the sample."""
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    golden = {
        "reference": f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, gguf conversion",
        "special": {role: getattr(tokenizer, role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")},
        "ids": ids,
        "decoded": {n: tokenizer.decode(i) for n, (i, text) in enumerate(zip(ids, TEXTS, strict=True)) if tokenizer.decode(i) != text},
    }
    write_json(name, golden)


def main():
    GOLDENS.mkdir(parents=True, exist_ok=True)
    write_json("texts", TEXTS)
    for name, (architecture, model, pre, weights) in FILES.items():
        write(name, architecture, model, pre, weights)
        write_ids(name, transformers.AutoTokenizer.from_pretrained(GOLDENS, gguf_file=f"{name}.gguf"))
        if weights:
            # What transformers does not read from a file and takes from the published checkpoints instead.
            options = {"qwen3": {"head_dim": 16}, "gemma2": {"query_pre_attn_scalar": 16}, "gemma3": {"query_pre_attn_scalar": 16}}
            options = {"dtype": torch.float32, "attn_implementation": "eager", **options.get(architecture, {})}
            torch_model = transformers.AutoModelForCausalLM.from_pretrained(GOLDENS, gguf_file=f"{name}.gguf", **options)
            logits = torch_model(torch.tensor(TOKENS)).logits
            np.save(GOLDENS / f"{name}.npy", logits.detach().numpy()[0, ::3].astype(np.float32))
    if len(sys.argv) > 1:
        real = pathlib.Path(sys.argv[1])
        write_ids("smollm2", transformers.AutoTokenizer.from_pretrained(real.parent, gguf_file=real.name))


if __name__ == "__main__":
    main()
