"""What PhysioNet/CinC Challenge 2012 measures: modalities, units, codes and the bounds of the possible."""

from __future__ import annotations

import polars as pl

from trajlm.schema import Feature, Modality

MODALITIES = (
    Modality("demographics", "numeric", static=True, title="Demographics"),
    Modality("vitals", "numeric", title="Vital signs"),
    Modality("laboratory", "numeric", title="Laboratory"),
    Modality("blood_gas", "numeric", title="Blood gas"),
    Modality("support", "numeric", title="Respiratory support"),
)

CODES = {
    "Gender": {0: "female", 1: "male"},
    "ICUType": {1: "coronary care", 2: "cardiac surgery recovery", 3: "medical", 4: "surgical"},
    "MechVent": {0: "no", 1: "yes"},
}
# Unit, and the bounds (inclusive) beyond which a value is a slip of the keyboard, a loose sensor or another unit rather
# than a patient. They are wide on purpose: an extreme patient is what the model must see.
VARIABLES: dict[str, dict[str, tuple[str, float, float]]] = {
    "demographics": {
        "Age": ("years", 0, 120),
        "Gender": ("", 0, 1),
        "Height": ("cm", 100, 250),
        "ICUType": ("", 1, 4),
        "Weight": ("kg", 20, 500),
    },
    "vitals": {
        "HR": ("1/min", 10, 350),
        "RespRate": ("1/min", 0, 100),
        "Temp": ("degC", 24, 45),
        "SysABP": ("mmHg", 10, 330),
        "DiasABP": ("mmHg", 5, 270),
        "MAP": ("mmHg", 5, 330),
        "NISysABP": ("mmHg", 10, 330),
        "NIDiasABP": ("mmHg", 5, 270),
        "NIMAP": ("mmHg", 5, 330),
        "GCS": ("points", 3, 15),
        "Urine": ("mL", 0, 15000),
        "Weight": ("kg", 20, 500),
    },
    "laboratory": {
        "Albumin": ("g/dL", 0.3, 10),
        "ALP": ("IU/L", 1, 10000),
        "ALT": ("IU/L", 1, 50000),
        "AST": ("IU/L", 1, 50000),
        "Bilirubin": ("mg/dL", 0, 100),
        "BUN": ("mg/dL", 1, 400),
        "Cholesterol": ("mg/dL", 5, 2000),
        "Creatinine": ("mg/dL", 0, 60),
        "Glucose": ("mg/dL", 5, 3000),
        "HCO3": ("mmol/L", 1, 80),
        "HCT": ("%", 3, 80),
        "K": ("mmol/L", 0.5, 20),
        "Mg": ("mg/dL", 0.1, 20),  # the release says mmol/L; its median of 2.0 is a healthy value in mg/dL only
        "Na": ("mmol/L", 80, 220),
        "Platelets": ("1/nL", 1, 3000),
        "TroponinI": ("ug/L", 0, 1000),
        "TroponinT": ("ug/L", 0, 200),
        "WBC": ("1/nL", 0, 1000),
    },
    "blood_gas": {
        "pH": ("", 6.3, 8.3),
        "PaCO2": ("mmHg", 3, 250),
        "PaO2": ("mmHg", 10, 800),
        "SaO2": ("%", 10, 100),
        "Lactate": ("mmol/L", 0, 60),
    },
    "support": {
        "FiO2": ("fraction", 0.2, 1),
        "MechVent": ("", 0, 1),
    },
}
# By cuff and by a line in an artery it is the same pressure. Apart, each would be missing while the other is read.
BY_CUFF = {"NISysABP": "SysABP", "NIDiasABP": "DiasABP", "NIMAP": "MAP"}
AMOUNTS = ("Urine",)  # each row is what came since the one before: rows of one time add up
DESCRIPTORS = tuple(VARIABLES["demographics"])
PARAMETERS = ("RecordID", *dict.fromkeys(name for group in VARIABLES.values() for name in group))

FEATURES = tuple(
    feature
    for modality, group in VARIABLES.items()
    for name, (unit, _, _) in group.items()
    if name not in BY_CUFF
    for feature in (
        [Feature(modality, f"{name}={label}", kind="category") for label in CODES[name].values()]
        if name in CODES
        else [Feature(modality, name, unit, aggregate="sum" if name in AMOUNTS else "last")]
    )
)
# Key of the one parameter that is both a descriptor and a series: at 00:00 it is the weight at admission.
ADMISSION_WEIGHT = "Weight at 00:00"


def feature_table() -> pl.DataFrame:
    """Everything a row can measure: ``key, modality, feature, low, high, category``.

    The key is the parameter, for codes ``parameter=code`` with the code written as a float, for the weight at 00:00
    ``ADMISSION_WEIGHT``. ``low`` and ``high`` are inclusive; ``category`` is true where the value stored is 1. A
    pressure by cuff is stored as the pressure that it is.
    """
    found = []
    for modality, group in VARIABLES.items():
        for name, (_, low, high) in group.items():
            key = ADMISSION_WEIGHT if (modality, name) == ("demographics", "Weight") else name
            labels = {f"{name}={float(code)}": f"{name}={label}" for code, label in CODES.get(name, {}).items()}
            for one_key, feature in (labels or {key: name}).items():
                stored = BY_CUFF.get(feature, feature)
                found.append((one_key, modality, stored, float(low), float(high), bool(labels)))
    return pl.DataFrame(found, schema=["key", "modality", "feature", "low", "high", "category"], orient="row")
