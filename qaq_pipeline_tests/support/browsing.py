"""A page of the Dagster UI in headless Chromium, and how a test finds what a person sees there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from qaq_pipeline_tests.support.server import CHROMIUM, CHROMIUM_OPTIONS, LOOPBACK

PAGE_PATIENCE_MS = 90_000
VIEWPORT = (1500, 900)


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    expect.set_options(timeout=PAGE_PATIENCE_MS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def open_page(browser: Browser) -> Iterator[Page]:
    """A page in a fresh browser profile; in the end it has asked nobody but the UI, and has met no error."""
    asked: set[str | None] = set()
    with watched(browser) as context:
        context.on("request", lambda request: asked.add(host_of(request.url)))
        opened = context.new_page()
        opened.on("websocket", lambda channel: asked.add(host_of(channel.url)))
        yield opened
    assert asked == {LOOPBACK}


@contextlib.contextmanager
def watched(browser: Browser) -> Iterator[BrowserContext]:
    """A fresh browser profile; in the end its pages have met no error."""
    faults: list[str] = []
    with browser.new_context(viewport={"width": VIEWPORT[0], "height": VIEWPORT[1]}) as context:
        context.set_default_timeout(PAGE_PATIENCE_MS)
        context.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        context.on("weberror", lambda error: faults.append(str(error.error)))
        yield context
    assert faults == []


def host_of(url: str) -> str | None:
    """The host; what a page holds in itself (data:, blob:) comes from where the page does."""
    return LOOPBACK if urlsplit(url).scheme in ("data", "blob") else urlsplit(url).hostname


def take_picture(page: Page, path: Path) -> None:
    page.wait_for_timeout(1500)  # Lists and graphs slide into their places.
    page.screenshot(path=path)


def seen(within: Page | Locator, text: str) -> Locator:
    """The element that shows exactly this text; the UI keeps invisible twins of some, to measure them."""
    return within.get_by_text(text, exact=True).filter(visible=True).first


def metadata_value(page: Page, key: str) -> Locator:
    """The cell beside the key in a table of metadata of one materialisation."""
    return row_of(page, key).get_by_role("cell").nth(1)


def latest_value(page: Page, key: str) -> Locator:
    """The same on the overview of an asset, where a time stands between the key and the newest value."""
    return row_of(page, key).get_by_role("cell").nth(2)


def row_of(page: Page, key: str) -> Locator:
    """The row of a table in which one text is the key."""
    return page.get_by_role("row").filter(has=page.get_by_text(key, exact=True)).filter(visible=True).first
