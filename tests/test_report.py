import base64
import csv
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs
from report_example import TARGETS, ablation, attention_map, difference, example_report, metrics, stay_page

from trajlm.errors import TrajlmError
from trajlm.report import page as report_page
from trajlm.report.figures import summary_figures
from trajlm.report.missing import ablation_figures, ablation_table
from trajlm.report.page import AttentionMap, StayPage, render, write_report
from trajlm.report.stays import shown_attention, stay_data
from trajlm.report.style import modality_styles
from trajlm.report.tables import metrics_table, movers

HOSTILE = '</script><script>alert(1)</script><img src="x" onerror="alert(2)"><a href="https://example.org/">x</a>'


class Elements(HTMLParser):
    """Every element with its attributes, and the text directly inside it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data):
        if self.found:
            self.found[-1][2].append(data)

    def named(self, tag):
        return [(attrs, "".join(text)) for name, attrs, text in self.found if name == tag]


def hostile_report():
    stay = stay_page(7, 12)
    frame = stay.trajectory.with_columns(
        summary=pl.lit(HOSTILE), modality=pl.col("modality").replace("vitals", "vitals" + HOSTILE)
    )
    hostile = StayPage(7, "held_out", stay.targets, frame, stay.attention, {HOSTILE: stay.ablations["labs"]})
    target = type(TARGETS[0])("mortality", "Mortality " + HOSTILE, "", "probability")
    figures = metrics(np.random.default_rng(0)).with_columns(arm=pl.col("arm") + HOSTILE)
    return example_report(
        [hostile],
        title=HOSTILE,
        subtitle=HOSTILE,
        targets=[target, TARGETS[1]],
        facts=[(HOSTILE, HOSTILE)],
        warnings=[HOSTILE],
        metrics=figures,
        details=[(HOSTILE, HOSTILE)],
        ablation=ablation(np.random.default_rng(0)).with_columns(ablated=pl.col("ablated").replace("labs", HOSTILE)),
        silhouette={HOSTILE: 0.1},
    )


@pytest.fixture(scope="module")
def rendered():
    return render(hostile_report())


def test_nothing_is_fetched_and_plotly_is_inlined_once(rendered):
    for _, attrs, _ in Elements(rendered).found:
        for name in ("src", "href", "action", "data", "poster", "srcset", "background"):
            if attrs.get(name) is not None:
                assert re.match(r"#|data:,", attrs[name]), (name, attrs[name])
        assert not [name for name in attrs if name.startswith("on")]
    styles = "".join(text for _, text in Elements(rendered).named("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    assert rendered.count(get_plotlyjs()[2000:4000]) == 1


def test_the_content_policy_forbids_every_load(rendered):
    policy = next(a["content"] for a, _ in Elements(rendered).named("meta") if a.get("http-equiv"))
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert "unsafe" not in allowed["script-src"]
    assert not re.search(r"https?:|\*", policy)


def test_hostile_text_stays_text(rendered):
    elements = Elements(rendered)
    data = [a for a, _ in elements.named("script") if a.get("type") == "application/json"]
    code = [a for a, _ in elements.named("script") if not a]
    assert len(data) == 2
    assert len(code) == 1 + len(report_page.SCRIPTS)
    assert len(elements.named("script")) == len(data) + len(code)
    assert not elements.named("img")
    assert f'<a href="#glance">{html.escape(HOSTILE, quote=True).replace("&quot;", "&#34;")}</a></h1>' in rendered
    assert elements.named("title")[0][1].strip() == HOSTILE
    assert HOSTILE not in rendered


def test_the_embedded_stay_is_the_stay():
    stay = stay_page(3, 40)
    text = render(example_report([stay]))
    script = next(t for a, t in Elements(text).named("script") if a.get("id") == "stay-0")
    data = json.loads(script)
    assert data["trajectory"]["summary"] == stay.trajectory["summary"].to_list()
    assert np.allclose(data["trajectory"]["belief"]["mortality"], stay.trajectory["belief_mortality"], atol=1e-5)
    assert data["trajectory"]["change"]["mortality"][0] is None
    assert data["targets"]["mortality"] == 0.0
    for map_data, attention in (
        (data["attention"], stay.attention),
        (data["ablations"]["labs"]["attention"], stay.ablations["labs"].attention),
    ):
        packed = np.frombuffer(base64.b64decode(map_data["weights"]), "<u2") / 65535
        whole = np.zeros_like(attention.weights)
        start = 0
        for row, end in enumerate(map_data["ends"]):
            whole[row, :end] = packed[start : start + end]
            start += end
        assert start == len(packed)
        assert np.abs(whole - attention.weights).max() <= 0.5 / 65535 + 1e-7


@settings(max_examples=25, deadline=None)
@given(events=st.integers(1, 90), most=st.integers(24, 60), seed=st.integers(0, 99))
def test_pooling_keeps_what_each_row_gives(events, most, seed):
    rng = np.random.default_rng(seed)
    modality = rng.choice(["labs", "vitals"], events).tolist()
    attention = attention_map(modality, sorted(rng.uniform(0, 48, events).tolist()), rng)
    weights, positions = shown_attention(attention, most)
    assert len(weights) == positions.height <= max(most, 1)
    assert positions["pooled"].sum() == 2 * events
    assert np.allclose(weights.sum(axis=1), 1, atol=1e-4)
    if 2 * events <= most:
        assert np.array_equal(weights, attention.weights)
        return
    assert positions["pooled"][:8].to_list() == [1] * 8
    # The same by plain loops: members are found by walking the groups' sizes, kind by kind, in order.
    kinds = attention.positions["kind"].to_list()
    queues = {k: [i for i in range(8, 2 * events) if kinds[i] == k] for k in ("event", "predict")}
    members = [[i] for i in range(8)]
    for kind, pooled in zip(positions["kind"][8:], positions["pooled"][8:], strict=True):
        members.append([queues[kind].pop(0) for _ in range(pooled)])
    for a in range(0, len(members), 5):
        for b in range(0, len(members), 3):
            total = sum(float(attention.weights[i, j]) for i in members[a] for j in members[b])
            assert weights[a, b] == pytest.approx(total / len(members[a]), abs=1e-5)


def test_a_stay_of_two_thousand_events_stays_small():
    rng = np.random.default_rng(0)
    hours = np.sort(rng.uniform(0, 48, 2000)).tolist()
    attention = attention_map(["vitals"] * 2000, hours, rng)
    weights, positions = shown_attention(attention)
    assert 300 < len(weights) <= 400
    assert positions["kind"].n_unique() == 2
    page = StayPage(1, "train", {}, stay_page(1, 5).trajectory, attention)
    assert len(json.dumps(stay_data(page, TARGETS))) < 900_000


def test_movers_are_the_largest_changes():
    frame = stay_page(11, 60).trajectory
    found = movers(frame, "mortality")
    plain = [(abs(c), i) for i, c in zip(frame["event_index"], frame["change_mortality"], strict=True) if c]
    expected = [i for _, i in sorted(plain, key=lambda pair: (-pair[0], pair[1]))[:5]]
    assert found["event_index"].to_list() == expected
    beliefs = dict(zip(frame["event_index"], frame["belief_mortality"], strict=True))
    assert found["belief_before"].to_list() == pytest.approx([beliefs[i - 1] for i in expected])


def test_metrics_stand_side_by_side_and_gaps_are_dashes():
    frame = pl.DataFrame(
        [
            ("sequence", "mortality", "6 h", "auroc", 0.8125, 0.75, 0.875, 1200, 60),
            ("static", "mortality", "6 h", "auroc", float("nan"), None, None, 1100, 60),
            ("sequence", "mortality", "12 h", "auroc", 0.9, 0.8, 0.95, 900, 40),
        ],
        schema=["arm", "target", "landmark", "metric", "value", "low", "high", "stays", "positives"],
        orient="row",
    )
    table = metrics_table(frame, TARGETS[0])
    assert table.columns == ["Seen up to", "stays", "positives", "sequence", "static"]
    assert table.blocks[0].title == "AUROC"
    assert table.blocks[0].rows == [
        ["6 h", "1,200 / 1,100", "60", "0.812 [0.750, 0.875]", "–"],
        ["12 h", "900", "40", "0.900 [0.800, 0.950]", "–"],
    ]
    assert metrics_table(frame, TARGETS[1]) is None


def test_main_metrics_stand_first_and_the_paired_difference_under_them():
    rows = [
        (arm, "length_of_stay", "6 h", metric, 1.0, None, None, 9, None)
        for metric in ("mse", "pearson", "spearman", "mae")
        for arm in ("sequence", "static")
    ]
    names = ["arm", "target", "landmark", "metric", "value", "low", "high", "stays", "positives"]
    table = metrics_table(pl.DataFrame(rows, schema=names, orient="row"), TARGETS[1], difference())
    assert [block.title for block in table.blocks] == ["MAE", "Spearman rho"]
    assert [block.title for block in table.folded] == ["MSE", "Pearson r"]
    assert "same stays. static MLP (late fusion): MAE −1.700, MSE −310.0 [−620.0, +12.0]." in table.note
    assert metrics_table(example_report().metrics, TARGETS[0], difference().head(0)).note == ""
    shown = render(example_report([]))
    assert "AUROC +0.021 [+0.004, +0.037], AUPRC −0.012 [−0.050, +0.030]; trees: AUROC −0.010 [−0.020, +0.010]" in shown


def test_ablations_are_compared_with_nothing_ablated():
    report = example_report()
    for target, main in ((TARGETS[0], ("auroc", "auprc")), (TARGETS[1], ("mae", "spearman"))):
        rows = {
            (r["ablated"], r["metric"]): r
            for r in report.ablation.filter(pl.col("target") == target.name).iter_rows(named=True)
        }
        table = ablation_table(report, target)
        assert [row[0] for row in table.blocks[0].rows] == [
            "nothing (all events)", "demographics", "vitals", "labs", "radiology notes", "chest xray",
        ]  # fmt: skip
        assert all(len(row) == len(table.columns) for row in table.blocks[0].rows)
        for row, name in zip(
            table.blocks[0].rows[1:], report.ablation["ablated"].unique(maintain_order=True)[1:], strict=True
        ):
            for cell, metric in zip(row[-3::2], main, strict=True):
                told = [
                    float(part) for part in cell.replace("−", "-").replace("[", "").strip("]").replace(",", "").split()
                ]
                parts = [rows[name, metric][f"difference{end}"] for end in ("", "_low", "_high")]
                assert told == pytest.approx(parts, abs=0.0006)
                assert cell[0] in "+−"
        assert table.blocks[0].rows[1][1] == "360"
    assert ablation_table(example_report([], ablation=None), TARGETS[0]) is None
    assert ablation_figures(example_report([], ablation=None)) == []


@pytest.mark.parametrize(("at", "metric", "worst"), [(0, "auroc", min), (1, "mae", max)])
def test_the_ablation_figure_shows_the_costliest_loss_first(at, metric, worst):
    report = example_report()
    own = report.ablation.filter((pl.col("target") == TARGETS[at].name) & (pl.col("metric") == metric))
    figure = ablation_figures(report)[at]
    values = [trace["x"][0] for trace in figure.spec["data"]]
    own = own.filter(pl.col("ablated") != "nothing")
    assert figure.spec["layout"]["shapes"][0]["x0"] == figure.spec["layout"]["shapes"][0]["x1"] == 0
    assert values[0] == worst(values)
    assert sorted(values) == sorted(own["difference"])
    for trace in figure.spec["data"]:
        row = own.filter(pl.col("difference") == trace["x"][0]).row(0, named=True)
        assert trace["x"][0] + trace["error_x"]["array"][0] == pytest.approx(row["difference_high"])
        assert trace["x"][0] - trace["error_x"]["arrayminus"][0] == pytest.approx(row["difference_low"])


def test_an_ablation_without_its_reference_is_refused():
    frame = example_report().ablation
    gone = (pl.col("ablated") == "nothing") & (pl.col("metric") == "mae")
    with pytest.raises(TrajlmError, match="mae of length_of_stay"):
        example_report([], ablation=frame.filter(~gone))


def test_an_arm_alone_at_a_landmark_stands_in_its_middle():
    figure = next(f for f in summary_figures(example_report())["performance"] if f.key == "landmarks_mortality")
    alone, beside = ({round(x, 3) for x in trace["x"]} for trace in figure.spec["data"])
    assert {0.0, 1.0, 2.0, 3.0} < alone
    assert max(alone) < 4 < min(beside)


def test_details_are_folded_away_from_the_facts():
    rendered = render(example_report([]))
    facts = rendered.split('<dl class="facts">')[1].split("</dl>")[0]
    assert "transformers" not in facts
    assert "transformers" in rendered.split('<details class="more">')[1].split("</details>")[0]


def test_interval_bars_end_at_the_interval():
    report = example_report()
    figure = next(f for f in summary_figures(report)["performance"] if f.key == "landmarks_mortality")
    own = report.metrics.filter((pl.col("metric") == "AUROC") & (pl.col("target") == "mortality"))
    for trace in figure.spec["data"]:
        rows = own.filter(pl.col("arm") == trace["name"])
        top = [y + e for y, e in zip(trace["y"], trace["error_y"]["array"], strict=True)]
        bottom = [y - e for y, e in zip(trace["y"], trace["error_y"]["arrayminus"], strict=True)]
        assert top == pytest.approx(rows["high"].to_list())
        assert bottom == pytest.approx(rows["low"].to_list())


def test_modalities_never_share_both_colour_and_shape():
    styles = modality_styles([f"m{i}" for i in range(40)])
    assert len({(s["color"], s["symbol"]) for s in styles.values()}) == 40


def test_every_table_is_written_whole(tmp_path):
    report = example_report()
    assert write_report(report, tmp_path, figures=()) == tmp_path / "index.html"
    assert {p.stem for p in (tmp_path / "tables").iterdir()} == {
        "metrics", "calibration", "presence", "retrieval", "silhouette", "training", "stages", "accounting",
        "anchoring", "difference", "ablation", "trajectories", "moved_most", "audit",
    }  # fmt: skip
    back = pl.read_csv(tmp_path / "tables/metrics.csv")
    assert back.rows() == report.metrics.rows()
    with open(tmp_path / "tables/trajectories.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    runs = [run for s in report.stays for run in (s.trajectory, *(a.trajectory for a in s.ablations.values()))]
    assert len(rows) == sum(run.height for run in runs)
    assert [float(r["belief_mortality"]) for r in rows[:28]] == runs[0]["belief_mortality"].to_list()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "tables"]


def test_the_page_appears_last(tmp_path, monkeypatch):
    write_report(example_report([]), tmp_path, figures=())

    def disk_full(report, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_page, "write_tables", disk_full)
    with pytest.raises(TrajlmError, match="No space left"):
        write_report(example_report([]), tmp_path, figures=())
    assert not (tmp_path / "index.html").exists()


def test_a_report_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    page = write_report(example_report([]), tmp_path, figures=())
    before = page.read_bytes()
    monkeypatch.setattr(report_page, "summary_figures", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(example_report([]), tmp_path)
    assert page.read_bytes() == before


def test_sections_without_data_say_so():
    none = dict.fromkeys(("retrieval", "silhouette", "training", "stages", "accounting", "anchoring",
                          "ablation", "difference", "audit"))  # fmt: skip
    report = example_report([], **none, metrics=example_report().metrics.head(0), warnings=[])
    text = render(report)
    assert text.count('class="none"') == 6
    assert "A research tool, not a medical device" in text
    assert text.startswith("<!DOCTYPE html>")


def test_not_a_number_becomes_null():
    stay = stay_page(5, 6)
    frame = stay.trajectory.with_columns(belief_mortality=pl.lit(math.nan))
    page = StayPage(5, "train", {"mortality": math.nan}, frame, stay.attention)
    text = render(example_report([page], silhouette={"overall": math.nan}))
    data = json.loads(next(t for a, t in Elements(text).named("script") if a.get("id") == "stay-0"))
    assert data["trajectory"]["belief"]["mortality"] == [None] * 6
    assert data["targets"]["mortality"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-1], "expected weights of 8 x 8"),
        (lambda w: w.T.copy(), "causal"),
        (lambda w: w * 0.9, "sum to 1"),
        (lambda w: np.where(w == w.max(), np.nan, w), "finite"),
    ],
)
def test_what_is_not_causal_attention_is_refused(change, message):
    good = attention_map(["labs"] * 4, [0.0, 1.0, 2.0, 3.0], np.random.default_rng(0))
    with pytest.raises(TrajlmError, match=message):
        AttentionMap(change(good.weights), good.positions)


def test_a_table_without_its_columns_is_refused():
    with pytest.raises(TrajlmError, match=r"calibration.*missing \['observed'\]"):
        example_report([], calibration=example_report([]).calibration.drop("observed"))
    stay = stay_page(5, 6)
    lacking = StayPage(5, "train", {}, stay.trajectory.drop("change_mortality"), stay.attention)
    with pytest.raises(TrajlmError, match=r"stay 5.*change_mortality"):
        example_report([lacking])


def test_templates_are_installed_with_the_package():
    folder = Path(report_page.__file__).parent / "templates"
    assert {p.name for p in folder.iterdir()} == {
        "report.html", "cohort.html", "stay.html", "audit.html", "macros.html", "report.css",
        "draw.js", "timeline.js", "attention.js", "stay.js", "report.js", "inspect.html", "inspect.js",
        "alignment.html", "importance.js", "anchoring.html", "anchoring.js",
    }  # fmt: skip
