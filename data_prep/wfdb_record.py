"""Recordings in the format of PhysioNet (WFDB: a .hea file with the .dat files that it names) -> members of shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.source import signal_member
from mmcontrast.shards import BadSample

_NAMES = {name.upper(): name for name in ("aVR", "aVL", "aVF")}


def wfdb_there() -> None:
    """Look for the library before rows are encoded.

    Raises:
        ConfigError: the extra [ecg] is not installed.
    """
    try:
        import wfdb  # pyright: ignore[reportUnusedImport]  # noqa: F401
    except ImportError:
        raise ConfigError("recordings are read by wfdb: pip install 'mmcontrast[ecg]'") from None


def recording(path: Path) -> tuple[dict[str, bytes], Mapping[str, Any]]:
    """A record -> its `npy` member, and the metadata that give its numbers their meaning.

    Whole numbers stay as they were recorded, with `scale`, where one gain holds for all channels; otherwise they
    become physical values. Leads are spelt aVR, aVL and aVF in all corpora.

    Args:
        path: the record without extension.

    Raises:
        BadSample: it cannot be decoded, values of it are missing, or it never moves.
        OSError: it cannot be read.
    """
    import wfdb

    try:
        record: Any = wfdb.rdrecord(str(path), physical=False)
        physical = record.dac()
    except OSError:
        raise
    except Exception as error:  # wfdb raises many kinds on damaged files; none may stop a preparation
        raise BadSample(f"recording cannot be decoded ({type(error).__name__})") from None
    if physical.size and not np.ptp(physical):
        raise BadSample("signal is flat")
    gains, units = set(record.adc_gain), set(record.units)
    meta: dict[str, Any] = {
        "rate": record.fs,
        "channels": [_NAMES.get(name.upper(), name) for name in record.sig_name],
        "units": record.units[0] if len(units) == 1 else list(record.units),
    }
    stored = physical  # where a value is missing, only this says so
    if len(gains) == 1 and not any(record.baseline) and np.isfinite(physical).all():
        stored = record.d_signal.astype(np.int64)
        if np.abs(stored).max(initial=0) < 1 << 15:
            meta["scale"] = 1 / gains.pop()
        else:
            stored = physical
    return signal_member(stored), meta
