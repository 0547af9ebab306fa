"""Stage 2: baselines and sequence model on frozen latents, prepared folder to beliefs and metrics."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file
from torch import Tensor

from trajlm.adapters import require_learning_adapters
from trajlm.arms import (
    BASELINE_ARMS,
    ENSEMBLES,
    NETWORK,
    SEQUENCE,
    SEVERITY,
    beliefs_path,
    print_headline,
    report_metrics,
    write_beliefs,
)
from trajlm.assemble import build_encoders, build_trajectory_model, load_encoders, save_trajectory_model
from trajlm.backbones import config_of, describe, starts_at_random
from trajlm.baselines import scores_of, tabular_beliefs
from trajlm.cards import finetuning_card
from trajlm.checkpoint import RunFolder, data_fingerprint, fingerprint, read_run, write_tensors, write_text
from trajlm.config import EncoderConfig, Recipe
from trajlm.dataset import Prepared, load_prepared
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.engines import make_accelerator, splits_moments
from trajlm.ensemble import ensemble_beliefs
from trajlm.errors import TrajlmError
from trajlm.fusions import FUSIONS
from trajlm.hardware import means_of
from trajlm.latents import KnownLatents, Latents, TrajectoryBatch, cache_latents
from trajlm.linear_readout import LinearReadout, fit_linear
from trajlm.locks import locked
from trajlm.presets import family_of
from trajlm.readings import Readings, best_shares, most_stays, readings
from trajlm.sampling import chances
from trajlm.schema import HELD_OUT, SCORE_PREFIX, TRAIN, TUNING
from trajlm.selection import StaySplits, finetuning_splits
from trajlm.sequence_objective import SequenceObjective, random_modality, readout_weights
from trajlm.sharding import require_splittable
from trajlm.static import FusionArm, fitted_tasks
from trajlm.subgroups import STAYS, stay_attributes
from trajlm.tasks import Task, build_tasks
from trajlm.trackers import chosen_tracker, tracking
from trajlm.training import LoopSettings, Stage, Trainer
from trajlm.trajectory import TrajectoryModel
from trajlm.tree_readout import TreeReadout, fit_trees, require_lightgbm
from trajlm.zero import require_splittable_moments

SHARES = "shares.json"  # of a run: what network, regression and trees count in a read-out


@dataclass
class Finetuning:
    """Everything the arms share."""

    recipe: Recipe
    prepared: Prepared
    splits: StaySplits
    latents: Latents
    targets: Tensor  # float[N, K] of every stay of the prepared folder, NaN where unknown
    run: RunFolder
    accelerator: Any

    def trajectories(self, stays: np.ndarray, random: object = None) -> TrajectoryBatch:
        """Timelines of these stays (positions)."""
        return self.latents.trajectories(
            stays, self.targets[torch.from_numpy(stays)], self.recipe.finetuning.max_events
        )

    def by_length(self, stays: np.ndarray) -> np.ndarray:
        """These stays in order of their number of events: neighbours share a batch, so little of it is padding."""
        return stays[np.argsort(np.diff(self.prepared.bounds)[stays], kind="stable")]


def finetune(recipe: Recipe) -> Path:
    """Run the stage; a finished run is left as it is, an interrupted one goes on. Returns the run folder.

    Without ``data`` it reads what the encoders were pretrained on. A run that is asked for more baselines or ensembles
    than it has is given those; the others stay as they are.
    """
    if recipe.data is None and recipe.encoders != "scratch":
        recipe.data = read_run(recipe.encoders)["recipe"]["data"]
    if recipe.data is None or recipe.out is None:
        raise TrajlmError(
            "fine-tuning needs --out RUN, and --data PREPARED where --encoders RUN does not tell what it read"
        )
    chosen_tracker(recipe.tracker)
    prepared = load_prepared(recipe.data)
    accelerator = make_accelerator()
    out = Path(recipe.out)
    with locked(out, accelerator.is_main_process):
        return _finetune(recipe, out, prepared, accelerator)


def _finetune(recipe: Recipe, out: Path, prepared: Prepared, accelerator: Any) -> Path:
    torch.manual_seed(recipe.seed)
    encoders, recipe.encoder = _encoders(recipe, prepared)
    if recipe.encoders != "scratch" and accelerator.is_main_process:
        print(f"encoders, and their settings, are those of {recipe.encoders}")
    inputs = {
        "data": data_fingerprint(prepared.folder),
        "encoders": fingerprint(*[t for _, t in sorted(encoders.state_dict().items())]),
    }
    # Whatever the settings get wrong shows before the run folder is made.
    splits = finetuning_splits(prepared, recipe.finetuning.stays, recipe.seed)
    targets = target_table(recipe, prepared)
    tasks = fitted_tasks(recipe, targets, splits)
    chances(tasks, targets[torch.from_numpy(splits.train)], recipe.finetuning.sampling)
    if recipe.finetuning.tree_readout:
        require_lightgbm("finetuning.tree_readout")
    if "lightgbm" in recipe.finetuning.baselines:
        require_lightgbm("finetuning.baselines lightgbm")
    if SEVERITY in recipe.finetuning.baselines:
        scores_of(prepared)
    backbone = describe(recipe.backbone.name)
    means = means_of(recipe, family_of(config_of(recipe.backbone.name).model_type), accelerator.device)
    if accelerator.is_fsdp2:
        require_splittable(recipe)
    if splits_moments(accelerator):
        require_splittable_moments(recipe)
    run = RunFolder(out, "finetuning", recipe, inputs, accelerator.is_main_process)
    if run.finished:
        print(f"{run.path}: fine-tuning is finished already")
        return run.path
    if run.main:
        untold = untold_targets(targets[torch.from_numpy(splits.held_out)], tasks)
        print("\n".join([splits.description, f"backbone {backbone}", *means.changes, *untold]))
    encoders.to(accelerator.device)
    key, reach = fingerprint(inputs, asdict(recipe.encoder)), recipe.finetuning.event_latents
    with accelerator.main_process_first():
        latents = cache_latents(prepared, encoders, splits.all, run.path / "latents", key, reach)
    work = Finetuning(recipe, prepared, splits, latents, targets, run, accelerator)
    with tracking(accelerator, run.path, recipe.tracker):
        known = KnownLatents(
            prepared, encoders, splits.all, run.path / "latents_known", key, accelerator.main_process_first
        )
        told = _sequence_told(work)
        arms = train_baselines(work, known)
        arms = (told or train_sequence(work, encoders)) | arms
    if run.main:
        _conclude(work, arms | ensembles(work, arms))
    accelerator.wait_for_everyone()
    return run.path


def _encoders(recipe: Recipe, prepared: Prepared) -> tuple[AlignedEncoders, EncoderConfig]:
    if recipe.encoders == "scratch":
        return build_encoders(prepared, recipe.encoder), recipe.encoder
    return load_encoders(Path(recipe.encoders), prepared)


def target_table(recipe: Recipe, prepared: Prepared) -> Tensor:
    """float[N, K] targets; NaN where unknown or outside what the task asks for."""
    columns = []
    for task in build_tasks(recipe.finetuning.tasks):
        if task.column not in prepared.stays.columns:
            raise TrajlmError(_no_column(task, prepared))
        values = torch.tensor(prepared.stays[task.column].cast(pl.Float32).fill_null(float("nan")).to_numpy())
        columns.append(torch.where(task.usable(values), values, float("nan")))
    return torch.stack(columns, dim=1)


def _no_column(task: Task, prepared: Prepared) -> str:
    """That a folder does not tell a target, and which ones it tells."""
    held = [name.removeprefix("target_") for name in prepared.stays.columns if name.startswith("target_")]
    shown = [name for name in held if not name.startswith("phenotype_")]
    shown += ["phenotypes"] if len(shown) < len(held) else []
    near = difflib.get_close_matches(task.target, held, n=1)
    nearest = f"the nearest is {near[0]!r}; " if near else ""
    return (
        f"task {task.target}: {prepared.folder}/stays.parquet has no column {task.column}; {nearest}drop the task from "
        f"finetuning.tasks, or name a target it has as label:NAME or hours:NAME: {', '.join(shown)}"
    )


def untold_targets(targets: Tensor, tasks: Sequence[Task]) -> list[str]:
    """A line of warning where of some targets no held-out stay has a known outcome; none where all can be judged.

    Args:
        targets: float[n, K] of the held-out stays, NaN where unknown.
        tasks: K tasks.
    """
    untold = [task.target for k, task in enumerate(tasks) if bool(targets[:, k].isnan().all())]
    if not untold:
        return []
    more = f" and {len(untold) - 3} more" if len(untold) > 3 else ""
    return [
        f"warning: no held-out stay has a known outcome of {', '.join(untold[:3])}{more}: figures of it will be "
        "undefined; prepare a split that holds out stays whose outcome is known"
    ]


def _backbone_rate_factor(recipe: Recipe) -> float:
    config = recipe.finetuning
    if config.backbone_learning_rate is not None:
        return config.backbone_learning_rate / config.learning_rate
    return 1.0 if starts_at_random(recipe.backbone) else 0.25


def _sequence_told(work: Finetuning) -> dict[str, pl.DataFrame]:
    """Beliefs of the sequence model and of its network alone, where the run holds them; else none.

    Raises:
        TrajlmError: a finished run lacks them, which is to be given more baselines and not to be trained again.
    """
    config = work.recipe.finetuning
    arms = [SEQUENCE, NETWORK] if config.linear_readout or config.tree_readout else [SEQUENCE]
    paths = {arm: beliefs_path(work.run.path, arm) for arm in arms}
    gone = [path for path in paths.values() if not path.exists()]
    if gone and (work.run.path / "metrics.json").exists():
        raise TrajlmError(
            f"{gone[0]}: expected it of a finished run that is given more baselines; choose another --out"
        )
    return {} if gone else {arm: pl.read_parquet(path) for arm, path in paths.items()}


def train_sequence(work: Finetuning, encoders: AlignedEncoders) -> dict[str, pl.DataFrame]:
    """Fine-tune the sequence model, save it, and return its beliefs after every event, by arm.

    Where something stands beside its network, what the network alone would have said is an arm of its own.
    """
    config, recipe = work.recipe.finetuning, work.recipe
    torch.manual_seed(recipe.seed)
    model = build_trajectory_model(
        recipe, work.prepared, encoders, fitted_tasks(recipe, work.targets, work.splits), work.accelerator.device
    )
    tasks = model.fitted_tasks
    for name, readout in model.beside.items():
        _fit_beside(work, model, name, readout)
    lengths = np.array([len(work.latents.rows(stay, config.max_events)) for stay in work.splits.train])
    stage = Stage(
        SEQUENCE,
        SequenceObjective(model, config),
        work.splits.train,
        work.by_length(work.splits.tuning),
        work.trajectories,
        lengths=lengths if config.batching == "by_length" else None,
        after_first_steps=lambda trained, steps: require_learning_adapters(trained.model.backbone, steps),
        rate_factors={"model.backbone.": _backbone_rate_factor(recipe)},
        chances=chances(tasks, work.targets[torch.from_numpy(work.splits.train)], config.sampling),
    )
    settings = LoopSettings(
        config.epochs,
        config.patience,
        config.batch_size,
        config.learning_rate,
        config.weight_decay,
        recipe.seed,
        warmup_fraction=config.warmup_fraction,
        cosine=True,
        averaging=config.weight_averaging,
        keep_last=config.keep == "last",
        eight_bit=config.optimiser == "adamw8bit",
    )
    Trainer(stage, settings, work.run, work.accelerator).fit()
    if len(model.components) > 1:
        _choose_shares(work, model)
    if work.run.main:
        save_trajectory_model(model, recipe.backbone, recipe.encoder, work.run.path)
    return _sequence_beliefs(work, model)


def _fit_beside(work: Finetuning, model: TrajectoryModel, name: str, readout: LinearReadout | TreeReadout) -> None:
    """Fit what is averaged with the network, once a run: the main process does, and all read it, then and later.

    A run folder is of one recipe, of these data and encoders alone, so what lies there fits.
    """
    path = work.run.path / "checkpoints" / f"{name}.safetensors"
    model.to(work.accelerator.device).eval()
    if work.run.main and not path.exists():
        told = _fitted_beside(work, model, readout)
        write_text(work.run.path / f"{name}.json", json.dumps(told, indent=1))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, dict(readout.named_buffers()))
    work.accelerator.wait_for_everyone()
    readout.load_state_dict(load_file(path))


def _fitted_beside(work: Finetuning, model: TrajectoryModel, readout: LinearReadout | TreeReadout) -> dict[str, object]:
    config, device, tasks = work.recipe.finetuning, work.accelerator.device, model.fitted_tasks

    def rows(batch: TrajectoryBatch, chosen: Tensor) -> Tensor:
        if isinstance(readout, LinearReadout):
            return readout.rows(model.inputs(batch), batch, chosen)
        return readout.rows(batch, chosen)

    def read(stays: np.ndarray, dropout: float) -> Readings:
        def trajectories(some: np.ndarray) -> TrajectoryBatch:
            batch = work.trajectories(some).to(device)
            return batch.keep(~random_modality(batch, dropout)) if dropout > 0 else batch

        return readings(rows, tasks, stays, trajectories, lambda batch: readout_weights(model, batch, config.loss_over))

    torch.manual_seed(work.recipe.seed)  # a resumed run ablates what an uninterrupted one does
    learnt = most_stays(readout.width, work.splits.train, work.recipe.seed)
    tuning = read(work.splits.tuning, 0.0)
    if isinstance(readout, LinearReadout):
        return fit_linear(readout, tasks, read(learnt, config.modality_dropout), tuning)
    # To trees, that something is missing tells something; what is ablated at random would blur it.
    return fit_trees(readout, tasks, read(learnt, 0.0), tuning, work.recipe.seed, config.tree_hours)


def _choose_shares(work: Finetuning, model: TrajectoryModel) -> None:
    """How much the network and what stands beside it count: by the tuning stays' loss, task by task.

    Every process finds the same; a task without a known target there keeps what stood.
    """
    config, tasks = work.recipe.finetuning, model.eval().fitted_tasks
    said = readings(
        lambda batch, chosen: model.apart(batch)[chosen].flatten(1), tasks, work.by_length(work.splits.tuning),
        lambda some: work.trajectories(some).to(work.accelerator.device),
        lambda batch: readout_weights(model, batch, config.loss_over),
    )  # fmt: skip
    best = best_shares(tasks, said, len(model.components))
    model.shares.copy_(torch.where(best.isnan(), model.shares, best))
    if work.run.main:
        tenths = [[round(share, 1) for share in shares] for shares in model.shares.T.tolist()]
        by_target = dict(zip(model.targets, tenths, strict=True))
        told = {target: dict(zip(model.components, shares, strict=True)) for target, shares in by_target.items()}
        write_text(work.run.path / SHARES, json.dumps(told, indent=1))


@torch.no_grad()
def _sequence_beliefs(work: Finetuning, model: TrajectoryModel) -> dict[str, pl.DataFrame]:
    frames: dict[str, list[pl.DataFrame]] = {}
    size = work.recipe.finetuning.batch_size
    for split in (TUNING, HELD_OUT):
        stays = work.by_length(work.splits.of(split))
        for start in range(0, len(stays), size):
            batch = work.trajectories(stays[start : start + size]).to(work.accelerator.device)
            output = model(batch)
            said = {SEQUENCE: output.readouts}
            if model.beside:
                said[NETWORK] = model.alone(model.embed(batch), output.hidden)
            for arm, readouts in said.items():
                frame = model.belief_frame(batch, readouts, counted=True)
                frames.setdefault(arm, []).append(frame.with_columns(pl.lit(split).alias("split")))
    return {arm: pl.concat(parts).sort("stay_id", "event_index") for arm, parts in frames.items()}


def train_baselines(work: Finetuning, known: KnownLatents) -> dict[str, pl.DataFrame]:
    """Beliefs of every baseline asked for, by arm; those on summary features are fitted by the main process alone.

    What an interrupted run had finished is read.
    """
    found, config = {}, work.recipe.finetuning
    kept = {name for name in FUSIONS if beliefs_path(work.run.path, BASELINE_ARMS[name]).exists()}
    work.accelerator.wait_for_everyone()  # all have looked before one writes
    for name in config.baselines:
        arm = BASELINE_ARMS[name]
        if name in kept:
            found[arm] = pl.read_parquet(beliefs_path(work.run.path, arm))
        elif name in FUSIONS:
            found[arm] = FusionArm(
                name, work.recipe, work.prepared, work.latents, work.splits, work.targets, work.run,
                work.accelerator, known,
            ).beliefs()  # fmt: skip
            if work.run.main:
                write_beliefs(beliefs_path(work.run.path, arm), found[arm])
        elif work.run.main and name == SEVERITY:
            for score in scores_of(work.prepared):
                own = f"{SEVERITY}_{score.removeprefix(SCORE_PREFIX)}"
                found[own] = _tabular(work, "logistic", own, score)
        elif work.run.main:
            found[arm] = _tabular(work, name, arm)
    return found


def _tabular(work: Finetuning, model: str, arm: str, score: str | None = None) -> pl.DataFrame:
    path = beliefs_path(work.run.path, arm)
    if path.exists():
        return pl.read_parquet(path)
    config, recipe = work.recipe.finetuning, work.recipe
    splits = {split: work.splits.of(split) for split in (TRAIN, TUNING, HELD_OUT)}
    tasks = fitted_tasks(recipe, work.targets, work.splits)
    targets = work.targets.double().numpy()
    beliefs = tabular_beliefs(
        model, work.prepared, splits, tasks, targets, path.parent, config.baseline_trials, recipe.seed, score
    )
    write_beliefs(path, beliefs)
    return beliefs


def ensembles(work: Finetuning, arms: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """The sequence model averaged with every baseline that ``finetuning.ensembles`` names, by arm."""
    tasks = build_tasks(work.recipe.finetuning.tasks)
    chosen = [BASELINE_ARMS[name] for name in work.recipe.finetuning.ensembles]
    return {ENSEMBLES[arm]: ensemble_beliefs(arms[SEQUENCE], arms[arm], tasks) for arm in chosen}


def _conclude(work: Finetuning, arms: dict[str, pl.DataFrame]) -> None:
    run = work.run
    for arm, beliefs in arms.items():
        write_beliefs(beliefs_path(run.path, arm), beliefs)
    write_beliefs(run.path / STAYS, stay_attributes(work.prepared, work.splits.all))
    metrics = report_metrics(
        {split: len(work.splits.of(split)) for split in (TRAIN, TUNING, HELD_OUT)},
        work.splits.description,
        work.prepared.stays,
        build_tasks(work.recipe.finetuning.tasks),
        arms,
        work.recipe.finetuning.bootstrap_resamples,
        work.recipe.seed,
    )
    write_text(run.path / "README.md", finetuning_card(work.recipe, work.prepared, work.splits.description, metrics))
    print_headline(metrics)
    run.finish(metrics)
