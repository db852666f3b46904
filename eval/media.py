"""Samples as pieces of a page: pictures, sounds and signals are read again and drawn anew, in bounded bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcontrast.decode import Picture, Sound
from mmcontrast.eval.sources import Source
from mmcontrast.page import Html, Node, picture, sound, tag, traces, waveform
from mmcontrast.shards import BadSample
from mmcontrast.signals import Signal

_SIDE = 176  # pixels of a picture
_SAID = 220  # characters of a text
_HEARD = 3.0  # seconds of a sound
_RATE = 16_000  # samples per second above which it is thinned
_SEEN = 20.0  # seconds of a signal
_POINTS = 200  # of a channel
_VALUES = 1 << 20  # of a signal, all channels together
_SOUNDS = 8 << 20  # bytes of all players of a page; after that, waveforms alone
_CACHED = 2000


class Media:
    """Draws samples of one data set.

    Without a source, since the data are gone or others now, items are named by their place.
    """

    def __init__(self, source: Source | None, kinds: Mapping[str, str]) -> None:
        self.source, self.kinds = source, kinds
        self._room = Room()
        self._drawn: dict[tuple[str, int, int], Html] = {}

    def draw(self, modality: str, item: Sequence[int]) -> Node:
        """One value of a sample: (position of the sample, which of its values)."""
        position, part = int(item[0]), int(item[1])
        at = (modality, position, part)
        if at not in self._drawn:
            made = self._draw(modality, position, part)
            if len(self._drawn) >= _CACHED:
                return made
            self._drawn[at] = made
        return self._drawn[at]

    def key(self, item: Sequence[int]) -> str:
        """The sample's name."""
        position = int(item[0])
        if self.source is None or not 0 <= position < len(self.source):
            return f"sample {position}"
        return self.source.name(position)[1]

    def said(self, modality: str, item: Sequence[int]) -> str:
        """A text as it is, anything else by the sample's name."""
        if self.kinds.get(modality) == "text" and (value := self._value(modality, *item)) is not None:
            return _cut(str(value))
        return self.key(item)

    def _value(self, modality: str, position: int, part: int) -> Any:
        if self.source is None or not 0 <= position < len(self.source):
            return None
        try:
            values = self.source.values(position, modality, self.kinds.get(modality, modality))
        except (BadSample, OSError):
            return None
        return values[part] if 0 <= part < len(values) else None

    def _draw(self, modality: str, position: int, part: int) -> Html:
        value = self._value(modality, position, part)
        name = self.key([position, part])
        if value is None:
            return tag("div", f"{name} ({modality})", class_="absent")
        return drawn(lambda: value, name, self._room)


class Room:
    """Bytes that the players of one page may take; a sound that finds none left is a waveform alone."""

    def __init__(self) -> None:
        self._left = _SOUNDS

    def holds(self, sound: Sound) -> bool:
        """Whether it has a player."""
        # Two bytes a sample, and a third for base64.
        self._left -= round(8 / 3 * min(sound.frames / sound.rate, _HEARD) * min(sound.rate, _RATE))
        return self._left >= 0


def drawn(read: Callable[[], Any], name: str, room: Room) -> Html:
    """A value of a sample as a piece of a page, called `name`; or that it cannot be shown.

    Args:
        read: decodes it.
        name: of the sample.
        room: of the page.
    """
    try:
        return _drawn(read(), name, room)
    except Exception as error:  # of any decoder: no single sample may cost the page
        return tag("div", f"{name}: cannot be shown ({type(error).__name__})", class_="bad")


def _drawn(value: Any, name: str, room: Room) -> Html:
    if isinstance(value, Picture):
        return picture(value.read().permute(1, 2, 0).numpy(), alt=name, side=_SIDE)
    if isinstance(value, Sound):
        samples, rate = _heard(value)
        length = tag("div", f"{value.frames / value.rate:.3g} s", class_="quiet")
        return Html((sound(samples, rate) if room.holds(value) else waveform(samples)) + length)
    if isinstance(value, Signal):
        frames = min(value.frames, round(_SEEN * value.rate), max(1, _VALUES // max(1, len(value.channels))))
        shown = traces(value.read(0, frames).numpy(), names=value.channels, points=_POINTS)
        length = f"{value.frames / value.rate:.3g} s, {len(value.channels)} channels"
        return Html(shown + tag("div", length, class_="quiet"))
    return tag("div", _cut(str(value)), class_="said")


def _heard(value: Sound) -> tuple[NDArray[np.float32], int]:
    """The beginning, [T], at a rate that is enough to know it by."""
    samples = value.read(0, min(value.frames, round(_HEARD * value.rate))).numpy()
    thin = -(-value.rate // _RATE)
    samples = samples[: len(samples) // thin * thin].reshape(-1, thin).mean(1)
    return samples.astype(np.float32), value.rate // thin


def _cut(text: str) -> str:
    return text if len(text) <= _SAID else text[:_SAID] + "…"
