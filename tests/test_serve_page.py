"""The page in a real browser (headless Chromium): type, drop, look, compare, by mouse and by keyboard."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import uvicorn
from PIL import Image

from mmcontrast import load
from tests import browser
from tests.browser import needs_chromium
from tests.served import HOSTILE, Served, b64, build, npy, series, wav

pytestmark = needs_chromium

# Drops files as a person would, without a file on the disk.
DROP = """
const files = arguments[0].map(([name, type, data]) =>
  new File([Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))], name, { type }));
const transfer = new DataTransfer();
for (const file of files) transfer.items.add(file);
for (const kind of ["dragover", "drop"])
  document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return build(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def address(served: Served) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(served.app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    # With a microphone that beeps.
    with browser.chromium("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream") as driver:
        yield driver


class Page:
    """The page, as a person sees it."""

    def __init__(self, driver: Any, address: str, query: str = "") -> None:
        self.driver, self.address = driver, address
        driver.get(f"{address}/{query}")
        self.settle()

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def until(self, true: Callable[[], Any]) -> Any:
        end = time.monotonic() + 20
        while not (found := true()):
            assert time.monotonic() < end, f"waited in vain; the page says {self.one('body').text[:500]!r}"
            time.sleep(0.05)
        return found

    def settle(self) -> None:
        """Wait until what was asked is answered."""
        self.until(
            lambda: self.driver.execute_script(
                "return document.querySelector('.column:not(.old)') && !document.querySelector('[aria-busy]')"
            )
        )

    def act(self, do: Callable[[], object]) -> None:
        """Do what asks anew, and wait for the answers."""
        self.driver.execute_script("for (const old of document.querySelectorAll('.column')) old.classList.add('old')")
        do()
        self.settle()

    def type(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def drop(self, *files: tuple[str, str, Any]) -> None:
        self.driver.execute_script(DROP, [(n, t, base64.b64encode(d).decode()) for n, t, d in files])

    def ids(self, index: str = "pictures") -> list[str]:
        return [card.get_attribute("data-id") for card in self.all(f"[data-index={index}] .card")]

    def quiet(self) -> None:
        """Nothing went wrong, and the policy stopped nothing; but one picture of these is a web page."""
        said = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
        assert [message for message in said if "/samples/0-7/media/image" not in message] == []


ENTER, ESCAPE, RIGHT, DOWN = "\ue007", "\ue00c", "\ue014", "\ue015"
PIXELS = """
const canvas = document.createElement("canvas"), image = arguments[0];
canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
const drawing = canvas.getContext("2d");
drawing.drawImage(image, 0, 0);
return [...drawing.getImageData(0, 0, canvas.width, canvas.height).data];
"""


def ids(hits: list[dict[str, Any]]) -> list[str]:
    return [hit["id"] for hit in hits]


def test_words_find_the_right_pictures(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address)
    assert "at random" in page.one("#status").text and len(page.ids()) == 19
    page.act(lambda: page.type("a red square", ENTER))  # the box has the focus from the beginning
    model = load(served.run)
    z = model.encode("text", ["a red square"])[0]
    having = [s for s in served.samples if s.key != "000007"]
    best = max(having, key=lambda s: float(z @ model.encode("image", [s.members["png"]])[0]))
    card = page.one(".card")
    assert str(best.members["txt"]) in card.text
    page.until(
        lambda: chromium.execute_script("return arguments[0].complete", card.find_element("css selector", "img"))
    )
    seen = np.array(chromium.execute_script(PIXELS, card.find_element("css selector", "img"))).reshape(20, 20, 4)
    with Image.open(io.BytesIO(cast(bytes, best.members["png"]))) as stored:
        assert np.array_equal(seen[..., :3], np.array(stored))
    assert page.ids() == ids(served.hits({"text": "a red square"}))
    assert "run/step-000001" in page.one(".column header").text, "the page states which model made the index"
    page.quiet()


def test_a_dropped_picture_finds_itself_with_its_caption(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address)
    sample = served.samples[13]
    page.act(lambda: page.drop(("mine.png", "image/png", sample.members["png"])))
    first = page.one(".card")
    assert first.get_attribute("data-id") == "0-13" and str(sample.members["txt"]) in first.text
    assert "1.000" in first.text and "mine.png" in page.one("#parts").text
    page.act(lambda: page.one("#parts button[aria-pressed]").click())
    assert page.ids()[-1] == "0-13", "away from it, it comes last"
    page.quiet()


def test_sounds_and_signals_are_asked_and_shown(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address)
    page.act(lambda: page.drop(("beep.wav", "audio/wav", wav(tone=1200.0))))
    assert page.ids() == ids(served.hits({"modality": "audio", "data": b64(wav(tone=1200.0))}))
    player = page.one("[data-id='0-4'] audio")
    chromium.execute_script("arguments[0].preload = 'auto'; arguments[0].load()", player)
    page.until(lambda: chromium.execute_script("return arguments[0].duration", player) == 0.5)

    page = Page(chromium, address)
    page.act(lambda: page.drop(("beat.npy", "", npy(series(5)))))
    want = ids(served.hits({"modality": "ecg", "data": b64(npy(series(5)))}))
    assert page.ids() == want
    table = "time,I,II\n" + "".join(f"{i / 100},{a:.9g},{b:.9g}\n" for i, (a, b) in enumerate(series(5)))
    page.act(lambda: page.drop(("beat.csv", "text/csv", table.encode())))
    assert page.ids() == want and page.one("#parts input").get_attribute("value") == "100"
    page.act(lambda: page.one("#parts button[aria-label^=Remove]").click())
    page.one("[data-id='0-3'] .open").click()
    page.until(lambda: len(page.all("#details .plot")) == 2)
    assert "100 Hz · mV" in page.one("#details").text and page.all("#details audio")
    page.quiet()


def test_all_of_it_by_keyboard(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address)
    page.act(lambda: page.type("blue", ENTER))
    order = page.ids()
    page.type(DOWN)
    page.type(RIGHT)
    page.type(ENTER)
    key = f"{int(order[1].split('-')[1]):06d}"
    assert page.one("#details h2").text == key
    page.type(RIGHT)
    assert page.one("#details h2").text == f"{int(order[2].split('-')[1]):06d}"
    page.type(ESCAPE)
    focused = "return document.activeElement.closest('.card')?.dataset.id"
    page.until(lambda: chromium.execute_script(focused) == order[2])  # back where one was
    page.act(lambda: page.type("m"))
    assert page.ids() == ids(served.hits({"like": order[2]}))
    page.act(chromium.back)
    assert page.ids() == order and page.one("#text").get_attribute("value") == "blue"
    page.one("body").send_keys("/")
    assert chromium.execute_script("return document.activeElement.id") == "text"
    page.quiet()


def test_two_indices_side_by_side(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address, "?q=green&beside=texts")
    assert page.ids() == ids(served.hits({"text": "green"}))
    assert page.ids("texts") == ids(served.hits({"text": "green"}, index="texts"))
    left, right = (column.rect for column in page.all(".column"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    own = page.ids()[0]
    page.act(lambda: page.one("[data-index=pictures] .like").click())
    assert page.ids() == ids(served.hits({"like": own})) and own not in page.ids()
    assert page.ids("texts") == ids(served.hits({"like": own, "of": "pictures"}, index="texts"))
    page.quiet()


def test_what_shards_hold_is_text_and_never_markup(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address, "?index=texts&q=x")
    assert HOSTILE in [said.text for said in page.all(".said")]
    page.one("[data-id='0-1'] .open").click()
    assert page.one("#details .whole").text == HOSTILE
    assert not page.all("img[src=x]")
    page.type(ESCAPE)
    broken = page.one("[data-id='0-7']")
    chromium.execute_script("arguments[0].scrollIntoView()", broken)
    page.until(lambda: "cannot be read" in broken.text)
    page.quiet()


def test_what_is_wrong_is_said(served: Served, address: str, chromium: Any) -> None:
    for name, kind, data, says in (
        ("notes.txt", "text/plain", b"x", "notes.txt is no picture, sound or signal (.npy, .csv)."),
        ("a.png", "image/png", b"<html>", "image cannot be decoded"),
        ("a.gif", "image/gif", b"<html>", "a.gif is no picture that this browser can read."),
        ("a.wav", "audio/wav", b"<html>", "audio is not WAV, FLAC, Ogg or MP3"),
        ("a.csv", "text/csv", b"I,II\n1,x\n", "a.csv has cells that are no numbers."),
        ("a.npy", "", b"<html>", "signal is no .npy file"),
    ):
        page = Page(chromium, address)
        page.drop((name, kind, data))
        page.until(lambda page=page, says=says: says in page.one("#problem").text)
    chromium.get_log("browser")  # of the answers with status 400


def test_a_picture_of_another_format_is_drawn_by_the_browser(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address)
    file = io.BytesIO()
    with Image.open(io.BytesIO(cast(bytes, served.samples[8].members["png"]))) as picture:
        picture.save(file, "BMP")
    page.act(lambda: page.drop(("mine.bmp", "image/bmp", file.getvalue())))
    assert page.ids()[0] == "0-8"
    page.quiet()


def test_the_microphone_is_heard(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address)
    page.one("#record").click()
    page.until(lambda: "1 s" in page.one("#record").text)
    page.act(lambda: page.one("#record").click())
    assert "recording" in page.one("#parts").text and len(page.ids()) == 19
    assert "at random" not in page.one("#status").text
    page.quiet()


def test_filters_are_chosen_and_written(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address, "?q=a+square")
    page.one("summary").click()
    label = page.one("#filters select[data-column=label]")
    words = [option.text for option in label.find_elements("css selector", "option")]
    assert words[0] == "any" and "red (3)" in words and words[-1] == "no value (3)"
    choose = "arguments[0].selectedIndex = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
    page.act(lambda: chromium.execute_script(choose, label, words.index("red (3)")))
    assert page.ids() == ids(served.hits({"text": "a square"}, where="label = 'red'")) and len(page.ids()) == 3
    assert "3 of 19 pass the filter" in page.one("#status").text and "label = 'red'" in page.one("summary").text
    page.one("#where").click()
    page.act(lambda: page.type("shape != 'square'", ENTER))
    assert page.ids() == ids(served.hits({"text": "a square"}, where="label = 'red' and shape != 'square'"))
    assert 0 < len(page.ids()) < 3
    shown = page.ids()
    page = Page(chromium, address, chromium.current_url.removeprefix(f"{address}/"))  # an address keeps them
    assert page.ids() == shown
    page.act(chromium.back)
    page.act(chromium.back)
    assert len(page.ids()) == 19
    page = Page(chromium, address, "?where=label+%3D+3")
    assert "put the text in quotes" in page.one("#problem").text
    page = Page(chromium, address, "?where=label+%3D+'red'")
    assert len(page.ids()) == 3 and "that passes the filter" in page.one("#status").text
    chromium.get_log("browser")  # of the answer with status 400


def test_words_keep_away_and_modalities_go_together(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address, "?q=red&away=a+bar")
    parts: list[dict[str, Any]] = [{"text": "red"}, {"text": "a bar", "weight": -1}]
    assert page.ids() == ids(served.hits(*parts))
    page.act(lambda: page.drop(("mine.png", "image/png", served.samples[13].members["png"])))
    parts.append({"modality": "image", "data": b64(cast(bytes, served.samples[13].members["png"]))})
    assert page.ids() == ids(served.hits(*parts))
    page.act(lambda: page.drop(("beep.wav", "audio/wav", wav(tone=1200.0))))
    parts.append({"modality": "audio", "data": b64(wav(tone=1200.0))})
    assert page.ids() == ids(served.hits(*parts))
    page.quiet()


def test_near_duplicates_are_looked_at(served: Served, address: str, chromium: Any) -> None:
    page = Page(chromium, address)
    page.one("summary").click()
    page.one("#threshold").clear()
    page.one("#threshold").send_keys("0.97")
    page.act(lambda: page.one("#duplicates").click())
    want = served.get("/api/indices/pictures/duplicates?threshold=0.97").json()
    shown = [
        [card.get_attribute("data-id") for card in group.find_elements("css selector", ".card")]
        for group in page.all(".group")
    ]
    assert shown == [[s["id"] for s in group["samples"]] for group in want["groups"]] and shown
    assert f"{want['count']} group" in page.one(".column").text
    page.one(".group .open").click()
    assert page.one("#details h2").text == want["groups"][0]["samples"][0]["key"]
    page.type(ESCAPE)
    page.one("#text").click()
    page.act(lambda: page.type("red", ENTER))
    assert not page.all(".group") and page.ids() == ids(served.hits({"text": "red"}))
    page.act(chromium.back)
    assert page.all(".group") and "duplicates=0.97" in chromium.current_url
    page.quiet()


@pytest.mark.parametrize("width", [320, 800, 2000])
def test_nothing_is_wider_than_the_window(served: Served, address: str, chromium: Any, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Page(chromium, address, "?q=green&beside=texts&away=red")
        page.one("summary").click()
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
        page.one(".open").click()
        box = page.one("#details").rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
