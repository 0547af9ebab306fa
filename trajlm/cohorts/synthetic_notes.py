"""Writes the radiology reports and discharge summaries of the synthetic ICU from phrases and slots.

The wording grows graver with the severity that a report shows; devices, old fractures and denied findings say nothing
of it and are there to distract.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from trajlm.cohorts.synthetic_course import Course

GRADES = (-0.7, 0.1, 0.9, 1.8)  # severity shown at which the wording turns to the next grade

_LUNGS = (
    (
        "The lungs are clear without focal consolidation.",
        "Lungs are well expanded and clear.",
        "There is no focal consolidation, effusion, or edema.",
        "No new parenchymal opacity is seen; both lungs are well aerated.",
    ),
    (
        "Lung volumes are low with minor bibasilar atelectasis.",
        "Linear {side} basilar opacity is most in keeping with atelectasis.",
        "Mild vascular crowding is accentuated by low lung volumes.",
        "There is slight blunting of the {side} costophrenic angle.",
    ),
    (
        "A patchy opacity projects over the {side} {zone}.",
        "There is mild pulmonary vascular congestion with a small {side} pleural effusion.",
        "Ill-defined {side} {zone} opacity may represent atelectasis or early consolidation.",
        "Increased interstitial markings suggest mild edema, {side} greater than {other}.",
    ),
    (
        "Multifocal airspace opacities are present, {side} greater than {other}.",
        "There is moderate pulmonary edema with bilateral layering effusions.",
        "Dense consolidation involves the {side} {zone} with air bronchograms.",
        "Bilateral perihilar opacities are noted, and the {side} hemidiaphragm is obscured.",
    ),
    (
        "Diffuse bilateral airspace opacities nearly replace the aerated lung.",
        "There is extensive consolidation of both lungs with near complete opacification of the {side} hemithorax.",
        "Severe diffuse alveolar opacities persist throughout both lungs.",
        "Widespread bilateral consolidation is seen with little aerated parenchyma remaining.",
    ),
)  # fmt: skip
_IMPRESSION = (
    (
        "No acute cardiopulmonary process.",
        "No acute process.",
        "No radiographic evidence of pneumonia.",
        "Clear lungs.  No acute intrathoracic abnormality.",
    ),
    (
        "Low lung volumes with bibasilar atelectasis.  No definite pneumonia.",
        "Minor {side} basilar atelectasis, otherwise no acute findings.",
        "No evidence of overt edema.  Small {side} effusion is possible.",
    ),
    (
        "{Side} {zone} opacity, possibly pneumonia in the appropriate clinical setting.",
        "Mild pulmonary edema and small {side} pleural effusion.",
        "Patchy {side} {zone} opacity; aspiration is not excluded.",
    ),
    (
        "Multifocal opacities concerning for pneumonia, {side} worse than {other}.",
        "Moderate pulmonary edema with bilateral effusions.",
        "{Side} {zone} consolidation concerning for pneumonia.",
    ),
    (
        "Extensive bilateral opacities compatible with ARDS.",
        "Severe pulmonary edema or diffuse infection; ARDS should be considered.",
        "Near complete opacification of the {side} hemithorax with diffuse {other} lung disease.",
    ),
)
_CHANGE = {
    "worse": (
        "Worsening bilateral opacities compared to the prior study.",
        "Interval progression of parenchymal opacities.",
        "Opacities have increased since ___.",
    ),
    "better": (
        "Interval improvement in aeration.",
        "Opacities have partly cleared since ___.",
        "Decreased opacities compared to the prior radiograph.",
    ),
    "same": (
        "No significant interval change.",
        "Little change in the appearance of the chest since ___.",
        "Findings are similar to the previous examination.",
    ),
}
_DISTRACTORS = (
    "No pneumothorax.",
    "There is no pneumothorax or displaced rib fracture.",
    "Degenerative changes are noted in the thoracic spine.",
    "Healed {other} rib fractures are again seen.",
    "Surgical clips project over the upper abdomen.",
    "The aorta is calcified and mildly tortuous.",
    "No free air below the right hemidiaphragm.",
    "Median sternotomy wires are intact.",
    "No nodule suspicious for malignancy is identified.",
)
_ZONES = ("lower lobe", "lung base", "mid lung", "upper lobe", "perihilar region")
_CLEAN_HEART = ("Heart size is normal.", "The cardiomediastinal silhouette is within normal limits.",
                "Cardiac and mediastinal contours are unremarkable.")  # fmt: skip
_LARGE_HEART = ("The heart is moderately enlarged.", "Cardiomegaly is unchanged.",
                "The cardiac silhouette remains enlarged.")  # fmt: skip

_PRESENTATION = {
    "pneumonia": ("Shortness of breath", "fever, cough and hypoxia", "Pneumonia"),
    "heart failure": ("Dyspnea", "dyspnea on exertion, orthopnea and leg swelling", "Acute on chronic heart failure"),
    "sepsis": ("Hypotension", "fever, confusion and low blood pressure", "Sepsis"),
    "haemorrhage": ("Melena", "black stools and light-headedness", "Gastrointestinal bleeding"),
    "stroke": ("Weakness", "sudden weakness and slurred speech", "Acute stroke"),
    "trauma": ("Fall", "pain after a fall from height", "Multiple rib fractures"),
}
_ELSEWHERE = {  # the other studies of a stay, which say nothing of the chest
    "stroke": ("CT HEAD W/O CONTRAST", "Evolving infarct without hemorrhagic conversion."),
    "haemorrhage": ("CT ABD & PELVIS WITH CONTRAST", "No active extravasation is identified."),
    "trauma": ("CT C-SPINE W/O CONTRAST", "No fracture or malalignment of the cervical spine."),
}


def _pick(rng: Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _person(course: Course) -> str:
    return f"___ year old {'man' if course.patient.gender == 'M' else 'woman'}"


def grade(severity: float) -> int:
    """0 (clear) to 4 (gravest): the wording for a severity as shown."""
    return int(np.searchsorted(GRADES, severity))


def chest_report(course: Course, rng: Generator, severity: float, previous: float | None, view: str) -> str:
    """A chest radiograph's report.

    Args:
        course: the stay.
        rng: picks phrases.
        severity: as the report shows it.
        previous: the same for the stay's study before, None for its first.
        view: AP, or PA for two views.
    """
    level = grade(severity + float(rng.normal(0, 0.2)))
    other = "left" if course.side == "right" else "right"
    slots = {"side": course.side, "other": other, "Side": course.side.capitalize(), "zone": _pick(rng, _ZONES)}
    heart = _LARGE_HEART if course.illness == "heart failure" else _CLEAN_HEART
    findings = [_pick(rng, _LUNGS[level]), _pick(rng, heart)]
    findings += list(rng.permutation(_DISTRACTORS)[: rng.integers(1, 4)])
    if course.ventilated and view == "AP":
        findings.append(_pick(rng, (
            "Endotracheal tube terminates ___ cm above the carina.",
            "ET tube and enteric tube are in standard position.",
        )))  # fmt: skip
    impression = [_pick(rng, _IMPRESSION[level])]
    if previous is not None:
        rise = severity - previous
        change = "worse" if rise > 0.35 else "better" if rise < -0.35 else "same"
        if level > 0 or change == "same":  # clear lungs hold no opacity that could have changed
            impression.insert(int(rng.integers(2)), _pick(rng, _CHANGE[change]))
    title = "CHEST (PORTABLE AP)" if view == "AP" else "CHEST (PA AND LAT)"
    question = _pick(rng, ("interval change", "?pneumonia", "eval for acute process", "edema?", "line placement"))
    body = " ".join(rng.permutation(findings)).format(**slots)
    numbered = [f"{n}. {text}" for n, text in enumerate(impression, 1)] if len(impression) > 1 else impression
    concluding = "\n".join(numbered).format(**slots)
    compared = "None." if previous is None else _pick(rng, ("___.", "Chest radiograph ___.", "Prior study of ___."))
    return (
        f"EXAMINATION:  {title}\n\n"
        f"INDICATION:  {_person(course)} with {_PRESENTATION[course.illness][1]}  // {question}\n\n"
        f"TECHNIQUE:  {'Portable AP' if view == 'AP' else 'PA and lateral'} view of the chest.\n\n"
        f"COMPARISON:  {compared}\n\n"
        f"FINDINGS: \n\n{body}\n\n"
        f"IMPRESSION: \n\n{concluding}\n"
    )


def other_report(course: Course, rng: Generator) -> str:
    """A report on another part of the body, which holds nothing on severity."""
    title, conclusion = _ELSEWHERE.get(course.illness, ("RENAL U.S.", "Normal renal ultrasound.  No hydronephrosis."))
    detail = _pick(rng, ("The study is limited by motion.", "Technically adequate study.", "Limited portable study."))
    return (
        f"EXAMINATION:  {title}\n\nINDICATION:  {_person(course)} with {_PRESENTATION[course.illness][1]}\n\n"
        f"TECHNIQUE:  Standard departmental protocol.\n\nCOMPARISON:  ___.\n\nFINDINGS: \n\n{detail}\n\n"
        f"IMPRESSION: \n\n{conclusion}\n"
    )


def discharge_summary(course: Course, rng: Generator) -> str:
    """The summary of the hospital stay. It names the outcome, as real ones do: a leak for mortality."""
    complaint, symptoms, diagnosis = _PRESENTATION[course.illness]
    disposition = _pick(rng, ("Home", "Home With Service", "Extended Care"))
    instructions = "Dear ___,\nYou were in the hospital because of your illness.  Please take all medications."
    if course.deathtime is not None:
        disposition, instructions = "Expired", "N/A"
    service = _pick(rng, ("MEDICINE", "SURGERY", "NEUROLOGY", "CARDIOTHORACIC"))
    allergies = _pick(rng, ("No Known Allergies / Adverse Drug Reactions", "Penicillins", "Sulfa"))
    history = _pick(rng, ("Hypertension", "Type 2 diabetes", "COPD", "Coronary disease", "None"))
    return (
        " \nName:  ___                     Unit No:   ___\n \n"
        "Admission Date:  ___              Discharge Date:   ___\n \n"
        f"Date of Birth:  ___             Sex:   {course.patient.gender}\n \nService: {service}\n \n"
        f"Allergies: \n{allergies}\n \nAttending: ___.\n \nChief Complaint:\n{complaint}\n \n"
        f"History of Present Illness:\n{_person(course)} who presents with {symptoms}.\n \n"
        f"Past Medical History:\n{history}\n \nSocial History:\n___\n \n"
        f"Brief Hospital Course:\n{_hospital_course(course, rng, diagnosis)}\n \n"
        f"Discharge Disposition:\n{disposition}\n \nDischarge Diagnosis:\n{diagnosis}\n \n"
        f"Discharge Instructions:\n{instructions}\n"
    )


def _hospital_course(course: Course, rng: Generator, diagnosis: str) -> str:
    told = [f"The patient was admitted with {diagnosis.lower()} and monitored in the intensive care unit."]
    if course.ventilated:
        told.append("Mechanical ventilation was required.")
    worst = float(course.severity.max())
    if worst > 1.6:
        phrases = ("Vasopressors were needed for refractory hypotension.", "The course was complicated by shock.")
    elif worst > 0.5:
        phrases = ("Hemodynamics responded to fluids.", "The course was notable for transient hypotension.")
    else:
        phrases = ("The patient remained hemodynamically stable.", "The course was uncomplicated.")
    told.append(_pick(rng, phrases))
    if course.deathtime is not None:
        end = (
            "Despite maximal therapy the patient died.",
            "After discussion with family, care was directed at comfort.",
        )
    else:
        end = ("The patient improved and was transferred to the floor.", "Symptoms resolved before discharge.")
    return " ".join([*told, _pick(rng, end)])
