"""Time-series towers: ECG, accelerometers, any recording of several channels.

A signal is resampled to the tower's rate, its channels are put in the tower's order by their names, and what is absent,
a channel or time beyond the end, is masked, so that it changes nothing. Letters: B rows, C channels, S samples,
F frames, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError
from mmcontrast.encoders.base import Encoder, Transform
from mmcontrast.encoders.frames import FrameConvNet, FrameTransformer, masked_mean, sines
from mmcontrast.encoders.warp import Warp, take
from mmcontrast.shards import BadSample
from mmcontrast.signals import Signal, signal_from


@dataclass(frozen=True)
class _Drawn:
    """The random part of one sample's augmentation; None changes nothing."""

    places: Tensor | None = None  # [S]
    gain: Tensor | None = None  # [C, 1]
    noise: Tensor | None = None  # [C, S]
    cut: tuple[float, float] | None = None  # from and to, as shares of the length
    dropped: Tensor | None = None  # [C]


class SignalTransform(Transform):
    """Signal -> samples [C, S] at the tower's rate, how many of them are there, and which channels are."""

    kind = "timeseries"

    def __init__(self, config: SignalEncoder.Config, *, train: bool) -> None:
        """A window at random in training, in the middle otherwise; shorter signals are followed by zeros."""
        self.config, self.train = config, train
        self.length = round(config.seconds * config.rate)
        self.warp: Warp = config.warp.build()

    def __call__(self, value: Any) -> dict[str, Tensor]:
        """Anything that `signals.signal_from` takes -> samples float32 [C, S], length int64 [], has bool [C]."""
        return self.begin(value)()

    def begin(self, value: Any) -> Callable[[], dict[str, Tensor]]:
        """Draw the window and the augmentation."""
        signal, c = signal_from(value), self.config
        columns = [signal.channels.index(name) if name in signal.channels else -1 for name in c.channels]
        if max(columns) < 0:
            raise BadSample(f"signal has none of the channels {', '.join(c.channels[:4])}")
        wanted = min(max(1, round(c.seconds * signal.rate)), signal.frames)
        spare = signal.frames - wanted
        start = int(torch.randint(spare + 1, ())) if self.train and spare else spare // 2
        drawn = self._draw() if self.train else _Drawn()
        return partial(self._make, signal, start, wanted, columns, drawn)

    def cut(self, value: Any, made: Any) -> bool:
        """Whether the signal is longer than the window."""
        signal = signal_from(value)
        return signal.frames > max(1, round(self.config.seconds * signal.rate))

    def _draw(self) -> _Drawn:
        c, channels = self.config, len(self.config.channels)
        cut = None
        if c.cutout:
            width = float(torch.rand(())) * c.cutout
            first = float(torch.rand(())) * (1 - width)
            cut = (first, first + width)
        return _Drawn(
            places=self.warp.draw(self.length),
            gain=(torch.randn(channels, 1) * c.scaling).exp() if c.scaling else None,
            noise=torch.randn(channels, self.length) * c.jitter if c.jitter else None,
            cut=cut,
            dropped=torch.rand(channels) < c.channel_dropout if c.channel_dropout else None,
        )

    def _make(
        self, signal: Signal, start: int, wanted: int, columns: Sequence[int], drawn: _Drawn
    ) -> dict[str, Tensor]:
        c = self.config
        has = torch.tensor([column >= 0 for column in columns])
        if drawn.dropped is not None and bool((has & ~drawn.dropped).any()):  # or else none would be left
            has &= ~drawn.dropped
        x = resampled(signal.read(start, wanted), signal.rate, c.rate)[:, : self.length]
        length = x.shape[1]
        x = torch.stack([x[column] if column >= 0 else torch.zeros(length) for column in columns])
        x = (x - x.mean(1, keepdim=True)) / c.unit
        if c.normalize == "sample":
            x = x / x[has].square().mean().sqrt().clamp(min=1e-6)
        if drawn.places is not None:
            x = take(x, take(drawn.places[None], torch.linspace(0, 1, length))[0])
        if drawn.gain is not None:
            x = x * drawn.gain
        if drawn.noise is not None:
            x = x + drawn.noise[:, :length]
        if drawn.cut is not None:
            x[:, round(drawn.cut[0] * length) : round(drawn.cut[1] * length)] = 0
        samples = torch.zeros(len(columns), self.length)
        samples[:, :length] = x * has[:, None]
        return {"samples": samples, "length": torch.tensor(length), "has": has}

    def collate(self, values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """-> samples [B, C, S], length [B], has [B, C]."""
        return {name: torch.stack([v[name] for v in values]) for name in ("samples", "length", "has")}


def resampled(x: Tensor, rate: float, wanted: float) -> Tensor:
    """[C, T] -> [C, T * wanted / rate], by a polyphase filter that lets nothing alias."""
    if rate == wanted:
        return x
    from scipy.signal import resample_poly  # pyright: ignore[reportMissingTypeStubs]

    ratio = Fraction(wanted / rate).limit_denominator(10_000)
    # Beyond the ends the line goes on: zeros there would be a step that the filter rings at.
    found: Any = resample_poly(x.numpy(), ratio.numerator, ratio.denominator, axis=1, padtype="line")
    return torch.from_numpy(found).float()


class SignalEncoder(Encoder):
    """Window, rate, channels, normalisation and augmentation that all time-series towers share."""

    kind = "timeseries"

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Settings that every time-series tower has."""

        channels: tuple[str, ...]
        """Names of the C channels, in the tower's order. A signal that lacks some is masked there."""
        rate: float
        """Samples per second that the tower works at; signals of another rate are resampled."""
        seconds: float
        """Longest part that the tower sees: a random one in training, the middle otherwise."""
        unit: float = 1.0
        """Physical units that become 1. A channel's mean is taken away, its amplitude means something and stays."""
        normalize: Literal["unit", "sample"] = "unit"
        """With "sample", also divide by one root mean square of all channels: their proportions stay."""
        jitter: float = 0.0
        """Deviation of the noise that is added in training, in the tower's units."""
        scaling: float = 0.0
        """Deviation of the logarithm of a gain of each channel in training."""
        warp: Warp.Config = field(default_factory=Warp.Config)
        """How time is bent in training."""
        cutout: float = 0.0
        """Largest share of the window that becomes zero in training."""
        channel_dropout: float = 0.0
        """How often a channel is left out in training; one always stays."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if not c.channels or len(set(c.channels)) < len(c.channels):
            raise ConfigError(f"channels {c.channels}: name at least one, each once")
        if c.rate <= 0 or c.seconds * c.rate < 1:
            raise ConfigError(f"rate {c.rate} and seconds {c.seconds} leave no sample; both must be above 0")
        if c.unit <= 0 or c.jitter < 0 or c.scaling < 0:
            raise ConfigError(f"unit {c.unit} must be above 0, jitter {c.jitter} and scaling {c.scaling} not below")
        if not 0 <= c.cutout <= 1 or not 0 <= c.channel_dropout < 1:
            raise ConfigError(f"cutout {c.cutout} and channel_dropout {c.channel_dropout} must be shares, below 1")
        self.signal_config = config

    def transform(self, *, train: bool) -> SignalTransform:
        """A random window with augmentation in training, the middle otherwise."""
        return SignalTransform(self.signal_config, train=train)

    def example(self) -> dict[str, Tensor]:
        """A line at zero."""
        device = next(self.parameters()).device
        channels, length = len(self.signal_config.channels), self.transform(train=False).length
        return {
            "samples": torch.zeros(1, channels, length, device=device),
            "length": torch.full((1,), length, dtype=torch.int64, device=device),
            "has": torch.ones(1, channels, dtype=torch.bool, device=device),
        }


class _Lead(nn.Module):
    """Samples -> frames in which each absent channel has left a mark of its own, so that zero is not silence."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv1d(channels, width, patch, stride=patch)
        self.absent = nn.Parameter(torch.randn(channels, width) * 0.02)

    def forward(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, C, S] -> [B, F, W] zero where masked, [B, F]; the last frame may be part signal, part zeros."""
        samples = x["samples"]
        spare = -samples.shape[2] % self.patch
        frames = self.embed(nn.functional.pad(samples, (0, spare))).transpose(1, 2)
        mask = torch.arange(frames.shape[1], device=samples.device) * self.patch < x["length"][:, None]
        frames = frames + ((~x["has"]).to(frames) @ self.absent.to(frames))[:, None]
        return frames * mask[:, :, None], mask


class SignalResNet(SignalEncoder):
    """A residual convolutional network over time (`frames.FrameConvNet`)."""

    @dataclass(kw_only=True)
    class Config(SignalEncoder.Config):
        """Settings of the network."""

        widths: tuple[int, ...] = (64, 128, 256)
        """Width of each stage; each halves the frames."""
        blocks: tuple[int, ...] = (1, 2, 2)
        """Residual blocks of each stage."""
        patch: int = 1
        """Samples that the first layer brings together, for high rates."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        if not config.widths or len(config.widths) != len(config.blocks) or min(config.widths) < 1:
            raise ConfigError(f"widths {config.widths} and blocks {config.blocks} must have one number per stage")
        if min(config.blocks) < 0 or config.patch < 1:
            raise ConfigError(f"blocks {config.blocks} must not be below 0, patch {config.patch} at least 1")
        self.leads = _Lead(len(config.channels), config.widths[0], config.patch)
        self.net = FrameConvNet(config.widths[0], config.widths, config.blocks)
        self.dim = config.widths[-1]
        self.finish(config, pretrained=False)

    def forward(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Samples [B, C, S], length [B], has [B, C] -> the frames' mean [B, W], the frames [B, F, W]."""
        frames, mask = self.net(*self.leads(x))
        return masked_mean(frames, mask), frames


class SignalTransformer(SignalEncoder):
    """A transformer over patches of time."""

    @dataclass(kw_only=True)
    class Config(SignalEncoder.Config):
        """Settings of the transformer."""

        patch: int
        """Samples of a patch."""
        width: int = 256
        """W."""
        layers: int = 6
        """Blocks."""
        heads: int = 4
        """Attention heads; must divide width."""
        dropout: float = 0.0
        """Share of the activations that training leaves out."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        if config.patch < 1 or config.layers < 1 or config.width < 2 or config.width % config.heads:
            raise ConfigError(
                f"patch {config.patch} and layers {config.layers} must be at least 1, width {config.width} a multiple "
                f"of heads {config.heads}"
            )
        self.leads = _Lead(len(config.channels), config.width, config.patch)
        self.net = FrameTransformer(config.width, config.layers, config.heads, config.dropout)
        self.dim = config.width
        self.finish(config, pretrained=False)

    def forward(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Samples [B, C, S], length [B], has [B, C] -> the patches' mean [B, W], the patches [B, F, W]."""
        frames, mask = self.leads(x)
        frames = self.net(frames + sines(frames.shape[1], frames.shape[2]).to(frames), mask)
        return masked_mean(frames, mask), frames
