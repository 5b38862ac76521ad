import shutil
import subprocess

import pytest

from ftjax.rewards import sandbox

NEW_ROOT = "mount -t tmpfs none /tmp && mkdir /tmp/old && cd /tmp && pivot_root . old"
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "sh", "-c", NEW_ROOT]


@pytest.fixture(scope="session")
def isolated():
    """A kernel that isolates processes; where it does not, running something must be refused, and the report says why nothing was run.

    That it does not is what util-linux has to say too, for namespaces and a root of its own: a jail that is broken is no reason to skip.
    """
    if why := sandbox.isolation():
        with pytest.raises(sandbox.NoIsolation):
            sandbox.run("print(1)")
        if shutil.which("unshare") and subprocess.run(UNSHARE, capture_output=True).returncode == 0:
            pytest.fail(f"the kernel isolates processes, and the sandbox does not: {why}")
        pytest.skip(f"untrusted code was refused and none was run: {why}")
