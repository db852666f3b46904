"""The model: one tower per modality, each projected to the shared unit sphere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, map_tensors
from mmcontrast.config import ConfigError, Configurable, suggest
from mmcontrast.encoders.base import Encoder, Transform
from mmcontrast.shards import BadSample

_POOLED = "pooled by the frozen tower"


class MultiEncoder(nn.Module, Configurable):
    """Towers by modality name, and their projections to D dimensions.

    All encoding goes through `forward`, which wrappers such as DDP need, and always runs every tower: a
    modality that no row has is encoded from one dummy row and comes out as [0, D], so that no rank waits for
    another's collective.
    """

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Which towers, and the shared space."""

        encoders: dict[str, Encoder.Config]
        """Modality name -> tower."""
        dim: int = 512
        """D, dimensions of the shared space."""
        projection: Literal["linear", "mlp", "none"] = "linear"
        """From a tower's width to D; "none" takes towers that end in D dimensions already."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        """Build the towers; `restore` is the assets folder of a run whose weights are loaded afterwards."""
        super().__init__()
        if not config.encoders:
            raise ConfigError("the model has no encoders; name at least one modality")
        if config.dim < 1:
            raise ConfigError(f"dim is {config.dim}; the shared space needs at least 1 dimension")
        self.config = config
        self.encoders = nn.ModuleDict()
        self.projections = nn.ModuleDict()
        for name, settings in config.encoders.items():
            if not name.isidentifier() or hasattr(self.encoders, name):  # such as `type`: torch refuses it
                raise ConfigError(f"the modality name {name!r} must be an identifier such as image or chest_xray")
            encoder: Encoder = settings.build(restore=restore / name if restore else None)
            self.encoders[name] = encoder
            self.projections[name] = _projection(name, encoder.dim, config)

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities."""
        return list(self.encoders)

    def encoder(self, modality: str) -> Encoder:
        """The tower of a modality.

        Raises:
            ConfigError: the model has no such modality.
        """
        if modality not in self.encoders:
            raise ConfigError(f"the model has no modality {modality!r}{suggest(modality, self.modalities)}")
        encoder = self.encoders[modality]
        assert isinstance(encoder, Encoder)
        return encoder

    def transforms(self, *, train: bool) -> dict[str, Transform]:
        """Modality -> how its samples are prepared."""
        return {m: self.encoder(m).transform(train=train) for m in self.encoders}

    def forward(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Modality -> inputs [n_m, ...]; gives modality -> [n_m, D] unit norm for every modality.

        Raises:
            ConfigError: inputs of a modality that the model does not have.
        """
        for modality in inputs:
            self.encoder(modality)
        return {m: self._encode(m, inputs[m]) if m in inputs else self._nothing(m) for m in self.encoders}

    @torch.no_grad()
    def pool_frozen(self, batch: Batch, micro_batch: int) -> Batch:
        """The batch with the inputs of frozen towers replaced by what they pool from them.

        A frozen tower answers the same in both passes of the gradient cache, so it need not be asked twice.
        """
        inputs = dict(batch.inputs)
        for modality in inputs:
            encoder = self.encoder(modality)
            if encoder.frozen:
                pieces = (piece.inputs[modality] for piece in batch.split(micro_batch) if modality in piece.inputs)
                inputs[modality] = {_POOLED: torch.cat([encoder(x)[0] for x in pieces])}
        return replace(batch, inputs=inputs)

    def _encode(self, modality: str, x: Any) -> Tensor:
        encoder = self.encoder(modality)
        if isinstance(x, Mapping) and _POOLED in x:
            pooled = cast(Tensor, x[_POOLED])
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not encoder.frozen):
                pooled, _ = encoder(x)
        z = self.projections[modality](pooled)
        return nn.functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)

    def _nothing(self, modality: str) -> Tensor:
        return self._encode(modality, self.encoder(modality).example())[:0]

    @torch.no_grad()  # not inference_mode: a probe must be able to train on what comes out
    def encode(self, modality: str, values: Sequence[Any], *, batch_size: int = 64) -> Tensor:
        """Embed samples of one modality: texts as str; pictures as paths, bytes, PIL images or uint8 arrays.

        Returns:
            [len(values), D], unit norm, float32, on the CPU. The model is used in evaluation mode.

        Raises:
            ConfigError: the model has no such modality, or `values` is one sample instead of a list.
            BadSample: a value cannot be decoded.
        """
        if isinstance(values, (str, bytes)):
            raise ConfigError(f"encode takes a list of samples, got one {type(values).__name__}: put it into [ ]")
        transform = self.encoder(modality).transform(train=False)
        parts = [
            self.embed(modality, transform.collate([_prepare(transform, v) for v in values[i : i + batch_size]]))
            for i in range(0, len(values), batch_size)
        ]
        return torch.cat(parts).cpu() if parts else torch.zeros(0, self.config.dim)

    @torch.no_grad()
    def embed(self, modality: str, x: Any) -> Tensor:
        """Embed prepared inputs of one modality in evaluation mode; [n, D] on the model's device."""
        training = self.training
        self.eval()
        try:
            device = next(self.parameters()).device
            return self._encode(modality, map_tensors(x, lambda t: t.to(device)))
        finally:
            self.train(training)

    def save_assets(self, folder: Path) -> None:
        """Write what the towers need, beside their weights, to be built again."""
        for name in self.encoders:
            (folder / name).mkdir(parents=True, exist_ok=True)
            self.encoder(name).save_assets(folder / name)


def _prepare(transform: Transform, value: Any) -> Any:
    try:
        return transform(value)
    except BadSample as error:
        if isinstance(value, (str, Path)) and str(value) not in str(error):
            raise BadSample(f"{value}: {error}") from None  # among many files, which one?
        raise


def _projection(name: str, width: int, config: MultiEncoder.Config) -> nn.Module:
    if config.projection == "none":
        if width != config.dim:
            raise ConfigError(
                f"projection 'none': the {name} tower ends in {width} dimensions, the space has {config.dim}"
            )
        return nn.Identity()
    if config.projection == "linear":
        return nn.Linear(width, config.dim, bias=False)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.dim, bias=False))
