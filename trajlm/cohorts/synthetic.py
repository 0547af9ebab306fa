"""A seeded intensive care unit, written as a MIMIC-IV release (tables, notes and X-rays) or an eICU one (tables).

No row describes a real person. What is planted is known (``truth/``), so that a pipeline can be checked end to end:
severity rises or falls, every modality shows it through an error of its own, and only the order of events tells those
who recover from those who die.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.random import Generator
from tqdm import tqdm

from trajlm.cohorts import synthetic_eicu
from trajlm.cohorts import synthetic_tables as tables
from trajlm.cohorts.synthetic_course import UNIT_IMAGING, Course, courses, logistic, stream
from trajlm.cohorts.synthetic_images import PIXELS, chest_xray
from trajlm.cohorts.synthetic_measurements import Triplets, chart, labs, outputs
from trajlm.cohorts.synthetic_notes import chest_report, discharge_summary, other_report
from trajlm.errors import TrajlmError

RECORD = "SYNTHETIC.json"
GENERATOR_VERSION = 2  # raise whenever the same stays and seed would give other files
MIMIC_IV, EICU = "mimic-iv", "eicu"
_VERSIONS = {MIMIC_IV: GENERATOR_VERSION, EICU: synthetic_eicu.GENERATOR_VERSION}

_NOTE_COLUMNS = ("note_id", "subject_id", "hadm_id", "note_type", "note_seq", "charttime", "storetime", "text")
_IMAGE_COLUMNS = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip
_VIEW_MEANING = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}


def synthesize(out: Path, stays: int, seed: int, layout: str = MIMIC_IV) -> None:
    """Write a synthetic release of exactly ``stays`` unit stays; the same stays, seed and layout give the same bytes.

    ``mimic-iv``: layout of MIMIC-IV (``hosp/``, ``icu/``), MIMIC-IV-Note (``note/``) and MIMIC-CXR-JPG (``cxr/``), all
    below ``out``. ``eicu``: the tables of :mod:`trajlm.cohorts.synthetic_eicu`, side by side in ``out``.
    Beside them ``truth/severity.csv.gz`` (stay_id, hour since admission to the unit, severity), ``truth/stays.csv.gz``
    (stay_id, p_death, demographic_logit), and ``SYNTHETIC.json``, written last; it names the layout where that is not
    MIMIC-IV's. Severity is in standard deviations of an average stay; about 18 % die. Both layouts tell the same
    courses of the same seed.

    Written to a hidden sibling of ``out`` and renamed when complete. If ``out`` already is this very release, nothing
    is done.

    Raises:
        TrajlmError: stays, seed or layout make no sense, or ``out`` holds something else or a damaged release.
    """
    if stays < 1 or seed < 0:
        raise TrajlmError(f"synthesize: expected at least 1 stay and a seed of 0 or more, came {stays} and {seed}")
    if layout not in _VERSIONS:
        raise TrajlmError(f"synthesize: expected a layout of {', '.join(_VERSIONS)}, came {layout!r}")
    out = Path(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise TrajlmError(f"{out}: expected a folder to write, came a file or link")
    if out.exists() and any(out.iterdir()):
        _require_same(out, layout, stays, seed)
        return
    partial = out.absolute().parent / f".{out.absolute().name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    _write_release(partial, layout, stays, seed)
    record = {"what": "synthetic ICU of trajlm; no row describes a real person", "version": _VERSIONS[layout]}
    record |= {} if layout == MIMIC_IV else {"layout": layout}
    record |= {"stays": stays, "seed": seed, "files": _digests(partial, layout)}
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if out.exists():
        out.rmdir()
    partial.rename(out)


def _require_same(out: Path, layout: str, stays: int, seed: int) -> None:
    """Raise unless ``out`` is exactly the release of this layout, these stays and this seed, undamaged."""
    record_file = out / RECORD
    if not record_file.is_file():
        raise TrajlmError(f"{out}: expected no folder or an empty one, came other files; choose another --out")
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        came = (record.get("layout", MIMIC_IV), record["version"], record["stays"], record["seed"])
        files = record["files"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrajlmError(f"{record_file}: expected the record of a synthetic release, came {error!r}") from error
    expected = (layout, _VERSIONS[layout], stays, seed)
    if came != expected:
        raise TrajlmError(
            f"{out}: expected layout, version, stays and seed {expected}, came {came}; "
            "choose another --out or remove the folder"
        )
    if _digests(out, layout) != files:
        raise TrajlmError(f"{out}: expected the files that {RECORD} lists, came changed ones; remove the folder")


def _digests(folder: Path, layout: str) -> dict[str, str]:
    """sha256 of every table, and one over the names and bytes of all X-rays where the layout has any."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name != RECORD}
    digests, pictures = {}, hashlib.sha256()
    for name in sorted(found):
        content = found[name].read_bytes()
        if name.endswith(".jpg"):
            pictures.update(name.encode() + hashlib.sha256(content).digest())
        else:
            digests[name] = hashlib.sha256(content).hexdigest()
    return digests | ({"cxr/files": pictures.hexdigest()} if layout == MIMIC_IV else {})


