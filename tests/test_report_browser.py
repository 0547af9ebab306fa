"""The report as a reader meets it: in a browser, from the disk, every control used."""

import shutil
from dataclasses import replace

import polars as pl
import pytest
from report_example import example_report, stay_page
from test_report import HOSTILE, hostile_report

from trajlm.report.page import write_report

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=program, headless=True, args=list(FLAGS))
        yield opened
        opened.close()


class Watched:
    """A page, with everything it complained about and asked for."""

    def __init__(self, browser, path, width=1280):
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("popup", lambda popup: self.complaints.append("popup"))
        self.url = path.as_uri()
        self.page.goto(self.url)
        self.page.wait_for_selector("#attention-plot .main-svg")

    def belief(self):
        return self.page.evaluate(
            "document.getElementById('belief-plot').data.map(t => [t.name, Array.from(t.x), Array.from(t.y)])"
        )

    def heatmap(self):
        return self.page.evaluate("document.getElementById('attention-plot').data[0].z.map(r => Array.from(r))")

    def text(self, selector):
        return self.page.text_content(selector)

    def check(self):
        assert self.complaints == []
        assert [url for url in self.requests if url != self.url and not url.startswith(("data:", "blob:"))] == []


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    stays = [stay_page(1001, 24), stay_page(1002, 60, died=True), stay_page(1003, 260)]
    return write_report(example_report(stays), tmp_path_factory.mktemp("report"))


@pytest.fixture
def opened(browser, written):
    watched = Watched(browser, written)
    yield watched
    watched.check()
    watched.page.close()


def test_the_first_stay_is_drawn_when_the_page_opens_on_it(browser, written):
    page = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page.goto(written.as_uri() + "#stays")
    page.wait_for_selector("#belief-plot .cartesianlayer .trace path")
    page.wait_for_selector("#attention-plot .main-svg")
    assert "Stay 1001" in page.text_content("#stay-state")
    # Figures above were drawn before the browser scrolled: the section did not slip away under them.
    assert abs(page.evaluate("document.getElementById('stays').getBoundingClientRect().top")) < 120
    page.close()


def test_numbers_of_events_minutes_apart_do_not_cover_each_other(browser, tmp_path):
    stay = stay_page(1004, 30)
    hours = [0.0, *(0.05 * i for i in range(1, 15)), *(47 + 0.05 * i for i in range(15))]
    crowded = stay.trajectory.with_columns(hours_since_admission=pl.Series(hours))
    watched = Watched(browser, write_report(example_report([replace(stay, trajectory=crowded)]), tmp_path))
    boxes = watched.page.evaluate(
        "Array.from(document.querySelectorAll('#belief-plot .annotation rect.bg'), r => r.getBoundingClientRect())"
        ".map(box => ({left: box.left, right: box.right}))"
    )
    assert len(boxes) == 5
    inside = watched.page.evaluate("document.getElementById('belief-plot').getBoundingClientRect().right")
    for i, a in enumerate(boxes):
        assert a["right"] <= inside
        for b in boxes[i + 1 :]:
            assert a["right"] <= b["left"] + 1 or b["right"] <= a["left"] + 1
    watched.check()
    watched.page.close()


def test_every_summary_figure_is_drawn(opened):
    plots = opened.page.query_selector_all("[data-figure]")
    assert len(plots) == 10
    for plot in plots:
        assert plot.query_selector(".cartesianlayer .trace path"), plot.get_attribute("data-figure")


def test_each_ablation_can_be_switched_on_and_off(opened):
    belief, heatmap = opened.belief(), opened.heatmap()
    buttons = opened.page.query_selector_all("[data-ablation]")
    assert len(buttons) == 2
    for button in buttons:
        name = button.get_attribute("data-ablation")
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert f"without {name}" in [trace[0] for trace in opened.belief()]
        assert opened.heatmap() != heatmap
        assert opened.text("#attention-title") == f"Attention, after ablation of {name}"
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert opened.belief() == belief
        assert opened.heatmap() == heatmap
    for button in buttons:
        button.click()
    assert len(opened.belief()) == len(belief) + 2


def test_a_button_works_from_the_keyboard(opened):
    opened.page.focus("[data-ablation=labs]")
    opened.page.keyboard.press("Space")
    assert "without labs" in [trace[0] for trace in opened.belief()]
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert opened.page.evaluate(outline) == "solid"


def test_stays_and_targets_can_be_chosen(opened):
    first = opened.belief()
    assert opened.page.is_disabled("#stay-previous")
    opened.page.click("#stay-next")
    assert "Stay 1002" in opened.text("#stay-state")
    assert "In-hospital mortality: yes" in opened.text("#stay-state")
    assert opened.belief() != first
    before = opened.belief(), opened.text("#movers tbody")
    opened.page.select_option("#target-select", "length_of_stay")
    assert (opened.belief(), opened.text("#movers tbody")) != before
    assert opened.text("#belief-title") == "Belief over time: Length of stay"
    assert opened.belief()[-1][0] == "what happened: 93.5 h"
    opened.page.select_option("#target-select", "mortality")
    opened.page.select_option("#stay-select", "0")
    assert opened.belief() == first


