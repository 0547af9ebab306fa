"""A folder is filled by one process at a time; what a killed one held is free again."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trajlm.errors import TrajlmError
from trajlm.finetuning import finetune
from trajlm.flags import parse_recipe, recipe_parser
from trajlm.locks import locked
from trajlm.prepare import prepare
from trajlm.pretraining import pretrain

HOLDER = """
import sys, time
from pathlib import Path
from trajlm.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def other(out):
    """Another process that holds the lock of the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_fills_the_folder(out, other):
    told = rf"{out} is being filled by process {other.pid} on .*another --out"
    with pytest.raises(TrajlmError, match=told), locked(out):
        pass
    with locked(out, main=False):
        pass  # the other processes of a launch write nothing
    other.kill()
    other.wait()
    assert [path.name for path in out.parent.iterdir()] == [".run.lock"], "a killed process leaves its file"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(out):
            1 / 0  # noqa: B018
        assert not list(out.parent.iterdir())


def test_a_folder_is_held_under_all_its_names(out, other):
    out.mkdir()
    alias = out.parent / "alias"
    alias.symlink_to(out)
    with pytest.raises(TrajlmError, match="is being filled by process"), locked(alias):
        pass


def test_a_process_does_not_hold_a_folder_twice(out):
    with locked(out):
        with pytest.raises(TrajlmError, match="by this very process"), locked(out):
            pass
        assert (out.parent / ".run.lock").exists()
    with locked(out):
        pass


def test_a_lock_that_goes_while_it_is_opened_holds_nobody(out, monkeypatch):
    """Its holder may end, and another begin, between opening the file and locking it."""
    lock, path, files = fcntl.lockf, out.parent / ".run.lock", []

    def slowly(file, operation):
        files.append(os.fstat(file).st_ino)
        if len(files) == 1:
            path.rename(out.parent / "gone")
            path.touch()
        lock(file, operation)

    monkeypatch.setattr("fcntl.lockf", slowly)
    with locked(out):
        assert len(files) == 2
        assert files[1] == path.stat().st_ino != files[0]
        assert "process" in path.read_text()


def test_no_stage_writes_where_another_process_does(out, other, prepared_folder):
    recipe = parse_recipe(recipe_parser("test", ""), ["--data", str(prepared_folder), "--out", str(out)])
    for stage in (pretrain, finetune):
        with pytest.raises(TrajlmError, match="is being filled by process"):
            stage(recipe)
    recipe.prepare.raw = str(out.parent)
    with pytest.raises(TrajlmError, match="is being filled by process"):
        prepare(recipe.prepare, out)
    assert [path.name for path in out.parent.iterdir()] == [".run.lock"]


def test_where_nothing_can_be_locked_work_goes_on(out, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with locked(out):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out
    with locked(Path("/proc/nothing/run")):
        assert not capsys.readouterr().out
