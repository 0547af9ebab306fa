"""Where the truth is planted, the audit finds it: what decides, and whether a model leans on demographics.

The outcomes are drawn anew from the synthetic ICU's own truth: one follows severity late in the window alone, one
follows demographics alone. Notes and pictures, which show severity as well, are left out, so that it is the series that
decide the first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from trajlm.backbones import build_backbone
from trajlm.config import BackboneConfig, FinetuningConfig
from trajlm.dataset import Prepared
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.interpret.ablation import anchoring, cohort_ablation
from trajlm.interpret.audit import summarise, with_decisions
from trajlm.interpret.importance import event_importance
from trajlm.latents import Latents, TrajectoryBatch, cache_latents
from trajlm.sequence_objective import SequenceObjective
from trajlm.tasks import build_tasks
from trajlm.trajectory import TrajectoryModel

STEPS, BATCH = 200, 24
CAUSES = ("severity", "demographics")


def planted_outcomes(raw: Path, prepared: Prepared, planted: str) -> np.ndarray:
    """float64[N]: 1 for the half of the stays whose planted cause is largest."""
    severity = pl.read_csv(raw / "truth/severity.csv.gz").filter(pl.col("hour").is_between(24, 48))
    late = severity.group_by("stay_id").agg(pl.col("severity").mean().alias("cause"))
    if planted == "demographics":
        late = pl.read_csv(raw / "truth/stays.csv.gz").select("stay_id", pl.col("demographic_logit").alias("cause"))
    cause = prepared.stays.select("stay_id").join(late, on="stay_id", how="left", maintain_order="left")["cause"]
    cause = cause.fill_null(cause.median()).to_numpy()
    return (cause > np.median(cause)).astype(float)


def timelines(model: TrajectoryModel, latents: Latents, stays: np.ndarray, outcomes: np.ndarray) -> TrajectoryBatch:
    """Demographics and series of these stays, with the planted outcome."""
    batch = latents.trajectories(stays, torch.from_numpy(outcomes[stays, None]).float(), 1000)
    read = torch.tensor([model.encoders.modalities.index(name) for name in ("demographics", "series")])
    return batch.keep(torch.isin(batch.modality, read))


def train(model: TrajectoryModel, latents: Latents, stays: np.ndarray, outcomes: np.ndarray) -> TrajectoryModel:
    """A few steps on these stays in the paper's reading, state shown."""
    model.fitted_tasks[0].fit(torch.from_numpy(outcomes[stays]).float())
    settings = FinetuningConfig(loss_over="last", modality_dropout=0.0, dropout=0.0, input_dropout=0.0)
    objective, random = SequenceObjective(model, settings).train(), np.random.default_rng(0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(STEPS):
        some = random.choice(stays, BATCH, replace=False)
        loss = objective(timelines(model, latents, some, outcomes))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimiser.step()
    return model.eval()


def planted_model(
    raw: Path, prepared: Prepared, encoders: AlignedEncoders, latents: Latents, planted: str, seed: int = 0
) -> tuple[TrajectoryModel, TrajectoryBatch, pl.DataFrame]:
    """A model that learned what was planted, the stays it did not learn from, and how its beliefs of them change."""
    torch.manual_seed(seed)
    outcomes, unseen = planted_outcomes(raw, prepared, planted), prepared.positions("tuning", "held_out")
    fresh = TrajectoryModel(
        encoders, build_backbone(BackboneConfig(name="tiny")), build_tasks(["mortality"]), prepared.modalities,
        prepared.features, prepared.image_pixels, context="own", inputs="latent_and_state",
    )  # fmt: skip
    fresh = train(fresh, latents, np.setdiff1d(np.arange(len(prepared.stays)), unseen), outcomes)
    batch = timelines(fresh, latents, unseen, outcomes)
    return fresh, batch, anchoring(cohort_ablation(fresh, [batch], encoders.modalities), ["mortality"])


def all_latents(prepared: Prepared, encoders: AlignedEncoders, folder: Path) -> Latents:
    """Of every stay."""
    return cache_latents(prepared, encoders, np.arange(len(prepared.stays)), folder, "all")


def share_on_demographics(model: TrajectoryModel, batch: TrajectoryBatch, layer: int) -> np.ndarray:
    """float64[N]: of each stay's attention in a layer."""
    return cohort_ablation(model, [batch], [], layer)["static_share"].drop_nulls().to_numpy()


def moved_by_knock_out(model: TrajectoryModel, batch: TrajectoryBatch, stays: int = 12) -> float:
    """Mean over the first stays of how far the last belief moves where nothing may attend to demographics."""
    moved = []
    for row in range(stays):
        one = batch.select(torch.tensor([row]))
        table = event_importance(model, one.keep(one.present), "mortality")
        moved.append(table.filter(pl.col("modality") == "demographics")["knock_out"].abs().max())
    return float(np.mean(moved))


@pytest.fixture(scope="module")
def audits(raw, prepared, model, tmp_path_factory):
    """By what was planted: the summary of an audit of the stays that were not learned from."""
    latents = all_latents(prepared, model.encoders, tmp_path_factory.mktemp("planted") / "latents")
    found = {}
    for planted in CAUSES:
        fresh, batch, changes = planted_model(raw, prepared, model.encoders, latents, planted)
        summary = summarise(with_decisions(changes, {"mortality": 0.5}), prepared.stays, 300, 0)
        found[planted] = (fresh, batch, summary)
    return found


def measured(summary: pl.DataFrame, measure: str) -> dict[str, dict[str, float]]:
    """Rows of one measure by what was ablated."""
    return {row["ablated"]: row for row in summary.filter(pl.col("measure") == measure).iter_rows(named=True)}


@pytest.mark.parametrize(("planted", "decisive"), [("severity", "series"), ("demographics", "demographics")])
def test_the_audit_finds_what_decides(audits, planted, decisive):
    _, _, summary = audits[planted]
    drift, flips = measured(summary, "absolute_drift"), measured(summary, "flips")
    others = [row for name, row in drift.items() if name != decisive]
    assert drift[decisive]["low"] > max(row["high"] for row in others)
    assert flips[decisive]["value"] > max(row["value"] for name, row in flips.items() if name != decisive)


def test_the_audit_finds_who_leans_on_demographics(audits):
    """A belief moves without demographics where the outcome follows them, and hardly where it does not."""
    drift = {planted: measured(audits[planted][2], "absolute_drift")["demographics"] for planted in audits}
    assert drift["demographics"]["low"] > drift["severity"]["high"]


def test_knocking_demographics_out_tells_who_leans_on_them(audits):
    """A belief moves where read-outs may no longer attend to demographics that decide, and not where they do not.

    How much attention falls on demographics tells less: in some trainings about as much does where they decide nothing.
    """
    moved = {planted: moved_by_knock_out(model, batch) for planted, (model, batch, _) in audits.items()}
    assert moved["demographics"] > 10 * moved["severity"]
    assert moved["demographics"] > 0.05


def test_interventions_find_the_planted_cause_in_a_stay(audits):
    """Of single events, the demographic one moves the belief most where demographics decide."""
    model, batch, _ = audits["demographics"]
    found = []
    for row in range(3):
        one = batch.select(torch.tensor([row]))
        table = event_importance(model, one.keep(one.present), "mortality")
        found += [table.sort(pl.col(name).abs())["modality"][-1] for name in ("removal", "knock_out", "attribution")]
    assert found.count("demographics") >= 6
