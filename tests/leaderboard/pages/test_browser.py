"""The leaderboard's pages in a browser: sorting, filtering, the keyboard, narrow and dark screens, untrusted text."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import made_up_board
import pytest

from deat_rb.leaderboard.entry import Entry
from deat_rb.leaderboard.pages.index import build, write_pages

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Locator, Page, ViewportSize

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which the extra [test] installs")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, such as Debian's package chromium"),
]

DESKTOP: ViewportSize = {"width": 1400, "height": 900}
UNTRUSTED = {
    "script": "<script>window.hacked = 1</script>",
    "image": "<img src=x onerror='window.hacked = 1'>",
    "svg": "<svg onload='window.hacked = 1'></svg>",
    "out of an attribute": "\" autofocus tabindex=0 onfocus='window.hacked = 1' x=\"",
    "out of the style": "</style><script>window.hacked = 1</script>",
    "out of the title": "</title><script>window.hacked = 1</script>",
    "frame": '<iframe srcdoc="<script>parent.hacked = 1</script>"></iframe>',
    "details": "<details open ontoggle='window.hacked = 1'>x</details>",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(made_up_board.write(tmp_path_factory.mktemp("board"), made_up_board.board()))


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Iterator[tuple[Page, list[str]]]:
    """A page that is opened once, and its console messages, errors, dialogs and requests."""
    opened = browser.new_page(viewport=DESKTOP)
    complaints: list[str] = []

    def refuse(dialog: Dialog) -> None:
        complaints.append(dialog.message)
        dialog.dismiss()

    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", refuse)
    opened.on("request", lambda request: complaints.extend([] if request.url.startswith("file:") else [request.url]))
    yield opened, complaints
    opened.close()


@pytest.fixture
def page(tab: tuple[Page, list[str]], index: Path) -> Iterator[Page]:
    """The board, which must not complain, nor ask for anything but files."""
    opened, complaints = tab
    complaints.clear()
    opened.set_viewport_size(DESKTOP)
    opened.emulate_media(media="screen", color_scheme="light")
    opened.goto(index.as_uri())
    yield opened
    assert complaints == []


def table(page: Page, heading: str = "Digits, Linf, eps 0.1") -> Locator:
    return page.locator("section", has=page.get_by_role("heading", name=heading, exact=True)).locator("table.board")


def names(within: Locator) -> list[str]:
    """The last words of the models' names that are shown, in their order."""
    rows = within.locator("tbody tr:visible th a:first-child").all_inner_texts()
    return [name.rpartition("_")[2] for name in rows if "20" in name]


def head(within: Locator, title: str) -> Locator:
    return within.locator("thead th", has_text=title)


RANKED = ["TRADES", "MTRADES", "MDEAT", "FreeEight", "UFGSM", "Plain", "NoAA"]


def test_a_click_sorts(page: Page) -> None:
    digits = table(page)
    assert names(digits) == RANKED
    assert head(digits, "#").get_attribute("aria-sort") == "ascending"
    natural = head(digits, "natural")
    natural.get_by_role("button").click()
    # 99.6, 98.4, 98.0, 97.8, 97.6, 96.2, 96.0
    assert names(digits) == ["Plain", "UFGSM", "MTRADES", "MDEAT", "TRADES", "FreeEight", "NoAA"]
    assert natural.get_attribute("aria-sort") == "descending"
    assert digits.locator("thead [aria-sort]").count() == 1
    natural.get_by_role("button").click()
    assert names(digits) == ["NoAA", "FreeEight", "TRADES", "MDEAT", "MTRADES", "UFGSM", "Plain"]
    assert natural.get_attribute("aria-sort") == "ascending"
    head(digits, "#").get_by_role("button").click()
    assert names(digits) == RANKED


def test_costs_begin_with_the_cheapest_and_numbers_are_no_words(page: Page) -> None:
    digits = table(page)
    head(digits, "backward passes").get_by_role("button").click()
    # 190, 380, 640, 1,121, 1,520 twice in the order they had, 2,090
    assert names(digits) == ["Plain", "UFGSM", "MDEAT", "MTRADES", "FreeEight", "NoAA", "TRADES"]


def test_what_is_not_known_comes_last_either_way(page: Page) -> None:
    digits = table(page)
    for _ in range(2):
        head(digits, "training").get_by_role("button").click()
        assert names(digits)[-1] == "NoAA"


def test_words_are_sorted_as_words(page: Page) -> None:
    digits = table(page)
    head(digits, "method").get_by_role("button").click()
    methods = digits.locator("tbody tr").evaluate_all("rows => rows.map(row => row.dataset.method)")
    assert methods == ["free-8", "m-deat", "m+trades", "pgd-7", "standard", "trades", "u-fgsm"]


