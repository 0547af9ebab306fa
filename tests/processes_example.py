"""Two processes that know of each other over gloo."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing as mp

WORLD = 2


def in_processes(worker: Callable[..., None], *arguments: Any) -> None:
    """Run ``worker(rank, port, *arguments)`` in each of them, to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_work, (worker, port, *arguments), nprocs=WORLD)


def _work(rank: int, worker: Callable[..., None], *arguments: Any) -> None:
    """Do the work and leave at once: a thread of gloo that frees a tensor while the interpreter ends may abort it.

    https://github.com/pytorch/pytorch/issues/190489
    """
    worker(rank, *arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def join(rank: int, port: int, **variables: str) -> None:
    """What a launcher would tell this process, and ``variables``; on one thread."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), **variables,
    }  # fmt: skip
    torch.set_num_threads(1)
