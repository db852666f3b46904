"""PTB-XL -> shards: electrocardiograms of 18,869 patients with statements of cardiologists and reports.

    FOLDER/ptbxl_database.csv       one row per recording: patient, scp_codes, report, strat_fold, files
    FOLDER/scp_statements.csv       what a code says, and which class it belongs to
    FOLDER/records100, records500   WFDB records at 100 and 500 Hz

Wagner et al. 2020, https://doi.org/10.1038/s41597-020-0495-6; https://physionet.org/content/ptb-xl/ (CC BY 4.0). Folds
9 and 10, whose labels a person has checked, are for validation and test as its authors ask.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from mmcontrast.data_prep.source import Folded, Item, Row, folder_there, numbered
from mmcontrast.data_prep.table import whole_table
from mmcontrast.data_prep.wfdb_record import recording, wfdb_there
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample
from mmcontrast.tables import Cells

SUPERCLASSES = {
    "NORM": "normal ECG",
    "MI": "myocardial infarction",
    "STTC": "ST/T change",
    "CD": "conduction disturbance",
    "HYP": "hypertrophy",
}
SUBCLASSES = {
    "NORM": "normal ECG",
    "AMI": "anterior myocardial infarction",
    "IMI": "inferior myocardial infarction",
    "LMI": "lateral myocardial infarction",
    "PMI": "posterior myocardial infarction",
    "ISCA": "ischemia in anterior leads",
    "ISCI": "ischemia in inferior leads",
    "ISC_": "non-specific ischemia",
    "STTC": "ST-T changes",
    "NST_": "non-specific ST changes",
    "LAFB/LPFB": "left anterior or posterior fascicular block",
    "IRBBB": "incomplete right bundle branch block",
    "CRBBB": "complete right bundle branch block",
    "ILBBB": "incomplete left bundle branch block",
    "CLBBB": "complete left bundle branch block",
    "_AVB": "AV block",
    "IVCD": "non-specific intraventricular conduction disturbance",
    "WPW": "Wolff-Parkinson-White syndrome",
    "LVH": "left ventricular hypertrophy",
    "RVH": "right ventricular hypertrophy",
    "LAO/LAE": "left atrial overload or enlargement",
    "RAO/RAE": "right atrial overload or enlargement",
    "SEHYP": "septal hypertrophy",
}
"""Names of the classes, of which scp_statements.csv has only the codes."""
COLUMNS = ("ecg_id", "patient_id", "report", "scp_codes", "strat_fold", "filename_lr", "filename_hr")
_OLD = 89  # who is older has an age of 300, to stay anonymous


@dataclass(frozen=True)
class Statement:
    """What a code says: its description, whether it is of form or rhythm, and its diagnostic classes if it has some."""

    description: str
    form: bool
    rhythm: bool
    superclass: str
    subclass: str


@dataclass(frozen=True, kw_only=True)
class PTBXL(Folded):
    """PTB-XL: electrocardiograms with SCP statements and reports (the extra [ecg]).

    A sample is a recording of ten seconds (`npy`, twelve leads as recorded, with their scale), its statements in
    English (`txt`: diagnoses, then form, then rhythm), and metadata: the classes as lists of names under `super` (5),
    `sub` (23), `form` (19) and `rhythm` (12); `label`, the superclass where it has one alone; `scp`, code ->
    likelihood in percent, 0 where unknown; `report`, as it was written, mostly in German; `patient`, `age` (to 89),
    `sex`, `fold`.
    """

    folds: ClassVar[range] = range(1, 11)

    folder: Path
    """Where ptbxl_database.csv is."""
    rate: Literal[100, 500] = 500
    """Samples per second."""
    val_folds: tuple[int, ...] = (9,)
    test_folds: tuple[int, ...] = (10,)

    def about(self, split: str) -> Mapping[str, Any]:
        """Source, licence and rate."""
        return {
            "source": "PTB-XL",
            "licence": "CC BY 4.0",
            "paper": "https://doi.org/10.1038/s41597-020-0495-6",
            "rate": self.rate,
        }

    def rows(self) -> Sequence[Row]:
        """One per recording."""
        folder = folder_there(self.folder)
        statements = read_statements(folder / "scp_statements.csv")
        table = whole_table(folder / "ptbxl_database.csv", COLUMNS)
        wfdb_there()
        return numbered((f"row {number}, ecg {cells['ecg_id']}", (cells, statements)) for number, cells in table)

    def encode(self, row: Row) -> Sequence[Item]:
        """A recording with its statements."""
        cells: Cells = row.data[0]
        statements: Mapping[str, Statement] = row.data[1]
        codes = read_codes(cells["scp_codes"])
        if unknown := sorted(codes.keys() - statements.keys()):
            raise BadSample(f"scp_statements.csv does not have {unknown[0]}")
        found = {code: statements[code] for code in codes}
        split = self.split_of_fold(_whole(cells, "strat_fold"))
        diagnoses = [s for s in found.values() if s.superclass]
        classes = {
            "super": _distinct(SUPERCLASSES.get(s.superclass, s.superclass) for s in diagnoses),
            "sub": _distinct(SUBCLASSES.get(s.subclass, s.subclass) for s in diagnoses if s.subclass),
            "form": [s.description for s in found.values() if s.form],
            "rhythm": [s.description for s in found.values() if s.rhythm],
        }
        said = _distinct([*(s.description for s in diagnoses), *classes["form"], *classes["rhythm"]])
        if not said:
            raise BadSample("no SCP statements")
        name = str(cells["filename_hr" if self.rate == 500 else "filename_lr"])
        members, signal = recording(self.folder / name)
        if signal["rate"] != self.rate:
            raise BadSample(f"recorded at {signal['rate']} Hz")
        meta = {
            **classes,
            **({"label": classes["super"][0]} if len(classes["super"]) == 1 else {}),
            "scp": codes,
            "patient": _whole(cells, "patient_id"),
            "fold": _whole(cells, "strat_fold"),
            "report": " ".join(str(cells["report"] or "").split()),
            **_person(cells),
            **signal,
        }
        text = ", ".join(said)
        return [Item(split, Sample(f"{row.number:06d}", {**members, "txt": text, "json": meta}))]


def read_statements(path: Path) -> dict[str, Statement]:
    """Code -> what it says.

    Raises:
        ConfigError: the table is not there or not PTB-XL's.
    """
    table = whole_table(path, ("", "description", "form", "rhythm", "diagnostic_class", "diagnostic_subclass"))
    return {
        cells[""]: Statement(
            description=str(cells["description"]).strip(),
            form=cells["form"] == "1.0",
            rhythm=cells["rhythm"] == "1.0",
            superclass=cells["diagnostic_class"] or "",
            subclass=cells["diagnostic_subclass"] or "",
        )
        for _, cells in table
    }


def read_codes(cell: Any) -> dict[str, float]:
    """Code -> likelihood in percent, from a cell such as `{'NORM': 100.0, 'SR': 0.0}`.

    Raises:
        BadSample: it is not so.
    """
    try:
        value: Any = ast.literal_eval(cell)
        if not isinstance(value, dict):
            raise ValueError(value)
        return {str(code): float(likelihood) for code, likelihood in cast(dict[Any, Any], value).items()}
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise BadSample("scp_codes cannot be read") from None


def _whole(cells: Cells, column: str) -> int:
    """A whole number; pandas wrote some of them as 15709.0."""
    try:
        value = float(cells[column])
        if not value.is_integer():
            raise ValueError(value)
        return int(value)
    except (ValueError, TypeError, OverflowError):
        raise BadSample(f"{column} is no whole number") from None


def _person(cells: Cells) -> dict[str, Any]:
    """Age and sex, where they are known."""
    found: dict[str, Any] = {}
    if cells.get("age"):
        age = _whole(cells, "age")
        found = {"age": age} if age <= _OLD else {}
    if cells.get("sex"):
        found["sex"] = "female" if _whole(cells, "sex") else "male"
    return found


def _distinct(names: Any) -> list[str]:
    return list(dict.fromkeys(names))
