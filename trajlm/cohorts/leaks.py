"""Leaks that every cohort leaves open in the same way, in words."""

from __future__ import annotations

_END = (
    "a stay that ends within the window has no events after its end: how long its timeline runs tells when the patient "
    "died or left; landmarks compare only stays still in the unit then"
)
_WHOLE_STAY = (
    "whole stays are read, without a window: late beliefs know nearly everything up to death or discharge, and how "
    "long a timeline runs is the length of stay"
)


def length_leak(window_hours: float | None) -> str:
    """What the length of a timeline tells, in a window or over whole stays (None)."""
    return _WHOLE_STAY if window_hours is None else _END
