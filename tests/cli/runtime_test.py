"""What a process is set up with before it computes."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
from ftjax.cli import runtime

if {kept}:
    runtime.keep_memory()

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**28)[:: 2**12] = bytes(2**16)  # takes 256 MiB, writes to each page and frees them
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize("kept", [True, False])
def test_memory_that_is_kept_is_not_asked_of_the_kernel_again(kept):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(kept=kept)], capture_output=True, text=True, check=True)
    pages = 2**28 // 2**12
    assert int(done.stdout) < pages / 16 if kept else int(done.stdout) >= pages / 16
