"use strict";
// The report: the cohort's page, and a page for each stay under #stay-<id>.
(() => {
  const { read, shared, INK, styleOf, labelOf, hourText, beliefText, changeText, make, modalityMark } = trajlm;
  const LONGEST_CELL = 160;
  const OTHER = "#D55E00";
  const find = (id) => document.getElementById(id);
  const staySelect = find("stay-select");
  if (!staySelect) return;
  const targetSelect = find("target-select");
  const rowsSelect = find("rows-select");
  const againstButton = find("against");
  const toggles = [...document.querySelectorAll("[data-ablation]")];
  const loaded = new Map();
  const state = { stay: null, index: null, target: shared.targets[0], ablated: [], against: Boolean(shared.against) };

  const timeline = trajlm.timeline(find("belief"), { onPick: showEvent });
  const panel = trajlm.eventPanel(find("event"), { jump: (i) => { timeline.pick(i); find("belief").focus(); } });
  const importance = find("importance") && trajlm.importance(find("importance"), { onPick: (i) => timeline.pick(i) });
  const maps = ["attention-plot", "attention-against-plot"].map((id) => find(id) && trajlm.attentionMap(find(id), { rowsWanted: () => rowsSelect.value }));

  // What is looked at: the last modality ablated, else the stay as it is.
  const readRun = (run) => (state.ablated.length ? run.ablations[state.ablated.at(-1)] : run);

  function looksOf(i) {
    const run = readRun(state.stay);
    const links = trajlm.linksOf(run);
    const own = state.stay.trajectory.event;
    const at = run.trajectory.event.indexOf(own[i]);
    if (!links || at < 0) return null;
    const place = new Map(own.map((event, j) => [event, j]));
    const whole = ([j, share]) => [place.get(run.trajectory.event[j]), share];
    return { past: links.past[at].map(whole), later: links.later[at].map(whole), readouts: links.readouts(at), modality: links.modality(at) };
  }

  function showEvent(i, { said }) {
    const looks = looksOf(i);
    panel.show(state.stay, state.target, i, looks);
    for (const row of document.querySelectorAll("#movers tbody tr")) row.classList.toggle("chosen", Number(row.dataset.event) === i);
    if (said) find("event-said").textContent = panel.say(state.stay, state.target, i, looks);
  }

  function curves() {
    const { stay } = state;
    const own = shared.against ? "this run" : "belief from all events";
    const found = [{ name: own, trajectory: stay.trajectory, color: INK, dash: "solid", width: 1.8 }];
    const without = (run, suffix, dash) => state.ablated.filter((name) => name in run.ablations).map((name) => (
      { name: `without ${labelOf(name)}${suffix}`, trajectory: run.ablations[name].trajectory, color: styleOf(name).color, dash, width: 2.2 }));
    found.push(...without(stay, "", "6px,3px"));
    if (stay.against && state.against) {
      found.push({ name: shared.against, trajectory: stay.against.trajectory, color: OTHER, dash: "solid", width: 1.8 });
      found.push(...without(stay.against, `, ${shared.against}`, "2px,3px"));
    }
    return found;
  }

  function drawBelief() {
    const { stay, target } = state;
    const runs = [stay, ...(stay.against ? [stay.against] : [])];
    timeline.update({
      key: stay.stay_id, trajectory: stay.trajectory, target, curves: curves(), hollow: state.ablated, truth: stay.targets[target.name],
      movers: stay.movers[target.name], file: `stay_${stay.stay_id}_${target.name}`, links: (i) => looksOf(i) || { past: [], later: [] },
      scaleOver: runs.flatMap((run) => [run.trajectory, ...Object.values(run.ablations).map((a) => a.trajectory)]),
    });
    find("belief-title").textContent = `Belief over time: ${target.title}`;
  }

  function cell(row, text, figure) {
    const element = row.insertCell();
    if (figure) element.className = "figure";
    element.textContent = text;
    return element;
  }

  function fillMovers() {
    const { trajectory } = state.stay;
    const body = document.querySelector("#movers tbody");
    body.replaceChildren();
    state.stay.movers[state.target.name].forEach((event, rank) => {
      const i = trajectory.event.indexOf(event);
      const belief = trajectory.belief[state.target.name][i];
      const change = trajectory.change[state.target.name][i];
      const row = body.insertRow();
      row.dataset.event = i;
      const button = make("button", { type: "button", class: "rank", "aria-label": `Show event ${i + 1}` }, String(rank + 1));
      button.addEventListener("click", () => timeline.pick(i));
      cell(row, "").append(button);
      cell(row, hourText(trajectory.hours[i]), true);
      cell(row, labelOf(trajectory.modality[i])).prepend(modalityMark(trajectory.modality[i]));
      const summary = trajectory.summary[i];
      cell(row, summary.length > LONGEST_CELL ? `${summary.slice(0, LONGEST_CELL)}…` : summary);
      cell(row, beliefText(state.target, belief - change), true);
      cell(row, beliefText(state.target, belief), true);
      cell(row, changeText(state.target, change), true);
    });
    if (!body.rows.length) cell(body.insertRow(), "No event changed this belief.").colSpan = 7;
  }

  function drawAttention() {
    const { stay } = state;
    const ablated = state.ablated.at(-1);
    const subject = ablated ? `after ablation of ${labelOf(ablated)}` : "all events";
    find("attention-title").textContent = `Attention, ${subject}`;
    const own = readRun(stay).attention;
    const other = stay.against && state.against ? (ablated ? stay.against.ablations[ablated] : stay.against) : null;
    const beside = other && other.attention ? other.attention : null;
    find("attention-none").hidden = Boolean(own);
    for (const part of document.querySelectorAll("[data-needs=attention]")) part.hidden = !own && !beside;
    find("attention-plot").hidden = !own;
    if (find("attention-against")) find("attention-against").hidden = !beside;
    document.querySelector(".maps").classList.toggle("two", Boolean(beside)); // before drawing: it decides the width
    const { positions } = stay.attention || other?.attention || {};
    if (own) maps[0].update(own, `stay_${stay.stay_id}_attention`, positions);
    if (beside) maps[1].update(beside, `stay_${stay.stay_id}_attention_against`, positions);
    find("attention-pooled").textContent = own ? maps[0].pooledText(own) : "";
  }

  function say() {
    const { stay } = state;
    const happened = shared.targets.map((target) => {
      const truth = stay.targets[target.name];
      if (truth === null) return `${target.title}: unknown`;
      return `${target.title}: ${target.kind === "probability" ? (truth ? "yes" : "no") : `${truth.toFixed(1)} ${target.unit}`}`;
    });
    const { hours } = stay.trajectory;
    const span = hours.length ? ` over ${hourText(hours[hours.length - 1])}` : "";
    const unread = stay.unread ? ` (${stay.unread.toLocaleString("en")} more are beyond what the model reads of a stay)` : "";
    const ablated = state.ablated.length ? ` Ablated, each on its own: ${state.ablated.map(labelOf).join(", ")}.` : "";
    find("stay-title").textContent = `Stay ${stay.stay_id}`;
    find("stay-state").textContent =
      `Stay ${stay.stay_id} (${stay.split.replace("_", " ")}): ${hours.length.toLocaleString("en")} events${span}${unread}. What happened: ${happened.join("; ")}.${ablated}`;
  }

  function drawStay({ attention = true } = {}) {
    for (const button of toggles) {
      const { ablation } = button.dataset;
      button.disabled = !(ablation in state.stay.ablations);
      button.title = button.disabled ? "This stay has no events of this modality to ablate" : "";
      button.setAttribute("aria-pressed", String(state.ablated.includes(ablation)));
    }
    if (againstButton) {
      againstButton.setAttribute("aria-pressed", String(state.against));
      againstButton.disabled = !state.stay.against;
    }
    say();
    drawBelief();
    fillMovers();
    if (importance) importance.update(state.stay, state.target);
    if (attention) drawAttention();
    if (timeline.picked !== null) showEvent(timeline.picked, { said: false });
  }

  function showStay(index) {
    state.index = index;
    if (!loaded.has(index)) loaded.set(index, read(`stay-${index}`));
    state.stay = loaded.get(index);
    state.ablated = state.ablated.filter((name) => name in state.stay.ablations);
    staySelect.value = String(index);
    find("stay-previous").disabled = index === 0;
    find("stay-next").disabled = index === staySelect.options.length - 1;
    drawStay();
    const mover = state.stay.movers[state.target.name][0];
    // The event that moved the belief most is what one came to see.
    timeline.pick(mover === undefined ? 0 : state.stay.trajectory.event.indexOf(mover), { said: false });
  }

  // Pages by address: #stay-<id> is a stay, everything else is a place on the cohort's page.

  const indexOf = (id) => [...staySelect.options].findIndex((option) => option.dataset.stay === id);
  const goTo = (index) => { location.hash = `stay-${staySelect.options[index].dataset.stay}`; };

  function route() {
    const found = /^#stay-(.+)$/.exec(decodeURIComponent(location.hash));
    const index = found ? indexOf(found[1]) : -1;
    const onStay = index >= 0;
    find("cohort").hidden = onStay;
    find("stay").hidden = !onStay;
    document.body.classList.toggle("on-stay", onStay);
    for (const link of document.querySelectorAll("nav a")) {
      link.toggleAttribute("aria-current", onStay && link.hash === "#stays");
    }
    if (onStay) {
      if (state.index !== index) showStay(index);
      window.scrollTo({ top: 0, behavior: "instant" });
      return;
    }
    trajlm.drawWaiting();
    if (location.hash.length > 1) {
      const place = find(location.hash.slice(1));
      if (place) place.scrollIntoView({ behavior: "instant" });
    }
  }

  for (const button of toggles) {
    button.style.setProperty("--modality", styleOf(button.dataset.ablation).color);
    button.addEventListener("click", () => {
      const { ablation } = button.dataset;
      state.ablated = state.ablated.includes(ablation)
        ? state.ablated.filter((name) => name !== ablation) : [...state.ablated, ablation];
      drawStay();
    });
  }
  if (againstButton) againstButton.addEventListener("click", () => { state.against = !state.against; drawStay(); });
  staySelect.addEventListener("change", () => goTo(Number(staySelect.value)));
  find("stay-previous").addEventListener("click", () => goTo(state.index - 1));
  find("stay-next").addEventListener("click", () => goTo(state.index + 1));
  rowsSelect.addEventListener("change", drawAttention);
  const chosenTarget = () => shared.targets.find((target) => target.name === targetSelect.value);
  if (targetSelect) {
    targetSelect.addEventListener("change", () => { state.target = chosenTarget(); drawStay({ attention: false }); });
    state.target = chosenTarget(); // a reloaded page may restore the select: follow it
  }
  window.addEventListener("hashchange", route);
  route();
})();
