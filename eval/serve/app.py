"""The routes of the page and the API, and the server that a command starts."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mmcontrast.config import ConfigError, suggest
from mmcontrast.eval.index.search import Index
from mmcontrast.eval.serve.guard import Guard, is_loopback
from mmcontrast.eval.serve.schema import (
    ID,
    MAX_WHERE,
    Column,
    Description,
    Groups,
    Hits,
    Part,
    Plot,
    Problem,
    Sample,
    Search,
)
from mmcontrast.eval.serve.shelf import NotFound, Shelf

_PAGE = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_ABOUT = """Search indices that know the model which made them.

Files are sent as base64 within JSON. Whatever is wrong comes back as one sentence: `{"error": "..."}`.
"""
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "400: a request that cannot be used; 404: no such thing; 413: too large"}
}
_MEDIA = _PROBLEMS | {
    200: {"description": "The medium", "content": {"image/webp": {}, "audio/wav": {}}},
    206: {"description": "A part of it"},
    304: {"description": "The browser has it"},
}
_Id = Annotated[str, PathParameter(pattern=ID)]


def open_shelves(
    folders: Sequence[Path], *, models: Sequence[str | Path] = (), trust: Collection[str] = ()
) -> dict[str, Shelf]:
    """Open indices under short names: the folder's, with its parent's where two are called the same.

    Args:
        folders: the indices.
        models: where the models lie now, if they moved: one for each index, or one for all.
        trust: as for `mmcontrast.load`.

    Raises:
        ConfigError: no index, the same one twice, or one that cannot be opened.
    """
    if not folders:
        raise ConfigError("serve needs at least one index: mmcontrast index serve INDEX…")
    if len(models) not in (0, 1, len(folders)):
        raise ConfigError(f"{len(models)} models for {len(folders)} indices; give one for all, or one for each")
    paths = [folder.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"{path} is named twice; name each index once")
    names = [_name(path, paths) for path in paths]
    shelves: dict[str, Shelf] = {}
    loaded: dict[str, Any] = {}
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        index = Index(path, model=models[number % len(models)] if models else None, trust=trust)
        # Two indices of one model hold it once.
        index.model = loaded.setdefault(index.manifest["model_hash"], index.model)
        shelves[name] = Shelf(name, index)
    return shelves


def _name(path: Path, all_paths: Sequence[Path]) -> str:
    """The last parts of a path by which it differs from the others."""
    for count in range(1, len(path.parts) + 1):
        if sum(other.parts[-count:] == path.parts[-count:] for other in all_paths) == 1:
            return re.sub(r"[^\w.-]+", "-", "-".join(path.parts[-count:])).strip("-")[:100] or "index"
    raise AssertionError("two equal paths")


def create_app(shelves: Mapping[str, Shelf], *, host: str = "127.0.0.1", names: Collection[str] = ()) -> Guard:
    """The page and the API.

    Args:
        shelves: name -> index.
        host: the address that is listened at; without others to allow, only requests to it are answered.
        names: further names by which the server is reached, behind a proxy say.
    """
    # No page of documentation: the usual ones load their scripts from other sites.
    app = FastAPI(title="mmcontrast", description=_ABOUT, version=_version(), docs_url=None, redoc_url=None)
    app.add_exception_handler(ConfigError, _config_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _our_fault)

    def shelf(name: str) -> Shelf:
        if name not in shelves:
            raise NotFound(f"there is no index {name[:100]!r}{suggest(name[:100], shelves)}")
        return shelves[name]

    def indices() -> list[Description]:
        """The indices that are served."""
        return [s.description for s in shelves.values()]

    def search(query: Search) -> Hits:
        """The samples nearest to a query of texts, files and stored samples."""
        return shelf(query.index).search(query, others=shelves)

    def columns(index: str) -> list[Column]:
        """The columns of the metadata that a filter may ask for, and what is in them."""
        return shelf(index).columns()

    def duplicates(
        index: str,
        threshold: Annotated[float, Query(ge=-1, le=1)] = 0.95,
        where: Annotated[str | None, Query(max_length=MAX_WHERE)] = None,
    ) -> Groups:
        """Groups of near-duplicates among the samples that pass a filter."""
        return shelf(index).duplicates(threshold, where)

    def samples(
        index: str,
        count: Annotated[int, Query(ge=1, le=100)] = 12,
        seed: Annotated[int, Query(ge=0, le=2**53)] = 0,
        where: Annotated[str | None, Query(max_length=MAX_WHERE)] = None,
    ) -> list[Sample]:
        """Some samples, drawn at random by the seed; of those that pass a filter."""
        return shelf(index).some(count, seed, where)

    def sample(index: str, sample_id: _Id) -> Sample:
        """One sample."""
        return shelf(index).sample(sample_id)

    def medium(
        request: Request, index: str, sample_id: _Id, modality: str, side: Annotated[int, Query(ge=16, le=2048)] = 512
    ) -> Response:
        """A picture, at most `side` pixels on its longer side; or the first 120 s of a sound, less above 48 kHz."""
        found = shelf(index)
        if found.kind(sample_id, modality) == "image":
            tag = found.tag(sample_id, modality, side)
            return _cached(request, tag, "image/webp", lambda: found.picture(sample_id, modality, side=side))
        return _cached(request, found.tag(sample_id, modality), "audio/wav", lambda: found.sound(sample_id, modality))

    def plot(index: str, sample_id: _Id, modality: str) -> Plot:
        """The outline of a sound or signal: the least and the greatest value of each column in time."""
        return shelf(index).plot(sample_id, modality)

    one = "/api/indices/{index}/samples/{sample_id}"
    routes: list[tuple[str, Callable[..., Any]]] = [
        ("/api/indices", indices),
        ("/api/search", search),
        ("/api/indices/{index}/columns", columns),
        ("/api/indices/{index}/duplicates", duplicates),
        ("/api/indices/{index}/samples", samples),
        (one, sample),
        (one + "/plot/{modality}", plot),
    ]
    for path, route in routes:
        methods = ["POST"] if route is search else ["GET"]
        app.add_api_route(path, route, methods=methods, responses=_PROBLEMS, operation_id=route.__name__)
    path = one + "/media/{modality}"
    app.add_api_route(path, medium, responses=_MEDIA, response_class=Response, operation_id="medium")
    for file in sorted(_PAGE.iterdir()):
        if file.suffix in _TYPES:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            app.add_api_route(path, _static(file), methods=["GET"], include_in_schema=False)
    # Outside of everything, so that even what goes wrong in the app carries the headers.
    return Guard(app, host=host, names=names)


def _version() -> str:
    from mmcontrast import __version__

    return __version__


def _static(file: Path) -> Callable[[], Response]:
    content, kind = file.read_bytes(), _TYPES[file.suffix]

    def read() -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return read


def _cached(request: Request, tag: str, kind: str, make: Callable[[], bytes]) -> Response:
    """A medium, unless the browser has it; a part of it, if the browser asks for one, as players do."""
    headers = {"etag": tag, "cache-control": "private, no-cache", "accept-ranges": "bytes"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    content = make()
    asked = re.fullmatch(r"bytes=(\d{1,15})-(\d{0,15})", request.headers.get("range", ""))
    if asked is None or request.headers.get("if-range", tag) != tag:
        return Response(content, media_type=kind, headers=headers)
    start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
    if not start < stop:
        return Response(status_code=416, headers=headers | {"content-range": f"bytes */{len(content)}"})
    headers["content-range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return Response(content[start:stop], 206, media_type=kind, headers=headers)


def _problem(status: int, error: str) -> JSONResponse:
    return JSONResponse({"error": " ".join(error.split()).encode("utf-8", "replace").decode()}, status)


def _config_error(request: Request, error: Exception) -> Response:
    return _problem(404 if isinstance(error, NotFound) else 400, str(error))


def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a request, where it stands and what would be right."""
    first: Any = cast(RequestValidationError, error).errors()[0]
    places = [place for place in first["loc"] if place not in ("body", "query", "path")]
    where = ".".join(map(str, places))
    if first["type"] == "extra_forbidden":
        known = (Part if "parts" in places else Search).model_fields
        return _problem(400, f"there is no field {where[:100]!r}{suggest(str(places[-1])[:100], known)}")
    if first["type"] == "json_invalid":
        return _problem(400, f"the request is not JSON: {first['ctx']['error']}")
    given = first.get("input")
    value = f", got {str(given)[:60]!r}" if isinstance(given, (str, int, float)) else ""
    return _problem(400, f"{where or 'the request'}: {first['msg']}{value}")


