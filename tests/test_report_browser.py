"""The report as a reader meets it: in a browser, from the disk, every control used."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from report_example import example_report, importance, stay_page
from test_report import HOSTILE, hostile_report

from trajlm.interpret.agreement import disagreement
from trajlm.report.page import write_report


def until(page, expression):
    """Wait for an expression to hold. Playwright's own way is eval, which our pages' policy forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"never held: {expression}")


class Watched:
    """A page, with everything it complained about and asked for."""

    def __init__(self, browser, path, width=1280, at="#stay-1001"):
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(120_000)  # a loaded machine is slow, not wrong
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("popup", lambda popup: self.complaints.append("popup"))
        self.url = path.as_uri()
        self.page.goto(self.url + at)
        if at.startswith("#stay-"):
            self.page.wait_for_selector("#belief-plot .main-svg")

    def belief(self):
        return self.page.evaluate(
            "document.getElementById('belief-plot').data.map(t => [t.name, Array.from(t.x), Array.from(t.y)])"
        )

    def heatmap(self, plot="attention-plot"):
        return self.page.evaluate(f"document.getElementById('{plot}').data[0].z.map(r => Array.from(r))")

    def text(self, selector):
        return " ".join(self.page.inner_text(selector).split())

    def highlighted(self):
        """The highlights' shapes; None where there is none."""
        return self.page.evaluate("document.querySelector('#belief .marks').innerHTML") or None

    def event(self):
        return self.text("#event [data-part=place]")

    def check(self):
        assert self.complaints == []
        pages = [url for url in self.requests if not url.startswith(("data:", "blob:"))]
        assert {url.split("#")[0] for url in pages} == {self.url}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    stays = [stay_page(1001, 24), stay_page(1002, 60, died=True), stay_page(1003, 260, ablated=False)]
    return write_report(example_report(stays), tmp_path_factory.mktemp("report"), figures=())


@pytest.fixture
def opened(browser, written):
    watched = Watched(browser, written)
    yield watched
    watched.check()
    watched.page.close()


def test_the_cohort_comes_first_and_leads_to_each_stay(browser, written):
    watched = Watched(browser, written, at="")
    page = watched.page
    metrics = example_report([]).metrics.filter(
        (pl.col("landmark") == "end of window") & (pl.col("metric") == "AUROC") & (pl.col("arm") == "sequence model")
    )
    assert page.is_visible("#glance")
    assert page.is_hidden("#stay")
    assert watched.text(".cards li:first-child strong") == f"{metrics['value'][0]:.3f}"
    for link in ("#performance", "#calibration", "#presence", "#ablation", "#anchoring", "#pretraining", "#accounting"):
        page.click(f"nav a[href='{link}']")
        assert 0 <= page.evaluate(f"document.querySelector('{link}').getBoundingClientRect().top") < 900
    page.click("nav a[href='#stays']")
    page.click(".lines a[href='#stay-1002']")
    page.wait_for_selector("#belief-plot .main-svg")
    assert page.is_hidden("#cohort")
    assert "Stay 1002" in watched.text("#stay-state")
    page.click(".back a")
    assert page.is_visible("#stays")
    assert page.is_hidden("#stay")
    page.go_back()
    assert page.is_visible("#belief-plot")
    watched.check()
    page.close()


def test_numbers_of_events_minutes_apart_do_not_cover_each_other(browser, tmp_path):
    stay = stay_page(1004, 30)
    hours = [0.0, *(0.05 * i for i in range(1, 15)), *(47 + 0.05 * i for i in range(15))]
    crowded = stay.trajectory.with_columns(hours_since_admission=pl.Series(hours))
    page = write_report(example_report([replace(stay, trajectory=crowded)]), tmp_path, figures=())
    watched = Watched(browser, page, at="#stay-1004")
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


