"use strict";
// What each event does to the last belief: where the last read-out looks, beside what interventions find.
trajlm.importance = (root, { onPick = () => {} } = {}) => {
  const { MUTED, make, merged, modalityMark, labelOf, styleOf, hourText, sharePercent, changeText, safe } = trajlm;
  const MOST_LISTED = 8;
  const ROW = 104; // pixels
  const ROWS = [
    ["attention", "looked at: share of the last read-out’s attention"],
    ["removal", "removed: what the event adds to the last belief"],
    ["knock_out", "cut off from all that follows: likewise"],
    ["attribution", "integrated gradients: likewise"],
  ];
  const plot = root.querySelector(".plot");
  let bound = false;

  const known = (found) => ROWS.filter(([name]) => found[name].some((value) => value !== null));
  const scaled = (name, target, value) => (value !== null && (name === "attention" || target.kind === "probability") ? 100 * value : value);
  const eventText = (stay, event) => {
    const i = stay.trajectory.event.indexOf(event);
    return `${labelOf(stay.trajectory.modality[i])} at ${hourText(stay.trajectory.hours[i])}`;
  };

  function words(stay, found) {
    const said = found.agreement;
    if (said.removal === null) return "There is no attention to compare the interventions with, or too few events to rank.";
    const rank = (value) => (value === null ? "unknown" : value.toFixed(2).replace("-", "−"));
    const verdict = said.disagree ? "Attention and intervention disagree" : "Attention and intervention agree";
    const same = said.same_event ? `Both name the same event first: ${eventText(stay, said.most_moving)}.`
      : `The last read-out looks most at ${eventText(stay, said.most_attended)}; the removal of ${eventText(stay, said.most_moving)} moves the belief most.`;
    return `${verdict} on this stay: over its ${said.events} events, the rank of attention correlates ${rank(said.removal)} with the size of what removing `
      + `an event does (with cutting it off ${rank(said.knock_out)}, with its attribution ${rank(said.attribution)}; below 0.30 counts as disagreement). ${same}`;
  }

  // Zero and one or two steps of 1, 2 or 5 on either side. Plotly's own may be zero alone, which tells no scale.
  function ticks(values, unit) {
    const [least, greatest] = [Math.min(0, ...values), Math.max(0, ...values)];
    const most = Math.max(-least, greatest);
    if (most === 0) return { tickvals: [0], ticktext: [`0${unit}`] };
    const power = 10 ** Math.floor(Math.log10(most));
    const step = power * [5, 2, 1].find((factor) => factor * power <= most || factor === 1);
    const tickvals = [-2, -1, 0, 1, 2].map((i) => i * step).filter((at) => at >= least && at <= greatest);
    return { tickvals, ticktext: tickvals.map((at) => `${Number(at.toPrecision(1))}${unit}`.replace("-", "−")) };
  }

  function figure(stay, target, found) {
    const rows = known(found);
    const places = found.event.map((event) => stay.trajectory.event.indexOf(event));
    const hours = places.map((i) => stay.trajectory.hours[i]);
    const share = 1 / rows.length;
    const height = 70 + ROW * rows.length;
    const layout = merged(trajlm.shared.layout, { height, hovermode: "closest", showlegend: false, annotations: [], margin: { t: 20 } });
    const traces = [];
    rows.forEach(([name, title], row) => {
      const axis = row ? `y${row + 1}` : "y";
      const top = 1 - row * share;
      const size = found.event.length > 300 ? 4 : 7;
      const values = found[name].map((value) => scaled(name, target, value));
      layout[`yaxis${row ? row + 1 : ""}`] = merged(trajlm.shared.layout.yaxis, {
        domain: [top - share * 0.72, top - share * 0.1], zeroline: true, zerolinecolor: MUTED, zerolinewidth: 1, anchor: "x", rangemode: "tozero",
        ...ticks(values, name === "attention" ? "%" : ""),
      });
      layout.annotations.push({ text: safe(title) + (name === "attention" ? "" : ` (${target.kind === "probability" ? "points" : target.unit})`), x: 0, xref: "paper", y: top - share * 0.1,
        yref: "paper", yanchor: "bottom", xanchor: "left", showarrow: false, font: { size: 12, color: MUTED } });
      traces.push({
        type: "scatter", mode: "lines", yaxis: axis, x: hours.flatMap((hour) => [hour, hour, null]), y: values.flatMap((value) => [0, value, null]),
        line: { color: "#b9b8b2", width: 1.2 }, hoverinfo: "skip",
      });
      traces.push({
        type: "scatter", mode: "markers", yaxis: axis, x: hours, y: values, customdata: places, hoverinfo: "text",
        marker: {
          size, color: places.map((i) => styleOf(stay.trajectory.modality[i]).color), symbol: places.map((i) => styleOf(stay.trajectory.modality[i]).symbol),

        },
        hovertext: found[name].map((value, k) => `<b>${safe(labelOf(stay.trajectory.modality[places[k]]))}</b> at ${hourText(hours[k])}<br>`
          + `${safe(title)}: ${value === null ? "–" : name === "attention" ? sharePercent(value) : changeText(target, value)}`),
      });
    });
    const end = Math.max(1, ...hours);
    layout.xaxis = merged(trajlm.shared.layout.xaxis, {
      title: { text: "hours since admission" }, anchor: rows.length > 1 ? `y${rows.length}` : "y", range: [-0.012 * end, 1.015 * end],
    });
    trajlm.draw(plot, traces, layout, `stay_${stay.stay_id}_${target.name}_importance`);
    if (!bound) {
      plot.on("plotly_click", (data) => { if (data.points[0] && typeof data.points[0].customdata === "number") onPick(data.points[0].customdata); });
      bound = true;
    }
  }

  function table(stay, target, found) {
    const shown = known(found).map(([name]) => name);
    for (const cell of root.querySelectorAll("thead [data-measure]")) cell.hidden = !shown.includes(cell.dataset.measure);
    const order = found.event.map((_, k) => k).sort((a, b) => Math.abs(found.removal[b]) - Math.abs(found.removal[a])).slice(0, MOST_LISTED);
    root.querySelector("tbody").replaceChildren(...order.map((k) => {
      const i = stay.trajectory.event.indexOf(found.event[k]);
      const button = make("button", { type: "button", class: "jump" }, modalityMark(stay.trajectory.modality[i]), labelOf(stay.trajectory.modality[i]));
      button.addEventListener("click", () => onPick(i));
      const row = make("tr", {}, make("td", { class: "figure" }, hourText(stay.trajectory.hours[i])), make("th", { scope: "row" }, button));
      for (const name of shown) {
        const value = found[name][k];
        row.append(make("td", { class: "figure" }, value === null ? "–" : name === "attention" ? sharePercent(value) : changeText(target, value)));
      }
      return row;
    }));
  }

  // The interventions on a stay's events; nothing where they were not measured for this target.
  function update(stay, target) {
    const found = stay.importance[target.name];
    root.hidden = !found;
    if (!found) return;
    root.querySelector("[data-part=agreement]").textContent = words(stay, found);
    figure(stay, target, found);
    table(stay, target, found);
  }

  return { update };
};
