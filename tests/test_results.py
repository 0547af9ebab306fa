"""Figures pooled over a made-up grid against plain loops and scikit-learn, and the page written of them."""

import gzip
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import yaml
from calibration_example import plain_gaps, plain_gaps_interval
from sklearn.metrics import mean_absolute_error, roc_auc_score

import trajlm.gaps
from trajlm.arms import beliefs_path, report_metrics, write_beliefs
from trajlm.config import FinetuningConfig, Recipe
from trajlm.errors import TrajlmError
from trajlm.gaps import gaps_interval
from trajlm.metrics import resample_weights
from trajlm.pooled_arms import GridRun
from trajlm.pooling import Pool
from trajlm.results import _made, results, standing
from trajlm.subgroups import STAYS as STAYS_FILE
from trajlm.summary import figures
from trajlm.tasks import build_tasks

STAYS, RESAMPLES = 80, 25
ARMS = {"scratch-tiny": 0.5, "contrastive-tiny": 1.5}
SPLITS, SEEDS = ("split-0", "split-1"), (0, 1)
TARGETS = ("mortality", "length_of_stay_hours")


def cohort():
    """Two stays of each patient; a third leaves before 24 hours."""
    rng = np.random.default_rng(5)
    return pl.DataFrame(
        {
            "stay_id": range(STAYS),
            "subject_id": [f"p{i // 2:02d}" for i in range(STAYS)],
            "hours_in_unit": np.where(np.arange(STAYS) % 3 == 0, 20.0, 60.0),
            "target_mortality": (rng.random(STAYS) < 0.35).astype(float),
            "target_length_of_stay_hours": rng.uniform(20, 200, STAYS),
        }
    )


def split_of(name):
    """By patients; the held-out patients of the two splits overlap."""
    first = 10 if name == "split-0" else 25
    place = pl.col("stay_id") // 2
    return (
        pl.when(place < 10)
        .then(pl.lit("tuning"))
        .when(place >= first)
        .then(pl.lit("held_out"))
        .otherwise(pl.lit("train"))
    )


def made_beliefs(split, skill, seed, hours, landmark=False):
    """After events at these hours; a static arm names its landmark, the end of the window."""
    rng = np.random.default_rng(seed)
    stays = cohort().with_columns(split=split_of(split)).filter(pl.col("split") != "train")
    frames = []
    for index, hour in enumerate(hours):
        sign = 2 * stays["target_mortality"].to_numpy() - 1
        risk = 1 / (1 + np.exp(-(skill * sign + rng.normal(size=len(stays)))))
        guess = np.maximum(
            0, stays["target_length_of_stay_hours"].to_numpy() + rng.normal(0, 60 / (1 + skill), len(stays))
        )
        frames.append(stays.select("stay_id", "split", "target_mortality", "target_length_of_stay_hours").with_columns(
            event_index=pl.lit(index), hours_since_admission=pl.lit(hour), modality=pl.lit("labs"),
            belief_mortality=pl.Series(risk), belief_length_of_stay_hours=pl.Series(guess)))  # fmt: skip
    frame = pl.concat(frames).sort("stay_id", "event_index")
    return frame.with_columns(landmark=pl.lit(None, pl.Float64)) if landmark else frame


