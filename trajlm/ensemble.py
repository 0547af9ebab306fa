"""Models averaged where all state a belief: the sequence model and a baseline of its run, or one arm of several seeds.

They read the same records in different ways and err on different stays, so their mean is better than each; nothing is
fitted, so nothing can leak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from trajlm.errors import TrajlmError
from trajlm.metrics import Kind
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
    means = [_mean(task.kind, [pl.col(name), pl.col(f"{name}_sequence")]).alias(name)
             for task, name in zip(tasks, names, strict=True)]  # fmt: skip
    return both.with_columns(means).sort("_row").select(baseline.columns).cast(baseline.schema)


def mean_beliefs(beliefs: Sequence[pl.DataFrame], kinds: Mapping[str, Kind]) -> pl.DataFrame:
    """Mean belief of several models, as :func:`ensemble_beliefs` takes it; a lone model's as they are.

    Args:
        beliefs: of each model, the same stays after the same events, or at the same landmarks.
        kinds: of every target.

    Raises:
        TrajlmError: they were stated in other stays or at other moments.
    """
    first = beliefs[0]
    if len(beliefs) == 1:
        return first
    by = ["stay_id", "landmark" if "landmark" in first.columns else "event_index"]
    both = first.sort(by, nulls_last=True)
    keys = both.select(by)
    for i, other in enumerate(beliefs[1:], 1):
        own = other.sort(by, nulls_last=True)
        if not own.select(by).equals(keys):
            raise TrajlmError("models that believe in other stays or at other moments cannot be averaged")
        both = both.hstack([own[f"belief_{name}"].alias(f"belief_{name}_{i}") for name in kinds])
    means = [
        _mean(kind, [pl.col(f"belief_{name}{f'_{i}' if i else ''}") for i in range(len(beliefs))])
        .alias(f"belief_{name}") for name, kind in kinds.items()
    ]  # fmt: skip
    return both.with_columns(means).select(first.columns).cast(first.schema)


def _mean(kind: Kind, beliefs: Sequence[pl.Expr]) -> pl.Expr:
    if kind == "hours":
        return pl.mean_horizontal([belief.log1p() for belief in beliefs], ignore_nulls=False).exp() - 1
    return 1 / (1 + (-pl.mean_horizontal([_log_odds(b) for b in beliefs], ignore_nulls=False)).exp())


def _log_odds(probability: pl.Expr) -> pl.Expr:
    bounded = probability.clip(LEAST_ODDS, 1 - LEAST_ODDS)
    return (bounded / (1 - bounded)).log()
