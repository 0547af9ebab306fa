"""What the page is given: links of attention, raw values, the figures at the top, and the figures as files."""

import base64
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from report_example import TARGETS, attention_map, example_report, stay_page
from trajectory_example import RICH, toy_model

from trajlm.report.build import _network_counts
from trajlm.report.figures import summary_figures
from trajlm.report.glance import SPARK_HEIGHT, SPARK_WIDTH, cards, spark, stay_lines
from trajlm.report.links import LARGEST, readout_links
from trajlm.report.missing import ablation_figures
from trajlm.report.page import AttentionMap
from trajlm.report.static import summary_canvas, write_figures
from trajlm.report.static_stays import belief_canvas
from trajlm.report.values import event_values, packed_values
from trajlm.schema import Event, FittedFeature, Timeline


def shorts(text):
    return np.frombuffer(base64.b64decode(text), "<u2")


def unpacked(links):
    """Per read-out, the share of each event it lists."""
    events, shares, found, start = shorts(links["events"]), shorts(links["shares"]) / 65535, [], 0
    for count in links["counts"]:
        found.append(dict(zip(events[start : start + count].tolist(), shares[start : start + count], strict=True)))
        start += count
    assert start == len(events) == len(shares)
    return found


@pytest.mark.parametrize("events", [1, 7, 90])
def test_links_are_the_read_outs_largest_weights_on_events(events):
    rng = np.random.default_rng(events)
    modality = rng.choice(["labs", "vitals"], events).tolist()
    attention = attention_map(modality, sorted(rng.uniform(0, 48, events).tolist()), rng)
    links = readout_links(attention)
    by_modality = shorts(links["by_modality"]).reshape(events, -1) / 65535
    readouts = shorts(links["readouts"]) / 65535
    for s, listed in enumerate(unpacked(links)):
        row = attention.weights[2 * s + 1].astype(float)
        assert len(listed) == min(s + 1, LARGEST)
        left = [row[2 * k] for k in range(s + 1) if k not in listed]
        for k, share in listed.items():
            assert share == pytest.approx(row[2 * k], abs=1e-5)
            assert share >= max(left, default=0.0) - 2e-5
        assert list(listed.values()) == sorted(listed.values(), reverse=True)
        assert readouts[s] == pytest.approx(sum(row[2 * k + 1] for k in range(s + 1)), abs=1e-5)
        for m, name in enumerate(links["modalities"]):
            own = sum(row[2 * k] for k in range(s + 1) if modality[k] == name)
            assert by_modality[s, m] == pytest.approx(own, abs=1e-5)
        assert by_modality[s].sum() + readouts[s] == pytest.approx(1, abs=1e-4)


def test_attention_without_a_read_out_per_event_has_no_links():
    whole = attention_map(["labs"] * 3, [0.0, 1.0, 2.0], np.random.default_rng(0))
    events = whole.positions.with_columns(kind=pl.lit("event"))
    assert readout_links(AttentionMap(whole.weights, events)) is None


def test_every_measurement_of_an_event_is_shown_with_its_unit():
    features = [FittedFeature("vitals", "heart_rate", "/min", feature_id=0),
                FittedFeature("demographics", "sex=female", "", "category", feature_id=1)]  # fmt: skip
    events = (
        Event(0.0, "demographics", (1,), (1.0,)),
        Event(1.0, "vitals", (0,), (71.25,)),
        Event(2.0, "notes", text="<script>alert(1)</script>"),
        Event(3.0, "vitals", (0,), (88.0,)),
    )
    timeline = Timeline(1, "p", "held_out", None, {}, events)
    found = event_values(SimpleNamespace(features=features), timeline)
    assert found.rows() == [
        (0, "sex=female", None, ""),
        (1, "heart_rate", 71.25, "/min"),
        (3, "heart_rate", 88.0, "/min"),
    ]
    packed = packed_values(found)
    assert packed["features"] == [["sex=female", ""], ["heart_rate", "/min"]]
    assert packed["at"] == {0: [[0, None]], 1: [[1, 71.25]], 3: [[1, 88.0]]}