def made_run(root, split, seed, arm, logistic):
    folder = root / split / f"{arm}-seed-{seed}"
    start = arm.partition("-")[0]
    number = 100 * SPLITS.index(split) + 10 * seed + list(ARMS).index(start + "-tiny")
    arms = {"sequence": made_beliefs(split, ARMS[start + "-tiny"], number, (1.0, 30.0))}
    arms["static_mlp"] = made_beliefs(split, 1.0, 1000 + number, (30.0,), landmark=True)
    if logistic:
        arms["logistic"] = made_beliefs(split, 1.2, 2000 + SPLITS.index(split), (30.0,), landmark=True)
        arms["sequence_and_logistic"] = made_beliefs(split, 0.1, 3000 + SPLITS.index(split), (1.0, 30.0))
    if start == "contrastive":
        arms["network"] = made_beliefs(split, 0.2, 4000 + number, (1.0, 30.0))
    recipe = Recipe(data="prepared", out=str(folder), encoders="scratch" if start == "scratch" else "somewhere",
                    finetuning=FinetuningConfig(bootstrap_resamples=RESAMPLES))  # fmt: skip
    stays = cohort().with_columns(split=split_of(split))
    sizes = {name: stays.filter(pl.col("split") == name).height for name in ("train", "tuning", "held_out")}
    metrics = report_metrics(sizes, "made up", stays, build_tasks(recipe.finetuning.tasks), arms, 5, 0)
    folder.mkdir(parents=True)
    about = {"stage": "finetuning", "inputs": {"data": "d" * 64, "encoders": start}, "recipe": asdict(recipe)}
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    facts = {"versions": {"python": "3.11", "torch": "2.13"}, "hardware": {"device": "x86_64", "cpu_count": 2}}
    facts |= {"git_commit": "0123456789abcdef", "seconds": 90.0, "peak_memory_gb": 1.5}
    (folder / "environment.json").write_text(json.dumps(facts))
    for name, beliefs in arms.items():
        write_beliefs(beliefs_path(folder, name), beliefs)
    unknown = {name: pl.lit(None, pl.String) for name in ("sex", "age", "ethnicity")}
    stays = stays.select("stay_id", "subject_id", "split", "hours_in_unit").with_columns(
        **unknown, events=pl.lit(2), modalities=pl.lit(1), complete=pl.lit(True)
    )
    write_beliefs(folder / STAYS_FILE, stays)
    return GridRun(split, seed, arm, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("grid") / "made"
    runs = [
        made_run(root, split, seed, arm, logistic=(seed, arm) == (0, "scratch-tiny"))
        for split in SPLITS
        for seed in SEEDS
        for arm in ARMS
    ]
    told = [{"split": r.split, "seed": r.seed, "arm": r.arm, "path": str(r.path.relative_to(root))} for r in runs]
    record = {"name": "made", "command": "trajlm experiment made.yaml --out runs/made", "grid": {}, "runs": told}
    (root / "grid.json").write_text(json.dumps(record))
    (root / "splits").mkdir()
    for split in SPLITS:
        text = cohort().with_columns(split=split_of(split)).select("stay_id", "split").write_csv()
        (root / "splits" / f"{split}.csv.gz").write_bytes(gzip.compress(text.encode()))
    return SimpleNamespace(root=root, runs=runs, pool=Pool(runs, RESAMPLES))


def last_beliefs(run, arm, split="held_out", landmark=None):
    """One row per stay, from the file: its last belief by the landmark, of stays still in the unit."""
    frame = pl.read_parquet(beliefs_path(run.path, arm)).filter(pl.col("split") == split)
    frame = frame.join(cohort().select("stay_id", "subject_id", "hours_in_unit"), on="stay_id")
    if landmark is not None:
        frame = frame.filter((pl.col("hours_in_unit") >= landmark) & (pl.col("hours_since_admission") <= landmark))
    return frame.group_by("stay_id").agg(pl.all().sort_by("hours_since_admission").last()).sort("stay_id")


def runs_with(made, arm, split, start=None):
    return [
        run for run in made.runs
        if run.split == split and beliefs_path(run.path, arm).exists() and (start is None or run.arm.startswith(start))
    ]  # fmt: skip


def by_hand(made, arm, start, landmark, weights=None):
    """Mean over splits of the mean over seeds of the AUROC, drawn stays repeated as often as they are drawn."""
    means = []
    for split in SPLITS:
        values = []
        for run in runs_with(made, arm, split, start):
            at = last_beliefs(run, arm, landmark=landmark)
            times = np.ones(len(at), int) if weights is None else np.array([weights[p] for p in at["subject_id"]], int)
            y, b = (np.repeat(at[f"{what}_mortality"].to_numpy(), times) for what in ("target", "belief"))
            values.append(roc_auc_score(y, b))
        means.append(np.mean(values))
    return float(np.mean(means))


def drawn(made):
    """How often each held-out patient of any split is drawn, resample by resample."""
    people = sorted({p for s in SPLITS for p in cohort().filter(split_of(s) == "held_out")["subject_id"]})
    rows = np.concatenate(list(resample_weights(np.array(people), RESAMPLES, 0)))
    return [dict(zip(people, row, strict=True)) for row in rows]


def row_of(frame, arm, target, landmark, metric):
    found = frame.filter(
        (pl.col("arm") == arm) & (pl.col("target") == target) & (pl.col("metric") == metric)
        & pl.col("landmark").eq_missing(pl.lit(landmark, pl.Float64))
    )  # fmt: skip
    assert found.height == 1
    return found.row(0, named=True)


@pytest.mark.parametrize("landmark", [None, 24.0])
def test_a_pooled_figure_is_the_mean_over_splits_and_seeds(made, landmark):
    row = row_of(made.pool.figures(), "sequence model, contrastive-tiny", "mortality", landmark, "auroc")
    assert row["value"] == pytest.approx(by_hand(made, "sequence", "contrastive", landmark), abs=1e-12)
    values = [by_hand(made, "sequence", "contrastive", landmark, weights) for weights in drawn(made)]
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)
    assert (row["splits"], row["runs"]) == (2, 4)


