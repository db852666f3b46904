"""An app on two indices of one model of four modalities, and how tests ask it."""

from __future__ import annotations

import asyncio
import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile

from mmcontrast.encoders import Encoder, MelConvNet, MultiEncoder, SignalTransformer
from mmcontrast.eval.index.build import build_index
from mmcontrast.eval.serve.app import create_app, open_shelves
from mmcontrast.eval.serve.guard import Guard
from mmcontrast.shard_writer import Sample
from tests import tiny

HOSTILE = "<img src=x onerror=alert(1)> & 'quotes'"
ODD = '{"label": "odd", "big": 1e999, "half": "\\ud800", "deep": [[[[[[1]]]]]], "many": [' + "0," * 99 + "0]}"
RATE = 8000


@dataclass(frozen=True)
class Served:
    """An app on some indices, the samples that they are of, and a request to it."""

    app: Guard
    run: Path
    folders: list[Path]
    samples: list[Sample]

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})

    def search(self, *parts: dict[str, Any], index: str = "pictures", **more: Any) -> httpx.Response:
        return self("POST", "/api/search", json={"index": index, "parts": parts, **more})

    def hits(self, *parts: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
        answer = self.search(*parts, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()["hits"]


def wav(seconds: float = 0.5, *, tone: float = 440) -> bytes:
    file = io.BytesIO()
    soundfile.write(
        file, np.sin(np.arange(int(seconds * RATE)) * tone / RATE * 2 * np.pi) / 2, RATE, "PCM_16", format="WAV"
    )
    return file.getvalue()


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values, np.float32))
    return file.getvalue()


def series(seed: int, frames: int = 64) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((frames, 2)).cumsum(0)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def content() -> list[Sample]:
    """Pictures with texts; two with a sound, three with a signal; hostile names, captions, files and metadata."""
    samples = [(s.key, dict(s.members)) for s in tiny.samples(20)]
    samples[1][1]["txt"] = HOSTILE.encode() if isinstance(samples[1][1]["txt"], bytes) else HOSTILE
    samples[2][1]["json"] = ODD.encode()
    for i in (3, 4):
        samples[i][1]["wav"] = wav(tone=300.0 * i)
    for i in (3, 5, 6):
        samples[i][1]["npy"] = npy(series(i))
        samples[i][1]["json"] = {"rate": 100, "channels": ["I", "II"], "units": "mV"}
    samples[7][1]["png"] = b"<html><script>alert(1)</script>"
    return [Sample(key, members) for key, members in samples]


def write_run(folder: Path) -> Path:
    """A run folder with an untrained model of four modalities."""
    encoders: dict[str, Encoder.Config] = {
        "image": tiny.vit(),
        "text": tiny.text_transformer(),
        "audio": MelConvNet.Config(sample_rate=RATE, seconds=0.5, width=16, layers=1),
        "ecg": SignalTransformer.Config(
            channels=("I", "II"), rate=100, seconds=0.64, patch=8, width=16, layers=1, heads=2
        ),
    }
    return tiny.write_run(folder, MultiEncoder.Config(encoders=encoders, dim=8))


def build(folder: Path) -> Served:
    """Run, shards, an index of pictures and one of texts under a folder, and the app on both."""
    run = write_run(folder / "run")
    samples = content()
    shards = tiny.write_shards(folder / "shards", samples, per_shard=8)
    folders = [folder / "pictures", folder / "texts"]
    build_index(run, [shards], folders[0])
    build_index(run, [shards], folders[1], modality="text")
    return Served(create_app(open_shelves(folders)), run, folders, samples)
