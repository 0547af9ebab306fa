"use strict";
// A stay's beliefs above its events, one lane per modality; events are chosen by pointing, clicking or arrow keys.
trajlm.timeline = (root, { onPick = () => {} } = {}) => {
  const { INK, MUTED, PRINT_WIDTH, safe, styleOf, labelOf, hourText, wrap, merged, beliefText, changeText } = trajlm;
  const NOTE_WIDTH = 20;
  const MOST_ARCS = 24;
  const PAST = "#0072B2";
  const LATER = "#D55E00";
  const plot = root.querySelector(".plot");
  const overlay = root.querySelector(".marks");
  let shown = null; // what update() was given
  let picked = null; // the event chosen for good
  let pointed = null; // the event under the pointer
  let lanes = [];

  const scale = (values) => (shown.target.kind === "probability" ? values.map((v) => (v === null ? null : 100 * v)) : values);
  const count = () => shown.trajectory.hours.length;
  const laneOf = (i) => lanes.indexOf(shown.trajectory.modality[i]);
  const end = () => Math.max(1, ...shown.curves.map((curve) => curve.trajectory.hours.at(-1) || 0), shown.trajectory.hours.at(-1) || 0);

  function eventHover(trajectory, i) {
    const head = `<b>${safe(labelOf(trajectory.modality[i]))}</b> at ${hourText(trajectory.hours[i])}`;
    const seen = wrap(trajectory.summary[i], 60, 5).map(safe).join("<br>");
    const change = trajectory.change[shown.target.name][i];
    const moved = change === null ? "" : ` (${changeText(shown.target, change)})`;
    return `${head}<br>${seen}<br>${safe(shown.target.title)}: <b>${beliefText(shown.target, trajectory.belief[shown.target.name][i])}</b>${moved}`;
  }

  function curveTrace({ name, trajectory, color, dash, width }) {
    const beliefs = trajectory.belief[shown.target.name];
    // A belief holds until the next event: where other events follow, to the end of the timeline.
    const on = trajectory.hours.length && trajectory.hours.at(-1) < end() ? [end()] : [];
    return {
      type: "scatter", mode: "lines", x: [...trajectory.hours, ...on], y: scale([...beliefs, ...(on.length ? beliefs.slice(-1) : [])]), name: safe(name),
      line: { shape: "hv", width, dash, color }, hoverinfo: color === INK ? "skip" : "text",
      hovertext: color === INK ? undefined : beliefs.map((belief, i) =>
        `${safe(name)}, after ${safe(labelOf(trajectory.modality[i]))} at ${hourText(trajectory.hours[i])}: <b>${beliefText(shown.target, belief)}</b>`),
    };
  }

  function markerTraces() {
    const { trajectory } = shown;
    const beliefs = scale(trajectory.belief[shown.target.name]);
    const size = count() > 300 ? 5 : 8;
    return lanes.flatMap((modality, lane) => {
      const style = styleOf(modality);
      const at = trajectory.modality.flatMap((name, i) => (name === modality ? [i] : []));
      const hollow = shown.hollow.includes(modality);
      const common = {
        type: "scatter", mode: "markers", x: at.map((i) => trajectory.hours[i]), customdata: at, name: safe(style.label),
        showlegend: false, hoverinfo: "text", hovertext: at.map((i) => eventHover(trajectory, i)),
      };
      return [
        { ...common, y: at.map((i) => beliefs[i]),
          marker: { color: style.color, symbol: style.symbol, size, line: { color: "#fff", width: size > 5 ? 0.7 : 0 } } },
        { ...common, y: at.map(() => lane), yaxis: "y2",
          marker: { color: style.color, symbol: style.symbol + (hollow ? "-open" : ""), size: size + 1, opacity: hollow ? 0.7 : 0.9 } },
      ];
    });
  }

  // Events that follow each other within minutes would print their numbers on top of each other: how far, in pixels, each
  // number stands aside so that all can be read.
  function spreadOut(hours) {
    const width = Math.max(100, (plot.clientWidth || PRINT_WIDTH) - 130);
    const wanted = hours.map((hour) => (width * hour) / end());
    const order = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b] || a - b);
    const stands = [...wanted];
    order.forEach((i, k) => { if (k) stands[i] = Math.max(stands[i], stands[order[k - 1]] + NOTE_WIDTH); });
    order.reverse().forEach((i, k) => {
      stands[i] = Math.min(stands[i], k ? stands[order[k - 1]] - NOTE_WIDTH : width);
    });
    return stands.map((x, i) => Math.round(x - wanted[i]));
  }

  function rankNotes() {
    const { trajectory, target } = shown;
    const beliefs = scale(trajectory.belief[target.name]);
    const places = shown.movers.map((event) => trajectory.event.indexOf(event)).filter((i) => i >= 0);
    const offsets = spreadOut(places.map((i) => trajectory.hours[i]));
    return places.map((i, rank) => ({
      x: trajectory.hours[i], y: beliefs[i], text: `<b>${rank + 1}</b>`, showarrow: true, arrowhead: 0, arrowwidth: 1,
      arrowcolor: MUTED, ax: offsets[rank], ay: trajectory.change[target.name][i] > 0 ? -24 : 24, standoff: 6,
      font: { size: 11, color: "#fff" }, bgcolor: INK, borderpad: 2,
    }));
  }

  function outcomeLine() {
    if (shown.target.kind === "probability" || shown.truth === null || shown.truth === undefined) return [];
    return [{
      type: "scatter", mode: "lines", x: [0, end()], y: [shown.truth, shown.truth], line: { color: MUTED, width: 1, dash: "dot" },
      name: `what happened: ${beliefText(shown.target, shown.truth)}`, hoverinfo: "skip",
    }];
  }

  function beliefRange() {
    const hours = shown.target.kind === "hours";
    // Over every curve that can be switched on, so that the axis stands still while they are.
    const values = shown.scaleOver.flatMap((trajectory) => scale(trajectory.belief[shown.target.name]))
      .concat(hours ? [shown.truth || 0] : []).filter((v) => v !== null);
    const top = values.reduce((a, b) => Math.max(a, b), 0);
    const bottom = values.reduce((a, b) => Math.min(a, b), 0);
    if (hours) return [bottom * 1.1, (top || 1) * 1.15];
    return [-0.02 * Math.min(100, top * 1.2 + 4), Math.min(103, top * 1.2 + 4)];
  }

  function layoutNow() {
    const lanesHeight = 34 + 26 * lanes.length;
    const height = 330 + lanesHeight;
    const share = lanesHeight / (height - 110);
    const percent = shown.target.kind === "probability";
    return merged(trajlm.shared.layout, {
      height, hovermode: "closest", annotations: rankNotes(), showlegend: shown.curves.length > 1 || outcomeLine().length > 0,
      uirevision: shown.key,
      xaxis: { title: { text: "hours since admission" }, anchor: "y2", range: [-0.012 * end(), 1.015 * end()] },
      yaxis: {
        domain: [share + 0.03, 1], range: beliefRange(), ticksuffix: percent ? "%" : "",
        title: { text: plot.clientWidth < 600 ? "" : safe(shown.target.title + (percent ? "" : ` (${shown.target.unit})`)) },
      },
      yaxis2: {
        domain: [0, share - 0.03], range: [lanes.length - 0.4, -0.6], tickvals: lanes.map((_, i) => i), fixedrange: true,
        ticktext: lanes.map((name) => safe(labelOf(name))), gridcolor: trajlm.shared.layout.yaxis.gridcolor, zeroline: false,
        ticks: "", automargin: true, anchor: "x",
      },
    });
  }

  // Highlights lie over the figure, drawn anew for each event pointed at, however long the stay. Not on a canvas: a
  // browser that prints one erases what lies below.

  const shape = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const ring = ([cx, cy]) => shape("circle", { cx, cy, r: 8, fill: "none", stroke: INK, "stroke-width": 2.5 });

  function placed(i, yaxis, y) {
    const { xaxis } = plot._fullLayout;
    return [xaxis._offset + xaxis.l2p(shown.trajectory.hours[i]), yaxis._offset + yaxis.l2p(y)];
  }
  const onLane = (i) => placed(i, plot._fullLayout.yaxis2, laneOf(i));
  const onCurve = (i) => placed(i, plot._fullLayout.yaxis, scale([shown.trajectory.belief[shown.target.name][i]])[0]);

  function arc(from, to, share, color, dashed) {
    const [[x1, y1], [x2, y2]] = [from, to];
    const top = Math.min(y1, y2) - Math.min(46, 8 + 0.12 * Math.abs(x2 - x1));
    return [
      shape("path", {
        d: `M${x1} ${y1}Q${(x1 + x2) / 2} ${top} ${x2} ${y2}`, fill: "none", stroke: color, "stroke-width": 0.8 + 7 * share,
        "stroke-opacity": Math.min(0.9, 0.15 + 2 * share), "stroke-dasharray": dashed ? "5 3" : "none",
      }),
      shape("circle", { cx: x2, cy: y2, r: 4 + 14 * Math.sqrt(share), fill: color, "fill-opacity": 0.28 }),
    ];
  }

  function highlight() {
    overlay.replaceChildren();
    const i = pointed ?? picked;
    if (i === null || !plot._fullLayout || i >= count()) return;
    const { xaxis, yaxis, yaxis2 } = plot._fullLayout;
    // What a reader has zoomed away is cut off.
    const box = [xaxis._offset - 8, yaxis._offset, xaxis._length + 16, yaxis2._offset + yaxis2._length - yaxis._offset];
    const inside = shape("svg", { x: box[0], y: box[1], width: box[2], height: box[3], viewBox: box.join(" ") });
    const [here, above] = [onLane(i), onCurve(i)];
    const read = Number.isFinite(above[1]); // while beliefs stream in, those of later events are to come
    if (read) inside.append(shape("path", { d: `M${here[0]} ${above[1]}V${here[1]}`, stroke: MUTED, "stroke-dasharray": "2 3" }));
    const { past, later } = shown.links ? shown.links(i) : { past: [], later: [] };
    for (const [other, share] of later.slice(0, MOST_ARCS)) inside.append(...arc(here, onLane(other), share, LATER, true));
    for (const [other, share] of past.slice(0, MOST_ARCS)) inside.append(...arc(here, onLane(other), share, PAST, false));
    inside.append(ring(here), ...(read ? [ring(above)] : []));
    overlay.append(inside);
  }

  function pick(i, { said = true } = {}) {
    if (!shown || !count()) return;
    picked = Math.max(0, Math.min(count() - 1, i));
    pointed = null;
    highlight();
    onPick(picked, { said });
  }

  function inLane(step) {
    const from = picked ?? 0;
    for (let lane = laneOf(from) + step; lane >= 0 && lane < lanes.length; lane += step) {
      const own = shown.trajectory.modality.flatMap((name, i) => (name === lanes[lane] ? [i] : []));
      const distance = (i) => Math.abs(shown.trajectory.hours[i] - shown.trajectory.hours[from]);
      if (own.length) return own.reduce((best, i) => (distance(i) < distance(best) ? i : best));
    }
    return from;
  }

  const keys = {
    ArrowRight: () => (picked ?? -1) + 1, ArrowLeft: () => (picked ?? 1) - 1, Home: () => 0, End: () => count() - 1,
    ArrowUp: () => inLane(-1), ArrowDown: () => inLane(1), PageDown: () => (picked ?? 0) + 10, PageUp: () => (picked ?? 0) - 10,
  };
  root.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    pick(keys[event.key]());
  });

  function update(next) {
    const stays = shown && shown.key === next.key;
    shown = next;
    if (!stays) picked = null;
    if (picked !== null && picked >= count()) picked = count() - 1;
    pointed = null;
    lanes = Object.keys(trajlm.shared.modalities).filter((name) => shown.trajectory.modality.includes(name));
    const first = !plot._fullLayout;
    trajlm.draw(plot, [...shown.curves.map(curveTrace), ...markerTraces(), ...outcomeLine()], layoutNow(), shown.file);
    if (first) {
      const eventOf = (data) => data.points[0] && data.points[0].customdata;
      plot.on("plotly_hover", (data) => {
        if (typeof eventOf(data) !== "number") return;
        pointed = eventOf(data);
        highlight();
        onPick(pointed, { said: false });
      });
      plot.on("plotly_unhover", () => {
        pointed = null;
        highlight();
        if (picked !== null) onPick(picked, { said: false });
      });
      plot.on("plotly_click", (data) => { if (typeof eventOf(data) === "number") pick(eventOf(data)); });
      plot.on("plotly_afterplot", highlight);
    }
    highlight();
  }

  return { update, pick, get picked() { return picked; } };
};
