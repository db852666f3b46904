"""Ranks that answer together: to the last bit what one process answers; embeddings on the disk: the same again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.config import ConfigError, RunError
from mmcontrast.encoders import MultiEncoder
from mmcontrast.eval import embed as embedding
from mmcontrast.eval.captions import Captions
from mmcontrast.eval.embed import EmbeddingCache, embed
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.models import load_asked
from mmcontrast.eval.ranks import rank_both_ways
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.eval.together import Elsewhere, agree, in_parts, sharing
from mmcontrast.eval.zero_shot import ZeroShot, class_embeddings
from mmcontrast.shard_writer import Sample
from mmcontrast.sharding import World
from tests import coca, tiny
from tests.conftest import GlooPool
from tests.shapes import write_shapes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN and 23 samples, some without a text, one with a damaged picture."""
    out = tmp_path_factory.mktemp("together")
    tiny.write_run(out / "run")
    samples: list[Sample] = []
    for i, sample in enumerate(tiny.samples(23)):
        members = dict(sample.members)
        if i % 7 == 3:
            del members["txt"]
        if i == 9:
            members["png"] = b"no picture"
        samples.append(Sample(sample.key, members))
    tiny.write_shards(out / "shards", samples, per_shard=9)
    tiny.write_shards(out / "one", tiny.samples(3))
    return out


def told(data: Embedded) -> dict[str, Any]:
    """All of it, in plain values."""
    z = {m: t.tolist() for m, t in data.z.items()}
    rows = {m: t.tolist() for m, t in data.rows.items()}
    return {"z": z, "rows": rows, "keys": [*data.keys], "meta": [dict(m) for m in data.meta], "skipped": data.skipped}


def _asked(group: Any, folder: Path, batch: int) -> dict[str, Any]:
    with sharing(World(group)):
        return _alone(folder, batch)


def _alone(folder: Path, batch: int) -> dict[str, Any]:
    model = load(folder / "run")
    data = embed(model, [str(folder / "shards")], batch_size=batch)
    few = embed(model, [str(folder / "one")], batch_size=batch)
    prompts = [[f"a {kind} of {name}" for kind in ("picture", "large drawing")] for name in ("red", "blue", "a bar")]
    found = told(data) | {"few": told(few), "head": class_embeddings(model, "text", prompts).tolist()}
    for task in (Retrieval.Config(data=()), ZeroShot.Config(data=(), label="shape")):
        found |= task.build().score(model, data).flat()
    return found


@pytest.mark.parametrize("batch", [4, 128])  # 6 batches on 2 or 4 ranks, and 1: only one of them has any
def test_ranks_together_answer_what_one_process_answers(gloo: GlooPool, folder: Path, batch: int) -> None:
    want = _alone(folder, batch)
    assert len(want["keys"]) == 22 and [s[1] for s in want["skipped"]] == ["000009"]
    assert 0 < want["image_to_text_recall@10"] < 1 and want["acc1"] is not None
    for size in (2, 4):
        for found in gloo(size, _asked, folder, batch):
            assert found == want


def _described(group: Any, folder: Path) -> tuple[dict[str, Any], int]:
    with sharing(World(group)):
        return _written(folder)


def _written(folder: Path) -> tuple[dict[str, Any], int]:
    """What the model writes, and of how many samples it wrote here."""
    model, asked = load(folder / "writer"), list[int]()
    caption = model.caption

    def counted(values: Sequence[Any], **settings: Any) -> list[str]:
        asked.append(len(values))
        return caption(values, **settings)

    model.caption = counted  # type: ignore[method-assign]
    task = Captions.Config(data=(str(folder / "described"),), max_tokens=4).build()
    return {**task.run(model), "said": task.details()["details"]["captions"]}, sum(asked)


def test_each_rank_writes_a_part_of_the_captions(gloo: GlooPool, tmp_path: Path) -> None:
    tiny.write_run(tmp_path / "writer", coca.model_config())
    tiny.write_shards(tmp_path / "described", tiny.samples(150))
    want, whole = _written(tmp_path)
    assert whole == 150 and len({entry["written"] for entry in want["said"]}) > 1
    found = gloo(2, _described, tmp_path)
    assert [of_rank for of_rank, _ in found] == [want, want] and [n for _, n in found] == [86, 64]


def _counted(group: Any, n: int, m: int) -> list[Any]:
    with sharing(World(group)):
        return _ranks(n, m)


def _ranks(n: int, m: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-2, 3, (size, 5), generator=generator).float() for size in (n, m))
    a, b = (torch.randint(0, 20, (size,), generator=generator) for size in (n, m))
    found = rank_both_ways(x, y, a, b, block=8)
    return [[r.best.tolist(), r.average_precision.tolist(), r.positives.tolist()] for r in found]


@pytest.mark.parametrize("sizes", [(61, 90), (5, 90), (30, 7)])
def test_ranks_are_counted_once(gloo: GlooPool, sizes: tuple[int, int]) -> None:
    want = _ranks(*sizes)
    assert len(set(want[0][0])) > 2, "nothing is told apart"
    for size in (2, 4):
        assert all(found == want for found in gloo(size, _counted, *sizes))


def _failing(group: Any, culprit: int, kind: type[Exception]) -> tuple[str, str]:
    def work(piece: int) -> Tensor:
        if World(group).rank == culprit:
            raise kind("the disk is gone")
        return torch.ones(1, 1)

    with sharing(World(group)):
        try:
            in_parts(work, range(5))
        except Exception as error:
            return type(error).__name__, str(error)
    return "", ""