def test_the_cards_are_the_tables_figures():
    report = example_report([])
    found = {card.label: card for card in cards(report)}
    own = report.metrics.filter((pl.col("landmark") == "end of window") & (pl.col("target") == "mortality"))
    value = {(r["arm"], r["metric"]): r for r in own.iter_rows(named=True)}
    auroc, rival = value["sequence model", "AUROC"], value["static MLP (late fusion)", "AUROC"]
    card = found["In-hospital mortality, AUROC"]
    assert card.value == f"{auroc['value']:.3f}"
    assert card.interval == f"[{auroc['low']:.3f}, {auroc['high']:.3f}]"
    assert card.note == f"static MLP (late fusion): {rival['value']:.3f}"
    guessing = auroc["positives"] / auroc["stays"]
    assert found["In-hospital mortality, AUPRC"].note.endswith(f"guessing: {guessing:.3f}")
    dearest = report.ablation.filter((pl.col("metric") == "auroc") & (pl.col("ablated") != "nothing")).sort(
        "difference"
    )
    assert found["Least to be spared"].value == dearest["ablated"][0]
    assert "Length of stay, MAE" in found


def test_the_best_rival_is_the_one_that_errs_least():
    metrics = example_report([]).metrics
    better = metrics.filter(pl.col("arm").str.starts_with("static")).with_columns(
        arm=pl.lit("trees"), value=pl.col("value") * 0.5
    )
    found = {card.label: card for card in cards(example_report([], metrics=pl.concat([metrics, better])))}
    assert found["Length of stay, MAE"].note.startswith("trees: ")
    assert found["In-hospital mortality, AUROC"].note.startswith("static MLP")
    for own in ("sequence model's network alone", "sequence model and LightGBM, averaged"):
        part = better.with_columns(arm=pl.lit(own))
        kept = cards(example_report([], metrics=pl.concat([metrics, part])))
        assert {card.label: card for card in kept}["Length of stay, MAE"].note.startswith("static MLP")


def test_the_most_divergent_stays_stand_first_and_every_page_is_listed():
    stays = [stay_page(1003, 20), stay_page(77, 12)]
    report = example_report(stays)
    lines = stay_lines(report)
    own = report.anchoring.filter(pl.col("target") == "mortality")
    worst: dict[int, float] = {}
    for row in own.iter_rows(named=True):
        move = abs(row["belief_after"] - row["belief_before"])
        worst[row["stay_id"]] = max(worst.get(row["stay_id"], 0.0), move)
    expected = sorted(worst, key=lambda s: -worst[s])[:12]
    assert [line.stay_id for line in lines[:12]] == expected
    assert {77, 1003} <= {line.stay_id for line in lines if line.linked}
    for line in lines[:12]:
        assert abs(float(line.change.replace("−", "-"))) == pytest.approx(100 * worst[line.stay_id], abs=0.06)
    assert next(line for line in lines if line.stay_id == 77).change == "–"


def test_a_listed_stay_without_a_page_tells_what_happened_and_what_was_believed():
    report = example_report([])
    assert {(line.outcome, line.spark) for line in stay_lines(report)} == {("", "")}
    first, second, *_ = [line.stay_id for line in stay_lines(report)]
    beliefs = pl.DataFrame(
        {
            "stay_id": [first, first, second], "hours_since_admission": [1.0, 5.0, 2.0],
            "belief_mortality": [0.25, 0.5, 0.75], "target_mortality": [1.0, 1.0, None],
        }
    )  # fmt: skip
    found = {line.stay_id: line for line in stay_lines(example_report([], beliefs=beliefs))}
    assert (found[first].outcome, found[first].linked) == ("yes", False)
    assert found[first].spark == spark(beliefs.head(2), TARGETS[0])
    assert found[second].outcome == "unknown"
    # Hours that are left after every event are no outcome of a stay.
    left = beliefs.with_columns(target_mortality=pl.int_range(pl.len()).cast(pl.Float64))
    assert {line.outcome for line in stay_lines(example_report([], beliefs=left))} <= {"unknown", ""}


