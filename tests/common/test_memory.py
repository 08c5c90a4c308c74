"""What the allocator does with freed blocks."""

import subprocess
import sys

import pytest

CHILD = """
import resource
import torch
from penstock.common.memory import keep_freed_memory

if {keep}:
    keep_freed_memory()
def work():
    for _ in range(20):
        # two of them, freed in turn: what a forward pass does
        one = torch.ones(12_000_000)
        torch.ones(12_000_000).add_(one)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    command = [sys.executable, "-c", CHILD.format(keep=keep)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_blocks_are_not_fetched_from_the_kernel_again() -> None:
    """A block is 12,000 pages, and 40 are allocated; one or two may still find no place. By itself glibc maps
    blocks above 32 MiB one by one, and what it does with smaller ones depends on what was freed before."""
    assert faults(keep=False) > 400_000
    assert faults(keep=True) < 30_000
