"""What each part of alignment pretraining buys: arms that differ in one setting, over cohorts and seeds.

Every arm is the recipe's `pretrain` with one setting changed, small and short so that all of them fit into an hour. An
arm is measured on held-out stays: Recall@K over chance, silhouette, how far the global representation moves when a
modality is masked, and the AUROC of a logistic regression for in-hospital death on the frozen latents of whole stays,
also with each modality in turn removed (its missing token put in). The regression learns from the training stays, its
strength is chosen on the tuning stays. Results are kept in SCRATCH/results.jsonl: a repeated command goes on.

    python benchmarks/alignment.py --data NAME=PREPARED ... --scratch DIR
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from measuring import machine
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from trajlm.alignment import inject_missing_tokens
from trajlm.assemble import build_encoders, load_encoders
from trajlm.config import EncoderConfig, PretrainingConfig, Recipe
from trajlm.dataset import Prepared, load_prepared
from trajlm.pretraining import encode_stays, pretrain
from trajlm.schema import HELD_OUT, TRAIN, TUNING

# What differs from the reference; None is encoders that were never pretrained.
REFERENCE = "masked global alignment"
ARMS: dict[str, dict | None] = {
    REFERENCE: {},
    "token loss 0": {"missing_token_loss_weight": 0.0},
    "whole stays only": {"event_view_probability": 0.0},
    "a quarter windows, a quarter events": {"event_view_probability": 0.25, "window_view_probability": 0.25},
    "pairwise": {"objective": "pairwise"},
    "one versus others": {"objective": "one_versus_others", "modality_dropout": 0.0},
    "MuFuse": {"encoder": "mufuse"},
    "never pretrained": None,
}
# column -> (title, form, whether more is better; None: neither)
FIGURES = {
    "recall_1": ("R@1 over chance", ".1f", True),
    "recall_5": ("R@5", ".1f", True),
    "recall_10": ("R@10", ".1f", True),
    "silhouette": ("silhouette", ".3f", None),
    "movement": ("movement", ".3f", None),
    "auroc": ("AUROC", ".3f", True),
    "auroc_removed": ("AUROC, one removed", ".3f", True),
}
READING = "## Reading"


def recipe_of(arm: dict, prepared: Prepared, seed: int, epochs: int, out: Path) -> Recipe:
    """Small encoders, few epochs, and the arm's one difference."""
    changed = dict(arm)
    series = changed.pop("encoder", None)
    names = [m.name for m in prepared.modalities if m.kind == "numeric" and not m.static] if series else []
    return Recipe(
        data=str(prepared.folder),
        out=str(out),
        seed=seed,
        encoder=EncoderConfig(latent_width=32, hidden_width=32, by_modality=dict.fromkeys(names, series)),
        pretraining=PretrainingConfig(**{"epochs": epochs, "batch_size": 64, "learning_rate": 2e-3} | changed),
    )


def probe(prepared: Prepared, encoders) -> dict[str, float]:
    """AUROC for death of logistic regression on frozen latents, whole and with each modality removed (the mean)."""
    encoders.eval()
    tokens = encoders.missing_tokens.detach()
    sets = {}
    for split in (TRAIN, TUNING, HELD_OUT):
        stays = prepared.positions(split)
        died = prepared.stays["target_mortality"].to_numpy()[stays].astype(float)
        known = ~np.isnan(died)
        latents, present = encode_stays(prepared, encoders, stays[known])
        sets[split] = torch.from_numpy(latents), torch.from_numpy(present), died[known].astype(int)
    scale = StandardScaler().fit(sets[TRAIN][0].flatten(1).numpy())

    def fitted(strength: float) -> LogisticRegression:
        model = LogisticRegression(C=strength, max_iter=500)
        return model.fit(scale.transform(sets[TRAIN][0].flatten(1).numpy()), sets[TRAIN][2])

    def auroc(model: LogisticRegression, split: str, latents: torch.Tensor) -> float:
        return roc_auc_score(sets[split][2], model.decision_function(scale.transform(latents.flatten(1).numpy())))

    models = [fitted(strength) for strength in (0.001, 0.01, 0.1)]
    best = max(models, key=lambda model: auroc(model, TUNING, sets[TUNING][0]))
    latents, present, _ = sets[HELD_OUT]
    removed = []
    for column in range(present.shape[1]):
        left = present.clone()
        left[:, column] = False
        removed.append(auroc(best, HELD_OUT, inject_missing_tokens(latents, left, tokens)))
    return {"auroc": auroc(best, HELD_OUT, latents), "auroc_removed": statistics.mean(removed)}


def measure_arm(name: str, prepared: Prepared, seed: int, epochs: int, out: Path) -> dict[str, float]:
    """Pretrain one arm and measure it on the held-out stays."""
    shutil.rmtree(out, ignore_errors=True)
    arm = ARMS[name]
    started = time.process_time()
    if arm is None:
        torch.manual_seed(seed)
        encoders = build_encoders(prepared, recipe_of({}, prepared, seed, epochs, out).encoder)
        return probe(prepared, encoders) | {"seconds": 0.0}
    pretrain(recipe_of(arm, prepared, seed, epochs, out))
    spent = time.process_time() - started
    encoders, _ = load_encoders(out, prepared)
    found = json.loads((out / "metrics.json").read_text())["splits"][HELD_OUT]
    recall = {f"recall_{r['k']}": r["recall"] / r["random"] for r in found["recall_mean_over_pairs"]}
    movement = statistics.mean(found["movement_when_masked"].values())
    shutil.rmtree(out)
    return {
        **recall, "silhouette": found["silhouette"]["overall"], "movement": movement,
        **probe(prepared, encoders), "seconds": spent,
    }  # fmt: skip


