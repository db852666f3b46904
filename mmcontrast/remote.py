"""Files on other machines: their addresses, and bodies that arrive whole or not at all.

`http(s)://` goes through the standard library: Python brings it, it verifies certificates, heeds the proxies of the
environment, and knows timeouts and ranges. What it lacks, going on where a transfer broke off, no library does for a
started body, so nothing would be saved by another dependency. `s3://`, `gs://`, `hf://` and other stores go through
fsspec, which torch and huggingface_hub bring; the store's own package (s3fs, gcsfs, …) holds its credentials.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from mmcontrast.config import ConfigError

T = TypeVar("T")

STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "oss", "hdfs", "webhdfs", "memory")
"""Where fsspec may read. Its other protocols unpack, rewrite or run what an address says; `::` chains them."""
ABSENT = (403, 404, 410)
"""What servers answer for a file that is not there; stores that may not be listed say 403."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_MAX_PAUSE = 60.0
_MAX_ASKED_PAUSE = 300.0  # a server that asks for more by Retry-After is asked again after this
_CHUNK = 8 << 20


class Again(Exception):
    """A failure that may pass. `pause` is what the server asked for, `moved` whether the attempt got on."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause, self.moved = pause, False


class Missing(ConfigError):
    """The file is not there, or not for us."""


@dataclass(frozen=True)
class Patience:
    """How long to try: `attempts` in a row without progress, `timeout` seconds without a byte each.

    Between attempts passes `pause` · 2^k seconds, at most a minute, less up to half of it by chance, so that many
    processes do not come back at once.
    """

    attempts: int = 8
    timeout: float = 60.0
    pause: float = 0.5


@dataclass(frozen=True)
class Address:
    """A file or folder on another machine, with the part of pathlib's interface that shards need."""

    url: str

    @property
    def scheme(self) -> str:
        """`http`, `s3`, …."""
        return self.url.partition("://")[0].lower()

    @property
    def web(self) -> bool:
        """Whether it is reached by HTTP."""
        return self.scheme in ("http", "https")

    @property
    def name(self) -> str:
        """The last part, as a file name."""
        last = self._split()[1].rpartition("/")[2]
        return unquote(last) if self.web else last

    @property
    def parent(self) -> Address:
        """The folder."""
        head, path, tail = self._split()
        return Address(head + path.rpartition("/")[0] + tail)

    def __truediv__(self, name: str) -> Address:
        head, path, tail = self._split()
        return Address(f"{head}{path}/{quote(name) if self.web else name}{tail}")

    def __str__(self) -> str:
        # A query may hold the signature that lets one in: it stays out of messages and logs.
        head, path, _ = self._split()
        return head + path

    def _split(self) -> tuple[str, str, str]:
        """Scheme and host, path without a closing slash, query of a web address."""
        head, _, rest = self.url.partition("://")
        path, mark, query = rest.partition("?") if self.web else (rest, "", "")
        return f"{head}://", path.rstrip("/"), mark + query


def is_remote(pattern: str) -> bool:
    """Whether a pattern names another machine."""
    return "://" in pattern


def checked(url: str) -> Address:
    """An address that may be read.

    Raises:
        ConfigError: a scheme that would do more than read, or credentials in the address.
    """
    address = Address(url)
    if "::" in url or not (address.web or address.scheme in STORES):
        raise ConfigError(f"{str(address)!r} cannot be read; known are http, https, {', '.join(STORES)}")
    try:
        host = urlsplit(url).netloc
    except ValueError as error:
        raise ConfigError(f"{str(address)!r} is no address: {error}") from None
    if address.web and "@" in host:
        place = str(address).rpartition("@")[2]
        raise ConfigError(f"the address of {place} holds a password; use a store's own credentials or a signed address")
    return address


@dataclass(frozen=True)
class Body:
    """A file's content from `start` on; `total` is its whole length, `version` changes when the file does."""

    start: int
    total: int | None
    version: str | None
    read: Callable[[int], bytes]
    close: Callable[[], None]


