"""Audio towers of transformers with their own feature extractors: CLAP's HTSAT, Whisper's encoder, AST, wav2vec2's kin.

What long clips lose is this project's policy, not the extractors': their draws come from numpy's global state, and
CLAP's marks a random clip of every batch as long, so that a clip's embedding would depend on its neighbours. Letters:
B rows, S samples, F frames, M mel bands, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError
from mmcontrast.decode import Sound, audio_from
from mmcontrast.encoders.audio import AudioTransform, Padding, padded
from mmcontrast.encoders.base import Encoder, Transform
from mmcontrast.encoders.hub import load_half, origin_of, refusal

# Settings that would drop layers or mask frames by draws that the gradient cache cannot repeat, or leave weights
# without a gradient.
_PLAIN = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}
_FAMILIES = {
    "ClapFeatureExtractor": "clap",
    "WhisperFeatureExtractor": "whisper",
    "ASTFeatureExtractor": "ast",
    "Wav2Vec2FeatureExtractor": "wave",
}


class ExtractorTransform(AudioTransform):
    """Sound -> what a feature extractor of transformers makes of a crop, and which of its frames are sound."""

    def __init__(self, extractor: Any, seconds: float, pad: Padding, *, train: bool) -> None:
        super().__init__(int(extractor.sampling_rate), seconds, pad, train=train)
        self.extractor, self.family = extractor, _FAMILIES[type(extractor).__name__]

    def _crop(self, sound: Sound, start: int, wanted: int) -> dict[str, Tensor]:
        samples = padded(self.resampled(sound, start, wanted)[: self.length], self.length, self.pad)
        return self.features(samples)

    def features(self, samples: Tensor) -> dict[str, Tensor]:
        """[S], S at most the crop's -> features and, where the family has one, a mask."""
        ask: dict[str, Any] = {"sampling_rate": self.rate, "return_tensors": "pt"}
        wave = samples.numpy()
        match self.family:
            case "clap":
                found = self.extractor(wave, max_length=self.length, padding="pad", **ask)
                return {"features": found["input_features"][0].float(), "longer": torch.tensor(False)}
            case "ast":
                return {"features": self.extractor(wave, **ask)["input_values"][0].float()}
            case _:
                found = self.extractor(
                    wave, max_length=self.length, padding="max_length", return_attention_mask=True, **ask
                )
                name = "input_features" if self.family == "whisper" else "input_values"
                return {"features": found[name][0].float(), "mask": found["attention_mask"][0].bool()}

    def collate(self, values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """-> features [B, ...], and mask [B, ...] or longer [B]."""
        return {name: torch.stack([v[name] for v in values]) for name in values[0]}


class FusionTransform(ExtractorTransform):
    """Sound -> CLAP's four spectra: the whole clip shrunk to one crop's length, and crops of its three thirds.

    Wu et al. 2023 (arXiv:2211.06687, sec. 3.3). In evaluation the crops are the middles of what they are drawn from.
    """

    def __init__(self, extractor: Any, seconds: float, pad: Padding, longest: float, *, train: bool) -> None:
        super().__init__(extractor, seconds, pad, train=train)
        self.longest = longest

    def begin(self, value: Any) -> Callable[[], dict[str, Tensor]]:
        """Draw the part of a clip above `longest`, and the three crops."""
        sound = audio_from(value)
        if sound.frames <= round(self.seconds * sound.rate):
            return partial(self._crop, sound, 0, sound.frames)
        wanted = min(round(self.longest * sound.rate), sound.frames)
        spare = sound.frames - wanted
        start = int(torch.randint(spare + 1, ())) if self.train and spare else spare // 2
        places = torch.rand(3).tolist() if self.train else [0.5] * 3
        return partial(self._fused, sound, start, wanted, places)

    def cut(self, value: Any, made: Any) -> bool:
        """Whether the clip is longer than what fusion looks at."""
        sound = audio_from(value)
        return sound.frames > round(self.longest * sound.rate)

    def _fused(self, sound: Sound, start: int, wanted: int, places: Sequence[float]) -> dict[str, Tensor]:
        samples = self.resampled(sound, start, wanted)
        spectrum = self.extractor._np_extract_fbank_features(samples.numpy(), self.extractor.mel_filters)
        mel = torch.from_numpy(np.ascontiguousarray(spectrum)).float()
        frames = self.length // self.extractor.hop_length + 1
        if len(mel) <= frames:  # longer by less than a hop
            return self.features(samples[: self.length])
        return {"features": fused(mel, frames, places), "longer": torch.tensor(True)}


def fused(mel: Tensor, frames: int, places: Sequence[float]) -> Tensor:
    """Spectrum [F, M] -> [4, frames, M]: shrunk, and crops from `places` (0..1) of each third of the starts."""
    shrunk = nn.functional.interpolate(mel[None, None], (frames, mel.shape[1]), mode="bilinear", align_corners=False)
    thirds = np.array_split(np.arange(len(mel) - frames + 1), 3)
    starts = [int(t[min(int(p * len(t)), len(t) - 1)]) if len(t) else 0 for t, p in zip(thirds, places, strict=True)]
    return torch.stack([shrunk[0, 0], *(mel[s : s + frames] for s in starts)])


class DeviceFeatures(nn.Module):
    """CLAP's and Whisper's log-mel spectra from samples, on the model's device: what their extractors compute."""

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        self.whisper = _FAMILIES[type(extractor).__name__] == "whisper"
        filters = extractor.mel_filters if self.whisper else extractor.mel_filters_slaney
        self.size, self.hop = int(extractor.n_fft if self.whisper else extractor.fft_window_size), extractor.hop_length
        self.filters: Tensor
        self.window: Tensor
        self.register_buffer("filters", torch.from_numpy(np.asarray(filters)).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(self.size), persistent=False)

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Tensor:
        """[B, S] -> Whisper's [B, M, F], CLAP's [B, 1, F, M]."""
        with torch.autocast(samples.device.type, enabled=False):  # half precision would lose quiet bands
            spectrum = torch.stft(samples.float(), self.size, self.hop, window=self.window, return_complex=True)
            power = spectrum.real.square() + spectrum.imag.square()  # [B, frequencies, F]
            mel = (self.filters.T @ (power[..., :-1] if self.whisper else power)).clamp(min=1e-10).log10()
            if self.whisper:
                return (torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8) + 4) / 4
            return 10 * mel.transpose(1, 2)[:, None]


