"use strict";
// One event of a stay in words: what was measured, how the belief moved, who looks where.

// Attention between events, unpacked once for each run of a stay.
trajlm.linksOf = (() => {
  const seen = new WeakMap();
  return (run) => {
    if (!run.links) return null;
    if (seen.has(run)) return seen.get(run);
    const { counts, modalities } = run.links;
    const [events, shares, readouts, parts] = ["events", "shares", "readouts", "by_modality"].map((name) => trajlm.shorts(run.links[name]));
    const past = [];
    const later = counts.map(() => []);
    let at = 0;
    counts.forEach((count, readout) => {
      past.push([]);
      for (let k = 0; k < count; k += 1, at += 1) {
        const share = shares[at] / 65535;
        past[readout].push([events[at], share]);
        if (events[at] !== readout) later[events[at]].push([readout, share]);
      }
    });
    for (const list of later) list.sort((a, b) => b[1] - a[1]);
    const modality = (i) => modalities.map((name, m) => [name, parts[i * modalities.length + m] / 65535]).filter(([, share]) => share > 0);
    const unpacked = { past, later, readouts: (i) => readouts[i] / 65535, modality };
    seen.set(run, unpacked);
    return unpacked;
  };
})();

trajlm.eventPanel = (root, { jump = () => {} } = {}) => {
  const { make, modalityMark, labelOf, hourText, sharePercent, beliefText, changeText } = trajlm;
  const MOST_LISTED = 6;
  const part = (name) => root.querySelector(`[data-part=${name}]`);
  const earlier = new WeakMap(); // of each stay: by feature, the events that hold it

  function history(stay) {
    if (!earlier.has(stay)) {
      const byFeature = new Map();
      stay.trajectory.event.forEach((event, i) => {
        for (const [feature, value] of stay.values.at[event] || []) {
          if (!byFeature.has(feature)) byFeature.set(feature, []);
          byFeature.get(feature).push([i, value]);
        }
      });
      earlier.set(stay, byFeature);
    }
    return earlier.get(stay);
  }

  const valueText = (value) => (value === null ? "yes" : String(Number(value.toPrecision(5))));

  function fillValues(stay, i) {
    const own = stay.values ? stay.values.at[stay.trajectory.event[i]] || [] : [];
    const body = part("values").querySelector("tbody");
    body.replaceChildren();
    for (const [feature, value] of own) {
      const [name, unit] = stay.values.features[feature];
      const before = history(stay).get(feature).filter(([j]) => j < i).at(-1);
      const row = body.insertRow();
      row.append(make("th", { scope: "row" }, name.replaceAll("_", " ")));
      row.insertCell().append(`${valueText(value)} `, make("span", { class: "unit" }, unit));
      const cell = row.insertCell();
      if (before && before[1] !== null) cell.append(`${valueText(before[1])} `, make("span", { class: "unit" }, `at ${hourText(stay.trajectory.hours[before[0]])}`));
      else cell.append("–");
    }
    part("values").hidden = !own.length;
    part("summary").hidden = own.length > 0;
    part("summary").textContent = own.length ? "" : stay.trajectory.summary[i];
  }

  function eventButton(stay, j, share) {
    const button = make("button", { type: "button", class: "jump" },
      modalityMark(stay.trajectory.modality[j]), `${labelOf(stay.trajectory.modality[j])} ${hourText(stay.trajectory.hours[j])}`);
    button.addEventListener("click", () => jump(j));
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", share);
    return make("li", {}, button, bar, make("span", { class: "share" }, sharePercent(share)));
  }

  function fillList(name, stay, links, none) {
    const list = part(name);
    list.replaceChildren(...links.slice(0, MOST_LISTED).map(([j, share]) => eventButton(stay, j, share)));
    if (!links.length) list.append(make("li", { class: "none" }, none));
  }

  function fillAttention(stay, i, looks) {
    part("attention").hidden = !looks;
    if (!looks) return;
    const strip = part("modalities");
    strip.replaceChildren();
    const shares = [...looks.modality, ["", looks.readouts]];
    for (const [name, share] of shares) {
      const piece = make("span", { title: `${name ? labelOf(name) : "earlier read-outs"}: ${sharePercent(share)}` });
      piece.style.flexGrow = share;
      piece.style.background = name ? trajlm.styleOf(name).color : "#c9c7c0";
      strip.append(piece);
    }
    part("modality-words").textContent = shares.filter(([, share]) => share >= 0.005).sort((a, b) => b[1] - a[1])
      .map(([name, share]) => `${name ? labelOf(name) : "read-outs"} ${sharePercent(share)}`).join(", ");
    fillList("past", stay, looks.past, "No event.");
    fillList("later", stay, looks.later, "None does.");
  }

  // What interventions on the event do to the last belief, where they were measured.
  function fillEffects(stay, target, i) {
    const found = (stay.importance || {})[target.name];
    const k = found ? found.event.indexOf(stay.trajectory.event[i]) : -1;
    part("effects").hidden = k < 0;
    if (k < 0) return;
    const ways = [["removal", "removed"], ["knock_out", "cut off"], ["attribution", "by attribution"]];
    const said = ways.filter(([name]) => found[name][k] !== null).map(([name, way]) => `${changeText(target, found[name][k])} (${way})`);
    part("effects").textContent = `Adds to the last belief: ${said.join(", ")}`;
  }

  // Everything about event i; `looks` is its attention, or null where there is none.
  function show(stay, target, i, looks) {
    const { trajectory } = stay;
    root.classList.remove("empty");
    part("title").replaceChildren(modalityMark(trajectory.modality[i]), `${labelOf(trajectory.modality[i])}, ${hourText(trajectory.hours[i])}`);
    part("place").textContent = `Event ${i + 1} of ${trajectory.hours.length}`;
    const belief = trajectory.belief[target.name][i];
    const change = trajectory.change[target.name][i];
    part("belief").textContent = change === null ? `${target.title}: ${beliefText(target, belief)}, the first belief`
      : `${target.title}: ${beliefText(target, belief - change)} → ${beliefText(target, belief)} (${changeText(target, change)})`;
    fillEffects(stay, target, i);
    fillValues(stay, i);
    fillAttention(stay, i, looks);
  }

  // The same in one sentence, for those who hear the page.
  function say(stay, target, i, looks) {
    const { trajectory } = stay;
    const change = trajectory.change[target.name][i];
    const first = looks && looks.past[0];
    return `Event ${i + 1} of ${trajectory.hours.length}, ${labelOf(trajectory.modality[i])} at ${hourText(trajectory.hours[i])}. `
      + `${trajectory.summary[i]}. ${target.title}: ${beliefText(target, trajectory.belief[target.name][i])}${change === null ? "" : `, ${changeText(target, change)}`}.`
      + (first ? ` Looks most at ${labelOf(trajectory.modality[first[0]])} at ${hourText(trajectory.hours[first[0]])}, ${sharePercent(first[1])}.` : "");
  }

  return { show, say };
};
