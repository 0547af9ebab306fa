"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const shared = read("report-data");
  const INK = "#1d2329";
  const MUTED = "#59636e";
  const PRINT_WIDTH = 660;
  const LONGEST_CELL = 320;
  const NOTE_WIDTH = 20;
  const LOWEST_SHARE = { short: 1e-3, long: 1e-4 };
  const ATTENTION_COLORS = [[0, "#fbfaf6"], [0.2, "#dbe7f1"], [0.45, "#8fbbdc"], [0.7, "#2f7ab5"], [1, "#06284a"]];

  // Plotly reads a little HTML, links among it, in its labels: text from records must stay text.
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const styleOf = (modality) => shared.modalities[modality] || { color: MUTED, symbol: "circle", label: modality };
  const labelOf = (modality) => styleOf(modality).label;
  const hourText = (hour) => `${hour.toFixed(1)} h`;

  function wrap(text, width, most) {
    const lines = [];
    for (const part of String(text).split("\n")) {
      let line = "";
      for (const word of part.split(" ")) {
        if (line && line.length + word.length + 1 > width) {
          lines.push(line);
          line = word;
        } else {
          line = line ? `${line} ${word}` : word;
        }
      }
      lines.push(line);
    }
    return lines.length > most ? [...lines.slice(0, most), "…"] : lines;
  }

  function merged(base, extra) {
    const result = { ...base };
    for (const [key, value] of Object.entries(extra)) {
      const nested = value && typeof value === "object" && !Array.isArray(value);
      result[key] = nested ? merged(base[key] || {}, value) : value;
    }
    return result;
  }

  function draw(element, data, layout, name) {
    const config = {
      responsive: true,
      displaylogo: false,
      scrollZoom: false,
      // Named one by one: Plotly's own set holds a button that sends the figure, and so patients' data, to its cloud.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      showSendToCloud: false,
      plotlyServerURL: "",
      toImageButtonOptions: { format: "svg", filename: name },
    };
    // A finger that scrolls the page must not zoom a figure.
    const dragmode = window.matchMedia("(pointer: coarse)").matches ? false : "zoom";
    return Plotly.react(element, data, { ...layout, dragmode }, config);
  }

  function drawSummaries() {
    for (const element of document.querySelectorAll("[data-figure]")) {
      const name = element.dataset.figure;
      const { data, layout } = shared.figures[name];
      if (layout.meta && layout.meta.wrapTicks) {
        const lines = layout.meta.wrapTicks.map((label) => wrap(label, element.clientWidth < 600 ? 20 : 44, 5));
        layout.yaxis.ticktext = lines.map((parts) => parts.join("<br>"));
        layout.height = 110 + lines.length * Math.max(46, ...lines.map((parts) => 17 * parts.length + 14));
      }
      draw(element, data, layout, name);
    }
  }

  drawSummaries();
  for (const details of document.querySelectorAll("details")) {
    window.addEventListener("beforeprint", () => { details.dataset.open = details.open; details.open = true; });
    window.addEventListener("afterprint", () => { details.open = details.dataset.open === "true"; });
  }
  // A browser prints a figure as wide as it was on screen: give it the width of the paper.
  window.addEventListener("beforeprint", () => {
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      const width = plot.closest(".pair") ? PRINT_WIDTH / 2 - 20 : PRINT_WIDTH;
      Plotly.relayout(plot, { width, autosize: false });
    }
  });
  window.addEventListener("afterprint", () => {
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      Plotly.relayout(plot, { width: null, autosize: true });
    }
  });

  const staySelect = document.getElementById("stay-select");
  if (!staySelect) return;
  const targetSelect = document.getElementById("target-select");
  const rowsSelect = document.getElementById("rows-select");
  const beliefPlot = document.getElementById("belief-plot");
  const attentionPlot = document.getElementById("attention-plot");
  const toggles = [...document.querySelectorAll("[data-ablation]")];

  const state = { stay: null, index: 0, target: shared.targets[0], ablated: [] };

  const beliefText = (value) => {
    if (value === null || value === undefined) return "–";
    return state.target.kind === "probability" ? `${(100 * value).toFixed(1)}%` : `${value.toFixed(1)} ${state.target.unit}`;
  };
  const changeText = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = state.target.kind === "probability" ? `${(100 * size).toFixed(1)} points` : `${size.toFixed(1)} ${state.target.unit}`;
    return `${value < 0 ? "−" : "+"}${text}`;
  };

  // Belief over time

  function eventHover(trajectory, i) {
    const belief = trajectory.belief[state.target.name][i];
    const change = trajectory.change[state.target.name][i];
    const head = `<b>${safe(labelOf(trajectory.modality[i]))}</b> at ${hourText(trajectory.hours[i])}`;
    const seen = wrap(trajectory.summary[i], 64, 12).map(safe).join("<br>");
    const moved = change === null ? "" : ` (${changeText(change)})`;
    return `${head}<br>${seen}<br>${safe(state.target.title)}: <b>${beliefText(belief)}</b>${moved}`;
  }

  const scale = (values) => (state.target.kind === "probability" ? values.map((v) => (v === null ? null : 100 * v)) : values);

  function stepLine(trajectory, extra) {
    return {
      type: "scatter", mode: "lines", x: trajectory.hours, y: scale(trajectory.belief[state.target.name]),
      line: { shape: "hv", width: 1.5, color: INK }, hoverinfo: "skip", ...extra,
    };
  }

  function beliefTraces(trajectory, lanes) {
    const traces = [stepLine(trajectory, { name: "belief from all events" })];
    for (const ablated of state.ablated) {
      const run = state.stay.ablations[ablated].trajectory;
      const beliefs = run.belief[state.target.name];
      traces.push(stepLine(run, {
        name: `without ${safe(labelOf(ablated))}`, hoverinfo: "text",
        line: { shape: "hv", width: 2.2, dash: "6px,3px", color: styleOf(ablated).color },
        hovertext: beliefs.map((belief, i) =>
          `without ${safe(labelOf(ablated))}, after ${safe(labelOf(run.modality[i]))} at ${hourText(run.hours[i])}: <b>${beliefText(belief)}</b>`),
      }));
    }
    const beliefs = scale(trajectory.belief[state.target.name]);
    lanes.forEach((modality, lane) => {
      const style = styleOf(modality);
      const at = trajectory.modality.flatMap((name, i) => (name === modality ? [i] : []));
      const common = {
        type: "scatter", mode: "markers", x: at.map((i) => trajectory.hours[i]),
        name: safe(style.label), showlegend: false, hoverinfo: "text", hovertext: at.map((i) => eventHover(trajectory, i)),
      };
      const size = trajectory.hours.length > 300 ? 5 : 8;
      const hollow = state.ablated.includes(modality);
      traces.push({
        ...common, y: at.map((i) => beliefs[i]),
        marker: { color: style.color, symbol: style.symbol, size, line: { color: "#fff", width: size > 5 ? 0.7 : 0 } },
      });
      traces.push({
        ...common, y: at.map(() => lane), yaxis: "y2",
        marker: { color: style.color, symbol: style.symbol + (hollow ? "-open" : ""), size: size + 1, opacity: hollow ? 0.7 : 0.9 },
      });
    });
    return traces;
  }

  // Events that follow each other within minutes would print their numbers on top of each other: how far, in pixels, each
  // number stands aside so that all can be read.
  function spreadOut(hours, end) {
    const width = Math.max(100, (beliefPlot.clientWidth || PRINT_WIDTH) - 130);
    const wanted = hours.map((hour) => (width * hour) / end);
    const order = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b] || a - b);
    const stands = [...wanted];
    order.forEach((i, k) => { if (k) stands[i] = Math.max(stands[i], stands[order[k - 1]] + NOTE_WIDTH); });
    order.reverse().forEach((i, k) => {
      stands[i] = Math.min(stands[i], k ? stands[order[k - 1]] - NOTE_WIDTH : width);
    });
    return stands.map((x, i) => Math.round(x - wanted[i]));
  }

  function rankNotes(trajectory) {
    const beliefs = scale(trajectory.belief[state.target.name]);
    const places = state.stay.movers[state.target.name].map((event) => trajectory.event.indexOf(event));
    const offsets = spreadOut(places.map((i) => trajectory.hours[i]), Math.max(1, ...trajectory.hours.slice(-1)));
    return places.map((i, rank) => {
      return {
        x: trajectory.hours[i], y: beliefs[i], text: `<b>${rank + 1}</b>`, showarrow: true, arrowhead: 0, arrowwidth: 1,
        arrowcolor: MUTED, ax: offsets[rank], ay: trajectory.change[state.target.name][i] > 0 ? -24 : 24, standoff: 6,
        font: { size: 11, color: "#fff" }, bgcolor: INK, borderpad: 2,
      };
    });
  }

  function outcomeLine(end) {
    const truth = state.stay.targets[state.target.name];
    if (state.target.kind === "probability" || truth === null) return [];
    return [{
      type: "scatter", mode: "lines", x: [0, end], y: [truth, truth], line: { color: MUTED, width: 1, dash: "dot" },
      name: `what happened: ${beliefText(truth)}`, hoverinfo: "skip",
    }];
  }

  function beliefRange() {
    // Over every ablation, shown or not, so that the axis stands still while they are switched.
    const runs = [state.stay.trajectory, ...Object.values(state.stay.ablations).map((a) => a.trajectory)];
    const truth = state.target.kind === "hours" ? [state.stay.targets[state.target.name] || 0] : [];
    const values = runs.flatMap((run) => scale(run.belief[state.target.name])).concat(truth).filter((v) => v !== null);
    const top = values.reduce((a, b) => Math.max(a, b), 0);
    const bottom = values.reduce((a, b) => Math.min(a, b), 0);
    if (state.target.kind === "hours") return [bottom * 1.1, (top || 1) * 1.15];
    return [-0.02 * Math.min(100, top * 1.2 + 4), Math.min(103, top * 1.2 + 4)];
  }

  function drawBelief() {
    const trajectory = state.stay.trajectory;
    const lanes = Object.keys(shared.modalities).filter((name) => trajectory.modality.includes(name));
    const lanesHeight = 34 + 24 * lanes.length;
    const height = 360 + lanesHeight;
    const share = lanesHeight / (height - 110);
    const percent = state.target.kind === "probability";
    const end = Math.max(1, ...trajectory.hours.slice(-1));
    const layout = merged(shared.layout, {
      height, hovermode: "closest", annotations: rankNotes(trajectory), showlegend: true,
      xaxis: { title: { text: "hours since admission" }, anchor: "y2", range: [-0.012 * end, 1.015 * end] },
      yaxis: {
        domain: [share + 0.03, 1], range: beliefRange(), ticksuffix: percent ? "%" : "",
        title: { text: beliefPlot.clientWidth < 600 ? "" : safe(state.target.title + (percent ? "" : ` (${state.target.unit})`)) },
      },
      yaxis2: {
        domain: [0, share - 0.03], range: [lanes.length - 0.4, -0.6], tickvals: lanes.map((_, i) => i), fixedrange: true,
        ticktext: lanes.map((name) => safe(labelOf(name))), gridcolor: shared.layout.yaxis.gridcolor, zeroline: false,
        ticks: "", automargin: true, anchor: "x",
      },
    });
    document.getElementById("belief-title").textContent = `Belief over time: ${state.target.title}`;
    draw(beliefPlot, [...beliefTraces(trajectory, lanes), ...outcomeLine(end)], layout, `stay_${state.stay.stay_id}_${state.target.name}`);
  }

  // Events that moved the belief most

  function cell(row, text, figure) {
    const element = row.insertCell();
    if (figure) element.className = "figure";
    element.textContent = text;
    return element;
  }

  function seenCell(row, summary) {
    if (summary.length <= LONGEST_CELL) return cell(row, summary);
    const details = document.createElement("details");
    const head = document.createElement("summary");
    head.textContent = `${summary.slice(0, LONGEST_CELL)}…`;
    details.append(head, summary.slice(LONGEST_CELL));
    const element = cell(row, "");
    element.append(details);
    return element;
  }

  function fillMovers() {
    const trajectory = state.stay.trajectory;
    const body = document.querySelector("#movers tbody");
    body.replaceChildren();
    state.stay.movers[state.target.name].forEach((event, rank) => {
      const i = trajectory.event.indexOf(event);
      const belief = trajectory.belief[state.target.name][i];
      const change = trajectory.change[state.target.name][i];
      const row = body.insertRow();
      const number = document.createElement("span");
      number.className = "rank";
      number.textContent = rank + 1;
      cell(row, "").append(number);
      cell(row, hourText(trajectory.hours[i]), true);
      const dot = document.createElement("span");
      dot.className = "dot";
      dot.style.background = styleOf(trajectory.modality[i]).color;
      cell(row, labelOf(trajectory.modality[i])).prepend(dot);
      seenCell(row, trajectory.summary[i]);
      cell(row, beliefText(belief - change), true);
      cell(row, beliefText(belief), true);
      cell(row, changeText(change), true);
    });
    if (!body.rows.length) {
      const only = cell(body.insertRow(), "No event changed this belief.");
      only.colSpan = 7;
    }
  }

  // Attention

  function unpack(map) {
    const bytes = Uint8Array.from(atob(map.weights), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    let at = 0;
    return map.ends.map((end) => {
      const row = new Array(map.ends.length).fill(null);
      for (let column = 0; column < end; column += 1, at += 2) row[column] = view.getUint16(at, true) / 65535;
      return row;
    });
  }

  function shortLabel(map, i) {
    const hours = map.first_hour[i] === map.last_hour[i]
      ? hourText(map.first_hour[i]) : `${map.first_hour[i].toFixed(1)}–${hourText(map.last_hour[i])}`;
    if (map.kind[i] === "predict") return `PREDICT ${hours}`;
    const names = map.modality[i].split(", ");
    return `${names.length > 1 ? `${names.length} modalities` : labelOf(names[0])} ${hours}`;
  }

  function longLabel(map, i) {
    const names = map.modality[i].split(", ").map(labelOf).join(", ");
    const who = map.kind[i] === "predict" ? `PREDICT after ${names}` : names;
    if (map.pooled[i] === 1) return `${who} at ${hourText(map.first_hour[i])}`;
    return `${map.pooled[i]} positions (${who}), ${map.first_hour[i].toFixed(1)}–${hourText(map.last_hour[i])}`;
  }

  const shareText = (share) => (share >= 0.1 ? share.toFixed(2) : share >= 0.001 ? share.toFixed(4) : "below 0.001");

  const decadeText = (power, lowest) => `${lowest ? "≤ " : ""}${Number((100 * 10 ** power).toPrecision(1))}%`;

  // Labels thin out to what fits, and fill in again as a reader zooms.
  function ticks(labels, range, most) {
    const from = Math.max(0, Math.ceil(Math.min(...range)));
    const to = Math.min(labels.length - 1, Math.floor(Math.max(...range)));
    const step = Math.max(1, Math.ceil((to - from + 1) / most));
    const shown = [];
    for (let i = from; i <= to; i += step) shown.push(i);
    return { tickvals: shown, ticktext: shown.map((i) => labels[i]) };
  }

  function drawAttention() {
    const ablated = state.ablated.at(-1);
    const map = ablated ? state.stay.ablations[ablated].attention : state.stay.attention;
    const weights = unpack(map);
    const rows = map.kind.flatMap((kind, i) => (rowsSelect.value === "all" || kind === "predict" ? [i] : []));
    const lowest = map.positions > 100 ? LOWEST_SHARE.long : LOWEST_SHARE.short;
    const long = map.kind.map((_, i) => safe(longLabel(map, i)));
    const z = rows.map((i) => weights[i].map((share, j) => (share === null ? null : Math.log10(Math.max(share / map.pooled[j], lowest)))));
    const text = rows.map((i) => weights[i].map((share, j) => (share === null ? "" :
      `<b>${long[i]}</b><br>attends to ${long[j]}: <b>${shareText(share)}</b>${map.pooled[j] > 1 ? " in all" : ""}`)));
    const short = map.kind.map((_, i) => safe(shortLabel(map, i)));
    const rowLabels = rows.map((i) => short[i]);
    const decades = [];
    for (let power = Math.round(Math.log10(lowest)); power <= 0; power += 1) decades.push(power);
    const width = attentionPlot.clientWidth || PRINT_WIDTH;
    const narrow = width < 600;
    const height = Math.max(560, Math.min(800, width * 0.85));
    const most = { x: Math.floor((width - (narrow ? 130 : 240)) / 24), y: Math.floor((height - 180) / 20) };
    const full = { x: [-0.5, short.length - 0.5], y: [rows.length - 0.5, -0.5] };
    const layout = merged(shared.layout, {
      height, margin: { t: 8, b: 100 }, plot_bgcolor: "#efeee8",
      xaxis: { title: { text: "attended position" }, range: full.x, tickangle: -60, showgrid: false, tickfont: { size: 11 }, ...ticks(short, full.x, most.x) },
      yaxis: { title: { text: "position that looks" }, range: full.y, showgrid: false, tickfont: { size: 11 }, ...ticks(rowLabels, full.y, most.y) },
    });
    const trace = {
      type: "heatmap", z, text, hoverinfo: "text", zmin: Math.log10(lowest), zmax: 0, hoverongaps: false,
      colorscale: ATTENTION_COLORS,
      xgap: rows.length <= 60 ? 1 : 0, ygap: rows.length <= 60 ? 1 : 0,
      colorbar: {
        title: { text: "share of the row's attention", side: narrow ? "top" : "right", font: { size: 12 } },
        tickvals: decades, ticktext: decades.map((p) => decadeText(p, p === decades[0])),
        thickness: 14, outlinewidth: 0, tickfont: { size: 12 },
        ...(narrow ? { orientation: "h", y: 1.01, yanchor: "bottom", x: 0.5, len: 1, tickangle: 0 } : { len: 0.6, y: 1, yanchor: "top" }),
      },
    };
    const subject = ablated ? `after ablation of ${labelOf(ablated)}` : "all events";
    document.getElementById("attention-title").textContent = `Attention, ${subject}`;
    document.getElementById("attention-pooled").textContent = map.positions > map.ends.length
      ? `This stay has ${map.positions.toLocaleString("en")} positions; they are drawn as ${map.ends.length}: after the first few, neighbouring events form one row and column, and so do their read-outs. A cell's colour is the weight per position of its column, averaged over the rows of its group; pointing at it names the column's sum.`
      : "";
    draw(attentionPlot, [trace], layout, `stay_${state.stay.stay_id}_attention`);
    attentionPlot.removeAllListeners("plotly_relayout");
    attentionPlot.on("plotly_relayout", (change) => {
      if (!Object.keys(change).some((key) => /^[xy]axis\.(range|autorange)/.test(key))) return;
      const seen = attentionPlot._fullLayout;
      const x = ticks(short, seen.xaxis.range, most.x);
      const y = ticks(rowLabels, seen.yaxis.range, most.y);
      Plotly.relayout(attentionPlot, {
        "xaxis.tickvals": x.tickvals, "xaxis.ticktext": x.ticktext, "yaxis.tickvals": y.tickvals, "yaxis.ticktext": y.ticktext,
      });
    });
  }

  // Controls

  function say() {
    const { stay } = state;
    const happened = shared.targets.map((target) => {
      const truth = stay.targets[target.name];
      if (truth === null) return `${target.title}: unknown`;
      return `${target.title}: ${target.kind === "probability" ? (truth ? "yes" : "no") : `${truth.toFixed(1)} ${target.unit}`}`;
    });
    const hours = stay.trajectory.hours;
    const span = hours.length ? ` over ${hourText(hours[hours.length - 1])}` : "";
    const ablated = state.ablated.length ? ` Ablated, each on its own: ${state.ablated.map(labelOf).join(", ")}.` : "";
    document.getElementById("stay-state").textContent =
      `Stay ${stay.stay_id} (${stay.split.replace("_", " ")}): ${hours.length.toLocaleString("en")} events${span}. What happened: ${happened.join("; ")}.${ablated}`;
  }

  function drawStay({ attention = true } = {}) {
    for (const button of toggles) {
      const { ablation } = button.dataset;
      button.disabled = !(ablation in state.stay.ablations);
      button.title = button.disabled ? "This stay has no events of this modality to ablate" : "";
      button.setAttribute("aria-pressed", String(state.ablated.includes(ablation)));
    }
    say();
    drawBelief();
    fillMovers();
    if (attention) drawAttention();
  }

  function showStay(index) {
    state.index = index;
    state.stay = read(`stay-${index}`);
    state.ablated = state.ablated.filter((name) => name in state.stay.ablations);
    staySelect.value = String(index);
    document.getElementById("stay-previous").disabled = index === 0;
    document.getElementById("stay-next").disabled = index === staySelect.options.length - 1;
    drawStay();
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
  staySelect.addEventListener("change", () => showStay(Number(staySelect.value)));
  document.getElementById("stay-previous").addEventListener("click", () => showStay(state.index - 1));
  document.getElementById("stay-next").addEventListener("click", () => showStay(state.index + 1));
  rowsSelect.addEventListener("change", drawAttention);
  if (targetSelect) {
    targetSelect.addEventListener("change", () => {
      state.target = shared.targets.find((target) => target.name === targetSelect.value);
      drawStay({ attention: false });
    });
  }
  // A reloaded page may restore the selects: follow them.
  if (targetSelect) state.target = shared.targets.find((target) => target.name === targetSelect.value);
  showStay(Number(staySelect.value));
})();
