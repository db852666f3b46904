"""Models that can be asked: our runs, open_clip's by name or weights, and CLIP and CLAP folders of transformers.

A foreign model keeps its own preparation of pictures, sounds and texts, to the last bit, so that its scores are those
that its own library would give; only the decoding of files is ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mmcontrast.checkpoint import find_checkpoint, load_checkpoint, model_hash, read_config, read_tensors
from mmcontrast.config import ConfigError, from_dict, suggest
from mmcontrast.decode import Sound, audio_from, picture_from
from mmcontrast.encoders.base import Encoder, Transform
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.encoders.text import TokenTower, TokenTransform
from mmcontrast.eval.seen import training_shards
from mmcontrast.objectives.pairs import ScaledPairs
from mmcontrast.objectives.symile import Symile


@dataclass(frozen=True)
class Training:
    """What is known of how a model was trained.

    Attributes:
        scale_of: two modalities -> the logit scale of their scores; None where none is known.
        products: sets of modalities whose product was trained (Symile).
        shards: what it was trained on, if it says so.
    """

    scale_of: Callable[[str, str], float | None] = lambda x, y: None
    products: Collection[frozenset[str]] = ()
    shards: Sequence[str] = ()


@dataclass(frozen=True)
class Asked:
    """A model that is asked.

    Attributes:
        model: in evaluation mode.
        name: what results call it, with `pretrained` as CLIP_benchmark does.
        pretrained: which weights.
        identity: changes when weights, settings or preparation do.
        training: what is known of it.
    """

    model: MultiEncoder
    name: str
    pretrained: str
    identity: str
    training: Training = Training()


def load_asked(given: str | Path, *, trust: Collection[str] = (), device: torch.device | None = None) -> Asked:
    """A model by what it is called.

    Args:
        given: a run folder or one of its step-N folders; a folder of transformers (CLIP, CLAP, SigLIP …); or
            `ARCHITECTURE,WEIGHTS` of open_clip, where WEIGHTS is a file or a name that open_clip downloads.
        trust: modules beside mmcontrast whose classes a run's config may name.
        device: where it embeds; by default the CPU.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
    """
    asked = _loaded(given, trust)
    asked.model.to(device or "cpu")
    return asked


def _loaded(given: str | Path, trust: Collection[str]) -> Asked:
    path = Path(given)
    if path.is_dir() and _config(path).get("model_type"):
        return _transformers(path)
    if path.is_dir() or "," not in str(given):
        if not path.is_dir():
            raise ConfigError(
                f"there is no run folder {str(given)!r}, nor a folder of transformers; models of open_clip are "
                "ARCHITECTURE,WEIGHTS, such as ViT-B-32,weights.safetensors"
            )
        checkpoint = find_checkpoint(path)
        return Asked(
            load_checkpoint(checkpoint, trust=trust),
            str(given),
            checkpoint.name,
            model_hash(checkpoint),
            _training(checkpoint, trust),
        )
    architecture, _, weights = str(given).partition(",")
    return _open_clip(architecture, weights)


def _training(checkpoint: Path, trust: Collection[str]) -> Training:
    """Of the run's settings; of an objective whose class is not trusted nothing is known."""
    config = read_config(checkpoint.parent)
    named: dict[str, Any] = config.get("objectives") or {}
    tensors = read_tensors(checkpoint, "objectives") if (checkpoint / "objectives.safetensors").is_file() else {}
    pairs: list[ScaledPairs] = []
    products: list[frozenset[str]] = []
    for name, settings in named.items():
        try:
            objective: Any = from_dict(settings, trust=trust, where=f"objectives.{name}").build()
            if isinstance(objective, Symile):
                products.append(frozenset(objective.modalities))
            if isinstance(objective, ScaledPairs):
                objective.load_state_dict({key: tensors[f"{name}.{key}"] for key in objective.state_dict()})
                pairs.append(objective)
        except (ConfigError, KeyError, RuntimeError):
            continue
    return Training(
        lambda x, y: next((s for o in pairs if (s := o.scale_between(x, y)) is not None), None),
        products,
        training_shards(config.get("data") or {}),
    )


class Tower(Encoder):
    """One side of a foreign model: its own preparation, and the method that embeds."""

    def __init__(
        self,
        transform: Transform,
        encode: Callable[[Any], Tensor],
        dim: int,
        shorten: Callable[[Any], Any] = lambda x: x,
    ) -> None:
        super().__init__(Encoder.Config())
        self.kind, self.dim = transform.kind, dim
        self._transform, self._encode, self._shorten = transform, encode, shorten

    def transform(self, *, train: bool) -> Transform:
        """The model's own."""
        return self._transform

    def shorten(self, x: Any) -> Any:
        """Without what the model cannot see."""
        return self._shorten(x)

    def forward(self, x: Any) -> tuple[Tensor, None]:
        """Prepared inputs -> [B, D]."""
        return self._encode(x), None


class Foreign(MultiEncoder):
    """A model of another library as one of ours: it embeds, but cannot be trained or saved here."""

    def __init__(self, whole: nn.Module, towers: Mapping[str, Tower]) -> None:
        nn.Module.__init__(self)
        self.whole = whole
        self.encoders = nn.ModuleDict(towers)
        self.projections = nn.ModuleDict({name: nn.Identity() for name in towers})
        self.heads = nn.ModuleDict()
        self.config = MultiEncoder.Config(encoders={}, dim=next(iter(towers.values())).dim)
        self.eval()


