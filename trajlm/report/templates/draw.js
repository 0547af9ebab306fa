"use strict";
// What every page of ours shares: labels, styles, and drawing with Plotly.
const trajlm = (() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const shared = read("report-data");
  const INK = "#1d2329";
  const MUTED = "#59636e";
  const PRINT_WIDTH = 660;
  const NEAR = "600px";

  // Plotly reads a little HTML, links among it, in its labels: text from records must stay text.
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const styleOf = (modality) => shared.modalities[modality] || { color: MUTED, symbol: "circle", label: modality };
  const labelOf = (modality) => styleOf(modality).label;
  const hourText = (hour) => `${hour.toFixed(1)} h`;
  const sharePercent = (share) => (share >= 0.1 ? `${(100 * share).toFixed(0)}%` : share >= 0.001 ? `${(100 * share).toFixed(1)}%` : "< 0.1%");

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

  function beliefText(target, value) {
    if (value === null || value === undefined) return "–";
    return target.kind === "probability" ? `${(100 * value).toFixed(1)}%` : `${value.toFixed(1)} ${target.unit}`;
  }

  function changeText(target, value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = target.kind === "probability" ? `${(100 * size).toFixed(1)} points` : `${size.toFixed(1)} ${target.unit}`;
    const sign = Number.parseFloat(text) === 0 ? "" : value < 0 ? "−" : "+";
    return `${sign}${text}`;
  }

  // An element with text in it; text is never read as markup.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else if (value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  function modalityMark(modality) {
    const dot = make("span", { class: "dot", "aria-hidden": "true" });
    dot.style.background = styleOf(modality).color;
    return dot;
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

  // Summary figures are drawn as they come near the screen: a page that opens on a stay does not wait for them.

  function drawSummary(element) {
    const name = element.dataset.figure;
    const { data, layout } = shared.figures[name];
    if (layout.meta && layout.meta.wrapTicks) {
      const lines = layout.meta.wrapTicks.map((label) => wrap(label, element.clientWidth < 600 ? 20 : 44, 5));
      layout.yaxis.ticktext = lines.map((parts) => parts.join("<br>"));
      layout.height = 110 + lines.length * Math.max(46, ...lines.map((parts) => 17 * parts.length + 14));
    }
    draw(element, data, layout, name);
  }

  const waiting = new Set(document.querySelectorAll("[data-figure]"));
  function drawNow(element) {
    if (!waiting.delete(element)) return;
    near.unobserve(element);
    drawSummary(element);
  }
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => drawNow(entry.target)),
    { rootMargin: NEAR },
  );
  for (const element of waiting) {
    element.style.minHeight = `${shared.figures[element.dataset.figure].layout.height}px`; // nothing moves when it comes
    near.observe(element);
  }

  // The others come when there is nothing else to do.
  const idle = window.requestIdleCallback || ((task) => setTimeout(task, 200));
  function drawNext() {
    const next = [...waiting].find((element) => element.offsetParent);
    if (!next) return;
    drawNow(next);
    idle(drawNext, { timeout: 2000 });
  }
  const drawWaiting = () => idle(drawNext, { timeout: 2000 });
  drawWaiting();

  // A browser prints a figure as wide as it was on screen: give it the width of the paper, and draw what was not seen.
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) {
      details.dataset.open = details.open;
      details.open = true;
    }
    for (const element of [...waiting]) if (element.offsetParent) drawNow(element);
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      const width = plot.closest(".pair") ? PRINT_WIDTH / 2 - 20 : PRINT_WIDTH;
      Plotly.relayout(plot, { width, autosize: false });
    }
  });
  window.addEventListener("afterprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = details.dataset.open === "true";
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      Plotly.relayout(plot, { width: null, autosize: true });
    }
  });

  // Little-endian uint16 in base64, as the page's data holds attention.
  function shorts(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
  }

  return {
    read, shared, INK, MUTED, PRINT_WIDTH, safe, styleOf, labelOf, hourText, sharePercent, wrap, merged, beliefText, changeText,
    make, modalityMark, draw, drawWaiting, shorts,
  };
})();
