"""What comes into an index: embeddings of clip-retrieval's layout, models of other libraries, several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import CLIPImageProcessor

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.eval.index import Index, Stored, add, build_index, partitions
from mmcontrast.eval.models import load_asked
from mmcontrast.shard_writer import Sample
from mmcontrast.sharding import World
from tests import hf_models, tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, shards, and an index of their pictures whose embeddings were written beside it, in three partitions."""
    folder = tmp_path_factory.mktemp("intake")
    samples = tiny.samples(30)
    samples[4] = Sample(samples[4].key, {**samples[4].members, "json": {"label": None, "list": [1, 2], "n": 3}})
    tiny.write_run(folder / "run")
    tiny.write_shards(folder / "shards", samples, per_shard=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "SAMPLES", 12)
        build_index(folder / "run", [str(folder / "shards")], folder / "index", embeddings=folder / "out")
    return folder


def _answers(index: Path, **settings: Any) -> list[tuple[str, float, str | None]]:
    opened = Index(index, **settings)
    return [(h.key, round(h.score, 5), h.text) for h in opened.search("text", ["a red square"], top=50)[0]]


def test_embeddings_lie_as_clip_retrieval_lays_them(folder: Path) -> None:
    files = sorted(str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*") if p.is_file())
    assert files == sorted(
        name for i in range(3) for name in (f"img_emb/img_emb_{i}.npy", f"metadata/metadata_{i}.parquet")
    )
    loaded = [np.load(folder / "out" / "img_emb" / f"img_emb_{i}.npy", allow_pickle=False) for i in range(3)]
    stored = Stored(folder / "index")
    assert np.array_equal(np.concatenate(loaded), stored.vectors(stored.rows())) and loaded[0].dtype == np.float32
    tables = [pq.read_table(folder / "out" / "metadata" / f"metadata_{i}.parquet") for i in range(3)]
    assert [len(t) for t in tables] == [12, 12, 6]
    assert {"image_path", "caption", "key", "label"} <= set(tables[0].column_names)
    assert tables[1].column("caption").to_pylist()[0] == "a red corner"


def test_such_a_folder_is_an_index_again(folder: Path, tmp_path: Path) -> None:
    again = build_index(folder / "run", [str(folder / "out")], tmp_path / "again")
    assert again["count"] == 30 and again["quality"]["queries_from"] == "texts of the samples"
    assert _answers(tmp_path / "again") == _answers(folder / "index")
    old, new = Stored(folder / "index"), Stored(tmp_path / "again")
    assert new.columns["label"] == "string" and new.facts(4)["list"] == old.facts(4)["list"] == "[1, 2]"
    assert new.member(new.hit(0.0, 0), "image") is None
    with pytest.raises(ConfigError, match="is not empty; choose another folder for the embeddings"):
        build_index(folder / "run", [str(folder / "shards")], tmp_path / "b", embeddings=folder / "out")


def test_embeddings_of_others_are_taken(folder: Path, tmp_path: Path) -> None:
    """float16, numbers padded, other types of columns, no key; and added to an index that is there."""
    stored = Stored(folder / "index")
    vectors = stored.vectors(stored.rows())
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    for number, some in enumerate((slice(0, 20), slice(20, 30))):
        np.save(tmp_path / "img_emb" / f"img_emb_{number:02d}.npy", vectors[some].astype(np.float16))
        n = len(vectors[some])
        columns = {
            "image_path": [f"{number}/{i}.jpg" for i in range(n)],
            "caption": [f"caption {i}" for i in range(n)],
            "width": pa.array(range(n), pa.int16()),
            "ratio": pa.array([0.5] * n, pa.float32()),
            "exif": [{"a": i} for i in range(n)],
            "key": pa.array([None] * n, pa.string()),
            "shard": ["theirs"] * n,
        }
        pq.write_table(pa.table(columns), tmp_path / "metadata" / f"metadata_{number:02d}.parquet")
    build_index(folder / "run", [str(tmp_path)], tmp_path / "index")
    opened = Index(tmp_path / "index")
    (hits,) = opened.search("image", [tiny.png("red")], top=50)
    (want,) = Index(folder / "index").search("image", [tiny.png("red")], top=50)
    assert [h.score for h in hits] == pytest.approx([h.score for h in want], abs=2e-3) and len(hits) == 30
    first = opened.facts(21)
    assert (first["key"], first["text"], first["width"], first["exif"]) == ("1/1.jpg", "caption 1", 1, '{"a": 1}')
    assert (first["shard"], first["shard_"], first["position"]) == ("img_emb_01.npy", "theirs", 21)
    assert np.allclose(np.linalg.norm(opened.vectors(opened.rows()), axis=1), 1, atol=1e-6)
    shutil.copytree(folder / "index", tmp_path / "both")
    added = add(tmp_path / "both", [str(tmp_path)])
    assert added["count"] == 60 and len(added["sources"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rows", "has 30 vectors, .* 29 rows; they do not belong together"),
        ("dim", "has 9 dimensions, the model 8: it is not the model that made them"),
        ("pickle", r"is no .npy of vectors \(it has \|O"),
        ("parquet", "metadata_0.parquet cannot be read"),
        ("modality", "has no embeddings of 'text'; it has image: give --modality"),
        ("zero", "vector 3 is zero or not finite"),
    ],
)
def test_embeddings_that_cannot_be_used_are_refused(folder: Path, tmp_path: Path, change: str, message: str) -> None:
    vectors: Any = np.random.default_rng(0).standard_normal((30, 9 if change == "dim" else 8)).astype(np.float32)
    if change == "zero":
        vectors[3] = 0
    (tmp_path / "in" / "img_emb").mkdir(parents=True)
    (tmp_path / "in" / "metadata").mkdir()
    np.save(tmp_path / "in" / "img_emb" / "img_emb_0.npy", np.array([{}] * 30) if change == "pickle" else vectors)
    table = tmp_path / "in" / "metadata" / "metadata_0.parquet"
    pq.write_table(pa.table({"caption": ["x"] * (29 if change == "rows" else 30)}), table)
    if change == "parquet":
        table.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match=message):
        modality = "text" if change == "modality" else "image"
        build_index(folder / "run", [str(tmp_path / "in")], tmp_path / "index", modality=modality)


