"""Writing: what each method takes, when a text ends, and that neither neighbours nor batches change a word."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.encoders import MultiEncoder
from mmcontrast.heads import Captioning
from mmcontrast.heads.generation import Caption, Decoding, generate
from tests import tiny
from tests.coca import build, head_of, model_config

WORDS, START, END, ROOM = 6, 4, 5, 5


class Grammar:
    """A toy model: the next word's logits depend on the sample, on the last two words and on the place."""

    def __init__(self, samples: int, seed: int = 0, spread: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = spread * torch.randn(samples, ROOM + 1, WORDS, WORDS, WORDS, generator=generator)
        self.asked: list[list[int]] = []

    def __call__(self, ids: Tensor, rows: Tensor) -> Tensor:
        self.asked.append(rows.tolist())
        before = ids[:, -2] if ids.shape[1] > 1 else torch.full_like(rows, START)
        return self.table[rows, ids.shape[1] - 1, before, ids[:, -1]]

    def of(self, sample: int, written: Sequence[int]) -> list[float]:
        """Logits after some words, looked up by hand."""
        whole = [START, START, *written]
        return self.table[sample, len(written), whole[-2], whole[-1]].tolist()


def write(grammar: Grammar, **settings: Any) -> list[Caption]:
    return generate(grammar, len(grammar.table), Decoding(**settings), start=START, end=END, room=ROOM)


def log_probabilities(logits: list[float], *, may_end: bool) -> list[float]:
    """log softmax over what may be written, in a loop."""
    allowed = [w for w in range(WORDS) if w != START and (may_end or w != END)]
    total = sum(math.exp(logits[w]) for w in allowed)
    return [math.log(math.exp(logits[w]) / total) if w in allowed else -math.inf for w in range(WORDS)]


def score_by_hand(grammar: Grammar, sample: int, ids: Sequence[int], *, penalty: float, min_tokens: int = 1) -> float:
    """Log-probability of a text, its end counted if it is not cut, divided by its length as the penalty says."""
    words = [*ids, END] if len(ids) < ROOM else list(ids)
    total = sum(
        log_probabilities(grammar.of(sample, words[:t]), may_end=t >= min_tokens)[word] for t, word in enumerate(words)
    )
    return total / len(words) ** penalty


def every_text(min_tokens: int = 1) -> list[tuple[int, ...]]:
    return [ids for n in range(min_tokens, ROOM + 1) for ids in itertools.product(range(4), repeat=n)]


# ------------------------------------------------------------------------------------------------- greedy


def test_greedy_takes_the_likeliest_word_until_the_end() -> None:
    grammar = Grammar(40)
    found = write(grammar)
    for sample, caption in enumerate(found):
        ids: list[int] = []
        while len(ids) < ROOM:
            steps = log_probabilities(grammar.of(sample, ids), may_end=bool(ids))
            best = max(range(WORDS), key=lambda w: steps[w])
            if best == END:
                break
            ids.append(best)
        assert caption.ids == tuple(ids)
        assert caption.score == pytest.approx(score_by_hand(grammar, sample, ids, penalty=1), abs=1e-5)
    assert {len(c.ids) for c in found} == {1, 2, 3, 4, 5}, "the samples must end at different places"
    assert all(START not in c.ids and END not in c.ids for c in found)


def test_a_text_that_has_ended_is_left_alone() -> None:
    """An ended row is not asked again, and the others are written as if it had never been there."""
    grammar = Grammar(40)
    found = write(grammar)
    for turn, rows in enumerate(grammar.asked):
        assert rows == [sample for sample, caption in enumerate(found) if len(caption.ids) >= turn]
    for sample in (0, 7, 39):
        alone = Grammar(40)
        alone.table = alone.table[sample : sample + 1]
        assert write(alone)[0].ids == found[sample].ids


def test_shortest_and_longest_texts_are_as_asked() -> None:
    free = write(Grammar(60), min_tokens=0)
    assert any(caption.ids == () for caption in free)
    found = write(Grammar(60), min_tokens=2, max_tokens=3)
    assert {len(caption.ids) for caption in found} == {2, 3}
    for sample, caption in enumerate(write(Grammar(60), min_tokens=2, method="beam", beams=3)):
        want = score_by_hand(Grammar(60), sample, caption.ids, penalty=1, min_tokens=2)
        assert len(caption.ids) >= 2 and caption.score == pytest.approx(want, abs=1e-5)


def test_a_penalty_on_repetition_is_the_papers() -> None:
    table = torch.tensor([[2.0, 1.9, -1.0, -0.9, 9.0, -5.0]])

    def model(ids: Tensor, rows: Tensor) -> Tensor:
        return table.expand(len(rows), -1)

    def ids(penalty: float) -> tuple[int, ...]:
        decoding = Decoding(repetition_penalty=penalty)
        return generate(model, 1, decoding, start=START, end=END, room=ROOM)[0].ids

    assert ids(1.0) == (0, 0, 0, 0, 0)
    # 2/1.1 < 1.9, then 1.9/1.1 < 2/1.1: once each, then as if neither; a negative logit is multiplied.
    assert ids(1.1) == (0, 1, 0, 0, 0)
    assert ids(100.0) == (0, 1, 0, 0, 0)
    table[0, :2] = torch.tensor([-0.5, -0.6])
    assert ids(3.0) == (0, 1, 3, 2, 0)  # then -0.5 -> -1.5, -0.6 -> -1.8, -0.9 -> -2.7, -1.0 -> -3
    assert torch.equal(table[0, 2:], torch.tensor([-1.0, -0.9, 9.0, -5.0])), "the model's own logits were changed"


# ------------------------------------------------------------------------------------------------- beams


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_never_scores_less_than_greedy_and_is_greedy_at_width_one(penalty: float) -> None:
    greedy = write(Grammar(200), length_penalty=penalty)
    assert write(Grammar(200), method="beam", beams=1, length_penalty=penalty) == greedy
    for width in (2, 3, 5):
        grammar = Grammar(200)
        found = write(grammar, method="beam", beams=width, length_penalty=penalty)
        gains = [beam.score - base.score for beam, base in zip(found, greedy, strict=True)]
        assert min(gains) >= -1e-6 and sum(gain > 0.01 for gain in gains) > 20
        for sample in range(0, 200, 9):
            want = score_by_hand(grammar, sample, found[sample].ids, penalty=penalty)
            assert found[sample].score == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_a_beam_as_wide_as_the_tree_finds_the_best_text_of_all(penalty: float) -> None:
    grammar = Grammar(6, seed=3)
    found = write(grammar, method="beam", beams=5000, length_penalty=penalty)
    for sample, caption in enumerate(found):
        best = max(every_text(), key=lambda ids: score_by_hand(grammar, sample, ids, penalty=penalty))
        assert caption.ids == best
    assert len({caption.ids for caption in found}) > 3


# ------------------------------------------------------------------------------------------------- draws


def test_draws_have_the_probabilities_of_the_nucleus() -> None:
    samples = 4000
    grammar = Grammar(1, seed=5)
    one = grammar.table
    grammar.table = one.expand(samples, *one.shape[1:])
    p = [math.exp(v) for v in log_probabilities(grammar.of(0, []), may_end=False)]
    order = sorted(range(WORDS), key=lambda w: -p[w])
    for top_p in (0.5, 0.8, 1.0):
        nucleus = next(order[:k] for k in range(1, WORDS + 1) if sum(p[w] for w in order[:k]) >= top_p - 1e-9)
        drawn = [caption.ids[0] for caption in write(grammar, method="top_p", top_p=top_p, seed=1)]
        assert set(drawn) == set(nucleus)
        for word in nucleus:
            want = p[word] / sum(p[w] for w in nucleus)
            assert drawn.count(word) / samples == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / samples))
    assert len({ids for c in write(grammar, method="top_p", top_p=0.9) if (ids := c.ids)}) > 50
    cold = write(grammar, method="top_p", temperature=0.01, top_p=1.0)
    assert {caption.ids for caption in cold} == {write(grammar)[0].ids}
    assert {c.ids for c in write(grammar, method="top_p", top_p=1e-9)} == {write(grammar)[0].ids}