def test_every_summary_figure_is_drawn(browser, written):
    watched = Watched(browser, written, at="")
    plots = watched.page.query_selector_all("[data-figure]")
    assert len(plots) == 10
    for plot in plots:
        plot.scroll_into_view_if_needed()
        plot.wait_for_selector(".cartesianlayer .trace path", state="attached")
    watched.check()
    watched.page.close()


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
    until(opened.page, "document.getElementById('stay-state').textContent.includes('1002')")
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
    assert opened.page.url.endswith("#stay-1001")
    until(opened.page, "document.getElementById('stay-state').textContent.includes('1001')")
    assert opened.belief() == first
    opened.page.select_option("#stay-select", "1")
    opened.page.click("#stay-previous")
    until(opened.page, "document.getElementById('stay-state').textContent.includes('1001')")


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
    # It is what the page opens on.
    assert opened.event() == f"EVENT {largest['event_index'] + 1} OF 24"
    assert cells[5] == f"{100 * largest['belief_mortality']:.1f}%"
    assert len(opened.page.query_selector_all("#movers tbody tr")) == 5


def test_rows_can_be_narrowed_to_read_outs_and_zoom_brings_labels(opened):
    assert len(opened.heatmap()) == 48
    opened.page.select_option("#rows-select", "predict")
    assert len(opened.heatmap()) == 24
    labels = "document.getElementById('attention-plot').layout.yaxis.ticktext"
    assert all(label.startswith("PREDICT") for label in opened.page.evaluate(labels))
    opened.page.select_option("#stay-select", "1")
    until(opened.page, "document.getElementById('stay-state').textContent.includes('1002')")
    opened.page.evaluate("Plotly.relayout('attention-plot', {'xaxis.range': [-0.5, 5.5], 'yaxis.range': [5.5, -0.5]})")
    until(opened.page, "document.getElementById('attention-plot').layout.xaxis.ticktext.length === 6")
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
    until(opened.page, "document.getElementById('stay-state').textContent.includes('1003')")
    assert "520 positions; they are drawn as" in opened.text("#attention-pooled")
    assert len(opened.heatmap()) <= 400
    opened.page.select_option("#stay-select", "0")
    until(opened.page, "document.getElementById('attention-pooled').textContent === ''")


def test_no_button_sends_data_anywhere(opened):
    titles = {b.get_attribute("data-title") for b in opened.page.query_selector_all(".modebar-btn")}
    assert titles == {"Download plot", "Zoom", "Pan", "Reset axes"}
    with opened.page.expect_download() as download:
        opened.page.evaluate("document.querySelector('#belief-plot [data-title^=Download]').dispatchEvent("
                             "new MouseEvent('click', {bubbles: true}))")  # fmt: skip
    assert download.value.suggested_filename == "stay_1001_mortality.svg"


@pytest.mark.parametrize("at", ["", "#stay-1001"])
def test_narrow_screens_do_not_scroll_sideways(browser, written, at):
    watched = Watched(browser, written, width=360, at=at)
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 360
    watched.check()
    watched.page.close()


@pytest.mark.parametrize("at", ["", "#stay-1001"])
def test_figures_fit_the_paper(browser, written, at):
    watched = Watched(browser, written, at=at)
    page = watched.page
    page.pdf(format="A4")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert not page.query_selector("canvas")  # printed, it would erase what lies below
    widths = page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].map(p => p._fullLayout.width)")
    assert len(widths) == (10 if at == "" else 2)
    assert max(widths) <= 660
    assert page.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert not page.evaluate("[...document.querySelectorAll('details')].some(d => d.open)")
    watched.check()
    page.close()


