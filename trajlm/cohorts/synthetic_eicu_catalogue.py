"""What the synthetic eICU can diagnose, do and prescribe: official strings and codes, and when each is written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from trajlm.cohorts.synthetic_course import Course, logistic

_INFECTED = ("pneumonia", "sepsis")
_BLEEDING = ("haemorrhage", "trauma")


@dataclass(frozen=True)
class Entry:
    """Something a clinician writes down while it applies.

    Attributes:
        text: as the release spells it; levels of a hierarchy are joined by "|".
        above, below: applies while the severity shown lies so; None does not ask.
        illnesses: only in these; empty: in any.
        chance: share of the stays in which it can apply.
        chronic: brought along: ``chance`` rises with age.
        ventilated: applies to ventilated stays only.
        code: the release's code; "" where it has none.
    """

    text: str
    above: float | None = None
    below: float | None = None
    illnesses: tuple[str, ...] = ()
    chance: float = 1.0
    chronic: bool = False
    ventilated: bool = False
    code: str = ""


DIAGNOSES = (
    Entry("pulmonary|pulmonary infections|pneumonia", illnesses=("pneumonia",), chance=0.95, code="486, J18.9"),
    Entry("pulmonary|pulmonary infections|pneumonia|community-acquired", illnesses=("pneumonia",), chance=0.3,
          code="486, J18.9"),
    Entry("cardiovascular|ventricular disorders|congestive heart failure", illnesses=("heart failure",), chance=0.9,
          code="428.0, I50.9"),
    Entry("cardiovascular|arrhythmias|atrial fibrillation|with rapid ventricular response", above=0.2,
          illnesses=("heart failure",), chance=0.4, code="427.31, I48.0"),
    Entry("cardiovascular|shock / hypotension|sepsis", illnesses=("sepsis",), chance=0.95, code="038.9, A41.9"),
    Entry("cardiovascular|shock / hypotension|sepsis|severe", above=0.6, illnesses=_INFECTED, chance=0.7,
          code="995.92, R65.2"),
    Entry("cardiovascular|shock / hypotension|septic shock", above=1.2, illnesses=_INFECTED, chance=0.8,
          code="785.52, R65.21"),
    Entry("gastrointestinal|GI bleeding / PUD|GI bleeding", illnesses=("haemorrhage",), chance=0.9,
          code="578.9, K92.2"),
    Entry("hematology|bleeding and red blood cell disorders|anemia|acute blood loss anemia", above=0.0,
          illnesses=_BLEEDING, chance=0.7, code="285.1, D62"),
    Entry("neurologic|disorders of vasculature|stroke", illnesses=("stroke",), chance=0.8, code="436, I67.8"),
    Entry("neurologic|disorders of vasculature|stroke|hemorrhagic stroke|subarachnoid hemorrhage|with hydrocephalus",
          above=0.8, illnesses=("stroke",), chance=0.15, code="430, 331.3, G91.0, I60.9"),
    Entry("burns/trauma|trauma - CNS|intracranial injury", illnesses=("trauma",), chance=0.5, code="854.00, S06.9"),
    Entry("burns/trauma|trauma - chest|rib fractures", illnesses=("trauma",), chance=0.5, code="807.00, S22.4"),
    Entry("pulmonary|respiratory failure|acute respiratory failure", above=0.4, chance=0.75, code="518.81, J96.00"),
    Entry("pulmonary|respiratory failure|hypoxemia", above=0.0, chance=0.35, code="799.02, J96.91"),
    Entry("cardiovascular|shock / hypotension|hypotension", above=0.6, chance=0.6, code="458.9, I95.9"),
    Entry("cardiovascular|shock / hypotension|hypotension / pressor dependent", above=1.4, chance=0.6),
    Entry("renal|disorder of kidney|acute renal failure", above=0.8, chance=0.65, code="584.9, N17.9"),
    Entry("renal|disorder of acid base|metabolic acidosis|lactic acidosis", above=1.1, chance=0.55,
          code="276.2, E87.2"),
    Entry("neurologic|altered mental status / pain|change in mental status", above=0.7, chance=0.5,
          code="780.09, R41.82"),
    Entry("hematology|platelet disorders|thrombocytopenia", above=1.2, chance=0.35, code="287.5, D69.6"),
    Entry("cardiovascular|cardiac arrest|cardiac arrest", above=2.4, chance=0.4, code="427.5, I46.9"),
    Entry("endocrine|glucose metabolism|hyperglycemia", above=0.2, chance=0.35, code="790.6, R73.9"),
    Entry("neurologic|altered mental status / pain|pain", below=-0.2, chance=0.4),
    Entry("endocrine|glucose metabolism|diabetes mellitus", chance=0.28, chronic=True),
    Entry("cardiovascular|vascular disorders|hypertension", chance=0.4, chronic=True, code="401.9, I10"),
    Entry("pulmonary|disorders of the airways|COPD", chance=0.18, chronic=True, code="491.20, J44.9"),
    Entry("renal|disorder of kidney|chronic renal insufficiency", chance=0.14, chronic=True, code="585.9, N18.9"),
    Entry("cardiovascular|chest pain / ASHD|coronary artery disease|known", chance=0.2, chronic=True,
          code="414.00, I25.10"),
    Entry("neurologic|misc|Parkinson's disease", chance=0.02, chronic=True, code="332.0, G20"),
    Entry("oncology|leukemia|acute|AML", chance=0.012, chronic=True, code="205.00, C92.00"),
)  # fmt: skip

TREATMENTS = (
    Entry("pulmonary|ventilation and oxygenation|mechanical ventilation", above=-1.0, ventilated=True),
    Entry("pulmonary|ventilation and oxygenation|ventilator weaning", below=-0.3, ventilated=True),
    Entry("pulmonary|ventilation and oxygenation|non-invasive ventilation", above=0.9,
          illnesses=("pneumonia", "heart failure"), chance=0.5),
    Entry("pulmonary|ventilation and oxygenation|oxygen therapy (40% to 60%)", above=0.5, chance=0.5),
    Entry("pulmonary|ventilation and oxygenation|oxygen therapy (< 40%)|nasal cannula", below=-0.1, chance=0.55),
    Entry("pulmonary|radiologic procedures / bronchoscopy|chest x-ray", above=-0.6, chance=0.5),
    Entry("cardiovascular|shock|vasopressors|norepinephrine <= 0.1 micrograms/kg/min", above=0.9, chance=0.6),
    Entry("cardiovascular|shock|vasopressors|norepinephrine > 0.1 micrograms/kg/min", above=1.6, chance=0.7),
    Entry("cardiovascular|shock|vasopressors|vasopressin", above=2.2, chance=0.5),
    Entry("cardiovascular|intravenous fluid|normal saline administration|fluid bolus (250-1000mls)", above=0.4,
          chance=0.6),
    Entry("cardiovascular|intravenous fluid|normal saline administration", above=-0.6, chance=0.4),
    Entry("cardiovascular|ventricular dysfunction|intravenous diuretic|IV furosemide", above=-0.4,
          illnesses=("heart failure",), chance=0.9),
    Entry("cardiovascular|arrhythmias|antiarrhythmics|class III antiarrhythmic|amiodarone", above=0.8,
          illnesses=("heart failure", "sepsis"), chance=0.4),
    Entry("infectious diseases|medications|therapeutic antibacterials|vancomycin", above=0.1, illnesses=_INFECTED,
          chance=0.7),
    Entry("infectious diseases|medications|therapeutic antibacterials|penicillins|piperacillin/tazobactam",
          above=-0.5, illnesses=_INFECTED, chance=0.7),
    Entry("infectious diseases|cultures / immuno-assays|cultures|blood", above=0.2, illnesses=_INFECTED,
          chance=0.6),
    Entry("hematology|red blood cell disorders|blood product administration|packed red blood cells|"
          "transfusion of 1-2 units prbc's", above=0.3, illnesses=_BLEEDING, chance=0.7),
    Entry("renal|dialysis|C V V H", above=2.0, chance=0.4),
    Entry("renal|urinary catheters|foley catheter", above=-0.3, chance=0.5),
    Entry("neurologic|procedures / diagnostics|head CT scan", above=-0.5, illnesses=("stroke", "trauma"),
          chance=0.8),
    Entry("neurologic|pain / agitation / altered mentation|sedative agent|propofol", above=-0.5, ventilated=True),
    Entry("neurologic|pain / agitation / altered mentation|analgesics|oral analgesics", below=-0.4, chance=0.4),
    Entry("gastrointestinal|medications|stress ulcer prophylaxis|pantoprazole", above=-0.8, chance=0.5),
    Entry("gastrointestinal|nutrition|enteral feeds|oral feeds", below=-0.5, chance=0.4),
    Entry("general|support services|physical therapy consult", below=-0.5, chance=0.45),
    Entry("cardiovascular|vascular disorders|VTE prophylaxis|compression stockings", chance=0.3),
    Entry("surgery|tubes and catheters|chest tube", above=0.4, illnesses=("trauma",), chance=0.5),
    Entry("pulmonary|medications|thrombolytic agent|alteplase", above=1.8, chance=0.03),
    Entry("neurologic|therapy for controlling cerebral perfusion pressure|hypothermia", above=2.2, chance=0.06),
)  # fmt: skip


@dataclass(frozen=True)
class Drug:
    """What `medication` says of one drug; ``brand`` and ``label`` are what some hospitals write instead of its name."""

    entry: Entry
    brand: str
    label: str
    hicl: int
    gtc: int
    dosage: str
    route: str
    frequency: str
    admixture: bool = False
    as_needed: bool = False


DRUGS = (
    Drug(Entry("sodium chloride 0.9%", above=-0.8, chance=0.8), "NaCl 0.9% MBP",
         "1000 ML FLEX CONT : SODIUM CHLORIDE 0.9 % IV SOLN", 8255, 59, "1,000 mL", "IV", "Continuous",
         admixture=True),
    Drug(Entry("acetaminophen", chance=0.55), "TYLENOL", "ACETAMINOPHEN 325 MG PO TABS", 1866, 2, "650 mg", "PO",
         "Q4H PRN", as_needed=True),
    Drug(Entry("potassium chloride", above=-0.2, chance=0.5), "K-DUR", "POTASSIUM CHLORIDE 20 MEQ PO PACK", 549, 59,
         "20 mEq", "IVPB", "Q1H X3", admixture=True),
    Drug(Entry("pantoprazole", above=-0.6, chance=0.6), "PROTONIX", "PANTOPRAZOLE SODIUM 40 MG IV SOLR", 22008, 65,
         "40 MG", "IV Push", "Daily"),
    Drug(Entry("heparin", chance=0.45), "Heparin", "HEPARIN 5000 UNIT/ML 1ML INJ", 2810, 36, "5,000 unit(s)",
         "SubQ", "Q8H (int)"),
    Drug(Entry("norepinephrine", above=1.0, chance=0.8), "LEVOPHED", "NOREPINEPHRINE BITARTRATE 1 MG/ML IJ SOLN",
         2051, 32, "4 MG", "IV", "TITRATE", admixture=True),
    Drug(Entry("vasopressin", above=2.0, chance=0.6), "PITRESSIN", "VASOPRESSIN 20 UNIT/ML IV SOLN", 2839, 68,
         "40 unit(s)", "IV", "TITRATE", admixture=True),
    Drug(Entry("propofol", above=-0.6, ventilated=True), "DIPRIVAN", "PROPOFOL IV EMULSION 1,000 MG/100 ML VIAL",
         4842, 5, "100 ML", "IV", "TITRATE", admixture=True),
    Drug(Entry("fentaNYL", above=0.0, chance=0.5), "SUBLIMAZE", "FENTANYL CITRATE 0.05 MG/ML IJ SOLN", 25386, 2,
         "25 mcg", "IV", "Q1H PRN", as_needed=True),
    Drug(Entry("LORazepam", above=0.3, chance=0.3), "ATIVAN", "LORAZEPAM 2 MG/ML IJ SOLN", 4846, 83, "1 MG", "IV",
         "Q4H PRN", as_needed=True),
    Drug(Entry("vancomycin", above=0.2, illnesses=_INFECTED, chance=0.7), "VANCOCIN", "VANCOMYCIN HCL 1 GM IV SOLR",
         4042, 19, "1 gm", "IVPB", "Q12H", admixture=True),
    Drug(Entry("piperacillin-tazobactam", above=-0.4, illnesses=_INFECTED, chance=0.7), "ZOSYN",
         "PIPERACILLIN SOD-TAZOBACTAM SO 3-0.375 G IV SOLR", 8738, 19, "3.375 g", "IV", "Q6H", admixture=True),
    Drug(Entry("cefTRIAXone", below=0.2, illnesses=_INFECTED, chance=0.4), "ROCEPHIN",
         "CEFTRIAXONE SODIUM 1 G IJ SOLR", 3996, 19, "1 g", "IVPB", "Q24H X5"),
    Drug(Entry("furosemide", above=-0.3, illnesses=("heart failure", "pneumonia"), chance=0.8), "LASIX",
         "FUROSEMIDE 10 MG/ML IJ SOLN", 3660, 56, "40 mg", "IV", "BID"),
    Drug(Entry("amiodarone", above=0.8, illnesses=("heart failure", "sepsis"), chance=0.5), "CORDARONE",
         "AMIODARONE HCL 150 MG/3ML IV SOLN", 83, 38, "150 mg", "IV", "Continuous", admixture=True),
    Drug(Entry("hydrocortisone", above=1.8, chance=0.6), "SOLU-CORTEF",
         "HYDROCORTISONE NA SUCCINATE PF 100 MG IJ SOLR", 2866, 68, "50 MG", "IV", "Q6H"),
    Drug(Entry("sodium bicarbonate", above=1.7, chance=0.5), "Sodium Bicarbonate",
         "SODIUM BICARBONATE 8.4 % IV SOLN", 523, 59, "50 mEq", "IV", "Once", admixture=True),
    Drug(Entry("levETIRAcetam", above=-0.5, illnesses=("stroke", "trauma"), chance=0.6), "KEPPRA",
         "LEVETIRACETAM 500 MG/5ML IV SOLN", 20952, 44, "500 MG", "IV", "Q12H SCH"),
    Drug(Entry("morphine", above=-0.3, illnesses=("trauma", "heart failure"), chance=0.5), "MORPHINE SULFATE",
         "MORPHINE 2 MG/1 ML 1 ML SYR", 1694, 2, "2 mg", "IV Push", "Q2H PRN", as_needed=True),
    Drug(Entry("oxyCODONE", below=-0.3, chance=0.45), "ROXICODONE", "OXYCODONE HCL 5 MG PO TABS", 1742, 2, "5 MG",
         "PO", "Q4H PRN", as_needed=True),
    Drug(Entry("docusate", below=0.0, chance=0.5), "COLACE", "DOCUSATE SODIUM 100 MG CAP", 1326, 65, "100 mg", "PO",
         "BID"),
    Drug(Entry("insulin lispro", above=0.1, chance=0.4), "HumaLOG", "INSULIN LISPRO (HUMAN) 100 UNIT/ML SC SOLN",
         11528, 71, "2-12 Units", "Subcutaneous", "TID AC"),
    Drug(Entry("metoprolol", chance=0.25, chronic=True), "LOPRESSOR", "METOPROLOL TARTRATE 25 MG PO TABS", 2102, 41,
         "25 mg", "PO", "BID"),
    Drug(Entry("aspirin", chance=0.3, chronic=True), "ECOTRIN", "ASPIRIN EC 81 MG PO TBEC", 1820, 2, "81 mg", "PO",
         "Daily"),
    Drug(Entry("levothyroxine", chance=0.1, chronic=True), "SYNTHROID", "LEVOTHYROXINE SODIUM 25 MCG PO TABS", 2849,
         89, "25 mcg", "PO", "Daily"),
    Drug(Entry("alteplase", above=1.5, chance=0.03), "ACTIVASE", "ALTEPLASE 2 MG IJ SOLR", 2803, 35, "2 mg",
         "IV PUSH", "Once"),
)  # fmt: skip


def applicable(course: Course, rng: Generator, entries: Sequence[Entry]) -> NDArray[np.bool_]:
    """bool[len(entries)]: what can apply to this stay at all, whatever its severity."""
    drawn = rng.random(len(entries))
    older = logistic(0.05 * (course.age - 64)) * 2  # twice the chance at most
    return np.array([
        (drawn[i] < (entry.chance * older if entry.chronic else entry.chance))
        and (not entry.illnesses or course.illness in entry.illnesses)
        and (course.ventilated or not entry.ventilated)
        for i, entry in enumerate(entries)
    ])  # fmt: skip


def applies(course: Course, rng: Generator, entries: Sequence[Entry], shown: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool[N, len(entries)]: what applies at each of N moments, of which ``shown`` is the severity seen.

    A threshold is the stay's own, so that the list is steady while the severity is.
    """
    able = applicable(course, rng, entries)
    own = rng.normal(0, 0.35, len(entries))
    seen = shown[:, None] - own + rng.normal(0, 0.15, (len(shown), len(entries)))
    low = np.array([-np.inf if entry.above is None else entry.above for entry in entries])
    high = np.array([np.inf if entry.below is None else entry.below for entry in entries])
    return able & (seen > low) & (seen < high)
