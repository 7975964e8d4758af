"use strict";
// Draws /api/live once a second. No dependency, no request to anyone but this server.

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let paused = false;

function scaled(value, units, base) {
  let i = 0;
  while (Math.abs(value) >= base && i + 1 < units.length) { value /= base; ++i; }
  return (value >= 100 || i === 0 ? value.toFixed(0) : value.toPrecision(3)) + " " + units[i];
}
const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB", "PB"], 1000);
const count = (value) => scaled(value, ["", "k", "M", "G", "T"], 1000).trim();
const percent = (value) => value === null ? "–" : (100 * value).toFixed(1) + " %";
function seconds(value) {
  if (value === 0) return "–";
  if (value < 1e-3) return (value * 1e6).toFixed(0) + " µs";
  if (value < 1) return (value * 1e3).toPrecision(3) + " ms";
  return value.toPrecision(3) + " s";
}

function element(parent, name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// Rows of [name, value, text]: a bar as long as the value's share of the sum.
function bars(id, rows) {
  const body = document.createElement("tbody");
  const sum = rows.reduce((all, row) => all + row[1], 0);
  for (const [name, value, text] of rows) {
    const row = element(body, "tr");
    element(row, "th", name).scope = "row";
    const cell = element(row, "td");
    cell.className = "bar";
    const share = sum > 0 ? value / sum : 0;
    element(cell, "div").style.width = (100 * share).toFixed(2) + "%";
    element(row, "td", sum > 0 ? percent(share) : "–");
    element(row, "td", text === undefined ? count(value) : text);
  }
  byId(id).replaceChildren(body);
}

function table(id, head, rows) {
  const parts = [];
  if (head) {
    const thead = document.createElement("thead");
    const row = element(thead, "tr");
    for (const title of head) element(row, "th", title).scope = "col";
    parts.push(thead);
  }
  const body = document.createElement("tbody");
  for (const [name, ...values] of rows) {
    const row = element(body, "tr");
    element(row, "th", name).scope = "row";
    for (const value of values) element(row, "td", value);
  }
  byId(id).replaceChildren(...parts, body);
}

function shape(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
}

// Lines over the last `capacity` samples; a null breaks the line.
function chart(id, capacity, lines, top, label) {
  const svg = byId(id);
  const width = svg.clientWidth, height = 120, left = 52, bottom = 14;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  for (const share of [0, 0.5, 1]) {
    const y = (height - bottom) * (1 - share) + 6;
    shape(svg, "line", {class: "grid", x1: left, x2: width, y1: y, y2: y});
    shape(svg, "text", {x: left - 6, y: y + 4, "text-anchor": "end"}, label(top * share));
  }
  for (const {values, style} of lines) {
    let path = "";
    values.forEach((value, i) => {
      if (value === null) return;
      const x = width - (values.length - 1 - i) * (width - left) / capacity;
      const y = (height - bottom) * (1 - Math.min(1, Math.max(0, value / top))) + 6;
      const broken = i === 0 || values[i - 1] === null;
      path += `${broken ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
    });
    shape(svg, "path", {class: "line " + style, d: path});
  }
}

function draw(live) {
  const {server, totals, now, cache, history} = live;
  byId("server").textContent =
    `${server.version} on ${server.device} (${server.backend}, ${server.kernels}), up ` +
    `${Math.floor(server.uptime_seconds)} s`;
  const state = byId("state");
  const text = server.ready ? "serving" : "draining";
  if (state.textContent !== text) state.textContent = text;
  state.className = "state " + (server.ready ? "ready" : "down");

  byId("saved-now").textContent = percent(now.saved_fraction);
  byId("saved-total").textContent = percent(totals.saved_fraction);
  byId("read-rate").textContent = bytes(now.bytes_read_per_second) + "/s";
  byId("bf16-rate").textContent = bytes(now.bytes_bf16_per_second) + "/s";
  byId("token-rate").textContent = count(now.q_tokens_per_second);
  chart("chart-saved", history.capacity, [{values: history.saved_fraction, style: ""}], 1, percent);

  bars("key-bits", [["4 bits", totals.key_pages["4"]], ["6 bits", totals.key_pages["6"]],
                    ["8 bits", totals.key_pages["8"]],
                    ["16 bits", totals.dense_tokens / 64]]);
  bars("value-bits", [["skipped", totals.value_pages["0"]], ["2 bits", totals.value_pages["2"]],
                      ["4 bits", totals.value_pages["4"]], ["6 bits", totals.value_pages["6"]],
                      ["8 bits", totals.value_pages["8"]],
                      ["16 bits", totals.dense_tokens / 64]]);
  bars("rank", totals.rank_quarters.map((value, i) => [`up to ${25 * (i + 1)} %`, value]));
  bars("fallbacks", Object.entries(totals.fallbacks).map(([name, value]) => [name, value]));

  table("stages", ["stage", "p50", "p99", "count"], now.stages.map(
    (stage) => [stage.stage, seconds(stage.p50), seconds(stage.p99), count(stage.count)]));
  const top = Math.max(1e-4, ...history.batch_p99.filter((value) => value !== null));
  chart("chart-latency", history.capacity,
        [{values: history.batch_p50, style: ""}, {values: history.batch_p99, style: "second"}],
        top, seconds);

  table("sessions", null, [
    ["Sessions", count(cache.sessions)], ["Streams", count(cache.streams)],
    ["Tasks waiting", count(cache.queue_depth)], ["Requests answered", count(totals.requests)],
    ["Sequences answered", count(totals.sequences)],
    ["Sequences refused", count(totals.failed_sequences)]]);
  bars("pages", Object.entries(cache.bytes).map(([name, value]) => [
    name in cache.pages ? `${name} (${count(cache.pages[name])})` : name, value, bytes(value)]));
}

async function step() {
  if (!paused) {
    try {
      const reply = await fetch("/api/live", {cache: "no-store"});
      draw(await reply.json());
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
step();
