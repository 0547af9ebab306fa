"""The real commands, run once on an invented ICU; many tests look at what they leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import polars as pl
import pytest

from trajlm.checkpoint import read_run
from trajlm.dataset import Prepared, load_prepared
from trajlm.latents import Latents

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"
RECIPE = ["--config", str(ROOT / "recipes/tiny.yaml")]
# Small batches, so that an epoch has several and a kill can fall between two of them.
PRETRAINING = [*RECIPE, "--pretraining.batch_size", "48", "--pretraining.epochs", "3"]
FINETUNING = [
    *RECIPE,
    *["--finetuning.batch_size", "8", "--finetuning.epochs", "3", "--finetuning.bootstrap_resamples", "50"],
    *["--finetuning.linear_readout", "true", "--finetuning.tree_readout", "true"],
    *["--finetuning.tree_hours", "[16]"],
]
TRAJLM = [sys.executable, "-m", "trajlm.cli"]
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


# Files whose tests run whole stages: begun first, so that no worker is left with them when the others are done.
SLOW = ("test_pipeline", "test_readme", "test_experiment", "test_report_browser")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in SLOW)


def environment(**variables: str) -> dict[str, str]:
    """What a command sees; one thread, so that sums have one order on any machine."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def command(*arguments: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """Run ``python ARGUMENTS`` (a script of the repository by its name) or, with a path to a program, that."""
    words = [str(a) for a in arguments]
    if words[0].endswith(".py") and not Path(words[0]).is_absolute():
        words[0] = str(ROOT / words[0])
    if words[0].endswith(".py"):
        words.insert(0, sys.executable)
    done = subprocess.run(words, env=environment(**variables), capture_output=True, text=True, timeout=240)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)}\nended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def last_line(done: subprocess.CompletedProcess) -> str:
    """The last line on standard error: where an error is told."""
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def cell(db: duckdb.DuckDBPyConnection, query: str) -> float:
    """The first cell of what a query finds."""
    row = db.execute(query).fetchone()
    assert row is not None
    return row[0]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real, openly licensed records beside the checkout; tests that need them skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="session")
def raw(workplace: Path) -> Path:
    """A raw release of invented stays."""
    command(*TRAJLM, "synthesize", "--stays", 200, "--seed", 0, "--out", workplace / "raw")
    return workplace / "raw"


@pytest.fixture(scope="session")
def prepared_folder(workplace: Path, raw: Path) -> Path:
    command(*TRAJLM, "prepare", *RECIPE, "--raw", raw, "--out", workplace / "prepared")
    return workplace / "prepared"


@pytest.fixture(scope="session")
def prepared(prepared_folder: Path) -> Prepared:
    return load_prepared(prepared_folder)


@pytest.fixture(scope="session")
def encoders_run(workplace: Path, prepared_folder: Path) -> Path:
    """A finished run of pretrain.py."""
    command("pretrain.py", *PRETRAINING, "--data", prepared_folder, "--out", workplace / "encoders")
    return workplace / "encoders"


@pytest.fixture(scope="session")
def run(workplace: Path, prepared_folder: Path, encoders_run: Path) -> Path:
    """A finished run of finetune.py on those encoders."""
    command(
        "finetune.py", *FINETUNING, "--data", prepared_folder, "--encoders", encoders_run, "--out", workplace / "run"
    )
    return workplace / "run"


@pytest.fixture(scope="session")
def report(workplace: Path, run: Path) -> Path:
    """The folder that interpret.py wrote about the run."""
    command("interpret.py", "--run", run, "--stays-shown", 2, "--figures", "--out", workplace / "report")
    return workplace / "report"


@pytest.fixture(scope="session")
def beliefs(run: Path) -> pl.DataFrame:
    return pl.read_parquet(run / "beliefs.parquet")


@pytest.fixture(scope="session")
def model(run: Path):
    """The fine-tuned model, as a user loads it; tests must leave it as they find it."""
    import trajlm

    return trajlm.TrajectoryModel.from_pretrained(run)


@pytest.fixture(scope="session")
def cached(run: Path, prepared: Prepared, model) -> SimpleNamespace:
    """The run's recipe, its cached latents and the targets of every stay, as fine-tuning saw them."""
    from trajlm.config import Recipe, from_dict
    from trajlm.finetuning import target_table

    recipe = from_dict(Recipe, read_run(run)["recipe"])
    return SimpleNamespace(
        recipe=recipe,
        latents=Latents(run / "latents", prepared, model.encoders.modalities),
        targets=target_table(recipe, prepared),
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=program, headless=True, args=list(FLAGS))
        yield opened
        opened.close()
