"""Phenotypes as a family of targets, the focal loss, macro means, and late fusions."""

from __future__ import annotations

import shutil

import numpy as np
import polars as pl
import pytest
import torch
from conftest import RECIPE
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F

from trajlm import finetuning
from trajlm.arms import macro_rows, report_metrics
from trajlm.errors import TrajlmError
from trajlm.flags import parse_recipe, recipe_parser
from trajlm.fusions import FUSIONS
from trajlm.sampling import chances, importance
from trajlm.tasks import PHENOTYPES, BinaryTask, HoursTask, build_tasks, stay_losses, targets_at
from trajlm.training import LoopSettings, Stage, epoch_batches


def test_phenotyping_is_25_targets_that_weigh_as_one():
    tasks = build_tasks(["mortality", "phenotyping"])
    assert [t.column for t in tasks[1:]] == [f"target_phenotype_{name}" for name in PHENOTYPES]
    assert len(PHENOTYPES) == len(set(PHENOTYPES)) == 25
    torch.manual_seed(0)
    readouts, targets = torch.randn(6, 4, 26), torch.randint(0, 2, (6, 26)).float()
    targets[0, 3] = float("nan")
    weights = torch.ones(6, 4)
    expected = F.binary_cross_entropy_with_logits(readouts[..., 0], targets[:, :1].expand(-1, 4), reduction="none")
    total = expected.mean(dim=1)
    for k in range(1, 26):
        own = F.binary_cross_entropy_with_logits(
            readouts[..., k], targets[:, k, None].nan_to_num().expand(-1, 4), reduction="none"
        )
        total += torch.where(targets[:, k].isnan(), 0, own.mean(dim=1)) / 25
    torch.testing.assert_close(stay_losses(tasks, readouts, targets, weights, torch.zeros(6, 4)), total)


