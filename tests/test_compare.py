"""Comparison of runs: two made-up run folders, their figures from the real evaluation."""

import json
import re
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest
import yaml
from sklearn.metrics import mean_absolute_error, roc_auc_score

from trajlm.arms import beliefs_path, report_metrics, write_beliefs
from trajlm.calibration import fit_temperature, scaled
from trajlm.compare import compare
from trajlm.config import BackboneConfig, FinetuningConfig, Recipe
from trajlm.delong import delong_test
from trajlm.errors import TrajlmError
from trajlm.metrics import auroc, brier_skill_score, paired_difference_interval
from trajlm.subgroups import STAYS as STAYS_FILE
from trajlm.tasks import PHENOTYPES, build_tasks

STAYS = 60
HELD_OUT = range(20, STAYS)
TARGETS = ("mortality", "length_of_stay_hours")


def cohort():
    rng = np.random.default_rng(3)
    died = (rng.random(STAYS) < 0.3).astype(float)
    hours = rng.uniform(20, 200, STAYS)
    stays = pl.DataFrame(
        {"stay_id": range(STAYS), "subject_id": [i // 2 for i in range(STAYS)], "hours_in_unit": hours}
    )
    # The length of stay of stay 25 is not known.
    return stays, {
        "mortality": died.tolist(),
        "length_of_stay_hours": [None if i == 25 else h for i, h in enumerate(hours)],
    }


def made_beliefs(skill, seed, at=(1.0, 20.0, 40.0)):
    """Beliefs after three events of every stay; the more skill, the nearer to the truth."""
    _, targets = cohort()
    rng = np.random.default_rng(seed)
    rows = []
    for stay in range(STAYS):
        for event, hour in enumerate(at):
            risk = 1 / (1 + np.exp(-(skill * (2 * targets["mortality"][stay] - 1) + rng.normal())))
            guess = max(
                0.0, 100 + skill * ((targets["length_of_stay_hours"][stay] or 100) - 100) / 3 + rng.normal(0, 20)
            )
            split = "held_out" if stay in HELD_OUT else "tuning"
            rows.append((stay, split, event, hour, "labs", risk, targets["mortality"][stay], guess,
                         targets["length_of_stay_hours"][stay]))  # fmt: skip
    names = ["stay_id", "split", "event_index", "hours_since_admission", "modality"]
    names += [f"{prefix}_{target}" for target in TARGETS for prefix in ("belief", "target")]
    return pl.DataFrame(rows, schema=names, orient="row")


def attributes(stays):
    """What fine-tuning writes of its stays; two sexes, no ethnicity."""
    return stays.with_columns(
        split=pl.when(pl.col("stay_id").is_in(list(HELD_OUT))).then(pl.lit("held_out")).otherwise(pl.lit("tuning")),
        sex=pl.when(pl.col("stay_id") % 2 == 0).then(pl.lit("female")).otherwise(pl.lit("male")),
        age=pl.lit("65 to 79 years"),
        ethnicity=pl.lit(None, pl.String),
        events=3 + pl.col("stay_id") % 4,
        modalities=1 + pl.col("stay_id") % 2,
        complete=pl.col("stay_id") % 2 == 1,
    )


def made_run(
    folder,
    skill,
    encoders="scratch",
    static_seed=1,
    change=None,
    backbone="tiny",
    tasks=("mortality", "length_of_stay"),
):
    """A folder as finetune.py leaves it, as far as a comparison reads it; ``change`` edits the beliefs first."""
    sequence, static = made_beliefs(skill, seed=0), made_beliefs(1.0, static_seed, at=(40.0,))
    if change is not None:
        sequence, static = change(sequence), change(static)
    recipe = Recipe(data="prepared", out=str(folder), encoders=encoders, backbone=BackboneConfig(name=backbone),
                    finetuning=FinetuningConfig(bootstrap_resamples=30, tasks=list(tasks)))  # fmt: skip
    stays, _ = cohort()
    static = static.with_columns(landmark=pl.lit(None, pl.Float64))
    arms = {"sequence": sequence, "static_mlp": static}
    sizes = {"train": 0, "tuning": 20, "held_out": len(HELD_OUT)}
    metrics = report_metrics(sizes, "made up", stays, build_tasks(recipe.finetuning.tasks), arms, 30, recipe.seed)
    folder.mkdir(parents=True)
    about = {"stage": "finetuning", "inputs": {"data": "d" * 64, "encoders": encoders}, "recipe": asdict(recipe)}
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    for arm, beliefs in arms.items():
        write_beliefs(beliefs_path(folder, arm), beliefs)
    write_beliefs(folder / STAYS_FILE, attributes(stays))
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = [made_run(root / "weak_run", 0.3), made_run(root / "strong|run", 1.5, encoders="somewhere", static_seed=2)]
    compare(runs, root / "out")
    return runs, root / "out"


def tables(out):
    """Title to rows of texts, the header first, of comparison.md."""
    found, title = {}, ""
    for line in (out / "comparison.md").read_text().splitlines():
        if line.startswith("**"):
            title = line.strip("*")
            found[title] = []
        elif line.startswith("|") and "---" not in line:
            found[title].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def test_the_figures_are_those_of_the_runs(compared):
    runs, out = compared
    found = tables(out)
    main = next(rows for title, rows in found.items() if title.startswith("Performance"))
    assert main[0] == ["Model", "Encoders", "Run", "In-hospital death, AUROC", "In-hospital death, AUPRC",
                       "Length of stay, MSE (h²)", "Length of stay, MAE (h)", "Length of stay, Pearson r",
                       "Length of stay, Spearman rho"]  # fmt: skip
    assert [row[:3] for row in main[1:]] == [
        ["Static MLP (late fusion)", "scratch", r"weak\_run"],
        ["Static MLP (late fusion)", "contrastive", r"strong\|run"],
        ["Sequence model, tiny", "scratch", r"weak\_run"],
        ["Sequence model, tiny", "contrastive", r"strong\|run"],
    ]
    assert {len(row) for rows in found.values() for row in rows[:1]} >= {7, 9}
    assert all(len({len(row) for row in rows}) == 1 for rows in found.values())
    for row, run in zip(main[3:], runs, strict=True):
        last = pl.read_parquet(run / "beliefs.parquet").filter(
            (pl.col("split") == "held_out") & (pl.col("event_index") == 2)
        )
        area = roc_auc_score(last["target_mortality"].to_numpy(), last["belief_mortality"].to_numpy())
        known = last.drop_nulls("target_length_of_stay_hours")
        gap = mean_absolute_error(known["target_length_of_stay_hours"], known["belief_length_of_stay_hours"])
        assert row[3].strip("*").startswith(f"{area:.3f} [")
        assert row[6].strip("*").startswith(f"{gap:.1f} [")


def test_the_best_of_every_column_is_bold(compared):
    _, out = compared
    columns = 0
    for title, rows in tables(out).items():
        if "minus" in title or "subgroup" in title:
            assert not any(cell.startswith("**") for row in rows for cell in row)
            continue
        for j, name in list(enumerate(rows[0]))[3:]:
            values = [float(row[j].strip("*").split(" ")[0].replace("−", "-").replace(",", "")) for row in rows[1:]]
            lower = any(word in name + title for word in ("MAE", "MSE")) or "calibration error" in name
            best = (min if lower else max)(values)
            bold = [v for v, row in zip(values, rows[1:], strict=True) if row[j].startswith("**")]
            assert bold == [best] * len(bold)
            assert bold, name
            columns += 1
    assert columns == 6 + 4 + 5 * 6


def test_landmark_tables_hold_the_sequence_models(compared):
    runs, out = compared
    rows = tables(out)["In-hospital death, AUROC by landmark"]
    assert rows[0][3:] == ["6 h", "12 h", "24 h", "48 h", "end of window"]
    for row, run in zip(rows[1:], runs, strict=True):
        figures = json.loads((run / "metrics.json").read_text())["arms"]["held_out"]["sequence"]
        values = [r["value"] for r in figures if r["target"] == "mortality" and r["metric"] == "auroc"]
        assert [cell.strip("*").split(" ")[0] for cell in row[3:]] == [f"{value:.3f}" for value in values]


def test_the_csv_holds_every_held_out_figure(compared):
    runs, out = compared
    frame = pl.read_csv(out / "comparison.csv")
    assert frame.columns == ["run", "arm", "target", "landmark", "metric", "value", "low", "high", "stays", "positives"]
    written = frame.rows()
    expected = [
        (run.name, arm, r["target"], "end of window" if r["landmark"] is None else f"{r['landmark']:g} h", r["metric"],
         r["value"], r["low"], r["high"], r["stays"], r["positives"])
        for run in runs
        for arm, rows in json.loads((run / "metrics.json").read_text())["arms"]["held_out"].items()
        for r in rows
    ]  # fmt: skip
    assert written == expected
    assert {row[1] for row in written} == {"sequence", "static_mlp"}


def test_latex_is_escaped_and_its_rows_are_whole(tmp_path):
    name = "50%_a&b#{x}$~^"
    compare([made_run(tmp_path / name, 1.0), made_run(tmp_path / "plain", 0.5)], tmp_path / "out")
    text = (tmp_path / "out" / "comparison.tex").read_text()
    assert r"50\%\_a\&b\#\{x\}\$\textasciitilde{}\textasciicircum{}" in text
    assert r"\toprule" not in text
    assert "−" not in text
    bare = re.sub(r"\\.", "", text)
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"[%#_~^]", bare)
    rows = 0
    for block in text.split(r"\begin{tabular}")[1:]:
        columns = re.match(r"\{(\w+)\}", block)[1]
        for line in block.split(r"\end{tabular}")[0].splitlines():
            if line.endswith(r"\\"):
                assert len(re.split(r"(?<!\\)&", line)) == len(columns)
                rows += 1
    assert rows == sum(len(found) for found in tables(tmp_path / "out").values())


def test_a_baseline_that_runs_share_stands_once(tmp_path):
    runs = [made_run(tmp_path / "a", 1.0), made_run(tmp_path / "b", 1.0, backbone="small")]
    compare(runs, tmp_path / "same")
    main = next(iter(tables(tmp_path / "same").values()))
    assert [row[2] for row in main[1:]] == ["a, b", "a", "b"]
    assert [row[0] for row in main[1:]] == ["Static MLP (late fusion)", "Sequence model, tiny", "Sequence model, small"]
    compare([runs[0], made_run(tmp_path / "c", 1.0, static_seed=9)], tmp_path / "other")
    assert [row[2] for row in next(iter(tables(tmp_path / "other").values()))[1:]] == ["a", "c", "a", "c"]


def test_the_markdown_is_printed(tmp_path, capsys):
    compare([made_run(tmp_path / "only", 1.0)], tmp_path / "out")
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.md").read_text() in printed
    assert "end of window: 40 stays" in printed
    assert "end of window: 39 stays" in printed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "calibration.csv", "comparison.csv", "comparison.md", "comparison.tex", "paired.csv", "plots.html",
        "reliability.csv", "subgroups.csv",
    ]  # fmt: skip


