"""Simulated electrocardiograms with reports -> shards, for trying out what real ones are for.

Twelve classes of rhythm and conduction (`ecg_simulator`), under the codes and descriptions of PTB-XL, so that recipes
and evaluations move from these to those as they are. They prove the plumbing only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.ecg_simulator import CLASSES, LEADS, record
from mmcontrast.data_prep.source import Grouped, Item, Row, numbered, signal_member
from mmcontrast.shard_writer import Sample

DESCRIPTIONS = {
    "NORM": "normal ECG",
    "SBRAD": "sinus bradycardia",
    "STACH": "sinus tachycardia",
    "1AVB": "first degree AV block",
    "AFIB": "atrial fibrillation",
    "AFLT": "atrial flutter",
    "3AVB": "third degree AV block",
    "PVC": "ventricular premature complex",
    "CLBBB": "complete left bundle branch block",
    "CRBBB": "complete right bundle branch block",
    "LVH": "left ventricular hypertrophy",
    "IMI": "inferior myocardial infarction",
}
_RHYTHMS = ("SBRAD", "STACH", "AFIB", "AFLT", "3AVB")  # the others are found beside a sinus rhythm
_SCALE = 0.001  # millivolts; stored are whole microvolts
_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class SimulatedECG(Grouped):
    """Electrocardiograms of a simulator, with their reports: for trying things out.

    A model that was trained on them knows nothing of real ones. A sample is a recording of ten seconds (`npy`, twelve
    leads in microvolts), a report (`txt`), and metadata: `label`, the class's description; `scp`, its code; `patient`,
    who has two recordings; `heart_rate`.
    """

    patients: int = 1_200
    """Patients, an equal number of each of the twelve classes."""
    rate: Literal[100, 500] = 500
    """Samples per second."""
    seed: int = 0
    """Of everything that is drawn."""
    test: float = 0.2

    def about(self, split: str) -> Mapping[str, Any]:
        """That it is simulated, and what the channels are."""
        return {
            "source": "simulated ECG",
            "licence": "CC0-1.0",
            "rate": self.rate,
            "channels": LEADS,
            "units": "mV",
            "scale": _SCALE,
        }

    def rows(self) -> Sequence[Row]:
        """Two per patient."""
        if self.patients < len(CLASSES):
            raise ConfigError(f"patients is {self.patients}; there are {len(CLASSES)} classes, each of which needs one")
        codes = list(CLASSES)
        return numbered(
            (f"patient {patient}, recording {take}", (codes[patient % len(codes)], patient, take))
            for patient in range(self.patients)
            for take in range(2)
        )

    def encode(self, row: Row) -> Sequence[Item]:
        """A recording with its report."""
        code, patient, take = row.data
        values, beats = record(code, patient, take, rate=self.rate, seconds=_SECONDS, seed=self.seed)
        stored = np.round(values / _SCALE).astype(np.int64)
        words = np.random.default_rng([self.seed, patient, take, 1])
        meta = {
            "label": DESCRIPTIONS[code],
            "scp": code,
            "patient": patient,
            "heart_rate": round(beats),
            "rate": self.rate,
            "channels": list(LEADS),
            "units": "mV",
            "scale": _SCALE,
        }
        members = {**signal_member(stored), "txt": _report(code, beats, words), "json": meta}
        return [Item(self.split_of(f"patient {patient}"), Sample(f"{row.number:06d}", members))]


def _report(code: str, beats: float, draw: np.random.Generator) -> str:
    """What a reader would dictate, in one of several ways."""
    rhythm = DESCRIPTIONS[code] if code in _RHYTHMS else "sinus rhythm"
    rate = ("", f", rate {beats:.0f}", f" at {beats:.0f} beats per minute")[draw.integers(3)]
    if code in _RHYTHMS:
        return f"{rhythm}{rate}."
    finding = "normal ECG" if code == "NORM" else DESCRIPTIONS[code]
    lead = ("{}.", "findings: {}.", "consistent with {}.")[draw.integers(3) if code != "NORM" else 0]
    parts = [f"{rhythm}{rate}.", lead.format(finding)]
    return " ".join(parts if draw.integers(2) else parts[::-1])
