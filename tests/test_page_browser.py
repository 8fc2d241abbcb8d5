"""The chat page in a real Chromium: what only a browser shows."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import serving, write_chat_weights

from model.page_labels import EN, ZH

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
PATIENCE_MS = 60_000
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the page of two tiny models, whose answers take long enough to be stopped."""
    folder = tmp_path_factory.mktemp("page")
    write_chat_weights(folder / "out" / "demo" / "rl_32.pth", max_seq_len=20_000)
    write_chat_weights(folder / "out" / "demo" / "multi_chat" / "full_sft_32.pth", seed=1)
    flags = "--device cpu --dtype float32 --seed 0 --top_k 0 --temperature 1".split()
    with serving(
        "fast_inference.py", "/_stcore/health", folder / "log", "--out_dir", folder / "out",
        "--max_new_tokens", 20_000, *flags,
    ) as url:  # fmt: skip
        yield url


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    context, page = open_tab(browser, address)
    yield page
    context.close()


def open_tab(browser: Any, address: str, **facts: Any) -> tuple[Any, Any]:
    """Return a new browser profile and its page, once the page can be used."""
    usual = {"viewport": {"width": 1280, "height": 800}, "locale": "zh-CN"}
    context = browser.new_context(**(usual | facts))
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    page = context.new_page()
    page.goto(address)
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")
    expect(page.get_by_test_id("stChatInput")).to_be_visible()
    return context, page


def ask(page: Any, text: str) -> None:
    box = page.get_by_test_id("stChatInputTextArea")
    box.fill(text)
    box.press("Enter")


def answer(page: Any) -> Any:
    """Return the text of the last answer."""
    return page.get_by_test_id("stChatMessage").last.get_by_test_id("stMarkdownContainer").first


def grown(page: Any, n_chars: int) -> str:
    """Return the last answer once it has so many letters."""
    expect(answer(page)).to_have_text(re.compile(rf"[\s\S]{{{n_chars},}}"))
    return answer(page).inner_text()


def stop(page: Any) -> None:
    page.get_by_test_id("stChatInputStopButton").click()
    settled(page)


def settled(page: Any) -> None:
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")


def limit(page: Any, n_tokens: int) -> None:
    """Let answers be this long."""
    page.get_by_text(ZH["settings"]).click()
    box = page.get_by_role("spinbutton", name=ZH["max_new_tokens"])
    box.fill(str(n_tokens))
    box.press("Enter")
    page.get_by_text(ZH["settings"]).click()
    settled(page)


def test_an_answer_grows_and_stopping_keeps_its_part(tab: Any) -> None:
    ask(tab, "你好")
    expect(tab.get_by_text(ZH["generating"])).to_be_visible()
    early = grown(tab, 30)
    cursor = answer(tab).locator("> :last-child")
    content = "e => getComputedStyle(e, ':after').content"
    assert cursor.evaluate(content) == '"▍"'
    later = grown(tab, len(early) + 30)
    assert later.startswith(early[:20]), "it is one answer that grows"
    stop(tab)
    assert cursor.evaluate(content) == "none"
    kept = answer(tab).inner_text()
    assert kept.startswith(early[:20])
    expect(tab.get_by_text(ZH["stopped"])).to_be_visible()
    expect(tab.get_by_text(ZH["generating"])).not_to_be_visible()
    expect(tab.get_by_text(re.compile(r"\d+ 词元 · [\d.]+ 词元/秒"))).to_be_visible()
    # a click elsewhere draws the page again, with the same text
    tab.get_by_text("EN", exact=True).click()
    expect(tab.get_by_test_id("stChatInputTextArea")).to_have_attribute(
        "placeholder", EN["placeholder"]
    )
    expect(tab.get_by_text(re.compile(EN["stopped"]))).to_be_visible()
    assert answer(tab).inner_text().startswith(kept[:20])


