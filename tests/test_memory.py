"""Keeping freed memory, and the peak of what is allocated, seen from outside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transkd_fast.train.memory import peak_memory

KEPT = """
import ctypes
from transkd_fast.train.memory import keep_freed_memory
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes = libc.sbrk.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
assert keep_freed_memory() is None
before = libc.sbrk(0)
block = libc.malloc(3 << 30)  # more than an int can name as a threshold; its pages are never touched
libc.free(block)
print(libc.sbrk(0) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_more_than_2_gib_stay_in_the_process():
    run = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 5 << 29


HUGE = """
import torch
from transkd_fast.functional import BatchNorm, csf
ones, fc = torch.ones(64), torch.ones(4, 64)
heads = ((fc.T.contiguous(), ones),) * 2
norm = BatchNorm(*[ones.clone() for _ in range(4)])
v = csf(torch.randn(2, 64, 128, 256), torch.randn(2, 64, 64, 128), norm, fc, None, heads, backend="cpu")
print(any(line.startswith("VmFlags") and " hg" in line for line in open("/proc/self/smaps")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked for on Linux")
def test_huge_pages_can_be_left_alone():
    def marks(**environment):
        command = [sys.executable, "-c", HUGE]
        run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    assert marks(TRANSKD_FAST_HUGE_PAGES="0") == "False"
    assert marks() == str(thp.exists())


def test_peak_is_what_is_alive_at_once():
    def function():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(2 << 20, dtype=torch.uint8)
        del a
        c = torch.empty(1 << 19, dtype=torch.uint8)
        return b.numel() + c.numel()

    result, peak = peak_memory(function, torch.device("cpu"))
    assert result == (2 << 20) + (1 << 19)
    assert peak == 3 << 20


def test_errors_on_stderr_come_through_the_profiler(capfd):
    peak_memory(lambda: print("a word", file=sys.stderr), torch.device("cpu"))
    err = capfd.readouterr().err
    assert "a word" in err and "ActivityProfiler" not in err
