"""What PEFT's add_weighted_adapter makes of two LoRAs: the golden file of tests/peft/combine_test.py.

Run in an environment with peft==0.21.2 and torch==2.13.0: python third_party/peft/combine_golden.py
Writes tests/goldens/peft_combined.npz: A, B and scale of the two, and the change of each form
that draws nothing, with density 0.5 and factors 0.7 and -0.4.
"""

import pathlib
import warnings

import numpy as np
import peft
import torch

OUT = pathlib.Path(__file__).parents[2] / "tests" / "goldens" / "peft_combined.npz"
FORMS = ("cat", "linear", "ties", "magnitude_prune", "svd", "ties_svd", "magnitude_prune_svd")


class Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(10, 8, bias=False)

    def forward(self, x):
        return self.proj(x)


@torch.no_grad()
def main():
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = peft.get_peft_model(Base(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["proj"]), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=2, target_modules=["proj"]))
    layer, found = model.base_model.model.proj, {}
    for name in ("one", "two"):
        layer.lora_A[name].weight.normal_()
        layer.lora_B[name].weight.normal_()
        found |= {f"{name}_a": layer.lora_A[name].weight.T, f"{name}_b": layer.lora_B[name].weight.T}
        found[f"{name}_scale"] = torch.tensor(layer.scaling[name])
    for form in FORMS:
        model.add_weighted_adapter(["one", "two"], [0.7, -0.4], form, combination_type=form, density=0.5)
        found[form] = layer.get_delta_weight(form).T
    np.savez(OUT, **{name: value.numpy().astype(np.float32) for name, value in found.items()})


if __name__ == "__main__":
    main()
