"""What a run prints about itself is complete."""

import io

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from ftjax import sharding
from ftjax.cli import show


def test_the_layout_names_rules_sizes_and_what_did_not_divide():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shapes = {"frozen": {"lm_head": {"kernel": jax.ShapeDtypeStruct((1000, 1001), jnp.float32)}, "norm": {"scale": jnp.ones(1000)}}}
    out = io.StringIO()
    Console(file=out, width=160).print(show.layout(shapes, mesh))
    said = out.getvalue()
    assert "(.*/)?lm_head/kernel" in said and "[a-z_]*norm/scale" in said  # no markup is read in a rule
    assert "fsdp, tensor" in said and "1,001,000" in said and "2.0 MB" in said  # half of 4 MB: `tensor` splits nothing
    assert "whole on every device: frozen/lm_head/kernel: axis 1 of 1001 is not divisible by tensor=2" in said.replace("\n", " ")


@pytest.mark.parametrize(
    "name, title", [("/data/models/mine.gguf", "mine.gguf"), ("org/model", "model"), ("known", "known"), ("folder/", "folder")]
)
def test_a_plot_calls_a_model_by_the_last_part_of_its_name(name, title):
    assert show.model_title(ConfigDict({"model": {"name": name, "random": False, "preset": "tiny"}})) == title


def test_rollouts_are_a_table_of_texts_and_numbers():
    known = {"prompt": "What\n is [2]+2?", "completion": "x" * 201, "rewards": {"right": 1.0, "short": 0.123456}, "advantage": -0.5}
    unknown = {"prompt": "And [/]?", "completion": "five", "rewards": {"right": None, "short": 2.0}, "advantage": None}
    out = io.StringIO()
    Console(file=out, width=320).print(show.rollouts([known, unknown]))
    heads, _, *rows = (line.split() for line in out.getvalue().splitlines() if line.strip())
    assert heads == ["prompt", "completion", "right", "short", "advantage"]
    assert rows == [["What", "is", "[2]+2?", "x" * 200, "…", "1", "0.123", "-0.5"], ["And", "[/]?", "five", "–", "2", "–"]]
    assert [column.header for column in show.rollouts([]).columns] == ["prompt", "completion", "advantage"]
