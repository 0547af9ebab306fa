"""`trajlm anchoring`: the audit's tables and one page that draws them, the paper's figures 4 and 5 among it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from trajlm.checkpoint import write_text
from trajlm.errors import TrajlmError
from trajlm.interpret.anchoring import AGAINST, RUN, AnchoringAudit, audit_anchoring
from trajlm.interpret.runs import open_run
from trajlm.report.anchoring_page import anchoring_page
from trajlm.report.build import target_infos


@dataclass
class AnchoringConfig:
    """The audit as a command.

    Args:
        run: run folder of finetune.py.
        out: folder for the tables and the page.
        against: a second run on the same records (contrastive against scratch).
        data: prepared folder, if it moved since.
        ablate: modalities to ablate; none is each in turn.
        target: whose drift ranks the stays; the first unless told.
        stays: held-out stays to ablate; 0 is all.
        shown: stays to draw of either ranking.
        resamples: of the patient-level bootstrap.
        layer: whose attention; None is the last that has any.
    """

    run: str
    out: str
    against: str | None = None
    data: str | None = None
    ablate: list[str] = field(default_factory=list)
    target: str | None = None
    stays: int = 0
    shown: int = 2
    resamples: int = 1000
    layer: int | None = None


def anchoring_command(config: AnchoringConfig) -> Path:
    """Write the tables (CSV; the long ones as Parquet too) and ``anchoring.html``; returns the page."""
    run = open_run(config.run, config.data)
    against = open_run(config.against, config.data) if config.against else None
    if against and against.prepared.folder.resolve() != run.prepared.folder.resolve():
        raise TrajlmError(f"{config.against} was made from {against.prepared.folder}, {config.run} from "
                          f"{run.prepared.folder}; compare runs on the same prepared folder")  # fmt: skip
    audit = audit_anchoring(
        run, against, config.ablate, config.target, config.stays, config.shown, config.resamples, config.layer
    )
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, table in audit.tables().items():
        table.write_csv(out / f"{name}.csv")
    audit.changes.write_parquet(out / "changes.parquet")
    names = {RUN: run.folder.name} | ({AGAINST: against.folder.name} if against else {})
    page = out / "anchoring.html"
    write_text(page, anchoring_page(audit, names, target_infos(run.metrics), config.layer))
    print(summary_lines(audit, names))
    print(f"anchoring: {page}")
    return page


def summary_lines(audit: AnchoringAudit, names: dict[str, str]) -> str:
    """The audit in words, one line per run and ablation, on the target that ranks."""
    lines = []
    of_target = audit.summary.filter(pl.col("target") == audit.target)
    for row in of_target.filter(pl.col("measure") == "absolute_drift").rows(named=True):
        own = of_target.filter(pl.col("run") == row["run"], pl.col("ablated") == row["ablated"])
        figures = {r["measure"]: r for r in own.iter_rows(named=True)}
        shares = [figures[m]["value"] for m in ("share_before", "share_after") if m in figures]
        told = f"attention on demographics {shares[0]:.1%} to {shares[1]:.1%}, " if len(shares) == 2 else ""
        flips = f", flips {figures['flips']['value']:.1%}" if "flips" in figures else ""
        low, high = (row[end] if row[end] is not None else float("nan") for end in ("low", "high"))
        lines.append(
            f"{names[row['run']]} without {row['ablated']} ({row['stays']} stays): {told}"
            f"|drift| {row['value']:.3f} [{low:.3f}, {high:.3f}]{flips}"
        )
    return "\n".join(lines)
