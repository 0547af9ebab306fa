"""Subgroups against plain filters; gaps against plain resampling; attributes against the timelines they come from."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score, mean_absolute_error, roc_auc_score

from trajlm.metrics import adaptive_calibration_error, auroc, resample_weights
from trajlm.subgroups import age_band, broad, gap_interval, grouped, stay_attributes, subgroup_rows

SCORES = {"auroc": roc_auc_score, "auprc": average_precision_score, "mae": mean_absolute_error}


def cohort(n: int = 240, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Beliefs that are worse in men, and what the stays are."""
    rng = np.random.default_rng(seed)
    sex = rng.choice(["female", "male"], n)
    died = (rng.random(n) < 0.4).astype(float)
    risk = 1 / (1 + np.exp(-(np.where(sex == "female", 3, 0.5) * (2 * died - 1) + rng.normal(size=n))))
    hours = rng.gamma(2, 40, n)
    attributes = pl.DataFrame({
        "stay_id": range(n), "subject_id": [f"p{i // 2}" for i in range(n)], "sex": sex,
        "age": rng.choice([age_band(a) for a in (30.0, 50.0, 70.0, 90.0)], n),
        "ethnicity": pl.Series([None] * n, dtype=pl.String), "events": rng.integers(2, 60, n),
        "modalities": rng.integers(1, 5, n), "complete": rng.random(n) < 0.5,
    })  # fmt: skip
    at = pl.DataFrame({"stay_id": range(n), "target_death": died, "belief_death": risk, "target_los": hours,
                       "belief_los": hours + rng.normal(0, 20, n)})  # fmt: skip
    return at.sample(fraction=1, shuffle=True, seed=1), attributes


def test_figures_equal_plain_filters():
    at, attributes = cohort()
    rows = subgroup_rows(at, attributes, [("death", "probability"), ("los", "hours")], 30, 0)
    both = at.join(attributes, on="stay_id").join(grouped(attributes), on="stay_id", suffix="_group")
    checked = set()
    for row in rows.iter_rows(named=True):
        own = pl.col(f"{row['dimension']}_group") == row["group"]
        inside, outside = both.filter(own), both.filter(~own)
        score = {"auroc": roc_auc_score, "auprc": average_precision_score, "mae": mean_absolute_error}.get(
            row["metric"]
        )
        if score is not None:
            value, other = (
                score(f[f"target_{row['target']}"], f[f"belief_{row['target']}"]) for f in (inside, outside)
            )
            assert row["value"] == pytest.approx(value, abs=1e-9)
            assert row["gap"] == pytest.approx(value - other, abs=1e-9)
            assert (row["stays"], row["low"] <= row["value"] <= row["high"]) == (inside.height, True)
            checked.add((row["dimension"], row["group"]))
    dimensions = [dimension for dimension, _ in checked]
    assert {d: dimensions.count(d) for d in dimensions} == {
        "sex": 2, "age": 4, "events": 4, "modalities": 4, "complete": 2,
    }  # fmt: skip
    for dimension in set(dimensions):
        death = rows.filter((pl.col("dimension") == dimension) & (pl.col("metric") == "auroc"))
        assert death["stays"].sum() == attributes.height, "every stay is in one group of each dimension"


def test_a_real_gap_is_told_and_has_the_resamples_it_claims():
    at, attributes = cohort(600)
    rows = subgroup_rows(at, attributes, [("death", "probability")], 200, 7)
    men = rows.filter((pl.col("group") == "male") & (pl.col("metric") == "auroc")).row(0, named=True)
    assert men["gap_high"] < 0
    joined = at.join(attributes, on="stay_id")
    y, b, people = (joined[c].to_numpy() for c in ("target_death", "belief_death", "subject_id"))
    inside = joined["sex"].to_numpy() == "male"
    gaps = []
    for block in resample_weights(people, 200, 7):
        for weights in block.astype(int):
            sides = [np.repeat(np.flatnonzero(side), weights[side]) for side in (inside, ~inside)]
            gaps.append(roc_auc_score(y[sides[0]], b[sides[0]]) - roc_auc_score(y[sides[1]], b[sides[1]]))
    assert (men["gap_low"], men["gap_high"]) == pytest.approx(tuple(np.quantile(gaps, [0.025, 0.975])), abs=1e-9)


