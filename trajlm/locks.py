"""One process fills a folder at a time: a second one that is started by mistake is told, not mixed in."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trajlm.errors import TrajlmError

_HELD: set[Path] = set()  # by this process, whose own locks the system does not refuse it


@contextmanager
def locked(folder: Path, main: bool = True) -> Iterator[None]:
    """Hold ``folder`` until the block ends, or the process does, however it ends.

    The lock is a file beside the folder, ``.NAME.lock``, that names the process that holds it and goes with the block.
    Where none can be written the block runs without: what it writes itself will tell.

    Args:
        folder: what this process alone is to fill; it need not exist.
        main: whether this is the process that writes, of those that were launched together; the others hold nothing.

    Raises:
        TrajlmError: another process holds it, or this one does.
    """
    place = Path(os.path.realpath(folder))  # a folder by another name is the same folder
    path = place.parent / f".{place.name}.lock"
    if main and place in _HELD:
        raise TrajlmError(f"{folder} is being filled by this very process; choose another --out")
    held = _hold(path, folder) if main else None
    if held is not None:
        _HELD.add(place)
    try:
        yield
    finally:
        if held is not None:
            path.unlink(missing_ok=True)
            os.close(held)
            _HELD.remove(place)


def _hold(path: Path, folder: Path) -> int | None:
    """The open and locked file; None where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: its children do not inherit it
        if not path.exists() or os.fstat(file).st_ino != path.stat().st_ino:
            os.close(file)  # it went with its holder between the two lines above: another may hold a new one
            return _hold(path, folder)
    except OSError as error:
        holder = os.read(file, 500).decode(errors="replace").strip() or "another process"
        os.close(file)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise TrajlmError(
                f"{folder} is being filled by {holder}; wait until it is done, or choose another --out"
            ) from error
        print(f"{folder} cannot be locked ({error.strerror}): see that no other process fills it")
        return None
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
    return file