def open_body(address: Address, patience: Patience, start: int = 0, version: str | None = None) -> Body:
    """One attempt to read a file from `start`; from 0 where it is no longer of `version`.

    Raises:
        Again: a failure that may pass.
        Missing: the file is not there.
        ConfigError: a failure that will not pass.
    """
    if start and version is None:
        start = 0  # nothing would tell that the file changed: what came before might be of another one
    body = (_web_body if address.web else _store_body)(address, patience, start, version)
    if body.start in (0, start) and (not body.start or body.version == version):
        return body
    body.close()
    if not start:
        raise Again(f"the server sends the file from {body.start} on, which nobody asked for")
    return open_body(address, patience)


def patiently(address: Address, patience: Patience, attempt: Callable[[], T]) -> T:
    """The first answer of an attempt that does not fail.

    Raises:
        ConfigError: too many failed; names the address, the last failure and the number of attempts.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except Again as error:
            failures = 1 if error.moved else failures + 1
            if failures >= patience.attempts:
                raise ConfigError(
                    f"{address} cannot be read after {failures} attempts: {error}; see that the server answers, and "
                    "start again: what has arrived is kept"
                ) from None
            # An own generator: drawing from the global one would change what the run draws.
            chance = random.SystemRandom().uniform(0.5, 1.0)
            pause = chance * min(patience.pause * 2 ** (failures - 1), _MAX_PAUSE)
            if error.pause is not None:
                pause = max(pause, min(error.pause, _MAX_ASKED_PAUSE))
            print(f"{address}: {error}; trying again in {pause:.1f} s", file=sys.stderr)
            time.sleep(pause)


def read_small(address: Address, patience: Patience, limit: int) -> bytes | None:
    """The content of a small file; None where there is none.

    Raises:
        ConfigError: it cannot be read, or is above `limit` bytes.
    """

    def attempt() -> bytes:
        body = open_body(address, patience)
        data = bytearray()
        try:
            while len(data) <= limit and (chunk := read_some(body, _CHUNK)):
                data += chunk
        finally:
            body.close()
        if len(data) > limit:
            raise ConfigError(f"{address} is above {limit >> 20} MiB, which is no description of shards")
        if body.total is not None and len(data) < body.total:
            raise Again(f"it broke off after {len(data)} of {body.total} bytes")
        return bytes(data)

    try:
        return patiently(address, patience, attempt)
    except Missing:
        return None


def read_some(body: Body, size: int) -> bytes:
    """Up to `size` more bytes; none at the end.

    Raises:
        Again: the connection broke.
    """
    try:
        return body.read(min(size, _CHUNK))
    except (OSError, http.client.HTTPException) as error:
        raise Again(_words(error)) from None


# ------------------------------------------------------------------------------------------------- http


def _web_body(address: Address, patience: Patience, start: int, version: str | None) -> Body:
    import ssl
    import urllib.error
    import urllib.request

    # A compressed body would have neither the length nor the ranges of the file.
    headers = {"User-Agent": "mmcontrast", "Accept-Encoding": "identity"}
    if start and version is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    url = quote(address.url, safe="%/:?#[]@!$&'()*+,;=~")  # as it is, but for spaces and letters beyond ASCII
    try:
        answer = _opener().open(urllib.request.Request(url, headers=headers), timeout=patience.timeout)
    except urllib.error.HTTPError as error:
        with error:
            said = f"HTTP {error.code} {error.reason}"
            if error.code == 416 and start:  # shorter than what we have: another file
                return _web_body(address, patience, 0, None)
            if error.code in _PASSING:
                raise Again(said, _asked_pause(error.headers.get("Retry-After"))) from None
            if error.code in ABSENT:
                remedy = "correct the address, or see who may read it (signed addresses, a store's own credentials)"
                raise Missing(f"{address} cannot be read: {said} at the first attempt; {remedy}") from None
            text = f"{address} cannot be read: {said} at the first attempt; no other would help"
            raise ConfigError(f"{text}; correct the address, or copy the shards to this machine") from None
    except urllib.error.URLError as error:
        cause = error.reason
        unknown = isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
        if unknown or isinstance(cause, ssl.SSLCertVerificationError) or not isinstance(cause, OSError):
            raise ConfigError(f"{address} cannot be read: {cause}; correct the address") from None
        raise Again(_words(cause)) from None
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, http.client.InvalidURL):
            raise ConfigError(f"{address} is no address: {error}") from None
        raise Again(_words(error)) from None
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        answer.close()
        raise ConfigError(f"{address} comes compressed although it was asked for as it is; mend the server")
    length, tag = answer.headers.get("Content-Length", ""), answer.headers.get("ETag", "")
    # A weak tag says that the meaning is the same, not the bytes.
    new = tag if tag.startswith('"') else answer.headers.get("Last-Modified")
    begin, total = 0, int(length) if re.fullmatch("[0-9]{1,18}", length) else None
    if answer.status == 206:
        found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", answer.headers.get("Content-Range", ""))
        if not found:
            answer.close()
            raise Again("HTTP 206 without a range")
        begin, total = int(found[1]), int(found[2])
    return Body(begin, total, new, answer.read1, answer.close)  # what has arrived, not only what is whole


@cache
def _opener() -> Any:
    """HTTP and nothing else: urllib's usual opener would follow an address to a local file or by FTP."""
    from urllib import request
    from urllib.error import HTTPError

    class Redirects(request.HTTPRedirectHandler):
        """Follows to other web addresses, and never from an encrypted one to one in the clear."""

        def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
            allowed = ("https",) if req.type == "https" else ("http", "https")
            if urlsplit(newurl).scheme not in allowed:
                raise HTTPError(req.full_url, code, f"to {Address(newurl)}, which is not followed", headers, fp)
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,  # verifies certificates
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        Redirects,
    ):
        opener.add_handler(handler())
    return opener