def test_a_pooled_calibration_error_has_the_interval_of_the_gaps_of_all_runs(made, monkeypatch):
    monkeypatch.setattr(trajlm.gaps, "LEAST_OUTCOMES", 1)
    pool = Pool(made.pool.runs, RESAMPLES)

    def gaps(weights=None):
        found = []
        for split in SPLITS:
            for run in runs_with(made, "sequence", split, "contrastive"):
                at = last_beliefs(run, "sequence")
                times = np.array([1 if weights is None else weights[p] for p in at["subject_id"]], int)
                y, b = (np.repeat(at[f"{what}_mortality"].to_numpy(), times) for what in ("target", "belief"))
                found += [gap / (len(SPLITS) * len(SEEDS)) for gap in plain_gaps(y, b)]
        return found

    arm = "sequence model, contrastive-tiny"
    asked = arm, "mortality", None, "adaptive_calibration_error"
    row = row_of(pool.figures(), *asked)
    assert row["value"] == pytest.approx(sum(map(abs, gaps())), abs=1e-12)
    ends = plain_gaps_interval(gaps(), [gaps(weights) for weights in drawn(made)], 0.025)
    assert (row["low"], row["high"]) == pytest.approx(ends, abs=1e-12)
    assert 0 <= row["low"] < row["value"] <= row["high"] < 1


def test_a_pooled_calibration_error_of_few_deaths_has_no_interval(made):
    for table in (made.pool.figures(), made.pool.differences()):
        own = table.filter(pl.col("metric").str.starts_with("adaptive_calibration_error"))
        assert own.height > 1
        assert own["value"].null_count() == 0
        assert own.select("low", "high").null_count().row(0) == (own.height, own.height)


def test_a_pooled_difference_of_calibration_errors_spans_what_the_intervals_of_both_leave_open(made, monkeypatch):
    monkeypatch.setattr(trajlm.gaps, "LEAST_OUTCOMES", 1)
    pool = Pool(made.pool.runs, RESAMPLES)
    arm = "sequence model, contrastive-tiny"
    target = next(t for t in pool.targets if t["name"] == "mortality")
    rival = pool.best_static(target, None)
    row = row_of(pool.differences(), arm, "mortality", None, "adaptive_calibration_error")
    sides = []
    for name in (arm, rival):
        of = pool._drawn[name, "mortality", None, "adaptive_calibration_error"]
        shares = [g / (len(of) * len(seeds)) for seeds in of.values() for g in seeds.values()]
        sides.append(gaps_interval(np.concatenate(shares, axis=1), 30, level=0.975))
    (low, high), (least, most) = sides
    assert (row["low"], row["high"]) == pytest.approx((low - most, high - least), abs=1e-12)


