"""Make the golden of AdaLoRA's allocator: PEFT's own, over a tiny problem.

    python third_party/peft/adalora_golden.py

Two linear layers learn a random map with SGD; after each step PEFT's `RankAllocator` sees the weights and the gradients, ranks and prunes.
Reference: peft 0.21.2, torch 2.13.0 (CPU), seed 0. Writes tests/goldens/peft_adalora.npz: for each tensor n in PEFT's name `weight|n`
and `grad|n`, what the allocator saw at steps 1, 2, …, its averages `sensitivity|n` and `uncertainty|n` until it forgets them, `kept|n` at
the steps `ranked`, and `budget`.
"""

import collections
import pathlib

import numpy as np
import peft
import torch

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "peft_adalora.npz"
STEPS, OPTIONS = 20, {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 4, "deltaT": 2, "beta1": 0.8, "beta2": 0.7}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(5, 6, bias=False)
        self.down = torch.nn.Linear(6, 5, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def inner(name):
    return name.removeprefix("base_model.model.")


def short(name):
    return inner(name).replace(".default", "")


def main():
    torch.manual_seed(0)
    model = peft.get_peft_model(Block(), peft.AdaLoraConfig(target_modules=["up", "down"], total_step=STEPS, **OPTIONS))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.5)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    x, y = torch.randn(16, 5), torch.randn(16, 5)
    found, budgets, ranked = collections.defaultdict(list), [], []
    for t in range(1, STEPS + 1):
        loss = torch.mean((model(x) - y) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, p in trained.items():
            found[f"weight|{short(name)}"].append(p.detach().numpy().copy())
            found[f"grad|{short(name)}"].append(p.grad.numpy().copy())
        allocator = model.base_model.rankallocator
        budgets.append(allocator.budget_schedule(t)[0])
        before = model.peft_config["default"].rank_pattern
        model.base_model.update_and_allocate(t)
        for name in trained:
            if allocator.exp_avg_ipt:
                found[f"sensitivity|{short(name)}"].append(allocator.exp_avg_ipt[inner(name)].numpy())
                found[f"uncertainty|{short(name)}"].append(allocator.exp_avg_unc[inner(name)].numpy())
        if (pattern := model.peft_config["default"].rank_pattern) is not before:
            ranked.append(t)
            for name, kept in pattern.items():
                found[f"kept|{short(name)}"].append(kept)
    np.savez_compressed(GOLDEN, budget=budgets, ranked=ranked, **{name: np.array(arrays) for name, arrays in found.items()})


if __name__ == "__main__":
    main()
