"""What the pages say exists: links lead to files, configs and fields of configs are there, methods and losses are listed."""

import pathlib
import re

import pytest

from configs import base
from ftjax import losses
from ftjax.cli.build import METHODS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("experiments/*/README.md"))]
README = PAGES[0].read_text(encoding="utf-8")


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
    return request.param


def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_files_that_are_named_exist(page):
    for name in re.findall(r"\b(?:configs|experiments|tests|third_party|ftjax)/[\w/]+\.py\b", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_fields_of_configs_that_are_named_exist(page):
    configs = [base.sft(), base.judged(), base.distilled(), base.online()]
    for field in re.findall(r"--config\.([\w.]*\w)=", page.read_text(encoding="utf-8")):
        block, _, rest = field.partition(".")
        if block not in ("data", "rewards") or "sources" not in rest:  # sources are named by who adds them
            assert any(has(config, field) for config in configs), field


def has(config, field):
    for name in field.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


@pytest.mark.parametrize("name", sorted(set(METHODS) | set(losses.LOSSES)))
def test_every_method_and_loss_stands_in_the_readme(name):
    assert f"`{name}`" in README
