"""A cohort read as `trajlm prepare` reads it, with everything it spooled and rejected in hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import polars as pl

from trajlm.cohorts.ledger import RowLedger
from trajlm.config import PrepareConfig
from trajlm.schema import RawTimelines
from trajlm.spool import Spool


@dataclass(frozen=True)
class Read:
    """What a reader delivered: ``raw`` and the spooled rows, and per table what became of its rows."""

    raw: RawTimelines
    measurements: pl.DataFrame
    documents: pl.DataFrame
    images: pl.DataFrame
    account: dict[str, dict]
    folder: Path

    @property
    def stays(self) -> pl.DataFrame:
        return self.raw.stays

    def rejected(self, table: str) -> pl.DataFrame:
        """The stored rows that were rejected; no rows and no columns if none was."""
        path = self.folder / "rejected" / f"{table.replace('/', '-')}.parquet"
        return pl.read_parquet(path) if path.is_file() else pl.DataFrame()


def read_cohort(module: ModuleType, raw: Path, settings: PrepareConfig, folder: Path) -> Read:
    """Read a release; ``folder`` takes the spool and the rejected rows."""
    ledger, spool = RowLedger(folder / "rejected", settings.rejected_rows), Spool(folder / "spool")
    timelines = module.read(Path(raw), settings, ledger, spool)
    account = ledger.close()
    return Read(
        timelines,
        spool.collect("measurements"),
        spool.collect("documents"),
        spool.collect("images"),
        account,
        folder,
    )
