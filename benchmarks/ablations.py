"""What each part of the network gives: every variant of a grid against one of them, on the same held-out stays.

    python benchmarks/ablations.py GRID

Reads a finished grid of ``trajlm experiment`` with variants; trains nothing. Differences are paired, their intervals
are of patients resampled over all splits together (:mod:`trajlm.pooling`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from measuring import machine

from trajlm.metrics import LANDMARKS
from trajlm.pooled_arms import is_sequence_title
from trajlm.report.tables import interval
from trajlm.result_tables import at_landmark, difference, measure
from trajlm.results import read_found

FIGURES = {"probability": ("auroc", "auprc"), "hours": ("mae",), "group": ("macro_auroc",)}


def table(head: str, arms: list[str], cell: Callable[[str, float | None], str]) -> list[str]:
    """Markdown: a row per arm, a column per landmark."""
    heads = " | ".join(at_landmark(hours) for hours in LANDMARKS)
    lines = ["", f"| {head} | {heads} |", "|---|" + "---:|" * len(LANDMARKS)]
    return lines + [f"| {name(arm)} | {' | '.join(cell(arm, hours) for hours in LANDMARKS)} |" for arm in arms]


def name(arm: str) -> str:
    """An arm's variant: what stands behind the last hyphen of its title."""
    return arm.rpartition("-")[2].replace("_", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path, help="folder that `trajlm experiment` filled")
    parser.add_argument("--against", default="as_it_is", help="the variant that others are compared with")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    found = read_found(arguments.grid)
    pool = found.pool
    arms = [arm for arm in pool.arms if is_sequence_title(arm)]
    reference = next(arm for arm in arms if arm.endswith(f"-{arguments.against}"))
    others = [arm for arm in arms if arm != reference]
    lines = [
        "# What each part of the network gives",
        "",
        f"`python benchmarks/ablations.py runs/{found.name}`, {machine()}. Means over {len(pool.splits)} splits of "
        f"held-out stays, with 95 % intervals from resampling patients. The grid: `{found.record['command']}`.",
        "",
        "| Variant | Settings |",
        "|---|---|",
    ]
    for variant, settings in found.record["grid"]["variants"].items():
        told = ", ".join(f"`{key}: {value}`" for key, value in settings.items())
        lines.append(f"| {variant.replace('_', ' ')} | {told or 'those of the recipe, without regression and trees'} |")
    for target in pool.targets:
        for metric in FIGURES[target["kind"]]:
            said = measure(target, metric)

            def value(arm: str, hours: float | None, of: tuple[str, str] = (target["name"], metric)) -> str:
                return interval(*pool.spread(pool.by_split((arm, of[0], hours, of[1])))[:3])

            def moved(arm: str, hours: float | None, of: tuple[str, str] = (target["name"], metric)) -> str:
                found = pool.spread(pool.difference((arm, of[0], hours, of[1]), reference))
                return difference(dict(zip(("value", "low", "high"), found, strict=False)))

            lines += table(said, [reference, *others], value)
            lines += table(f"{said}: minus {name(reference)}", others, moved)
    print("\n".join(lines))
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
