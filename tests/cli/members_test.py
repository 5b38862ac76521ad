"""What `--sweep` says becomes members, or an error that says what can be swept."""

import pytest
from ml_collections import ConfigDict

from configs import base
from ftjax.cli import members


def config(sweep, **optimizer) -> ConfigDict:
    found = base.sft()
    found.sweep = sweep
    found.optimizer.update(optimizer)
    return found


def options(sweep) -> list[dict]:
    return [dict(member.options) for member in members.read(config(sweep))]


def test_a_text_is_every_combination():
    assert options("optimizer.learning_rate=1e-4,3e-4 seed=0,1") == [
        {"optimizer.learning_rate": rate, "seed": seed} for rate in (1e-4, 3e-4) for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    "sweep",
    [
        "lora.rank=4 lora.alpha=8; lora.rank=16,32",
        ("lora.rank=4 lora.alpha=8", {"lora": {"rank": (16, 32)}}),
        [{"lora": {"rank": 4, "alpha": 8}}, {"lora": {"rank": 16}}, "lora.rank=32"],
    ],
)
def test_parts_stand_beside_one_another_in_any_form(sweep):
    found = members.read(config(sweep))
    assert [(one.config.lora.rank, one.config.lora.alpha) for one in found] == [(4, 8.0), (16, 32.0), (32, 32.0)]
    assert [one.label for one in found] == ["rank 4, alpha 8", "rank 16", "rank 32"]
    assert all(one.config.sweep == "" for one in found)
    assert {name: list(values) for name, values in members.numbers(found).items()} == {"lora.rank": [4, 16, 32], "lora.alpha": [8, 32, 32]}


def test_a_mapping_in_a_config_is_a_part():
    assert options({"seed": (0, 1), "optimizer": {"weight_decay": (0.0, 0.1)}})[1] == {"seed": 0, "optimizer.weight_decay": 0.1}


def test_seeds_and_starts_are_no_numbers_of_the_step():
    assert members.numbers(members.read(config("seed=0,1 lora.init=uniform,gaussian"))) == {}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("data.batch_size=2,4", "data.batch_size is the same for all members.*can be swept here: seed, optimizer.learning_rate.*lora.rank"),
        ("dora.rank=2,4", "dora.rank is the same for all"),
        ("adalora.init_rank=2,4", "adalora.init_rank is the same for all"),
        ("optimizer.learning_rat=1", "no field of the config; nearest: 'optimizer.learning_rate'"),
        ("seed 0,1", "'seed' is not FIELD=VALUE"),
        ("seed=0, 1", "'seed=0,' is not FIELD=VALUE"),
        ("seed=0 seed=1", "seed appears twice"),
        ("seed=1,1", "members 0 and 1 are both seed 1"),
        ("lora.rank=4.5", "lora.rank is int in the config, which 4.5 is not"),
        ("lora.init=uniform,eva", "'eva' looks at the data"),
    ],
)
def test_what_cannot_be_swept_is_refused(sweep, message):
    with pytest.raises(ValueError, match=message):
        members.read(config(sweep))


def test_ranks_are_not_swept_with_adafactor():
    with pytest.raises(ValueError, match="cannot be swept with Adafactor"):
        members.read(config("lora.rank=4,8", name="adafactor"))
    assert len(members.read(config("lora.alpha=4,8", name="adafactor"))) == 2


def test_abstract_numbers_take_the_places_of_fields():
    number = object()
    found = members.traced(config("seed=0"), {"lora.alpha": number, "optimizer.learning_rate": number})
    assert found.lora.to_dict()["alpha"] is number and found.optimizer.learning_rate is number