def _http_error(request: Request, error: Exception) -> Response:
    found = cast(HTTPException, error)
    return _problem(found.status_code, f"{found.detail}: {request.method} {request.url.path[:200]}")


def _our_fault(request: Request, error: Exception) -> Response:
    return _problem(500, f"something went wrong here ({type(error).__name__}); the server's output tells what")


def run(
    folders: Sequence[Path],
    *,
    host: str,
    port: int,
    names: Collection[str] = (),
    models: Sequence[str | Path] = (),
    trust: Collection[str] = (),
) -> None:
    """Serve until interrupted.

    Raises:
        ConfigError: an index that cannot be opened, or an address that cannot be listened at.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; it must be from 0, which takes a free one, to 65535")
    shelves = open_shelves(folders, models=models, trust=trust)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be listened at: {error.strerror}; choose another --port") from None
    with listening:
        for s in shelves.values():
            d = s.description
            print(f"{s.name}: {d.count} of {d.modality}, made by the model {d.model.name} ({d.model.hash})")
            if not d.readable:
                print("  its shards are gone or changed: it answers without pictures and sounds", file=sys.stderr)
        if not is_loopback(host):
            print("Whoever reaches this address can search and see the samples: there is no password.", file=sys.stderr)
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listening.getsockname()[1]} (Ctrl+C ends)", flush=True)
        config = uvicorn.Config(
            create_app(shelves, host=host, names=names),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=32,
            timeout_graceful_shutdown=3,
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
