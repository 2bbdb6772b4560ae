// Draw the figures of the page as its controls say.
"use strict";

const CONFIG = {
  displaylogo: false,
  responsive: true,
  // By default, plotly has a button that sends the chart to its servers.
  plotlyServerURL: "",
  modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
};
const ARRAYS = {
  i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array, u4: Uint32Array,
  f4: Float32Array, f8: Float64Array,
};
const controls = document.getElementById("controls");
const figures = JSON.parse(document.getElementById("figures").textContent);
// What was drawn by id: a key of its axes, and their ranges as the figure gave them.
const drawn = {};

function decode(array) {
  if (!array?.bdata) return array ?? [];
  return new ARRAYS[array.dtype](Uint8Array.from(atob(array.bdata), (char) => char.charCodeAt(0)).buffer);
}

// Interpolate the positions of increasing steps.
function convert(steps, knots, positions) {
  let i = 0;
  return Array.from(steps, (step) => {
    while (i < knots.length - 2 && knots[i + 1] <= step) i++;
    const share = (step - knots[i]) / (knots[i + 1] - knots[i]);
    return positions[i] + share * (positions[i + 1] - positions[i]);
  });
}

// Return the moving average with decaying weights, of logarithms on a logarithmic axis. Gaps stay gaps.
function smooth(values, weight, isLog) {
  let sum = 0, total = 0;
  return Array.from(values, (value) => {
    if (value === null || !Number.isFinite(value) || (isLog && value <= 0)) return null;
    sum = weight * sum + (1 - weight) * (isLog ? Math.log(value) : value);
    total = weight * total + (1 - weight);
    return isLog ? Math.exp(sum / total) : sum / total;
  });
}

function axesOf(layout) {
  return Object.entries(layout).filter(([key]) => /^[xy]axis\d*$/.test(key));
}

function extentOf(traces, isLog) {
  let low = Infinity, high = -Infinity;
  for (const trace of traces) {
    for (const x of decode(trace.x)) {
      if (x === null || (isLog && x <= 0)) continue;
      low = Math.min(low, x);
      high = Math.max(high, x);
    }
  }
  return [low, high];
}

function setHorizontal(axis, data, title, isLog) {
  axis.title.text = title;
  const [low, high] = extentOf(data, isLog);
  if (isLog && low < high) {
    const margin = 0.012 * Math.log10(high / low) + 0.01;
    // Labels at 1, 2 and 5, or one label per decade.
    Object.assign(axis, { type: "log", dtick: high / low < 1e3 ? "D2" : 1, exponentformat: "none" });
    axis.range = [Math.log10(low) - margin, Math.log10(high) + margin];
  } else if (title !== "step" && low <= high) {
    const margin = 0.012 * (high - low) || 0.5;
    axis.range = [low - margin, high + margin];
  }
  if (title !== "step") axis.tickformat = ",~g";
}

function setVertical(layout, kind) {
  for (const [key, axis] of axesOf(layout)) {
    if (key[0] !== "y" || kind === "as suited" || axis.type === kind) continue;
    for (const name of ["range", "dtick", "rangemode", "exponentformat"]) delete axis[name];
    Object.assign(axis, { type: kind, tickformat: "~g" });
    if (kind === "log") axis.dtick = 1;
  }
}

function setSmoothing(figure, weight) {
  const { layout, data } = figure;
  figure.data = data.flatMap((trace, i) => {
    const how = layout.meta.smooth[i];
    if (!how) return [trace];
    const isLog = layout["yaxis" + (trace.yaxis ?? "y").slice(1)].type === "log";
    const line = { ...trace, y: smooth(decode(trace.y), weight, isLog), line: { ...trace.line, width: 1.6 } };
    line.hovertemplate = trace.hovertemplate.replace(" %{y", ", smoothed %{y");
    // The values of a whole curve stay visible. A median has its extremes behind it.
    return how === "whole" ? [{ ...trace, opacity: 0.3, showlegend: false }, line] : [line];
  });
}

// Return the figure as the controls say, and a key of its axes.
function arrange(figure) {
  const meta = figure.layout.meta;
  if (!meta?.axes) return [figure, ""];
  const [title, isLog, kind] = [controls.x.value, controls.logx.checked, controls.y.value];
  const view = { data: figure.data.map((trace) => ({ ...trace })), layout: structuredClone(figure.layout) };
  const axis = meta.axes.find((one) => one.title === title);
  if (axis) {
    view.data.forEach((trace, i) => {
      const run = meta.runs[i];
      if (run !== null) trace.x = convert(decode(trace.x), decode(axis.steps[run]), decode(axis.positions[run]));
    });
  }
  setHorizontal(view.layout.xaxis, view.data, axis ? title : "step", isLog);
  setVertical(view.layout, kind);
  if (Number(controls.smoothing.value) > 0) setSmoothing(view, Number(controls.smoothing.value));
  return [view, [title, isLog, kind].join()];
}

function keepZoom(ranges, axes, layout) {
  for (const [key, axis] of axes) {
    const known = ranges[key] ?? "null";
    const isZoomed = known === "null" ? axis.autorange === false : JSON.stringify(axis.range) !== known;
    if (isZoomed && axis.range && layout[key]) Object.assign(layout[key], { range: [...axis.range], autorange: false });
  }
}

// Draw a figure, with the zoom that the user has chosen unless the axes have changed.
async function show(id) {
  const [view, key] = arrange(figures[id]);
  const ranges = Object.fromEntries(axesOf(view.layout).map(([name, axis]) => [name, JSON.stringify(axis.range ?? null)]));
  if (drawn[id]?.key === key) keepZoom(drawn[id].ranges, axesOf(document.getElementById(id).layout), view.layout);
  drawn[id] = { key, ranges };
  view.layout.uirevision = key || "page";
  await Plotly.react(id, view.data, view.layout, CONFIG);
}

function offerAxes() {
  const axes = ["step", ...(figures["curves-chart"].layout.meta.axes ?? []).map((axis) => axis.title)];
  if (axes.join() === [...controls.x.options].map((option) => option.value).join()) return;
  const chosen = controls.x.value;
  controls.x.replaceChildren(...axes.map((title) => new Option(title)));
  if (axes.includes(chosen)) controls.x.value = chosen;
}

// The page has plotly.js in compressed form, unless another file has it.
async function loadPlotly() {
  const packed = document.getElementById("plotly");
  if (packed === null) return;
  const bytes = Uint8Array.from(atob(packed.textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function showAll() {
  offerAxes();
  for (const id of Object.keys(figures)) await show(id);
}

async function start() {
  try {
    await loadPlotly();
  } catch (error) {
    const text = "This browser cannot draw the charts. Use Chrome 80, Firefox 113, Safari 16.4 or later.";
    for (const chart of document.querySelectorAll(".chart")) chart.textContent = text;
    throw error;
  }
  await showAll();
  controls.addEventListener("input", () => show("curves-chart"));
  controls.addEventListener("submit", (event) => event.preventDefault());
}

const ready = start();
