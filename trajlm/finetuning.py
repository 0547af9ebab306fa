"""Stage 2: static baseline and sequence model on frozen latents, prepared folder to beliefs and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from trajlm.assemble import build_encoders, build_trajectory_model, load_encoders, save_trajectory_model
from trajlm.backbones import describe, starts_at_random
from trajlm.cards import finetuning_card
from trajlm.checkpoint import RunFolder, data_fingerprint, fingerprint, write_tensors, write_text
from trajlm.config import EncoderConfig, FinetuningConfig, Recipe
from trajlm.dataset import Prepared, load_prepared
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.errors import TrajlmError
from trajlm.fusions.mlp import ConcatenationMLP
from trajlm.latents import Latents, StaticBatch, TrajectoryBatch, cache_latents
from trajlm.metrics import METRICS, evaluate, paired_difference_interval
from trajlm.schema import HELD_OUT, TRAIN, TUNING
from trajlm.tasks import Task, build_tasks, stay_losses
from trajlm.training import LoopSettings, Stage, Trainer, make_accelerator
from trajlm.trajectory import TrajectoryModel

LANDMARKS: tuple[float | None, ...] = (6.0, 12.0, 24.0, 48.0, None)
HOURS_BEFORE_RISE = 2.0  # a belief at admission still counts, a fifth of one at 48 hours
UNSEEN_SHARE_TRAINED = 0.85  # of the patients of the unseen pool; the others tune
SEQUENCE, STATIC = "sequence", "static_mlp"


class SequenceObjective(nn.Module):
    """Mean loss of a batch of timelines over their read-outs (``loss_over``).

    In training all events of one random modality are ablated with some probability, as a user may lack it.
    """

    def __init__(self, model: TrajectoryModel, config: FinetuningConfig) -> None:
        super().__init__()
        self.model = model
        self.modality_dropout, self.loss_over = config.modality_dropout, config.loss_over

    def forward(self, batch: TrajectoryBatch) -> Tensor:
        """float[]."""
        if self.training and self.modality_dropout > 0:
            batch = batch.keep(~random_modality(batch, self.modality_dropout))
        weights = batch.present.float()
        if self.loss_over == "rising":
            weights = weights * (batch.hours.to(weights.dtype) + HOURS_BEFORE_RISE).sqrt()
        elif self.loss_over == "last":
            weights = torch.zeros_like(weights).scatter(1, batch.present.sum(1, keepdim=True) - 1, 1.0)
        return stay_losses(self.model.fitted_tasks, self.model(batch).readouts, batch.targets, weights).mean()


def random_modality(batch: TrajectoryBatch, probability: float) -> Tensor:
    """bool[B, S]: with ``probability`` all events of one of the modalities that the stay holds, never all events."""
    b, _ = batch.modality.shape
    device = batch.modality.device
    count = int(batch.modality.max()) + 1
    held = torch.zeros(b, count, dtype=torch.bool, device=device)
    held.scatter_(1, batch.modality, True)
    # Padding points at modality 0: it counts only where a real event does.
    held[:, 0] = ((batch.modality == 0) & batch.present).any(dim=1)
    order = torch.rand(b, count, device=device).masked_fill(~held, -1.0)
    loses = (torch.rand(b, device=device) < probability) & (held.sum(dim=1) >= 2)
    return (batch.modality == order.argmax(dim=1, keepdim=True)) & loses[:, None] & batch.present


class StaticBaseline(nn.Module):
    """Late fusion of whole-stay latents, one read-out per stay."""

    def __init__(self, fusion: ConcatenationMLP, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.fusion, self.tasks = fusion, nn.ModuleList(tasks)
        self.heads = nn.Linear(fusion.width, len(tasks))

    def readouts(self, batch: StaticBatch) -> Tensor:
        """float[B, K]."""
        return self.heads(self.fusion(batch.latents, batch.present))

    def forward(self, batch: StaticBatch) -> Tensor:
        """float[] mean loss."""
        weights = torch.ones(len(batch.stay_ids), 1, device=batch.latents.device)
        return stay_losses(_tasks(self.tasks), self.readouts(batch)[:, None], batch.targets, weights).mean()


def _tasks(modules: nn.ModuleList) -> list[Task]:
    return [task for task in modules if isinstance(task, Task)]


@dataclass(frozen=True)
class StaySplits:
    """Positions of the stays that fine-tuning learns from, tunes on and reports on; the words for a log."""

    train: np.ndarray
    tuning: np.ndarray
    held_out: np.ndarray
    description: str

    @property
    def all(self) -> np.ndarray:
        """int64[n], sorted."""
        return np.sort(np.concatenate([self.train, self.tuning, self.held_out]))

    def of(self, split: str) -> np.ndarray:
        """Positions of a split by name."""
        return {TRAIN: self.train, TUNING: self.tuning, HELD_OUT: self.held_out}[split]


def finetuning_splits(prepared: Prepared, stays: str, seed: int) -> StaySplits:
    """Which stays fine-tuning may use (method 4); stays without any event have no belief and are left out.

    Args:
        prepared: the records.
        stays: ``auto``, ``unseen`` or ``train`` (:class:`FinetuningConfig`).
        seed: divides the unseen patients.
    """
    if stays == "auto":
        stays = "train" if prepared.published_splits else "unseen"
    some_event = np.diff(prepared.bounds) > 0
    parts = {split: prepared.positions(split) for split in (TRAIN, TUNING, HELD_OUT)}
    if stays == "train":
        words = "learns from the training split"
    else:
        patients = prepared.stays["subject_id"].to_numpy()[parts[TUNING]]
        order = np.random.default_rng(seed).permutation(np.unique(patients))
        trained = np.isin(patients, order[: round(len(order) * UNSEEN_SHARE_TRAINED)])
        parts[TRAIN], parts[TUNING] = parts[TUNING][trained], parts[TUNING][~trained]
        words = "learns from stays that pretraining's training split never saw"
    kept = {split: positions[some_event[positions]] for split, positions in parts.items()}
    for split, positions in kept.items():
        if not len(positions):
            raise TrajlmError(f"{prepared.folder}: no {split} stay with an event is left for fine-tuning; prepare more")
    empty = sum(len(parts[s]) - len(kept[s]) for s in parts)
    sizes = ", ".join(f"{len(kept[s])} {s}" for s in kept)
    return StaySplits(
        kept[TRAIN],
        kept[TUNING],
        kept[HELD_OUT],
        f"fine-tuning {words}: {sizes} stays; {empty} stays without events left out",
    )


@dataclass
class Finetuning:
    """Everything the two arms share."""

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

    def static(self, stays: np.ndarray, random: object = None) -> StaticBatch:
        """Whole-stay latents of these stays (positions)."""
        return self.latents.static(stays, self.targets[torch.from_numpy(stays)])


def finetune(recipe: Recipe) -> Path:
    """Run the stage; a finished run is left as it is, an interrupted one goes on. Returns the run folder."""
    if recipe.data is None or recipe.out is None:
        raise TrajlmError("fine-tuning needs --data PREPARED and --out RUN")
    prepared = load_prepared(recipe.data)
    accelerator = make_accelerator()
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
    fitted_tasks(recipe, targets, splits)
    backbone = describe(recipe.backbone.name)
    run = RunFolder(recipe.out, "finetuning", recipe, inputs, accelerator.is_main_process)
    if run.finished:
        print(f"{run.path}: fine-tuning is finished already")
        return run.path
    if run.main:
        print(f"{splits.description}\nbackbone {backbone}")
    encoders.to(accelerator.device)
    with accelerator.main_process_first():
        latents = cache_latents(prepared, encoders, splits.all, run.path / "latents", fingerprint(inputs))
    work = Finetuning(recipe, prepared, splits, latents, targets, run, accelerator)
    static = train_static(work)
    sequence = train_sequence(work, encoders)
    if run.main:
        _conclude(work, static, sequence)
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
            raise TrajlmError(f"task {task.target}: {prepared.folder}/stays.parquet has no column {task.column}")
        values = torch.tensor(prepared.stays[task.column].cast(pl.Float32).fill_null(float("nan")).to_numpy())
        columns.append(torch.where(task.usable(values), values, float("nan")))
    return torch.stack(columns, dim=1)


def fitted_tasks(recipe: Recipe, targets: Tensor, splits: StaySplits) -> list[Task]:
    """Fresh tasks, fitted on the training stays' rows of ``targets`` float[N, K]."""
    tasks = build_tasks(recipe.finetuning.tasks)
    for k, task in enumerate(tasks):
        task.fit(targets[torch.from_numpy(splits.train), k])
    return tasks