def test_draws_depend_on_the_seed_and_the_place_alone() -> None:
    first = write(Grammar(30), method="top_p", seed=1)
    assert write(Grammar(30), method="top_p", seed=1) == first
    assert write(Grammar(30), method="top_p", seed=2) != first
    before = torch.random.get_rng_state()
    for start in (0, 10):
        part = Grammar(30)
        part.table = part.table[start : start + 10]
        decoding = Decoding(method="top_p", seed=1)
        found = generate(part, 10, decoding, start=START, end=END, room=ROOM, first_row=start)
        assert [caption.ids for caption in found] == [caption.ids for caption in first[start : start + 10]]
    assert torch.equal(before, torch.random.get_rng_state())


# ------------------------------------------------------------------------------------------------- the model


PICTURES = [tiny.png(color, shape) for color in tiny.COLOURS for shape in tiny.SHAPES]


@pytest.fixture(scope="module")
def model() -> MultiEncoder:
    """Untrained, with a decoder that hangs on pictures and words, and likes to end."""
    found = build()
    head = head_of(found)
    with torch.no_grad():
        head.vocabulary.weight.mul_(30)
    return found


@pytest.mark.parametrize("method", ["greedy", "beam", "top_p"])
def test_the_batch_size_changes_no_text(model: MultiEncoder, method: Any) -> None:
    model.train()
    texts = model.caption(PICTURES, method=method, beams=2)
    assert model.training, "the model was left in another mode"
    assert len(texts) == len(PICTURES) and len(set(texts)) > 3, texts
    assert model.caption(PICTURES, method=method, beams=2, batch_size=5) == texts
    if method != "top_p":  # whose draws depend on the place
        assert model.caption(PICTURES[::-1], method=method, beams=2) == texts[::-1]
    assert model.caption([], method=method) == []


