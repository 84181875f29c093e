"""The pages of `jmlr serve` in a real browser: Debian's chromium, without a screen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from answering import rows_of
from serving import Server

CHROMIUM = Path(os.environ.get("JMLR_CHROMIUM", "/usr/bin/chromium"))
NO_BROWSER = "no browser at"
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
AXE = Path(os.environ.get("JMLR_AXE", Path(__file__).parent.parent / ".venv" / "axe" / "axe.min.js"))
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


pytestmark = pytest.mark.exhaustive  # in a real browser


@pytest.fixture(scope="module")
def server(askable, tmp_path_factory):
    if not CHROMIUM.exists():
        pytest.skip(f"{NO_BROWSER} {CHROMIUM}: apt-get install chromium (tpu_scripts/test.sh does where it may)")
    with Server(askable, tmp_path_factory.mktemp("pages"), "--arm", "jmlr", "--arm", "before") as found:
        yield found


@pytest.fixture(scope="module")
def browser(server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def page(browser, server):
    """A page on which nothing goes wrong and nothing is asked of another server."""
    with browser.new_context(base_url=server.url) as context:
        found = context.new_page()
        wrong: list[str] = []
        found.on(
            "console",
            lambda said: wrong.append(said.text) if said.type == "error" and "status of 4" not in said.text else None,
        )
        found.on("pageerror", lambda error: wrong.append(str(error)))
        found.on("request", lambda request: None if request.url.startswith(server.url) else wrong.append(request.url))
        yield found
        assert wrong == []


@pytest.fixture(scope="module")
def row(askable):
    return rows_of(askable, "jmlr")[0]


def ask(page, row, beside=""):
    page.goto("/")
    page.get_by_role("textbox", name="Question").fill(row["question"])
    page.get_by_role("textbox", name="Options").fill("\n".join(row["option_texts"]))
    page.get_by_label("Beside it").select_option(beside)
    page.get_by_label("Answer even when unsure").check()
    page.get_by_role("button", name="Ask").click()


def checked(page):
    """No rule of accessibility is broken."""
    page.evaluate(AXE.read_text() + "; undefined")
    found = page.evaluate("rules => axe.run(document, {runOnly: rules})", RULES)
    assert [(v["id"], [n["target"] for n in v["nodes"]]) for v in found["violations"]] == []
    assert len(found["passes"]) > 15


def test_ask_and_open_a_citation(page, row):
    ask(page, row)
    said = page.locator(".said")
    said.wait_for()
    page.locator(".tools").wait_for()
    assert row["option_texts"][row["prediction"]] in said.inner_text() and "arm=jmlr" in page.url
    assert page.locator("table.choices tbody tr").count() == 4 and page.locator(".effect").count() == 3
    last = page.locator("#a0-3")
    assert not last.is_visible()
    page.get_by_role("link", name="Passage 3").click()
    assert last.is_visible() and page.evaluate("document.activeElement.id") == "a0-3"
    assert page.url.endswith("#a0-3") and page.locator("#a0-3 mark").count() > 0
    page.reload()  # the address alone gives the same answer
    assert row["option_texts"][row["prediction"]] in page.locator(".said").inner_text()


def test_an_answer_streams(page, row):
    """The pieces are seen on their way: what was swapped in is noted as it comes."""
    page.add_init_script(
        "window.seen = []; document.addEventListener('htmx:sseMessage', e => window.seen.push(e.detail.type))"
    )
    ask(page, row)
    page.locator(".tools").wait_for()
    seen = page.evaluate("window.seen")
    assert seen[0] == "passages" and "said" in seen and seen.count("written") > 1 and seen[-1] == "answer"


def test_two_arms_beside_each_other(page, row):
    ask(page, row, beside="before")
    page.locator(".tools").nth(1).wait_for()
    assert page.locator(".column h2").all_inner_texts() == ["Joint training", "Before joint training"]
    boxes = [page.locator(".column").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_without_javascript(browser, server, row):
    with browser.new_context(base_url=server.url, java_script_enabled=False) as context:
        page = context.new_page()
        ask(page, row, beside="before")
        assert page.locator(".column").count() == 2
        assert row["option_texts"][row["prediction"]] in page.locator(".said").first.inner_text()
        page.locator(".cites a", has_text="3").first.click()
        assert page.locator("#a0-3").is_visible()


def test_narrow(browser, server, row):
    for scheme in ("light", "dark"):
        with browser.new_context(
            base_url=server.url, viewport={"width": 320, "height": 640}, color_scheme=scheme, reduced_motion="reduce"
        ) as context:
            page = context.new_page()
            ask(page, row, beside="before")
            page.locator(".tools").nth(1).wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= 320
            if AXE.exists():
                checked(page)


def test_by_keyboard_alone(page, row):
    page.goto("/")
    page.keyboard.type(row["question"])  # the question has the focus
    page.keyboard.press("Tab")
    page.keyboard.type("\n".join(row["option_texts"]))
    page.keyboard.press("Control+Enter")
    page.locator(".said, .box.warn").wait_for()
    page.locator(".tools").wait_for()
    page.goto("/")
    page.keyboard.press("Shift+Tab")
    page.locator("body").press("Tab")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"q", "options", "arm", "beside", "k", "Ask", "Corpus and index"} <= reached


def test_nothing_hinders_anybody(page, row):
    if not AXE.exists():
        pytest.skip(f"{NO_BROWSER} hand to check pages with: {AXE} is missing (tpu_scripts/test.sh fetches it)")
    for address in ("/", "/corpus", "/nothing", "/ask?q=x&options=one"):
        page.goto(address)
        checked(page)
    ask(page, row, beside="before")
    page.locator(".tools").nth(1).wait_for()
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    checked(page)