def test_arrow_keys_go_from_event_to_event(opened):
    page, modality = opened.page, stay_page(1001, 24).trajectory["modality"].to_list()
    page.focus("#belief")
    for key, place in (
        ("Home", 1),
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowLeft", 2),
        ("End", 24),
        ("ArrowRight", 24),
    ):
        page.keyboard.press(key)
        assert opened.event() == f"EVENT {place} OF 24"
    heard = opened.text("#event-said")
    assert heard.startswith("Event 24 of 24, ")
    assert "In-hospital mortality: " in heard
    before = modality[23]
    page.keyboard.press("ArrowUp")
    after = modality[int(opened.event().split()[1]) - 1]
    lanes = sorted(set(modality))
    assert lanes.index(after) == max(0, lanes.index(before) - 1)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_an_event_shows_its_values_and_its_attention_in_and_out(opened):
    stay = stay_page(1001, 24)
    weights = stay.attention.weights.astype(float)
    labs = [i for i, m in enumerate(stay.trajectory["modality"]) if m == "labs"]
    chosen = labs[1]
    opened.page.focus("#belief")
    opened.page.keyboard.press("Home")
    for _ in range(chosen):
        opened.page.keyboard.press("ArrowRight")
    value = {row[0]: row[2] for row in stay.values.filter(pl.col("feature") == "lactate").rows()}
    shown = opened.text("#event [data-part=values] tbody tr")
    hour = stay.trajectory["hours_since_admission"][labs[0]]
    assert shown == f"lactate {value[chosen]:.5g} mmol/L {value[labs[0]]:.5g} at {hour:.1f} h"
    # Out: the read-out after it, over events. In: later read-outs, over it.
    out = sorted(((weights[2 * chosen + 1, 2 * k], k) for k in range(chosen + 1)), reverse=True)[:6]
    into = sorted(((weights[2 * s + 1, 2 * chosen], s) for s in range(chosen + 1, 24)), reverse=True)[:6]
    for part, expected in (("past", out), ("later", into)):
        items = opened.page.query_selector_all(f"#event [data-part={part}] li")
        assert len(items) == len(expected)
        for item, (share, event) in zip(items, expected, strict=True):
            what, percent = item.inner_text().split("\n")[0], item.inner_text().split("\n")[-1]
            row = stay.trajectory.row(event, named=True)
            assert what.strip() == f"{row['modality'].replace('_', ' ')} {row['hours_since_admission']:.1f} h"
            assert float(percent.strip("%< ")) == pytest.approx(100 * share, abs=0.6)
    painted = opened.highlighted()
    assert painted is not None
    target = int(out[0][1] if out[0][1] != chosen else out[1][1])
    opened.page.click(f"#event [data-part=past] li:nth-child({1 if out[0][1] != chosen else 2}) button")
    assert opened.event() == f"EVENT {target + 1} OF 24"
    assert opened.highlighted() != painted


def test_pointing_shows_an_event_and_leaving_returns_to_the_chosen_one(opened):
    opened.page.focus("#belief")
    opened.page.keyboard.press("Home")
    trajectory = stay_page(1001, 24).trajectory
    hours, modality = trajectory["hours_since_admission"], trajectory["modality"].to_list()
    lane = sorted(set(modality)).index(modality[12])
    at = opened.page.evaluate(
        "(() => { const p = document.getElementById('belief-plot'), f = p._fullLayout, b = p.getBoundingClientRect();"
        f"return [b.left + f.xaxis._offset + f.xaxis.l2p({hours[12]}),"
        f" b.top + f.yaxis2._offset + f.yaxis2.l2p({lane})]; }})()"
    )
    opened.page.mouse.move(*at)
    until(opened.page, "document.querySelector('#event [data-part=place]').textContent === 'Event 13 of 24'")
    opened.page.mouse.move(5, 5)
    until(opened.page, "document.querySelector('#event [data-part=place]').textContent === 'Event 1 of 24'")
    opened.page.mouse.move(*at)
    opened.page.mouse.click(*at)
    opened.page.mouse.move(5, 5)
    until(opened.page, "document.querySelector('#event [data-part=place]').textContent === 'Event 13 of 24'")


