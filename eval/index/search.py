"""An index with the model that made it: asked with texts, pictures, sounds, signals, stored samples, or all of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmcontrast.config import ConfigError
from mmcontrast.eval.index.identity import check_same, identity_of, open_model
from mmcontrast.eval.index.query import Piece, Query, bring_together
from mmcontrast.eval.index.stored import Hit, Stored
from mmcontrast.eval.index.vectors import Floats, unit
from mmcontrast.shards import BadSample


@dataclass(frozen=True)
class Answer:
    """What was found for a query.

    Attributes:
        hits: best first.
        joint: what the scores are of: the "sum" of the pieces, then they are cosines, or the "product".
        passing: samples that pass the query's filter, or all.
    """

    hits: list[Hit]
    joint: Literal["sum", "product"]
    passing: int


class Index(Stored):
    """An index on disk, opened with the model that made it.

    Attributes:
        manifest: what is known of it.
        segments: what it is made of.
        model: that made it.
    """

    def __init__(
        self, folder: Path, *, model: str | Path | None = None, trust: Collection[str] = (), verified: bool = True
    ) -> None:
        """Open and verify.

        Args:
            folder: what `build_index` wrote.
            model: where the model lies now, if it moved since; its hash must be the index's.
            trust: as for `mmcontrast.load`.
            verified: compare every file with its hash, which reads all of it once.

        Raises:
            ConfigError: no index, changed files, or another model, dimension or metric.
        """
        super().__init__(folder, verified=verified)
        place = str(model or self.manifest["model"])
        if not Path(place).is_dir() and "," not in place:
            raise ConfigError(f"{folder} needs the model {place}, which is not there; say where with --model")
        origin = open_model(place, trust=trust)
        self.model = origin.model
        # The hash first: of another model, preprocessing and dimensions differ as well, and say less.
        check_same(self.manifest, identity_of(origin, self.manifest["modality"]), str(folder), origin.place)

    def search(
        self, modality: str, queries: Sequence[Any], *, top: int = 5, where: str | None = None
    ) -> list[list[Hit]]:
        """The nearest samples to each query, best first; fewer than `top` where fewer are there, or pass the filter.

        Args:
            modality: of the model.
            queries: as `MultiEncoder.encode` takes them.
            top: answers per query.
            where: a filter on the columns, such as `label = 'dog' and rate >= 16000`.

        Raises:
            ConfigError: no such modality, `top` below 1, a query that cannot be read, or no filter of these columns.
        """
        return self.search_vectors(self._encode(modality, queries), top=top, where=where)

    def like(self, key: str, *, top: int = 5, where: str | None = None) -> list[Hit]:
        """The nearest samples to a stored one, but itself.

        Raises:
            ConfigError: no sample has the key; otherwise as for `search`.
        """
        return self.ask([Query([Piece(key=key)], where=where)], top=top)[0].hits

    def ask(self, queries: Sequence[Query], *, top: int = 5) -> list[Answer]:
        """The nearest samples to each query, but those that it names.

        Raises:
            ConfigError: a query that cannot be used; of several, it is said which one.
        """
        embedded = iter(self._embed([piece for query in queries for piece in query.pieces]))
        found: list[Answer] = []
        for number, query in enumerate(queries, 1):
            rows = {self.find(piece.key) for piece in query.pieces if piece.key is not None}
            own = str(self.manifest["modality"])
            pieces = [(piece.modality or own, next(embedded), piece.weight) for piece in query.pieces]
            try:
                z, joint = bring_together(
                    pieces,
                    query.joint,
                    trained=self.manifest["joint"],
                    target=own,
                    modalities=self.model.modalities,
                )
            except ConfigError as error:
                which = f"query {number}: " if len(queries) > 1 else ""
                raise ConfigError(f"{which}{error}") from None
            scores, places = self.nearest(z[None], top + len(rows), query.where)
            hits = [
                self.hit(float(score), int(place))
                for score, place in zip(scores[0], places[0], strict=True)
                if place >= 0 and place not in rows
            ]
            found.append(Answer(hits[:top], joint, self.count(query.where)))
        return found

    def _embed(self, pieces: Sequence[Piece]) -> list[Floats]:
        """[D] of each piece; those of one modality are encoded together."""
        found: list[Floats | None] = [None] * len(pieces)
        waiting: dict[str, list[int]] = {}
        for place, piece in enumerate(pieces):
            if piece.key is not None:
                found[place] = self.vector(self.find(piece.key))
            elif piece.z is not None:
                found[place] = unit(piece.z[None])[0]
            else:
                assert piece.modality is not None, "a value has a modality"
                waiting.setdefault(piece.modality, []).append(place)
        for modality, places in waiting.items():
            for place, z in zip(places, self._encode(modality, [pieces[p].value for p in places]), strict=True):
                found[place] = z
        return [z for z in found if z is not None]

    def _encode(self, modality: str, values: Sequence[Any]) -> Floats:
        try:
            return self.model.encode(modality, values).numpy()
        except BadSample as error:
            raise ConfigError(f"a query cannot be used: {error}") from None
