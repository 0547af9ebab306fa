"""`trajlm sweep`: settings of pretraining searched with Optuna, judged on the tuning split alone, resumable."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import yaml

from trajlm.checkpoint import data_fingerprint, fingerprint, write_text
from trajlm.config import Recipe, from_dict, valid_keys
from trajlm.errors import TrajlmError
from trajlm.flags import parse_recipe, recipe_parser
from trajlm.pretraining import pretrain
from trajlm.schema import TUNING

if TYPE_CHECKING:
    import optuna

JOURNAL, ABOUT, TABLE, BEST = "journal.log", "sweep.json", "trials.csv", "best.yaml"
SWEPT = ("encoder.", "pretraining.")  # sections whose settings a trial may change


@dataclass(frozen=True)
class Range:
    """Values of one setting: between ``low`` and ``high`` (``log``: evenly in the logarithm), or one of ``choices``."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        bounded = self.low is not None and self.high is not None and self.low < self.high
        if bounded == bool(self.choices) or (self.log and not (self.low or 0) > 0):
            raise TrajlmError(
                "sweep: expected a list of choices, or low < high (log: true for low > 0), came "
                f"low {self.low}, high {self.high}, log {self.log}, choices {list(self.choices)}"
            )

    def suggest(self, trial: optuna.Trial, key: str) -> Any:
        """A value for this trial."""
        if self.choices:
            return trial.suggest_categorical(key, self.choices)
        assert self.low is not None
        assert self.high is not None
        return trial.suggest_float(key, self.low, self.high, log=self.log)


DEFAULT_SPACE = {
    "pretraining.learning_rate": Range(3e-4, 1e-2, log=True),
    "pretraining.weight_decay": Range(1e-6, 1e-2, log=True),
    "pretraining.batch_size": Range(choices=(64, 128, 256)),
    "pretraining.modality_dropout": Range(0.0, 0.5),
    "encoder.dropout": Range(0.0, 0.5),
}


def read_space(path: Path | None) -> dict[str, Range]:
    """The space of a YAML file: dotted keys to a list of choices or to ``{low, high, log}``; None is the default.

    Raises:
        TrajlmError: no such file, a key that is no setting of encoder or pretraining (the nearest is named), or a range
            that is none.
    """
    if path is None:
        return DEFAULT_SPACE
    if not path.is_file():
        raise TrajlmError(f"no space at {path}")
    given = yaml.safe_load(path.read_text())
    if not isinstance(given, dict) or not given:
        raise TrajlmError(f"{path}: expected settings and their ranges, came {type(given).__name__}")
    valid = [key for key in valid_keys() if key.startswith(SWEPT)]
    space = {}
    for key, values in given.items():
        if key not in valid:
            nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)[0]
            raise TrajlmError(f"{path}: {key!r} is no setting to sweep; the nearest is {nearest!r}")
        if isinstance(values, list):
            space[key] = Range(choices=tuple(values))
        elif isinstance(values, dict) and set(values) <= {"low", "high", "log"}:
            space[key] = Range(**values)
        else:
            raise TrajlmError(f"{path}: {key}: expected a list or low, high and log, came {values!r}")
    return space


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """A copy of a recipe with dotted keys replaced, checked anew."""
    values = copy.deepcopy(dataclasses.asdict(recipe))
    for key, value in settings.items():
        section, name = key.split(".")
        values[section][name] = value
    return from_dict(Recipe, values)


def sweep(
    config: Path | None, data: Path, out: Path, trials: int, space: Path | None = None, seed: int | None = None
) -> Path:
    """Pretrain ``trials`` times with settings that Optuna proposes, or what is left of them; write the best recipe.

    A trial is judged by the alignment loss of the tuning stays in batches of one fixed size (``metrics.json``), so that
    trials of different batch sizes compare. ``out`` then holds ``trials/`` with a run folder each, ``trials.csv``, and
    ``best.yaml``, a recipe. A trial whose loss became infinite counts as failed.

    Args:
        config: recipe every trial starts from.
        data: prepared folder.
        out: folder of the sweep.
        trials: how many there shall be in all.
        space: YAML file of settings and their ranges; None is ``DEFAULT_SPACE``.
        seed: of the recipe's training and of the proposals; None takes the recipe's.

    Returns:
        the path of ``best.yaml``.

    Raises:
        TrajlmError: Optuna is not installed, ``out`` holds another sweep, or every trial failed.
    """
    if not find_spec("optuna"):
        raise TrajlmError("trajlm sweep needs Optuna; pip install 'trajlm[sweep]'")
    if trials < 1:
        raise TrajlmError(f"--trials: expected at least 1, came {trials}")
    recipe = parse_recipe(recipe_parser("trajlm sweep", ""), ["--config", str(config)] if config else [])
    recipe.data, recipe.seed = str(data), recipe.seed if seed is None else seed
    ranges = read_space(space)
    _check_same(out, recipe, ranges, data)
    study = _study(out, recipe.seed)
    for _ in range(trials - len(_settled(study))):
        _run_trial(study, recipe, ranges, out)
        _write_table(study, list(ranges), out)
    return _conclude(study, recipe, out)


