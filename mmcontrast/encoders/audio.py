"""Audio towers: log-mel spectra on the device, and a compact convolutional network or a transformer over them.

Sounds cross the worker queue as samples at the tower's rate, padded to one length, beside their true length. What is
padded is masked everywhere, so a sound's embedding does not depend on how much of it is padding. Letters: B rows,
S samples, F frames, M mel bands, C width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError
from mmcontrast.decode import Sound, audio_from
from mmcontrast.encoders.base import Encoder, Transform
from mmcontrast.encoders.frames import FrameConvNet, FrameTransformer, masked_mean, sines

_FLOOR = 1e-6  # power below which a band counts as silent; -120 dB of a full-scale tone's order


Padding = Literal["zero", "repeat", "repeatpad"]


class AudioTransform(Transform):
    """Sound -> samples [S] at the tower's rate and how many of them are sound, by a crop that alone is decoded."""

    kind = "audio"

    def __init__(self, rate: int, seconds: float, pad: Padding, *, train: bool) -> None:
        """A crop of `seconds` at random in training, in the middle otherwise; shorter sounds are padded."""
        self.rate, self.seconds, self.train = rate, seconds, train
        self.pad: Padding = pad
        self.length = round(seconds * rate)

    def __call__(self, value: Any) -> dict[str, Tensor]:
        """Anything that `decode.audio_from` takes -> samples float32 [S], length int64 []."""
        return self.begin(value)()

    def begin(self, value: Any) -> Callable[[], dict[str, Tensor]]:
        """Draw the crop."""
        sound = audio_from(value)
        wanted = min(round(self.seconds * sound.rate), sound.frames)
        spare = sound.frames - wanted
        start = int(torch.randint(spare + 1, ())) if self.train and spare else spare // 2
        return partial(self._crop, sound, start, wanted)

    def _crop(self, sound: Sound, start: int, wanted: int) -> dict[str, Tensor]:
        samples = padded(self.resampled(sound, start, wanted)[: self.length], self.length, self.pad)
        length = len(samples)
        samples = nn.functional.pad(samples, (0, self.length - length))
        return {"samples": samples, "length": torch.tensor(length)}

    def resampled(self, sound: Sound, start: int, frames: int) -> Tensor:
        """A part of a sound at the tower's rate."""
        samples = sound.read(start, frames)
        if sound.rate != self.rate:
            from torchaudio.functional import resample

            samples = resample(samples, sound.rate, self.rate)
        return samples

    def cut(self, value: Any, made: Any) -> bool:
        """Whether the sound is longer than the crop."""
        sound = audio_from(value)
        return sound.frames > round(self.seconds * sound.rate)

    def collate(self, values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """-> samples [B, S], length [B]."""
        return {name: torch.stack([v[name] for v in values]) for name in ("samples", "length")}


def padded(samples: Tensor, length: int, pad: Padding) -> Tensor:
    """[S] -> as much of `length` as is filled with copies: nothing more, all of it, or as many whole ones as fit."""
    if pad == "zero" or len(samples) >= length:
        return samples
    if pad == "repeatpad":
        return samples.repeat(length // len(samples))
    return samples.repeat(-(-length // len(samples)))[:length]


class AudioEncoder(Encoder):
    """Crop, rate and padding that all audio towers share."""

    kind = "audio"

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Settings that every audio tower has."""

        sample_rate: int = 16_000
        """Samples per second that the tower works at; sounds of another rate are resampled."""
        seconds: float = 10.0
        """Longest part of a sound that the tower hears: a random one in training, the middle otherwise."""
        pad: Padding = "zero"
        """Shorter sounds are followed by silence, which is masked; or repeated to the end; or repeated as often as they
        fit whole, with silence behind ("repeatpad", as CLAP has it)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.sample_rate < 1000 or config.seconds * config.sample_rate < 1:
            raise ConfigError(
                f"sample_rate {config.sample_rate} and seconds {config.seconds} leave no sound; use at least 1000 and "
                "some tenths of a second"
            )
        self.audio_config = config

    def transform(self, *, train: bool) -> AudioTransform:
        """A random crop in training, the middle otherwise."""
        c = self.audio_config
        return AudioTransform(c.sample_rate, c.seconds, c.pad, train=train)

    def example(self) -> dict[str, Tensor]:
        """Silence."""
        device = next(self.parameters()).device
        length = self.transform(train=False).length
        return {
            "samples": torch.zeros(1, length, device=device),
            "length": torch.full((1,), length, dtype=torch.int64, device=device),
        }


class LogMel(nn.Module):
    """Samples -> the logarithm of their power in M mel bands, every 10 ms from windows of 25 ms.

    Each sound is brought to mean 0 and deviation 1 over its own frames and bands: loudness and the microphone's
    level say nothing, and no statistics of a data set are needed.
    """

    def __init__(self, rate: int, mels: int) -> None:
        super().__init__()
        from torchaudio.transforms import MelSpectrogram

        window, self.hop = round(0.025 * rate), round(0.010 * rate)
        top = 2595 * math.log10(1 + rate / 2 / 700)  # of the mel scale (HTK's)
        lowest = 700 * (10 ** (2 * top / (mels + 1) / 2595) - 1)  # width of the lowest band in Hz
        size = 1 << (window - 1).bit_length()
        while rate / size >= lowest:  # or else the band would lie between two frequencies and be empty
            size *= 2
        self.spectrum = MelSpectrogram(
            rate, n_fft=size, win_length=window, hop_length=self.hop, n_mels=mels, center=True, pad_mode="constant"
        )

    def forward(self, samples: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S], [B] -> spectra [B, F, M], zero where there is no sound, and which frames are sound, [B, F]."""
        with torch.autocast(samples.device.type, enabled=False):  # half precision would lose quiet bands
            x = (self.spectrum(samples.float()) + _FLOOR).log().transpose(1, 2)
        frames = torch.arange(x.shape[1], device=x.device)
        mask = frames * self.hop < length[:, None]
        cells = mask[:, :, None].to(x.dtype)
        count = cells.sum((1, 2), keepdim=True).clamp(min=1) * x.shape[2]
        mean = (x * cells).sum((1, 2), keepdim=True) / count
        variance = ((x - mean).square() * cells).sum((1, 2), keepdim=True) / count
        return (x - mean) * (variance + 1e-5).rsqrt() * cells, mask


class MelEncoder(AudioEncoder):
    """Log-mel front end and its augmentation, which towers that are trained from scratch share."""

    @dataclass(kw_only=True)
    class Config(AudioEncoder.Config):
        """Settings of the front end."""

        mels: int = 64
        """M, mel bands."""
        time_mask: float = 0.0
        """SpecAugment: largest share of the frames that training silences in one piece."""
        mel_mask: float = 0.0
        """SpecAugment: largest share of the bands that training silences in one piece."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.mels < 1:
            raise ConfigError(f"mels is {config.mels}; it must be at least 1")
        if not (0 <= config.time_mask < 1 and 0 <= config.mel_mask < 1):
            raise ConfigError(
                f"time_mask {config.time_mask} and mel_mask {config.mel_mask} must be in 0..1 (without 1)"
            )
        self.mel_config = config
        self.front = LogMel(config.sample_rate, config.mels)

    def spectra(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Samples [B, S], length [B] -> [B, F, M] zero where there is no sound, which frames are sound, [B, F].

        In training one piece of time and one of the bands become 0, each sound's mean (SpecAugment, Park et al. 2019,
        arXiv:1904.08779, without its time warp). The draws are torch's, which the gradient cache repeats.
        """
        frames, mask = self.front(x["samples"], x["length"])
        if self.training and self.mel_config.time_mask:
            frames = frames * _kept(mask.sum(1), frames.shape[1], self.mel_config.time_mask)[:, :, None]
        if self.training and self.mel_config.mel_mask:
            bands = torch.full_like(x["length"], frames.shape[2])
            frames = frames * _kept(bands, frames.shape[2], self.mel_config.mel_mask)[:, None]
        return frames, mask


def _kept(counts: Tensor, most: int, share: float) -> Tensor:
    """[B], of which `most` is the largest -> [B, most] bool: all but a piece of up to `share` of each row's count."""
    width = torch.rand(len(counts), device=counts.device) * share * counts
    first = torch.rand(len(counts), device=counts.device) * (counts - width)
    at = torch.arange(most, device=counts.device)
    return (at < first[:, None]) | (at >= (first + width)[:, None])


class MelConvNet(MelEncoder):
    """A small convolutional network over time, on log-mel frames, trained from scratch.

    Two strided convolutions bring 10 ms frames to 40 ms; then blocks (`frames.FrameConvNet`).
    """

    @dataclass(kw_only=True)
    class Config(MelEncoder.Config):
        """Settings of the network."""

        width: int = 192
        """C."""
        layers: int = 4
        """Blocks."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        for name in ("width", "layers"):
            if getattr(config, name) < 1:
                raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least 1")
        self.net = FrameConvNet(config.mels, (config.width, config.width), (0, config.layers))
        self.dim = config.width
        self.finish(config, pretrained=False)

    def forward(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Samples [B, S], length [B] -> their frames' mean [B, C], the frames [B, F / 4, C], zero where padded."""
        tokens, mask = self.net(*self.spectra(x))
        return masked_mean(tokens, mask), tokens


class MelTransformer(MelEncoder):
    """A transformer over patches of log-mel spectra (AST, Gong et al. 2021, arXiv:2104.01778), trained from scratch.

    Unlike AST's, patches do not overlap, positions are sines of time beside a learned vector per band, and the patches'
    mean is pooled: so the length of a sound may vary, and padding is masked.
    """

    @dataclass(kw_only=True)
    class Config(MelEncoder.Config):
        """Settings of the transformer."""

        patch: int = 16
        """Side of a patch, in bands and in frames of 10 ms; must divide `mels`."""
        width: int = 192
        """C."""
        layers: int = 6
        """Blocks."""
        heads: int = 3
        """Attention heads; must divide width."""
        dropout: float = 0.0
        """Share of the activations that training leaves out."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        if config.patch < 1 or config.mels % config.patch or config.layers < 1 or config.width % config.heads:
            raise ConfigError(
                f"patch {config.patch} must divide mels {config.mels}, heads {config.heads} must divide width "
                f"{config.width}, and there must be at least one layer"
            )
        self.embed = nn.Conv2d(1, config.width, config.patch, stride=config.patch)
        self.bands = nn.Parameter(torch.randn(config.mels // config.patch, config.width) * 0.02)
        self.net = FrameTransformer(config.width, config.layers, config.heads, config.dropout)
        self.patch, self.dim = config.patch, config.width
        self.finish(config, pretrained=False)

    def forward(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Samples [B, S], length [B] -> the patches' mean [B, C], the patches [B, T, C], zero where padded."""
        frames, mask = self.spectra(x)
        frames = nn.functional.pad(frames, (0, 0, 0, -frames.shape[1] % self.patch))
        patches = self.embed(frames[:, None])  # [B, C, F / patch, M / patch]
        time = sines(patches.shape[2], patches.shape[1]).to(patches)
        tokens = patches.permute(0, 2, 3, 1) + time[:, None] + self.bands.to(patches)
        mask = mask[:, :: self.patch, None].expand(tokens.shape[:3]).flatten(1)
        tokens = self.net(tokens.flatten(1, 2), mask)
        return masked_mean(tokens, mask), tokens
