"""No native code comes from a hub, not even where the package that fetches it is installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command

FETCHER = """
from pathlib import Path
Path(__file__).with_name("fetched").touch()

def get_kernel(*_, **__):
    raise RuntimeError("went to a hub")
"""


@pytest.mark.parametrize("first", ["trajlm.adapters", "trajlm.backbones", "trajlm"])
def test_a_package_that_fetches_kernels_is_not_loaded(first: str, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text(FETCHER)
    program = f"import {first}, bitsandbytes, peft; from transformers.models.mamba import modeling_mamba"
    # Without ours the package is what it says it is: the test can fail.
    command(sys.executable, "-c", "import kernels", PYTHONPATH=str(tmp_path))
    (tmp_path / "fetched").unlink()
    done = command(sys.executable, "-c", program, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert not (tmp_path / "fetched").exists()
    assert "kernels" not in done.stderr