def _check_same(out: Path, recipe: Recipe, ranges: dict[str, Range], data: Path) -> None:
    settings = dataclasses.asdict(recipe)
    about = {
        "recipe": {name: settings[name] for name in ("seed", "encoder", "pretraining")},
        "space": {key: dataclasses.asdict(one) for key, one in ranges.items()},
        "data": data_fingerprint(data) if (data / "manifest.json").exists() else None,
    }
    if about["data"] is None:
        raise TrajlmError(f"{data} is not a prepared folder: no manifest.json; make one with `trajlm prepare`")
    about = json.loads(json.dumps(about))
    if not (out / ABOUT).exists():
        if out.exists() and any(out.iterdir()):
            raise TrajlmError(f"{out} is not empty and not a sweep; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / ABOUT, json.dumps(about, indent=1))
    elif json.loads((out / ABOUT).read_text()) != about:
        raise TrajlmError(f"{out} was made by another recipe, space or prepared folder; choose another --out")


def _study(out: Path, seed: int) -> optuna.Study:
    """The study of a folder; a trial that was cut off is proposed again, and its run folder resumes."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    # A sampler begins its draws anew with every process: another seed, or it would propose what it had proposed.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), n_startup_trials=5)
    return study


def _settled(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials with a loss, and those that failed by themselves; not the ones that were cut off."""
    return [t for t in study.trials if t.value is not None or "error" in t.user_attrs]


def _run_trial(study: optuna.Study, recipe: Recipe, ranges: dict[str, Range], out: Path) -> None:
    from optuna.trial import TrialState

    trial = study.ask()
    settings = {key: one.suggest(trial, key) for key, one in ranges.items()}
    said = ", ".join(f"{key.split('.')[1]} {value:.4g}" if isinstance(value, float) else f"{key.split('.')[1]} {value}"
                     for key, value in settings.items())  # fmt: skip
    print(f"trial {len(_settled(study)) + 1}: {said}", flush=True)
    own = with_settings(recipe, settings)
    # Named by its settings: proposed again after a cut, a trial finds its own checkpoint.
    own.out = str(out / "trials" / fingerprint(settings)[:12])
    trial.set_user_attr("run", Path(own.out).name)
    try:
        run = pretrain(own)
    except TrajlmError as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.FAIL)
        print(f"failed: {error}", flush=True)
        return
    found = json.loads((run / "metrics.json").read_text())["splits"][TUNING]
    trial.set_user_attr("recall", {f"recall_{r['k']}": r["recall"] for r in found["recall_mean_over_pairs"]})
    study.tell(trial, found["loss"])
    print(f"tuning loss {found['loss']:.4f}, best so far {study.best_value:.4f}", flush=True)


def _write_table(study: optuna.Study, settings: Sequence[str], out: Path) -> None:
    """``trials.csv``, best first: settings, tuning loss, mean Recall@K on the tuning stays, run folder, error."""
    rows = [
        {
            "tuning_loss": t.value,
            **{key: t.params.get(key) for key in settings},
            **t.user_attrs.get("recall", {}),
            "run": t.user_attrs.get("run"),
            "error": t.user_attrs.get("error"),
        }
        for t in _settled(study)
    ]
    table = pl.DataFrame(rows, infer_schema_length=None).sort("tuning_loss", nulls_last=True)
    write_text(out / TABLE, table.write_csv())


def _conclude(study: optuna.Study, recipe: Recipe, out: Path) -> Path:
    done = [t for t in _settled(study) if t.value is not None]
    if not done:
        raise TrajlmError(f"every trial failed; {out / TABLE} says why")
    best = study.best_trial
    chosen = dataclasses.asdict(with_settings(recipe, best.params))
    kept = {name: value for name, value in chosen.items() if name not in ("data", "out", "encoders")}
    write_text(out / BEST, yaml.safe_dump(kept, sort_keys=False))
    for key, value in best.params.items():
        print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    print(f"best of {len(done)} trials, tuning loss {best.value:.4f}; its recipe: {out / BEST}")
    return out / BEST
