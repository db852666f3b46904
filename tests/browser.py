"""Headless Chromium, where it is installed."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := which(name))), None)
DRIVER = which("chromedriver")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with its chromedriver")


@contextmanager
def chromium(*arguments: str) -> Generator[Any]:
    """A browser that notes its messages and its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    common = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900")
    for argument in (*common, *arguments):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def open_page(driver: Any, page: Path, *, width: int = 1280, script: bool = True) -> None:
    """Show a file at some width, and assert that it asks for nothing else, says no error, and is no wider."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
    for log in ("browser", "performance"):
        driver.get_log(log)
    driver.get(page.as_uri())
    assert [entry["message"] for entry in driver.get_log("browser")] == []
    assert requests(driver) == [page.as_uri()]
    wide = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]["width"]
    assert wide <= width, f"{page} is {wide} pixels wide, the window {width}"


def requests(driver: Any) -> Sequence[str]:
    """What was asked for since the last look, but for what the page itself holds."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith("data:")]