def test_other_tables_keep_their_order(page: Page) -> None:
    before = names(table(page, "CIFAR-10, Linf, eps 8/255"))
    head(table(page), "natural").get_by_role("button").click()
    assert names(table(page, "CIFAR-10, Linf, eps 8/255")) == before


def test_the_keyboard_is_enough(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.name") == "text"
    page.keyboard.type("u-fgsm")
    assert names(table(page)) == ["UFGSM"]
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(
            "document.activeElement.innerText === 'natural' && document.activeElement.tagName === 'BUTTON'"
        ):
            break
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.ariaSort") == "descending"
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.parentElement.ariaSort") == "ascending"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is seen"


def test_the_filter_finds_words(page: Page) -> None:
    status = page.locator(".filter output")
    everything = status.inner_text()
    assert everything == "21 models"
    find = page.get_by_label("Find")
    find.fill("TRADES made")
    assert names(table(page)) == ["TRADES", "MTRADES"]
    assert status.inner_text() == "2 of 21 models"
    assert page.get_by_text("No model here matches the filter.").locator("visible=true").count() == 3
    find.fill("no such thing")
    assert status.inner_text() == "0 of 21 models"
    page.get_by_role("button", name="Clear").click()
    playwright.expect(status).to_have_text("21 models")
    assert names(table(page)) == RANKED


def test_a_command_can_be_copied(page: Page) -> None:
    page.get_by_role("link", name="Doe2021Made_MDEAT", exact=True).click()
    buttons = page.get_by_role("button", name="Copy")
    assert buttons.count() == page.locator("pre code").count() > 0
    buttons.first.click()
    text = page.locator("pre code").first.text_content()
    playwright.expect(page.locator(".copied button").first).to_have_text(re.compile("Copied|Selected"))
    if page.locator(".copied button").first.text_content() == "Selected":
        assert page.evaluate("getSelection().toString()").strip() == (text or "").strip()


def test_the_filter_takes_a_method_or_what_was_measured(page: Page) -> None:
    page.get_by_label("Method").select_option("m-deat")
    assert page.locator("table.board tbody tr:visible").count() == 2
    page.get_by_label("Method").select_option("")
    page.get_by_label("measured only").check()
    assert page.locator("table.board tbody tr:visible").count() == 11
    assert page.locator("table.board .tag:not(.baseline):visible").count() == 0


def test_a_filter_holds_while_sorting(page: Page) -> None:
    page.get_by_label("Find").fill("standard trades")
    head(table(page), "natural").get_by_role("button").click()
    assert names(table(page)) == ["MTRADES", "TRADES"]


def test_links_lead_to_the_models_and_back(page: Page, index: Path) -> None:
    page.get_by_role("link", name="Doe2021Made_MDEAT", exact=True).click()
    assert page.get_by_role("heading", level=1).inner_text() == "Doe2021Made_MDEAT"
    page.get_by_role("link", name="Leaderboard").click()
    assert page.url == index.as_uri()
    page.get_by_role("link", name="Doe2021Made_TRADES: 81.40 % robust, 2,090 backward passes").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Doe2021Made_TRADES"


def test_without_scripts_the_ranking_is_there(browser: Browser, index: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(index.as_uri())
    assert names(table(page)) == RANKED
    assert not page.locator(".filter").is_visible()
    assert page.get_by_text("Sorting and filtering require JavaScript").is_visible()
    page.close()


def model_page(index: Path) -> Path:
    return index.parent / "models/digits/Linf/Doe2021Made_MTRADES.html"


@pytest.mark.parametrize(("scheme", "background"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 29)")])
def test_a_phone_is_wide_enough(page: Page, index: Path, scheme: Any, background: str) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)
    for path in (index, model_page(index)):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background


@pytest.mark.parametrize(("width", "least"), [(1280, 24), (360, 40)])
def test_what_is_pressed_is_large_enough(page: Page, width: int, least: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    heights = page.evaluate("""[...document.querySelectorAll("thead button, .filter :is(button, select, label)")]
        .map((each) => each.getBoundingClientRect().height)""")
    assert len(heights) > 20
    assert min(heights) >= least
    links = page.evaluate("""[...document.querySelectorAll("table.board .name > a")]
        .map((each) => each.getBoundingClientRect().height)""")
    assert min(links) >= 23


def test_nothing_is_cut_off_on_a_laptop(page: Page, index: Path) -> None:
    page.set_viewport_size({"width": 1280, "height": 800})
    for path in (index, model_page(index)):
        page.goto(path.as_uri())
        assert (
            page.evaluate("""[...document.querySelectorAll(".wide")].filter(
            (each) => each.scrollWidth > each.clientWidth + 1).length""")
            == 0
        )


@pytest.mark.parametrize("width", [360, 1280])
def test_words_in_a_picture_are_whole_and_apart(page: Page, index: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for path in (index, model_page(index)):
        page.goto(path.as_uri())
        assert (
            page.evaluate("""() => {
          const found = [];
          for (const chart of document.querySelectorAll("svg.chart")) {
            const box = chart.getBoundingClientRect();
            const texts = [...chart.querySelectorAll("text")]
              .map((each) => [each.textContent, each.getBoundingClientRect()]);
            for (const [text, own] of texts) {
              if (own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1) found.push(text);
              for (const [other, its] of texts)
                if (text < other && own.left < its.right && its.left < own.right && own.top + 2 < its.bottom - 2
                    && its.top + 2 < own.bottom - 2) found.push(`${text} and ${other}`);
            }
          }
          return found;
        }""")
            == []
        )


CONTRASTS = """
() => {
  const luminance = (colour) => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" && element.parentElement ? behind(element.parentElement) : colour;
  };
  const found = [];
  for (const element of document.querySelectorAll("main :not(svg *, script), header *")) {
    const written = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!written || !element.checkVisibility()) continue;
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push(`${element.tagName}.${element.className} ${contrast.toFixed(2)}`);
  }
  return found;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_what_is_behind_it(page: Page, index: Path, scheme: Any) -> None:
    """WCAG 2.1's contrast of 4.5, of all text."""
    page.emulate_media(color_scheme=scheme)
    for path in (index, model_page(index)):
        page.goto(path.as_uri())
        assert page.evaluate(CONTRASTS) == []


def test_it_prints_whole(page: Page) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 1000, "height": 700})  # A4 on its side, less the margins
    assert not page.locator(".filter").is_visible()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    widest = page.evaluate("Math.max(...[...document.querySelectorAll('table')].map((each) => each.scrollWidth))")
    assert widest <= 1000


# Untrusted text


def of(text: str, number: int) -> Entry:
    """An entry with a text wherever one can be."""
    entry = made_up_board.entry(f"Doe2021Made_{number}")
    words = ("name", "authors", "venue", "architecture", "dataset_note", "method", "setting", "hardware", "command",
             "footnote", "submitted", "evaluated_on")  # fmt: skip
    checks = tuple(check.model_copy(update={"name": text, "sentence": text}) for check in entry.checks)
    fields = {**dict.fromkeys(words, text), "classes": (text,), "versions": {text: text}, "checks": checks,
              "evaluated_with": {text: text}, "link": f"javascript:window.hacked=1//{text}"}  # fmt: skip
    return entry.model_copy(update=fields)


def test_untrusted_text_is_only_text(page: Page, tmp_path: Path) -> None:
    entries = [of(text, number) for number, text in enumerate(UNTRUSTED.values())]
    index = write_pages(tmp_path, entries)
    pages = [(index, list(UNTRUSTED.values()))]
    pages += [(tmp_path / "models" / f"{entry.key}.html", [entry.footnote or ""]) for entry in entries]
    for path, texts in pages:
        page.goto(path.as_uri())
        for text in texts:
            assert text in page.locator("body").inner_text()
        links = page.locator("a").evaluate_all(
            "links => links.map(each => new URL(each.getAttribute('href'), location).protocol)"
        )
        assert set(links) <= {"file:", "https:"}
        page.wait_for_timeout(30)
        assert page.evaluate("window.hacked === undefined && frames.length === 0")


def test_the_policy_stops_what_would_get_through(browser: Browser, tmp_path: Path, index: Path) -> None:
    """Markup put into a page behind its escaping does not run either."""
    inside = "".join(f'<p title="{text}">{text}</p>' for text in UNTRUSTED.values())
    (tmp_path / "index.html").write_text(index.read_text().replace("<main>", f"<main>{inside}", 1))
    page = browser.new_page()
    refusals: list[str] = []
    page.on("console", lambda message: refusals.append(message.text))
    page.goto((tmp_path / "index.html").as_uri())
    page.wait_for_timeout(50)
    assert page.evaluate("window.hacked") is None
    assert names(table(page)) == RANKED
    assert sum("Content Security Policy" in text for text in refusals) >= len(UNTRUSTED)
    page.close()
