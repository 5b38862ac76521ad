"""What the tests of PEFT's folders share: the tiny model that the golden adapters were made on."""

from pathlib import Path

import pytest

from ftjax import models
from ftjax.hf import folder, load

GOLDENS = Path(__file__).parents[1] / "goldens" / "peft"  # third_party/peft/folder_golden.py


@pytest.fixture(scope="session")
def base():
    """The model and its parameters."""
    checkpoint = folder.read(GOLDENS / "base")
    model = models.build(models.config_from_hf(checkpoint.config))
    return model, load.load_params(checkpoint, model)
