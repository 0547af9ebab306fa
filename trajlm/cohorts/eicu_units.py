"""Units as laboratories write them, and the factors between those that differ by a power of ten only."""

from __future__ import annotations

import html
import re

_PREFIX = {"": 1.0, "d": 1e-1, "m": 1e-3, "mc": 1e-6, "u": 1e-6, "n": 1e-9, "p": 1e-12, "f": 1e-15, "k": 1e3}
_BASE = {"g": "gram", "gm": "gram", "gram": "gram", "mol": "mole", "eq": "equivalent", "l": "litre", "ls": "litre",
         "units": "unit", "unit": "unit", "u": "unit", "iu": "unit"}  # fmt: skip
_TERM = re.compile(rf"^({'|'.join(sorted(filter(None, _PREFIX), key=len, reverse=True))})?"
                   rf"({'|'.join(sorted(_BASE, key=len, reverse=True))})$")  # fmt: skip


def plain_unit(unit: str) -> str:
    """A unit without its accidents: entities, case, blanks and the letter that stands for micro."""
    return re.sub(r"\s+", "", html.unescape(unit)).lower().replace("µ", "u").replace("μ", "u").replace("mc", "u")


def conversion_factor(unit: str, wanted: str) -> float | None:
    """The number that turns a value in ``unit`` into one in ``wanted``; None where the units alone do not tell it.

    Grams to moles depend on the substance, so they are not told; micrograms per millilitre to milligrams per litre are.
    """
    if plain_unit(unit) == plain_unit(wanted):
        return 1.0
    here, there = _ratio(unit), _ratio(wanted)
    if here is None or there is None or here[1:] != there[1:]:
        return None
    return float(f"{here[0] / there[0]:.12g}")  # powers of ten: without the noise of dividing them


def _ratio(unit: str) -> tuple[float, str, str] | None:
    """Size and the two base units of an amount per volume; None for any other unit."""
    terms = [_TERM.match(term) for term in plain_unit(unit).split("/")]
    if len(terms) != 2 or terms[0] is None or terms[1] is None:
        return None
    (over, amount), (under, volume) = ((term[1] or "", _BASE[term[2]]) for term in (terms[0], terms[1]))
    if volume != "litre":
        return None
    return _PREFIX[over] / _PREFIX[under], amount, volume
