"""The live page in a real browser, against a server under load."""
import json
import re
import shutil

import pytest
from playwright.sync_api import sync_playwright

import stack

SCREENSHOTS = stack.OUT


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


def wait_for_percentage(page, selector):
    # Not wait_for_function, which the page's content security policy rightly refuses.
    stack.wait_for(selector, lambda: "%" in page.text_content(selector), 180)


def open_page(browser, server, scheme="light"):
    """The page, once it shows data; fails at its end when it asked anyone else or wrote an error."""
    page = browser.new_page(viewport={"width": 1360, "height": 900}, color_scheme=scheme,
                            reduced_motion="reduce")
    page.complaints = []
    page.on("request", lambda request: request.url.startswith(f"http://{server.metrics}/")
            or page.complaints.append(request.url))
    page.on("console", lambda message: message.type in ("error", "warning") and page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(f"http://{server.metrics}/")
    wait_for_percentage(page, "#saved-value")
    return page


def live(server):
    return json.loads(stack.get(server.metrics, "/api/live"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_panel_shows_data_and_nothing_is_asked_elsewhere(browser, server, load, scheme):
    stack.wait_for("some history", lambda: len(live(server)["history"]["sessions"]) > 15, 180)
    page = open_page(browser, server, scheme)
    wait_for_percentage(page, "#audited-value")
    assert page.text_content("#state") == "serving"
    for tile in page.query_selector_all(".tile"):
        assert re.search(r"\d", tile.query_selector("b").text_content()), tile.text_content()
    for chart in page.query_selector_all("figure > svg"):
        assert "L" in chart.query_selector("path.line").get_attribute("d"), chart.get_attribute("id")
    for bars in page.query_selector_all("table.bars"):
        assert len(bars.query_selector_all("tr")) >= 3, bars.get_attribute("id")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"live-{scheme}.png", full_page=True)
    assert page.complaints == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_lines_differ_by_more_than_colour(browser, server, load, scheme):
    page = open_page(browser, server, scheme)
    ratios = page.evaluate("""() => {
      const probe = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      const light = (color) => {
        probe.fillStyle = color; probe.fillRect(0, 0, 1, 1);
        const part = [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255)
          .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
      };
      const style = getComputedStyle(document.documentElement);
      const of = (name) => light(style.getPropertyValue(name));
      const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const text = ["--text", "--dim", "--good", "--bad"].flatMap((name) =>
        ["--card", "--page"].map((ground) => [name + " on " + ground, ratio(of(name), of(ground)), 4.5]));
      const lines = ["--main", "--second", "--third"].map((name) => [name, ratio(of(name), of("--card")), 3]);
      return [...text, ...lines];
    }""")
    assert [r for r in ratios if r[1] < r[2]] == []
    dashes = page.evaluate("""() => [...document.querySelectorAll('#error-history-chart path.line')]
      .map((line) => getComputedStyle(line).strokeDasharray)""")
    assert len(dashes) == 3 and len(set(dashes)) == 3
    page.close()


def test_the_keyboard_reaches_everything(browser, server, load):
    stack.wait_for("some history", lambda: len(live(server)["history"]["sessions"]) > 5, 180)
    page = open_page(browser, server)
    reached = []
    while len(reached) < 30 and "skip" not in reached[1:]:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className || "
                                     "document.activeElement.name || document.activeElement.textContent"))
        if reached[-1] == "range":
            page.keyboard.press("ArrowRight")
            assert page.evaluate("document.querySelector('input[name=range]:checked').value") == "since_start"
        if reached[-1] == "latency-history-chart":
            page.keyboard.press("ArrowLeft")
            page.keyboard.press("ArrowLeft")
            assert re.search(r"ago: .*(s|–)", page.text_content("#latency-history-readout"))
        if reached[-1] == "pause":
            page.keyboard.press("Enter")
            assert page.get_attribute("#pause", "aria-pressed") == "true"
            page.keyboard.press("Enter")
    for name in ("skip", "range", "pause", "saved-history-chart", "error-history-chart", "latency-history-chart",
                 "tokens-history-chart"):
        assert name in reached, f"{name} not among {reached}"
    page.close()


@pytest.mark.after_load
def test_the_numbers_are_those_of_metrics(browser, server, load):
    """After the load, when nothing moves: the page, /api/live and /metrics say the same."""
    load.finish()
    stack.wait_for("sessions closed", lambda: live(server)["cache"]["sessions"] == 0, 10)
    page = open_page_when_idle(browser, server)
    metrics = stack.samples(stack.get(server.metrics, "/metrics"))
    totals = live(server)["totals"]
    read = sum(v for k, v in metrics.items() if k.startswith("adaattn_kv_bytes_read_total"))
    bf16 = metrics['adaattn_kv_bytes_baseline_total{format="bf16"}']
    assert sum(totals["bytes_read"].values()) == read and totals["bytes_bf16"] == bf16
    counts = page.evaluate("""() => Object.fromEntries([...document.querySelectorAll('#counts tr')]
      .map((row) => [row.children[0].textContent, row.children[1].textContent]))""")
    assert counts["Saved since start"] == f"{100 * (1 - read / bf16):.1f} %"
    assert counts["Sessions"] == f"{metrics['adaattn_sessions']:.0f}"
    assert float(counts["Tasks waiting"]) == metrics["adaattn_queue_depth"] == 0
    for bits in ("4", "6", "8"):
        assert totals["key_pages"][bits] == metrics[f'adaattn_pages_read_total{{bits="{bits}",tensor="key"}}']
    assert totals["value_pages"]["0"] == metrics["adaattn_pages_skipped_total"]
    page.close()


def open_page_when_idle(browser, server):
    page = browser.new_page()
    page.goto(f"http://{server.metrics}/")
    page.wait_for_selector("#counts tr")
    return page