def train_static(work: Finetuning) -> pl.DataFrame:
    """Train the baseline and return its beliefs: one row per stay, at the end of its window."""
    config, recipe = work.recipe.finetuning, work.recipe
    torch.manual_seed(recipe.seed)
    encoder = recipe.encoder
    model = StaticBaseline(
        ConcatenationMLP(len(work.latents.modalities), encoder.latent_width),
        fitted_tasks(recipe, work.targets, work.splits),
    )
    stage = Stage(STATIC, model, work.splits.train, work.splits.tuning, work.static)
    settings = LoopSettings(config.baseline_epochs, 20, 64, 1e-3, config.weight_decay, recipe.seed)
    Trainer(stage, settings, work.run, work.accelerator).fit()
    if work.run.main:
        folder = work.run.path / STATIC
        folder.mkdir(exist_ok=True)
        write_tensors(folder / "model.safetensors", model.state_dict())
    return _static_beliefs(work, model)


@torch.no_grad()
def _static_beliefs(work: Finetuning, model: StaticBaseline) -> pl.DataFrame:
    frames = []
    for split in (TUNING, HELD_OUT):
        stays = work.splits.of(split)
        batch = work.static(stays)
        readouts = model.readouts(batch.to(work.accelerator.device)).cpu()
        columns: dict[str, Any] = {
            "stay_id": batch.stay_ids.numpy(),
            "split": [split] * len(stays),
            "event_index": np.diff(work.prepared.bounds)[stays] - 1,
            "hours_since_admission": work.prepared.hours[work.prepared.bounds[stays + 1] - 1],
            "modality": ["all"] * len(stays),
        }
        for k, task in enumerate(_tasks(model.tasks)):
            columns[f"belief_{task.target}"] = task.cpu().belief(readouts[:, k]).double().numpy()
            columns[f"target_{task.target}"] = pl.Series(batch.targets[:, k].double().numpy()).fill_nan(None)
        frames.append(pl.DataFrame(columns))
    return pl.concat(frames)


