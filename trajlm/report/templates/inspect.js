"use strict";
// The inspector: a stay, the edits made to it, and the beliefs that stream in.
(() => {
  const { shared, INK, MUTED, labelOf, hourText, beliefText, changeText, make, modalityMark } = trajlm;
  const find = (id) => document.getElementById(id);
  const targetSelect = find("target-select");
  const state = { stay: null, truth: {}, record: null, now: null, edits: null, chosen: null, asked: 0, target: shared.targets[0] };
  const timeline = trajlm.timeline(find("belief"), { onPick: showEvent });
  const featureOf = new Map(Object.values(shared.features).flat().map((feature) => [feature[0], feature]));
  const noEdits = () => ({ drop: [], change: {}, add: [] });
  const say = (text) => { find("state").textContent = text; };

  const asked = (path, body) => fetch(path, {
    method: body ? "POST" : "GET", body: body && JSON.stringify(body), cache: "no-store",
    headers: { "X-Trajlm-Key": shared.key, ...(body ? { "Content-Type": "application/json" } : {}) },
  });

  async function failed(response) {
    const { error } = await response.json();
    return new Error(error);
  }

  // Lines of JSON as they come in.
  async function* lines(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield JSON.parse(part);
    }
  }

  function trajectoryOf(events) {
    const empty = () => Object.fromEntries(shared.targets.map((target) => [target.name, events.map(() => null)]));
    return {
      event: events.map((event) => event.name), hours: events.map((event) => event.hours), modality: events.map((event) => event.modality),
      summary: events.map((event) => event.summary), values: events.map((event) => event.values), text: events.map((event) => event.text),
      belief: empty(), change: empty(),
    };
  }

  function setBelief(trajectory, place, belief) {
    for (const [name, value] of Object.entries(belief)) {
      trajectory.belief[name][place] = value;
      trajectory.change[name][place] = place ? value - trajectory.belief[name][place - 1] : null;
    }
  }

  function draw() {
    const { now, record, target } = state;
    const curves = [{ name: state.now === record ? "belief from the record" : "as edited", trajectory: now, color: INK, dash: "solid", width: 1.8 }];
    if (record && record !== now) curves.push({ name: "the record", trajectory: record, color: MUTED, dash: "6px,3px", width: 1.8 });
    timeline.update({
      key: state.stay, trajectory: now, target, curves, hollow: [], truth: state.truth[target.name], movers: [], file: `stay_${state.stay}_edited`,
      scaleOver: [now, ...(record ? [record] : [])],
    });
  }

  // Redraw at most once a frame, however fast beliefs come.
  let due = false;
  function drawSoon() {
    if (due) return;
    due = true;
    requestAnimationFrame(() => { due = false; draw(); });
  }

  async function believe() {
    const turn = (state.asked += 1);
    const { stay, edits } = state;
    say("Reading…");
    try {
      const response = await asked("/beliefs", { stay_id: stay, edits });
      if (!response.ok) throw await failed(response);
      let now = null;
      for await (const line of lines(response)) {
        if (turn !== state.asked) return;
        if (line.events) {
          now = trajectoryOf(line.events);
          state.now = now;
          find("bench").hidden = false;
        } else if (line.belief) {
          setBelief(now, line.event, line.belief);
          say(`Reading event ${line.event + 1} of ${now.hours.length}…`);
          drawSoon();
        } else {
          now.hours.forEach((_, i) => setBelief(now, i, Object.fromEntries(Object.entries(line.beliefs).map(([name, all]) => [name, all[i]]))));
          finished(line.largest_difference);
        }
      }
    } catch (error) {
      if (turn === state.asked) say(`Not done: ${error.message}`);
    }
  }

  function finished(difference) {
    const { now, target } = state;
    const untouched = !state.edits.drop.length && !state.edits.add.length && !Object.keys(state.edits.change).length;
    if (untouched) state.record = now;
    const last = now.belief[target.name].at(-1);
    const before = state.record ? state.record.belief[target.name].at(-1) : null;
    const moved = untouched || before === null ? "" : `, ${changeText(target, last - before)} against the record`;
    draw();
    const place = now.event.indexOf(state.chosen);
    if (place >= 0) timeline.pick(place, { said: false });
    else timeline.pick(0, { said: false });
    showEdits();
    say(`Stay ${state.stay}: ${now.hours.length} events. Last belief, ${target.title}: ${beliefText(target, last)}${moved}. Streamed and in one pass agree to ${difference.toExponential(0)}.`);
  }

  // The event chosen

  function showEvent(i) {
    const { now, target } = state;
    state.chosen = now.event[i];
    find("event-place").textContent = `Event ${i + 1} of ${now.hours.length}`;
    find("event-title").replaceChildren(modalityMark(now.modality[i]), `${labelOf(now.modality[i])}, ${hourText(now.hours[i])}`);
    const change = now.change[target.name][i];
    find("event-belief").textContent = `${target.title}: ${beliefText(target, now.belief[target.name][i])}${change === null ? "" : ` (${changeText(target, change)})`}`;
    const kind = shared.kinds[now.modality[i]];
    find("event-summary").textContent = kind === "numeric" ? "" : now.summary[i];
    find("event-values").hidden = kind !== "numeric";
    find("event-note").hidden = kind !== "text";
    find("note-text").value = now.text[i] || "";
    find("note-text").placeholder = "A new text replaces the note";
    find("apply").hidden = kind === "image";
    find("event-values").querySelector("tbody").replaceChildren(...now.values[i].map(([feature, value]) => {
      const [id, name, unit, featureKind] = featureOf.get(feature);
      const input = make("input", featureKind === "category"
        ? { type: "checkbox", "data-feature": id } : { type: "number", step: "any", value: String(Number(value.toPrecision(7))), "data-feature": id });
      input.checked = true;
      input.dataset.was = input.value;
      input.setAttribute("aria-label", name);
      return make("tr", {}, make("th", { scope: "row" }, name.replaceAll("_", " ")), make("td", {}, input, make("span", { class: "unit" }, ` ${unit}`)));
    }));
  }

  // A change of an added event changes what was added; of a recorded one, it is kept beside the record.
  function changed(edit) {
    const name = state.chosen;
    if (name.startsWith("new-")) {
      const added = state.edits.add[Number(name.slice(4))];
      Object.assign(added, edit.text === undefined ? { values: { ...added.values, ...edit.values } } : edit);
    } else {
      const known = state.edits.change[name] || {};
      state.edits.change[name] = edit.text === undefined ? { ...known, values: { ...known.values, ...edit.values } } : { ...known, ...edit };
    }
    believe();
  }

  find("change").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!find("event-note").hidden) {
      if (find("note-text").value.trim()) changed({ text: find("note-text").value });
      return;
    }
    const values = {};
    for (const input of find("event-values").querySelectorAll("input")) {
      if (input.type === "checkbox") { if (!input.checked) values[input.dataset.feature] = null; }
      else if (input.value.trim() === "") values[input.dataset.feature] = null;
      else if (input.value !== input.dataset.was) values[input.dataset.feature] = Number(input.value);
    }
    if (Object.keys(values).length) changed({ values });
  });

  function removeAdded(place) {
    state.edits.add.splice(place, 1);
    state.chosen = null;
  }

  find("drop").addEventListener("click", () => {
    const name = state.chosen;
    const i = state.now.event.indexOf(name);
    const beside = state.now.event[i + 1] ?? state.now.event[i - 1] ?? null;
    if (name.startsWith("new-")) removeAdded(Number(name.slice(4)));
    else {
      state.edits.drop.push(Number(name));
      delete state.edits.change[name];
    }
    state.chosen = beside;
    believe();
  });

  // The list of edits

  const recorded = (name) => {
    const i = state.record.event.indexOf(String(name));
    return i < 0 ? `event ${name}` : `${labelOf(state.record.modality[i])} at ${hourText(state.record.hours[i])}`;
  };

  function showEdits() {
    const { edits } = state;
    const undo = (text, action) => {
      const button = make("button", { type: "button" }, "Undo");
      button.setAttribute("aria-label", `Undo: ${text}`);
      button.addEventListener("click", () => { action(); believe(); });
      return make("li", {}, `${text} `, button);
    };
    const found = [
      ...edits.drop.map((name) => undo(`dropped ${recorded(name)}`, () => { edits.drop = edits.drop.filter((other) => other !== name); })),
      ...Object.entries(edits.change).map(([name, change]) => undo(
        `changed ${recorded(name)}: ${change.text !== undefined ? "its text" : Object.entries(change.values)
          .map(([feature, value]) => `${featureOf.get(Number(feature))[1].replaceAll("_", " ")} ${value === null ? "taken out" : value}`).join(", ")}`,
        () => { delete edits.change[name]; })),
      ...edits.add.map((added, place) => undo(`added ${labelOf(added.modality)} at ${hourText(added.hours)}`, () => removeAdded(place))),
    ];
    find("edits").replaceChildren(...(found.length ? found : [make("li", { class: "none" }, "None yet.")]));
    find("reset").disabled = !found.length;
  }

  // A new event

  function measurementRow() {
    const features = shared.features[find("add-modality").value];
    const select = make("select", { "aria-label": "measurement" }, ...features.map(([id, name, unit]) => make("option", { value: id }, `${name.replaceAll("_", " ")}${unit ? ` (${unit})` : ""}`)));
    const input = make("input", { type: "number", step: "any", value: "1", "aria-label": "value" });
    find("add-values").append(make("p", { class: "control" }, select, input));
  }

  function newModality() {
    const text = shared.kinds[find("add-modality").value] === "text";
    find("add-values").replaceChildren();
    find("add-note").hidden = !text;
    find("more").hidden = text;
    if (!text) measurementRow();
  }
  find("add-modality").addEventListener("change", newModality);
  find("more").addEventListener("click", measurementRow);
  find("add").addEventListener("submit", (event) => {
    event.preventDefault();
    const modality = find("add-modality").value;
    const added = { hours: Number(find("add-hours").value), modality };
    if (shared.kinds[modality] === "text") added.text = find("add-text").value;
    else added.values = Object.fromEntries([...find("add-values").children].map((row) => [row.querySelector("select").value, Number(row.querySelector("input").value)]));
    state.edits.add.push(added);
    state.chosen = `new-${state.edits.add.length - 1}`;
    believe();
  });

  // The stay

  find("choose").addEventListener("submit", async (event) => {
    event.preventDefault();
    const response = await asked(`/stay?id=${encodeURIComponent(find("stay-id").value.trim())}`);
    if (!response.ok) {
      say(`Not done: ${(await failed(response)).message}`);
      return;
    }
    Object.assign(state, { stay: Number(find("stay-id").value), truth: await response.json(), record: null, edits: noEdits(), chosen: null });
    showEdits();
    await believe();
  });
  find("reset").addEventListener("click", () => { state.edits = noEdits(); believe(); });
  if (targetSelect) {
    targetSelect.addEventListener("change", () => {
      state.target = shared.targets.find((target) => target.name === targetSelect.value);
      if (!state.now) return;
      draw();
      timeline.pick(Math.max(0, state.now.event.indexOf(state.chosen)), { said: false });
    });
  }
  const first = document.querySelector("#stays option");
  if (first) find("stay-id").value = first.value;
  if (find("add-modality").value) newModality();
})();
