"""MIMIC-IV-ECG -> shards: 800,035 electrocardiograms of 161,352 patients, with the reports of the machines.

    FOLDER/record_list.csv              subject_id, study_id, file_name, ecg_time, path
    FOLDER/machine_measurements.csv     subject_id, study_id, …, report_0 … report_17, …
    FOLDER/files/p1000/p10000032/s40689238/40689238.hea, .dat       500 Hz

Gow et al. 2023, https://physionet.org/content/mimic-iv-ecg/ (Open Database License 1.0). Patients are divided by a hash
of their number: do not mix with MIMIC-CXR's own division of the same patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.data_prep.source import Grouped, Item, Row, folder_there, numbered
from mmcontrast.data_prep.table import whole_table
from mmcontrast.data_prep.wfdb_record import recording, wfdb_there
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample
from mmcontrast.tables import Cells

LINES = tuple(f"report_{number}" for number in range(18))


@dataclass(frozen=True)
class Record:
    """A line of record_list.csv, and what the machine said of it."""

    number: int
    subject: str
    study: str
    time: str
    path: Path
    report: str


@dataclass(frozen=True, kw_only=True)
class MIMICECG(Grouped):
    """MIMIC-IV-ECG: electrocardiograms with the machine's reports (the extra [ecg]).

    A sample is a recording of ten seconds (`npy`, twelve leads as recorded, with their scale), its report (`txt`), and
    metadata: `patient`, whose recordings are in one split; `study`; `time`, shifted as MIMIC shifts all of them.
    """

    folder: Path
    """Where record_list.csv is."""
    min_words: int = 4
    """Reports with fewer words are refused: they hardly say anything (Liu et al. 2024, arXiv:2403.06659)."""

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {
            "source": "MIMIC-IV-ECG",
            "licence": "ODbL 1.0",
            "paper": "https://doi.org/10.13026/4nqg-sb35",
        }

    def rows(self) -> Sequence[Row]:
        """One per recording."""
        records = read_records(self.folder)
        return numbered((f"row {record.number}, study {record.study}", record) for record in records)

    def encode(self, row: Row) -> Sequence[Item]:
        """A recording with its report."""
        record: Record = row.data
        if not record.subject:
            raise BadSample("no subject_id, which decides its split")
        if len(record.report.split()) < self.min_words:
            raise BadSample(f"report has fewer than {self.min_words} words" if record.report else "no report")
        members, signal = recording(record.path)
        meta = {"patient": record.subject, "study": record.study, "time": record.time, **signal}
        sample = Sample(f"{row.number:08d}", {**members, "txt": record.report, "json": meta})
        return [Item(self.split_of(f"patient {record.subject}"), sample)]


def read_records(folder: Path) -> list[Record]:
    """All recordings with their reports.

    Raises:
        ConfigError: the tables are not there, or wfdb is not installed.
    """
    columns = ("subject_id", "study_id", "ecg_time", "path")
    table = whole_table(folder_there(folder) / "record_list.csv", columns)
    said = whole_table(folder / "machine_measurements.csv", ("study_id", "report_0"))
    reports = {str(cells["study_id"]): _joined(cells) for _, cells in said}
    wfdb_there()
    return [
        Record(
            number=number,
            subject=str(cells["subject_id"] or ""),
            study=str(cells["study_id"]),
            time=str(cells["ecg_time"]),
            path=folder / str(cells["path"]),
            report=reports.get(str(cells["study_id"]), ""),
        )
        for number, cells in table
    ]


def _joined(cells: Cells) -> str:
    """The lines of a report as one text."""
    return ", ".join(line for name in LINES if (line := " ".join(str(cells.get(name) or "").split()).strip(" .")))