def test_a_folder_of_transformers_is_a_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = hf_models.clip(tmp_path / "clip")
    side = json.loads((Path(clip) / "config.json").read_text())["vision_config"]["image_size"]
    words = Path(clip) / "tokenizer_config.json"
    words.write_text(json.dumps(json.loads(words.read_text()) | {"model_max_length": 12}))
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(clip)
    main(["index", "build", clip, str(folder / "shards"), str(tmp_path / "index")])
    manifest = Stored(tmp_path / "index").manifest
    asked = load_asked(clip)
    assert (manifest["model"], manifest["model_hash"]) == (str(Path(clip).resolve()), asked.identity)
    opened = Index(tmp_path / "index")
    z = asked.model.encode("text", ["a red square"])[0].numpy()
    scores = opened.vectors(opened.rows()) @ z
    (hits,) = opened.search("text", ["a red square"], top=5)
    assert [h.score for h in hits] == pytest.approx(np.sort(scores)[::-1][:5].tolist(), abs=1e-6)
    with pytest.raises(ConfigError, match="was made with model_hash .*: their spaces differ"):
        Index(tmp_path / "index", model=folder / "run")
    config = json.loads((Path(clip) / "config.json").read_text())
    (Path(clip) / "config.json").write_text(json.dumps(config | {"extra": 1}))
    with pytest.raises(ConfigError, match="model_hash"):
        Index(tmp_path / "index")


def test_a_model_of_open_clip_is_one(folder: Path, tmp_path: Path) -> None:
    import open_clip
    import torch
    from safetensors.torch import save_file

    small: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(small))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(open_clip.create_model("tiny-clip").state_dict(), weights)
    manifest = build_index(f"tiny-clip,{weights}", [str(folder / "shards")], tmp_path / "index")
    assert manifest["model"] == f"tiny-clip,{weights.resolve()}" and manifest["dim"] == 16
    assert len(_answers(tmp_path / "index")) == 30
    other = tmp_path / "other.safetensors"
    save_file(open_clip.create_model("tiny-clip").state_dict(), other)
    with pytest.raises(ConfigError, match="their spaces differ"):
        Index(tmp_path / "index", model=f"tiny-clip,{other}")


def test_processes_of_torchrun_build_what_one_builds(folder: Path, tmp_path: Path) -> None:
    """Two real processes of gloo, each of which embeds some of the partitions."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from mmcontrast.eval.index import add, build_index, partitions\n"
        "partitions.SAMPLES = 4\n"
        "run, shards, out = sys.argv[1:4]\n"
        "wrote = []\n"
        "whole = partitions._write\n"
        "begun = [Path(out + f'begun{rank}') for rank in (0, 1)]\n"
        "def write(parts, number, *rest):\n"
        "    begun[int(os.environ['RANK'])].touch()\n"
        "    while not all(path.exists() for path in begun):\n"  # or else a slow start leaves nothing to the other
        "        time.sleep(0.01)\n"
        "    wrote.append(f'{number:06d}')\n"
        "    whole(parts, number, *rest)\n"
        "partitions._write = write\n"
        "from accelerate import PartialState\n"
        "from torch import distributed\n"
        "found = build_index(run, [shards], Path(out))\n"
        "assert distributed.get_backend() == 'gloo' and distributed.get_world_size() == 2\n"
        "assert found['count'] == 30 and found['generation'] == 1, found\n"
        "found = add(Path(out), [sys.argv[4]])\n"
        "assert found['count'] == 34 and found['generation'] == 2, found\n"
        "Path(out + os.environ['RANK']).write_text(' '.join(wrote))\n"
    )
    more = [Sample(f"9{s.key}", s.members) for s in tiny.samples(4, seed=99)]
    tiny.write_shards(tmp_path / "more", more)
    arguments = [str(folder / "run"), str(folder / "shards"), str(tmp_path / "two"), str(tmp_path / "more")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [(tmp_path / f"two{rank}").read_text().split() for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == sorted([f"{i:06d}" for i in range(8)] + ["000000"])
    assert all(shares), f"one of them embedded nothing: {shares}"
    build_index(folder / "run", [str(folder / "shards")], tmp_path / "one")
    add(tmp_path / "one", [str(tmp_path / "more")])
    one, two = Stored(tmp_path / "one"), Stored(tmp_path / "two")
    assert one.keys(one.rows()) == two.keys(two.rows())
    np.testing.assert_allclose(one.vectors(one.rows()), two.vectors(two.rows()), atol=1e-6)
    assert [one.facts(int(r)) for r in one.rows()] == [two.facts(int(r)) for r in two.rows()]
    assert _answers(tmp_path / "one") == _answers(tmp_path / "two")


def test_torchrun_and_processes_are_one_too_many(folder: Path, tmp_path: Path) -> None:
    from mmcontrast.eval.index.identity import open_model
    from mmcontrast.eval.index.intake import Encoding, Intake

    with pytest.MonkeyPatch.context() as patch:
        several = World.alone()
        several.size = 2
        patch.setattr("mmcontrast.eval.index.intake.meet", lambda: several)
        with pytest.raises(ConfigError, match="torchrun starts the processes that encode; leave --processes out"):
            Intake([str(folder / "shards")], open_model(folder / "run"), "image", Encoding(processes=2))
