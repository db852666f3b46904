"""MIMIC-CXR-JPG -> shards: chest X-rays with reports, and the electrocardiogram that was taken nearest to each.

    CXR/mimic-cxr-2.0.0-metadata.csv.gz     dicom_id, subject_id, study_id, ViewPosition, StudyDate, StudyTime, …
    CXR/mimic-cxr-2.0.0-split.csv.gz        dicom_id, study_id, subject_id, split
    CXR/mimic-cxr-2.0.0-chexpert.csv.gz     subject_id, study_id, and a column for each of 14 findings
    CXR/files/p10/p10000032/s50414267/DICOM_ID.jpg
    REPORTS/files/p10/p10000032/s50414267.txt
    ECG                                     MIMIC-IV-ECG, as `mimic_ecg` has it

Johnson et al. 2019, arXiv:1901.07042. All times of a patient were shifted alike, so they can be compared. Tables may
also be unpacked (.csv).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.mimic_ecg import Record, read_records
from mmcontrast.data_prep.source import Item, Row, Source, first_there, numbered, picture_member
from mmcontrast.data_prep.table import whole_table
from mmcontrast.data_prep.wfdb_record import recording
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample
from mmcontrast.tables import Cells

PARTS = {"train": "train", "validate": "val", "test": "test"}
"""Split of the corpus -> ours; it keeps a patient in one."""
COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")


@dataclass(frozen=True)
class Study:
    """An X-ray: its line of the metadata, split, findings, and the electrocardiograms in reach, nearest first."""

    cells: Cells
    split: str | None
    findings: Cells
    ecgs: Sequence[Record]


@dataclass(frozen=True, kw_only=True)
class MIMICCXR(Source):
    """MIMIC-CXR-JPG: chest X-rays, their reports, and the patient's electrocardiogram (the extra [ecg]).

    A sample is an X-ray (`jpg`), findings and impression of its report (`txt`), the electrocardiogram that was taken
    nearest to it if one is in reach (`npy`), and metadata: `findings`, those that CheXpert found in the report, and
    `uncertain` ones; `patient`, `study`, `dicom`, `view`; of the electrocardiogram `ecg_study`, `ecg_report` and
    `ecg_hours`, from the X-ray to it. An electrocardiogram that cannot be used gives way to the next one.
    """

    cxr: Path
    """MIMIC-CXR-JPG: the tables and files/ with the X-rays."""
    reports: Path | None = None
    """Where files/ with the reports is (mimic-cxr-reports.zip); by default the same folder."""
    ecg: Path | None = None
    """MIMIC-IV-ECG; without it, samples are X-rays and reports."""
    hours: float = 24.0
    """How far from the X-ray an electrocardiogram may be, before or after it."""
    views: tuple[str, ...] = ("PA", "AP")
    """Views that are taken; the others are passed over."""

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {
            "source": "MIMIC-CXR-JPG" + (" with MIMIC-IV-ECG" if self.ecg else ""),
            "licence": "PhysioNet Credentialed Health Data License 1.5.0; only who signed its agreement may read these",
            "paper": "arXiv:1901.07042",
        }

    def rows(self) -> Sequence[Row]:
        """One per X-ray of a view."""
        if self.hours <= 0 or not self.views:
            raise ConfigError(f"hours is {self.hours}, views {self.views}; give some time and at least one view")
        metadata = whole_table(self._table("metadata"), COLUMNS)
        splits = {cells["dicom_id"]: cells["split"] for _, cells in whole_table(self._table("split"), ("split",))}
        findings = {cells["study_id"]: cells for _, cells in whole_table(self._table("chexpert"), ("study_id",))}
        ecgs: dict[str, list[Record]] = {}
        for record in read_records(self.ecg) if self.ecg else ():
            ecgs.setdefault(record.subject, []).append(record)
        found: list[tuple[str, Study]] = []
        for number, cells in metadata:
            if cells["ViewPosition"] in self.views:
                near = self._near(cells, ecgs.get(str(cells["subject_id"]), []))
                split = PARTS.get(str(splits.get(cells["dicom_id"])))
                study = Study(cells, split, findings.get(cells["study_id"], {}), near)
                found.append((f"row {number}, {cells['dicom_id']}", study))
        if not found:
            raise ConfigError(f"{self.cxr} has no X-ray of the views {', '.join(self.views)}")
        return numbered(found)

    def _table(self, name: str) -> Path:
        return first_there(self.cxr, f"mimic-cxr-2.0.0-{name}.csv.gz", f"mimic-cxr-2.0.0-{name}.csv")

    def _near(self, cells: Cells, ecgs: Sequence[Record]) -> list[Record]:
        """The electrocardiograms in reach, nearest first."""
        taken = _study_time(cells)
        if taken is None:
            return []
        apart = {record.study: abs(time - taken) for record in ecgs if (time := _time(record.time)) is not None}
        near = [record for record in ecgs if apart.get(record.study, timedelta.max) <= timedelta(hours=self.hours)]
        return sorted(near, key=lambda record: apart[record.study])

    def encode(self, row: Row) -> Sequence[Item]:
        """An X-ray with what belongs to it."""
        study: Study = row.data
        cells = study.cells
        patient, number, dicom = (str(cells[name] or "") for name in ("subject_id", "study_id", "dicom_id"))
        if study.split is None:
            raise BadSample("no split that is known")
        folder = f"files/p{patient[:2]}/p{patient}"
        report = (self.reports or self.cxr) / folder / f"s{number}.txt"
        text = read_report(report.read_text("utf-8-sig"))
        members: dict[str, Any] = {**picture_member(self.cxr / folder / f"s{number}" / f"{dicom}.jpg"), "txt": text}
        marks = {name: mark for name, mark in study.findings.items() if name not in ("subject_id", "study_id")}
        meta: dict[str, Any] = {
            "patient": patient,
            "study": number,
            "dicom": dicom,
            "view": cells["ViewPosition"],
            "findings": [name for name, mark in marks.items() if mark == "1.0"],
            "uncertain": [name for name, mark in marks.items() if mark == "-1.0"],
        }
        for record in study.ecgs:
            try:
                ecg, signal = recording(record.path)
            except (BadSample, OSError):
                continue
            taken, time = _study_time(cells), _time(record.time)
            assert taken is not None and time is not None
            members |= ecg
            hours = round((time - taken) / timedelta(hours=1), 2)
            meta |= {"ecg_study": record.study, "ecg_report": record.report, "ecg_hours": hours, **signal}
            break
        return [Item(study.split, Sample(f"{row.number:08d}", {**members, "json": meta}))]


def read_report(text: str) -> str:
    """Findings and impression; the last paragraph of a report that names neither.

    Raises:
        BadSample: it says nothing.
    """
    parts = re.split(r"(?m)^[ \t]*([A-Z][A-Z /&,()-]*):", text)
    sections = {name.strip(): " ".join(said.split()) for name, said in zip(parts[1::2], parts[2::2], strict=True)}
    said = [part for name in ("FINDINGS", "IMPRESSION") if (part := sections.get(name, ""))]
    if not said:
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]
        said = paragraphs[-1:]
    if not said:
        raise BadSample("report is empty")
    return " ".join(said)


def _study_time(cells: Cells) -> datetime | None:
    """Of a day such as 21800506 and a time such as 93014.531, half past nine."""
    try:
        clock = f"{int(float(cells['StudyTime'])):06d}"
        return datetime.strptime(f"{cells['StudyDate']} {clock}", "%Y%m%d %H%M%S")
    except (ValueError, TypeError, OverflowError):
        return None


def _time(value: str) -> datetime | None:
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        return None