def test_a_baseline_that_one_run_holds_stands_once_per_split(made):
    figures = made.pool.figures()
    row = row_of(figures, "logistic regression (summary features)", "mortality", None, "auroc")
    assert row["value"] == pytest.approx(by_hand(made, "logistic", None, None), abs=1e-12)
    assert row["runs"] == 2
    assert row_of(figures, "static MLP (late fusion), scratch", "mortality", None, "auroc")["runs"] == 4


def test_error_in_hours(made):
    row = row_of(made.pool.figures(), "sequence model, scratch-tiny", "length_of_stay_hours", None, "mae")
    values = [
        np.mean([mean_absolute_error(at["target_length_of_stay_hours"], at["belief_length_of_stay_hours"])
                 for run in runs_with(made, "sequence", split, "scratch") for at in [last_beliefs(run, "sequence")]])
        for split in SPLITS
    ]  # fmt: skip
    assert row["value"] == pytest.approx(np.mean(values), abs=1e-9)
    assert row["deviation"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)


def test_a_difference_is_to_the_static_arm_that_was_best_on_the_tuning_stays(made):
    statics = {"static MLP (late fusion), scratch": ("static_mlp", "scratch"),
               "static MLP (late fusion), contrastive": ("static_mlp", "contrastive"),
               "logistic regression (summary features)": ("logistic", None)}  # fmt: skip

    def mean_of(arm, start, split, part):
        runs = runs_with(made, arm, split, start)
        tables = [last_beliefs(run, arm, part) for run in runs]
        return float(np.mean([roc_auc_score(t["target_mortality"], t["belief_mortality"]) for t in tables]))

    target = made.pool.targets[0]
    best = max(statics, key=lambda arm: np.mean([mean_of(*statics[arm], split, "tuning") for split in SPLITS]))
    assert made.pool.best_static(target, None) == best

    def minus(rival):
        return np.mean([mean_of("sequence", "contrastive", s, "held_out") - mean_of(*statics[rival], s, "held_out")
                        for s in SPLITS])  # fmt: skip

    row = row_of(made.pool.differences(), "sequence model, contrastive-tiny", "mortality", None, "auroc")
    assert row["value"] == pytest.approx(minus(best), abs=1e-12)
    for rival in statics:
        moved = made.pool.difference((row["arm"], "mortality", None, "auroc"), rival)
        assert made.pool.spread(moved)[0] == pytest.approx(minus(rival), abs=1e-12)
    assert made.pool.best_sequence(target, "whole") == "sequence model, contrastive-tiny"
    averaged = "sequence model and logistic regression, averaged, scratch-tiny"
    assert made.pool.best_sequence(target, "averaged") == averaged
    network = "sequence model's network alone, contrastive-tiny"
    together = "sequence model, contrastive-tiny, seeds averaged"
    assert made.pool.chosen(target) == ["sequence model, contrastive-tiny", averaged, network, together]


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_averaged_are_one_model_whose_rivals_may_be_the_same(made, target):
    """Mean log-odds, or mean log(1 + hours), of both seeds of a split, stay by stay."""
    metric = "auroc" if target == "mortality" else "mae"

    def mean_of(arm, start, split, part):
        by_stay = {}
        for run in runs_with(made, arm, split, start):
            for row in last_beliefs(run, arm, part).iter_rows(named=True):
                by_stay.setdefault(row["stay_id"], []).append((row[f"target_{target}"], row[f"belief_{target}"]))
        assert {len(of) for of in by_stay.values()} == {len(SEEDS)}
        y = [of[0][0] for of in by_stay.values()]
        if target == "mortality":
            odds = [np.mean([np.log(b / (1 - b)) for _, b in of]) for of in by_stay.values()]
            return roc_auc_score(y, 1 / (1 + np.exp(-np.array(odds))))
        return mean_absolute_error(y, [np.expm1(np.mean([np.log1p(b) for _, b in of])) for of in by_stay.values()])

    def over_splits(arm, start, part="held_out"):
        return np.mean([mean_of(arm, start, split, part) for split in SPLITS])

    name = "sequence model, scratch-tiny, seeds averaged"
    row = row_of(made.pool.figures(), name, target, None, metric)
    assert row["value"] == pytest.approx(over_splits("sequence", "scratch"), abs=1e-9)
    assert (row["splits"], row["runs"]) == (2, 4)
    # One run of a split fits the logistic regression: there is nothing to average.
    assert not any(arm.startswith("logistic regression (") and "averaged" in arm for arm in made.pool.arms)
    told = next(t for t in made.pool.targets if t["name"] == target)
    for start in ("scratch", "contrastive"):
        static = f"static MLP (late fusion), {start}, seeds averaged"
        own = row_of(made.pool.figures(), static, target, None, metric)["value"]
        assert own == pytest.approx(over_splits("static_mlp", start), abs=1e-9)
    rival = made.pool.best_static(told, None, "seeds")
    # Such an arm may be a rival of its like, and of no other.
    assert rival.endswith("seeds averaged")
    assert "seeds averaged" not in made.pool.best_static(told, None, "averaged")
    moved = row_of(made.pool.differences(), name, target, None, metric)["value"]
    theirs = row_of(made.pool.figures(), rival, target, None, metric)["value"]
    assert moved == pytest.approx(row["value"] - theirs, abs=1e-12)


