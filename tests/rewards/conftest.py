import pytest

from ftjax.rewards import sandbox


@pytest.fixture(scope="session")
def isolated():
    """A kernel that isolates processes; where it does not, running something must be refused, and the report says why nothing was run."""
    if why := sandbox.isolation():
        with pytest.raises(sandbox.NoIsolation):
            sandbox.run("print(1)")
        pytest.skip(f"untrusted code was refused and none was run: {why}")