class HFAudio(Encoder):
    """An audio tower of transformers, from a folder or a hub name.

    Pooled are: by CLAP and AST what they pool themselves, elsewhere the mean of the frames that are sound.
    """

    kind = "audio"

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Which model, and what it hears."""

        model: str
        """Folder of a transformers model and feature extractor, or a name that transformers can find."""
        seconds: float | None = None
        """Longest part of a sound that is heard at once. None takes the extractor's (CLAP 10, which stays, AST
        10.24, Whisper 30); wav2vec2's kin have none. Whisper's encoder is cut to it, and costs in proportion."""
        pad: Padding | None = None
        """Shorter sounds: as for other audio towers. None takes the extractor's: CLAP's repeats, others add silence."""
        long: Literal["crop", "fusion"] = "crop"
        """Longer sounds: a random crop in training and the middle otherwise, or CLAP's fusion of the whole clip."""
        longest: float = 60.0
        """Seconds that fusion looks at; of longer sounds a random run, and the middle in evaluation."""
        features: Literal["extractor", "device"] = "extractor"
        """Where features are made: by the model's own extractor in loader workers, or the same on the device."""
        projected: bool = False
        """Also apply the model's own projection to the space that it was trained in (CLAP)."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        from transformers import AutoFeatureExtractor

        origin = origin_of(config.model, restore)
        try:
            self.extractor: Any = AutoFeatureExtractor.from_pretrained(origin)
        except (OSError, ValueError) as error:
            raise refusal(origin, error) from None
        family = _FAMILIES.get(type(self.extractor).__name__)
        if family is None:
            raise ConfigError(
                f"{config.model} has a {type(self.extractor).__name__}; HFAudio knows {', '.join(_FAMILIES)}"
            )
        half = load_half(origin, "audio", weights=restore is None, changes=_PLAIN)
        self.family, self.model_config, self.tower = family, half.config, half.tower
        self.projection = half.projection if config.projected else None
        self.hf_config, self.seconds = config, self._length(config)
        self.pad: Padding = config.pad or _padding(self.extractor)
        self._check(config, half.projection)
        if family == "whisper":
            self._shorten()
        self.front = DeviceFeatures(self.extractor) if config.features == "device" else None
        self._silence: dict[str, Tensor] = {}
        with torch.no_grad():
            self.tower.eval()
            self.dim = self.forward(self.example())[0].shape[1]
        self.finish(config, pretrained=True)

    def _length(self, config: Config) -> float:
        own = {"clap": "max_length_s", "whisper": "chunk_length"}.get(self.family)
        most = float(getattr(self.extractor, own)) if own else None
        if self.family == "ast":  # its frames are of 10 ms
            most = self.extractor.max_length / 100
        seconds = config.seconds or most
        if seconds is None:
            raise ConfigError(f"{config.model} hears sounds of any length: say how much at most with `seconds`")
        if seconds <= 0 or (most is not None and seconds > most):
            raise ConfigError(f"seconds is {seconds}; {config.model} hears above 0 and up to {most or 'any number'}")
        if self.family == "clap" and seconds != most:  # it would be stretched
            raise ConfigError(f"seconds is {seconds}; {config.model} always hears {most}: leave it None")
        return seconds

    def _check(self, config: Config, projection: nn.Module | None) -> None:
        if config.long == "fusion" and not getattr(self.tower.config, "enable_fusion", False):
            raise ConfigError(f"long 'fusion': {config.model} was not trained for it; only CLAP's fused models are")
        if config.long == "fusion" and (config.features == "device" or config.longest < self.seconds):
            raise ConfigError(
                f"long 'fusion' needs features 'extractor' and longest ({config.longest}) not below seconds "
                f"({self.seconds})"
            )
        if config.features == "device" and self.family not in ("clap", "whisper"):
            raise ConfigError(f"features 'device' is for CLAP and Whisper; {config.model} needs 'extractor'")
        if config.features == "device" and getattr(self.tower.config, "enable_fusion", False):
            raise ConfigError(f"features 'device': {config.model} is a fused model, which needs 'extractor'")
        if config.projected and projection is None:
            raise ConfigError(f"projected: {config.model} has no projection of its own")

    def _shorten(self) -> None:
        """Keep the positions of the first `seconds`; the encoder insists on all that it has."""
        step = 2 * self.extractor.hop_length  # samples of a position
        positions, left = divmod(round(self.seconds * self.extractor.sampling_rate), step)
        if left:
            raise ConfigError(
                f"seconds is {self.seconds}; {self.hf_config.model} needs a multiple of "
                f"{step / self.extractor.sampling_rate}"
            )
        weight = self.tower.embed_positions.weight[:positions].detach().clone()
        self.tower.embed_positions = nn.Embedding.from_pretrained(weight)  # which does not train
        self.tower.config.max_source_positions = self.tower.max_source_positions = positions

    def transform(self, *, train: bool) -> Transform:
        """A random crop in training, the middle otherwise; or fusion."""
        rate = int(self.extractor.sampling_rate)
        if self.front is not None:
            return AudioTransform(rate, self.seconds, self.pad, train=train)
        if self.hf_config.long == "fusion":
            return FusionTransform(self.extractor, self.seconds, self.pad, self.hf_config.longest, train=train)
        return ExtractorTransform(self.extractor, self.seconds, self.pad, train=train)

    def example(self) -> dict[str, Tensor]:
        """Silence."""
        if not self._silence:  # extractors take their time
            transform, rate = self.transform(train=False), int(self.extractor.sampling_rate)
            self._silence = transform.collate([transform((torch.zeros(round(self.seconds * rate)), rate))])
        device = next(self.parameters()).device
        return {name: t.to(device) for name, t in self._silence.items()}

    def forward(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Features, or samples [B, S] and length [B] -> [B, C], and the tokens [B, T, C]."""
        if self.front is not None:
            made: dict[str, Tensor] = {"features": self.front(x["samples"])}
            if self.family == "whisper":
                frames = torch.arange(made["features"].shape[2], device=x["length"].device)
                made["mask"] = frames * self.extractor.hop_length < x["length"][:, None]
            x = made
        match self.family:
            case "clap":
                pooled, tokens = self._clap(x)
            case "ast":
                found = self.tower(x["features"])
                pooled, tokens = found.pooler_output, found.last_hidden_state
            case "whisper":
                tokens = self.tower(x["features"]).last_hidden_state
                pooled = _mean(tokens, x["mask"][:, ::2])
            case _:
                # Of those that are normalised by groups, whose extractors make no mask, padding is heard.
                mask = x["mask"].long()
                tokens = self.tower(
                    x["features"], attention_mask=mask if self.extractor.return_attention_mask else None
                ).last_hidden_state
                heard = self.tower._get_feature_vector_attention_mask(tokens.shape[1], mask)
                pooled = _mean(tokens, heard)
        return pooled if self.projection is None else self.projection(pooled), tokens

    def _clap(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        features = x["features"]
        longer = x.get("longer", torch.zeros(len(features), dtype=torch.bool, device=features.device))
        found = self.tower(input_features=features, is_longer=longer)
        pooled = found.pooler_output
        patches = self.tower.audio_encoder.patch_embed
        if patches.enable_fusion:
            # Of a batch without long clips they would get no gradient, for which DDP waits.
            idle = [p.sum() for name in ("fusion_model", "mel_conv2d") for p in getattr(patches, name).parameters()]
            pooled = pooled + 0 * torch.stack(idle).sum()
        return pooled, found.last_hidden_state.flatten(2).transpose(1, 2)

    def save_assets(self, folder: Path) -> None:
        """The feature extractor and the architecture, so that the run needs its origin no more."""
        self.extractor.save_pretrained(folder)
        self.model_config.save_pretrained(folder)


def _padding(extractor: Any) -> Padding:
    found = getattr(extractor, "padding", None)
    return found if found in ("repeat", "repeatpad") else "zero"


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """[B, T, C], [B, T] -> the mean of the tokens that are sound; of the first where none is."""
    mask = mask.clone()
    mask[:, 0] = True
    weights = mask.to(tokens.dtype)[:, :, None]
    return (tokens * weights).sum(1) / weights.sum(1)