def _write_release(folder: Path, layout: str, stays: int, seed: int) -> None:
    cohort = list(courses(stays, seed))
    if layout == EICU:
        found, p_death = synthetic_eicu.release(cohort, seed)
    else:
        found, p_death = _mimic_tables(folder, cohort, seed), [c.p_death for c in cohort]
    for name, frame in (found | _truth(cohort, p_death)).items():
        _write_table(frame, folder / f"{name}.csv.gz")


def _truth(cohort: Sequence[Course], p_death: Sequence[float]) -> dict[str, pl.DataFrame]:
    """What is planted: severity by the hour, and the probability of death behind the outcome of each stay."""
    hours = pl.DataFrame({
        "stay_id": np.repeat([c.stay_id for c in cohort], [len(c.severity) for c in cohort]),
        "hour": np.concatenate([np.arange(len(c.severity)) for c in cohort]),
        "severity": np.concatenate([c.severity for c in cohort]).round(4),
    })  # fmt: skip
    truth = pl.DataFrame({
        "stay_id": [c.stay_id for c in cohort],
        "p_death": [round(p, 6) for p in p_death],
        "demographic_logit": [round(c.demographic_logit, 6) for c in cohort],
    })  # fmt: skip
    return {"truth/severity": hours, "truth/stays": truth}


def _mimic_tables(folder: Path, cohort: Sequence[Course], seed: int) -> dict[str, pl.DataFrame]:
    """The tables by name; X-rays are written below ``folder`` on the way."""
    charted, drained, sampled = [], [], []
    imaging = _Imaging(folder, seed)
    for course in tqdm(cohort, desc="synthesize", unit="stay"):
        silent = course.demographics_only
        charted.append(Triplets() if silent else chart(course, stream(seed, 20, course.index)))
        drained.append(Triplets() if silent else outputs(course, stream(seed, 21, course.index)))
        sampled.append(Triplets() if silent else labs(course, stream(seed, 22, course.index)))
        if not silent:
            imaging.examine(course)
    return {
        "hosp/patients": tables.patients_table(cohort, seed),
        "hosp/admissions": tables.admissions_table(cohort, seed),
        "hosp/diagnoses_icd": tables.diagnoses_table(cohort, seed),
        "hosp/d_labitems": tables.lab_items_table(),
        "hosp/labevents": tables.labs_table(cohort, sampled, stream(seed, 30)),
        "icu/icustays": tables.icustays_table(cohort),
        "icu/d_items": tables.items_table(),
        "icu/chartevents": tables.chart_table(cohort, charted, stream(seed, 31)),
        "icu/outputevents": tables.outputs_table(cohort, drained, stream(seed, 32)),
        "note/radiology": pl.DataFrame(
            imaging.reports, schema=list(_NOTE_COLUMNS), orient="row", infer_schema_length=None
        ),
        "note/discharge": pl.DataFrame(
            imaging.summaries, schema=list(_NOTE_COLUMNS), orient="row", infer_schema_length=None
        ),
        "cxr/mimic-cxr-2.0.0-metadata": pl.DataFrame(
            imaging.pictures, schema=list(_IMAGE_COLUMNS), orient="row", infer_schema_length=None
        ),
    }