def run_all(cohorts: dict[str, tuple[Path, int]], seeds: int, scratch: Path, arms: list[str]) -> list[dict]:
    """Every arm that is not in results.jsonl yet, seed after seed; all that is there."""
    scratch.mkdir(parents=True, exist_ok=True)
    kept = scratch / "results.jsonl"
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    opened = {name: load_prepared(path) for name, (path, _) in cohorts.items()}
    for seed in range(seeds):
        for cohort, (_, epochs) in cohorts.items():
            for arm in arms:
                key = {"cohort": cohort, "seed": seed, "arm": arm, "epochs": epochs}
                if any(key.items() <= r.items() for r in results):
                    continue
                with contextlib.redirect_stderr(io.StringIO()):
                    found = measure_arm(arm, opened[cohort], seed, epochs, scratch / "run")
                results.append(key | found)
                with kept.open("a") as stream:
                    stream.write(json.dumps(results[-1]) + "\n")
                print(json.dumps(results[-1]), flush=True)
    return [r for r in results if r["arm"] in arms and r["cohort"] in cohorts and r["seed"] < seeds]


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values) if len(values) > 1 else 0.0:{form}}"


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval (Student's t)."""
    mean = statistics.mean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def tables(results: list[dict], arms: list[str]) -> list[str]:
    """A table of means per cohort, and one of paired differences to the reference arm."""
    lines = []
    for cohort in dict.fromkeys(r["cohort"] for r in results):
        by_arm = {arm: {r["seed"]: r for r in results if (r["cohort"], r["arm"]) == (cohort, arm)} for arm in arms}
        first = next(iter(by_arm[REFERENCE].values()))
        spent = [r["seconds"] for arm in arms for r in by_arm[arm].values() if r["seconds"]]
        lines += [
            "", f"## {cohort}", "",
            f"{first['epochs']} epochs at the most, {len(by_arm[REFERENCE])} seeds, {statistics.mean(spent):.0f} s "
            "of a core per arm and seed. Mean ± standard deviation over seeds, held-out stays.", "",
            "| arm | " + " | ".join(title for title, _, _ in FIGURES.values()) + " |",
            "|---|" + "---:|" * len(FIGURES),
        ]  # fmt: skip
        for arm, by_seed in by_arm.items():
            cells = [spread([r[k] for r in by_seed.values() if k in r], form) for k, (_, form, _) in FIGURES.items()]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        lines += ["", *differences(by_arm)]
    return lines


def differences(by_arm: dict[str, dict[int, dict]]) -> list[str]:
    """Paired by seed; bold where the interval leaves zero out."""
    lines = [f"Difference to {REFERENCE}, paired by seed, with its 95 % interval; bold where it leaves zero out.", "",
             "| arm | " + " | ".join(title for title, _, _ in FIGURES.values()) + " |",
             "|---|" + "---:|" * len(FIGURES)]  # fmt: skip
    for arm, by_seed in by_arm.items():
        if arm == REFERENCE:
            continue
        cells = []
        for key, (_, form, _) in FIGURES.items():
            shared = [s for s in by_seed if s in by_arm[REFERENCE] and key in by_seed[s]]
            if len(shared) < 2:
                cells.append("")
                continue
            mean, low, high = interval([by_seed[s][key] - by_arm[REFERENCE][s][key] for s in shared])
            cell = f"{mean:+{form}} [{low:+{form}}, {high:+{form}}]"
            cells.append(f"**{cell}**" if low > 0 or high < 0 else cell)
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="NAME=PREPARED:EPOCHS", help="prepared folders and their epochs"
    )
    parser.add_argument("--scratch", type=Path, required=True, help="folder for runs and results.jsonl")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="arms to run (default all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    cohorts = {}
    for given in arguments.data:
        name, place = given.split("=", 1)
        folder, epochs = place.rsplit(":", 1)
        cohorts[name] = Path(folder), int(epochs)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="sklearn")
    results = run_all(cohorts, arguments.seeds, arguments.scratch, arguments.arms)
    head = [
        "# What each part of alignment pretraining buys",
        "",
        "`python benchmarks/alignment.py --data "
        + " ".join(f"'{n}=PREPARED:{epochs}'" for n, (_, epochs) in cohorts.items())
        + f" --seeds {arguments.seeds} --scratch DIR`, {machine()} "
        "(2 cores of an Intel Xeon at 2.5 GHz, no GPU). "
        "Latents and hidden layers of 32, batch 64, learning rate 0.002, otherwise as `trajlm/config.py` has it; "
        "one split of each cohort, "
        "seeds of initialisation, order and dropout.",
    ]
    kept = arguments.out.read_text().partition(READING)[1:] if arguments.out.exists() else ("", "")
    arguments.out.write_text("\n".join([*head, *tables(results, arguments.arms), "", "".join(kept)]).rstrip() + "\n")
    sys.stdout.write(arguments.out.read_text())


if __name__ == "__main__":
    main()