def test_answering_again_has_a_stop_and_keeps_versions(tab: Any) -> None:
    ask(tab, "你好")
    first = grown(tab, 30)[:20]
    stop(tab)
    tab.get_by_role("button", name="refresh icon").click()
    expect(tab.get_by_text("2/2")).to_be_visible()
    expect(answer(tab)).not_to_have_text(re.compile(re.escape(first)))
    second = grown(tab, 30)[:20]
    # another click meanwhile does not break the answer off
    tab.get_by_text("EN", exact=True).click()
    stop_button = tab.locator("[class*=st-key-stop_]").get_by_role("button", name=EN["stop_answer"])
    expect(stop_button).to_be_visible()
    grown(tab, len(answer(tab).inner_text()) + 30)
    # the button moves down as the answer grows: a mouse would have to catch it
    stop_button.dispatch_event("click")
    settled(tab)
    expect(tab.get_by_text(re.compile(EN["stopped"]))).to_be_visible()
    assert answer(tab).inner_text().startswith(second)
    tab.get_by_role("button", name="chevron_left icon").click()
    expect(tab.get_by_text("1/2")).to_be_visible()
    assert answer(tab).inner_text().startswith(first)


def test_a_question_is_edited_and_its_text_is_text(tab: Any) -> None:
    limit(tab, 8)
    ask(tab, "**一** <img src=x onerror=alert(1)> $x$\n  第二行")
    settled(tab)
    question = tab.get_by_test_id("stChatMessage").first.get_by_test_id("stText")
    expect(question).to_have_text("**一** <img src=x onerror=alert(1)> $x$\n  第二行")
    assert tab.locator("[data-testid=stChatMessage] img").count() == 0
    tab.get_by_role("button", name="edit icon").click()
    area = tab.get_by_role("textbox", name=ZH["edit"])
    area.fill("换个问题")
    tab.get_by_role("button", name=ZH["resend"], exact=True).click()
    expect(question).to_have_text("换个问题")
    settled(tab)
    expect(tab.get_by_test_id("stChatMessage")).to_have_count(2)
    expect(tab.get_by_text(re.compile("^8 词元"))).to_be_visible()


def test_another_model_answers(tab: Any) -> None:
    limit(tab, 8)
    ask(tab, "你好")
    settled(tab)
    one = answer(tab).inner_text()
    tab.get_by_test_id("stSelectbox").get_by_role("combobox").click()
    tab.get_by_role("option", name="full_sft_32").click()
    expect(tab.get_by_text(re.compile("上下文 256"))).to_be_visible()
    settled(tab)
    tab.get_by_role("button", name="refresh icon").click()
    expect(tab.get_by_text("2/2")).to_be_visible()
    settled(tab)
    assert answer(tab).inner_text() != one


def test_two_tabs_answer_at_once_and_a_closed_one_is_given_up(
    browser: Any, address: str, tab: Any
) -> None:
    context, other = open_tab(browser, address)
    ask(tab, "一")
    ask(other, "二")
    grown(tab, 30)
    grown(other, 30)
    expect(tab.get_by_test_id("stText")).to_have_text("一")
    expect(other.get_by_test_id("stText")).to_have_text("二")
    context.close()
    grown(tab, len(answer(tab).inner_text()) + 30)
    stop(tab)


def test_the_browsers_dark_and_light_are_followed(browser: Any, address: str) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        context, page = open_tab(browser, address, color_scheme=scheme)
        style = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
        colours[scheme] = [
            sum(map(int, re.findall(r"\d+", colour)[:3]))
            for colour in page.get_by_test_id("stApp").evaluate(style)
        ]
        context.close()
    (light, ink), (dark, chalk) = colours["light"], colours["dark"]
    assert light > 600 > 300 > ink and dark < 200 < 500 < chalk


def test_a_phone_scrolls_in_one_direction(browser: Any, address: str) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    context, page = open_tab(browser, address, **phone)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 390
    expect(page.get_by_test_id("stSidebar")).not_to_be_in_viewport()
    ask(page, "x" * 200 + " 你好")
    grown(page, 100)
    stop(page)
    main = page.get_by_test_id("stAppScrollToBottomContainer")
    assert page.evaluate(width) == 390
    assert main.evaluate("e => e.scrollWidth <= e.clientWidth")
    page.get_by_test_id("stExpandSidebarButton").click()
    expect(page.get_by_text(ZH["new_chat"])).to_be_in_viewport()
    assert page.evaluate(width) == 390
    context.close()


def test_no_weights_is_told_with_what_to_run(browser: Any, tmp_path: Path) -> None:
    with serving(
        "fast_inference.py", "/_stcore/health", tmp_path / "log", "--out_dir", tmp_path
    ) as url:
        context, page = open_tab(browser, url)
        expect(page.get_by_test_id("stAlert")).to_contain_text("make demo")
        expect(page.get_by_test_id("stChatInputTextArea")).to_be_disabled()
        context.close()
