"""What the served indices refuse: queries that cannot be used, large requests, and other sites' pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcontrast.eval.serve import guard
from mmcontrast.eval.serve.app import create_app, open_shelves
from tests import tiny
from tests.served import Served, b64, build, npy


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return build(tmp_path_factory.mktemp("serve"))


PNG = b64(tiny.png("red"))
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "index: Field required"),
    ({"index": "pictures", "parts": []}, "parts: List should have at least 1 item"),
    ({"index": "pictures", "parts": [{"text": "a"}] * 9}, "parts: List should have at most 8 items"),
    ({"index": "pictures", "parts": [{"txt": "a"}]}, "there is no field 'parts.0.txt'; did you mean 'text'?"),
    ({"index": "pictures", "parts": [{"text": "a"}], "tops": 3}, "there is no field 'tops'; did you mean 'top'?"),
    ({"index": "pictures", "parts": [{"text": "a"}], "top": 0}, "top: Input should be greater than or equal to 1, got"),
    ({"index": "pictures", "parts": [{"text": "a"}], "top": 201}, "less than or equal to 200, got '201'"),
    ({"index": "pictures", "parts": [{"text": "a" * 4001}]}, "at most 4000 characters"),
    ({"index": "pictures", "parts": [{"text": "a", "weight": 11}]}, "less than or equal to 10"),
    ({"index": "pictures", "parts": [{}]}, "the query cannot be used: it has nothing; give one of text, data and like"),
    ({"index": "pictures", "parts": [{"text": "a", "like": "0-0"}]}, "it has text and like; give one of"),
    ({"index": "pictures", "parts": [{"text": " \n"}]}, "the query cannot be used: its text is empty"),
    (
        {"index": "pictures", "parts": [{"text": "a"}, {"text": ""}]},
        "part 2 of the query cannot be used: its text is empty",
    ),
    (
        {"index": "pictures", "parts": [{"text": "a", "modality": "image"}]},
        "'image' is of kind image: give it as `data`",
    ),
    ({"index": "pictures", "parts": [{"data": PNG, "modality": "text"}]}, "'text' is of kind text: give it as `text`"),
    ({"index": "pictures", "parts": [{"data": PNG}]}, "its modality is missing; the model has image, text, audio, ecg"),
    ({"index": "pictures", "parts": [{"data": PNG, "modality": "imge"}]}, "no modality 'imge'; did you mean 'image'?"),
    ({"index": "pictures", "parts": [{"data": "no base64!", "modality": "image"}]}, "its data are not base64"),
    ({"index": "pictures", "parts": [{"data": "", "modality": "image"}]}, "its file is empty"),
    ({"index": "pictures", "parts": [{"data": b64(b"<svg/>"), "modality": "image"}]}, "image cannot be decoded"),
    ({"index": "pictures", "parts": [{"data": PNG, "modality": "audio"}]}, "audio is not WAV, FLAC, Ogg or MP3"),
    ({"index": "pictures", "parts": [{"data": "/etc/passwd", "modality": "image"}]}, "its data are not base64"),
    ({"index": "pictures", "parts": [{"data": PNG, "modality": "ecg"}]}, "signal is no .npy file"),
    (
        {"index": "pictures", "parts": [{"data": b64(npy(np.zeros((9, 3)))), "modality": "ecg"}]},
        "other channels than its metadata say (rate 100, channels I, II); say what the file is with `rate`",
    ),
    ({"index": "pictures", "parts": [{"like": "0-99"}]}, "the index pictures has no sample 0-99"),
    ({"index": "pictures", "parts": [{"like": "../x"}]}, "parts.0.like: String should match pattern"),
    ({"index": "pictures", "parts": [{"like": "0-0", "of": "text"}]}, "no index 'text'; did you mean 'texts'?"),
    ({"index": "pictures", "parts": [{"text": "a"}], "where": "label"}, "the filter 'label' ends where it needs ="),
    ({"index": "pictures", "parts": [{"text": "a"}], "where": "labl = 'x'"}, "column 'labl'; did you mean 'label'?"),
    ({"index": "pictures", "parts": [{"text": "a"}], "where": "rate = 'x'"}, "'rate', which is whole number, by ="),
    ({"index": "pictures", "parts": [{"text": "a"}], "where": "a" * 2001}, "at most 2000 characters"),
    ({"index": "pictures", "parts": [{"text": "a"}], "joint": "both"}, "joint: Input should be 'auto', 'sum' or"),
    ({"index": "nowhere", "parts": [{"text": "a"}]}, "there is no index 'nowhere'; known: pictures, texts"),
]


@pytest.mark.parametrize(("body", "says"), BAD)
def test_a_query_that_cannot_be_used_is_answered_by_one_sentence(
    served: Served, body: dict[str, Any], says: str
) -> None:
    answer = served("POST", "/api/search", json=body)
    assert answer.status_code in (400, 404) and says in answer.json()["error"], answer.text
    assert list(answer.json()) == ["error"] and "\n" not in answer.json()["error"]
    assert str(served.run.parent) not in answer.text


def test_the_fields_of_an_answer_are_as_described(served: Served) -> None:
    described = served.get("/openapi.json").json()
    assert described["openapi"].startswith("3.") and set(described["paths"]) == {
        "/api/indices",
        "/api/search",
        "/api/indices/{index}/columns",
        "/api/indices/{index}/duplicates",
        "/api/indices/{index}/samples",
        "/api/indices/{index}/samples/{sample_id}",
        "/api/indices/{index}/samples/{sample_id}/media/{modality}",
        "/api/indices/{index}/samples/{sample_id}/plot/{modality}",
    }
    schemas = described["components"]["schemas"]
    answer = served.search({"text": "red"}).json()
    assert set(answer) == set(schemas["Hits"]["properties"])
    assert set(answer["hits"][0]) == set(schemas["Hit"]["properties"])
    assert set(served.get("/api/indices").json()[0]) == set(schemas["Description"]["properties"])
    for path in described["paths"].values():
        for operation in path.values():
            assert {"200", "4XX"} <= set(operation["responses"]) and "422" not in operation["responses"]
            assert operation["description"] and operation["responses"]["200"]["content"]


@pytest.mark.parametrize("body", [b"{", b"", b"[" * 100_000, b'{"index": "\xff"}', b'{"index": NaN}', b"null"])
def test_what_is_not_json_is_refused(served: Served, body: bytes) -> None:
    answer = served("POST", "/api/search", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and set(answer.json()) == {"error"}


def test_a_large_request_is_refused_before_it_is_read(served: Served) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while True:
            read += 1 << 20
            yield b" " * (1 << 20)

    headers = {"content-type": "application/json"}
    answer = served("POST", "/api/search", content=endless(), headers=headers)
    assert answer.status_code == 413 and "above 32 MiB; send a smaller file" in answer.json()["error"]
    assert read <= guard.MAX_BODY_BYTES + (2 << 20)
    for said in (str(guard.MAX_BODY_BYTES + 1), "1" * 30, "-1", "x"):
        assert (
            served("POST", "/api/search", content=b"{}", headers=headers | {"content-length": said}).status_code == 413
        )
    file = b64(b"\0" * ((16 << 20) + 1))
    answer = served.search({"modality": "image", "data": file})
    assert answer.status_code == 400 and len(answer.text) < 500


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example:8000"}, 421),  # a name that was rebound to this address
        ({"host": "localhost.evil.example"}, 421),
        ({"host": "192.168.0.7:8000"}, 421),
        ({"host": "[::1"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),  # a link to the page
    ],
)
def test_other_sites_are_not_answered(served: Served, headers: dict[str, str], status: int) -> None:
    for path in ("/", "/api/indices", "/api/indices/pictures/samples/0-0/media/image"):
        answer = served("GET", path, headers=headers)
        assert answer.status_code == status
        assert status == 200 or set(answer.json()) == {"error"}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_of_another_site_cannot_ask(served: Served, kind: str) -> None:
    body = json.dumps({"index": "pictures", "parts": [{"text": "red"}]}).encode()
    answer = served("POST", "/api/search", content=body, headers={"content-type": kind})
    assert answer.status_code == 415
    assert served("POST", "/api/search", content=body, headers={"content-type": "application/json"}).status_code == 200


def test_names_and_addresses_are_answered_when_they_are_allowed(served: Served) -> None:
    shelves = open_shelves(served.folders[:1])
    for host, names, asked, status in (
        ("127.0.0.1", ("search.example",), "search.example", 200),
        ("127.0.0.1", ("search.example",), "Search.Example:443", 200),
        ("0.0.0.0", (), "192.168.0.7:8000", 200),  # an address cannot be rebound
        ("0.0.0.0", (), "search.example", 421),
        ("box.example", (), "box.example:8000", 200),
    ):
        other = Served(create_app(shelves, host=host, names=names), served.run, served.folders, served.samples)
        assert other.get("/api/indices", host=asked).status_code == status


def test_every_answer_carries_the_headers(served: Served) -> None:
    paths = {
        "/": "text/html",
        "/app.js": "text/javascript",
        "/style.css": "text/css",
        "/icon.svg": "image/svg+xml",
        "/api/indices": "application/json",
        "/nowhere": "application/json",
        "/api/indices/pictures/samples/0-0/media/image": "image/webp",
    }
    for path, kind in paths.items():
        headers = served.get(path).headers
        assert headers["content-type"].startswith(kind) and headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["cross-origin-resource-policy"] == "same-origin" and "access-control-allow-origin" not in headers
    assert served.get("/", host="evil.example").headers["x-content-type-options"] == "nosniff"


def test_a_fault_of_ours_says_so_and_no_more(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    shelves = open_shelves(served.folders[:1])
    other = Served(create_app(shelves), served.run, served.folders, served.samples)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"a secret at {served.run}")

    monkeypatch.setattr(shelves["pictures"], "search", fail)
    answer = other.search({"text": "red"})
    assert answer.status_code == 500 and answer.headers["x-content-type-options"] == "nosniff"
    assert "RuntimeError" in answer.json()["error"] and "secret" not in answer.text


def test_the_page_asks_no_other_site_and_parses_no_markup() -> None:
    page = Path(guard.__file__).parent / "page"
    for file in page.iterdir():
        text = file.read_text()
        assert not [w for w in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(") if w in text], (
            file
        )
        links = [line for line in text.splitlines() if "//" in line and "http" in line and "w3.org" not in line]
        assert not links, file