def test_what_is_written_is_what_the_loss_measures(model: MultiEncoder) -> None:
    """A text's score is the caption loss that training gives it, with the same picture: one decoder, not two."""
    model.eval()
    head, text = head_of(model), model.encoder("text")
    assert isinstance(head, Captioning)
    image = model.encoder("image")
    transform = image.transform(train=False)
    x = transform.collate([transform(p) for p in PICTURES])
    with torch.no_grad():
        tokens = image(x)[1]
        assert tokens is not None
        found = head.generate(text, tokens, Decoding(min_tokens=0, max_tokens=4, length_penalty=0.0))  # pyright: ignore[reportArgumentType]
        for i, caption in enumerate(found):
            ids = torch.tensor([[49406, *caption.ids, 49407]])
            inputs = {"text": {"ids": ids, "lengths": torch.tensor([ids.shape[1]])}}
            of_text = text(inputs["text"])[1]
            assert of_text is not None
            loss = head(inputs, {"image": tokens[i : i + 1], "text": of_text})
            hidden = head.decoder(tokens[i : i + 1], of_text[:, :-1])
            steps = head.vocabulary(hidden).log_softmax(-1)[0]
            if len(caption.ids) == 4:  # cut: its end was not written
                loss = loss + steps[-1, 49407]
                steps = steps[:-1]
            # The start may not be written, and what is left of the probability is shared.
            loss = loss + torch.log1p(-steps[:, 49406].exp()).sum()
            assert caption.score == pytest.approx(-float(loss), rel=1e-4, abs=1e-4)


def test_wrong_settings_are_refused(model: MultiEncoder) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "best"}, "method is 'best'; it must be greedy, beam or top_p"),
        ({"beams": 0}, "beams is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens is 3 and max_tokens 2"),
        ({"max_tokens": 8}, "max_tokens is 8, and the text tower has room for 7"),
        ({"head": "captoin"}, "no captioning head 'captoin'; did you mean 'caption'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            model.caption(PICTURES[:1], **settings)
    with pytest.raises(ConfigError, match="caption takes a list of samples, got one str"):
        model.caption("cat.png")
    silent: MultiEncoder = tiny.model_config().build()
    with pytest.raises(ConfigError, match="cannot write captions: it was trained without a captioning head"):
        silent.caption(PICTURES[:1])
    two = model_config(heads={n: Captioning.Config(layers=1, heads=2) for n in ("a", "b")}).build()
    with pytest.raises(ConfigError, match="several captioning heads, a, b: name one"):
        two.caption(PICTURES[:1])
    assert len(two.caption(PICTURES[:1], head="b")) == 1


def test_the_command_writes_a_line_for_each_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmcontrast import load

    run = tiny.write_run(tmp_path / "run", model_config())
    files: list[str] = []
    for number, picture in enumerate(PICTURES[:3]):
        files.append(str(tmp_path / f"{number}.png"))
        Path(files[-1]).write_bytes(picture)
    main(["caption", str(run), *files, "--method", "beam", "--beams", "2", "--json", str(tmp_path / "found.json")])
    want = load(run).caption(files, method="beam", beams=2)
    assert capsys.readouterr().out.splitlines() == [f"{f}\t{text}" for f, text in zip(files, want, strict=True)]
    assert json.loads((tmp_path / "found.json").read_text()) == [
        {"file": f, "caption": text} for f, text in zip(files, want, strict=True)
    ]
    for words in (
        ["caption", str(run)],
        ["caption", str(run), "no.png"],
        ["caption", str(run), files[0], "--beams", "0"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*words])
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