def test_a_phenotype_no_training_stay_has_teaches_nothing_and_stops_nothing():
    task = build_tasks(["phenotyping"])[0]
    task.fit(torch.tensor([0.0, 0.0, float("nan")]))
    assert float(task.positive_weight) == 1.0
    task.fit(torch.tensor([0.0, 0.0, 0.0, 1.0, float("nan")]))
    assert float(task.positive_weight) == 3.0
    with pytest.raises(TrajlmError, match="0 positives among 2"):
        build_tasks(["mortality"])[0].fit(torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_is_its_definition_and_cross_entropy_at_zero(gamma):
    readout = torch.linspace(-6, 6, 25)
    for outcome in (0.0, 1.0):
        targets = torch.full_like(readout, outcome)
        given = torch.sigmoid(readout if outcome else -readout)
        plain, focal = BinaryTask("x", "x"), BinaryTask("x", "x", gamma)
        for task in (plain, focal):
            task.fit(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        expected = -(3.0 if outcome else 1.0) * (1 - given) ** gamma * given.log()
        torch.testing.assert_close(focal.loss(readout, targets), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(plain.loss(readout, targets), expected / (1 - given) ** gamma, atol=1e-5, rtol=1e-4)


def believed(seed: int = 0, n: int = 90) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Beliefs on three phenotypes: the second has no positive, the third is unknown in some stays."""
    rng = np.random.default_rng(seed)
    target = (rng.random((n, 3)) < [0.4, 0, 0.2]).astype(float)
    belief = 1 / (1 + np.exp(1 - target - rng.normal(size=(n, 3))))
    columns = {"stay_id": range(n), "split": ["held_out"] * n, "event_index": [0] * n}
    columns |= {"hours_since_admission": [5.0] * n}
    for k, name in enumerate("abc"):
        unknown = rng.random(n) < (0.3 if name == "c" else 0)
        columns[f"target_{name}"] = [None if u else v for u, v in zip(unknown, target[:, k], strict=True)]
        columns[f"belief_{name}"] = belief[:, k]
    stays = pl.DataFrame({"stay_id": range(n), "subject_id": [f"p{i // 2}" for i in range(n)]})
    return pl.DataFrame(columns), stays.with_columns(hours_in_unit=pl.lit(50.0))


def test_macro_means_leave_out_a_class_without_positives():
    beliefs, stays = believed()
    rows = macro_rows(beliefs, stays, "family", ["a", "b", "c"], [6.0, None], 40, 0).to_dicts()
    for row in rows:
        score = {"macro_auroc": roc_auc_score, "macro_auprc": average_precision_score}[row["metric"]]
        known = {name: beliefs.drop_nulls(f"target_{name}") for name in "ac"}
        expected = np.mean([score(f[f"target_{n}"], f[f"belief_{n}"]) for n, f in known.items()])
        assert row["value"] == pytest.approx(expected, abs=1e-9)
        assert row["low"] < row["value"] < row["high"]
        assert (row["target"], row["stays"]) == ("family", 90)
    assert [row["landmark"] for row in rows] == [6.0, 6.0, None, None]
    none = macro_rows(beliefs, stays, "family", ["b"], [None], 10, 0)
    assert none["value"].to_list() == [None, None]
    assert macro_rows(beliefs.clear(), stays, "family", ["a", "b"], [None], 10, 0)["stays"].to_list() == [0, 0]


def test_metrics_of_phenotypes_hold_each_and_their_mean():
    n, rng = 40, np.random.default_rng(1)
    tasks = build_tasks(["phenotyping"])
    columns = {"stay_id": range(n), "split": ["tuning", "held_out"] * (n // 2), "event_index": [0] * n}
    columns |= {"hours_since_admission": [1.0] * n}
    for task in tasks:
        columns |= {f"target_{task.target}": rng.integers(0, 2, n), f"belief_{task.target}": rng.random(n)}
    stays = pl.DataFrame({"stay_id": range(n), "subject_id": [str(i) for i in range(n)], "hours_in_unit": [99.0] * n})
    metrics = report_metrics({}, "", stays, tasks, {"sequence": pl.DataFrame(columns)}, 5, 0)
    rows = metrics["arms"]["held_out"]["sequence"]
    each = [r["value"] for r in rows if r["metric"] == "auroc" and r["landmark"] is None]
    mean = [r["value"] for r in rows if r["metric"] == "macro_auroc" and r["landmark"] is None]
    assert len(each) == 25
    assert mean == [pytest.approx(np.mean(each), abs=1e-9)]
    assert [group["targets"] for group in metrics["groups"]] == [[task.target for task in tasks]]


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_reads_tokens_and_learns(name):
    torch.manual_seed(0)
    fusion = FUSIONS[name](3, 4)
    latents, present = torch.randn(5, 3, 4), torch.rand(5, 3) < 0.5
    fusion.eval()
    out = fusion(latents, present)
    assert out.shape == (5, fusion.width)
    changed = latents.clone()
    changed[:, 1] += 1
    assert not torch.allclose(fusion(changed, present), out), "a modality's latent or token is read"
    torch.testing.assert_close(fusion(latents[[2, 0]], present[[2, 0]]), out[[2, 0]])
    fusion.train()(latents, present).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())
    with pytest.raises(ValueError, match="expected"):
        fusion(latents, present[:, :2])


def test_the_lstm_tells_modalities_by_their_place():
    torch.manual_seed(0)
    fusion = FUSIONS["lstm"](3, 4).eval()
    latents, present = torch.randn(5, 3, 4), torch.ones(5, 3, dtype=torch.bool)
    assert not torch.allclose(fusion(latents.flip(1), present), fusion(latents, present))


def test_what_is_left_of_a_stay_falls_with_the_hour_of_the_belief():
    task = build_tasks(["remaining_length_of_stay"])[0]
    assert (task.column, task.target) == ("hours_in_unit", "remaining_length_of_stay_hours")
    stays = torch.tensor([[30.0], [100.0], [float("nan")]])
    hours = torch.tensor([[0.0, 10.0, 31.0]]).expand(3, -1)
    left = targets_at([task], stays[:, None].expand(-1, 3, -1), hours)[..., 0]
    nan = float("nan")
    torch.testing.assert_close(left, torch.tensor([[30.0, 20, nan], [100, 90, 69], [nan] * 3]), equal_nan=True)
    task.fit(stays[:, 0])
    seen = np.log1p([30, 24, 18, 6, 100, 94, 88, 76, 52])  # at 0, 6, 12, 24 and 48 hours, of what has not ended
    assert (float(task.mean), float(task.std)) == pytest.approx((seen.mean(), seen.std(ddof=1)), rel=1e-5)
    readouts = torch.zeros(3, 3, 1)
    weights = torch.ones(3, 3)
    losses = stay_losses([task], readouts, stays, weights, hours)
    one = ((np.log1p([30.0, 20.0]) - seen.mean()) / seen.std(ddof=1)) ** 2
    assert float(losses[0]) == pytest.approx(one.sum() / 3, rel=1e-4)
    assert float(losses[2]) == 0
    with pytest.raises(TrajlmError, match="hours_in_unit is 48 of every training stay"):
        task.fit(torch.tensor([48.0, 48.0]))


def test_other_targets_are_tasks_by_their_kind():
    label, hours = build_tasks(["label:readmission", "hours:ventilation"])
    assert isinstance(label, BinaryTask)
    assert isinstance(hours, HoursTask)
    assert [task.column for task in (label, hours)] == ["target_readmission", "target_ventilation"]
    with pytest.raises(TrajlmError, match="mortality is predicted twice"):
        build_tasks(["mortality", "label:mortality"])
    with pytest.raises(TrajlmError, match="nearest is 'mortality'"):
        build_tasks(["mortalit"])
    with pytest.raises(TrajlmError, match="is not known"):
        build_tasks(["label:"])


def test_balanced_draws_weigh_as_uniform_ones_in_expectation():
    tasks = build_tasks(["length_of_stay", "mortality"])
    rng = np.random.default_rng(0)
    died = (rng.random(4000) < 0.1).astype(float)
    died[:300] = np.nan
    targets = torch.tensor(np.column_stack([rng.uniform(20, 200, 4000), died]), dtype=torch.float32)
    for k, task in enumerate(tasks):
        task.fit(targets[:, k])
    assert chances(tasks, targets, "uniform") is None
    odds = chances(tasks, targets, "balanced")
    assert odds.sum() == pytest.approx(1)
    known = np.isfinite(died)
    assert odds[died == 1].sum() == pytest.approx(odds[died == 0].sum(), rel=1e-4)
    assert odds[~known].sum() == pytest.approx(300 / 4000, rel=1e-3)
    # Of any loss: the mean over draws, each weighed, is the plain mean over stays.
    losses = stay_losses(tasks, torch.randn(4000, 1, 2), targets, torch.ones(4000, 1), torch.zeros(4000, 1))
    weighed = (losses * importance(tasks, targets)).double().numpy()
    assert float(np.sum(odds * weighed)) == pytest.approx(float(losses.double().mean()), rel=1e-4)
    drawn = rng.choice(4000, 200_000, p=odds)
    assert weighed[drawn].mean() == pytest.approx(float(losses.mean()), rel=0.02)
    stage = Stage("x", torch.nn.Linear(1, 1), np.arange(4000), np.arange(5), lambda stays, random: stays, chances=odds)
    order = np.concatenate(epoch_batches(stage, LoopSettings(1, 1, 64, 1e-3, 0.0, 0), 0, 1))
    assert len(order) == 4000
    assert died[order][np.isfinite(died[order])].mean() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(TrajlmError, match="two outcomes"):
        chances(build_tasks(["length_of_stay"]), targets, "balanced")


def asked(prepared_folder, out, *flags):
    places = ["--encoders", "scratch", "--data", str(prepared_folder), "--out", str(out)]
    return parse_recipe(recipe_parser("finetune.py", ""), [*RECIPE, *flags, *places])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--finetuning.tasks", "[length_of_stay]", "--finetuning.sampling", "balanced"],
            "balanced needs a task with two outcomes",
        ),
        (["--finetuning.tasks", "[label:mortalit]"], "has no column target_mortalit; the nearest is 'mortality'"),
        (["--finetuning.tasks", "[hours:xyz]"], "no column target_xyz; drop .*: mortality, length_of_stay_hours"),
    ],
)
def test_tasks_that_do_not_fit_are_refused_before_a_folder_is_made(prepared_folder, tmp_path, flags, message):
    with pytest.raises(TrajlmError, match=message):
        finetuning.finetune(asked(prepared_folder, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_outcomes_that_no_held_out_stay_has_are_warned_of(prepared_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(prepared_folder, tmp_path / "prepared")
    stays = pl.read_parquet(prepared_folder / "stays.parquet")
    seen = pl.when(pl.col("split") != "held_out").then(pl.col("target_mortality"))
    stays.with_columns(target_mortality=seen).write_parquet(tmp_path / "prepared" / "stays.parquet")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "cache_latents", stop)  # what the settings say is told by then
    printed = []
    for folder in (prepared_folder, tmp_path / "prepared"):
        with pytest.raises(KeyboardInterrupt):
            finetuning.finetune(asked(folder, tmp_path / f"run-{len(printed)}"))
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")])
    assert printed[0] == []
    assert len(printed[1]) == 1
    assert printed[1][0].startswith("warning: no held-out stay has a known outcome of mortality: ")
