"""A report of made-up but plausible numbers: what the tests of drawing look at."""

from __future__ import annotations

import numpy as np
import polars as pl

from trajlm.interpret.audit import summarise, with_decisions
from trajlm.report.contents import ABLATION_COLUMNS
from trajlm.report.page import AblatedStay, AgainstStay, AttentionMap, Report, StayPage, TargetInfo

MODALITIES = ("demographics", "vitals", "labs", "radiology_notes", "chest_xray")
TARGETS = [TargetInfo("mortality", "In-hospital mortality", "", "probability"),
           TargetInfo("length_of_stay", "Length of stay", "h", "hours")]  # fmt: skip
SUMMARIES = {
    "demographics": "age 71 years, sex=female, height 162 cm, weight 58 kg",
    "vitals": "heart rate 104 /min, mean arterial pressure 61 mmHg, SpO2 93 %, temperature 38.4 °C",
    "labs": "lactate 3.1 mmol/L, creatinine 1.9 mg/dL, sodium 133 mmol/L, white cells 17.2 10^9/L, platelets 88 10^9/L",
    "radiology_notes": "note, 142 words",
    "chest_xray": "image, 64 x 64 pixels",
}


def attention_map(modality: list[str], hours: list[float], rng: np.random.Generator) -> AttentionMap:
    """Causal attention that leans on the first event, on recent positions and on one late event in particular."""
    length = 2 * len(modality)
    raw = rng.gamma(0.3, 1.0, (length, length)).astype(np.float32)
    gap = np.arange(length)[:, None] - np.arange(length)[None, :]
    raw += 2.5 * np.exp(-np.abs(gap) / 3) + 0.01
    raw[:, 0] += 3 + 0.15 * length
    raw = np.tril(raw)
    weights = (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)
    positions = pl.DataFrame({
        "position": range(length),
        "kind": ["event", "predict"] * len(modality),
        "modality": [m for m in modality for _ in range(2)],
        "hours_since_admission": [h for h in hours for _ in range(2)],
    }, schema_overrides={"modality": pl.String, "kind": pl.String, "hours_since_admission": pl.Float64})  # fmt: skip
    return AttentionMap(weights, positions)


def trajectory(index: list[int], hours: list[float], modality: list[str], rng: np.random.Generator) -> pl.DataFrame:
    steps = rng.normal(0, 0.25, len(index)) * (rng.random(len(index)) < 0.4)
    risk = 1 / (1 + np.exp(2.0 - np.cumsum(steps) - 0.01 * np.arange(len(index))))
    stay_hours = 60 + 80 * risk + rng.normal(0, 1, len(index))
    columns = {
        "event_index": index,
        "hours_since_admission": hours,
        "modality": modality,
        "summary": [SUMMARIES.get(m, m) for m in modality],
    }
    for name, belief in (("mortality", risk), ("length_of_stay", stay_hours)):
        columns[f"belief_{name}"] = belief.tolist()
        columns[f"change_{name}"] = [None, *np.diff(belief).tolist()]
    return pl.DataFrame(columns)


def values(modality: list[str], rng: np.random.Generator) -> pl.DataFrame:
    """Measurements of the vital signs, the laboratory and the demographics; the others have none."""
    held = {"vitals": [("heart_rate", "/min"), ("spo2", "%")], "labs": [("lactate", "mmol/L")]}
    rows = [
        (i, name, float(rng.uniform(1, 100)), unit) for i, m in enumerate(modality) for name, unit in held.get(m, [])
    ]
    rows += [(i, "sex=female", None, "") for i, m in enumerate(modality) if m == "demographics"]
    return pl.DataFrame(rows, schema=["event_index", "feature", "value", "unit"], orient="row")


def importance(attention: AttentionMap, rng: np.random.Generator) -> pl.DataFrame:
    """Effects in points of a probability; the last read-out's attention is the map's."""
    events = attention.positions.filter(pl.col("kind") == "event")
    effects = {name: rng.normal(0, 0.03, events.height) for name in ("knock_out", "removal", "attribution")}
    return events.select("modality", "hours_since_admission").with_columns(
        event_index=pl.int_range(events.height),
        attention=pl.Series(attention.weights[-1, 0::2].astype(float)),
        **{name: pl.Series(values) for name, values in effects.items()},
    )