def _backbone_rate_factor(recipe: Recipe) -> float:
    config = recipe.finetuning
    if config.backbone_learning_rate is not None:
        return config.backbone_learning_rate / config.learning_rate
    return 1.0 if starts_at_random(recipe.backbone) else 0.25


def train_sequence(work: Finetuning, encoders: AlignedEncoders) -> pl.DataFrame:
    """Fine-tune the sequence model, save it, and return its beliefs after every event."""
    config, recipe = work.recipe.finetuning, work.recipe
    torch.manual_seed(recipe.seed)
    model = build_trajectory_model(
        recipe, work.prepared, encoders, fitted_tasks(recipe, work.targets, work.splits), work.accelerator.device
    )
    lengths = np.array([len(work.latents.rows(stay, config.max_events)) for stay in work.splits.train])
    stage = Stage(
        SEQUENCE,
        SequenceObjective(model, config),
        work.splits.train,
        work.by_length(work.splits.tuning),
        work.trajectories,
        lengths=lengths,
        rate_factors={"model.backbone.": _backbone_rate_factor(recipe)},
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
    )
    Trainer(stage, settings, work.run, work.accelerator).fit()
    if work.run.main:
        save_trajectory_model(model, recipe.backbone, recipe.encoder, work.run.path)
    return _sequence_beliefs(work, model)


@torch.no_grad()
def _sequence_beliefs(work: Finetuning, model: TrajectoryModel) -> pl.DataFrame:
    frames = []
    size = work.recipe.finetuning.batch_size
    for split in (TUNING, HELD_OUT):
        stays = work.by_length(work.splits.of(split))
        for start in range(0, len(stays), size):
            batch = work.trajectories(stays[start : start + size]).to(work.accelerator.device)
            frame = model.belief_frame(batch, model(batch).readouts)
            frames.append(frame.with_columns(pl.lit(split).alias("split")))
    return pl.concat(frames).sort("stay_id", "event_index")