def test_ablated_attention_is_that_of_the_ablated_stay(opened):
    stay = stay_page(1001, 24)
    opened.page.focus("#belief")
    opened.page.keyboard.press("End")
    opened.page.click("[data-ablation=vitals]")
    left = stay.ablations["vitals"]
    last = int(left.trajectory["event_index"][-1])
    opened.page.focus("#belief")
    for _ in range(23 - last):
        opened.page.keyboard.press("ArrowLeft")
    row = left.attention.weights[-1].astype(float)[0::2]
    best = left.trajectory.row(int(row.argmax()), named=True)
    shown = opened.page.query_selector("#event [data-part=past] li").inner_text()
    assert f"{best['hours_since_admission']:.1f} h" in shown
    assert float(shown.split("\n")[-1].strip("%< ")) == pytest.approx(100 * row.max(), abs=0.6)


def test_two_runs_stand_side_by_side(browser, tmp_path):
    stay = stay_page(1001, 24, against=True)
    other = example_report([])
    audits = {"audit_against": other.audit, "audit_difference": other.audit}
    report = example_report([stay], against="scratch", anchoring_against=other.anchoring, **audits)
    watched = Watched(browser, write_report(report, tmp_path, figures=()))
    page = watched.page
    curves = {name: beliefs for name, _, beliefs in watched.belief()}
    other = [100 * b for b in stay.against.trajectory["belief_mortality"]]
    assert curves["scratch"] == pytest.approx(other, abs=1e-3)
    assert page.is_visible("#attention-against-plot")
    assert watched.heatmap("attention-against-plot") != watched.heatmap()
    page.click("[data-ablation=labs]")
    assert {"without labs", "without labs, scratch"} <= {name for name, _, _ in watched.belief()}
    page.click("#against")
    assert page.get_attribute("#against", "aria-pressed") == "false"
    assert "scratch" not in {name for name, _, _ in watched.belief()}
    assert page.is_hidden("#attention-against-plot")
    # Alone it has all the room, and one scale.
    parts = "document.querySelectorAll('#attention-plot, #attention-plot .main-svg')"
    widths = f"[...{parts}].map(part => part.getBoundingClientRect().width)"
    assert len(set(page.evaluate(widths))) == 1
    titles = "document.getElementById('attention-plot').textContent.split('share of the row').length - 1"
    assert page.evaluate(titles) == 1
    page.click("#against")
    assert len(set(page.evaluate(widths))) == 1
    assert page.evaluate(titles) == 1
    page.click("#against")
    page.click("nav a[href='#anchoring']")
    assert "The same of scratch" in watched.text("#anchoring")
    assert "This run minus scratch" in watched.text("#anchoring")
    watched.check()
    page.close()


def test_what_interventions_find_stands_beside_attention(browser, tmp_path):
    stay = stay_page(1001, 24)
    # Effects far below a point, as cutting off has: its axis tells a scale all the same.
    found = importance(stay.attention, np.random.default_rng(0)).with_columns(pl.col("knock_out") * 1e-4)
    page = write_report(example_report([replace(stay, importance={"mortality": found})]), tmp_path, figures=())
    watched = Watched(browser, page)
    said = disagreement(found)
    assert f"{'disagree' if said['disagree'] else 'agree'} on this stay" in watched.text("#importance")
    assert f"{said['removal']:.2f}".replace("-", "−") in watched.text("#importance [data-part=agreement]")
    first = found.sort(pl.col("removal").abs(), descending=True).row(0, named=True)
    cells = [cell.inner_text() for cell in watched.page.query_selector_all("#importance tbody tr:first-child td")]
    assert cells[0] == f"{first['hours_since_admission']:.1f} h"
    # Taking an event away lowers the belief by what it adds.
    for cell, name, sign in zip(cells[2:], ("removal", "knock_out", "attribution"), (-1, -1, 1), strict=True):
        points = 100 * sign * first[name]
        assert float(cell.removesuffix(" points").replace("−", "-")) == pytest.approx(points, abs=0.051)
    drawn = watched.page.evaluate("document.querySelector('#importance .plot').data.filter(t => t.mode === 'markers')"
                                  ".map(t => Array.from(t.y))")  # fmt: skip
    assert drawn[0] == pytest.approx([100 * v for v in found["attention"]], abs=1e-3)
    assert drawn[1] == pytest.approx([-100 * v for v in found["removal"]], abs=1e-3)
    for row in range(4):
        ticks = watched.page.query_selector_all(f"#importance .y{row + 1 if row else ''}tick text")
        told = [float(tick.text_content().replace("−", "-").removesuffix("%")) for tick in ticks]
        assert len(told) in (2, 3, 4, 5)
        assert 0.4 < max(map(abs, told)) / max(map(abs, drawn[row])) <= 1
    watched.page.click("#importance tbody tr:first-child button")
    assert watched.event() == f"EVENT {first['event_index'] + 1} OF 24"
    assert cells[2] in watched.text("#event [data-part=effects]")
    watched.page.select_option("#target-select", "length_of_stay")
    assert watched.page.is_hidden("#importance")
    assert watched.page.is_hidden("#event [data-part=effects]")
    watched.check()
    watched.page.close()


