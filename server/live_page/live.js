"use strict";
// Draws /api/live once a second, panel by panel of SECTIONS (panels.js). No dependency, no request
// to anyone but this server.

const SVG = "http://www.w3.org/2000/svg";
const CHART = {height: 150, left: 58, bottom: 20, top: 8};
const byId = (id) => document.getElementById(id);
let paused = false;
let latest = null;
const cursors = {};  // panel id -> index of the interval under the reader's cursor

function scaled(value, units, base) {
  let i = 0;
  while (Math.abs(value) >= base && i + 1 < units.length) { value /= base; ++i; }
  const digits = value >= 100 || i === 0 && Number.isInteger(value) ? value.toFixed(0)
    : value.toPrecision(3);
  return `${digits} ${units[i]}`.trim();
}
const count = (value) => scaled(value, ["", "k", "M", "G", "T"], 1000);
function seconds(value) {
  if (value === 0) return "0 s";
  if (value < 1e-3) return (value * 1e6).toFixed(0) + " µs";
  return value < 1 ? (value * 1e3).toPrecision(3) + " ms" : value.toPrecision(3) + " s";
}
function age(value) {
  if (value < 120) return value.toFixed(0) + " s";
  return value < 7200 ? (value / 60).toFixed(0) + " min" : (value / 3600).toFixed(1) + " h";
}
function show(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "percentunit") return (100 * value).toFixed(value !== 0 && value < 0.1 ? 2 : 1) + " %";
  if (unit === "s") return seconds(value);
  if (unit === "bytes") return scaled(value, ["B", "kB", "MB", "GB", "TB", "PB"], 1000);
  return count(value);
}
const at = (object, path) => path.split(".").reduce((part, name) => part?.[name], object);
const isBad = (panel, value) => panel.warn !== null && value !== null && value !== undefined &&
  (panel.badBelow ? value < panel.warn : value > panel.warn);

