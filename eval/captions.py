"""Captions that a model writes, beside those that people wrote: BLEU, ROUGE-L and CIDEr, by pycocoevalcap's own code.

Words are runs of letters and digits in lower case, with apostrophes within. COCO's evaluation cuts them by Stanford's
PTB tokenizer, which needs Java and cuts contractions ("do n't") and keeps hyphenated words, so numbers differ a little.

Letters: n samples, R resamples.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcontrast.config import ConfigError
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.classified import SHOWN
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.result import Items, Result
from mmcontrast.eval.statistics import Floats, Statistic, mean, value
from mmcontrast.eval.task import EmbeddedTask, groups_of
from mmcontrast.eval.together import values_in_parts, world
from mmcontrast.heads.generation import Method

_CHUNK = 64  # samples that are decoded and described at once
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class Captions(EmbeddedTask):
    """What a captioning head writes of each sample (CoCa, Yu et al. 2022, arXiv:2205.01917), against its captions."""

    @dataclass(kw_only=True)
    class Config(EmbeddedTask.Config):
        """What is described, and how."""

        modality: str = "image"
        """What is described."""
        text: str = "text"
        """Modality of the captions; a sample may have several."""
        head: str | None = None
        """Name of the captioning head, if the model has several."""
        method: Method = "greedy"
        """The likeliest word each time, beam search, or a draw from the likeliest words."""
        beams: int = 4
        """Beginnings that beam search keeps."""
        max_tokens: int | None = None
        """Tokens after which a text is cut."""

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config

    def modalities(self) -> Sequence[str]:
        """What is described; captions are read as they are."""
        return [self.config.modality]

    def score(self, model: MultiEncoder, data: Embedded) -> Result:
        """Over the n samples that have a caption with words, see below.

        - bleu1, bleu4: of the corpus, with the closest caption's length (Papineni et al. 2002).
        - rouge_l: mean F1.2 of the longest common subsequence with the best caption (Lin 2004).
        - cider: CIDEr-D, from 0 to 10, its word weights from these samples' captions (Vedantam et al. 2015,
          arXiv:1411.5726); intervals keep the weights.
        - exact: share whose words are those of one of the captions.

        Chance is what the same texts reach when each is given to the next sample. Details: `captions` of samples at
        random and `worst`, those of the lowest CIDEr; at most 100 of each.

        Raises:
            ConfigError: no sample has a caption, the model has no captioning head, or pycocoevalcap is not installed.
        """
        c = self.config
        rows = data.rows.get(c.modality)
        if rows is None:
            raise ConfigError(f"no sample has the modality {c.modality!r}: there is nothing to describe")
        listed = list(dict.fromkeys(rows.tolist()))
        said = {row: data.source.values(int(data.positions[row]), c.text, "text") for row in listed}
        references = {row: [w for text in said[row] if (w := words(str(text)))] for row in listed}
        kept = [row for row in listed if references[row]]
        if not kept:
            raise ConfigError("no sample has a caption: there is nothing to compare with")
        positions = data.positions[kept].tolist()
        written = self._written(model, data, positions)
        scores = Scores([words(text) for text in written], [references[row] for row in kept])
        others = Scores([words(text) for text in (*written[1:], written[0])], [references[row] for row in kept])
        names = data.names_of(rows.new_tensor(kept))
        chance = {f"{name}_chance": value(s, len(kept)) or 0.0 for name, s in others.statistics().items()}

        def said_of(i: int) -> dict[str, Any]:
            found = {"item": names[i], "position": positions[i], "written": written[i], "cider": float(scores.cider[i])}
            return found | {"captions": [str(text) for text in said[kept[i]]]}

        some = np.random.default_rng(0).permutation(len(kept))[:SHOWN].tolist()
        worst = scores.cider.argsort(kind="stable")[:SHOWN].tolist()
        return Result(
            "captioning",
            [Items(names, scores.statistics(), groups_of(data.meta, kept, c.bootstrap_by))],
            chance=chance if len(kept) > 1 else {},
            counts={"samples": len(kept), "captions": sum(len(references[row]) for row in kept)},
            renamed={"Bleu_1": "bleu1", "Bleu_4": "bleu4", "ROUGE_L": "rouge_l", "CIDEr": "cider"},
            details={"captions": [said_of(i) for i in some], "worst": [said_of(i) for i in worst]},
        )

    def _written(self, model: MultiEncoder, data: Embedded, positions: Sequence[int]) -> list[str]:
        from tqdm import tqdm

        c = self.config
        kind = data.kinds[c.modality]
        settings: dict[str, Any] = {"head": c.head, "method": c.method, "beams": c.beams, "max_tokens": c.max_tokens}
        chunks = [positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK)]
        hidden = world().rank > 0 or not sys.stderr.isatty()
        with tqdm(total=len(positions), desc="caption", unit="sample", disable=hidden) as bar:

            def write(chunk: Sequence[int]) -> list[str]:
                said = model.caption([data.source.values(p, c.modality, kind)[0] for p in chunk], **settings)
                bar.update(len(chunk) * world().size)
                return said

            return [text for said in values_in_parts(write, chunks) for text in said]


def words(text: str) -> str:
    """The words of a text, in lower case, one blank between them."""
    return " ".join(_WORD.findall(text.lower()))


class Scores:
    """Of each written text, against its captions.

    Attributes:
        correct, guessed: [n, 4], n-grams that a caption has too (clipped counts), and all that are written.
        lengths: [n, 2], words written, and of the caption of the closest length.
        rouge, cider, exact: [n].
    """

    def __init__(self, written: Sequence[str], captions: Sequence[Sequence[str]]) -> None:
        """Score texts that `words` gave.

        Raises:
            ConfigError: pycocoevalcap is not installed.
        """
        try:
            from pycocoevalcap.bleu.bleu_scorer import BleuScorer
            from pycocoevalcap.cider.cider import Cider
            from pycocoevalcap.rouge.rouge import Rouge
        except ImportError:
            raise ConfigError("captions are scored by pycocoevalcap: pip install 'mmcontrast[captions]'") from None
        bleu: Any = BleuScorer(n=4)
        for text, said in zip(written, captions, strict=True):
            bleu += (text, list(said))
        self.correct = np.array([c["correct"] for c in bleu.ctest], dtype=np.float64)
        self.guessed = np.array([c["guess"] for c in bleu.ctest], dtype=np.float64)
        closest = [min((abs(r - c["testlen"]), r) for r in c["reflen"])[1] for c in bleu.ctest]
        self.lengths = np.array([[c["testlen"], r] for c, r in zip(bleu.ctest, closest, strict=True)], dtype=np.float64)
        right: Any = {i: list(said) for i, said in enumerate(captions)}
        given: Any = {i: [text] for i, text in enumerate(written)}
        self.rouge: Floats = np.asarray(Rouge().compute_score(right, given)[1], dtype=np.float64)
        self.cider: Floats = np.asarray(Cider().compute_score(right, given)[1], dtype=np.float64)
        self.exact = np.array([float(text in said) for text, said in zip(written, captions, strict=True)])

    def statistics(self) -> dict[str, Statistic]:
        """By name."""
        return {
            "bleu1": self._bleu(1),
            "bleu4": self._bleu(4),
            "rouge_l": mean(self.rouge),
            "cider": mean(self.cider),
            "exact": mean(self.exact),
        }

    def _bleu(self, n: int) -> Statistic:
        """Geometric mean of the corpus's precisions of 1- to n-grams, times the brevity penalty."""

        def of(weights: Floats) -> Floats:
            # Its small numbers, which keep a precision of nothing from being undefined.
            precision = (weights @ self.correct[:, :n] + 1e-15) / (weights @ self.guessed[:, :n] + 1e-9)
            length = weights @ self.lengths
            ratio = (length[:, 0] + 1e-15) / (length[:, 1] + 1e-9)
            return precision.prod(1) ** (1 / n) * np.exp(np.minimum(0, 1 - 1 / ratio))

        return of
