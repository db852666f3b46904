"""A real server of shards on this machine's loopback, that misbehaves as it is told, and a cache to bring them into."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcontrast.data import Stream
from mmcontrast.encoders.base import Transform
from mmcontrast.remote import Patience
from mmcontrast.shard_cache import FOLDER_VARIABLE, Cache
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import ShardSet

QUICK = Patience(attempts=3, timeout=0.5, pause=0.001)


@dataclass
class Asked:
    """One request and its answer."""

    path: str
    range: str | None
    if_range: str | None
    status: int = 0


@dataclass
class Site:
    """Files by path; `faults` are used up one per request of their path."""

    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    faults: dict[str, list[Callable[[Any], bool]]] = field(default_factory=dict[str, list[Callable[[Any], bool]]])
    asked: list[Asked] = field(default_factory=list[Asked])
    validators: bool = True
    ranges: bool = True
    url: str = ""

    def put(self, folder: Path, at: str = "/data") -> str:
        for path in folder.iterdir():
            self.files[f"{at}/{path.name}"] = path.read_bytes()
        return self.url + at

    def of(self, end: str) -> list[Asked]:
        return [a for a in self.asked if a.path.partition("?")[0].endswith(end)]


def serve(site: Site) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            self.entry = Asked(self.path, self.headers.get("Range"), self.headers.get("If-Range"))
            site.asked.append(self.entry)
            faults = site.faults.get(path, [])
            if faults and faults.pop(0)(self):
                return
            data = site.files.get(path)
            if data is None:
                self.answer(404, b"there is none")
            else:
                self.send_file(data)

        def send_file(self, data: bytes, *, length: int | None = None, cut: int | None = None) -> None:
            """The file or the range asked for; `length` lies about it, `cut` ends the connection after so many."""
            tag = f'"{hashlib.sha256(data).hexdigest()[:12]}"'
            first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if site.ranges else None
            start = int(first[1]) if first else 0
            headers = {"ETag": tag} if site.validators else {}
            if first and self.headers.get("If-Range", tag) == tag:
                if start >= len(data):
                    return self.answer(416, b"")
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                return self.answer(206, data[start:], headers, length, cut)
            return self.answer(200, data, headers, length, cut)

        def answer(
            self, status: int, body: bytes, headers: Any = None, length: int | None = None, cut: int | None = None
        ) -> None:
            self.entry.status = status
            self.send_response(status)
            for name, value in ({"Content-Length": len(body) if length is None else length} | (headers or {})).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body[:cut])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def status(code: int, **headers: str) -> Callable[[Any], bool]:
    def fault(handler: Any) -> bool:
        handler.answer(code, b"", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def cut(site: Site, path: str, after: int) -> Callable[[Any], bool]:
    """Ends the connection after so many bytes of the body."""

    def fault(handler: Any) -> bool:
        handler.send_file(site.files[path], cut=after)
        return True

    return fault


def instead(data: bytes, **options: Any) -> Callable[[Any], bool]:
    """Another content, for once."""

    def fault(handler: Any) -> bool:
        handler.send_file(data, **options)
        return True

    return fault


def late(seconds: float) -> Callable[[Any], bool]:
    def fault(_: Any) -> bool:
        time.sleep(seconds)
        return False

    return fault


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Generator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Site()
    server = serve(found)
    yield found
    server.shutdown()
    server.server_close()


def empty_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder / "cache"))
    return Cache(folder / "cache", patience=QUICK)


def written(out: Path, count: int = 12, *, per_shard: int = 4, mark: str = "") -> Path:
    with ShardWriter(out, max_samples=per_shard) as writer:
        for i in range(count):
            text = f"caption {i} {mark}".ljust(5000, ".")
            writer.write(Sample(f"{i:06d}", {"txt": text, "json": {"number": i}}))
    return out


def everything(shards: ShardSet, order: Sequence[int] | None = None) -> dict[tuple[str, str], dict[str, bytes]]:
    return {shards.name(i): {e: shards.read(i, e) for e in shards.extensions(i)} for i in order or range(len(shards))}


def times(site: Site, end: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for a in site.of(end):
        found[a.path.removesuffix(end)] = found.get(a.path.removesuffix(end), 0) + 1
    return found


class Length(Transform):
    """Text -> its length."""

    kind = "text"

    def __call__(self, value: str) -> int:
        return len(value)

    def collate(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values)


def keys_of(shards: str, workers: int, first: int = 0) -> list[list[str]]:
    config = Stream.Config(shards=(shards,), workers=workers, window=8)
    stream = config.build({"text": Length()}, seed=3, global_batch=4)
    return [list(batch.keys) for batch in stream.batches(first, 9)]