def without_stay(beliefs):
    return beliefs.filter(pl.col("stay_id") != 31)


def other_outcome(beliefs):
    return beliefs.with_columns(target_mortality=pl.when(stay_id=42).then(1.0).otherwise("target_mortality"))


def unknown_length(beliefs):
    unknown = pl.when(pl.col("stay_id") == 33).then(None).otherwise("target_length_of_stay_hours")
    return beliefs.with_columns(target_length_of_stay_hours=unknown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_stay, r"first and second cannot be compared: stay 31 is held out in first only \(1 such stays\); "
         r"name runs of one split; `trajlm results GRID"),
        (unknown_length, r"first and second .*hours of held-out stay 33 is [\d.]+ in first, unknown in second"),
        (other_outcome, r"first and second .*target_mortality of held-out stay 42 is 0 in first, 1 in second"),
    ],
)  # fmt: skip
def test_other_stays_or_outcomes_are_refused(tmp_path, change, message):
    assert cohort()[1]["mortality"][42] == 0
    runs = [made_run(tmp_path / "first", 1.0), made_run(tmp_path / "second", 1.0, change=change)]
    with pytest.raises(TrajlmError, match=message):
        compare(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_held_out_stays_need_be_the_same(tmp_path):
    def other_tuning(beliefs):
        return beliefs.filter(pl.col("stay_id") != 3)

    runs = [made_run(tmp_path / "first", 1.0), made_run(tmp_path / "second", 1.0, change=other_tuning)]
    compare(runs, tmp_path / "out")
    assert (tmp_path / "out" / "comparison.md").exists()


def test_runs_that_cannot_be_compared_are_named(tmp_path):
    run = made_run(tmp_path / "run", 1.0)
    with pytest.raises(TrajlmError, match="named twice"):
        compare([run, run.parent / "." / "run"], tmp_path / "out")
    with pytest.raises(TrajlmError, match="not a run folder"):
        compare([run, tmp_path / "nowhere"], tmp_path / "out")
    other = made_run(tmp_path / "other", 1.0)
    pl.read_parquet(other / "beliefs.parquet").drop("target_mortality").write_parquet(other / "beliefs.parquet")
    with pytest.raises(TrajlmError, match="only run has beliefs on mortality"):
        compare([run, other], tmp_path / "out")
    (other / "metrics.json").unlink()
    with pytest.raises(TrajlmError, match=r"other: fine-tuning has not finished"):
        compare([run, other], tmp_path / "out")
    about = yaml.safe_load((other / "config.yaml").read_text()) | {"stage": "pretraining"}
    (other / "config.yaml").write_text(yaml.safe_dump(about))
    with pytest.raises(TrajlmError, match="other is a run of pretraining"):
        compare([run, other], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajlmError, match="cannot write"):
        compare([run], tmp_path / "file")


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path):
    runs = [made_run(tmp_path / side / "run", 1.0, static_seed=i) for i, side in enumerate(("left", "right"))]
    compare(runs, tmp_path / "out")
    assert set(pl.read_csv(tmp_path / "out" / "comparison.csv")["run"]) == {str(run) for run in runs}