def test_runs_with_other_held_out_stays_are_refused(made, tmp_path):
    odd = made_run(tmp_path, "split-1", 7, "scratch-tiny", False)
    with pytest.raises(TrajlmError, match="cannot be compared"):
        Pool([made.runs[0], GridRun("split-0", 7, "scratch-tiny", odd.path)], RESAMPLES)


def test_a_baseline_is_named_by_what_it_reads_of_a_variant(made, tmp_path):
    """What differs between variants must not stand for one another; what does not is one arm."""
    runs = [GridRun(r.split, r.seed, r.arm, r.path, {"finetuning.epochs": 9, "backbone.tuning": "full"})
            for r in made.runs]  # fmt: skip
    assert Pool(runs, RESAMPLES).static_arms == made.pool.static_arms
    odd = made_run(tmp_path, "split-0", 1, "scratch-tiny-focal", True)
    focal = GridRun(odd.split, odd.seed, odd.arm, odd.path, {"finetuning.focal_gamma": 2.0, "encoder.heads": 2})
    pool = Pool([made.runs[0], focal], RESAMPLES)
    alone = {arm for arm in pool.static_arms if "averaged" not in arm}
    fusion, linear = "static MLP (late fusion), scratch", "logistic regression (summary features)"
    assert alone == {
        fusion, linear, f"{fusion}, finetuning.focal_gamma 2.0, encoder.heads 2",
        f"{linear}, finetuning.focal_gamma 2.0",
    }  # fmt: skip
    assert not any("seeds averaged" in arm for arm in pool.static_arms), "they are different models"
    assert set(figures([made.runs[0], focal])["arm"]) >= alone


def test_seeds_that_learned_from_other_stays_are_not_averaged(made, tmp_path):
    """A stay that tunes one of them may have trained another."""
    other = made_run(tmp_path, "split-0", 1, "scratch-tiny", False)
    for arm in ("sequence", "static_mlp"):  # stays.parquet has the records' own splits, whoever learned from which
        path = beliefs_path(other.path, arm)
        frame = pl.read_parquet(path)
        write_beliefs(path, frame.filter((pl.col("split") != "tuning") | (pl.col("stay_id") % 4 > 0)))
    apart = Pool([made.runs[0], other], RESAMPLES)
    assert {"sequence model, scratch-tiny", "static MLP (late fusion), scratch"} <= set(apart.arms)
    assert not any("seeds averaged" in arm for arm in apart.arms)


