"""How rows lie in an eICU table: those of a stay together, in no order, under numbers that say nothing."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.random import Generator


def shuffled(frame: pl.DataFrame, stay: str, rng: Generator) -> pl.DataFrame:
    """The rows of each stay (column ``stay``) together, in the order in which stays first appear, shuffled within."""
    places = frame.select(pl.col(stay).unique(maintain_order=True)).with_row_index("place")
    place = frame.select(stay).join(places, on=stay, how="left", maintain_order="left")["place"].to_numpy()
    return frame[np.lexsort([rng.random(frame.height), place])]


def twice(frame: pl.DataFrame, share: float, rng: Generator) -> pl.DataFrame:
    """The rows, and at their end a share of them once more."""
    return pl.concat([frame, frame.filter(pl.Series(rng.random(frame.height) < share))])


def numbered(frame: pl.DataFrame, key: str, first: int, rng: Generator) -> pl.DataFrame:
    """With a unique number from ``first`` upwards in front, at random."""
    return frame.select(pl.Series(key, first + rng.permutation(frame.height)), pl.all())
