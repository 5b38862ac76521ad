"""What the pages say exists: links lead to files, configs and fields of configs are there, methods and losses are listed."""

import inspect
import pathlib
import re
from typing import NamedTuple

import pytest

from configs import base
from ftjax import losses, peft, tree
from ftjax.cli.advice import PATTERNS
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
    configs = [base.sft(), base.judged("dpo", beta=0.1), base.distilled(), base.online()]
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


def test_the_table_of_other_names_has_what_there_is_here():
    """Every loss option that it names is one of `policy_gradient` or `ppo`, every other field one of the config."""
    page = (ROOT / "docs" / "online.md").read_text(encoding="utf-8")
    table = page.partition("\n## Coming from TRL or verl\n")[2].partition("\n## ")[0]
    cells = [row.split("|")[3] for row in table.splitlines() if row.startswith("| ")]
    named = {name for cell in cells for name in re.findall(r"`((?:loss|rollout|data|reference)\.\w+)`", cell)}
    known = {f"loss.{name}" for loss in (losses.policy_gradient, losses.ppo) for name in inspect.signature(loss).parameters}
    assert all(name in known if name.startswith("loss.") else has(base.online(), name) for name in named) and len(named) > 30


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_stands_in_the_readme(name):
    assert f"`{name}`" in README


def test_every_pattern_that_a_run_speaks_of_has_a_row():
    found = []
    for name in ("objectives", "online"):
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        (rows,) = re.findall(r"^\| pattern \|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
        found += [name for row in rows.splitlines() for name in row.split("|")[1].strip().split(", ")]
    assert sorted(found) == sorted(PATTERNS)


class Row(NamedTuple):
    """A row of the table of methods; one that begins with … goes on from the one above and has its names."""

    names: list[str]
    about: str
    file: str


def table_of_methods():
    table = README.partition("| method | paper | trains | file |\n|---|---|---|---|\n")[2].partition("\n\n")[0]
    rows = []
    for line in table.splitlines():
        about, _, _, file = (cell.strip() for cell in line.strip("|").split("|"))
        first = re.match(r"`\w+`(, `\w+`)*", about)
        assert first or about.startswith("…"), f"the row begins with no name: {about}"
        rows.append(Row(re.findall(r"\w+", first[0]) if first else rows[-1].names, about, file))
    return rows


ROWS = table_of_methods()


def test_every_method_has_one_row_and_every_row_names_methods():
    named = [name for row in ROWS if not row.about.startswith("…") for name in row.names]
    assert sorted(named) == sorted(METHODS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.about[:20])
def test_a_row_names_options_that_its_methods_have_and_the_type_of_their_file(row):
    config, formats = base.sft(), peft.FORMATS | peft.SOFT_PROMPTS
    for option in re.findall(r"`(\w+)=", row.about):
        assert any(option in config[name] for name in row.names), option
    for name in formats.keys() & row.names:
        assert f"`{formats[name].peft_type}`" in row.file


def test_every_named_filter_is_listed():
    listed = re.search(r"- a named filter: (.*);", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"))[1]
    assert re.findall(r'"([\w-]+)"', listed) == list(tree.NAMED)