def stay_page(
    stay_id: int, events: int, seed: int = 0, *, died: bool = False, against: bool = False, ablated: bool = True
) -> StayPage:
    rng = np.random.default_rng(seed + stay_id)
    later = rng.choice(MODALITIES[1:], events - 1, p=[0.6, 0.25, 0.08, 0.07]).tolist()
    hours = [0.0, *np.sort(rng.uniform(0, 48, events - 1)).round(2).tolist()]
    modality = ["demographics", *later]
    index = list(range(events))
    whole = trajectory(index, hours, modality, rng)
    ablations = {}
    for name in ("labs", "vitals") if ablated else ():
        kept = [i for i in index if modality[i] != name]
        left = [modality[i] for i in kept]
        left_hours = [hours[i] for i in kept]
        ablations[name] = AblatedStay(trajectory(kept, left_hours, left, rng), attention_map(left, left_hours, rng))
    truth = {"mortality": float(died), "length_of_stay": 93.5}
    map_ = attention_map(modality, hours, rng)
    other = None
    if against:
        other = AgainstStay(trajectory(index, hours, modality, rng), attention_map(modality, hours, rng), ablations)
    return StayPage(stay_id, "held_out", truth, whole, map_, ablations, values(modality, rng), other)


def metrics(rng: np.random.Generator) -> pl.DataFrame:
    rows = []
    for arm, lift in (("sequence model", 0.02), ("static MLP (late fusion)", 0.0)):
        for at, landmark in enumerate(("6 h", "12 h", "24 h", "48 h", "end of window")):
            if arm.startswith("static") and landmark != "end of window":
                continue
            stays = 612 - 70 * at
            for metric, base, width in (("AUROC", 0.77, 0.035), ("AUPRC", 0.38, 0.06), ("ACE", 0.03, 0.01),
                                        ("Brier skill", 0.12, 0.04)):  # fmt: skip
                value = base + lift + 0.018 * at + rng.normal(0, 0.004)
                rows.append((arm, "mortality", landmark, metric, value, value - width, value + width, stays, 84 - at))
            for metric, base, width in (("MAE", 61.0, 5.0), ("Spearman", 0.55, 0.05)):
                value = base * (1 - 0.03 * at - lift) if metric == "MAE" else base + 0.02 * at + lift
                rows.append((arm, "length_of_stay", landmark, metric, value, value - width, value + width, stays, None))
    names = ["arm", "target", "landmark", "metric", "value", "low", "high", "stays", "positives"]
    return pl.DataFrame(rows, schema=names, orient="row")


def calibration(rng: np.random.Generator) -> pl.DataFrame:
    rows = []
    for arm, bend in (("sequence model", 1.05), ("static MLP (late fusion)", 1.35)):
        for at, belief in enumerate((0.02, 0.04, 0.07, 0.11, 0.18, 0.29, 0.46, 0.7)):
            rows.append((arm, "mortality", at, belief, min(1.0, belief**bend + rng.normal(0, 0.012)), 76))
            rows.append((arm, "length_of_stay", at, 30 + 150 * belief, 30 + 150 * belief**bend, 76))
    return pl.DataFrame(rows, schema=["arm", "target", "bin", "belief_mean", "observed", "stays"], orient="row")


def anchoring(rng: np.random.Generator, stays: int = 60) -> pl.DataFrame:
    rows = []
    for ablated, shift in (("labs", 0.06), ("vitals", 0.16)):
        before = rng.beta(4, 12, stays)
        after = np.clip(before + rng.normal(shift, 0.04, stays), 0, 1)
        for stay in range(stays):
            for target, spread, base in (("mortality", 0.05, 0.2), ("length_of_stay", 6.0, 80.0)):
                belief = base + abs(rng.normal(0, spread))
                moved = belief + rng.normal(0, spread)
                rows.append((1000 + stay, ablated, target, before[stay], after[stay], belief, moved))
    names = ["stay_id", "ablated", "target", "share_before", "share_after", "belief_before", "belief_after"]
    return pl.DataFrame(rows, schema=names, orient="row")


def audit(changes: pl.DataFrame) -> pl.DataFrame:
    stays = changes.select("stay_id", subject_id=pl.col("stay_id")).unique(maintain_order=True)
    return summarise(with_decisions(changes, {"mortality": 0.25}), stays, 50, 0)


def ablation(rng: np.random.Generator) -> pl.DataFrame:
    rows = []
    costs = {"demographics": 0.004, "vitals": 0.11, "labs": 0.05, "radiology_notes": 0.0, "chest_xray": -0.01}
    for ablated, cost in ({"nothing": 0.0} | costs).items():
        stays = 360 if ablated == "demographics" else 372
        for metric, base in (("auroc", 0.84), ("auprc", 0.45), ("brier_skill_score", 0.15)):
            value = base - cost + rng.normal(0, 0.002)
            by = (-cost, -cost - 0.01, -cost + 0.02)
            rows.append((ablated, "mortality", metric, value, value - 0.04, value + 0.05, *by, stays, 80))
        for metric, value, by in (
            ("mse", 9000, 9e4 * cost), ("mae", 55, 90 * cost), ("spearman", 0.63, -cost)
        ):  # fmt: skip
            ends = (value + by) * 0.94, (value + by) * 1.07
            rows.append((ablated, "length_of_stay", metric, value + by, *ends, by, by - 1, by + 2, stays, None))
    return pl.DataFrame(rows, schema=list(ABLATION_COLUMNS), orient="row")