def test_the_curve_and_its_table_are_the_stays_numbers(opened):
    trajectory = stay_page(1001, 24).trajectory
    name, hours, beliefs = opened.belief()[0]
    assert name == "belief from all events"
    assert hours == pytest.approx(trajectory["hours_since_admission"].to_list())
    assert beliefs == pytest.approx([100 * b for b in trajectory["belief_mortality"]], abs=1e-3)
    largest = trajectory.sort(trajectory["change_mortality"].abs(), descending=True, nulls_last=True).row(0, named=True)
    label = largest["modality"].replace("_", " ")
    cells = [cell.inner_text() for cell in opened.page.query_selector_all("#movers tbody tr:first-child td")]
    assert cells[:4] == ["1", f"{largest['hours_since_admission']:.1f} h", label, largest["summary"]]
    assert cells[5] == f"{100 * largest['belief_mortality']:.1f}%"
    assert len(opened.page.query_selector_all("#movers tbody tr")) == 5


def test_rows_can_be_narrowed_to_read_outs_and_zoom_brings_labels(opened):
    assert len(opened.heatmap()) == 48
    opened.page.select_option("#rows-select", "predict")
    assert len(opened.heatmap()) == 24
    labels = "document.getElementById('attention-plot').layout.yaxis.ticktext"
    assert all(label.startswith("PREDICT") for label in opened.page.evaluate(labels))
    opened.page.select_option("#stay-select", "1")
    opened.page.evaluate("Plotly.relayout('attention-plot', {'xaxis.range': [-0.5, 5.5], 'yaxis.range': [5.5, -0.5]})")
    opened.page.wait_for_function("document.getElementById('attention-plot').layout.xaxis.ticktext.length === 6")
    assert len(opened.page.evaluate(labels)) == 6


def test_pointing_at_attention_says_who_looks_where(opened):
    attention = stay_page(1001, 24).attention
    row = 9
    share = float(attention.weights[row, 0])
    hour = attention.positions["hours_since_admission"][row]
    modality = attention.positions["modality"][row].replace("_", " ")
    text = opened.page.evaluate(f"document.getElementById('attention-plot').data[0].text[{row}][0]")
    assert text.replace("<b>", "").replace("</b>", "").replace("<br>", " ") == (
        f"PREDICT after {modality} at {hour:.1f} h attends to demographics at 0.0 h: {share:.2f}"
    )


def test_a_long_stay_is_pooled_and_says_so(opened):
    opened.page.select_option("#stay-select", "2")
    assert "520 positions; they are drawn as" in opened.text("#attention-pooled")
    assert len(opened.heatmap()) <= 400
    opened.page.select_option("#stay-select", "0")
    assert opened.text("#attention-pooled") == ""


def test_no_button_sends_data_anywhere(opened):
    titles = {b.get_attribute("data-title") for b in opened.page.query_selector_all(".modebar-btn")}
    assert titles == {"Download plot", "Zoom", "Pan", "Reset axes"}
    with opened.page.expect_download() as download:
        opened.page.evaluate("document.querySelector('#belief-plot [data-title^=Download]').dispatchEvent("
                             "new MouseEvent('click', {bubbles: true}))")  # fmt: skip
    assert download.value.suggested_filename == "stay_1001_mortality.svg"


def test_narrow_screens_do_not_scroll_sideways(browser, written):
    watched = Watched(browser, written, width=360)
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 360
    watched.check()
    watched.page.close()


def test_figures_fit_the_paper(opened):
    opened.page.pdf(format="A4")
    opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    widths = opened.page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].map(p => p._fullLayout.width)")
    assert max(widths) <= 660
    assert opened.page.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    opened.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert not opened.page.evaluate("[...document.querySelectorAll('details')].some(d => d.open)")


def test_hostile_text_is_shown_and_never_run(browser, tmp_path):
    watched = Watched(browser, write_report(hostile_report(), tmp_path))
    page = watched.page
    assert page.text_content("h1") == HOSTILE
    page.click("[data-ablation]")
    assert HOSTILE in page.text_content("#movers tbody")
    page.evaluate("Plotly.Fx.hover('belief-plot', [{curveNumber: 2, pointNumber: 0}])")
    shown = page.text_content("#belief-plot .hoverlayer")
    assert "<script>alert(1)</script>" in shown
    assert '<a href="https://example.org/">' in shown
    assert page.query_selector("img") is None
    assert page.query_selector("svg a") is None
    watched.check()
    # Even markup that got in could not run: the page's policy knows our scripts by their hash.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<b onclick=\"window.ran = 1\" id=in>x</b>')")
    page.click("#in")
    assert page.evaluate("window.ran") is None
    page.close()
