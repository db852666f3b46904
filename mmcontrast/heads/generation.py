"""Writing a text word by word: greedy, by beam search, or by drawing from the nucleus.

All rows have equally long prefixes at every turn, and a row that has ended leaves the batch: nothing can be appended
to it, and it costs nothing more. What is asked of the model is `next_logits(ids [R, t], rows [R]) -> [R, V]`, where
`rows` says which described sample each of the R prefixes belongs to.

Letters: R prefixes, t their length, V words of the vocabulary, n described samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.randomness import fold_seed

NextLogits = Callable[[Tensor, Tensor], Tensor]
Method = Literal["greedy", "beam", "top_p"]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How words are chosen.

    Attributes:
        method: "greedy" takes the likeliest word, "beam" keeps the likeliest beginnings, "top_p" draws from the
            likeliest words that together have probability `top_p` (Holtzman et al. 2020, arXiv:1904.09751).
        beams: beginnings that beam search keeps.
        top_p: probability of the nucleus, 0..1.
        temperature: divides the logits before a draw.
        seed: of the draws; a sample's draws depend on it and on the sample's place alone.
        min_tokens: tokens before the text may end.
        max_tokens: tokens after which it is cut; None leaves what the text tower has room for.
        repetition_penalty: above 1, makes tokens less likely that the text has (Keskar et al. 2019, arXiv:1909.05858).
        length_penalty: a beam's score is its log-probability / tokens ** this; 0 favours short texts.
    """

    method: Method = "greedy"
    beams: int = 4
    top_p: float = 0.9
    temperature: float = 1.0
    seed: int = 0
    min_tokens: int = 1
    max_tokens: int | None = None
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in ("greedy", "beam", "top_p"):
            raise ConfigError(f"method is {self.method!r}; it must be greedy, beam or top_p")
        if self.beams < 1:
            raise ConfigError(f"beams is {self.beams}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.max_tokens < max(1, self.min_tokens)):
            raise ConfigError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; they must be at least 0 and 1, "
                "the second not below the first"
            )


