"""The mapping of a MEDS dataset: which codes make stays, modalities and targets; one YAML file, checked strictly."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from trajlm.errors import TrajlmError
from trajlm.schema import LENGTH_OF_STAY, MORTALITY, PHENOTYPE_PREFIX

Role = Literal["start", "end", "death", "birth"]
T = TypeVar("T")

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TARGET = "target_"
_TARGETS = {"mortality": MORTALITY, "length_of_stay": LENGTH_OF_STAY}
_MOST_DAYS = 100_000  # longer than anybody lives
_STANDARD = ("subject_id", "time", "code", "numeric_value", "text_value")
PHENOTYPE = PHENOTYPE_PREFIX.removeprefix(_TARGET)


class Prefixes(Generic[T]):
    """Finds the longest of many prefixes that a code starts with, in as many steps as there are lengths."""

    def __init__(self, values: Mapping[str, T]) -> None:
        self._values = dict(values)
        self._lengths = sorted({len(prefix) for prefix in values}, reverse=True)

    def find(self, code: str) -> tuple[str, T] | None:
        """The longest prefix of ``code`` and its value; None where no prefix fits."""
        for length in self._lengths:
            prefix = code[:length]
            if len(prefix) == length and prefix in self._values:
                return prefix, self._values[prefix]
        return None


@dataclass(frozen=True)
class ModalityMapping:
    """What goes to one modality.

    Args:
        codes: prefixes of its codes; the longest prefix over all modalities wins.
        kind: numeric (values, or the mere presence of a code that has none) or text (``text_value``).
        static: known at admission: undated rows, and of each prefix the rows of its latest time up to the stay's start.
        least_share: leave a code out unless at least this share of the training split's stays hold it.
        aggregate: what stands where one event holds several values of a code: the last, or for amounts their sum.
        strip_prefix: name features by what follows the prefix rather than by the whole code.
        title: how a report writes the modality.
    """

    codes: list[str]
    kind: Literal["numeric", "text"] = "numeric"
    static: bool = False
    least_share: float = 0.0
    aggregate: Literal["last", "sum"] = "last"
    strip_prefix: bool = False
    title: str = ""


@dataclass(frozen=True)
class MedsMapping:
    """How a MEDS dataset is read. Every code is meant as a prefix: ``ICU_ADMISSION`` takes ``ICU_ADMISSION//MICU``.

    A code that starts or ends a stay, ends a life or dates a birth is never an event, whatever the modalities say.

    Args:
        starts: codes that start a stay.
        modalities: by name, in the order that breaks ties between events of the same time.
        stay: codes makes a stay of every start; subject makes one stay of a subject's record from its first start on.
        ends: codes that end a stay; only with ``stay: subject`` may there be none, and the stay ends with the record.
        deaths: codes that end a life.
        births: codes that date the birth, for ``age``.
        age: numeric modality that gets the age in years at the stay's start; null leaves it out.
        left_out: prefixes that are not wanted although a shorter one goes to a modality.
        targets: mortality, length_of_stay (in hours), phenotype_<name> or any other name to label files, relative to
            the dataset; may hold wildcards.
        prediction_time: whether a label's prediction time closes the timeline of its stay, or is ignored (a leak).
        splits: dataset takes the dataset's own subject splits; own splits patients anew.
        open_stay_days: of a stay that neither an end nor a next start closes, a death within so many days of its start
            is in it; of a later one that is unknown.
        patient_column: column of the data that names the patient, where a subject is less than a patient.
    """

    starts: list[str]
    modalities: dict[str, ModalityMapping]
    stay: Literal["codes", "subject"] = "codes"
    ends: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=lambda: ["MEDS_DEATH"])
    births: list[str] = field(default_factory=lambda: ["MEDS_BIRTH"])
    age: str | None = None
    left_out: list[str] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)
    prediction_time: Literal["closes", "ignored"] = "closes"
    splits: Literal["own", "dataset"] = "own"
    open_stay_days: float = 30.0
    patient_column: str | None = None

    @cached_property
    def roles(self) -> Prefixes[Role]:
        """What a code does to stays and lives."""
        return Prefixes({prefix: role for role, prefixes in self.role_codes.items() for prefix in prefixes})

    @property
    def role_codes(self) -> dict[Role, list[str]]:
        """Prefixes by role; births only where an age is wanted."""
        births = [] if self.age is None else self.births
        return {"start": self.starts, "end": self.ends, "death": self.deaths, "birth": births}

    @cached_property
    def modality_codes(self) -> Prefixes[str | None]:
        """The modality of a code; None where the mapping leaves it out."""
        wanted = {prefix: name for name, modality in self.modalities.items() for prefix in modality.codes}
        return Prefixes({**wanted, **dict.fromkeys(self.left_out)})

    def target_columns(self) -> dict[str, str]:
        """Column of the stays to its label files."""
        return {_TARGETS.get(name, f"{_TARGET}{name}"): files for name, files in self.targets.items()}


def load_mapping(file: Path) -> MedsMapping:
    """Read and check a mapping.

    Raises:
        TrajlmError: no such file, not YAML, a key that is unknown (the nearest is named) or there twice, a value of
            another type, or settings that contradict each other.
    """
    try:
        values = yaml.load(file.read_text(encoding="utf-8-sig"), _UniqueKeys)
    except OSError as error:
        raise TrajlmError(f"{file}: expected the mapping of a MEDS dataset, came {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrajlmError(f"{file}: expected YAML, came {' '.join(str(error).split())}") from None
    mapping: MedsMapping = _build(MedsMapping, values, "", file)
    fault = next(_faults(mapping), None)
    if fault:
        raise TrajlmError(f"{file}: {fault}")
    return mapping


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings hold each key once; plain YAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        counts = Counter(str(key.value) for key, _ in node.value)
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _build(config: type, values: Any, where: str, file: Path) -> Any:
    """A dataclass of plain values, every key and type checked. ``where`` is the dotted key of the section."""
    if not isinstance(values, dict):
        raise TrajlmError(f"{file}: expected keys and values{f' under {where}' if where else ''}, came {values!r}")
    fields = {one.name: one for one in dataclasses.fields(config)}
    hints = get_type_hints(config)
    for key in values:
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)[0]
            raise TrajlmError(f"{file}: {where}{key} is not a key of a mapping; the nearest is {where}{nearest}")
    for name, one in fields.items():
        needed = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise TrajlmError(f"{file}: {where}{name} is missing")
    return config(**{key: _value(hints[key], value, f"{where}{key}", file) for key, value in values.items()})


def _value(kind: Any, value: Any, where: str, file: Path) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{where}.", file)  # type: ignore[arg-type]
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _value(arguments[1], item, f"{where}.{key}", file) for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{where}[{i}]", file) for i, item in enumerate(value)]
    if origin in (Union, types.UnionType):
        return None if value is None else _value(arguments[0], value, where, file)
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise TrajlmError(f"{file}: {where}: expected {_wanted(kind)}, came {value!r}")


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    names = {dict: "keys and values", list: "a list", float: "a number", bool: "true or false", str: "a text"}
    return names.get(get_origin(kind) or kind, str(kind))


def _faults(mapping: MedsMapping) -> Iterator[str]:
    """What contradicts itself, in words."""
    if not mapping.starts:
        yield "starts names no code"
    if mapping.stay == "codes" and not mapping.ends:
        yield "ends names no code, and with stay: codes nothing else would end a stay"
    if not mapping.modalities:
        yield "modalities is empty"
    for name, modality in mapping.modalities.items():
        if not _NAME.fullmatch(name):
            yield f"modalities.{name}: expected a name of lower-case letters, digits and _, came {name!r}"
        if not modality.codes:
            yield f"modalities.{name}.codes names no code"
        if not 0 <= modality.least_share <= 1:
            yield f"modalities.{name}.least_share: expected a share in [0, 1], came {modality.least_share:g}"
    if mapping.age is not None and (mapping.age not in mapping.modalities or not mapping.births):
        yield f"age: expected the name of a modality, and births, came {mapping.age!r} and {mapping.births}"
    elif mapping.age is not None and mapping.modalities[mapping.age].kind != "numeric":
        yield f"age: expected a numeric modality, came {mapping.age!r}"
    if not 0 <= mapping.open_stay_days <= _MOST_DAYS:
        yield f"open_stay_days: expected days from 0 to {_MOST_DAYS:,}, came {mapping.open_stay_days:g}"
    if mapping.patient_column in _STANDARD:
        yield f"patient_column: expected a column beside the standard's, came {mapping.patient_column!r}"
    yield from _repeated_prefixes(mapping)
    for name in mapping.targets:
        if not _NAME.fullmatch(name) or name == PHENOTYPE:
            yield f"targets.{name}: expected a name of lower-case letters, digits and _, came {name!r}"
        meant = [] if name in _TARGETS else difflib.get_close_matches(name, _TARGETS, n=1, cutoff=0.9)
        if meant:
            yield f"targets.{name} is nearly the target {meant[0]}; write targets.{meant[0]}, or name it otherwise"


def _repeated_prefixes(mapping: MedsMapping) -> Iterator[str]:
    places = [(p, f"modalities.{name}") for name, modality in mapping.modalities.items() for p in modality.codes]
    places += [(prefix, "left_out") for prefix in mapping.left_out]
    roles = {"start": "starts", "end": "ends", "death": "deaths", "birth": "births"}
    places += [(prefix, roles[role]) for role, prefixes in mapping.role_codes.items() for prefix in prefixes]
    first: dict[str, str] = {}
    for prefix, place in places:
        if prefix in first:
            yield f"the code {prefix!r} is in {first[prefix]} and in {place}"
        if not prefix and not place.startswith("modalities"):
            yield f"{place} holds an empty code, which every code starts with"
        first[prefix] = place
