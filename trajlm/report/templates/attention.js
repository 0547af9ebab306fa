"use strict";
// A stay's attention as a heatmap, pooled to what a screen can tell apart (trajlm/report/stays.py says how).
trajlm.attentionMap = (plot, { rowsWanted = () => "all" } = {}) => {
  const { safe, styleOf, labelOf, hourText, merged, shorts, PRINT_WIDTH } = trajlm;
  const LOWEST_SHARE = { short: 1e-3, long: 1e-4 };
  const COLORS = trajlm.shared.attention_colors;
  const seen = new WeakMap();
  let drawnAt = null;

  function unpack(map) {
    if (!seen.has(map)) {
      const weights = shorts(map.weights);
      let at = 0;
      seen.set(map, map.ends.map((end) => {
        const row = new Array(map.ends.length).fill(null);
        for (let column = 0; column < end; column += 1, at += 1) row[column] = weights[at] / 65535;
        return row;
      }));
    }
    return seen.get(map);
  }

  const span = (map, i) => (map.first_hour[i] === map.last_hour[i]
    ? hourText(map.first_hour[i]) : `${map.first_hour[i].toFixed(1)}–${hourText(map.last_hour[i])}`);

  function shortLabel(map, i) {
    if (map.kind[i] === "predict") return `PREDICT ${span(map, i)}`;
    const names = map.modality[i].split(", ");
    const what = names.length > 1 ? `${names.length} modalities` : safe(labelOf(names[0]));
    const mark = names.length > 1 ? "" : `<span style="color:${styleOf(names[0]).color}">■</span> `;
    return `${mark}${what} ${span(map, i)}`;
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
    const places = [];
    for (let i = from; i <= to; i += step) places.push(i);
    return { tickvals: places, ticktext: places.map((i) => labels[i]) };
  }

  // `positions` decides the least share told apart: that of the whole stay, so that maps side by side share their colours.
  function update(map, file, positions = map.positions) {
    const weights = unpack(map);
    const rows = map.kind.flatMap((kind, i) => (rowsWanted() === "all" || kind === "predict" ? [i] : []));
    const lowest = positions > 100 ? LOWEST_SHARE.long : LOWEST_SHARE.short;
    const long = map.kind.map((_, i) => safe(longLabel(map, i)));
    const z = rows.map((i) => weights[i].map((share, j) => (share === null ? null : Math.log10(Math.max(share / map.pooled[j], lowest)))));
    const text = rows.map((i) => weights[i].map((share, j) => (share === null ? "" :
      `<b>${long[i]}</b><br>attends to ${long[j]}: <b>${shareText(share)}</b>${map.pooled[j] > 1 ? " in all" : ""}`)));
    const short = map.kind.map((_, i) => shortLabel(map, i));
    const rowLabels = rows.map((i) => short[i]);
    const decades = [];
    for (let power = Math.round(Math.log10(lowest)); power <= 0; power += 1) decades.push(power);
    const width = plot.clientWidth || PRINT_WIDTH;
    const narrow = width < 600;
    const height = Math.max(520, Math.min(760, width * 0.8));
    const most = { x: Math.floor((width - (narrow ? 130 : 240)) / 24), y: Math.floor((height - 180) / 20) };
    const full = { x: [-0.5, short.length - 0.5], y: [rows.length - 0.5, -0.5] };
    const layout = merged(trajlm.shared.layout, {
      height, margin: { t: 8, b: 100 }, plot_bgcolor: "#efeee8",
      xaxis: { title: { text: "attended position" }, range: full.x, tickangle: -60, showgrid: false, tickfont: { size: 11 }, ...ticks(short, full.x, most.x) },
      yaxis: { title: { text: "position that looks" }, range: full.y, showgrid: false, tickfont: { size: 11 }, ...ticks(rowLabels, full.y, most.y) },
    });
    const trace = {
      type: "heatmap", z, text, hoverinfo: "text", zmin: Math.log10(lowest), zmax: 0, hoverongaps: false, colorscale: COLORS,
      xgap: rows.length <= 60 ? 1 : 0, ygap: rows.length <= 60 ? 1 : 0,
      colorbar: {
        title: { text: "share of the row's attention", side: narrow ? "top" : "right", font: { size: 12 } },
        tickvals: decades, ticktext: decades.map((p) => decadeText(p, p === decades[0])),
        thickness: 14, outlinewidth: 0, tickfont: { size: 12 },
        ...(narrow ? { orientation: "h", y: 1.01, yanchor: "bottom", x: 0.5, len: 1, tickangle: 0 } : { len: 0.6, y: 1, yanchor: "top" }),
      },
    };
    // Plotly would keep the width of before, and of a bar that turns, its old labels.
    if (drawnAt !== null && drawnAt !== width) Plotly.purge(plot);
    drawnAt = width;
    trajlm.draw(plot, [trace], layout, file);
    plot.removeAllListeners("plotly_relayout");
    plot.on("plotly_relayout", (change) => {
      if (!Object.keys(change).some((key) => /^[xy]axis\.(range|autorange)/.test(key))) return;
      const now = plot._fullLayout;
      const x = ticks(short, now.xaxis.range, most.x);
      const y = ticks(rowLabels, now.yaxis.range, most.y);
      Plotly.relayout(plot, {
        "xaxis.tickvals": x.tickvals, "xaxis.ticktext": x.ticktext, "yaxis.tickvals": y.tickvals, "yaxis.ticktext": y.ticktext,
      });
    });
  }

  const pooledText = (map) => (map.positions > map.ends.length
    ? `This stay has ${map.positions.toLocaleString("en")} positions; they are drawn as ${map.ends.length}: after the first few, neighbouring events form one row and column, and so do their read-outs. A cell's colour is the weight per position of its column, averaged over the rows of its group; pointing at it names the column's sum.`
    : "");

  return { update, pooledText };
};