class _Prepared(Transform):
    """A kind of modality, and a function that prepares one decoded value, and one that makes a batch."""

    def __init__(
        self, kind: str, prepare: Callable[[Any], Any], collate: Callable[[list[Any]], Any] = torch.stack
    ) -> None:
        self.kind, self._prepare, self._collate = kind, prepare, collate

    def __call__(self, value: Any) -> Any:
        return self._prepare(value)

    def collate(self, values: Sequence[Any]) -> Any:
        return self._collate(list(values))


def pil_image(value: Any) -> Any:
    """Anything that `decode.picture_from` takes -> a PIL image, RGB and upright."""
    from PIL import Image

    return Image.fromarray(picture_from(value).read().permute(1, 2, 0).numpy())


def _open_clip(architecture: str, weights: str) -> Asked:
    import open_clip

    known = open_clip.list_models()
    if architecture not in known:
        raise ConfigError(f"open_clip has no architecture {architecture!r}{suggest(architecture, known)[:400]}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not Path(weights).is_file() and weights not in tags:
        raise ConfigError(f"{weights!r} is neither a file nor known weights of {architecture}{suggest(weights, tags)}")
    try:
        # Their towers as modules of their own: a CLIP with loose parts cannot read texts without their padding.
        made = open_clip.create_model_and_transforms(architecture, pretrained=weights, force_custom_text=True)
        tokenizer: Any = open_clip.get_tokenizer(architecture)
    except Exception as error:  # of torch, safetensors, pickle or the hub, by what is wrong
        raise ConfigError(f"open_clip cannot make {architecture} of {weights}: {str(error)[:300]}") from None
    clip, preprocess = cast(Any, made[0]).eval(), cast(Any, made[2])
    texts = TokenTower(clip.text)
    with torch.no_grad():
        dim = clip.encode_text(tokenizer([""])).shape[1]
    towers = {
        "image": Tower(_Prepared("image", lambda v: preprocess(pil_image(v))), clip.encode_image, dim),
        "text": Tower(TokenTransform(tokenizer), lambda x: texts(x)[0], dim, texts.shorten),
    }
    identity = _identity(clip, architecture, repr(preprocess))
    return Asked(Foreign(clip, towers), architecture, weights, identity, _one_scale(clip.logit_scale))


def _transformers(folder: Path) -> Asked:
    """Pictures, sounds and texts by the folder's own processor; nothing in the folder is executed."""
    from transformers import AutoModel, AutoProcessor

    try:
        whole: Any = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()
        processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of transformers, safetensors, tokenizers, by what is missing
        raise ConfigError(f"{folder} cannot be loaded with transformers: {str(error)[:300]}") from None
    tokenizer: Any = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer: only models of two modalities, one of them text, can be asked")

    def texts(values: Sequence[Any]) -> Mapping[str, Tensor]:
        # SigLIP was trained on texts that are all padded to its length, and gives others for shorter ones.
        padding = "max_length" if whole.config.model_type.startswith("siglip") else True
        return dict(tokenizer(list(values), padding=padding, truncation=True, return_tensors="pt"))

    towers: dict[str, Tower] = {}
    if hasattr(whole, "get_image_features"):
        images: Any = processor.image_processor

        def image(value: Any) -> Tensor:
            return images(images=pil_image(value), return_tensors="pt")["pixel_values"][0]

        towers["image"] = _tower(
            _Prepared("image", image), whole.get_image_features, whole, lambda x: {"pixel_values": x}
        )
    if hasattr(whole, "get_audio_features"):
        sounds: Any = processor.feature_extractor

        def sound(value: Any) -> Mapping[str, Tensor]:
            samples = _at_rate(audio_from(value), sounds.sampling_rate).numpy()
            # Of a long sound CLAP takes parts at random, by numpy's global state: always the same ones here.
            state = np.random.get_state()
            np.random.seed(0)
            try:
                return dict(sounds(samples, sampling_rate=sounds.sampling_rate, return_tensors="pt"))
            finally:
                np.random.set_state(state)

        towers["audio"] = _tower(_Prepared("audio", sound, _joined), whole.get_audio_features, whole, dict)
    towers["text"] = _tower(_Prepared("text", str, texts), whole.get_text_features, whole, dict)
    log_scale = getattr(whole, "logit_scale", getattr(whole, "logit_scale_a", None))  # of CLIP; of CLAP's sounds
    identity = _identity(whole, *_settings(folder))
    return Asked(Foreign(whole, towers), str(folder), folder.name, identity, _one_scale(log_scale))


def _one_scale(log_scale: Tensor | None) -> Training:
    scale = None if log_scale is None else float(log_scale.detach().exp())
    return Training(lambda x, y: scale)


def _tower(
    transform: Transform, features: Callable[..., Any], whole: Any, arguments: Callable[[Any], Mapping[str, Any]]
) -> Tower:
    def encode(x: Any) -> Tensor:
        found = features(**arguments(x))
        return found if isinstance(found, Tensor) else cast(Tensor, found.pooler_output)

    dim = getattr(whole.config, "projection_dim", None) or whole.config.text_config.hidden_size
    return Tower(transform, encode, int(dim))


def _joined(values: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """What a feature extractor gives of single sounds, [1, ...] each -> a batch."""
    return {name: torch.cat([value[name] for value in values]) for name in values[0]}


def _at_rate(sound: Sound, rate: int) -> Tensor:
    samples = sound.read()
    if sound.rate != rate:
        from torchaudio.functional import resample

        samples = resample(samples, sound.rate, rate)
    return samples


def _config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder, empty where there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def _settings(folder: Path) -> list[str]:
    """The contents of a folder's small files: settings, vocabularies."""
    return [p.read_text("utf-8") for p in sorted(folder.iterdir()) if p.suffix in (".json", ".txt")]


def _identity(model: nn.Module, *settings: str) -> str:
    """Of weights and settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