def difference() -> pl.DataFrame:
    arm = "static MLP (late fusion)"
    rows = [(arm, "mortality", "auroc", 0.021, 0.004, 0.037), (arm, "mortality", "auprc", -0.012, -0.05, 0.03),
            (arm, "length_of_stay", "mse", -310.0, -620.0, 12.0), (arm, "length_of_stay", "mae", -1.7, None, None),
            ("trees", "mortality", "auroc", -0.01, -0.02, 0.01)]  # fmt: skip
    return pl.DataFrame(rows, schema=["against", "target", "metric", "value", "low", "high"], orient="row")


def retrieval(rng: np.random.Generator) -> pl.DataFrame:
    pairs = [(q, g) for q in MODALITIES[:3] for g in MODALITIES[:3] if q != g]
    rows = [(q, g, k, k / 380 * (1 + 4 * rng.random()), k / 380, 380) for q, g in pairs for k in (1, 5, 10)]
    return pl.DataFrame(rows, schema=["query", "gallery", "k", "recall", "random", "stays"], orient="row")


def training() -> pl.DataFrame:
    rows = [("pretraining", e, 4.8 * 0.93**e + 1.6, 4.8 * 0.94**e + 2.0 + 0.002 * e**2) for e in range(1, 26)]
    rows += [("finetuning", e, 0.7 * 0.9**e + 0.25, 0.7 * 0.92**e + 0.33) for e in range(1, 13)]
    return pl.DataFrame(rows, schema=["stage", "epoch", "train_loss", "tuning_loss"], orient="row")


def example_report(stays: list[StayPage] | None = None, **changes: object) -> Report:
    """A whole report; ``changes`` replace its fields."""
    rng = np.random.default_rng(7)
    combinations = ["demographics + vitals + labs", "demographics + vitals + labs + chest_xray",
                    "demographics + vitals + labs + radiology_notes + chest_xray", "demographics + vitals",
                    "demographics + labs", "demographics"]  # fmt: skip
    fields: dict[str, object] = {
        "title": "Synthetic ICU: mortality and length of stay",
        "subtitle": "What a small causal model believes after every event, and why",
        "targets": TARGETS,
        "facts": [("Backbone", "SmolLM2-135M, LoRA rank 16"), ("Encoders", "aligned by pretraining"),
                  ("Cohort", "synthetic, MIMIC-IV layout"), ("Stays", "2,850 train, 610 tuning, 612 held out"),
                  ("Seed", "0")],
        "details": [("Versions", "torch 2.13.0, transformers 5.23.0"), ("Hardware", "2 CPU cores")],
        "warnings": ["Discharge summaries were kept: they are written after the outcome is known.",
                     "Only 84 held-out stays had the outcome: intervals are wide."],
        "metrics": metrics(rng),
        "calibration": calibration(rng),
        "presence": pl.DataFrame({"combination": combinations, "train": [1210, 760, 420, 260, 140, 60],
                                  "tuning": [255, 166, 92, 55, 29, 13], "held_out": [262, 160, 90, 57, 31, 12]}),
        "retrieval": retrieval(rng),
        "silhouette": {"overall": 0.031, "demographics": 0.118, "vitals": -0.012, "labs": 0.006},
        "training": training(),
        "stages": pl.DataFrame({"stage": ["prepare", "pretraining", "latents", "finetuning"],
                                "seconds": [12.4, 341.0, 58.2, 4210.0], "peak_memory_gb": [0.9, 1.7, 1.2, None]}),
        "accounting": pl.DataFrame({"table": ["icu/chartevents", "hosp/labevents", "note/radiology"],
                                    "read": [1203411, 210332, 4096], "kept": [1187002, 201118, 4010],
                                    "rejected": [16409, 9214, 86]}),
        "anchoring": anchoring(rng),
        "difference": difference(),
        "ablation": ablation(rng),
        "stays": [stay_page(1001, 28), stay_page(1002, 90, died=True)] if stays is None else stays,
    }  # fmt: skip
    fields["audit"] = audit(fields["anchoring"])
    return Report(**{**fields, **changes})  # type: ignore[arg-type]
