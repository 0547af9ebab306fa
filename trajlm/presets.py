"""Backbones as data: which weights a name means, and what transformers can do with each family (``presets.yaml``)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml

UNTESTED = "its exactness has not been tested for this family"


@dataclass(frozen=True)
class Family:
    """What is true of every model of one ``model_type``.

    Attributes:
        model_type: of the transformers config (the decoder's, where a model nests it).
        lora: linear layers that adapters go on (their last name); empty looks at the model.
        attention: implementations it supports, fastest first; empty has no attention.
        masks: how own 4-D attention masks are given: ``one``, one ``by_layer`` kind, or ``none`` that would be exact.
        inexact: why packing and hidden [PREDICT]s are refused; "" where both are exact.
        recurrent: reads one position at a time when it streams.
        tiny: config of a two-layer model.
    """

    model_type: str
    lora: tuple[str, ...] = ()
    attention: tuple[str, ...] = ("sdpa", "eager")
    masks: str = "none"
    inexact: str = UNTESTED
    recurrent: bool = True
    tiny: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """A backbone by name.

    Attributes:
        name: as recipes write it.
        hub: id of its weights; "" for weights that start at random.
        family: its :class:`Family`.
        licence: of the weights; "none" for random ones.
        unconfirmed: the licence was read of copies or in an announcement, not at the hub id.
        gated: the hub asks to accept the licence first.
        paper: one of the paper's six.
        billions: parameters as published, 1e9, language head included; None for random weights.
        shape: keyword arguments of the family's transformers config.
    """

    name: str
    hub: str
    family: Family
    licence: str
    unconfirmed: bool
    gated: bool
    paper: bool
    billions: float | None
    shape: dict[str, Any]

    @property
    def random(self) -> bool:
        """Whether its weights start at random."""
        return not self.hub


@functools.cache
def _table() -> dict[str, Any]:
    return yaml.safe_load((files("trajlm") / "presets.yaml").read_text(encoding="utf-8"))


@functools.cache
def families() -> dict[str, Family]:
    """Every family of the table by its model type."""
    return {
        name: Family(
            name,
            tuple(row["lora"]),
            tuple(row["attention"]),
            row["masks"],
            row.get("inexact", ""),
            row.get("recurrent", False),
            row["tiny"],
        )
        for name, row in _table()["families"].items()
    }


def family_of(model_type: str) -> Family:
    """The family of a model type; one that is not in the table is trusted with nothing that was not tested."""
    return families().get(model_type, Family(model_type))


@functools.cache
def presets() -> dict[str, Preset]:
    """Every preset by name: those of the table, and ``tiny-FAMILY`` with random weights for each family."""
    found = {
        name: Preset(
            name,
            "" if row.get("random") else row["hub"],
            families()[row["family"]],
            row["licence"],
            row.get("unconfirmed", False),
            row.get("gated", False),
            row.get("paper", False),
            row.get("billions"),
            row["shape"],
        )
        for name, row in _table()["presets"].items()
    }
    for family in families().values():
        name = f"tiny-{family.model_type.replace('_', '-')}"
        found[name] = Preset(name, "", family, "none", False, False, False, None, family.tiny)
    return found


def table() -> str:
    """Markdown table of the presets."""
    lines = [
        "| name | weights | family | parameters | LoRA on | attention | packing, hidden [PREDICT] | licence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for preset in presets().values():
        family = preset.family
        cells = [
            preset.name + (" (paper)" if preset.paper else ""),
            preset.hub or "random",
            family.model_type,
            f"{preset.billions:g}B" if preset.billions else "",
            " ".join(family.lora),
            " ".join(family.attention) or "none",
            "no" if family.inexact else "exact",
            preset.licence + (", unconfirmed" if preset.unconfirmed else "") + (", gated" if preset.gated else ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