def _asked_pause(value: str | None) -> float | None:
    """Seconds from now that a Retry-After header means; it holds seconds or a date."""
    from email.utils import parsedate_to_datetime

    if value is None:
        return None
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _words(error: BaseException) -> str:
    """An error with its number, if it has one, and never empty."""
    number = f" (errno {error.errno})" if isinstance(error, OSError) and error.errno else ""
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}{number}"


# ------------------------------------------------------------------------------------------------- stores


def _store_body(address: Address, patience: Patience, start: int, version: str | None) -> Body:
    files, path = _store(address)
    facts = _asked(address, lambda: files.info(path))
    found = str(_asked(address, lambda: files.ukey(path)))
    place, total = start if found == version else 0, int(facts["size"])

    def read(size: int) -> bytes:
        nonlocal place
        stop = min(place + size, total)
        # Whole requests, each of which stands for itself: no handle to lose, no read-ahead to throw away.
        data: bytes = _asked(address, lambda: files.cat_file(path, start=place, end=stop)) if place < stop else b""
        place += len(data)
        return data

    return Body(place, total, found, read, lambda: None)


def _store(address: Address) -> tuple[Any, str]:
    """The file system of an address, and the path in it; made anew, since a forked process needs its own."""
    import fsspec.core

    try:
        files, path = fsspec.core.url_to_fs(address.url)
    except ImportError as error:
        raise ConfigError(f"{address.scheme}:// needs another package: {error}; pip install it") from None
    except Exception as error:
        raise ConfigError(f"{address} cannot be opened ({_words(error)}); see the credentials of the store") from None
    return files, path


def _asked(address: Address, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise Missing(f"{address} cannot be read: {_words(error)}; correct the address, or see who may read") from None
    except Exception as error:  # every store has errors of its own; those of Python itself are mistakes, not weather
        if not isinstance(error, OSError) and type(error).__module__ == "builtins":
            raise ConfigError(f"{address} cannot be read: {_words(error)}") from None
        raise Again(_words(error)) from None


def list_tars(address: Address, patience: Patience) -> list[Address]:
    """The tars that match a glob, in order; those of a store's folder where there is no glob.

    Raises:
        ConfigError: a web address, which cannot be listed.
    """
    if address.web:
        raise ConfigError(
            f"{address} cannot be listed over HTTP; give a range such as {{000..099}}.tar, "
            "or a folder that has a manifest.json"
        )
    pattern = address.url if re.search(r"[*?\[]", address.url) else (address / "*.tar").url
    files, path = _store(Address(pattern))

    def attempt() -> list[str]:
        return _asked(address, lambda: sorted(files.glob(path)))

    found = patiently(address, patience, attempt)
    return [Address(files.unstrip_protocol(name)) for name in found if name.endswith(".tar")]
