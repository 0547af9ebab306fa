"""Two arms as one: the sequence model and a baseline of the same run, averaged where both state a belief.

They read the same records in different ways and err on different stays, so their mean is better than either; nothing is
fitted, so nothing can leak.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from trajlm.errors import TrajlmError
from trajlm.tasks import Task

LEAST_ODDS = 1e-6  # a probability of 0 or 1 would decide the mean alone


def ensemble_beliefs(sequence: pl.DataFrame, baseline: pl.DataFrame, tasks: Sequence[Task]) -> pl.DataFrame:
    """Mean belief of both arms: of probabilities the mean of log-odds, of hours the mean of log(1 + hours).

    Args:
        sequence: the sequence model's beliefs, one row per event.
        baseline: a baseline's, one row per stay and landmark (or per stay), of stays that ``sequence`` holds too.
        tasks: what was predicted.

    Returns:
        ``baseline`` with the mean beliefs; the sequence model's part is what it believed after the last event that the
        baseline has seen, or before it where it did not read that one.

    Raises:
        TrajlmError: the sequence model states no belief for a stay by then.
    """
    names = [f"belief_{task.target}" for task in tasks]
    by = ["stay_id", "split"]
    read = sequence.select(*by, "event_index", pl.col(names).name.suffix("_sequence")).sort("event_index")
    numbered = baseline.with_row_index("_row").with_columns(pl.col("event_index").cast(read["event_index"].dtype))
    both = numbered.sort("event_index").join_asof(
        read, on="event_index", by=by, strategy="backward", check_sortedness=False
    )
    unmatched = both.filter(pl.col(f"{names[0]}_sequence").is_null())
    if unmatched.height:
        raise TrajlmError(f"stay {unmatched['stay_id'][0]}: the sequence model states no belief beside the baseline's")
    means = [_mean(task).alias(name) for task, name in zip(tasks, names, strict=True)]
    return both.with_columns(means).sort("_row").select(baseline.columns).cast(baseline.schema)


def _mean(task: Task) -> pl.Expr:
    first, second = pl.col(f"belief_{task.target}"), pl.col(f"belief_{task.target}_sequence")
    if task.kind == "hours":
        return ((first.log1p() + second.log1p()) / 2).exp() - 1
    return 1 / (1 + (-(_log_odds(first) + _log_odds(second)) / 2).exp())


def _log_odds(probability: pl.Expr) -> pl.Expr:
    bounded = probability.clip(LEAST_ODDS, 1 - LEAST_ODDS)
    return (bounded / (1 - bounded)).log()