def _conclude(work: Finetuning, static: pl.DataFrame, sequence: pl.DataFrame) -> None:
    run = work.run
    _write_beliefs(run.path / "beliefs.parquet", sequence)
    _write_beliefs(run.path / STATIC / "beliefs.parquet", static)
    metrics = report_metrics(work, {SEQUENCE: sequence, STATIC: static})
    write_text(run.path / "README.md", finetuning_card(work.recipe, work.prepared, work.splits.description, metrics))
    print_headline(metrics)
    run.finish(metrics)


def _write_beliefs(path: Path, beliefs: pl.DataFrame) -> None:
    partial = path.with_name(f".{path.name}.partial")
    beliefs.write_parquet(partial)
    partial.replace(path)


def report_metrics(work: Finetuning, arms: dict[str, pl.DataFrame]) -> dict[str, Any]:
    """``metrics.json``: every metric with its interval, by split, arm, target and landmark; the arms' difference."""
    config = work.recipe.finetuning
    tasks = build_tasks(config.tasks)
    kinds = [(task.target, task.kind) for task in tasks]
    metrics: dict[str, Any] = {
        "stays": {split: len(work.splits.of(split)) for split in (TRAIN, TUNING, HELD_OUT)},
        "description": work.splits.description,
        "targets": [{"name": t.target, "kind": t.kind, "title": t.title} for t in tasks],
        "arms": {},
        "difference": [],
    }
    for split in (TUNING, HELD_OUT):
        metrics["arms"][split] = {}
        for arm, beliefs in arms.items():
            landmarks = LANDMARKS if arm == SEQUENCE else (None,)
            rows = evaluate(
                beliefs.filter(pl.col("split") == split),
                work.prepared.stays,
                kinds,
                landmarks,
                config.bootstrap_resamples,
                work.recipe.seed,
            )
            metrics["arms"][split][arm] = rows.to_dicts()
    metrics["difference"] = _differences(work, arms, kinds)
    return metrics


def _differences(work: Finetuning, arms: dict[str, pl.DataFrame], kinds: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Sequence minus static at the end of the window, on the same held-out stays, with paired intervals."""
    last = arms[SEQUENCE].filter(pl.col("split") == HELD_OUT).sort("stay_id", "event_index")
    last = last.unique("stay_id", keep="last", maintain_order=True)
    both = last.join(arms[STATIC], on="stay_id", suffix="_static").join(
        work.prepared.stays.select("stay_id", "subject_id"), on="stay_id"
    )
    if both.height != last.height:
        raise AssertionError(f"the arms' held-out stays differ: {last.height} and {both.height} shared")
    rows = []
    for target, kind in kinds:
        known = both.filter(pl.col(f"target_{target}").is_not_null())
        y, subjects = known[f"target_{target}"].to_numpy(), known["subject_id"].to_numpy()
        a, b = known[f"belief_{target}"].to_numpy(), known[f"belief_{target}_static"].to_numpy()
        for name, (metric, of) in METRICS.items():
            if of == kind and known.height:
                low, high = paired_difference_interval(
                    metric, y, a, b, subjects, work.recipe.finetuning.bootstrap_resamples, work.recipe.seed
                )
                value = float(metric(y, a)) - float(metric(y, b))
                row = {"target": target, "metric": name, "value": value, "low": low, "high": high}
                rows.append({k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()})
    return rows


def print_headline(metrics: dict[str, Any]) -> None:
    """The held-out figures of both arms at the end of the window, with their intervals."""
    for arm, rows in metrics["arms"][HELD_OUT].items():
        for row in rows:
            if row["landmark"] is None and row["metric"] in ("auroc", "auprc", "mae"):
                shown = "undefined" if row["value"] is None else f"{row['value']:.3f} {_interval(row)}"
                print(f"held-out {row['target']} {row['metric']} of {arm}: {shown}, {row['stays']} stays")


def _interval(row: dict[str, Any]) -> str:
    return "[no interval]" if row["low"] is None else f"[{row['low']:.3f}, {row['high']:.3f}]"