def test_static_arms_are_paired_within_a_variant_alone(made, tmp_path):
    """Those of another may have learned from other stays; and a mean must say of which models it is."""
    odd = made_run(tmp_path, "split-0", 0, "scratch-tiny-focal", True)
    for arm in ("sequence", "static_mlp", "logistic", "sequence_and_logistic"):
        path = beliefs_path(odd.path, arm)
        frame = pl.read_parquet(path)
        write_beliefs(path, frame.filter((pl.col("split") != "tuning") | (pl.col("stay_id") % 4 > 0)))
    unseen = GridRun(odd.split, odd.seed, odd.arm, odd.path, {"finetuning.stays": "unseen"})
    pair = "logistic regression and static MLP, averaged, scratch"
    arms = Pool([made.runs[0], unseen], RESAMPLES).static_arms
    assert [arm for arm in arms if "averaged" in arm] == [pair, f"{pair}, finetuning.stays unseen"]


def test_two_static_arms_averaged_are_the_rivals_of_a_sequence_model_averaged(made):
    """The mean of two models is measured against means of two."""
    pair = "logistic regression and static MLP, averaged, scratch"
    other = "logistic regression and static MLP, averaged, contrastive"
    assert [arm for arm in made.pool.static_arms if ", averaged" in arm] == [
        other, f"{other}, seeds averaged", pair, f"{pair}, seeds averaged",
    ]  # fmt: skip
    values = []
    for split in SPLITS:
        run = runs_with(made, "logistic", split)[0]
        one, two = (last_beliefs(run, arm) for arm in ("logistic", "static_mlp"))
        odds = [np.log(table["belief_mortality"].to_numpy() / (1 - table["belief_mortality"].to_numpy()))
                for table in (one, two)]  # fmt: skip
        values.append(roc_auc_score(one["target_mortality"], odds[0] + odds[1]))
    row = row_of(made.pool.figures(), pair, "mortality", None, "auroc")
    assert row["value"] == pytest.approx(np.mean(values), abs=1e-9)
    assert row["runs"] == 2
    # With all seeds averaged each side counts alike: one regression, fusions of two seeds.
    values = []
    for split in SPLITS:
        tables = [last_beliefs(runs_with(made, "logistic", split)[0], "logistic")]
        tables += [last_beliefs(run, "static_mlp") for run in runs_with(made, "static_mlp", split, "scratch")]
        odds = [np.log(t["belief_mortality"].to_numpy() / (1 - t["belief_mortality"].to_numpy())) for t in tables]
        values.append(roc_auc_score(tables[0]["target_mortality"], odds[0] + (odds[1] + odds[2]) / 2))
    together = row_of(made.pool.figures(), f"{pair}, seeds averaged", "mortality", None, "auroc")
    assert together["value"] == pytest.approx(np.mean(values), abs=1e-9)
    assert together["runs"] == 4
    target = made.pool.targets[0]
    rivals = {kind: made.pool.best_static(target, None, kind) for kind in ("whole", "network", "averaged")}
    assert rivals["averaged"].startswith("logistic regression and static MLP, averaged")
    assert ", averaged" not in rivals["whole"]
    assert rivals["network"] == rivals["whole"]
    averaged = "sequence model and logistic regression, averaged, scratch-tiny"
    moved = row_of(made.pool.differences(), averaged, "mortality", None, "auroc")["value"]
    own = row_of(made.pool.figures(), averaged, "mortality", None, "auroc")["value"]
    assert moved == pytest.approx(
        own - row_of(made.pool.figures(), rivals["averaged"], "mortality", None, "auroc")["value"], abs=1e-12
    )


def test_a_run_that_is_not_finished_is_named(made, tmp_path):
    begun = made_run(tmp_path, "split-0", 7, "scratch-tiny", False)
    (begun.path / "metrics.json").unlink()
    with pytest.raises(TrajlmError, match=r"scratch-tiny-seed-7: fine-tuning has not finished there"):
        Pool([made.runs[0], GridRun("split-0", 7, "scratch-tiny", begun.path)], RESAMPLES)


def test_a_folder_without_a_finished_grid_says_what_to_do(made, tmp_path):
    with pytest.raises(TrajlmError, match=r"nowhere: no such folder; name the --out of a finished `trajlm exp"):
        results([tmp_path / "nowhere"], tmp_path / "page.md")
    with pytest.raises(TrajlmError, match=r"expected grid\.json of a finished grid; run the same `trajlm exp"):
        results([tmp_path], tmp_path / "page.md")
    (tmp_path / "grid.json").write_text((made.root / "grid.json").read_text())
    with pytest.raises(TrajlmError, match=r"scratch-tiny-seed-0: no such run any more; run the same `trajlm exp"):
        results([tmp_path], tmp_path / "page.md")


