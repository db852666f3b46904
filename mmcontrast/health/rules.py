"""What the numbers of a run mean: each rule turns some of them into one sentence that says what to do.

A rule must hold for several lines in a row before it is said, is said once, and may be said again after it has ceased
to hold. Thresholds are stated beside each rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmcontrast.config import ConfigError, Configurable
from mmcontrast.health.pulse import RankTimes

Line = Mapping[str, float]


@dataclass(frozen=True)
class Notice:
    """One sentence for a person, and the name of the rule that it is of."""

    rule: str
    text: str


@dataclass(frozen=True)
class _Sign:
    """Whether a rule holds in a line: the sentence if it does, None if not. Rules without numbers give no sign."""

    rule: str
    text: str | None
    after: int  # lines in a row


class Health(Configurable):
    """Watches the lines of a run."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """How often, and how patiently."""

        every: int = 50
        """Steps between measurements of geometry, gradients by tower and batch content."""
        patience: int = 5
        """Lines in a row that a bad sign must hold for."""
        stalled_after: float = 120.0
        """Seconds without any progress after which the ranks are named that the others wait for."""

    def __init__(
        self,
        config: Config,
        *,
        global_batch: int,
        settled: int,
        weights: Mapping[str, float],
        limits: Mapping[str, tuple[float, float]],
        labelled: bool,
    ) -> None:
        """Take what a line does not tell.

        Args:
            config: how often, and how patiently.
            global_batch: samples per step.
            settled: steps after which a run must have begun to learn: those of the warm-up.
            weights: objective -> its weight; 0 is one that only watches.
            limits: "OBJECTIVE.METRIC" -> range that it is kept in.
            labelled: whether an objective leaves out negatives by their labels.
        """
        if config.every < 1 or config.patience < 1:
            raise ConfigError(f"health: every {config.every} and patience {config.patience} must be at least 1")
        if config.stalled_after <= 0:
            raise ConfigError(f"health: stalled_after is {config.stalled_after}; it must be above 0 seconds")
        self.config, self.global_batch, self.settled = config, global_batch, settled
        self.weights, self.limits, self.labelled = weights, limits, labelled
        self.since: dict[str, list[int]] = {}  # rule -> steps of the lines in a row that it holds for
        self.measured: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether a step is measured."""
        return step % self.config.every == 0

    def see(self, step: int, line: Line, times: Sequence[RankTimes] = ()) -> list[Notice]:
        """What a line of a step says that was not said before.

        Args:
            step: how many steps are done.
            line: numbers by name, as in metrics.jsonl; those that are not finite say nothing.
            times: of each rank, since the line before.
        """
        line = {name: value for name, value in line.items() if math.isfinite(value)}
        self.measured |= {name: value for name, value in line.items() if name.startswith("chance/")}
        found: list[Notice] = []
        for sign in self._signs(step, line, times):
            if sign.text is None:
                self.since.pop(sign.rule, None)
                continue
            steps = self.since.setdefault(sign.rule, [])
            steps.append(step)
            if len(steps) == sign.after:
                found.append(Notice(sign.rule, sign.text))
        return found

    def _signs(self, step: int, line: Line, times: Sequence[RankTimes]) -> Iterator[_Sign]:
        yield from self._at_chance(step, line)
        yield from self._at_limit(line)
        yield from self._gradients(line)
        yield from self._collapse(step, line)
        yield from self._content(line)
        yield from self._pairs(line)
        yield from self._data_wait(line)
        yield from self._slow_rank(times)

    def _at_chance(self, step: int, line: Line) -> Iterator[_Sign]:
        """Loss within 2 % of what guessing gives, after the warm-up."""
        for name, weight in self.weights.items():
            loss, chance = line.get(f"{name}.loss"), self.measured.get(f"chance/{name}")
            if loss is None or chance is None or not weight or step <= self.settled or chance <= 0:
                continue
            rule = f"chance/{name}"
            first = self.since.get(rule, [step])[0]
            text = (
                f"the loss {name} is {loss:.3f}, and guessing gives ln(candidates) = {chance:.3f}: since step {first} "
                "nothing is learned. Look at pairs (`mmcontrast check shards`), gradients (`mmcontrast check grads`) "
                "and effective rank; then try a lower learning rate or a longer warm-up"
            )
            # Above it, too: scores of a collapsed model are equal, those of a diverged one are worse.
            yield _Sign(rule, text if abs(loss - chance) <= 0.02 * chance else None, self.config.patience)

    def _at_limit(self, line: Line) -> Iterator[_Sign]:
        """A learned scale within 0.1 % of an end of its range."""
        for name, (low, high) in self.limits.items():
            value = line.get(name)
            if value is None:
                continue
            text = None
            if value >= high * 0.999:
                text = (
                    f"{name} stands at its upper limit {high:g} (temperature {1 / high:.3g}): the scores can get no "
                    "sharper. A batch that is too easy does that, or a temperature that learns too fast: use harder "
                    "or larger batches, or a lower rate for it (`lr_scales`), before you raise `max_scale`"
                )
            elif low > 0 and value <= low * 1.001:
                text = (
                    f"{name} stands at its lower limit {low:g} (temperature {1 / low:.3g}): the model gives up to tell "
                    "pairs apart. Wrong pairs, or a diverged run, do that: look at pairs and at the learning rate"
                )
            yield _Sign(f"limit/{name}", text, self.config.patience)

    def _gradients(self, line: Line) -> Iterator[_Sign]:
        """A tower whose gradient is a ten-thousandth of the largest."""
        norms = {n.removeprefix("gradient/"): v for n, v in line.items() if n.startswith("gradient/")}
        most = max(norms.values(), default=0.0)
        for name, norm in norms.items():
            text = (
                f"the gradient of {name} has vanished: its norm is {norm:.2g}, the largest of the others {most:.2g}. "
                "Nothing reaches this tower: is it in the loss, are its rows there, are its embeddings collapsed?"
            )
            yield _Sign(
                f"gradient/{name}", text if most > 0 and norm < 1e-4 * most else None, min(2, self.config.patience)
            )

    def _collapse(self, step: int, line: Line) -> Iterator[_Sign]:
        """Mean cosine of a modality's rows above 0.95, or an effective rank below 2 % of the most that it can be."""
        for name, rank in line.items():
            if not name.startswith("geometry/effective_rank/") or step <= self.settled:
                continue
            m = name.rpartition("/")[2]
            cosine, limit = line[f"geometry/cosine/{m}"], line[f"geometry/rank_limit/{m}"]
            text = None
            if cosine > 0.95 or (limit >= 100 and rank < 0.02 * limit):
                text = (
                    f"the embeddings of {m} have collapsed: any two have a cosine of {cosine:.3f} on average, and "
                    f"they spread over {rank:.1f} of {limit:.0f} dimensions (effective rank). Check that the inputs "
                    "differ; a lower learning rate, a longer warm-up or a uniformity term help"
                )
            yield _Sign(f"collapse/{m}", text, min(2, self.config.patience))

    def _content(self, line: Line) -> Iterator[_Sign]:
        """Samples that are twice in a batch (1 %), texts that are (10 %)."""
        for name, share in line.items():
            if name == "batch/same_sample":
                text = (
                    f"{share:.0%} of the rows of a batch are a sample that is in it more than once: an epoch is "
                    "hardly larger than a batch. They are no negatives of each other, so the batch counts for less"
                )
                yield _Sign("same_sample", text if share > 0.01 else None, min(2, self.config.patience))
            elif name.startswith("batch/same_text/") and not self.labelled:
                m = name.rpartition("/")[2]
                text = (
                    f"{share:.0%} of the rows have a {m} that another row of the batch has as well: each pushes away "
                    "what it describes. Give equal ones a label in the shards, and name it in `never_negative`"
                )
                yield _Sign(f"same_text/{m}", text if share > 0.1 else None, min(2, self.config.patience))

    def _pairs(self, line: Line) -> Iterator[_Sign]:
        """Fewer than a tenth of the rows have both modalities."""
        for name, count in line.items():
            if not name.startswith("batch/pairs/"):
                continue
            x, _, y = name.rpartition("/")[2].partition("-")
            rows = min(line[f"batch/rows/{x}"], line[f"batch/rows/{y}"])
            text = (
                f"only {count:.0f} of {self.global_batch} rows have both {x} and {y}; a row has {max(rows - 1, 0):.0f} "
                "negatives there. A larger batch, or a larger weight of the sources that have both, gives more"
            )
            yield _Sign(
                f"pairs/{x}-{y}", text if count < 0.1 * self.global_batch else None, min(2, self.config.patience)
            )

    def _data_wait(self, line: Line) -> Iterator[_Sign]:
        """More than three tenths of the time."""
        share = line.get("data_wait")
        if share is not None:
            text = (
                f"training waits for data {share:.0%} of its time: more loader workers (`--data.workers`), "
                "smaller pictures in the shards, or a faster disk"
            )
            yield _Sign("data_wait", text if share > 0.3 else None, self.config.patience)

    def _slow_rank(self, times: Sequence[RankTimes]) -> Iterator[_Sign]:
        """A rank that comes to the exchange 30 % later than the one in the middle."""
        if len(times) < 2:
            return
        middle = sorted(t.busy for t in times)[(len(times) - 1) // 2]
        for t in times:
            slow = t.busy > 1.3 * middle and t.busy > middle + 0.01
            why = "mostly it waits for data" if t.data > t.encode else "its towers take longer: is the machine shared?"
            text = (
                f"rank {t.rank} ({t.host}) is slow: {t.busy:.3g} s of a step pass before it can exchange embeddings, "
                f"{middle:.3g} s on the rank in the middle, and all wait for it; {why}"
            )
            yield _Sign(f"slow/{t.rank}", text if slow else None, self.config.patience)
