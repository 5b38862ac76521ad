"""Make goldens of PEFT's other methods: two linear layers, random adapters, the output and the gradient of every trainable tensor.

    python third_party/peft/methods_golden.py

y = x + tanh(x U) D without biases, loss = Σ g ⊙ y. Reference: peft 0.21.2, torch 2.13.0 (CPU), seed 0. Writes
tests/goldens/peft_methods.safetensors: `x`, `g`, `up`, `down`, and for each case `case|y`, `case|value|<PEFT's name>`,
`case|grad|<PEFT's name>`; `case|frozen|<name>` where a method has arrays that it does not train.
"""

import pathlib

import peft
import torch
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "peft_methods.safetensors"
NARROW, WIDE = 8, 12
BOTH = ["up", "down"]
CASES = {
    "ia3": peft.IA3Config(target_modules=BOTH, feedforward_modules=["down"]),
    "vera": peft.VeraConfig(target_modules=BOTH, r=5, save_projection=True),
    "hira": peft.HiraConfig(target_modules=BOTH, r=3),
    "loha": peft.LoHaConfig(target_modules=BOTH, r=3, alpha=6),
    "lokr": peft.LoKrConfig(target_modules=BOTH, r=1, alpha=2),
    "lokr_both": peft.LoKrConfig(target_modules=BOTH, r=1, alpha=2, decompose_both=True, decompose_factor=4),
    "lokr_full": peft.LoKrConfig(target_modules=BOTH, r=4, alpha=2),
    "miss": peft.MissConfig(target_modules=BOTH, r=4),
    "miss_uneven": peft.MissConfig(target_modules=BOTH, r=5),
    "miss_bat": peft.MissConfig(target_modules=BOTH, r=4, init_weights="bat"),
    "miss_mini": peft.MissConfig(target_modules=BOTH, r=4, mini_r=2, init_weights="mini"),
    "shira": peft.ShiraConfig(target_modules=BOTH, r=2, random_seed=7),
    "randlora": peft.RandLoraConfig(target_modules=BOTH, r=3, randlora_alpha=6),
    "randlora_sparse": peft.RandLoraConfig(target_modules=BOTH, r=3, randlora_alpha=6, sparse=True),
    "oft": peft.OFTConfig(target_modules=BOTH, oft_block_size=4, use_cayley_neumann=False),
    "oft_neumann": peft.OFTConfig(target_modules=BOTH, oft_block_size=4),
    "oft_shared": peft.OFTConfig(target_modules=BOTH, oft_block_size=4, use_cayley_neumann=False, block_share=True),
    "boft": peft.BOFTConfig(target_modules=BOTH, boft_block_size=4),
    "boft_butterfly": peft.BOFTConfig(target_modules=BOTH, boft_block_size=2, boft_n_butterfly_factor=2),
}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(NARROW, WIDE, bias=False)
        self.down = torch.nn.Linear(WIDE, NARROW, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class BlockDiagonals:
    """PEFT forces one butterfly factor where its CUDA kernel is missing; this is that kernel in torch."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


def run(case, config, base, x, g):
    torch.manual_seed(1)
    block = Block()
    block.load_state_dict(base)
    butterfly = case == "boft_butterfly"
    boft_layer.get_fbd_cuda = lambda: butterfly or None
    boft_layer.FastBlockDiag = BlockDiagonals
    model = peft.get_peft_model(block, config)
    found = {}
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn_like(parameter))
    y = model(x)
    (y * g).sum().backward()
    found[f"{case}|y"] = y.detach()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("base_model.model.").replace(".default", "")
            found[f"{case}|value|{short}"] = parameter.detach().clone()
            found[f"{case}|grad|{short}"] = parameter.grad.clone()
    for which in "AB":
        method = case.split("_")[0]
        if hasattr(model.base_model, f"{method}_{which}"):
            found[f"{case}|frozen|{which}"] = getattr(model.base_model, f"{method}_{which}")["default"].float()
    if case == "shira":
        for name in BOTH:
            found[f"{case}|frozen|{name}"] = getattr(model.base_model.model, name).shira_indices["default"]
    return found


def main():
    torch.manual_seed(0)
    base = {"up.weight": torch.randn(WIDE, NARROW) * 0.4, "down.weight": torch.randn(NARROW, WIDE) * 0.4}
    x, g = torch.randn(3, NARROW), torch.randn(3, NARROW)
    tensors = {"x": x, "g": g, "up": base["up.weight"], "down": base["down.weight"]}
    for case, config in CASES.items():
        tensors |= run(case, config, base, x, g)
    versions = {"peft": peft.__version__, "torch": torch.__version__, "seed": "0"}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, GOLDEN, metadata=versions)


if __name__ == "__main__":
    main()