def test_gap_intervals_cover_no_gap():
    """200 cohorts in which both groups are alike: the interval holds 0 nineteen times in twenty."""
    rng, held = np.random.default_rng(0), []
    for draw in range(200):
        y = (rng.random(300) < 0.4).astype(float)
        b = y + rng.normal(size=300)
        low, high = gap_interval(auroc, y, b, rng.random(300) < 0.5, np.arange(300), 150, draw)
        held.append(low <= 0 <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.05)


def test_gaps_of_calibration_errors_are_not_seen_where_beliefs_are_perfect():
    """A small group's error is raised more by chance than that of all others: no difference of the models."""
    rng, held = np.random.default_rng(1), []
    for draw in range(40):
        b = rng.beta(2, 3, 600)
        y = (rng.random(600) < b).astype(float)
        inside = np.arange(600) < 80
        low, high = gap_interval(adaptive_calibration_error, y, b, inside, np.arange(600), 100, draw)
        raised = adaptive_calibration_error(y[inside], b[inside]) - adaptive_calibration_error(y[~inside], b[~inside])
        held.append((low <= 0 <= high, low <= raised <= high, raised > 0))
    assert np.mean(held, axis=0)[:2] == pytest.approx([1, 1], abs=0.05)
    assert np.mean(held, axis=0)[2] > 0.9


def test_a_real_gap_of_calibration_errors_is_told():
    rng = np.random.default_rng(2)
    b, inside = rng.beta(2, 3, 1200), np.arange(1200) < 400
    y = (rng.random(1200) < np.where(inside, b / 3, b)).astype(float)
    assert gap_interval(adaptive_calibration_error, y, b, inside, np.arange(1200), 200, 0)[0] > 0


def test_a_group_alone_has_no_gap_and_one_outcome_no_figure():
    at, attributes = cohort(60)
    alone = attributes.with_columns(sex=pl.lit("female"))
    alive = at.with_columns(target_death=pl.lit(0.0))
    rows = subgroup_rows(alive, alone, [("death", "probability")], 10, 0).filter(pl.col("dimension") == "sex")
    assert rows["gap"].null_count() == rows.height
    assert rows.filter(pl.col("metric") == "auroc")["value"].to_list() == [None]
    assert subgroup_rows(at.clear(), attributes, [("death", "probability")], 10, 0).is_empty()


def test_bands_and_broad_groups():
    assert [age_band(a) for a in (18.0, 44.9, 45.0, 64.0, 65.0, 80.0, 91.0)] == [
        "under 45 years", "under 45 years", "45 to 64 years", "45 to 64 years", "65 to 79 years", "80 years and over",
        "80 years and over",
    ]  # fmt: skip
    assert age_band(float("nan")) is None
    assert [broad(e) for e in ("WHITE - BRAZILIAN", "BLACK/AFRICAN AMERICAN", "Asian")] == ["white", "black", "asian"]


def test_attributes_are_those_of_the_timelines(prepared):
    stays = prepared.positions("held_out")
    attributes = stay_attributes(prepared, stays)
    names = {f.feature_id: f.name for f in prepared.features if f.modality == "demographics"}
    every = {m.name for m in prepared.modalities if m.name in prepared.stores}
    assert attributes["stay_id"].to_list() == prepared.stays["stay_id"].to_numpy()[stays].tolist()
    known = 0
    for row in attributes.iter_rows(named=True):
        timeline = prepared.timeline(row["stay_id"])
        held = {event.modality for event in timeline.events}
        assert (row["events"], row["modalities"]) == (len(timeline.events), len(held))
        assert row["complete"] == (held == every)
        told = {
            names[f]: v for e in timeline.events for f, v in zip(e.feature_ids, e.values, strict=True) if f in names
        }
        sexes = [name.split("=")[1].lower() for name in told if name.startswith("gender=")]
        races = [broad(name.split("=")[1]) for name in told if name.startswith("race=")]
        assert (row["sex"], row["ethnicity"]) == (sexes[0] if sexes else None, races[0] if races else None)
        assert row["age"] == (age_band(told["age"]) if "age" in told else None)
        known += bool(sexes) and bool(races)
    assert known > len(stays) / 2
