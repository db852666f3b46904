"""`check shards` counts exactly what was planted, says it in sentences, and shows it on a page that is safe."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmcontrast.check.demand import demand_of, plan
from mmcontrast.check.findings import three
from mmcontrast.check.likeness import NEAR, alike, groups, near_pairs, overlap
from mmcontrast.check.measure import audio, image, series, timeseries
from mmcontrast.check.shards import Checked, check_shards
from mmcontrast.check.shards_page import shards_page
from mmcontrast.check.summary import summarise
from mmcontrast.check.survey import Job, choose, survey
from mmcontrast.check.survey import Source as SourceOf
from mmcontrast.check.table import as_text
from mmcontrast.check.tokens import TokenCounter, token_counter
from mmcontrast.cli import main
from mmcontrast.config import ConfigError, RunError
from mmcontrast.data import Captions, Compose, Mixture, Source, Stream
from mmcontrast.encoders import BagOfWords, CoCaText, MelConvNet, MultiEncoder, TextTransformer
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.objectives import InfoNCE
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import BadSample, open_shards
from mmcontrast.trainer import Trainer
from tests.test_page import Reader
from tests.tiny import text_transformer, vit

SCRIPT = "<script>alert(1)</script> & \x1b[31m\"quotes' {braces}"
LONG = "one two three four five six seven eight nine ten eleven twelve"
Content = Mapping[str, bytes | str | Mapping[str, Any]]


def drawn(seed: int, *, size: tuple[int, int] = (40, 32), form: str = "PNG", **settings: Any) -> bytes:
    """A smooth picture of its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, form, **settings)
    return file.getvalue()


def flat(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, 90).save(file, "PNG")
    return file.getvalue()


def planted() -> dict[str, Content]:
    """Key -> members of 30 samples."""
    found: dict[str, Content] = {
        f"good{k:02d}": {"png": drawn(k), "txt": f"caption number {k}", "json": {"label": "abc"[k % 3], "who": k % 4}}
        for k in range(16)
    }
    return found | {
        "same": {"png": drawn(0), "txt": "Caption  NUMBER 0", "json": {"label": "a"}},
        "again": {"png": drawn(0), "txt": "caption number 0"},
        "scaled": {"jpg": drawn(1, size=(80, 64), form="JPEG", quality=90), "txt": "a copy of another size"},
        "plain": {"png": flat((8, 30)), "txt": "nothing to see"},
        "tiny": {"webp": drawn(77, size=(12, 10), form="WEBP"), "txt": "small"},
        "silent": {"png": drawn(50)},
        "unseen": {"txt": "words alone"},
        "long": {"png": drawn(51), "txt": LONG},
        "hostile": {"png": drawn(52), "txt": SCRIPT, "json": {SCRIPT: SCRIPT, "label": SCRIPT}},
        "torn": {"png": drawn(53)[:300], "txt": "half a picture"},
        "nothing": {"png": drawn(54), "txt": "  "},
        "latin": {"png": drawn(55), "txt": b"caf\xe9"},
        "list": {"png": drawn(56), "txt": "wrong metadata", "json": b"[1]"},
        "lonely": {"json": {"label": "a"}},
    }


def write(folder: Path, content: Mapping[str, Content], *, per_shard: int = 12) -> Path:
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for key, members in content.items():
            writer.write(Sample(key, members))
    return folder


