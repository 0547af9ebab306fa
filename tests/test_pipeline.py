"""What the commands leave on disk, and that a killed command, repeated, ends where an untouched one does."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from conftest import FINETUNING, PRETRAINING, RECIPE, ROOT, TRAJLM, command, last_line
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    mean_absolute_error,
    mean_squared_error,
    roc_auc_score,
)

from trajlm.columns import read_note
from trajlm.config import Recipe
from trajlm.errors import TrajlmError
from trajlm.finetuning import finetune
from trajlm.flags import parse_recipe, recipe_parser
from trajlm.pretraining import pretrain
from trajlm.schema import EVENT_COLUMNS, PHENOTYPE_PREFIX, STAY_COLUMNS

TARGETS = ("mortality", "length_of_stay_hours")
BELIEF_COLUMNS = ["stay_id", "split", "event_index", "hours_since_admission", "modality"] + [
    f"{kind}_{target}" for target in TARGETS for kind in ("belief", "target")
]


def digests(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of every file of a folder, but for a tracker's, which are named by the time."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.parent.name != "tensorboard"
        and (name := path.relative_to(folder).as_posix()) not in without
    }


# Folders


def test_the_manifest_accounts_for_every_row_and_every_input(prepared, raw):
    manifest = prepared.manifest
    assert {"cohort", "release", "inputs", "settings", "tables", "open_leaks"} <= set(manifest)
    for name, digest in manifest["inputs"].items():
        assert hashlib.sha256((raw / name).read_bytes()).hexdigest() == digest
    for table, rows in manifest["tables"].items():
        assert rows["read"] == rows["kept"] + rows["rejected"]
        assert rows["rejected"] == sum(rows["reasons"].values())
        if rows["rejected"]:
            assert pl.read_parquet(prepared.folder / "rejected" / f"{table}.parquet").height == rows["rejected"]


def test_stays_and_events_have_the_columns_of_the_contract(prepared):
    stays = pl.read_parquet(prepared.folder / "stays.parquet")
    events = pl.read_parquet(prepared.folder / "events" / "*.parquet")
    present = {f"present_{m.name}": pl.Boolean for m in prepared.modalities}
    phenotypes = {name: pl.Int8 for name in stays.columns if name.startswith(PHENOTYPE_PREFIX)}
    assert len(phenotypes) == 25
    assert dict(stays.schema) == {**STAY_COLUMNS, "split": pl.String(), **present, **phenotypes}
    assert dict(events.schema) == EVENT_COLUMNS
    for modality in prepared.modalities:
        holders = set(events.filter(pl.col("modality") == modality.name)["stay_id"])
        assert holders == set(stays.filter(f"present_{modality.name}")["stay_id"])
    payloads = events.select(
        pl.col("feature_ids").is_not_null().cast(int) + pl.col("text").is_not_null() + pl.col("image").is_not_null()
    )
    assert set(payloads.to_series()) == {1}
    assert events.select((pl.col("feature_ids").list.len() == pl.col("values").list.len()).all()).item() is True


def test_no_patient_crosses_splits(prepared):
    by_subject = prepared.stays.group_by("subject_id").agg(pl.col("split").n_unique())
    assert by_subject["split"].max() == 1
    assert set(prepared.stays["split"]) == {"train", "tuning", "held_out"}


def test_features_are_numbered_within_their_modality(prepared):
    listed = json.loads((prepared.folder / "features.json").read_text())["features"]
    assert [f["feature_id"] for f in listed] == list(range(len(listed)))
    for modality in (m for m in prepared.modalities if m.kind == "numeric"):
        ids = [f["feature_id"] for f in listed if f["modality"] == modality.name]
        assert ids == list(range(ids[0], ids[0] + len(ids)))


@pytest.mark.parametrize("fixture", ["encoders_run", "run"])
def test_a_run_says_what_made_it(fixture, request):
    folder = request.getfixturevalue(fixture)
    about = yaml.safe_load((folder / "config.yaml").read_text())
    facts = json.loads((folder / "environment.json").read_text())
    assert about["stage"] == {"encoders_run": "pretraining", "run": "finetuning"}[fixture]
    assert set(about["inputs"]["data"]) <= set("0123456789abcdef")
    assert facts["inputs_sha256"] == about["inputs"]
    assert facts["seed"] == about["recipe"]["seed"] == 0
    assert {"versions", "hardware", "git_commit", "seconds", "peak_memory_gb"} <= set(facts)
    assert (folder / "README.md").read_text().strip()
    assert not (folder / "checkpoints").exists()
    assert not list(folder.rglob("*.partial"))


def test_weights_are_safetensors_alone(encoders_run, run):
    files = [path for folder in (encoders_run, run) for path in folder.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files if path.parent.name != "tensorboard"}
    written = {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".parquet", ".bin"}
    assert suffixes == written | {".html", ".svg"}  # a page and a picture for people
    # Plain numbers, as their note says.
    columns = {path.parent for path in run.rglob("*.bin")}
    assert columns == {run / "latents", *(run / "latents_known").iterdir()}
    assert all(read_note(folder) is not None for folder in columns)


# Beliefs and metrics


def test_one_belief_after_every_event(prepared, beliefs):
    assert beliefs.columns == BELIEF_COLUMNS
    events = pl.read_parquet(prepared.folder / "events" / "*.parquet").select(list(EVENT_COLUMNS)[:3])
    events = events.with_columns(pl.int_range(pl.len()).over("stay_id").alias("event_index"))
    both = beliefs.join(events, on=["stay_id", "event_index"], suffix="_event", how="left")
    assert both.height == beliefs.height == beliefs.select("stay_id", "event_index").n_unique()
    assert (both["modality"] == both["modality_event"]).all()
    assert np.allclose(both["hours_since_admission"], both["hours_since_admission_event"], rtol=1e-6)
    assert beliefs.height == events.join(beliefs, on="stay_id", how="semi").height


def test_beliefs_are_of_held_out_and_of_tuning_stays_alone(prepared, beliefs):
    split = dict(prepared.stays.select("stay_id", "split").iter_rows())
    for said in ("held_out", "tuning"):
        theirs = {split[stay] for stay in beliefs.filter(pl.col("split") == said)["stay_id"]}
        assert theirs == {said}
    assert "train" not in set(beliefs["split"])
    held_out = set(prepared.stays.filter(pl.col("split") == "held_out")["stay_id"])
    assert set(beliefs.filter(pl.col("split") == "held_out")["stay_id"]) == held_out


def test_targets_beside_beliefs_are_those_of_the_stays(prepared, beliefs):
    both = beliefs.join(prepared.stays, on="stay_id", suffix="_of_stay")
    assert (both["target_mortality"] == both["target_mortality_of_stay"]).all()
    hours, known = both["target_length_of_stay_hours_of_stay"], both["target_length_of_stay_hours"]
    asked_for = (hours >= 12) & (hours <= 720)
    assert (known.is_not_null() == asked_for).all()
    assert np.allclose(known.filter(asked_for), hours.filter(asked_for))
    assert beliefs["belief_mortality"].is_between(0, 1).all()
    assert (beliefs["belief_length_of_stay_hours"] >= 0).all()


def independent_figures(frame: pl.DataFrame, target: str) -> dict[str, float]:
    y, b = frame[f"target_{target}"].to_numpy(), frame[f"belief_{target}"].to_numpy()
    if target == "mortality":
        if len(set(y)) < 2:
            return {"auroc": math.nan, "auprc": math.nan, "brier_skill_score": math.nan}
        reference = brier_score_loss(y, np.full(len(y), y.mean()))
        return {
            "auroc": roc_auc_score(y, b),
            "auprc": average_precision_score(y, b),
            "brier_skill_score": 1 - brier_score_loss(y, b) / reference,
        }
    return {
        "mae": mean_absolute_error(y, b),
        "mse": mean_squared_error(y, b),
        "pearson": pearsonr(y, b).statistic,
        "spearman": spearmanr(y, b).statistic,
    }


@pytest.mark.parametrize("split", ["tuning", "held_out"])
@pytest.mark.parametrize("arm", ["sequence", "static_mlp", "logistic"])
def test_metrics_follow_from_beliefs(run, prepared, arm, split):
    beliefs = pl.read_parquet(run / ("beliefs.parquet" if arm == "sequence" else f"{arm}/beliefs.parquet"))
    landmarks = {row["landmark"] for row in json.loads((run / "metrics.json").read_text())["arms"][split][arm]}
    assert landmarks == {6.0, 12.0, 24.0, 48.0, None}
    rows = json.loads((run / "metrics.json").read_text())["arms"][split][arm]
    stays_hours = dict(prepared.stays.select("stay_id", "hours_in_unit").iter_rows())
    compared = 0
    for landmark in {row["landmark"] for row in rows}:
        latest: dict[int, dict] = {}
        for row in beliefs.filter(pl.col("split") == split).sort("stay_id", "event_index").iter_rows(named=True):
            if row.get("landmark", landmark) != landmark:
                continue  # a model refitted for each landmark believes for that one alone
            too_late = landmark is not None and row["hours_since_admission"] > landmark
            if too_late or (landmark is not None and stays_hours[row["stay_id"]] < landmark):
                continue
            latest[row["stay_id"]] = row
        at = pl.DataFrame(list(latest.values()), schema=beliefs.schema)
        for target in TARGETS:
            known = at.filter(pl.col(f"target_{target}").is_not_null())
            reported = {r["metric"]: r for r in rows if r["target"] == target and r["landmark"] == landmark}
            for metric, value in independent_figures(known, target).items():
                said = reported[metric]
                assert said["stays"] == known.height
                if math.isnan(value):
                    assert said["value"] is None
                else:
                    assert said["value"] == pytest.approx(value, rel=1e-9)
                    compared += 1
    assert compared >= 4


# Repeating


def test_a_finished_run_is_left_as_it_is(run, encoders_run, prepared_folder):
    before = digests(run)
    # What the encoders were pretrained on need not be named again.
    for data in (["--data", prepared_folder], []):
        done = command("finetune.py", *FINETUNING, *data, "--encoders", encoders_run, "--out", run)
        assert "finished already" in done.stdout
        assert digests(run) == before


def test_a_finished_run_takes_more_baselines(run, encoders_run, prepared_folder, tmp_path):
    """It then holds what a run holds that had all of them from the start; nothing is trained twice, nor taken away."""
    out = tmp_path / "run"
    same = ["finetune.py", *FINETUNING, "--data", prepared_folder, "--encoders", encoders_run, "--out", out]
    fewer = ["--finetuning.baselines", "[]", "--finetuning.ensembles", "[]"]
    command(*same, *fewer)
    before, whole = json.loads((out / "metrics.json").read_text()), json.loads((run / "metrics.json").read_text())
    assert set(before["arms"]["held_out"]) < set(whole["arms"]["held_out"])
    trained = [(out / name, (out / name).stat().st_mtime_ns) for name in ("trajectory.safetensors", "shares.json")]
    for place in ("trajlm.checkpoint:RunFolder.log", "trajlm.checkpoint:RunFolder.finish"):
        killed(tmp_path, place, "before", 1, *same)
        assert json.loads((out / "metrics.json").read_text()) == before  # what it was, it is until it is more
    assert "finished already" in command(*same, *fewer).stdout
    alone = out / "network" / "beliefs.parquet"
    alone.rename(tmp_path / "elsewhere")
    gone = command(*same, check=False)  # rather than train the sequence model again
    assert "network/beliefs.parquet: expected it of a finished run that is given more baselines" in last_line(gone)
    (tmp_path / "elsewhere").rename(alone)
    command(*same)
    changing = ("log.jsonl", "environment.json", "config.yaml", "README.md")
    assert digests(out, without=changing) == digests(run, without=changing)
    assert all(path.stat().st_mtime_ns == time for path, time in trained)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(log) == len((run / "log.jsonl").read_text().splitlines()) + 1  # it was finished twice
    facts = json.loads((out / "environment.json").read_text())
    assert [set(by) for by in facts["grown_by"]] == [
        {"versions", "hardware", "command", "seed", "git_commit", "inputs_sha256"}
    ]
    refused = command(*same, *fewer, check=False)
    assert refused.returncode == 2
    assert "was made with finetuning.baselines = ['mlp'" in last_line(refused)


def test_other_settings_or_other_data_are_refused_by_name(run, encoders_run, prepared_folder, tmp_path):
    same = ["finetune.py", *FINETUNING, "--encoders", encoders_run, "--out", run]
    other = command(*same, "--data", prepared_folder, "--finetuning.learning_rate", 0.5, check=False)
    assert other.returncode == 2
    assert "finetuning.learning_rate = 0.002, now it is 0.5" in last_line(other)
    assert "Traceback" not in other.stderr
    shutil.copytree(prepared_folder, tmp_path / "prepared")
    stays = pl.read_parquet(prepared_folder / "stays.parquet")
    stays.with_columns(1 - pl.col("target_mortality")).write_parquet(tmp_path / "prepared" / "stays.parquet")
    changed = ["--data", str(tmp_path / "prepared")]
    with pytest.raises(TrajlmError, match=r"was made with inputs\.data"):
        pretrain(settings([*PRETRAINING, *changed, "--out", str(encoders_run)]))
    with pytest.raises(TrajlmError, match="pretrained on another prepared folder"):
        finetune(settings([*FINETUNING, *changed, "--encoders", str(encoders_run), "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def settings(flags: list[str]) -> Recipe:
    return parse_recipe(recipe_parser("pipeline", ""), flags)


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("pretrain.py", ["--pretraining.epoch", "3"], "'pretraining.epochs'"),
        ("finetune.py", ["--finetuning.learning_rat", "3"], "'finetuning.learning_rate'"),
        ("pretrain.py", ["--pretraining.epochs", "0"], "pretraining.epochs"),
        ("finetune.py", ["--data", "NOWHERE", "--out", "NOWHERE-RUN"], "NOWHERE is not a prepared folder"),
        ("interpret.py", ["--run", "NOWHERE", "--out", "REPORT"], "NOWHERE is not a run folder"),
    ],
)
def test_a_mistake_is_one_line_that_helps(script, arguments, said, tmp_path):
    arguments = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    done = command(script, *arguments, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told == [last_line(done)]
    assert said in told[0]
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_in_a_recipe_is_an_error(tmp_path):
    (tmp_path / "typo.yaml").write_text("pretraining:\n  temprature: 0.1\n")
    done = command("pretrain.py", "--config", tmp_path / "typo.yaml", check=False)
    assert done.returncode == 2
    assert "pretraining.temperature" in last_line(done)


# Kill -9

KILLER = '''
"""Run a script that kills itself, as kill -9 would, when a function is called for the n-th time."""
import importlib, os, runpy, signal, sys
from types import SimpleNamespace

place, moment, count, checkpoint_often, script, *arguments = sys.argv[1:]
module, _, path = place.partition(":")
owner = importlib.import_module(module)
*outer, name = path.split(".")
for part in outer:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), 0

def counted(*args, **options):
    global calls
    calls += 1
    if calls < int(count):
        return original(*args, **options)
    if moment == "after":
        original(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, counted)
if checkpoint_often == "often":
    import itertools, trajlm.training
    clock = itertools.count(0, 61)
    trajlm.training.time = SimpleNamespace(monotonic=lambda: float(next(clock)))
sys.argv = [script, *arguments]
if script.endswith(".py"):
    runpy.run_path(script, run_name="__main__")
else:
    runpy.run_module(script, run_name="__main__")
'''


def killed(tmp_path: Path, place: str, moment: str, count: int, script: str, *arguments: object, often=False) -> None:
    """Run a command to a moment of its life and no further."""
    killer = tmp_path / "killer.py"
    killer.write_text(KILLER)
    script = str(ROOT / script) if script.endswith(".py") else script
    done = command(killer, place, moment, count, "often" if often else "seldom", script, *arguments, check=False)
    assert done.returncode == -9, f"{place} was never called {count} times:\n{done.stderr}"


def test_pretraining_killed_and_repeated_ends_the_same(prepared_folder, encoders_run, tmp_path):
    out = tmp_path / "encoders"
    same = ["pretrain.py", *PRETRAINING, "--data", prepared_folder, "--out", out]
    # Mid-epoch with a checkpoint of that very step, then between the second epoch's best weights and its checkpoint.
    killed(tmp_path, "trajlm.training:Trainer._step", "after", 2, *same, often=True)
    killed(tmp_path, "trajlm.checkpoint:Checkpoints.save_best", "after", 2, *same)
    assert not (out / "metrics.json").exists()
    done = command(*same)
    assert "alignment: resumes at epoch 2, step 3" in done.stdout
    for name in ("metrics.json", "encoders.safetensors", "encoders.json"):
        assert (out / name).read_bytes() == (encoders_run / name).read_bytes()


def test_finetuning_killed_and_repeated_ends_the_same(prepared_folder, encoders_run, run, tmp_path):
    out = tmp_path / "run"
    same = ["finetune.py", *FINETUNING, "--data", prepared_folder, "--encoders", encoders_run, "--out", out]
    moments = [
        ("trajlm.latents:_encode", "before", 1, False),
        ("trajlm.checkpoint:RunFolder.log", "after", 4, False),  # the baseline's three epochs, the sequence's first
        ("trajlm.training:Trainer._step", "after", 2, True),  # in the middle of the second
        ("trajlm.checkpoint:RunFolder.finish", "before", 1, False),
    ]
    for place, moment, count, often in moments:
        killed(tmp_path, place, moment, count, *same, often=often)
        assert not (out / "metrics.json").exists()
    # All was trained: what is left is to state it.
    command(*same)
    changing = ("log.jsonl", "environment.json", "config.yaml", "README.md")
    assert digests(out, without=changing) == digests(run, without=changing)


def test_preparation_killed_and_repeated_ends_the_same(raw, prepared_folder, tmp_path):
    out = tmp_path / "prepared"
    same = ["prepare", *RECIPE, "--raw", raw, "--out", out]
    killed(tmp_path, "trajlm.prepare:_features_json", "before", 1, "trajlm.cli", *same)
    assert not out.exists()
    command(*TRAJLM, *same)
    assert digests(out) == digests(prepared_folder)
    assert [p.name for p in tmp_path.iterdir() if "prepared" in p.name] == ["prepared"]


def test_a_report_killed_and_repeated_ends_the_same(run, report, tmp_path):
    out = tmp_path / "report"
    same = ["interpret.py", "--run", run, "--stays-shown", 2, "--figures", "--out", out]
    killed(tmp_path, "trajlm.interpret.ablation:anchoring", "before", 1, *same)
    assert not (out / "index.html").exists()
    assert list(out.rglob("*.parquet")), "the ablations were not kept"
    command(*same)
    assert digests(out) == digests(report)


# Several processes


def accelerate(*arguments: object, **options) -> tuple:
    launcher = Path(sys.executable).with_name("accelerate")
    if not launcher.exists():
        pytest.skip("accelerate's launcher is not beside this Python")
    return command(launcher, "launch", *arguments, **options)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_finetune_together(engine, prepared_folder, encoders_run, run, tmp_path):
    script = ["finetune.py", *FINETUNING, "--data", prepared_folder, "--encoders", encoders_run]
    script[0] = ROOT / script[0]
    config = ["--config_file", ROOT / f"recipes/accelerate/{engine}.yaml", "--main_process_port", 0]
    accelerate(*config, *script, "--out", tmp_path / "run")
    made, alone = pl.read_parquet(tmp_path / "run/beliefs.parquet"), pl.read_parquet(run / "beliefs.parquet")
    assert made.columns == BELIEF_COLUMNS
    keys = ["stay_id", "split", "event_index", "hours_since_admission", "modality"]
    assert made.select(keys).equals(alone.select(keys))
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in log if r.get("arm") == "sequence"] == [1, 2, 3]


def test_processes_that_never_came_up_are_refused(prepared_folder, encoders_run, tmp_path):
    script = ["finetune.py", *FINETUNING, "--data", prepared_folder, "--encoders", encoders_run]
    script[0] = ROOT / script[0]
    common = ["--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = accelerate("--cpu", *common, *script, "--out", tmp_path / "run", check=False)
    assert done.returncode != 0
    assert "several processes were asked for and 1 came up" in done.stderr
    assert not (tmp_path / "run").exists()
