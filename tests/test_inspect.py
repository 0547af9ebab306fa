"""`trajlm inspect`: edits, what the server refuses, and the page in a browser against the model itself."""

import http.client
import json
import threading
from dataclasses import replace

import pytest
from test_report_browser import until

from trajlm.errors import TrajlmError
from trajlm.inspector.editing import Edits, edited
from trajlm.inspector.server import InspectServer
from trajlm.inspector.session import Session
from trajlm.report.build import target_infos
from trajlm.schema import HELD_OUT, Event


@pytest.fixture(scope="module")
def server(run, prepared, model):
    metrics = json.loads((run / "metrics.json").read_text())
    with InspectServer(Session(model, prepared, target_infos(metrics))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def stay(prepared):
    """A held-out stay with several series events and a note."""
    for stay_id in prepared.stays.filter(prepared.stays["split"] == HELD_OUT)["stay_id"]:
        timeline = prepared.timeline(stay_id)
        kinds = [event.modality for event in timeline.events]
        if kinds.count("series") >= 4 and "radiology_note" in kinds:
            return timeline
    raise AssertionError("the invented ICU holds no such stay")


def numeric(timeline, nth=1):
    return [i for i, event in enumerate(timeline.events) if event.modality == "series"][nth]


def ask(server, method="POST", path="/beliefs", body=None, **headers):
    """(status, body) of one question; the headers of the page, unless others are given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    sent = {"X-Trajlm-Key": server.key, "Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), sent)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


# Edits


def test_no_edit_changes_nothing(model, stay):
    timeline, names = edited(model, stay, Edits.of({}))
    assert timeline == stay
    assert names == [str(i) for i in range(len(stay.events))]


def test_events_are_dropped_changed_and_added_in_order_of_time(model, stay):
    at, note = numeric(stay), next(i for i, e in enumerate(stay.events) if e.modality == "radiology_note")
    event = stay.events[at]
    first, second = event.feature_ids[:2]
    sent = {
        "drop": [note],
        "change": {str(at): {"values": {str(first): event.values[0] + 1.5, str(second): None}}},
        "add": [{"hours": 0.25, "modality": "radiology_note", "text": "clear lungs"}],
    }
    timeline, names = edited(model, stay, Edits.of(sent))
    assert len(timeline.events) == len(stay.events)
    assert str(note) not in names
    hours = [e.hours_since_admission for e in timeline.events]
    assert hours == sorted(hours)
    assert timeline.events[names.index("new-0")] == Event(0.25, "radiology_note", text="clear lungs")
    changed = dict(
        zip(*(getattr(timeline.events[names.index(str(at))], f) for f in ("feature_ids", "values")), strict=True)
    )
    expected = dict(zip(event.feature_ids, event.values, strict=True)) | {first: event.values[0] + 1.5}
    del expected[second]
    assert changed == expected
    for i, other in enumerate(stay.events):
        if i not in (at, note):
            assert timeline.events[names.index(str(i))] == other


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([], "expected an object"),
        ({"dropped": []}, "expected an object"),
        ({"drop": 3}, "expected a list"),
        ({"drop": ["x"]}, "place of an event"),
        ({"drop": [999_999]}, "asked for 999999"),
        ({"change": {"1": 5}}, "an object for every event"),
        ({"change": {"0": {"values": {"99999": 1.0}}}}, "has no feature"),
        ({"change": {"0": {"hours": -1}}}, "hours since admission"),
        ({"add": [{"hours": 1.0, "modality": "series", "values": {}}]}, "needs a measurement"),
        ({"add": [{"hours": 1.0, "modality": "chest_xray"}]}, "cannot be added"),
        ({"add": [{"hours": 1.0, "modality": "../../etc"}]}, "never learned"),
        ({"add": [{"hours": float("nan"), "modality": "series"}]}, "expected a number"),
        ({"add": [{"hours": 1.0, "modality": "radiology_note", "text": "  "}]}, "text of a note"),
    ],
)
def test_edits_that_cannot_be_made_are_refused(model, stay, sent, message):
    with pytest.raises(TrajlmError, match=message):
        edited(model, stay, Edits.of(sent))


def test_a_stay_of_which_nothing_is_left_is_refused(model, stay):
    with pytest.raises(TrajlmError, match="no event is left"):
        edited(model, stay, Edits.of({"drop": list(range(len(stay.events)))}))


# The server


def test_beliefs_stream_and_end_as_the_model_states_them(server, model, stay):
    sent = {"drop": [numeric(stay, 2)]}
    answer, text = ask(server, body={"stay_id": stay.stay_id, "edits": sent})
    assert answer.status == 200
    lines = [json.loads(line) for line in text.splitlines()]
    own = model.beliefs(edited(model, stay, Edits.of(sent))[0])
    assert len(lines[0]["events"]) == own.height == len(lines) - 2
    for target in model.targets:
        assert lines[-1]["beliefs"][target] == own[f"belief_{target}"].to_list()
        streamed = [line["belief"][target] for line in lines[1:-1]]
        assert streamed == pytest.approx(own[f"belief_{target}"].to_list(), rel=1e-4)
    assert 0 <= lines[-1]["largest_difference"] < 1e-4
    assert "text" in lines[0]["events"][0]
    assert not [event for event in lines[0]["events"] if event["text"]]  # notes are shown on request only


def test_only_the_reader_on_this_machine_is_answered(server, stay):
    assert server.server_address[0] == "127.0.0.1"
    question = {"stay_id": stay.stay_id, "edits": {}}
    here = f"127.0.0.1:{server.server_port}"
    assert ask(server, body=question, Host=here, Origin=f"http://{here}")[0].status == 200
    for refused in (
        {"Host": "example.org"},
        {"Host": f"example.org:{server.server_port}"},
        {"Host": "127.0.0.1"},
        {"Origin": "https://example.org"},
        {"Origin": "null"},
        {"X_Trajlm_Key": "guess"},
        {"X_Trajlm_Key": ""},
    ):
        answer, text = ask(server, body=question, **refused)
        assert answer.status == 403, refused
        assert str(stay.stay_id) not in text
    assert ask(server, "GET", "/")[0].status == 403
    assert ask(server, "GET", f"/?key={server.key}", X_Trajlm_Key="")[0].status == 200


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/metrics.json", "/stay/1"]
)
def test_no_path_leads_to_a_file(server, path):
    for method in ("GET", "POST"):
        answer, text = ask(server, method, path, body={} if method == "POST" else None)
        assert answer.status == 404
        assert "root:" not in text


def test_broken_questions_are_answered_in_one_line(server, stay):
    for body, message in (
        (b"{", "JSON"),
        (b"[]", "an object"),
        (b'{"stay_id": "<script>"}', "stay id"),
        (b'{"stay_id": -5}', "-5"),
        (json.dumps({"stay_id": stay.stay_id, "edits": {"drop": "x"}}).encode(), "a list"),
    ):
        answer, text = ask(server, body=body)
        assert answer.status == 400
        assert answer.getheader("Content-Type") == "application/json"
        assert message in json.loads(text)["error"]
    assert ask(server, body={"stay_id": stay.stay_id}, Content_Type="text/plain")[0].status == 404
    answer, _ = ask(server, "GET", f"/stay?id={stay.stay_id}")
    assert answer.getheader("Cache-Control") == "no-store"
    assert answer.getheader("X-Content-Type-Options") == "nosniff"


def test_a_port_that_is_taken_is_said(server):
    with pytest.raises(TrajlmError, match=f"port {server.server_port} cannot be had"):
        InspectServer(server.session, server.server_port)


# The page


class Bench:
    """The inspector in a browser."""

    def __init__(self, browser, server):
        self.page = browser.new_page(viewport={"width": 1440, "height": 900})
        self.page.set_default_timeout(120_000)
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(server.url)

    def settled(self):
        until(self.page, "document.getElementById('state').textContent.includes('agree to')")

    def do(self, action):
        """Do something that changes beliefs, and wait until they are stated anew."""
        self.page.evaluate("document.getElementById('state').textContent = ''")
        action()
        self.settled()

    def shown(self):
        """The curve as drawn, as a probability after each event."""
        y = self.page.evaluate("Array.from(document.getElementById('belief-plot').data[0].y)")
        return [value / 100 for value in y]

    def choose(self, place):
        self.page.focus("#belief")
        self.page.keyboard.press("Home")
        for _ in range(place):
            self.page.keyboard.press("ArrowRight")


@pytest.fixture
def bench(browser, server, stay):
    opened = Bench(browser, server)
    opened.page.fill("#stay-id", str(stay.stay_id))
    opened.do(lambda: opened.page.click("#load"))
    yield opened
    assert opened.complaints == []
    assert {url.split("/")[2] for url in opened.requests} == {f"127.0.0.1:{server.server_port}"}
    opened.page.close()


def held(beliefs, shown):
    """The drawn curve is these beliefs, held to the end of the timeline where the record goes on."""
    assert shown[: len(beliefs)] == pytest.approx(beliefs, abs=1e-6)
    assert len(shown) - len(beliefs) in (0, 1)


def test_what_is_shown_is_what_the_model_believes_of_the_edited_stay(bench, model, stay):
    page, target = bench.page, f"belief_{model.targets[0]}"
    whole = model.beliefs(stay)[target].to_list()
    held(whole, bench.shown())

    at = numeric(stay, 1)
    bench.choose(at)
    bench.do(lambda: page.click("#drop"))
    without = replace(stay, events=tuple(e for i, e in enumerate(stay.events) if i != at))
    dropped = model.beliefs(without)[target].to_list()
    assert dropped != pytest.approx(whole[:-1], abs=1e-6)
    held(dropped, bench.shown())
    assert "dropped series" in page.inner_text("#edits")

    nth = numeric(stay, 2)
    event = stay.events[nth]
    bench.choose(nth - 1)
    page.fill(f"#event-values input[data-feature='{event.feature_ids[0]}']", str(event.values[0] * 2 + 3))
    bench.do(lambda: page.click("#apply"))
    values = (event.values[0] * 2 + 3, *event.values[1:])
    changed = replace(without, events=tuple(replace(e, values=values) if e is event else e for e in without.events))
    held(model.beliefs(changed)[target].to_list(), bench.shown())

    page.fill("#add-hours", "30.5")
    page.select_option("#add-modality", "radiology_note")
    page.fill("#add-text", "<script>document.title='ran'</script> bilateral opacities")
    bench.do(lambda: page.click("#add button[type=submit]"))
    note = Event(30.5, "radiology_note", text="<script>document.title='ran'</script> bilateral opacities")
    order = list(model.timelines.modalities)
    events = sorted([*changed.events, note], key=lambda e: (e.hours_since_admission, order.index(e.modality)))
    held(model.beliefs(replace(changed, events=tuple(events)))[target].to_list(), bench.shown())
    assert page.title() == "Inspect a stay"

    page.click("#edits li:last-child button")
    bench.settled()
    bench.do(lambda: page.click("#reset"))
    held(whole, bench.shown())


def test_a_stay_that_is_not_there_is_said(bench):
    bench.page.fill("#stay-id", "12")
    bench.page.click("#load")
    until(bench.page, "document.getElementById('state').textContent.startsWith('Not done')")
    bench.complaints[:] = [
        text for text in bench.complaints if "400" not in text
    ]  # the browser's own note of a refusal


def test_the_other_target_and_further_measurements(bench, model, stay):
    page = bench.page
    page.select_option("#target-select", model.targets[1])
    y = page.evaluate("Array.from(document.getElementById('belief-plot').data[0].y)")
    exact = model.beliefs(stay)[f"belief_{model.targets[1]}"].to_list()
    assert y[: len(exact)] == pytest.approx(exact, rel=1e-6)
    page.select_option("#add-modality", "series")
    page.click("#more")
    assert len(page.query_selector_all("#add-values p")) == 2
