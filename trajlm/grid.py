"""What a grid of runs is, as its YAML file says it, and whether its stages can run: told before a folder is made."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trajlm.arms import BASELINE_ARMS, SEVERITY
from trajlm.backbones import config_of
from trajlm.cohorts import load_cohort
from trajlm.config import Recipe, valid_keys
from trajlm.errors import TrajlmError
from trajlm.flags import Parser, parse_recipe, recipe_parser
from trajlm.sampling import balanced_by
from trajlm.tasks import build_tasks
from trajlm.trackers import chosen_tracker

ENCODERS = ("scratch", "contrastive")
# Settings that the grid's own keys and flags give.
OWN = ("data", "out", "seed", "encoders", "backbone.name", "finetuning.baselines", "finetuning.ensembles")
ELSEWHERE = ("--out", "--data", "--seed", "--encoders")  # flags that say where a stage stands, not what it does


@dataclass
class Grid:
    """What to run.

    Args:
        recipe: YAML file that every run starts from; relative to the grid's file.
        raw: folder of the release, prepared anew for every split; relative to where the command runs.
        data: folder that is prepared already, instead of raw; its own split is the only one.
        splits: seeds of the random patient splits, or CSV files with the columns stay_id and split; relative to where
            the command runs.
        seeds: of initialisation, order and dropout.
        encoders: scratch, contrastive (pretrained on the split's training stays), or both.
        backbones: names as of backbone.name.
        baselines: as of finetuning.baselines.
        ensembles: as of finetuning.ensembles, in the runs that fit those baselines: one for each that differs.
        seeds_of: encoders, backbones, baselines or variants that take only some of the seeds, and which.
        settings: keys of a recipe, dotted, and the values every run takes.
        variants: name to settings of the arms to run, instead of one without a name; {} adds none to those of all. One
            that sets what pretraining reads has encoders of its own.
    """

    recipe: str
    raw: str | None = None
    data: str | None = None
    splits: list[int | str] = field(default_factory=lambda: [0])
    seeds: list[int] = field(default_factory=lambda: [0])
    encoders: list[str] = field(default_factory=lambda: ["scratch", "contrastive"])
    backbones: list[str] = field(default_factory=lambda: ["small"])
    baselines: list[str] = field(default_factory=lambda: ["mlp", "lstm", "logistic", "lightgbm"])
    ensembles: list[str] = field(default_factory=list)
    seeds_of: dict[str, list[int]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.raw is None) == (self.data is None):
            raise TrajlmError("expected either raw, a release, or data, a prepared folder")
        for name in ("splits", "seeds", "encoders", "backbones"):
            values = getattr(self, name)
            if not values or len({str(value) for value in values}) != len(values):
                raise TrajlmError(f"{name} must name at least one, and none twice; came {values}")
        for name, known in (("encoders", ENCODERS), ("baselines", BASELINE_ARMS), ("ensembles", BASELINE_ARMS)):
            for value in getattr(self, name):
                _require_known(value, list(known), f"one of {name}")
        lone = sorted(set(self.ensembles) - set(self.baselines))
        if lone:
            raise TrajlmError(f"ensembles: {', '.join(lone)} must stand in baselines too")
        if SEVERITY in self.ensembles:
            raise TrajlmError("ensembles: severity scores are not averaged; leave severity out")
        arms = [*self.encoders, *self.backbones, *self.baselines, *self.variants]
        for name, seeds in self.seeds_of.items():
            _require_known(name, arms, "an encoder, backbone, baseline or variant of this grid")
            if arms.count(name) > 1:
                raise TrajlmError(f"seeds_of: {name} names two things of this grid; rename the variant")
            if not seeds or set(seeds) - set(self.seeds):
                raise TrajlmError(f"seeds_of: {name} must take some of the seeds {self.seeds}; {seeds} came")
        for settings in (self.settings, *self.variants.values()):
            for key in settings:
                _require_known(key, valid_keys(), "a setting of a recipe")
            for key in set(settings) & set(OWN) if settings is not self.settings else ():
                raise TrajlmError(f"variants: {key} is what the grid's own keys say; leave it out")

    def takes(self, seed: int, *names: str) -> bool:
        """Whether all these encoders, backbones, baselines or variants are run at a seed."""
        return all(seed in self.seeds_of.get(name, self.seeds) for name in names)


def _require_known(value: Any, valid: Sequence[str], what: str) -> None:
    if value not in valid:
        nearest = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.0)[0]
        raise TrajlmError(f"{value!r} is not {what}; the nearest is {nearest!r}")


def read_grid(path: Path, **replaced: str | None) -> Grid:
    """The grid of a YAML file; ``replaced`` are keys that the command line gives.

    Raises:
        TrajlmError: no such file, not YAML, not a mapping, an unknown key or name (the nearest is named) or a value of
            another type; it names the file.
    """
    if not path.is_file():
        raise TrajlmError(f"no grid at {path}")
    try:
        given = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrajlmError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise TrajlmError(f"{path}: expected keys and values, came {type(given).__name__}")
    try:
        for key in given:
            _require_known(key, [f.name for f in dataclasses.fields(Grid)], "a key of a grid")
        for key, value in replaced.items():
            if value is not None:
                given |= {"raw": None, "data": None, key: value}
        parser = Parser(exit_on_error=False)
        parser.add_class_arguments(Grid, None)
        values = parser.parse_object(given).as_dict()
        values["recipe"] = str((path.parent / values["recipe"]).resolve())
        return Grid(**values)
    except TrajlmError as error:
        raise TrajlmError(f"{path}: {error}") from error


def require_runnable(path: Path, grid: Grid, stages: Sequence[tuple[str, int, Sequence[str]]]) -> None:
    """Refuse what any of these stages would refuse of its flags, its recipe and what it names.

    Args:
        path: the grid's file, for the message.
        grid: what it says.
        stages: folder, level and command of those that are not done.

    Raises:
        TrajlmError: a file or folder is missing, a stage's settings are not valid, or two stages would fill one folder.
    """
    try:
        out, times = Counter(out for out, _, _ in stages).most_common(1)[0] if stages else ("", 0)
        if times > 1:
            raise TrajlmError(f"two stages would fill {out}; let splits, backbones and variants differ by name")
        if not Path(grid.recipe).is_file():
            raise TrajlmError(f"recipe: no file {grid.recipe}; its path is relative to the grid's file")
        if stages:
            _require_taken(grid)
            recipe = _recipe(["--config", grid.recipe], f"recipe {grid.recipe}")
            _require_records(grid, recipe, any(level == 0 for _, level, _ in stages))
        seen = set()
        for out, level, command in stages:
            flags = dict(zip(command[2::2], command[3::2], strict=True)) if level else {}
            own = tuple(pair for pair in flags.items() if pair[0] not in ELSEWHERE)
            if own and (level, own) not in seen:
                seen.add((level, own))
                _require_valid(_recipe([word for pair in own for word in pair], out), level, out)
    except TrajlmError as error:
        raise TrajlmError(f"{path}: {error} (nothing was started; put it right and run the command again)") from error


def _require_taken(grid: Grid) -> None:
    """Refuse settings that no stage would take from the grid."""
    for key in grid.settings:
        if key in OWN:
            raise TrajlmError(f"settings: {key} is what the grid's own keys say; leave it out")
    for key in [key for settings in (grid.settings, *grid.variants.values()) for key in settings]:
        if key.split(".")[0] == "prepare":
            raise TrajlmError(f"{key}: stays are prepared as the recipe says; write it into {grid.recipe}")


def _recipe(words: Sequence[str], where: str) -> Recipe:
    """As the stage scripts read these flags; a mistake names where it was met."""
    try:
        return parse_recipe(recipe_parser("trajlm experiment", ""), words)
    except TrajlmError as error:
        raise TrajlmError(f"{where}: {error}") from error


def _require_records(grid: Grid, recipe: Recipe, prepares: bool) -> None:
    """Refuse records that are not there; of a release only where some of it is still to be prepared."""
    if grid.data is not None:
        if not (Path(grid.data) / "manifest.json").is_file():
            raise TrajlmError(f"data: {grid.data} is not a prepared folder; make one with `trajlm prepare`")
    elif prepares:
        if not Path(str(grid.raw)).exists():
            raise TrajlmError(f"raw: there is no {grid.raw}; name the folder of the release, --raw DIR")
        for split in grid.splits:
            if isinstance(split, str) and not Path(split).is_file():
                raise TrajlmError(f"splits: {split!r} is neither a seed nor a file, from where the command runs")
        load_cohort(recipe.prepare.cohort, Path(str(grid.raw)))


def _require_valid(recipe: Recipe, level: int, where: str) -> None:
    """What fine-tuning refuses of a recipe alone, without looking at data."""
    try:
        chosen_tracker(recipe.tracker)
        if level == 2:
            tasks = build_tasks(recipe.finetuning.tasks)
            if recipe.finetuning.sampling == "balanced":
                balanced_by(tasks)
            config_of(recipe.backbone.name)
    except TrajlmError as error:
        raise TrajlmError(f"{where}: {error}") from error
