"""The page in a real browser: it streams, stops, colours tokens, and asks nobody but its own server."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Served, model_folder, serving

playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    """The page, which must not complain or ask others."""
    yield from watched(browser, server.url)


def watched(browser: Any, url: str) -> Iterator[Any]:
    opened = browser.new_page()
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(url)
    holds(opened, "document.getElementById('facts').textContent.includes('context')")
    yield opened
    assert said == [] and asked and all(one.startswith((url, "data:")) for one in asked)
    opened.close()


def holds(page: Any, condition: str) -> None:
    """Waits for it; not by the browser's own loop, which the page's policy forbids to read code from text."""
    end = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def send(page: Any, text: str, most: int = 20) -> None:
    page.fill("#max-tokens", str(most))
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def settled(page: Any) -> None:
    holds(page, "document.getElementById('stop').disabled && document.querySelectorAll('li').length > 1")


def test_a_conversation(page: Any) -> None:
    assert page.inner_text("#name") == "tiny" and "256 tokens" in page.inner_text("#facts")
    send(page, "hello\nthere")
    settled(page)
    send(page, "again")
    settled(page)
    assert page.locator("li.user .text").all_inner_texts() == ["hello\nthere", "again"]
    assert all(page.locator("li.assistant .text").all_inner_texts())
    page.click("#clear")
    assert page.locator("li").count() == 0


def test_tokens_have_the_colour_of_their_expert_and_the_slider_changes_it(page: Any) -> None:
    send(page, "hello")
    settled(page)
    holds(page, "document.querySelectorAll('#loads i').length === 4")

    def colours() -> list[str]:
        return page.eval_on_selector_all("span[data-expert]", "all => all.map(one => one.style.background)")

    holds(page, "document.querySelectorAll('span[data-expert]').length > 0")
    before = colours()
    page.fill("#layer", "0")
    assert len(colours()) == len(before) and colours() != before and all(before)
    assert page.inner_text("#layer-name") == "0"


def test_stopping_keeps_what_came(browser: Any, tmp_path: Path) -> None:
    with serving(model_folder(tmp_path / "long", max_seq_len=30_000)) as served:
        for page in watched(browser, served.url):
            page.fill("#temperature", "0")  # it then repeats itself, and does not end
            send(page, "hello", most=29_000)
            holds(page, "document.querySelectorAll('li.assistant span').length > 3")
            page.click("#stop")
            settled(page)
            served.until(lambda: served.metric("moeforge_running_requests") == 0)
            assert served.metric("moeforge_tokens_written_total") < 29_000
            assert page.is_hidden("#error") and page.inner_text("li.assistant .text")


def test_what_is_wrong_is_said(browser: Any, server: Served) -> None:
    opened = browser.new_page()
    opened.goto(server.url)
    holds(opened, "document.getElementById('facts').textContent.includes('context')")
    send(opened, "x" * 400)
    opened.wait_for_selector("#error:not([hidden])")
    assert "the context takes 256" in opened.inner_text("#error")
    assert opened.locator("li").count() == 0 and opened.input_value("#prompt") == "x" * 400, "as if it was never sent"
    send(opened, "short")
    settled(opened)
    assert opened.is_hidden("#error")
    opened.close()


def test_an_empty_field_leaves_the_servers_own(page: Any) -> None:
    page.fill("#temperature", "")
    with page.expect_request("**/chat/completions") as sent:
        send(page, "hello")
    settled(page)
    asked = sent.value.post_data_json
    assert "temperature" not in asked and asked["max_tokens"] == 20


def test_clearing_while_text_comes_starts_anew_and_loads_are_live(browser: Any, tmp_path: Path) -> None:
    with serving(model_folder(tmp_path / "long", max_seq_len=30_000), "--show-routing") as served:
        for page in watched(browser, served.url):
            page.fill("#temperature", "0")  # it then repeats itself, and does not end
            send(page, "hello", most=29_000)
            holds(page, "document.querySelectorAll('#loads i').length === 4")  # while it still writes
            assert not page.is_disabled("#stop")
            page.click("#clear")
            holds(page, "document.getElementById('stop').disabled")
            with page.expect_request("**/chat/completions") as sent:
                send(page, "again")
            settled(page)
            assert [message["role"] for message in sent.value.post_data_json["messages"]] == ["user"]


def test_markup_in_a_text_stays_text(page: Any) -> None:
    send(page, "<img src=x onerror=alert(1)><b>bold</b>")
    settled(page)
    assert page.locator("li img, li b").count() == 0
    assert page.inner_text("li.user .text") == "<img src=x onerror=alert(1)><b>bold</b>"


def test_a_base_model_goes_on_with_a_text_and_keys_are_asked_for(browser: Any, tmp_path: Path) -> None:
    with serving(model_folder(tmp_path / "base", template=None), MOEFORGE_API_KEYS="one") as served:
        opened = browser.new_page()
        opened.goto(served.url)
        opened.wait_for_selector("#key-row:not([hidden])")
        opened.fill("#key", "one")
        opened.press("#key", "Tab")
        holds(opened, "document.getElementById('facts').textContent.includes('context')")
        assert opened.inner_text("#prompt-name") == "Text to go on with" and opened.is_hidden("#routing")
        send(opened, "def ")
        settled(opened)
        assert opened.is_hidden("#error") and opened.inner_text("li.assistant .text")
        opened.close()


def test_narrow_screens_have_no_sideways_scroll(browser: Any, server: Served) -> None:
    opened = browser.new_page(viewport={"width": 360, "height": 700})
    opened.goto(server.url)
    send(opened, "a" * 150)
    settled(opened)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    opened.close()