def config(shards: Path, *, evaluate: Path | None = None, **data: Any) -> Trainer.Config:
    text = text_transformer(context_length=8)
    return Trainer.Config(
        model=MultiEncoder.Config(encoders={"image": vit(), "text": text}, dim=8),
        data=Stream.Config(shards=(str(shards),), workers=2, **data),
        objectives={"clip": InfoNCE.Config()},
        evaluators={"val": Retrieval.Config(data=(str(evaluate),))} if evaluate else {},
        steps=20,
        global_batch=6,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted samples; of the first shard, one byte of a picture was changed after it was written."""
    folder = write(tmp_path_factory.mktemp("data") / "planted", planted())
    content = bytearray((folder / "00000.tar").read_bytes())
    index = json.loads((folder / "00000.index.json").read_text())
    content[index["members"]["png"]["offset"][5] + 60] ^= 1
    (folder / "00000.tar").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def checked(shards: Path) -> Checked:
    return check_shards([str(shards)], workers=0)


def found(checked: Checked, topic: str) -> list[tuple[str, str]]:
    return [(f.level, f.text) for f in checked.report.findings if f.topic == topic]


# ------------------------------------------------------------------------------------------------- what is counted


def test_counts_are_those_of_a_plain_walk(shards: Path, checked: Checked) -> None:
    r = checked.report
    present: Counter[tuple[str, ...]] = Counter()
    members: Counter[str] = Counter()
    for content in planted().values():
        members.update(content.keys())
        kinds = (("image", ("png", "jpg", "webp")), ("text", ("txt",)))
        present[tuple(kind for kind, ends in kinds if any(e in content for e in ends))] += 1
    assert (r.samples, r.shards, r.examined, r.left_out) == (30, 3, 30, 0)
    assert r.members == dict(members)
    assert {tuple(names): n for names, n in r.present} == dict(present)
    assert r.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert (r.per_shard.least, r.per_shard.median, r.per_shard.most) == (6, 12, 12)
    assert r.fields == {"label": 19, "who": 16, SCRIPT: 1}
    assert r.repeated_keys == 0 and r.without_manifest == []
    assert (r.modalities["image"].missing, r.modalities["text"].missing) == (2, 2)


def test_damage_is_counted_by_shard_and_reason(shards: Path, checked: Checked) -> None:
    r = checked.report
    place = [str(shards / f"0000{i}.tar") for i in range(3)]
    truth = {
        (place[0], "checksum of png"): ["good05"],
        (place[2], "image cannot be decoded (OSError)"): ["torn"],
        (place[2], "text is empty"): ["nothing"],
        (place[2], "text is not UTF-8"): ["latin"],
        (place[2], "json is not an object"): ["list"],
        (place[2], "has none of image, text"): ["lonely"],
    }
    assert {(d.shard, d.reason): d.examples for d in r.damage} == truth
    assert all(d.samples == 1 and not d.left_out for d in r.damage)
    assert r.bad == 6 and r.bad_share == 0.2
    [(level, text)] = found(checked, "damage")
    assert level == "error" and text.startswith("6 of 30 (20 %) examined samples cannot be used; most often")
    assert "above max_bad_fraction (1 %)" in text


def test_pictures_are_measured(checked: Checked) -> None:
    m = checked.report.modalities["image"]
    sizes: Counter[tuple[int, int]] = Counter()
    formats: Counter[str] = Counter()
    for key, content in planted().items():
        data = next((content[e] for e in ("png", "jpg", "webp") if e in content), None)
        if isinstance(data, bytes) and key not in ("torn", "good05"):
            with Image.open(io.BytesIO(data)) as opened:
                sizes[opened.size] += 1
                formats[opened.format or ""] += 1
    assert m.samples == sizes.total() == 26
    assert m.words["format"] == dict(formats) and m.words["mode"] == {"RGB": 25, "L": 1}
    widths = [w for (w, _), n in sizes.items() for _ in range(n)]
    assert (m.numbers["width"].least, m.numbers["width"].most) == (min(widths), max(widths)) == (8, 80)
    assert m.numbers["width"].mean == pytest.approx(np.mean(widths))
    assert m.numbers["shorter side"].least == 8 and m.numbers["height"].most == 64
    assert m.numbers["width / height"].least == 0.267 and m.numbers["megapixels"].most == 0.00512
    assert m.flags == {"one colour": 1}


def test_copies_are_found(checked: Checked) -> None:
    pictures, texts = (checked.report.modalities[m] for m in ("image", "text"))
    assert pictures.repeats.surplus == 2 and [t.count for t in pictures.repeats.top] == [3]
    assert pictures.repeats.top[0].place.key == "good00"
    assert pictures.alike is not None and pictures.alike.samples == 2
    [(a, b, bits)] = pictures.alike.pairs
    assert (a.key, b.key) == ("good01", "scaled") and bits <= NEAR
    assert texts.repeats.surplus == 2  # whatever their case and spaces
    assert [(t.count, t.text) for t in texts.repeats.top] == [(3, "caption number 0")]
    assert texts.repeats.chance == pytest.approx(3 * 2 / (26 * 25))
    assert texts.numbers["characters"].most == len(LONG) and texts.flags == {}


def test_the_same_with_two_processes(shards: Path, checked: Checked) -> None:
    recipe = config(shards, evaluate=shards, groups=("who",))
    recipe.model.encoders["text"] = BagOfWords.Config(max_words=3, width=8)
    demand = demand_of(recipe)
    alone, together = (
        check_shards([str(shards)], demand=demand, workers=workers).report.as_json() for workers in (0, 2)
    )
    assert alone == together
    assert alone["modalities"]["text"]["numbers"]["tokens"]["count"] == 26 and alone["evaluations"][0]["shared"]


def test_damage_that_no_reader_meets_stops_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "two", {"both": {"jpg": drawn(1, form="JPEG"), "png": drawn(2), "txt": "two pictures"}})
    content = bytearray((folder / "00000.tar").read_bytes())
    index = json.loads((folder / "00000.index.json").read_text())
    content[index["members"]["png"]["offset"][0] + 60] ^= 1  # readers take the jpg
    (folder / "00000.tar").write_bytes(content)
    checked = check_shards([str(folder)], workers=0)
    assert checked.report.bad == 0 and checked.report.modalities["image"].samples == 1
    [(level, text)] = found(checked, "damage")
    assert level == "note" and "1 members that are not read are damaged, such as 'both'" in text
    assert "checksum of png, which is not read" in as_text(checked.report)


class Deadly:
    """A tokenizer that kills its process, as the system does where memory runs out."""

    tokenizer = property(lambda self: os._exit(9))


def test_a_killed_process_is_one_sentence(shards: Path) -> None:
    opened = open_shards([str(shards)])
    job = Job(opened, {"text": SourceOf("text", ("txt",))}, counters={"text": TokenCounter(Deadly(), 8)})
    with pytest.raises(RunError, match="lower --workers"):
        survey([job], [range(30)], workers=2)


def test_a_sample_of_the_samples(shards: Path) -> None:
    a, b, other = (check_shards([str(shards)], workers=0, sample=10, seed=seed) for seed in (1, 1, 2))
    assert a.report.examined == 10 and a.report.samples == 30
    assert a.report.as_json() == b.report.as_json() and list(a.positions) != list(other.positions)
    assert "10 samples at random (seed 1) were decoded" in as_text(a.report)
    assert list(choose(5, 0, 3)) == list(choose(5, 9, 3)) == [0, 1, 2, 3, 4]
    chosen = choose(10**9, 1000, 0)
    assert len(set(chosen)) == 1000 and list(chosen) == sorted(chosen) and max(chosen) < 10**9


def test_foreign_shards_with_breaks_and_keys_that_come_back(tmp_path: Path) -> None:
    def tar(name: str, members: list[tuple[str, bytes]]) -> Path:
        with tarfile.open(tmp_path / name, "w") as out:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
        return tmp_path / name

    pairs = [(f"{k}.{e}", d) for k in range(4) for e, d in (("png", drawn(k)), ("txt", b"text %d" % k), ("cls", b"7"))]
    tar("a.tar", pairs + [("0.txt", b"comes back")])
    cut = tar("b.tar", pairs)
    cut.write_bytes(cut.read_bytes()[: -len(drawn(3)) - 12000])
    checked = check_shards([str(tmp_path)], workers=0)
    r = checked.report
    left_out = {(Path(d.shard).name, d.reason): d.examples for d in r.damage if d.left_out}
    assert left_out.keys() >= {("a.tar", "key comes back")} and left_out["a.tar", "key comes back"] == ["0"]
    assert r.left_out == sum(d.samples for d in r.damage) == sum(map(len, open_shards([str(tmp_path)]).damage.values()))
    kept = {k for name, key in (open_shards([str(tmp_path)]).name(p) for p in range(r.samples)) for k in [(name, key)]}
    assert r.samples == len(kept) and r.bad == 0
    assert r.repeated_keys == r.samples - len({key for _, key in kept}) > 0
    assert r.members["cls"] == r.samples and "are lost to breaks" in found(checked, "damage")[0][1]
    assert [text for _, text in found(checked, "checksums")] == [
        f"{tmp_path} has no manifest, so changed bytes may go unseen: `mmcontrast prep index {tmp_path}`."
    ]


def wave(samples: np.ndarray[Any, Any], rate: int = 8000, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def test_sounds_are_heard_to_their_end(tmp_path: Path) -> None:
    time = np.arange(8000) / 8000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    late = tone.copy()
    late[-1] = np.nan
    content: dict[str, Content] = {
        "tone": {"wav": wave(tone), "txt": "a tone"},
        "copy": {"wav": wave(tone), "txt": "a copy"},
        "still": {"flac": wave(np.zeros(4000), form="FLAC"), "txt": "nothing"},
        "loud": {"wav": wave((4 * tone).clip(-1, 1)), "txt": "clipped"},
        "both": {"wav": wave(np.stack([tone, tone], 1), 16000), "txt": "stereo"},
        "broken": {"wav": wave(late, subtype="FLOAT"), "txt": "not a number at the end"},
        "no": {"wav": b"RIFF....WAVE", "txt": "no sound"},
    }
    r = (checked := check_shards([str(write(tmp_path / "a", content))], workers=0)).report
    m = r.modalities["audio"]
    assert m.samples == 5 and m.words["rate"] == {"8000": 4, "16000": 1} and m.words["channels"] == {"1": 4, "2": 1}
    assert m.flags == {"silent": 1, "clipped": 1} and m.repeats.surplus == 1
    assert (m.numbers["seconds"].least, m.numbers["seconds"].most) == (0.5, 1)
    assert m.numbers["loudness"].least == round(20 * np.log10(0.5 / np.sqrt(2))) == -9
    assert {d.reason for d in r.damage} == {
        "audio has values that are not finite",
        "audio cannot be decoded (LibsndfileError)",
    }
    assert ("note", "audio members differ in samples per second: 8000 (4), 16000 (1).") in found(checked, "mixture")
    assert audio(wave(tone)).values["loudness"] == -9
    heard = Reader(shards_page(checked, samples=9)).named("audio")
    assert len(heard) == 5 + 1 and all((a["src"] or "").startswith("data:audio/wav") for a in heard)  # the copy twice


def npy(values: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def test_signals_are_measured_and_never_unpickled(tmp_path: Path) -> None:
    leads = np.random.default_rng(0).normal(size=(12, 500)).astype(np.float32)
    resting = leads.copy()
    resting[3] = 1
    wrong = leads.copy()
    wrong[0, 0] = np.inf
    content: dict[str, Content] = {
        "a": {"npy": npy(leads), "json": {"fs": 500}},
        "b": {"npy": npy(leads.T[:400]), "json": {"sampling_rate": 100}},
        "c": {"npy": npy(resting.astype(np.int16))},
        "d": {"npy": npy(wrong)},
        "e": {"npy": npy(leads)[:-9]},
        "f": {"npy": npy(np.array([Trap()]))},
        "g": {"npy": npy(np.zeros((2, 3, 4)))},
    }
    r = (checked := check_shards([str(write(tmp_path / "e", content))], workers=0)).report
    m = r.modalities["timeseries"]
    assert m.samples == 3 and m.words["channels"] == {"12": 3} and m.words["type"] == {"float32": 2, "int16": 1}
    assert m.words["layout"] == {"channels first": 2, "length first": 1}
    assert m.words["rate in the metadata"] == {"500": 1, "100": 1}
    assert (m.numbers["length"].least, m.numbers["length"].most) == (400, 500)
    assert m.flags == {"a channel without change": 1}
    assert Counter(d.reason for d in r.damage) == {
        "npy has values that are not finite": 1,
        "npy is cut off": 1,
        "npy does not hold real numbers": 1,
        "npy has 3 axes": 1,
    }
    assert not Trap.sprung
    pickle.loads(pickle.dumps(Trap()))
    assert Trap.sprung  # as it would have been, had anybody read it
    levels = dict((text.partition(":")[0], level) for level, text in found(checked, "mixture"))
    assert levels["timeseries members differ in layout"] == "warning"
    assert len(Reader(shards_page(checked, samples=7)).named("path")) == 36


class Trap:
    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Trap, "sprung", True))


def test_a_header_that_claims_a_petabyte_is_refused() -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 100000000), }"
    data = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    with pytest.raises(BadSample, match="cut off"):
        series(data)
    assert timeseries(npy(np.arange(5.0))).words == {"channels": "1", "layout": "channels first", "type": "float64"}


# ------------------------------------------------------------------------------------------------- against a recipe


def test_what_a_recipe_asks(shards: Path) -> None:
    recipe = config(shards, groups=("label", "who"), max_bad_fraction=0.5)
    checked = check_shards([str(shards)], demand=demand_of(recipe), workers=0, ranks=(1, 3, 4))
    r = checked.report
    texts = r.modalities["text"]
    said = [t for c in planted().values() if isinstance(t := c.get("txt"), str) and t.strip()]
    lengths = slow_lengths(said)
    assert texts.numbers["tokens"].most == max(lengths) and texts.numbers["tokens"].mean == pytest.approx(
        np.mean(lengths)
    )
    assert texts.short["tokens"] == sum(n > 8 for n in lengths) == 2 and texts.asked == {"tokens": 8}
    assert found(checked, "truncation") == [
        (
            "warning",
            "2 of 26 (7.69 %) captions are longer than the 8 tokens that the tower reads (the longest has "
            f"{max(lengths)}): their ends are never seen.",
        )
    ]
    assert r.modalities["image"].short == {"side": 2} and r.modalities["image"].asked == {"side": 16}
    assert found(checked, "size")[0][1].startswith("2 of 26 (7.69 %) image members have a side below the 16 pixels")
    assert found(checked, "damage")[0][0] == "warning" and r.passed

    labels = [json_of(c).get("label") for c in planted().values()]
    counts = Counter(label for label in labels if label is not None)
    assert (r.groups["label"].samples, r.groups["label"].distinct) == (19, 4)
    assert [(t.text, t.count) for t in r.groups["label"].top] == counts.most_common()
    meets = [sum(a is not None and a == b for b in labels) - 1 for a in labels if a is not None]
    assert r.groups["label"].chance == pytest.approx(sum(meets) / (30 * 29))
    assert r.groups["label"].met == pytest.approx(slow_met(recipe, labels))
    captions = [t if isinstance(t := c.get("txt"), str) and t.strip() else None for c in planted().values()]
    captions = [None if t is None else " ".join(t.lower().split()) for t in captions]
    truth = slow_met(recipe, captions)
    assert texts.repeats.met == pytest.approx(truth) and truth > 0
    assert f"each meets {three(truth)} false negatives" in found(checked, "repeats")[-1][1]
    others = three(slow_met(recipe, labels))
    assert f"each meets {others} others of its group" in found(checked, "groups")[0][1]

    assert r.plan is not None and (r.plan.per_epoch, r.plan.steps_per_epoch, r.plan.epochs) == (30, 5, 4)
    assert [(x.ranks, x.readers, x.per_rank, x.own_lanes) for x in r.plan.ranks] == [
        (1, 2, 6, True),
        (3, 6, 2, False),
        (4, 8, 1, False),
    ]
    assert [text for _, text in found(checked, "run")] == [
        "4 ranks cannot run this recipe: the global batch (6) must be a multiple of the ranks (4).",
        "20 steps of 6 go 4 times through 30 examples, 5 steps each time.",
        "with 3 ranks, 1 lane is shared: every rank reads from every shard. Where shards lie far away, make data.lanes "
        "a multiple of the ranks.",
    ]


def slow_met(recipe: Trainer.Config, labels: list[Any], *, read: bool = False) -> float:
    """Others of its label that a sample meets, counted in the batches of a training run; `read` really reads them."""
    model: MultiEncoder = recipe.model.build()
    stream = recipe.data.build(model.transforms(train=True), seed=recipe.seed, global_batch=recipe.global_batch)
    found: list[int] = []
    for step in range(recipe.steps):
        places = [stream.place(step, slot) for slot in range(recipe.global_batch)]
        ids = [stream.sources[k].position(lane, turn) for k, lane, turn in places]  # before damage is replaced
        if read:
            assert stream.batch(step).ids.tolist() == ids
        found += [sum(labels[j] == labels[i] for j in ids) - 1 if labels[i] is not None else 0 for i in ids]
    return sum(found) / len(found)


def test_groups_that_lie_together_are_told(tmp_path: Path) -> None:
    content: dict[str, Content] = {
        f"{k:02d}": {"png": drawn(k), "txt": f"text {k}", "json": {"label": k // 6}} for k in range(36)
    }
    folder = write(tmp_path / "sorted", content)
    for window, level in ((1, "warning"), (16384, "note")):
        recipe = config(folder, groups=("label",), window=window)
        checked = check_shards([str(folder)], demand=demand_of(recipe), workers=0)
        g = checked.report.groups["label"]
        assert g.chance == pytest.approx(5 / 35) and g.met == pytest.approx(
            slow_met(recipe, [k // 6 for k in range(36)])
        )
        assert (g.met == 5) == (window == 1)
        [(found_level, text)] = found(checked, "groups")
        assert found_level == level and ("if all were mixed" in text) == (window == 1)
    recipe = config(folder, groups=("label",))
    sampled = check_shards([str(folder)], demand=demand_of(recipe), workers=0, sample=20)
    assert sampled.report.groups["label"].met is None


def slow_lengths(texts: list[str]) -> list[int]:
    """Tokens of each text, counted in what the tokenizer gives where nothing is cut."""
    from open_clip.tokenizer import SimpleTokenizer

    return [int((SimpleTokenizer()([text], context_length=500)[0] != 0).sum()) for text in texts]


def json_of(content: Content) -> Mapping[str, Any]:
    value = content.get("json", {})
    return value if isinstance(value, Mapping) else {}


def test_tokens_of_every_text_tower() -> None:
    texts = ["a cat", LONG, "<end_of_text> a", "Zwölf Boxkämpfer", "!?"]
    counter = token_counter(TextTransformer.Config(context_length=8, width=8, heads=1).build().transform(train=False))
    assert counter is not None and [counter(t) for t in texts] == slow_lengths(texts)
    coca = CoCaText.Config(context_length=500, width=8, heads=1, layers=1).build().transform(train=False)
    counter = token_counter(coca)
    assert counter is not None and [counter(t) for t in texts] == [len(coca(t)) for t in texts]
    bag = BagOfWords.Config(max_words=500, width=8, buckets=8).build().transform(train=False)
    counter = token_counter(bag)
    assert counter is not None and [counter(t) for t in texts[:4]] == [len(bag(t)) for t in texts[:4]]
    assert token_counter(object()) is None


def test_what_would_stop_training_is_an_error(shards: Path, tmp_path: Path) -> None:
    recipe = config(shards, groups=("patient",), max_bad_fraction=0.5)
    recipe.model.encoders["audio"] = MelConvNet.Config(sample_rate=16000, seconds=0.1, width=8, layers=1, mels=4)
    checked = check_shards([str(shards)], demand=demand_of(recipe), workers=0)
    assert not checked.report.passed
    [(level, text), *_] = found(checked, "modality")
    assert level == "error" and text.startswith("no sample has the modality 'audio' (members flac, wav, ogg, mp3);")
    [(level, text)] = found(checked, "groups")
    assert level == "error" and "no sample has the metadata field 'patient'" in text and "label, who" in text
    assert found(checked, "run")[0][0] == "error" and "'audio'" in found(checked, "run")[0][1]

    recipe = config(shards, lanes=4)
    assert "lanes (4) must divide" in (plan(recipe, "", (1,))[0].problem or "")
    alone = write(tmp_path / "alone", {"a": {"png": drawn(1)}, "b": {"txt": "words"}})
    checked = check_shards([str(alone)], demand=demand_of(config(alone)), workers=0)
    assert ("error", "no sample has two modalities: there is nothing to contrast.") in found(checked, "modality")


def test_one_of_several_sources(tmp_path: Path) -> None:
    def pairs(count: int, seed: int) -> dict[str, Content]:
        return {f"{k}": {"png": drawn(seed + k), "syn.txt": b"x", "txt": f"text {k % 2}"} for k in range(count)}

    folders = {name: tmp_path / name for name in ("web", "mine")}
    for (name, folder), count in zip(folders.items(), (24, 12), strict=True):
        with tarfile.open(folder.with_suffix(".tar"), "w") as out:
            for key, members in pairs(count, len(name)).items():
                for end, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{end}")
                    content = data if isinstance(data, bytes) else str(data).encode()
                    info.size = len(content)
                    out.addfile(info, io.BytesIO(content))
    recipe = config(tmp_path)
    captions = Captions.Config(choices={"txt": 1.0, "syn.txt": 2.0, "json:caption": 1.0})
    web, mine = (str(folder.with_suffix(".tar")) for folder in folders.values())
    recipe.data = Mixture.Config(
        sources={"web": Source.Config(shards=(web,)), "mine": Source.Config(shards=(mine,), compose=captions)},
        weights={"web": 1.0, "mine": 1.0},
        workers=0,
    )
    with pytest.raises(ConfigError, match=r"several sources \(web, mine\): name one with --source"):
        demand_of(recipe)
    with pytest.raises(ConfigError, match="'other' is none of them"):
        demand_of(recipe, source="other")

    recipe.data.sources["mine"].compose = Compose.Config()
    demand = demand_of(recipe, source="mine")
    r = (checked := check_shards(demand.patterns, demand=demand, workers=0, ranks=())).report
    assert r.samples == 12 and r.plan is not None and r.plan.problem is None
    assert (r.plan.share, r.plan.epochs, r.plan.steps_per_epoch) == (0.5, 5, 4)  # 60 of 120 examples
    assert found(checked, "run")[0][1] == (
        "20 steps of 6, of which 50 % come from this source, go 5 times through 12 examples, 4 steps each time."
    )
    # Two others of this source are met in a batch; of 11 others, 5 have the same caption.
    repeats = r.modalities["text"].repeats
    assert r.plan.others * repeats.chance == pytest.approx(2 * 5 / 11)
    assert repeats.met == pytest.approx(2 * 5 / 11, rel=0.2)
    recipe.data.sources["mine"].compose = captions
    demand = demand_of(recipe, source="mine", patterns=(web,))
    assert demand.patterns == (web,) and demand.made == ()
    assert demand.sources["text"].members == ("txt", "syn.txt")


def test_what_the_evaluation_data_share_with_the_shards(tmp_path: Path) -> None:
    train = write(tmp_path / "train", {f"t{k}": {"png": drawn(k), "txt": f"caption {k}"} for k in range(8)})
    test = write(
        tmp_path / "test",
        {
            "copy": {"png": drawn(3), "txt": "other words"},
            "copy again": {"png": drawn(3), "txt": "still others"},
            "scaled": {"jpg": drawn(5, size=(120, 96), form="JPEG", quality=80), "txt": "Caption 5"},
            "new": {"png": drawn(99), "txt": "new"},
        },
    )
    checked = check_shards([str(train)], demand=demand_of(config(train, evaluate=test)), workers=0)
    [e] = checked.report.evaluations
    assert (e.name, e.samples, e.examined) == ("val", 4, 4)
    assert [(s.modality, s.by, s.samples, s.evaluation_samples) for s in e.shared] == [
        ("image", "content", 1, 2),
        ("image", "look", 1, 1),
        ("text", "content", 1, 1),
    ]
    assert [[(a.key, b.key) for a, b in s.pairs] for s in e.shared] == [
        [("t3", "copy")],
        [("t5", "scaled")],
        [("t5", "scaled")],
    ]
    assert [level for level, _ in found(checked, "overlap")] == ["error", "warning", "warning"]
    assert found(checked, "overlap")[0][1].startswith("2 of 4 (50 %) image members of 'val' are in the training shards")
    assert "Overlap with val" in shards_page(checked, samples=1)

    recipe = config(train, evaluate=test)
    recipe.evaluators |= {"again": recipe.evaluators["val"], str(tmp_path / "clean"): recipe.evaluators["val"]}
    clean = write(tmp_path / "clean", {"x": {"png": drawn(100), "txt": "x"}})
    checked = check_shards([str(train)], against=[str(clean)], workers=0)
    assert checked.report.passed and checked.report.evaluations[0].shared == []
    named = check_shards([str(train)], demand=demand_of(recipe), against=[str(clean)], workers=0)
    assert [e.samples for e in named.report.evaluations] == [4, 1]  # each set once, whatever their names
    assert named.report.evaluations[0].name.startswith("val, again")
    recipe = config(train, evaluate=tmp_path / "not there")
    checked = check_shards([str(train)], demand=demand_of(recipe), workers=0)
    assert found(checked, "overlap")[0][0] == "warning" and "cannot be compared" in found(checked, "overlap")[0][1]
    with pytest.raises(ConfigError, match="no shards match"):
        check_shards([str(train)], against=["nowhere"], workers=0)


# ------------------------------------------------------------------------------------------------- what is said


def test_the_table_the_file_and_the_page_say_the_same(shards: Path, checked: Checked) -> None:
    data = json.loads(json.dumps(checked.report.as_json(), allow_nan=False))
    text = as_text(checked.report)
    lines = {line[:18].strip(): line[18:].split() for line in text.splitlines()}
    for modality in data["modalities"].values():
        for name, n in modality["numbers"].items():
            if name not in ("bytes",):  # of both modalities
                shown = [float(cell.replace(",", "")) for cell in lines[name][:6]]
                assert shown == pytest.approx(
                    [n[k] for k in ("least", "low", "median", "high", "most", "mean")], rel=1e-3
                )
                assert sum(b["count"] for b in n["bins"]) == n["count"] == modality["samples"]
    for finding in data["findings"]:
        assert f"{finding['level']:8} {finding['text']}".replace("\x1b", "�") in text
    assert text.splitlines()[2].startswith("error ")
    assert "\x1b" not in text and "image + text: 27 of 30 (90 %)" in text
    assert data["passed"] is False and data["bad_share"] == 0.2


def test_the_page_is_whole_and_safe(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    page = shards_page(checked, samples=50)
    read = Reader(page)
    assert not read.named("script") and "https:" not in page and "http:" not in page
    assert not [a for _, a in read.elements if any(n.startswith("on") or n == "href" for n in a)]
    said = "".join(read.text)
    assert said.count(SCRIPT) >= 3  # its caption, its metadata, the name of a field
    assert len(read.named("img")) >= 26 and all(
        (a["src"] or "").startswith("data:image/webp") for a in read.named("img")
    )
    for key in planted():
        assert key in said
    for finding in checked.report.findings:
        assert finding.text in said
    assert shards_page(checked, samples=50) == page
    assert "3 at random (seed 0)." in Reader(shards_page(checked, samples=3)).text

    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mmcontrast.check.shards_page.picture", fails)
    assert "image cannot be shown (ZeroDivisionError)" in shards_page(checked, samples=50)


def test_the_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "shards", str(shards), "--workers", "0"]
    page, out = tmp_path / "deep" / "page.html", tmp_path / "found.json"
    with pytest.raises(SystemExit) as ended:
        main([*words, "--html", str(page), "--json", str(out), "--cards", "2"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "error    6 of 30 (20 %) examined samples cannot be used" in said.out and "samples/s" not in said.err
    assert json.loads(out.read_text())["samples"] == 30 and Reader(page.read_text()).named("svg")

    good = write(tmp_path / "good", {f"{k}": {"png": drawn(k), "txt": f"text {k}"} for k in range(24)})
    main(["check", "shards", str(good), "--workers", "0"])
    assert "nothing to find fault with" in capsys.readouterr().out
    recipe = str(Path(__file__).with_name("shapes.py"))
    asked = ["check", "shards", str(good), "--workers", "0", "--recipe", recipe]
    main([*asked, "--ranks", "2", "--", "--steps", "30", "--data.max-bad-fraction", "0.2"])
    assert "30 steps of 8 go 10 times through 24 examples, 3 steps each time." in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--", "--data.lanes", "3"])
    assert ended.value.code == 1
    main(["check", "shards", "--workers", "0", "--recipe", recipe, "--", "--data.shards", str(good)])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "needs shards or a recipe"),
        (["nowhere"], "no shards match"),
        (["{shards}", "--sample", "-1"], "sample is -1"),
        (["{shards}", "--ranks", "0"], "at least 1 process"),
        (["{shards}", "--cards", "-1"], "cards is -1"),
        (["{shards}", "--html", "{shards}"], "is a folder; name a file in it"),
        (["{shards}", "--", "--steps", "3"], "name it with --recipe"),
        (["{shards}", "--recipe", "emojy"], "did you mean 'emoji'"),
        (["{shards}", "--recipe", "{recipe}", "--source", "web"], "leave out --source web"),
    ],
)
def test_wrong_words_are_one_sentence(
    shards: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    names = {"shards": shards, "recipe": Path(__file__).with_name("shapes.py")}
    with pytest.raises(SystemExit) as ended:
        main(
            ["check", "shards", *(word.format(**names) for word in words)]
            if words
            else ["check", "shards", "--seed", "1"]
        )
    error = capsys.readouterr().err
    assert ended.value.code == 2 and says in error and len(error.splitlines()) == 1


# ------------------------------------------------------------------------------------------------- arithmetic


def marks(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Random marks, of which one third are an earlier one with up to five bits changed, on any places."""
    draw = np.random.default_rng(seed)
    values = [int(v) for v in draw.integers(1, 2**64, count, dtype=np.uint64)]
    for i in range(count // 3):
        value = values[int(draw.integers(count))]
        for bit in draw.choice(64, size=int(draw.integers(6)), replace=False):
            value ^= 1 << int(bit)
        values[i] = value
    return np.array(values, dtype=np.uint64)


def test_near_pairs_are_all_pairs_within_three_bits() -> None:
    a, b = marks(300, 0), np.concatenate([marks(300, 0)[:150], marks(100, 1)])
    truth = [
        [i, j] for i, x in enumerate(a.tolist()) for j, y in enumerate(b.tolist()) if bin(x ^ y).count("1") <= NEAR
    ]
    assert near_pairs(a, b).tolist() == truth and len(truth) > 150
    assert near_pairs(a, b[:0]).tolist() == []


def test_alike_and_overlap_are_those_of_all_pairs() -> None:
    look = np.concatenate([marks(200, 3), np.zeros(20, np.uint64), marks(200, 3)[:30]])
    content = np.arange(1, 251, dtype=np.uint64)
    content[220:235] = content[:15]  # the same files once more
    near = [[bin(int(x) ^ int(y)).count("1") <= NEAR and x and y for y in look] for x in look]
    truth = [i for i in range(250) if any(near[i][j] and content[i] != content[j] for j in range(250))]
    result = alike(look, content)
    assert result.samples == len(truth) and len(result.pairs) == 8
    for (i, j), bits in zip(result.pairs.tolist(), result.bits.tolist(), strict=True):
        assert content[i] != content[j] and bin(int(look[i]) ^ int(look[j])).count("1") == bits <= NEAR

    other = np.concatenate([marks(200, 3)[50:90], marks(60, 9), np.zeros(3, np.uint64)])
    for is_near in (False, True):
        limit = NEAR if is_near else 0
        same = [[bool(x and y) and bin(int(x) ^ int(y)).count("1") <= limit for y in other] for x in look]
        found = overlap(look, other, near=is_near)
        assert found.first.tolist() == [i for i in range(250) if any(same[i])] and len(found.first)
        assert found.others == sum(any(row[j] for row in same) for j in range(len(other)))
        assert all(same[i][j] for i, j in zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(overlap(look, other[:0], near=True).first) == 0


def test_groups_by_size() -> None:
    values = [5, 3, 5, 9, 3, 5, 7]
    result = groups(np.array(values, dtype=np.uint64))
    assert [values[i] for i in result.first] == [5, 3, 9, 7] and result.size.tolist() == [3, 2, 1, 1]
    pairs = [values[i] == values[j] for i in range(7) for j in range(7) if i != j]
    assert result.surplus == 3 and result.chance == pytest.approx(sum(pairs) / len(pairs))
    assert groups(np.zeros(0, dtype=np.uint64)).chance == 0


@pytest.mark.parametrize("kind", ["whole", "wide", "negative", "small"])
def test_numbers_are_summarised(kind: str) -> None:
    draw = np.random.default_rng(0)
    values: list[float] = {
        "whole": draw.integers(3, 60, 500).tolist(),
        "wide": [float(f"{v:.3g}") for v in np.exp(draw.normal(0, 3, 500))],
        "negative": draw.normal(-20, 4, 500).round(1).tolist(),
        "small": draw.integers(0, 4, 500).tolist(),
    }[kind]
    n = summarise(Counter(values))
    ordered = sorted(values)
    assert (n.count, n.least, n.most) == (500, ordered[0], ordered[-1])
    assert (n.low, n.median, n.high) == (ordered[4], ordered[249], ordered[494])
    assert n.mean == pytest.approx(sum(values) / 500)
    assert 1 < len(n.bins) <= 31 and n.bins[0].low <= n.least and n.bins[-1].high >= n.most
    for i, b in enumerate(n.bins):
        last = i == len(n.bins) - 1
        assert b.count == sum(b.low <= v < b.high or (last and v == b.high) for v in values)
        assert last or b.high == n.bins[i + 1].low


def test_the_look_survives_scaling_and_compression_and_tells_pictures_apart() -> None:
    looks = [image(drawn(k)).marks["look"] for k in range(40)]
    again = [image(drawn(k, size=(200, 160), form="JPEG", quality=75)).marks["look"] for k in range(40)]
    assert sum(bin(a ^ b).count("1") <= NEAR for a, b in zip(looks, again, strict=True)) >= 38
    others = [bin(a ^ b).count("1") for i, a in enumerate(looks) for b in looks[:i]]
    assert min(others) > NEAR and 24 < np.mean(others) < 40
    assert "look" not in image(flat((9, 9))).marks and image(flat((9, 9))).flags == ["one colour"]