def test_a_spark_line_steps_through_the_beliefs():
    trajectory = stay_page(5, 9).trajectory
    numbers = [float(n) for n in re.findall(r"V([\d.]+)", spark(trajectory, TARGETS[0]))]
    first = float(spark(trajectory, TARGETS[0]).split("H")[0].split()[1])
    beliefs = [1 - y / SPARK_HEIGHT for y in [first, *numbers]]
    assert beliefs == pytest.approx(trajectory["belief_mortality"].to_list(), abs=0.003)
    assert spark(trajectory, TARGETS[0]).endswith(f"H{SPARK_WIDTH}")
    assert spark(trajectory.head(0), TARGETS[0]) == ""


def test_figures_as_files_show_what_the_page_shows():
    report = example_report([])
    for figure in [f for section in summary_figures(report).values() for f in section] + ablation_figures(report):
        axes = summary_canvas(figure).axes[0]
        drawn = [tuple(np.round(line.get_xydata()[:, 1], 9)) for line in axes.lines if len(line.get_xydata())]
        for trace in figure.spec["data"]:
            if trace["type"] == "bar":
                widths = [round(patch.get_width(), 9) for patch in axes.patches]
                assert set(np.round(trace["x"], 9)) <= set(widths)
            else:
                assert tuple(np.round(np.array(trace["y"], dtype=float), 9)) in drawn, figure.key


def test_a_stays_figure_holds_every_belief():
    stay = stay_page(1001, 24, against=True)
    upper = belief_canvas(stay, TARGETS[0], example_report([stay]).modalities).axes[0]
    drawn = {line.get_label(): line.get_xydata() for line in upper.lines}
    assert set(drawn) == {"all events", "without labs", "without vitals", "the other run"}
    for label, frame in (("all events", stay.trajectory), ("without labs", stay.ablations["labs"].trajectory)):
        assert drawn[label][:-1, 1] == pytest.approx(frame["belief_mortality"].to_list())
        assert drawn[label][-1, 0] == stay.trajectory["hours_since_admission"][-1]


def test_figures_are_whole_and_the_same_each_time(tmp_path):
    stay = stay_page(1001, 16)
    report = example_report([stay], targets=TARGETS[:1])
    chosen = [replace(ablation_figures(report)[0], title="costs $5 and $6 <b>")]
    for folder in ("one", "two"):
        files = write_figures(report, chosen, tmp_path / folder)
    keys = ("ablation_mortality", "stay_1001_mortality", "stay_1001_attention")
    assert {f.name for f in files} == {f"{key}.{kind}" for key in keys for kind in ("png", "svg")}
    for file in files:
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
        if file.suffix == ".png":
            with Image.open(file) as picture:
                assert min(picture.size) > 300
        else:
            ET.parse(file)
    assert "costs $5 and $6" in (tmp_path / "two/ablation_mortality.svg").read_text()


@pytest.mark.parametrize(
    ("beside", "shares", "told"),
    [
        ({}, [0.1, 0.3], "10% of the read-out of in-hospital death and 30% of the read-out of length of stay; the"),
        ({}, [0.2, 0.2], "20% of every read-out; the rest is a regression and trees of what"),
        ({"linear": False}, [0.5, 0.5], "50% of every read-out; the rest is trees of what"),
        ({"trees": False}, [0.5, 0.5], "50% of every read-out; the rest is a regression of what"),
    ],
)  # fmt: skip
def test_how_much_passes_the_network_is_said(beside, shares, told):
    model = toy_model(**RICH | beside)
    model.shares[0] = torch.tensor(shares)
    assert _network_counts(model).startswith(f"The network counts for {told}")