@pytest.mark.parametrize(
    ("low", "high", "metric", "expected"),
    [
        (0.01, 0.03, "auroc", "ahead of"), (-0.03, -0.01, "auroc", "behind"), (-0.01, 0.01, "auroc", "not told from"),
        (0.5, 2.0, "mae", "behind"), (-2.0, -0.5, "mae", "ahead of"), (None, None, "mae", "not told from"),
    ],
)  # fmt: skip
def test_how_a_difference_stands(low, high, metric, expected):
    assert standing(low, high, metric) == expected


def test_the_page(made, tmp_path):
    results([made.root], tmp_path / "docs" / "results.md")
    page = (tmp_path / "docs" / "results.md").read_text()
    table = pl.read_csv(tmp_path / "docs" / "results.csv", schema_overrides={"landmark": pl.Float64})
    assert set(table["what"]) == {"value", "difference"}
    written = row_of(
        table.filter(pl.col("what") == "value"), "logistic regression (summary features)", "mortality", None, "auroc"
    )
    assert written["value"] == pytest.approx(by_hand(made, "logistic", None, None), abs=1e-12), "no figure is rounded"
    row = row_of(
        table.filter(pl.col("what") == "difference"), "sequence model, contrastive-tiny", "mortality", None, "auroc"
    )
    averaged = row_of(
        table.filter(pl.col("what") == "difference"), "sequence model and logistic regression, averaged, scratch-tiny",
        "mortality", None, "auroc",
    )  # fmt: skip
    # A model that loses is told of beside one that does not.
    said = {"the sequence model (": row, "the sequence model and logistic regression (averaged": averaged}
    for start, of in said.items():
        how = standing(of["low"], of["high"], "auroc")
        line = next(s for s in page.splitlines() if s.startswith(f"- In-hospital death, AUROC: {start}"))
        assert f"{how} the best static arm at" in line
        assert ("It loses at" in line) == (how == "behind")
        assert f"{of['value']:+.3f}".replace("-", "−") in line
    assert standing(averaged["low"], averaged["high"], "auroc") == "behind"
    assert "trajlm experiment made.yaml --out runs/made" in page
    for split in SPLITS:
        published = pl.read_csv(tmp_path / "docs/splits/made" / f"{split}.csv.gz")
        assert published.rows() == cohort().with_columns(split=split_of(split)).select("stay_id", "split").rows()
    widths = [line.count("|") - line.count(r"\|") for line in page.splitlines() if line.startswith("|")]
    assert len(set(widths)) > 1
    assert r"\[" not in page, "figures stand as they are"
    assert "In-hospital death, AUROC" in page
    assert "the network alone is an arm of its own" in page
    assert "- In-hospital death, AUROC: the sequence model's network alone (contrastive-tiny)" in page
    assert "*Seeds averaged* is the mean belief of all seeds of a split." in page
    assert "Static arms of one seed stand as they are: logistic regression" in page
    assert "The best on the tuning stays, for the sequence model, its network alone: " in page
    assert "- In-hospital death, AUROC: the sequence model (contrastive-tiny, seeds averaged)" in page
    assert "Calibration at the end of window" in page
    with pytest.raises(TrajlmError, match="different names"):
        results([made.root, made.root], tmp_path / "again.md")
    with pytest.raises(TrajlmError, match=r"grid\.json"):
        results([tmp_path], tmp_path / "again.md")


def test_a_run_that_was_given_more_baselines_names_both_commits():
    facts = {"git_commit": "a" * 40, "grown_by": [{"git_commit": "b" * 40}, {"git_commit": "a" * 40}]}
    assert _made(facts, lambda by: by["git_commit"][:2]) == "aa, more arms by bb"
    assert _made({"git_commit": "a" * 40}, lambda by: by["git_commit"][:2]) == "aa"
