"""Training on batches of ever new shapes holds no more memory after a thousand of them than after a hundred."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

SHAPES = """
import ctypes
import torch
from trajlm.engines import make_accelerator

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

def in_use():
    read = ctypes.CDLL(None).mallinfo2
    read.restype = Heap
    return read().uordblks

make_accelerator()
torch.set_num_threads(1)
layer = torch.nn.LSTM(16, 32, batch_first=True)
used = []
for batch in range(300):
    layer(torch.randn(2 + batch % 30, 2 + batch // 30, 16))[0].sum().backward()
    layer.zero_grad(set_to_none=True)
    used.append(in_use())
print(used[99], used[299])
"""


def growth(**environment: str) -> int:
    """Bytes on the heap that 200 batches of new shapes leave behind, after 100 others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN")}
    command = [sys.executable, "-c", SHAPES]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    first, last = done.stdout.split()[-2:]
    return int(last) - int(first)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what is in use")
def test_shapes_of_batches_leave_nothing_behind():
    unbounded, ours = growth(ONEDNN_PRIMITIVE_CACHE_CAPACITY="100000"), growth()
    if unbounded < 2**20:
        pytest.skip("this build of torch keeps nothing for a shape")
    assert ours < unbounded / 4
