import shutil
import subprocess

import pytest

from ftjax.rewards import sandbox

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "true"]


@pytest.fixture(scope="session")
def isolated():
    """A kernel that isolates processes; where it does not, running something must be refused, and the report says why nothing was run.

    That the kernel does not is what util-linux has to say too: a jail that is broken is no reason to skip its tests.
    """
    if why := sandbox.isolation():
        with pytest.raises(sandbox.NoIsolation):
            sandbox.run("print(1)")
        if shutil.which("unshare") and subprocess.run(UNSHARE, capture_output=True).returncode == 0:
            pytest.fail(f"the kernel isolates processes, and the sandbox does not: {why}")
        pytest.skip(f"untrusted code was refused and none was run: {why}")
