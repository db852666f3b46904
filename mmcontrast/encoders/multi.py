"""The model: one tower per modality, each projected to the shared unit sphere, and heads on the towers' tokens."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, map_tensors
from mmcontrast.config import ConfigError, Configurable, suggest
from mmcontrast.encoders.base import Encoder, Transform
from mmcontrast.heads.base import Head, in_common
from mmcontrast.heads.captioning import Captioning
from mmcontrast.heads.generation import Decoding, Method
from mmcontrast.shards import BadSample

_POOLED = "pooled by the frozen tower"


class MultiEncoder(nn.Module, Configurable):
    """Towers by modality name, and their projections to D dimensions.

    All encoding goes through `forward`, which wrappers such as DDP need, and runs every tower that is asked for: a
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
        same: dict[str, str] = field(default_factory=dict[str, str])
        """Further modality, such as another view -> the one of `encoders` whose tower it goes through."""
        projection: Literal["linear", "mlp", "none"] = "linear"
        """From a tower's width to D; "none" takes towers that end in D dimensions already."""
        heads: dict[str, Head.Config] = field(default_factory=dict[str, Head.Config])
        """Name -> head: a term of the loss on the towers' tokens, such as captions."""

        def towers(self) -> dict[str, Encoder.Config]:
            """Each modality, those of `same` too, and its tower."""
            return self.encoders | {m: self.encoders[tower] for m, tower in self.same.items() if tower in self.encoders}

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        """Build the towers; `restore` is the assets folder of a run whose weights are loaded afterwards."""
        super().__init__()
        if not config.encoders:
            raise ConfigError("the model has no encoders; name at least one modality")
        if config.dim < 1:
            raise ConfigError(f"dim is {config.dim}; the shared space needs at least 1 dimension")
        for name, tower in config.same.items():
            if not name.isidentifier() or name in config.encoders:
                raise ConfigError(f"same names {name!r}, which must be an identifier and no tower's own name")
            if tower not in config.encoders:
                raise ConfigError(f"same gives {name!r} the tower of {tower!r}{suggest(tower, config.encoders)}")
        self.config = config
        self.encoders = nn.ModuleDict()
        self.projections = nn.ModuleDict()
        for name, settings in config.encoders.items():
            if not name.isidentifier() or hasattr(self.encoders, name):  # such as `type`: torch refuses it
                raise ConfigError(f"the modality name {name!r} must be an identifier such as image or chest_xray")
            encoder: Encoder = settings.build(restore=restore / name if restore else None)
            self.encoders[name] = encoder
            self.projections[name] = _projection(name, encoder.dim, config)
        self.heads = nn.ModuleDict()
        for name, settings in config.heads.items():
            if not name.isidentifier() or hasattr(self.heads, name) or name in self.modalities:
                raise ConfigError(f"the head name {name!r} must be an identifier such as caption, and no modality")
            self.heads[name] = settings.build({m: self.encoder(m) for m in self.encoders})

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities."""
        return [*self.encoders, *self.config.same]

    def encoder(self, modality: str) -> Encoder:
        """The tower of a modality.

        Raises:
            ConfigError: the model has no such modality.
        """
        if modality not in self.modalities:
            raise ConfigError(f"the model has no modality {modality!r}{suggest(modality, self.modalities)}")
        encoder = self.encoders[self._tower(modality)]
        assert isinstance(encoder, Encoder)
        return encoder

    def _tower(self, modality: str) -> str:
        return self.config.same.get(modality, modality)

    def transforms(self, *, train: bool) -> dict[str, Transform]:
        """Modality -> how its samples are prepared."""
        return {m: self.encoder(m).transform(train=train) for m in self.modalities}

    @property
    def terms(self) -> dict[str, Head]:
        """Name -> head."""
        return {name: cast(Head, head) for name, head in self.heads.items()}

    def forward(
        self,
        inputs: Mapping[str, Any],
        rows: Mapping[str, Tensor] | None = None,
        towers: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Modality -> inputs [n_m, ...]; gives modality -> [n_m, D] unit norm, of all or of `towers` in turn.

        With `rows` (modality -> [n_m], ascending, as in `Batch`) the heads on these towers run too, on the same graph,
        and the sum of each is found under its name. A head that no row concerns runs on one dummy row and comes out as
        0, with a gradient of zero for each of its parameters.

        Raises:
            ConfigError: inputs of a modality that the model does not have.
        """
        for modality in inputs:
            self.encoder(modality)
        found: dict[str, Tensor] = {}
        tokens: dict[str, Tensor | None] = {}
        asked = self.modalities if towers is None else list(towers)
        seen = {m: inputs[m] if m in inputs else self.encoder(m).example() for m in asked}
        for m, x in seen.items():
            z, tokens[m] = self._encode(m, x)
            found[m] = z if m in inputs else z[:0]
            if rows is None or not self._needs_tokens(m):
                del tokens[m]
        # After all towers, so that these draw the same random numbers with heads and without.
        if rows is not None:
            nowhere = next(iter(rows.values())).new_zeros(0)
            rows = {m: rows.get(m, nowhere) for m in asked}
            for name, head in self.terms.items():
                if all(m in seen for m in head.modalities):
                    found[name] = _run_head(head, seen, cast(dict[str, Tensor], tokens), rows)
        return found

    def _needs_tokens(self, modality: str) -> bool:
        return any(modality in head.modalities for head in self.terms.values())

    @torch.no_grad()
    def pool_frozen(self, batch: Batch, micro_batches: Mapping[str, int]) -> Batch:
        """The batch with the inputs of frozen towers replaced by what they pool from them.

        A frozen tower answers the same in both passes of the gradient cache, so it need not be asked twice; unless
        a head needs its tokens, which would be too many to keep for a whole batch.
        """
        inputs = dict(batch.inputs)
        for modality in inputs:
            encoder = self.encoder(modality)
            if encoder.frozen and not self._needs_tokens(modality):
                split = batch.split(micro_batches[modality], [modality])
                pieces = (piece.inputs[modality] for piece in split if modality in piece.inputs)
                inputs[modality] = {_POOLED: torch.cat([encoder(x)[0] for x in pieces])}
        return replace(batch, inputs=inputs)

    def _encode(self, modality: str, x: Any) -> tuple[Tensor, Tensor | None]:
        """Inputs [n, ...] -> [n, D] unit norm, and the tower's tokens [n, T, C] if it ran and has some."""
        encoder, tokens = self.encoder(modality), None
        if isinstance(x, Mapping) and _POOLED in x:
            pooled = cast(Tensor, x[_POOLED])
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not encoder.frozen):
                pooled, tokens = encoder(x)
        z = self.projections[self._tower(modality)](pooled)
        return nn.functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1), tokens

    @torch.no_grad()  # not inference_mode: a probe must be able to train on what comes out
    def encode(self, modality: str, values: Sequence[Any], *, batch_size: int = 64) -> Tensor:
        """Embed samples of one modality: texts as str; pictures as paths, bytes, PIL images or uint8 arrays.

        Returns:
            [len(values), D], unit norm, float32, on the CPU. The model is used in evaluation mode.

        Raises:
            ConfigError: the model has no such modality, or `values` is one sample instead of a list.
            BadSample: a value cannot be decoded.
        """
        # Texts of about the same length together: they are padded to the longest.
        texts = len(values) > batch_size and all(isinstance(value, str) for value in values)
        order = sorted(range(len(values)), key=lambda i: len(values[i])) if texts else range(len(values))
        z = torch.zeros(len(values), self.config.dim)
        done = 0
        for x in self._prepared("encode", modality, [values[i] for i in order] if texts else values, batch_size):
            part = self.embed(modality, x).float().cpu()
            z[[*order[done : done + len(part)]]] = part
            done += len(part)
        return z

    @torch.no_grad()
    def embed(self, modality: str, x: Any) -> Tensor:
        """Embed prepared inputs of one modality in evaluation mode; [n, D] on the model's device."""
        with self._evaluating():
            return self._encode(modality, self._here(self.encoder(modality).shorten(x)))[0]

    @torch.no_grad()
    def caption(
        self,
        values: Sequence[Any],
        *,
        head: str | None = None,
        batch_size: int = 64,
        method: Method = "greedy",
        beams: int = 4,
        top_p: float = 0.9,
        temperature: float = 1.0,
        seed: int = 0,
        min_tokens: int = 1,
        max_tokens: int | None = None,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
    ) -> list[str]:
        """Describe samples in words, one text each; `Decoding` tells what the settings mean.

        Args:
            values: samples of the modality that the head describes, as `encode` takes them.
            head: name of the captioning head, if the model has several.
            batch_size: samples described at once; it changes no text.
            method: "greedy", "beam" or "top_p".
            beams: beginnings that beam search keeps.
            top_p: probability of the words that are drawn from.
            temperature: divides the logits before a draw.
            seed: of the draws.
            min_tokens: tokens before a text may end.
            max_tokens: tokens after which it is cut.
            repetition_penalty: above 1, makes tokens less likely that the text has.
            length_penalty: how much a beam's score is divided by its length.

        Raises:
            ConfigError: no such head, or settings that cannot be used.
            BadSample: a value cannot be decoded.
        """
        decoding = Decoding(
            method=method,
            beams=beams,
            top_p=top_p,
            temperature=temperature,
            seed=seed,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
        )
        writer = self._captioner(head)
        tower: Any = self.encoder(writer.text)
        texts: list[str] = []
        with self._evaluating():
            for x in self._prepared("caption", writer.source, values, batch_size):
                _, tokens = self.encoder(writer.source)(self._here(x))
                assert tokens is not None  # or else the head could not have been built
                found = writer.generate(tower, tokens, decoding, first_row=len(texts))
                texts += [tower.decode(caption.ids) for caption in found]
        return texts

    def _captioner(self, name: str | None) -> Captioning:
        writers = {n: h for n, h in self.terms.items() if isinstance(h, Captioning)}
        if name is not None and name not in writers:
            raise ConfigError(f"the model has no captioning head {name!r}{suggest(name, writers)}")
        if not writers:
            raise ConfigError("the model cannot write captions: it was trained without a captioning head")
        if name is None and len(writers) > 1:
            raise ConfigError(f"the model has several captioning heads, {', '.join(writers)}: name one with `head`")
        return writers[name] if name is not None else next(iter(writers.values()))

    def _prepared(self, caller: str, modality: str, values: Sequence[Any], batch_size: int) -> Iterator[Any]:
        """Inputs of `batch_size` samples at a time."""
        if isinstance(values, (str, bytes)):
            raise ConfigError(f"{caller} takes a list of samples, got one {type(values).__name__}: put it into [ ]")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        transform = self.encoder(modality).transform(train=False)
        for i in range(0, len(values), batch_size):
            yield transform.collate([_prepare(transform, v) for v in values[i : i + batch_size]])

    def _here(self, x: Any) -> Any:
        device = next(self.parameters()).device
        return map_tensors(x, lambda t: t.to(device))

    @contextmanager
    def _evaluating(self) -> Generator[None]:
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def save_assets(self, folder: Path) -> None:
        """Write what the towers need, beside their weights, to be built again."""
        for name in self.encoders:
            (folder / name).mkdir(parents=True, exist_ok=True)
            self.encoder(name).save_assets(folder / name)


def _run_head(
    head: Head, inputs: Mapping[str, Any], tokens: Mapping[str, Tensor], rows: Mapping[str, Tensor]
) -> Tensor:
    """A head's sum over the rows that have all of its modalities; over a dummy row, times 0, where there is none."""
    places = in_common(rows, head.modalities)
    nobody = not len(places[head.modalities[0]])
    if nobody:
        places = {m: p.new_zeros(1) for m, p in places.items()}

    def pick(modality: str, t: Tensor) -> Tensor:
        at = places[modality]
        return t if len(at) == len(t) else t[at]

    total = head(
        {m: map_tensors(inputs[m], lambda t, m=m: pick(m, t)) for m in head.modalities},
        {m: pick(m, tokens[m]) for m in head.modalities},
    )
    return total * 0 if nobody else total


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
