"""An eICU release written by hand, and what a reader makes of it."""

from __future__ import annotations

import csv
from pathlib import Path

import polars as pl
from cohort_example import Read, read_cohort

from trajlm.cohorts import eicu
from trajlm.cohorts.eicu_readings import APS_VARIABLES
from trajlm.config import PrepareConfig

FURTHER = ["vital_periodic", "vital_aperiodic", "infusion"]
ANNA, BEN = 101, 102  # stays of the release written by hand

HEADERS = {
    "patient": "patientunitstayid,patienthealthsystemstayid,gender,age,ethnicity,hospitalid,wardid,apacheadmissiondx,"
    "admissionheight,hospitaladmittime24,hospitaladmitoffset,hospitaladmitsource,hospitaldischargeyear,"
    "hospitaldischargetime24,hospitaldischargeoffset,hospitaldischargelocation,hospitaldischargestatus,unittype,"
    "unitadmittime24,unitadmitsource,unitvisitnumber,unitstaytype,admissionweight,dischargeweight,unitdischargetime24,"
    "unitdischargeoffset,unitdischargelocation,unitdischargestatus,uniquepid",
    "diagnosis": "diagnosisid,patientunitstayid,activeupondischarge,diagnosisoffset,diagnosisstring,icd9code,"
    "diagnosispriority",
    "treatment": "treatmentid,patientunitstayid,treatmentoffset,treatmentstring,activeupondischarge",
    "medication": "medicationid,patientunitstayid,drugorderoffset,drugstartoffset,drugivadmixture,drugordercancelled,"
    "drugname,drughiclseqno,dosage,routeadmin,frequency,loadingdose,prn,drugstopoffset,gtc",
    "lab": "labid,patientunitstayid,labresultoffset,labtypeid,labname,labresult,labresulttext,labmeasurenamesystem,"
    "labmeasurenameinterface,labresultrevisedoffset",
    "apacheApsVar": "apacheapsvarid,patientunitstayid," + ",".join(APS_VARIABLES),
    "vitalPeriodic": "vitalperiodicid,patientunitstayid,observationoffset,temperature,sao2,heartrate,respiration,cvp,"
    "etco2,systemicsystolic,systemicdiastolic,systemicmean,pasystolic,padiastolic,pamean,st1,st2,st3,icp",
    "vitalAperiodic": "vitalaperiodicid,patientunitstayid,observationoffset,noninvasivesystolic,noninvasivediastolic,"
    "noninvasivemean,paop,cardiacoutput,cardiacinput,svr,svri,pvr,pvri",
    "infusiondrug": "infusiondrugid,patientunitstayid,infusionoffset,drugname,drugrate,infusionrate,drugamount,"
    "volumeoffluid,patientweight",
}
# A stay of four days in the unit, the first of five in hospital.
STAY = {"patientunitstayid": ANNA, "patienthealthsystemstayid": 11, "gender": "Female", "age": 60,
        "hospitaladmitoffset": -60, "hospitaldischargeyear": 2014, "hospitaldischargeoffset": 7140,
        "hospitaldischargestatus": "Alive", "unittype": "MICU", "unitvisitnumber": 1, "unitdischargeoffset": 5760,
        "unitdischargestatus": "Alive", "uniquepid": "002-1"}  # fmt: skip
ROW = {
    "diagnosis": {"patientunitstayid": ANNA, "diagnosisoffset": 30, "diagnosisstring": "renal|dialysis"},
    "treatment": {"patientunitstayid": ANNA, "treatmentoffset": 30, "treatmentstring": "renal|dialysis"},
    "medication": {"patientunitstayid": ANNA, "drugorderoffset": 10, "drugstartoffset": 30, "drugstopoffset": 90,
                   "drugordercancelled": "No", "drugname": "ASPIRIN 81 MG PO CHEW", "drughiclseqno": 1820},
    "lab": {"patientunitstayid": ANNA, "labresultoffset": 30, "labname": "sodium", "labresult": 140,
            "labmeasurenamesystem": "mmol/L", "labresultrevisedoffset": 60},
    "apacheApsVar": {"patientunitstayid": ANNA, **dict.fromkeys(APS_VARIABLES, -1)},
    "vitalPeriodic": {"patientunitstayid": ANNA, "observationoffset": 30},
    "vitalAperiodic": {"patientunitstayid": ANNA, "observationoffset": 30},
    "infusiondrug": {"patientunitstayid": ANNA, "infusionoffset": 30, "drugname": "Propofol (ml/hr)", "drugrate": 5},
}  # fmt: skip


def write(folder: Path, **tables: list[dict]) -> Path:
    """A release: for each table its rows as changes to ``ROW`` (``STAY`` for patients); one stay if none is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, changes in {"patient": [{}], **tables}.items():
        header = HEADERS[name].split(",")
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, header, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**(STAY if name == "patient" else ROW[name]), **row} for row in changes)
    return folder


def read(raw: Path, **options) -> Read:
    number = len(list(raw.parent.glob("read-*")))
    return read_cohort(eicu, raw, PrepareConfig(cohort="eicu", **options), raw.parent / f"read-{number}")


def values(result: Read, modality: str, stay: int = ANNA) -> list[tuple[float, str, float]]:
    """(hours, feature, value) of a stay in the order of measuring."""
    rows = result.measurements.filter(pl.col("stay_id") == stay, pl.col("modality") == modality)
    rows = rows.sort("measured", maintain_order=True)
    return list(rows.select("hours_since_admission", "feature", "value").iter_rows())


def reasons(result: Read, table: str) -> dict[int, str]:
    frame = result.rejected(table)
    return dict(frame.select("line", "reason").iter_rows()) if frame.height else {}
