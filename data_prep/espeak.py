"""Words -> speech, by the library of eSpeak NG that the package espeakng-loader brings (GPL-3)."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError

_RETRIEVAL = 1  # samples are handed over, not played
_CHARACTERS = 1  # where to begin and end is counted in these
_UTF8 = 1

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Speaker:
    """The library, of which a process has one: `speaker()` gives it.

    Attributes:
        rate: samples per second of what is spoken.
    """

    def __init__(self) -> None:
        """Load the library and its data.

        Raises:
            ConfigError: they are not installed.
        """
        try:
            import espeakng_loader
        except ImportError:
            raise ConfigError("eSpeak is not installed: pip install 'mmcontrast[speech]'") from None
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = int(self._library.espeak_Initialize(_RETRIEVAL, 0, espeakng_loader.get_data_path().encode(), 0))
        if self.rate <= 0:
            raise ConfigError("eSpeak's data cannot be read; install espeakng-loader again")
        self._parts: list[NDArray[np.int16]] = []
        self._callback = _Callback(self._hear)  # kept, since the library keeps only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples: Any, count: int, _events: Any) -> int:
        if count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str) -> NDArray[np.int16]:
        """Speech [T], mono.

        Args:
            text: what to say.
            voice: a language such as `en-us`, with a variant of speaker such as `en-us+f2`.

        Raises:
            ConfigError: there is no such voice.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise ConfigError(f"eSpeak has no voice {voice!r}")
        self._parts.clear()
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, _CHARACTERS, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.int16)


@cache
def speaker() -> Speaker:
    """The speaker of this process."""
    return Speaker()
