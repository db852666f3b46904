"""Electrocardiograms from a moving dipole: what makes the classes of `ecg` differ, and nothing more.

The heart is a dipole in the body's frame (x to the left, y down, z to the back). Each wave of a beat is a Gaussian in
time along one direction (Sameni et al. 2007, doi:10.1155/2007/43407, by which P, QRS and T are Gaussians of the phase;
here of the time), and the leads are its projections by Dower's matrix (Dower et al. 1980), so that they agree with each
other as measured ones do: II = I + III, and the augmented ones follow. Shapes, rates and intervals lie where textbooks
have them; nothing was fitted to recordings, and a model that was trained on these knows nothing of real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Vector = tuple[float, float, float]
"""Millivolts to the left, down and to the back."""

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
# Rows: I, II, V1 … V6.
_DOWER = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)


@dataclass(frozen=True)
class Wave:
    """A Gaussian: its middle in seconds from the R wave, its standard deviation in seconds, and its peak."""

    at: float
    width: float
    peak: Vector


P = Wave(0.0, 0.020, (0.06, 0.10, -0.01))
NORMAL = (
    Wave(-0.035, 0.009, (-0.12, 0.0, -0.18)),
    Wave(0.0, 0.012, (0.95, 0.80, 0.35)),
    Wave(0.035, 0.010, (-0.15, -0.15, 0.35)),
)
T = Wave(0.30, 0.050, (0.30, 0.22, -0.18))
LEFT_BLOCK = (
    Wave(-0.030, 0.022, (0.70, 0.30, 0.60)),
    Wave(0.035, 0.026, (0.90, 0.25, 0.90)),
)
RIGHT_BLOCK = (*NORMAL[:2], Wave(0.060, 0.022, (-0.55, 0.05, -0.60)))
ECTOPIC = (Wave(-0.02, 0.034, (-0.9, -0.9, -0.3)), Wave(0.05, 0.030, (-0.5, -0.7, 0.5)))
ESCAPE = (Wave(-0.02, 0.030, (0.6, -0.7, 0.8)), Wave(0.05, 0.030, (0.5, -0.6, 0.7)))


@dataclass(frozen=True)
class Beat:
    """A beat of the ventricles: when its R wave peaks, its waves, and its T wave."""

    at: float
    waves: Sequence[Wave]
    recovery: Wave


@dataclass(frozen=True)
class Rhythm:
    """Beats of the ventricles and of the atria, and what the atria do between them, in millivolts [T, 3]."""

    beats: Sequence[Beat]
    atria: Sequence[float] = ()
    between: Callable[[Floats], Floats] | None = None


Draw = np.random.Generator
Simulate = Callable[[Draw, float], Rhythm]


def record(code: str, patient: int, take: int, *, rate: int, seconds: float, seed: int) -> tuple[Floats, float]:
    """A recording of a class, [T, 12] in millivolts, and its beats per minute. A pure function of what is given.

    Args:
        code: one of `CLASSES`.
        patient: decides the axis, size and width of the waves.
        take: of the patient's recordings.
        rate: samples per second.
        seconds: length.
        seed: of everything.
    """
    body, moment = np.random.default_rng([seed, patient]), np.random.default_rng([seed, patient, take])
    turn, size, slow = _rotation(body.normal(0, 0.18, 3)), float(np.exp(body.normal(0, 0.15))), body.uniform(0.9, 1.1)
    rhythm = CLASSES[code](moment, seconds)
    time = np.arange(round(seconds * rate)) / rate
    waves = [(beat.at + w.at * slow, w.width * slow, w.peak) for beat in rhythm.beats for w in beat.waves]
    waves += [(beat.at + beat.recovery.at, beat.recovery.width * slow, beat.recovery.peak) for beat in rhythm.beats]
    waves += [(at, P.width * slow, P.peak) for at in rhythm.atria]
    dipole = np.zeros((len(time), 3))
    for at, width, peak in waves:
        dipole += np.exp(-0.5 * ((time - at) / width) ** 2)[:, None] * np.array(peak)
    if rhythm.between is not None:
        dipole += rhythm.between(time)
    eight = (size * dipole @ turn.T) @ _DOWER.T
    eight += _noise(moment, time, rate)
    one, two = eight[:, 0], eight[:, 1]
    limbs = np.stack([one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2], axis=1)
    beats = [beat.at for beat in rhythm.beats if 0 <= beat.at < seconds]
    per_minute = 60 * (len(beats) - 1) / (beats[-1] - beats[0]) if len(beats) > 1 else 60 * len(beats) / seconds
    return np.concatenate([limbs, eight[:, 2:]], axis=1), per_minute


def _rotation(angles: Floats) -> Floats:
    """A turn about x, y and z by angles in radians."""
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn


def _noise(draw: Draw, time: Floats, rate: int) -> Floats:
    """Breathing and electrodes move the baseline, muscles add noise, the mains hum: [T, 8]."""
    baseline = sum(
        draw.normal(0, 0.04, 8) * np.sin(2 * np.pi * (f * time[:, None] + draw.uniform(0, 1, 8)))
        for f in draw.uniform(0.05, 0.4, 3)
    )
    hum = draw.uniform(0, 0.01) * np.sin(2 * np.pi * 50 * time)[:, None] if rate > 100 else 0.0
    return baseline + hum + draw.normal(0, draw.uniform(0.005, 0.02), (len(time), 8))


def _intervals(draw: Draw, seconds: float, per_minute: float, variation: float) -> list[float]:
    """Times of beats from before the start to behind the end; they vary with the breath, and a little at random."""
    times, breath = [-draw.uniform(0.2, 1.0) * 60 / per_minute - 1], draw.uniform(0.2, 0.3)
    while times[-1] < seconds + 1:
        swing = np.sin(2 * np.pi * breath * times[-1]) * variation + draw.normal(0, variation / 2)
        times.append(times[-1] + 60 / per_minute * float(np.exp(swing)))
    return times


def _recovery(interval: float, wave: Wave = T) -> Wave:
    """The T wave comes sooner when beats do (Bazett's square root)."""
    return replace(wave, at=float(np.clip(wave.at * np.sqrt(interval / 0.85), 0.16, 0.42)))


def _sinus(
    low: float,
    high: float,
    waves: Sequence[Wave] = NORMAL,
    recovery: Wave = T,
    conduction: tuple[float, float] = (0.13, 0.18),
) -> Simulate:
    """Sinus rhythm of `low` to `high` beats per minute; P comes `conduction` seconds before R."""

    def simulate(draw: Draw, seconds: float) -> Rhythm:
        per_minute = draw.uniform(low, high)
        times = _intervals(draw, seconds, per_minute, 0.03)
        delay = draw.uniform(*conduction)
        wave = _recovery(60 / per_minute, recovery)
        return Rhythm([Beat(t, waves, wave) for t in times], [t - delay for t in times])

    return simulate


def _fibrillation(draw: Draw, seconds: float) -> Rhythm:
    """No P waves: quick small ones, and beats without any order."""
    per_minute, times = draw.uniform(65, 140), [-1.0]
    while times[-1] < seconds + 1:
        times.append(times[-1] + max(0.3, 60 / per_minute * float(np.exp(draw.normal(0, 0.22)))))
    sizes, rates = draw.uniform(0.015, 0.05, 5), draw.uniform(5, 9, 5)
    phases = draw.uniform(0, 2 * np.pi, 5)

    def between(time: Floats) -> Floats:
        ripple = (sizes * np.sin(2 * np.pi * rates * time[:, None] + phases)).sum(1)
        return ripple[:, None] * np.array([0.2, 0.5, -0.9])

    gaps = np.diff(times, append=times[-1] + 60 / per_minute)
    return Rhythm([Beat(t, NORMAL, _recovery(float(g))) for t, g in zip(times, gaps, strict=True)], (), between)


def _flutter(draw: Draw, seconds: float) -> Rhythm:
    """The atria saw at about 300 per minute, best seen below; every second to fourth of their beats is conducted."""
    cycle, ratio = 60 / draw.uniform(260, 320), int(draw.integers(2, 5))
    times = list(np.arange(-1, seconds + 1, ratio * cycle) + draw.uniform(0, cycle))

    def between(time: Floats) -> Floats:
        saw = 1 - 2 * (((time - times[0]) / cycle) % 1)
        return 0.14 * saw[:, None] * np.array([-0.1, 1.0, -0.3])

    return Rhythm([Beat(t, NORMAL, _recovery(ratio * cycle)) for t in times], (), between)


def _dissociation(draw: Draw, seconds: float) -> Rhythm:
    """The atria beat at their rate, the ventricles, wide and slow, at theirs."""
    slow = draw.uniform(30, 45)
    times = _intervals(draw, seconds, slow, 0.01)
    wave = replace(_recovery(60 / slow), peak=(-0.25, 0.3, -0.3), width=0.07)
    return Rhythm([Beat(t, ESCAPE, wave) for t in times], _intervals(draw, seconds, draw.uniform(65, 100), 0.03))


def _extrasystoles(draw: Draw, seconds: float) -> Rhythm:
    """Sinus rhythm in which some beats come early, wide and without a P wave, and a pause follows them."""
    per_minute = draw.uniform(60, 95)
    interval, times = 60 / per_minute, _intervals(draw, seconds, per_minute, 0.02)
    delay, often = draw.uniform(0.13, 0.18), draw.uniform(0.15, 0.35)
    early = [False, *(bool(x) for x in draw.random(len(times) - 1) < often)]
    early = [e and not before for e, before in zip(early, [False, *early], strict=False)]
    if not any(e and 1 < t < seconds - 1 for e, t in zip(early, times, strict=True)):
        early[len(times) // 2] = True
        early[len(times) // 2 + 1] = early[len(times) // 2 - 1] = False
    against = replace(_recovery(interval), peak=(0.5, 0.5, 0.2), width=0.06)
    beats = [
        Beat(t - 0.35 * interval, ECTOPIC, against) if e else Beat(t, NORMAL, _recovery(interval))
        for t, e in zip(times, early, strict=True)
    ]
    return Rhythm(beats, [t - delay for t, e in zip(times, early, strict=True) if not e])


CLASSES: Mapping[str, Simulate] = {
    "NORM": _sinus(60, 95),
    "SBRAD": _sinus(36, 52),
    "STACH": _sinus(108, 150, conduction=(0.11, 0.14)),
    "1AVB": _sinus(55, 85, conduction=(0.26, 0.34)),
    "AFIB": _fibrillation,
    "AFLT": _flutter,
    "3AVB": _dissociation,
    "PVC": _extrasystoles,
    "CLBBB": _sinus(60, 95, LEFT_BLOCK, replace(T, peak=(-0.35, -0.10, -0.45), at=0.33)),
    "CRBBB": _sinus(60, 95, RIGHT_BLOCK, replace(T, peak=(0.30, 0.20, 0.15), at=0.32)),
    "LVH": _sinus(
        60, 95, (NORMAL[0], Wave(0.0, 0.014, (2.3, 1.0, 1.3)), NORMAL[2]), replace(T, peak=(-0.25, -0.05, -0.25))
    ),
    "IMI": _sinus(
        60,
        95,
        (Wave(-0.030, 0.014, (-0.05, -0.40, -0.10)), Wave(0.005, 0.012, (0.90, 0.35, 0.35)), NORMAL[2],
         Wave(0.13, 0.045, (-0.08, 0.30, 0.05))),
        replace(T, peak=(0.25, 0.25, -0.15)),
    ),
}  # fmt: skip
"""Code of PTB-XL's statements -> what simulates it."""
