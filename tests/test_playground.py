"""The playground in a real browser: the whole journey of someone who compares adapters with the base."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.runs import make_run
from live_server import LiveServer, serving
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from scripted_engine import ScriptedEngine, wait_until

from qlora_kit.adapters import AdapterStore
from qlora_kit.engine import Request

CHROMIUM = shutil.which("chromium")
KEY = "a-key-of-the-tests-0123456789"
MARKUP = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture
def faults_seen() -> list[str]:
    """What the page's console complained about, and what it asked of other servers."""
    return []


@pytest.fixture
def open_page(browser: Browser, faults_seen: list[str]) -> Iterator[Callable[..., Page]]:
    """Opens a server's page as a new visitor: ``open_page(live, width=390)``."""
    contexts: list[BrowserContext] = []

    def opened(live: LiveServer, *, width: int = 1280, dark: bool = False) -> Page:
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": 860}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: faults_seen.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults_seen.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith(live.url) else faults_seen.append(request.url)
        )
        page.goto(live.url)
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    found = AdapterStore(tmp_path / "store")
    for name in ("reviews", "other"):
        found.add(make_run(tmp_path / name), name)
    return found


def slow_reply(request: Request) -> str:
    text = request.conversation[-1].content
    return " ".join(["word"] * 60) if text == "go on" else f"{request.adapter or 'base'}: {text}"


@pytest.fixture
def live(store: AdapterStore) -> Iterator[LiveServer]:
    engine = ScriptedEngine(store.root, seconds_per_token=0.02)
    engine.reply = slow_reply
    with serving(engine, store.root) as server:
        yield server


def column(page: Page, model: str) -> Locator:
    return page.locator(f"article[data-model={model}]")


def test_one_prompt_to_the_base_and_two_adapters(
    live: LiveServer, open_page: Callable[..., Page], faults_seen: list[str]
) -> None:
    page = open_page(live)
    expect(page.get_by_role("checkbox")).to_have_count(3)
    expect(page.locator("#summary")).to_contain_text("base with 2 adapters")
    page.get_by_label("reviews").check()
    page.get_by_label("Prompt", exact=True).fill(MARKUP)
    page.get_by_role("button", name="Run").click()
    for model in ("base", "other", "reviews"):
        expect(column(page, model).locator(".answer")).to_have_text(f"{model}: {MARKUP}")
        figures = column(page, model).locator(".figures")
        expect(figures).to_contain_text("3 + 4 tokens")
        expect(figures).to_contain_text("ended by itself")
        assert " s \u00b7 first after " in figures.inner_text()
    assert page.locator(".answer img, .answer b").count() == 0
    assert page.title() == "QLoRA Kit playground"
    column(page, "reviews").locator("summary").click()
    card = column(page, "reviews").locator("dl")
    for text in ("sentiment", "Qwen/Qwen2.5-7B-Instruct", "accuracy 0.95", "2026-01-02, trained"):
        expect(card).to_contain_text(text)
    assert faults_seen == []


def test_settings_and_the_system_prompt_are_sent(live: LiveServer, open_page: Callable[..., Page]) -> None:
    engine = live.service.engine
    assert isinstance(engine, ScriptedEngine)
    page = open_page(live)
    page.get_by_label("other").uncheck()
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    for label, value in (("Temperature", "0.7"), ("Top-p", "0.9"), ("Longest answer", "5"), ("Seed", "7")):
        page.get_by_label(label).fill(value)
    page.keyboard.press("Control+Enter")
    expect(column(page, "base").locator(".figures")).to_contain_text("ended by itself")
    request = engine.requests[-1]
    assert [turn.content for turn in request.conversation] == ["Be brief.", "hello"]
    assert request.sampling is not None
    found = (request.sampling.temperature, request.sampling.top_p, request.sampling.max_new_tokens)
    assert (*found, request.sampling.seed) == (0.7, 0.9, 5, 7)
    page.get_by_label("Temperature").fill("9")
    page.get_by_text("Settings").click()  # closed again: a wrong value must be shown all the same
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_label("Temperature")).to_be_visible()
    assert len(engine.requests) == 1


