// Replace what has changed on the page. page.js keeps the zoom of a chart.
"use strict";
const SECONDS = 2;
const state = document.getElementById("live");
let version = null;
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

async function update() {
  const answer = await fetch("data?version=" + encodeURIComponent(version ?? ""), { cache: "no-store" });
  if (answer.status === 204) return;
  if (!answer.ok) throw new Error(answer.status);
  const data = await answer.json();
  if (data.error) return tell(data.error);
  const shown = [...document.querySelectorAll(".plotly-graph-div")].map((div) => div.id);
  const ids = Object.keys(data.figures);
  if (shown.length !== ids.length || shown.some((id) => !ids.includes(id))) return location.reload();
  for (const id of ids) figures[id] = JSON.parse(data.figures[id]);
  await showAll();
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

ready.then(follow);