def test_a_backbone_without_attention_still_has_its_page(browser, tmp_path):
    stay = stay_page(1001, 12)
    ablated = {name: replace(one, attention=None) for name, one in stay.ablations.items()}
    page = write_report(example_report([replace(stay, attention=None, ablations=ablated)]), tmp_path, figures=())
    watched = Watched(browser, page)
    assert "no attention to show" in watched.text("#attention-none")
    assert watched.page.is_hidden("#attention-plot")
    assert watched.page.is_hidden("#rows-select")
    assert "arcs" not in watched.text("#stay figcaption")
    watched.page.click("[data-ablation=labs]")
    assert watched.page.is_hidden("#event [data-part=attention]")
    watched.check()
    watched.page.close()


CONTRAST = """() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c[3] > 0.99) return c;
    }
    return [255, 255, 255, 1];
  };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    if (!e.checkVisibility() || e.closest("svg, noscript, :disabled")) continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push([e.tagName, e.className, (a + 0.05) / (b + 0.05)]);
  }
  return low;
}"""


@pytest.mark.parametrize("at", ["", "#stay-1001"])
def test_all_text_can_be_told_from_its_ground(browser, written, at):
    watched = Watched(browser, written, at=at)
    assert watched.page.evaluate(CONTRAST) == []
    watched.page.add_style_tag(content="p { color: #999; }")
    assert watched.page.evaluate(CONTRAST) != []
    watched.page.close()


def test_every_control_has_a_name_and_a_place_in_the_tab_order(opened):
    unnamed = opened.page.evaluate(
        "[...document.querySelectorAll('button, select, a, [tabindex]')]"
        ".filter(e => e.checkVisibility() && !e.closest('.js-plotly-plot'))"
        ".filter(e => !(e.textContent.trim() || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')"
        " || (e.labels && e.labels.length))).map(e => e.outerHTML)"
    )
    assert unnamed == []
    seen = set()
    for _ in range(60):
        opened.page.keyboard.press("Tab")
        seen.add(opened.page.evaluate("document.activeElement.id || document.activeElement.dataset.ablation"))
    assert {"stay-select", "stay-next", "target-select", "labs", "vitals", "belief", "rows-select"} <= seen


def test_hostile_text_is_shown_and_never_run(browser, tmp_path):
    watched = Watched(browser, write_report(hostile_report(), tmp_path, figures=()), at="#stay-7")
    page = watched.page
    assert page.text_content("h1 a") == HOSTILE
    page.click("[data-ablation]")
    assert HOSTILE[:100] in page.text_content("#movers tbody")
    page.focus("#belief")
    page.keyboard.press("End")  # an event without measurements: its note stands in the panel
    while page.is_hidden("#event [data-part=summary]"):
        page.keyboard.press("ArrowLeft")
    assert page.text_content("#event [data-part=summary]") == HOSTILE
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
