"""The anchoring audit: its figures against plain loops, its command on real runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from conftest import TRAJLM, command, last_line
from test_attention_families import family
from test_report_browser import Watched
from trajectory_example import toy_batch, toy_model

from trajlm.anchoring import static_share
from trajlm.errors import TrajlmError
from trajlm.interpret.ablation import cohort_ablation
from trajlm.interpret.anchoring import audit_anchoring
from trajlm.interpret.attention import read_with_attention
from trajlm.interpret.audit import (
    contrast,
    contrast_summary,
    decision_thresholds,
    ranked,
    summarise,
    with_decisions,
)
from trajlm.interpret.runs import open_run
from trajlm.schema import NOTHING


def toy_changes(seed: int = 0, stays: int = 60) -> pl.DataFrame:
    """Rows as :func:`trajlm.interpret.ablation.anchoring` gives them; half of the stays hold labs."""
    random = np.random.default_rng(seed)
    frames = []
    for target in ("mortality", "length_of_stay_hours"):
        for ablated, held in (("vitals", range(stays)), ("labs", range(0, stays, 2))):
            n = len(held)
            frames.append(
                pl.DataFrame(
                    {
                        "stay_id": list(held),
                        "ablated": [ablated] * n,
                        "target": [target] * n,
                        "share_before": random.uniform(0, 0.4, n),
                        "share_after": random.uniform(0, 0.6, n),
                        "belief_before": random.uniform(0, 1, n),
                        "belief_after": random.uniform(0, 1, n),
                    }
                )
            )
    return pl.concat(frames)


STAYS = pl.DataFrame(
    {"stay_id": range(60), "subject_id": [str(i // 2) for i in range(60)], "hours_in_unit": [50.0] * 60}
)


def test_drift_and_flips_equal_plain_loops():
    found = with_decisions(toy_changes(), {"mortality": 0.3})
    for row in found.iter_rows(named=True):
        assert row["drift"] == row["belief_after"] - row["belief_before"]
        crossed = (row["belief_after"] >= 0.3) != (row["belief_before"] >= 0.3)
        assert row["flipped"] == (crossed if row["target"] == "mortality" else None)
    assert 0 < found["flipped"].sum() < found.height / 2


def test_the_summary_equals_plain_loops_with_patient_level_intervals():
    changes = with_decisions(toy_changes(), {"mortality": 0.5})
    found = summarise(changes, STAYS, 400, 0)
    assert set(found["measure"]) == {"share_before", "share_after", "share_change", "drift", "absolute_drift", "flips"}
    assert "flips" not in set(found.filter(pl.col("target") != "mortality")["measure"])
    own = changes.filter((pl.col("ablated") == "labs") & (pl.col("target") == "mortality")).rows(named=True)
    values = {
        "share_change": [r["share_after"] - r["share_before"] for r in own],
        "absolute_drift": [abs(r["belief_after"] - r["belief_before"]) for r in own],
        "flips": [float(r["flipped"]) for r in own],
    }
    random = np.random.default_rng(5)
    for measure, known in values.items():
        row = found.filter(
            (pl.col("measure") == measure) & (pl.col("ablated") == "labs") & (pl.col("target") == "mortality")
        ).row(0, named=True)
        assert (row["stays"], row["patients"]) == (30, 30)
        assert row["value"] == pytest.approx(sum(known) / len(known))
        means = [np.mean(random.choice(known, len(known))) for _ in range(4000)]  # one stay per patient here
        assert (row["low"], row["high"]) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_stays_of_one_patient_are_drawn_together():
    """With every patient's stays alike, the interval is that of half as many independent stays: wider."""
    changes = with_decisions(toy_changes(), {}).filter(pl.col("ablated") == "vitals")
    alike = changes.with_columns(pl.col("belief_after").gather((pl.int_range(pl.len()) // 2) * 2).over("target"))
    alike = alike.with_columns(drift=pl.col("belief_after") - 0.5)
    apart = STAYS.with_columns(subject_id=pl.col("stay_id").cast(pl.String))

    def width(stays: pl.DataFrame) -> float:
        row = summarise(alike, stays, 500, 0, {"drift": pl.col("drift")}).row(0, named=True)
        return row["high"] - row["low"]

    assert width(STAYS) > 1.2 * width(apart)


def test_two_runs_are_compared_stay_by_stay():
    mine, other = (with_decisions(toy_changes(seed), {"mortality": 0.5}) for seed in (1, 2))
    pairs = contrast(mine, other.filter(pl.col("stay_id") < 40))
    assert pairs.height == mine.filter(pl.col("stay_id") < 40).height
    for row in pairs.sample(15, seed=0).iter_rows(named=True):
        at = (pl.col("stay_id") == row["stay_id"]) & (pl.col("ablated") == row["ablated"])
        at &= pl.col("target") == row["target"]
        difference = abs(mine.filter(at)["drift"][0]) - abs(other.filter(at)["drift"][0])
        assert row["absolute_drift_difference"] == pytest.approx(difference)
    summary = contrast_summary(pairs, STAYS, 100, 0)
    one = summary.filter((pl.col("measure") == "drift") & (pl.col("ablated") == "vitals")).row(0, named=True)
    assert one["low"] < one["value"] < one["high"]
    with pytest.raises(TrajlmError, match="no stay and ablation in common"):
        contrast(mine, other.with_columns(stay_id=pl.col("stay_id") + 1000))


def test_the_stays_that_diverge_most_come_first():
    changes = with_decisions(toy_changes(), {})
    order = ranked(changes, "mortality")
    own = [r for r in changes.iter_rows(named=True) if r["target"] == "mortality"]
    expected = sorted(own, key=lambda r: (-abs(r["drift"]), r["stay_id"], r["ablated"]))
    assert order.select("stay_id", "ablated").rows() == [(r["stay_id"], r["ablated"]) for r in expected]
    assert order["rank"].to_list() == list(range(1, len(own) + 1))
    anchored = ranked(changes, "mortality", pl.col("share_after") - pl.col("share_before"))
    assert anchored["divergence"].is_sorted(descending=True)
    with pytest.raises(TrajlmError, match="came 'death'"):
        ranked(changes, "death")


def test_thresholds_flag_as_many_tuning_stays_as_had_the_outcome():
    random = np.random.default_rng(0)
    n = 40
    rows = {"stay_id": range(n), "split": ["tuning"] * n, "event_index": [3] * n, "hours_since_admission": [9.0] * n}
    beliefs = pl.DataFrame(rows).with_columns(
        belief_mortality=pl.Series(random.uniform(0, 0.4, n)), target_mortality=pl.Series([1.0] * 8 + [0.0] * 32),
        belief_hours=pl.lit(50.0), target_hours=pl.lit(60.0),
    )  # fmt: skip
    held_out = beliefs.with_columns(
        split=pl.lit("held_out"), belief_mortality=pl.lit(0.99), stay_id=pl.col("stay_id") + 10
    )
    stays = pl.DataFrame({"stay_id": range(60), "hours_in_unit": [50.0] * 60})
    found = decision_thresholds(
        pl.concat([beliefs, held_out]), stays, [("mortality", "probability"), ("hours", "hours")]
    )
    assert set(found) == {"mortality"}
    assert (beliefs["belief_mortality"] >= found["mortality"]).sum() == 8


def test_attention_may_be_that_of_another_layer():
    model, batch = toy_model(), toy_batch([5, 3])
    last, first = (cohort_ablation(model, [batch], ["labs"], layer)["static_share"] for layer in (None, 0))
    for layer, found in ((1, last), (0, first)):
        _, maps = read_with_attention(model, batch, [layer])
        assert found[:2].to_list() == pytest.approx(static_share(model, batch, maps[layer]).tolist(), rel=1e-4)
    assert first.to_list() != last.to_list()
    with pytest.raises(TrajlmError, match=r"layers 0 to 1 .*asked for \[2\]"):
        cohort_ablation(model, [batch], [], 2)


def test_backbones_without_attention_are_audited_for_drift():
    mamba = family("mamba", hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=8)
    table = cohort_ablation(mamba, [toy_batch([5, 4])], ["labs", "note"])
    assert table["static_share"].is_null().all()
    assert table.filter(pl.col("events") > 0)["belief_mortality"].is_not_null().all()
    # A hybrid's last layer with attention stands in for its last layer.
    assert cohort_ablation(family("jamba"), [toy_batch([5])], [])["static_share"].is_between(0.001, 0.999).all()


@pytest.fixture(scope="module")
def audited(run, workplace):
    """`trajlm anchoring` of a run against itself."""
    out = workplace / "anchoring"
    done = command(*TRAJLM, "anchoring", "--run", run, "--against", run, "--out", out, "--resamples", 50, "--shown", 1)
    return out, done


def test_the_command_writes_what_the_functions_say(audited, model, prepared, run):
    out, done = audited
    tables = ("changes", "summary", "difference", "ranked", "anchored", "trajectories", "attention")
    assert {p.name for p in out.iterdir()} == {f"{t}.csv" for t in tables} | {"changes.parquet", "anchoring.html"}
    changes = pl.read_parquet(out / "changes.parquet")
    held_out = pl.read_parquet(run / "beliefs.parquet").filter(pl.col("split") == "held_out")["stay_id"].unique()
    assert set(changes["stay_id"]) <= set(held_out)
    for row in changes.filter(pl.col("target") == "mortality").sample(8, seed=3).iter_rows(named=True):
        timeline = prepared.timeline(row["stay_id"])
        whole = model.beliefs(timeline)["belief_mortality"][-1]
        less = model.beliefs(timeline.without(row["ablated"]))["belief_mortality"][-1]
        assert (row["belief_before"], row["belief_after"]) == pytest.approx((whole, less), abs=1e-5)
    # A run differs from itself by nothing.
    difference = pl.read_csv(out / "difference.csv")
    assert difference.height > 10
    assert difference["value"].abs().max() == 0
    top = pl.read_csv(out / "ranked.csv").row(0, named=True)
    trajectories = pl.read_csv(out / "trajectories.csv").filter(pl.col("stay_id") == top["stay_id"])
    assert {NOTHING, top["ablated"]} <= set(trajectories["ablated"])
    attention = pl.read_csv(out / "attention.csv")
    sums = attention.select(pl.sum_horizontal("on_static", "on_self", "on_earlier", "on_read_outs")).to_series()
    assert sums.to_list() == pytest.approx([1.0] * len(sums), abs=1e-4)
    page = (out / "anchoring.html").read_text()
    stays = set(attention["stay_id"])
    assert page.count("data-figure=") == 4 + len(stays)
    assert page.count("data-map=") == 4 * len(stays)
    assert 'src="http' not in page
    assert "|drift|" in done.stdout


@pytest.mark.parametrize("width", [1280, 800])
def test_the_page_draws_everything_and_loads_nothing(audited, browser, width):
    watched = Watched(browser, audited[0] / "anchoring.html", width, at="")
    page = watched.page
    for plot in page.query_selector_all("[data-figure], [data-map]"):
        plot.scroll_into_view_if_needed()
        plot.wait_for_selector(".main-svg")
    weights = page.evaluate("[...document.querySelectorAll('[data-map]')].map(p => p.data[0].z[0][0])")
    assert weights == pytest.approx([0.0] * len(weights))  # log10 of all that the first position can look at: itself
    scales = page.evaluate("[...document.querySelectorAll('[data-map]')].map(p => p.data[0].zmin)")
    assert len(set(scales)) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = page.evaluate("document.querySelector('[data-figure=absolute_drift]').data[0].x")
    summary = pl.read_csv(audited[0] / "summary.csv")
    own = summary.filter(run="run", target="mortality", measure="absolute_drift")
    assert shown == pytest.approx([100 * value for value in own["value"]])
    watched.check()
    page.close()


def test_mistakes_of_the_command_are_one_line(run, workplace):
    done = command(*TRAJLM, "anchoring", "--run", run, "--out", workplace / "no", "--ablate", "ecg", check=False)
    assert done.returncode == 2
    assert "'ecg' cannot be ablated; the model reads" in last_line(done)


def test_two_runs_are_audited_on_the_same_stays(run):
    """Whatever their seeds, and where one holds out fewer."""
    own = open_run(run)
    fewer = own.held_out.gather_every(2)
    kept = pl.col("stay_id").is_in(fewer.implode()) | (pl.col("split") != "held_out")
    other = replace(own, recipe=own.recipe | {"seed": 9}, beliefs=own.beliefs.filter(kept))
    found = audit_anchoring(own, other, ["series"], most_stays=9, shown=1, resamples=20)
    seen = {of: set(found.changes.filter(pl.col("run") == of)["stay_id"]) for of in ("run", "against")}
    assert seen["run"] == seen["against"] <= set(fewer)
    assert 4 < len(seen["run"]) <= 9
    assert found.difference["value"].to_list() == pytest.approx([0.0] * found.difference.height)
    apart = replace(other, beliefs=own.beliefs.clear())
    with pytest.raises(TrajlmError, match="holds out no stay"):
        audit_anchoring(own, apart, ["series"])