@dataclass(frozen=True)
class Caption:
    """A text: its token ids without start and end, and log-probability / tokens ** length_penalty, the end counted."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...]
    total: float  # log-probability so far


def generate(
    next_logits: NextLogits,
    n: int,
    decoding: Decoding,
    *,
    start: int,
    end: int,
    room: int,
    first_row: int = 0,
    device: torch.device | None = None,
) -> list[Caption]:
    """Write n texts.

    Args:
        next_logits: the model.
        n: samples that are described.
        decoding: how words are chosen.
        start: id that every text begins with; it is never written.
        end: id that ends a text.
        room: tokens that a text can have between start and end.
        first_row: place of the first sample among all, which the random draws depend on.
        device: where the model is.

    Raises:
        ConfigError: more `min_tokens` or `max_tokens` than there is room for.
    """
    for name, value in (("min_tokens", decoding.min_tokens), ("max_tokens", decoding.max_tokens or 0)):
        if value > room:
            raise ConfigError(f"{name} is {value}, and the text tower has room for {room}")
    writer = _Writer(next_logits, n, decoding, start, end, decoding.max_tokens or room, device)
    match decoding.method:
        case "top_p":
            return writer.walk(_nucleus(decoding, n, first_row))
        case "greedy":
            return writer.walk(lambda logits, rows: logits.argmax(1))
        case "beam":
            # The greedy text is a candidate too. A beam can lose it on the way and end with a worse one.
            greedy = writer.walk(lambda logits, rows: logits.argmax(1))
            if decoding.beams == 1:
                return greedy
            return [max(pair, key=lambda c: c.score) for pair in zip(greedy, writer.search(), strict=True)]


class _Writer:
    """The model, the rules of what may be written, and the two ways to go on: one prefix per sample, or several."""

    def __init__(
        self,
        next_logits: NextLogits,
        n: int,
        decoding: Decoding,
        start: int,
        end: int,
        limit: int,
        device: torch.device | None,
    ) -> None:
        self.next_logits, self.n, self.decoding, self.device = next_logits, n, decoding, device
        self.start, self.end, self.limit = start, end, limit

    def logits(self, ids: Tensor, rows: Tensor) -> Tensor:
        """[R, V] of what may follow the prefixes [R, t]; -inf for what may not."""
        logits = self.next_logits(ids, rows).clone()
        penalty = self.decoding.repetition_penalty
        if penalty != 1 and ids.shape[1] > 1:
            written = ids[:, 1:]
            seen = logits.gather(1, written)
            logits.scatter_(1, written, torch.where(seen > 0, seen / penalty, seen * penalty))
        logits[:, self.start] = -torch.inf
        if ids.shape[1] <= self.decoding.min_tokens:
            logits[:, self.end] = -torch.inf
        return logits

    def score(self, total: float, tokens: int) -> float:
        return total / tokens**self.decoding.length_penalty

    def walk(self, choose: Callable[[Tensor, Tensor], Tensor]) -> list[Caption]:
        """One prefix per sample, going on with what `choose(logits [R, V], rows [R])` takes."""
        found: dict[int, Caption] = {}
        ids = torch.full((self.n, 1), self.start, device=self.device)
        rows = torch.arange(self.n, device=self.device)
        totals = torch.zeros(self.n, device=self.device)
        for turn in range(self.limit):
            if not len(rows):
                break
            logits = self.logits(ids, rows)
            chosen = choose(logits, rows)
            totals = totals + logits.log_softmax(1).gather(1, chosen[:, None])[:, 0]
            ended = chosen == self.end
            for at in ended.nonzero()[:, 0].tolist():
                score = self.score(float(totals[at]), turn + 1)
                found[int(rows[at])] = Caption(tuple(ids[at, 1:].tolist()), score)
            ids, rows, totals = torch.cat([ids, chosen[:, None]], 1)[~ended], rows[~ended], totals[~ended]
        for at, row in enumerate(rows.tolist()):  # cut at the limit
            found[row] = Caption(tuple(ids[at, 1:].tolist()), self.score(float(totals[at]), self.limit))
        return [found[row] for row in range(self.n)]

    def search(self) -> list[Caption]:
        """The best text of each sample that `beams` prefixes at a time lead to."""
        width = self.decoding.beams
        alive = {row: [_Beam((), 0.0)] for row in range(self.n)}
        done: dict[int, list[Caption]] = {row: [] for row in range(self.n)}
        for turn in range(self.limit):
            if not alive:
                break
            prefixes = [[self.start, *beam.ids] for beams in alive.values() for beam in beams]
            owners = [row for row, beams in alive.items() for _ in beams]
            logits = self.logits(
                torch.tensor(prefixes, device=self.device), torch.tensor(owners, device=self.device)
            ).log_softmax(1)
            counts = [len(beams) for beams in alive.values()]
            for (row, beams), steps in zip(list(alive.items()), logits.split(counts), strict=True):
                alive[row] = self._extend(beams, steps, turn, done[row])
                if len(done[row]) >= width or not alive[row]:
                    del alive[row]
        for row, beams in alive.items():  # cut at the limit
            done[row] += [Caption(beam.ids, self.score(beam.total, self.limit)) for beam in beams]
        return [max(done[row], key=lambda caption: caption.score) for row in range(self.n)]

    def _extend(self, beams: list[_Beam], steps: Tensor, turn: int, done: list[Caption]) -> list[_Beam]:
        """The best `beams` ways to go on; those that end, if they are among the best, are put into `done`."""
        width, vocabulary = self.decoding.beams, steps.shape[1]
        totals = torch.tensor([beam.total for beam in beams], device=steps.device)[:, None] + steps
        # Twice as many: each beam has one way to end, so at least `beams` of these go on.
        values, places = totals.flatten().topk(min(2 * width, totals.numel()))
        kept: list[_Beam] = []
        for rank, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            ids, token = beams[place // vocabulary].ids, place % vocabulary
            if value == -float("inf") or len(kept) == width:
                break
            if token != self.end:
                kept.append(_Beam((*ids, token), value))
            elif rank < width:
                done.append(Caption(ids, self.score(value, turn + 1)))
        return kept


def _nucleus(decoding: Decoding, n: int, first_row: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A draw per row from the likeliest words whose probabilities reach `top_p`.

    Each sample draws from a generator of its own, so neither its neighbours nor the batch size change its text.
    """
    generators = [
        torch.Generator().manual_seed(fold_seed(decoding.seed, "caption", first_row + row)) for row in range(n)
    ]

    def choose(logits: Tensor, rows: Tensor) -> Tensor:
        p, order = (logits.cpu().double() / decoding.temperature).softmax(1).sort(dim=1, descending=True, stable=True)
        nucleus = p.cumsum(1) - p < decoding.top_p  # the word that crosses the limit is in
        upto = (p * nucleus).cumsum(1)
        draws = torch.stack([torch.rand(1, generator=generators[row], dtype=torch.float64) for row in rows.tolist()])
        at = (upto <= draws * upto[:, -1:]).sum(1, keepdim=True)
        # A draw just below 1 may round to the whole sum, behind which there is no word.
        at = at.clamp(max=nucleus.sum(1, keepdim=True) - 1)
        return order.gather(1, at)[:, 0].to(logits.device)

    return choose