def test_an_error_on_one_rank_stops_all(gloo: GlooPool) -> None:
    elsewhere = (Elsewhere.__name__, "the disk is gone")
    assert gloo(2, _failing, 1, ConfigError) == [("ConfigError", "on rank 1: the disk is gone"), elsewhere]
    assert gloo(2, _failing, 0, ConfigError) == [("ConfigError", "the disk is gone"), elsewhere]
    assert gloo(2, _failing, 1, OSError)[0] == (RunError.__name__, "on rank 1: OSError: the disk is gone")
    with pytest.raises(OSError, match="alone"):
        agree(OSError("alone"))
    agree(None)


def _torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "mmcontrast", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=200)


def test_the_command_on_two_processes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder / "run"), str(folder / "shards")]
    main(["eval", *words, "--json", str(tmp_path / "one.json")])
    want = capsys.readouterr().out
    done = _torchrun("eval", *words, "--json", str(tmp_path / "two.json"), "--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == want, "printed by both, or another answer"
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2

    # ------------------------------------------------------------------------------------------------- the cache


def _counting(model: MultiEncoder, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, int]:
    """How many batches the model has been asked to embed, by modality."""
    calls = {m: 0 for m in model.modalities}
    own = model.embed

    def embed_one(modality: str, x: Any) -> Tensor:
        calls[modality] += 1
        return own(modality, x)

    monkeypatch.setattr(model, "embed", embed_one)
    return calls


def test_what_is_kept_is_read_again_part_by_part(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = load_asked(folder / "run")
    model, shards = asked.model, [str(folder / "shards")]
    cache = EmbeddingCache(tmp_path / "cache", asked.identity)
    want = told(embed(model, shards, batch_size=4))
    calls = _counting(model, monkeypatch)
    assert told(embed(model, shards, batch_size=4, cache=cache)) == want
    assert calls == {"image": 6, "text": 6}
    assert told(embed(model, shards, batch_size=4, cache=cache)) == want
    assert told(embed(model, shards, modalities=["text"], batch_size=4, cache=cache))["z"]["text"] is not None
    assert calls == {"image": 6, "text": 6}, "embedded again"
    # One part that was not finished, and one that was cut off behind our back.
    files = sorted(next((tmp_path / "cache" / asked.identity).glob("*-image")).glob("*.safetensors"))
    assert len(files) == 6
    files[1].with_suffix(".json").unlink()
    files[3].write_bytes(files[3].read_bytes()[:-20])
    assert told(embed(model, shards, batch_size=4, cache=cache)) == want
    assert calls == {"image": 8, "text": 6}
    # Other batches round otherwise; other weights and other data are elsewhere.
    embed(model, shards, batch_size=8, cache=cache)
    assert calls == {"image": 11, "text": 9}
    embed(model, shards, batch_size=8, cache=EmbeddingCache(tmp_path / "cache", "other"))
    embed(model, [str(folder / "one")], batch_size=8, cache=cache)
    assert calls == {"image": 15, "text": 13}


def test_an_embedding_that_was_ended_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = load_asked(folder / "run")
    shards, cache = [str(folder / "shards")], EmbeddingCache(tmp_path / "cache", asked.identity)
    want = told(embed(asked.model, shards, batch_size=4))
    own, left = embedding._keep, [3]  # pyright: ignore[reportPrivateUsage]

    def keep(*arguments: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        own(*arguments)

    monkeypatch.setattr(embedding, "_keep", keep)
    with pytest.raises(KeyboardInterrupt):
        embed(asked.model, shards, batch_size=4, cache=cache)
    monkeypatch.setattr(embedding, "_keep", own)
    calls = _counting(asked.model, monkeypatch)
    assert told(embed(asked.model, shards, batch_size=4, cache=cache)) == want
    assert calls == {"image": 3, "text": 6}


def test_without_a_cache_nothing_is_written_and_one_that_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    before = {p for p in folder.rglob("*")}
    embed(load(folder / "run"), [str(folder / "shards")])
    assert {p for p in folder.rglob("*")} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/x/.* cannot be written: Not a directory; name another folder"):
        embed(load(folder / "run"), [str(folder / "shards")], cache=EmbeddingCache(tmp_path / "file", "x"))


# ----------------------------------------------------------------------------------------- while a model trains

RECIPE = """
import os
from pathlib import Path
from mmcontrast.eval import embed
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.eval.zero_shot import ZeroShot
from tests.shapes import recipe as plain

def recipe():
    config = plain()
    config.steps, data = 2, ("{shards}",)
    config.evaluators = {{"names": ZeroShot.Config(data=data), "pairs": Retrieval.Config(data=data)}}
    own = embed._embedded
    def noted(model, chunks, wanted, *rest):
        with open(f"{out}/asked-" + os.environ["RANK"], "a") as file:
            file.write(f"{{list(wanted)}}")
        return own(model, chunks, wanted, *rest)
    embed._embedded = noted
    return config
"""


def test_ranks_that_train_evaluate_together(tmp_path: Path) -> None:
    shards = write_shapes(tmp_path / "shapes")
    (tmp_path / "recipe.py").write_text(RECIPE.format(shards=shards, out=tmp_path))
    words = ["train", str(tmp_path / "recipe.py"), "--out", str(tmp_path / "run"), "--data.shards", str(shards)]
    done = _torchrun(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    model = load(tmp_path / "run")
    for name, task in (
        ("names", ZeroShot.Config(data=(str(shards),))),
        ("pairs", Retrieval.Config(data=(str(shards),))),
    ):
        want = task.build().run(model)
        assert {f"eval/{name}/{key}": value for key, value in want.items()}.items() <= last.items()
    # One part of these few samples, for pictures, which both questions share, and texts: rank 0 has it, and rank 1 is
    # there and has none.
    assert (tmp_path / "asked-0").read_text() == "[0]" * 2 and (tmp_path / "asked-1").read_text() == "[]" * 2
