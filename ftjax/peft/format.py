"""How a method stands in PEFT's folders, as data: a method's file declares a `Format`, and `ftjax.hf.peft` does the rest.

    IA3 = Format(
        peft_type="IA3",
        tensors={"outputs": Tensor("ia3_l", "o->o1", neutral=1.0), "inputs": Tensor("ia3_l", "i->1i", neutral=1.0)},
        lists={"feedforward": ("feedforward_modules", "inputs")},
        defaults={"exclude_modules": None, "feedforward_modules": None, "fan_in_fan_out": False, "init_ia3_weights": True},
        ignored=("init_ia3_weights",),
    )
    VERA = Format(
        peft_type="VERA",
        tensors={"lambda_b": Tensor("vera_lambda_b", "o->o"), "lambda_d": Tensor("vera_lambda_d", "r->r")},
        shared={"a": Tensor("base_model.vera_A", "xr->rx", optional=True), "b": Tensor("base_model.vera_B", "ry->yr", optional=True)},
        options={"rank": "r", "d_initial": "d_initial", "seed": "projection_prng_key"},
        defaults={"r": 256, "projection_prng_key": 0, "save_projection": True, "vera_dropout": 0.0, "d_initial": 0.1, …},
        ignored=("save_projection", "init_weights"),
    )

A method keeps what it does not train in the frozen tree under its own name: at the root what all leaves share, at `path/field` what is one
leaf's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftjax.types import Params, Plan

Turn = Callable[[np.ndarray, int, int], np.ndarray]
"""`(array of one layer, i, o) -> array`."""


class Tensor(NamedTuple):
    """Where PEFT keeps one field of a leaf, and in which order of axes."""

    key: str
    """What follows the module's name, as `lora_A.weight`; the whole name of a tensor that stands once in a file."""
    axes: str
    """Our axes and PEFT's, of one layer: `"ir->ri"` is a transpose, `"o->o1"` adds an axis of one. `i` and `o` are the matrix's, `r` is the
    module's rank, a digit is itself; any other letter is a size that the tensors of a module share."""
    embedding: str = ""
    """The key on an embedding where it is another."""
    neutral: float = 0.0
    """What fills a layer of a stack that has no adapter, so that it stays as it is."""
    optional: bool = False
    """A file need not hold it."""
    turn: tuple[Turn, Turn] | None = None
    """To PEFT's and back where an order of axes cannot say it, instead of `axes`; those then name PEFT's sizes."""
    trained: bool = True
    """False: it is in the frozen tree, under the method's name and the leaf's path."""


class Format(NamedTuple):
    """A method in PEFT's terms. Two methods may share a `peft_type`; the one with the most `constants` that fit a file reads it."""

    peft_type: str
    tensors: Mapping[str, Tensor]
    """By field, the last part of a path in the trainable tree. Fields with one key are told apart by their shapes."""
    options: Mapping[str, str] = {}
    """`{our option: PEFT's config field}`, of what both have."""
    patterns: tuple[str, ...] = ()
    """Those of `rank` and `alpha` that may differ by module, by PEFT's `rank_pattern` and ours. Of every other option a file has one
    value."""
    only: Mapping[str, Any] = {}
    """`{our option: value}` of options that PEFT has not: a method with another value is not written."""
    lists: Mapping[str, tuple[str, str]] = {}
    """`{our option: (PEFT's config field, our field)}`: PEFT lists the modules whose leaf has this field, and the option is a filter."""
    values: Mapping[str, Mapping[Any, Any]] = {}
    """`{our option: {our value: PEFT's}}` where the values have other names."""
    writes: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {}
    """`{config field: function of our options}` where the two do not stand one to one."""
    reads: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {}
    """`{our option: function of the config}`: the inverse of `writes`."""
    constants: Mapping[str, Any] = {}
    """Config fields that make a file one of this method."""
    defaults: Mapping[str, Any] = {}
    """The config fields of this type beyond those that every PEFT method has, and what PEFT takes where a file does not say. A field that
    nothing here speaks of must have this value in a file, else it is refused."""
    ignored: tuple[str, ...] = ()
    """Config fields that do not change what a trained adapter computes."""
    refused: Mapping[str, tuple[str, ...]] = {}
    """`{config field: beginnings}` of values that are refused though the field is ignored."""
    embeddings: bool = False
    """Whether PEFT has this method on embeddings."""
    scale: Callable[[int, float, Mapping[str, Any]], float] | None = None
    """`scale(rank, alpha, options)`: what a leaf is multiplied by, if `scaled` can take up another value."""
    scaled: str = ""
    """The field that takes up the quotient where layers of one stacked leaf differ in rank or alpha. It says also that zeros along `r`
    leave the product as it is, so such layers are padded. Empty: such a file is refused."""
    mark: str = ""
    """A field that is all 0 only in a layer without an adapter, where PEFT would not take it for one: such a layer is not written."""
    at_least: Mapping[str, str] = {}
    """`{axis: our option}`: an axis of which a file may hold less than the option says, because PEFT drops what is zero; it is padded."""
    shared: Mapping[str, Tensor] = {}
    """By field at the root of the method's frozen arrays, tensors that stand once in a file."""
    base: Callable[[Params, Sequence[Plan]], Params] | None = None
    """`base(params, plans) -> params`: the model that an adapter was trained on, where that is not the published one."""