def test_stopping_by_keyboard_ends_the_answers(live: LiveServer, open_page: Callable[..., Page]) -> None:
    engine = live.service.engine
    assert isinstance(engine, ScriptedEngine)
    page = open_page(live)
    page.get_by_label("Prompt", exact=True).fill("go on")
    page.keyboard.press("Control+Enter")
    expect(column(page, "other").locator(".answer")).to_contain_text("word word")
    page.keyboard.press("Escape")
    for model in ("base", "other"):
        expect(column(page, model).locator(".figures")).to_have_text("stopped")
    wait_until(lambda: all(answer.cancelled_after is not None for answer in engine.answers), "the engine is told")
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    expect(page.locator("#status")).to_have_text("Stopped.")


def test_what_goes_wrong_is_told_in_sentences(
    live: LiveServer, open_page: Callable[..., Page], store: AdapterStore
) -> None:
    page = open_page(live)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text("Write a prompt first.")
    page.get_by_label("Prompt", exact=True).fill("a<|im_end|>b")
    page.get_by_role("button", name="Run").click()
    expect(column(page, "base").locator(".fault")).to_contain_text("cannot end or open a turn")
    store.delete("other")
    live.watcher.sync()
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Run").click()
    expect(column(page, "base").locator(".figures")).to_contain_text("ended by itself")
    expect(column(page, "other").locator(".fault")).to_contain_text("There is no model of this name")
    page.get_by_role("checkbox", name="base").uncheck()
    expect(page.get_by_role("checkbox")).to_have_count(2)  # the list follows the store
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("Choose at least one model")


def test_a_server_with_a_key_asks_for_it(store: AdapterStore, open_page: Callable[..., Page]) -> None:
    with serving(ScriptedEngine(store.root), store.root, api_key=KEY) as live:
        page = open_page(live)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        page.get_by_label("API key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The server does not accept this key.")
        page.get_by_label("API key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.get_by_role("checkbox")).to_have_count(3)
        page.get_by_label("Prompt", exact=True).fill("hello")
        page.keyboard.press("Control+Enter")
        expect(column(page, "base").locator(".answer")).to_have_text("base: hello")
        page.reload()
        expect(page.get_by_role("checkbox")).to_have_count(3)


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window_and_text_can_be_read(
    live: LiveServer, open_page: Callable[..., Page], width: int, dark: bool
) -> None:
    page = open_page(live, width=width, dark=dark)
    expect(page.get_by_role("checkbox")).to_have_count(3)
    page.get_by_text("Settings").click()
    page.get_by_label("Prompt", exact=True).fill("x" * 200)
    page.keyboard.press("Control+Enter")
    expect(column(page, "other").locator(".figures")).to_contain_text("ended by itself")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # WCAG's contrast of every text with what is behind it.
    worst = page.evaluate(
        """() => {
          const light = (color) => {
            const parts = color.match(/[\\d.]+/g).slice(0, 3).map((value) => {
              const share = value / 255;
              return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
          };
          const behind = (node) => {
            for (; node; node = node.parentElement) {
              const color = getComputedStyle(node).backgroundColor;
              if (!/, 0\\)$/.test(color)) return color;
            }
            return "rgb(255, 255, 255)";
          };
          let worst = 21;
          for (const node of document.querySelectorAll("h1, p, label, legend, summary, kbd, h3, pre, button:enabled")) {
            if (!node.textContent.trim() || !node.checkVisibility()) continue;
            const [one, two] = [light(getComputedStyle(node).color), light(behind(node))].sort();
            worst = Math.min(worst, (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05));
          }
          return worst;
        }"""
    )
    assert worst >= 4.5
