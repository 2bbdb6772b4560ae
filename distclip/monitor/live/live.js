// Replace what has changed on the page, without losing the zoom of a chart or an open fold.
"use strict";
const SECONDS = 2;
const state = document.getElementById("live");
let version = null;
// Ranges of the axes as the page gave them, by chart and axis.
const given = {};

function tell(text) {
  state.textContent = text;
}

function replaceTexts(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  for (const section of fresh.querySelectorAll("main > section")) {
    const old = document.getElementById(section.id);
    if (old === null || section.querySelector(".chart") !== null) continue;
    const open = [...old.querySelectorAll("details")].map((details) => details.open);
    old.replaceChildren(...section.childNodes);
    old.querySelectorAll("details").forEach((details, i) => (details.open = open[i] === true));
  }
  const subtitle = document.querySelector("header p");
  subtitle.firstChild.textContent = fresh.querySelector("header p").firstChild.textContent;
}

function axesOf(layout) {
  return Object.entries(layout).filter(([key]) => /^[xy]axis\d*$/.test(key));
}

function rangesOf(layout) {
  return Object.fromEntries(axesOf(layout).map(([key, axis]) => [key, JSON.stringify(axis.range ?? null)]));
}

function keepZoom(id, layout) {
  const known = given[id] ?? {};
  for (const [key, axis] of axesOf(document.getElementById(id).layout)) {
    const isZoomed =
      (known[key] ?? "null") === "null" ? axis.autorange === false : JSON.stringify(axis.range) !== known[key];
    if (isZoomed && axis.range && layout[key]) Object.assign(layout[key], { range: [...axis.range], autorange: false });
  }
}

async function replaceCharts(figures) {
  for (const [id, text] of Object.entries(figures)) {
    const figure = JSON.parse(text);
    const ranges = rangesOf(figure.layout);
    // In the first answer the figures are those of the page.
    if (given[id] !== undefined) keepZoom(id, figure.layout);
    given[id] = ranges;
    await Plotly.react(id, figure.data, figure.layout);
  }
}

async function update() {
  const answer = await fetch("data?version=" + encodeURIComponent(version ?? ""), { cache: "no-store" });
  if (answer.status === 204) return;
  if (!answer.ok) throw new Error(answer.status);
  const data = await answer.json();
  if (data.error) return tell(data.error);
  const shown = [...document.querySelectorAll(".plotly-graph-div")].map((div) => div.id);
  const ids = Object.keys(data.figures);
  if (shown.length !== ids.length || shown.some((id) => !ids.includes(id))) return location.reload();
  await replaceCharts(data.figures);
  replaceTexts(data.html);
  version = data.version;
  tell(data.is_over ? "All runs have ended." : "Updated at " + new Date().toLocaleTimeString() + ".");
}

async function follow() {
  try {
    if (!document.hidden) await update();
  } catch (error) {
    tell("No connection to distclip serve.");
  }
  setTimeout(follow, 1000 * SECONDS);
}

follow();
