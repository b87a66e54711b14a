"""Memory that is kept: a block of a size that was freed before costs no new pages."""

import platform
import subprocess
import sys

import pytest

from captioning import memory

COUNT_FAULTS = """
import resource, torch
from captioning.memory import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_memory(), min(faults() for _ in range(5)))  # at first small blocks come to lie between
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_that_is_kept_is_not_asked_for_again():
    run = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    without, told, kept = run.stdout.split()
    assert told == "True"
    pages = 5 * (64 << 20) // 4096  # five tensors of 64 MiB; a page may be a huge one
    assert int(kept) < 100
    assert pages / 512 / 2 < int(without) <= 2 * pages


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail(f"{name} was opened"))
    assert not memory.keep_memory()
