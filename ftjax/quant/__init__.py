"""Quantised weights: matrices of 4 or 8 bits a number that multiply as they are, and methods that put them in the place of dense ones."""

from ftjax.quant.hopper import HopperWeight, for_device, for_hopper
from ftjax.quant.methods import METHODS, fp4, int4, int8, multiplied_by, nf4, packing, quantized, uint4, uint8
from ftjax.quant.quantize import check_finite, quantize
from ftjax.quant.weight import SPECS, NestedScales, PackedWeight, QuantizedWeight

__all__ = [
    "METHODS",
    "SPECS",
    "HopperWeight",
    "NestedScales",
    "PackedWeight",
    "QuantizedWeight",
    "check_finite",
    "for_device",
    "for_hopper",
    "fp4",
    "int4",
    "int8",
    "multiplied_by",
    "nf4",
    "packing",
    "quantize",
    "quantized",
    "uint4",
    "uint8",
]