def _write_table(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    plain = io.BytesIO()
    frame.write_csv(plain, datetime_format="%Y-%m-%d %H:%M:%S")
    # A fixed time in the header: the same rows give the same bytes.
    path.write_bytes(gzip.compress(plain.getbuffer(), compresslevel=5, mtime=0))


class _Imaging:
    """Orders studies, paints their pictures, writes their reports and the summary of each stay."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.reports: list[tuple] = []
        self.summaries: list[tuple] = []
        self.pictures: list[tuple] = []
        self._folder, self._seed = folder, seed
        self._numbers: Counter[tuple[int, str]] = Counter()
        self._study_ids = 50_000_000 + stream(seed, 40).integers(0, 1_000_000)

    def examine(self, course: Course) -> None:
        """All studies, reports and the summary of one stay."""
        rng = stream(self._seed, 23, course.index)
        severity, unit = float(course.severity[:25].mean()), UNIT_IMAGING[course.unit]
        reported = rng.random() < logistic(1.45 + 0.5 * unit + 0.8 * severity)
        pictured = rng.random() < logistic(-0.1 + unit + 0.8 * severity)
        written: list[tuple[float, str]] = []
        previous = None
        if course.edregtime is not None and rng.random() < 0.3:
            before = float((course.edregtime - course.intime) / np.timedelta64(1, "h")) + 0.8
            shown = float(course.shown(np.zeros(1), "wording")[0])
            written.append((before, chest_report(course, rng, shown, None, "PA")))
        for hour in _study_hours(course, rng):
            portable = course.ventilated or rng.random() < 0.75
            shown = float(course.shown(np.array([hour]), "wording")[0])
            written.append((hour, chest_report(course, rng, shown, previous, "AP" if portable else "PA")))
            previous = shown
            if pictured:
                self._picture(course, rng, hour, ("AP",) if portable else ("PA", "LATERAL"))
        if rng.random() < 0.35:
            written.append((float(rng.uniform(0.3, course.hours_in_unit)), other_report(course, rng)))
        for hour, text in sorted(written) if reported else ():
            charted = tables.minutes_of(course, np.array([hour]))[0]
            stored = charted + np.timedelta64(int(rng.integers(20, 400)), "m")
            self.reports.append(self._note(course, "RR", charted, stored, text))
        if rng.random() < 0.92:
            day = course.dischtime.astype("datetime64[D]").astype("datetime64[s]")
            stored = day + np.timedelta64(int(rng.integers(20, 96)), "h")
            self.summaries.append(self._note(course, "DS", day, stored, discharge_summary(course, rng)))

    def _note(self, course: Course, kind: str, charted: np.datetime64, stored: np.datetime64, text: str) -> tuple:
        subject = course.patient.subject_id
        self._numbers[subject, kind] += 1
        number = self._numbers[subject, kind]
        hadm_id = course.hadm_id if kind == "DS" or charted >= course.admittime else None
        times = (str(charted).replace("T", " "), str(stored).replace("T", " "))
        return (f"{subject}-{kind}-{number}", subject, hadm_id, kind, number, *times, text)

    def _picture(self, course: Course, rng: Generator, hour: float, views: tuple[str, ...]) -> None:
        self._study_ids += int(rng.integers(1, 5000))
        study, subject = int(self._study_ids), course.patient.subject_id
        when = course.intime + np.timedelta64(round(hour * 3600), "s")
        clock = str(when)[11:].replace(":", "").lstrip("0") or "0"
        described = "CHEST (PORTABLE AP)" if views == ("AP",) else "CHEST (PA AND LAT)"
        shelf = self._folder / "cxr" / "files" / f"p{subject // 1_000_000}" / f"p{subject}" / f"s{study}"
        shelf.mkdir(parents=True)
        for view in views:
            digits = rng.bytes(20).hex()
            name = "-".join(digits[start : start + 8] for start in range(0, 40, 8))
            picture = chest_xray(
                rng,
                float(course.shown(np.array([hour]), "image")[0]),
                illness=course.illness,
                side=course.side,
                view=view,
                ventilated=course.ventilated,
                lines=course.ventilated or course.severity_at(np.array([hour]))[0] > 0.8,
            )
            (shelf / f"{name}.jpg").write_bytes(picture)
            self.pictures.append((
                name, subject, study, described, view, PIXELS, PIXELS, str(when)[:10].replace("-", ""),
                f"{clock}.{rng.integers(1000):03d}", described, _VIEW_MEANING[view],
                "Recumbent" if view == "AP" else "Erect",
            ))  # fmt: skip


def _study_hours(course: Course, rng: Generator) -> list[float]:
    """When chest radiographs are ordered: sooner again for the sicker, seldom after 48 hours, eight at most."""
    hours: list[float] = []
    now = float(rng.uniform(0.4, 7))
    while now < course.hours_in_unit - 0.1 and len(hours) < 8:
        hours.append(now)
        severity = float(course.severity_at(np.array([now]))[0])
        now += float(np.clip(20 * np.exp(-0.5 * severity), 6, 60) * rng.uniform(0.7, 1.3) * (1 + max(now - 48, 0) / 24))
    return hours
