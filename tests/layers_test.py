"""The walls of the house: which part of ftjax may import which (see README, "The house")."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "ftjax"

# part -> (its floor, the third-party packages it may use beside the standard library, jax and numpy)
FLOORS = {
    "types": 0,
    "tree": 0,
    "weights": 1,
    "quant": 1,
    "kernels": 1,
    "models": 2,
    "peft": 2,
    "losses": 2,
    "data": 2,
    "rewards": 2,
    "scoring": 3,
    "rollout": 3,
    "hf": 3,
    "manifest": 3,
    "checkpoint": 3,
    "sharding": 3,
    "logs": 3,
    "hub": 3,
    "optimizers": 3,
    "optimizers8bit": 3,
    "train": 4,
    "online": 4,
    "sweep": 4,
    "cli": 5,
}
STRANGERS = ("models", "peft", "losses", "data", "rewards")  # floor 2: never each other


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)} if node.module == "ftjax" else {node.module}
    return found


FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or part_of(p) not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    here = part_of(path)
    assert here in FLOORS, f"{here} has no floor: add it to FLOORS and to the README"
    for name in imports(path):
        if not name.startswith("ftjax."):
            continue
        there = name.split(".")[1]
        if there in (here, "__version__"):
            continue
        assert there in FLOORS, f"{path} imports {name}"
        assert FLOORS[there] <= FLOORS[here], f"{here} (floor {FLOORS[here]}) may not import {there} (floor {FLOORS[there]})"
        assert not (here in STRANGERS and there in STRANGERS), f"{here} may not import {there}: floor 2 never looks sideways"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_jax_and_no_torch(path):
    for name in imports(path):
        assert not name.startswith("jax._src"), f"{path} uses a private JAX name"
        assert name.split(".")[0] not in ("torch", "pickle"), f"{path} imports {name}"


def test_types_and_tree_import_only_jax_and_numpy():
    allowed = {"jax", "numpy", "ftjax", "dataclasses", "collections", "typing", "difflib", "re", "__future__"}
    for name in ("types.py", "tree.py"):
        assert {module.split(".")[0] for module in imports(ROOT / name)} <= allowed


def test_configs_import_only_ml_collections():
    for path in (ROOT.parent / "configs").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= {"ml_collections", "configs"}, path