def last_beliefs(run, arm, split="held_out"):
    beliefs = pl.read_parquet(beliefs_path(run, arm)).filter(pl.col("split") == split)
    return beliefs.sort("stay_id", "event_index").unique("stay_id", keep="last", maintain_order=True)


def test_the_best_static_arm_is_chosen_without_the_held_out_stays(compared):
    """Against the baseline that ranks the tuning stays best, whatever the held-out stays say."""
    runs, out = compared
    frame = pl.read_csv(out / "paired.csv")
    assert set(frame["run"]) == {"weak_run", "strong|run"}
    areas = {
        run.name: roc_auc_score(
            *(last_beliefs(run, "static_mlp", "tuning")[f"{c}_mortality"] for c in ("target", "belief"))
        )
        for run in runs
    }
    best = max(areas, key=areas.get)
    died = frame.filter(pl.col("target") == "mortality")
    assert set(died["against"]) == {
        f"Static MLP (late fusion), {'scratch' if best == 'weak_run' else 'contrastive'} ({best})"
    }
    rival = last_beliefs(next(run for run in runs if run.name == best), "static_mlp")
    for run in runs:
        own = last_beliefs(run, "sequence")
        y = own["target_mortality"].to_numpy()
        row = died.filter((pl.col("run") == run.name) & (pl.col("metric") == "auroc")).row(0, named=True)
        a, b = (beliefs["belief_mortality"].to_numpy() for beliefs in (own, rival))
        people = [stay // 2 for stay in own["stay_id"]]
        assert row["value"] == pytest.approx(roc_auc_score(y, a) - roc_auc_score(y, b), abs=1e-9)
        interval = paired_difference_interval(auroc, y, a, b, people, 30, 0)
        assert (row["low"], row["high"]) == pytest.approx(interval, abs=1e-9)
        assert row["p_value"] == pytest.approx(delong_test(y, a, b).p_value, abs=1e-9)
        assert row["stays"] == len(HELD_OUT)


def test_calibration_and_subgroups_follow_from_the_beliefs(compared):
    runs, out = compared
    calibration, groups = (pl.read_csv(out / f"{name}.csv") for name in ("calibration", "subgroups"))
    for run in runs:
        own, tuning = last_beliefs(run, "sequence"), last_beliefs(run, "sequence", "tuning")
        mine = pl.col("arm").str.ends_with(f"({run.name})") & pl.col("arm").str.starts_with("Sequence")
        rows = calibration.filter(mine & (pl.col("metric") == "brier_skill_score"))
        temperature = fit_temperature(tuning["target_mortality"], tuning["belief_mortality"])
        assert rows["temperature"].to_list() == pytest.approx([1.0, temperature])
        y, b = (own[f"{c}_mortality"].to_numpy() for c in ("target", "belief"))
        expected = [brier_skill_score(y, belief) for belief in (b, scaled(b, temperature))]
        assert rows["value"].to_list() == pytest.approx(expected, abs=1e-9)
        women = own.filter(pl.col("stay_id") % 2 == 0)
        row = groups.filter(
            mine & (pl.col("group") == "female") & (pl.col("metric") == "auroc") & (pl.col("target") == "mortality")
        ).row(0, named=True)
        assert row["value"] == pytest.approx(
            roc_auc_score(women["target_mortality"], women["belief_mortality"]), abs=1e-9
        )
    assert set(groups["dimension"]) == {"sex", "age", "events", "modalities", "complete"}


def test_plots_need_no_network_and_hold_every_arm(compared):
    runs, out = compared
    page = (out / "plots.html").read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    for run in runs:
        assert run.name in page
    for title in ("In-hospital death, AUROC", "Length of stay, MAE", "reliability, after temperature scaling"):
        assert title in page


def test_a_run_of_an_earlier_version_is_named(tmp_path):
    run = made_run(tmp_path / "old", 1.0)
    (run / STAYS_FILE).unlink()
    with pytest.raises(TrajlmError, match=r"old has no stays\.parquet"):
        compare([run], tmp_path / "out")


def coded(beliefs):
    """Phenotypes in place of the other targets: each stay has the outcome of another one."""
    belief, target = (beliefs[f"{what}_mortality"].to_list() for what in ("belief", "target"))
    told = {}
    for shift, name in enumerate(PHENOTYPES):
        turned = [pl.Series(values[3 * shift :] + values[: 3 * shift]) for values in (belief, target)]
        told |= {f"belief_phenotype_{name}": turned[0], f"target_phenotype_{name}": turned[1]}
    return beliefs.drop("^(belief|target)_.*$").with_columns(**told)


def test_runs_of_phenotypes_alone_are_compared_by_their_means(tmp_path):
    def only(beliefs):
        return coded(beliefs.filter(pl.col("event_index") == pl.col("event_index").max().over("stay_id")))

    runs = [made_run(tmp_path / name, skill, change=only, tasks=["phenotyping"])
            for name, skill in (("weak", 0.3), ("strong", 1.5))]  # fmt: skip
    compare(runs, tmp_path / "out")
    rows = next(rows for title, rows in tables(tmp_path / "out").items() if title.startswith("Performance"))
    assert rows[0][3:] == ["Phenotypes, macro AUROC", "Phenotypes, macro AUPRC"]
    last = last_beliefs(runs[1], "sequence")
    areas = [roc_auc_score(last[f"target_phenotype_{p}"], last[f"belief_phenotype_{p}"]) for p in PHENOTYPES]
    assert rows[-1][3].strip("*").startswith(f"{np.mean(areas):.3f} [")
    assert all(rows[1:] for rows in tables(tmp_path / "out").values()), "an empty table is left out"
    for name in ("paired", "calibration", "reliability", "subgroups"):
        frame = pl.read_csv(tmp_path / "out" / f"{name}.csv")
        assert frame.is_empty()
        assert {"arm", "target"} <= set(frame.columns)
    titles = re.findall(r'"text":"([^"]*)"', (tmp_path / "out" / "plots.html").read_text())
    assert any("Phenotypes, macro AUROC" in title for title in titles)
    assert not any("reliability" in title for title in titles)


def test_files_of_a_run_that_are_gone_or_cut_short_are_named(tmp_path):
    run = made_run(tmp_path / "run", 1.0)
    whole = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(TrajlmError, match=r"run/metrics\.json: expected .* cannot be read; put the file back"):
        compare([run], tmp_path / "out")
    (run / "metrics.json").write_text(whole)
    beliefs = run / "static_mlp" / "beliefs.parquet"
    held = beliefs.read_bytes()
    beliefs.write_bytes(held[: len(held) // 2])
    with pytest.raises(TrajlmError, match=r"static_mlp/beliefs\.parquet: expected .* cannot be read; put"):
        compare([run], tmp_path / "out")
    beliefs.unlink()
    with pytest.raises(TrajlmError, match=r"static_mlp/beliefs\.parquet: expected .* no such file; put"):
        compare([run], tmp_path / "out")
    beliefs.write_bytes(held)
    compare([run], tmp_path / "out")


def test_a_grid_in_place_of_a_run_says_where_its_runs_are(tmp_path):
    with pytest.raises(TrajlmError, match="nowhere is not a run folder: no such folder"):
        compare([tmp_path / "nowhere"], tmp_path / "out")
    run = made_run(tmp_path / "grid" / "split-0" / "scratch-tiny-seed-0", 1.0)
    split, grid = run.parent, run.parent.parent
    with pytest.raises(TrajlmError, match=r"holds some: name those of one split, such as .*scratch-tiny-seed-0$"):
        compare([split], tmp_path / "out")
    (grid / "stages.json").write_text("{}")
    for folder in (split, grid):
        told = f"such as {re.escape(str(run))}; `trajlm results {re.escape(str(grid))} --out"
        with pytest.raises(TrajlmError, match=told):
            compare([folder], tmp_path / "out")
    with pytest.raises(TrajlmError, match=r"seed-1 is not a run folder: .* run the same `trajlm experiment` again"):
        compare([run, split / "scratch-tiny-seed-1"], tmp_path / "out")