function element(parent, name, attributes = {}, text) {
  const svg = ["svg", "path", "line", "text"].includes(name);
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// SVG paths of values over [0, top]; null breaks the line.
function path(values, x, y) {
  let d = "";
  values.forEach((value, i) => {
    if (value === null) return;
    const starts = i === 0 || values[i - 1] === null;
    d += `${starts ? "M" : "L"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    if (starts && (i + 1 === values.length || values[i + 1] === null)) d += "h.1";
  });
  return d;
}

function drawTile(panel, live, range) {
  const value = at(live, panel.now[0]);
  byId(`${panel.id}-value`).textContent = show(value, panel.unit);
  const note = byId(`${panel.id}-note`);
  note.replaceChildren();
  if (panel.now[1]) note.append(at(live, panel.now[1]).replaceAll("_", " ") + " ");
  if (isBad(panel, value)) {
    element(note, "em", {}, `▲ ${panel.badBelow ? "below" : "above"} ${show(panel.warn, panel.unit)}`);
  }
  const svg = byId(`${panel.id}-spark`);
  const values = live[range][panel.history[0]];
  const width = svg.clientWidth, height = 34;
  const top = panel.max ?? Math.max(1e-9, ...values.filter((v) => v !== null));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const x = (i) => values.length < 2 ? width : i * width / (values.length - 1);
  element(svg, "path", {class: "line", d: path(values, x, (v) => height - 2 - (height - 4) * Math.min(1, Math.max(0, v) / top))});
}

// A top of the scale that reads well: 1, 2 or 5 times a power of ten.
function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((top) => top >= value);
}

function drawChart(panel, live, range) {
  const svg = byId(`${panel.id}-chart`), history = live[range];
  const lines = panel.history.map((name) => history[name]);
  const length = history.end_seconds.length;
  const width = svg.clientWidth, {height, left, bottom, top: margin} = CHART;
  const most = Math.max(0, ...lines.flat().filter((v) => v !== null));
  const top = panel.max ?? niceTop(most || 1);
  const first = history.end_seconds[0] ?? 0, last = history.end_seconds[length - 1] ?? 0;
  const x = (i) => last > first
    ? left + (width - left) * (history.end_seconds[i] - first) / (last - first) : width;
  const y = (v) => margin + (height - bottom - margin) * (1 - Math.min(1, Math.max(0, v / top)));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  for (const share of [0, 0.5, 1]) {
    element(svg, "line", {class: "grid-line", x1: left, x2: width, y1: y(top * share), y2: y(top * share)});
    element(svg, "text", {x: left - 6, y: y(top * share) + 4, "text-anchor": "end"}, show(top * share, panel.unit));
  }
  element(svg, "text", {x: left, y: height - 4}, `${age(last - first)} ago`);
  element(svg, "text", {x: width, y: height - 4, "text-anchor": "end"}, "now");
  if (lines.length === 1 && length > 1 && !lines[0].includes(null)) {
    element(svg, "path", {class: "area", d: `${path(lines[0], x, y)}L${width} ${y(0)}L${left} ${y(0)}Z`});
  }
  lines.forEach((values, i) => element(svg, "path", {class: `line line${i}`, d: path(values, x, y)}));
  const cursor = cursors[panel.id] === undefined ? undefined : Math.min(cursors[panel.id], length - 1);
  if (cursor !== undefined && cursor >= 0) {
    element(svg, "line", {class: "cursor", x1: x(cursor), x2: x(cursor), y1: y(top), y2: y(0)});
  }
  byId(`${panel.id}-readout`).textContent = cursor === undefined || cursor < 0 ? "" :
    `${age(last - history.end_seconds[cursor])} ago: ` +
    lines.map((values) => show(values[cursor], panel.unit)).join(", ");
}

function moveCursor(panel, index) {
  if (latest === null) return;
  const length = latest[chosenRange()].end_seconds.length;
  cursors[panel.id] = index === undefined ? undefined : Math.min(length - 1, Math.max(0, index));
  drawChart(panel, latest, chosenRange());
}

const BAR_NAMES = {
  "key-depth": (key) => `${key} bits`,
  "value-depth": (key) => key === "0" ? "skipped" : `${key} bits`,
  "rank": (key) => `up to ${25 * (Number(key) + 1)} %`,
};

function drawBars(panel, live) {
  const rows = Object.entries(at(live, panel.now[0])).filter(([key]) => key !== "none");
  const sum = rows.reduce((all, row) => all + row[1], 0);
  const body = document.createElement("tbody");
  for (const [key, value] of rows) {
    const row = element(body, "tr", isBad(panel, value) ? {class: "over"} : {});
    const name = BAR_NAMES[panel.id] ?? ((text) => text.replaceAll("_", " "));
    element(row, "th", {scope: "row"}, name(key));
    const share = panel.max !== null ? value / panel.max : sum > 0 ? value / sum : 0;
    const bar = element(element(row, "td", {class: "bar"}), "div");
    bar.style.width = (100 * Math.min(1, share)).toFixed(2) + "%";
    if (panel.max === null) element(row, "td", {}, sum > 0 ? show(share, "percentunit") : "–");
    element(row, "td", {}, show(value, panel.unit));
  }
  byId(`${panel.id}-bars`).replaceChildren(body);
}

function table(id, head, rows) {
  const body = document.createElement("tbody");
  for (const [name, ...values] of rows) {
    const row = element(body, "tr");
    element(row, "th", {scope: "row"}, name);
    for (const value of values) element(row, "td", {}, value);
  }
  byId(id).replaceChildren(body);
  if (!head) return;
  const row = element(element(byId(id), "thead"), "tr");
  for (const title of head) element(row, "th", {scope: "col"}, title);
}

function buildTile(card, panel) {
  card.className = "tile";
  element(card, "b", {id: `${panel.id}-value`}, "–");
  element(card, "span", {id: `${panel.id}-note`, class: "note"});
  element(card, "svg", {id: `${panel.id}-spark`, "aria-hidden": "true"});
}

function buildChart(card, panel) {
  const figure = element(card, "figure");
  const svg = element(figure, "svg", {id: `${panel.id}-chart`, tabindex: 0, role: "img",
    "aria-label": `${panel.title}. Left and right arrow keys read single values.`});
  const caption = element(figure, "figcaption");
  const keys = element(caption, "span");
  if (panel.legends.length > 1) {
    panel.legends.forEach((legend, i) => {
      const key = element(keys, "span", {class: "key"});
      const sample = element(key, "svg", {viewBox: "0 0 26 8", "aria-hidden": "true"});
      element(sample, "path", {class: `line line${i}`, d: "M0 4H26"});
      key.append(legend);
    });
  }
  element(caption, "output", {id: `${panel.id}-readout`, "aria-live": "polite"});
  svg.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10}[event.key];
    if (event.key === "Escape") moveCursor(panel, undefined);
    if (step === undefined || latest === null) return;
    event.preventDefault();
    moveCursor(panel, (cursors[panel.id] ?? latest[chosenRange()].end_seconds.length) + step);
  });
  svg.addEventListener("pointermove", (event) => {
    if (latest === null) return;
    const length = latest[chosenRange()].end_seconds.length;
    const share = (event.offsetX - CHART.left) / (svg.clientWidth - CHART.left);
    moveCursor(panel, Math.round(share * (length - 1)));
  });
  svg.addEventListener("pointerleave", () => moveCursor(panel, undefined));
  svg.addEventListener("blur", () => moveCursor(panel, undefined));
}

function build() {
  SECTIONS.forEach((section, i) => {
    const part = element(byId("panels"), "section", {"aria-labelledby": `section-${i}`});
    element(part, "h2", {id: `section-${i}`}, section.title);
    const grid = element(part, "div", {class: `grid ${section.panels[0].kind}`});
    for (const panel of section.panels) {
      const card = element(grid, "article");
      element(card, "h3", {}, panel.title);
      element(card, "p", {}, panel.help);
      if (panel.kind === "stat") buildTile(card, panel);
      if (panel.kind === "lines") buildChart(card, panel);
      if (panel.kind === "bars") element(card, "table", {id: `${panel.id}-bars`, class: "bars"});
    }
  });
}

const chosenRange = () => document.querySelector("input[name=range]:checked").value;

function draw() {
  const {server, totals, now, cache} = latest;
  byId("server").textContent = `${server.version} on ${server.device} (${server.backend}, ` +
    `${server.kernels}), up ${age(server.uptime_seconds)}`;
  const state = byId("state"), text = server.ready ? "serving" : "draining";
  if (state.textContent !== text) state.textContent = text;
  state.className = "state " + (server.ready ? "ready" : "down");
  const drawers = {stat: drawTile, lines: drawChart, bars: drawBars};
  for (const {panels} of SECTIONS) {
    for (const panel of panels) drawers[panel.kind](panel, latest, chosenRange());
  }
  table("stages", ["stage", "p50", "p99", "count"], now.stages.map((stage) => [
    stage.stage.replace("_", " "), stage.count > 0 ? seconds(stage.p50) : "–",
    stage.count > 0 ? seconds(stage.p99) : "–", count(stage.count)]));
  table("counts", null, [
    ["Sessions", count(cache.sessions)], ["Streams", count(cache.streams)],
    ["Tasks waiting", count(cache.queue_depth)],
    ["Read per second", show(now.bytes_read_per_second, "bytes")],
    ["BF16 would have read", show(now.bytes_bf16_per_second, "bytes")],
    ["Saved since start", show(totals.saved_fraction, "percentunit")],
    ["Requests answered", count(totals.requests)], ["of them failed", count(totals.failed_requests)],
    ["Sequences answered", count(totals.sequences)], ["of them refused", count(totals.failed_sequences)]]);
}

async function step() {
  if (!paused) {
    try {
      latest = await (await fetch("/api/live", {cache: "no-store"})).json();
      draw();
    } catch (error) {
      byId("state").textContent = "no answer";
      byId("state").className = "state down";
    }
  }
  setTimeout(step, 1000);
}

byId("pause").addEventListener("click", (event) => {
  paused = !paused;
  event.target.setAttribute("aria-pressed", String(paused));
  event.target.textContent = paused ? "Resume" : "Pause";
});
byId("range").addEventListener("change", () => latest && draw());
addEventListener("resize", () => latest && draw());
build();
step();
