// The page's state: what is asked, of which indices, and what they answered.

import * as api from "./api.js";
import { cards, details, el, groups, modelFacts, number, plural, scoresAre } from "./draw.js";
import { canRecord, kindOf, partOf, record } from "./files.js";
import * as filters from "./filters.js";

const $ = (id) => document.getElementById(id);
const seed = Math.floor(Math.random() * 1e9);
let served = []; // descriptions of the indices
let parts = []; // files and samples of the query: {kind, name, ..., away}
let grouped = false; // near-duplicates are shown instead of answers
let asking = null; // aborts the query that is under way

const named = (name) => served.find((d) => d.name === name);
const chosen = () => [...new Set([$("index").value, $("beside").value])].filter(Boolean).map(named);
const towers = (d, kind) => d.model.towers.filter((tower) => tower.kind === kind);
const accepts = (kind) => chosen().some((d) => towers(d, kind).length);

function problem(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? error.message : "";
}

// ------------------------------------------------------------------------------------------------ asking

function query(d) {
  const tower = (kind, word) => {
    const [found] = towers(d, kind);
    if (!found) throw new Error(`The model of ${d.name} knows no ${word}; it knows ${d.model.towers.map((t) => t.name).join(", ")}.`);
    return found.name;
  };
  const asked = [];
  if ($("text").value.trim()) asked.push({ modality: tower("text", "texts"), text: $("text").value.trim() });
  if ($("away").value.trim()) asked.push({ modality: tower("text", "texts"), text: $("away").value.trim(), weight: -1 });
  for (const part of parts) {
    const weight = part.away ? -1 : 1;
    if (part.kind === "like") asked.push({ like: part.id, of: part.of, weight });
    else if (part.kind === "timeseries") {
      const names = part.channels.split(",").map((name) => name.trim()).filter(Boolean);
      asked.push({ modality: tower(part.kind, "signals"), data: part.data, weight, ...(part.rate ? { rate: Number(part.rate) } : {}), ...(names.length ? { channels: names } : {}) });
    } else asked.push({ modality: tower(part.kind, part.kind === "image" ? "pictures" : "sounds"), data: part.data, weight });
  }
  const where = filters.where($("where").value.trim());
  const joint = d.joint === "product" && $("joint").value !== "auto" ? { joint: $("joint").value } : {};
  return { index: d.name, parts: asked, top: Number($("top").value), ...(where ? { where } : {}), ...joint };
}

const isAsked = () => Boolean($("text").value.trim() || $("away").value.trim() || parts.length);

async function run() {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  problem(null);
  optionsSaid();
  $("results").setAttribute("aria-busy", "true");
  const begun = performance.now();
  const where = filters.where($("where").value.trim());
  const answers = await Promise.all(chosen().map(async (d) => {
    try {
      if (grouped) return { d, found: await api.duplicates(d.name, $("threshold").value, where, signal) };
      if (isAsked()) return { d, ...(await api.search(query(d), signal)) };
      return { d, hits: await api.some(d.name, 24, seed, where, signal), random: true };
    } catch (error) {
      return { d, error };
    }
  }));
  if (signal.aborted) return;
  $("results").removeAttribute("aria-busy");
  scoresAre(answers[0].joint);
  $("results").className = answers.length > 1 ? "two" : "";
  $("results").replaceChildren(...answers.map(column));
  const failed = answers.find((answer) => answer.error);
  if (failed && answers.length === 1) problem(failed.error);
  const count = answers.reduce((sum, answer) => sum + (answer.hits?.length ?? 0), 0);
  const asked = grouped ? "" : isAsked() ? `${plural(count, "answer")} in ${number(Math.round(performance.now() - begun))} ms${passed(answers)}`
    : `Some of what is in it, at random${where ? ", that passes the filter" : ""}. ${$("text").placeholder.replace(/, or drop/, "; or drop")}.`;
  $("status").textContent = failed ? "" : asked;
  document.title = $("text").value.trim() ? `${$("text").value.trim()} – mmcontrast` : "mmcontrast search";
}

function passed(answers) {
  const said = answers.map((answer) => (answer.passing < answer.d.count ? `${number(answer.passing)} of ${number(answer.d.count)}` : null)).filter(Boolean);
  const product = answers.some((answer) => answer.joint === "product") ? "; scores are of the product of the parts" : "";
  return (said.length ? `; ${said.join(" and ")} pass the filter` : "") + product;
}

function column({ d, hits, found, error }) {
  const does = (open) => ({ like: (sample) => like(d, sample), open });
  const list = found ? groups(d.name, found, does((samples, place) => show(d, samples, place)))
    : hits ? cards(d.name, hits, does((place) => show(d, hits, place))) : null;
  const nothing = error ? el("p", { class: "bad" }, error.message) : found || hits.length ? null : el("p", { class: "facts" }, "Nothing found.");
  return el("section", { class: "column", "data-index": d.name }, el("header", {}, el("h2", {}, d.name), modelFacts(d)), nothing, ...[list].flat(Infinity).filter(Boolean));
}

function like(d, sample) {
  forget(parts);
  parts = [{ kind: "like", id: sample.id, of: d.name, name: sample.text || sample.key, sample, away: false }];
  $("text").value = $("away").value = "";
  $("details").close();
  drawParts();
  submit();
  window.scrollTo({ top: 0 });
}

function submit({ groups = false } = {}) {
  grouped = groups;
  remember();
  return run();
}

// ------------------------------------------------------------------------------------------------ parts

function drawParts() {
  $("parts").replaceChildren(...parts.map((part) => {
    const change = (key, label, width) => el("label", {}, label, el("input", { type: "text", class: width, value: part[key], onchange: (event) => { part[key] = event.target.value; } }));
    const picture = part.kind === "like" ? part.sample?.media.find((m) => m.kind === "image") : null;
    const tower = part.kind === "timeseries" ? chosen().flatMap((d) => towers(d, part.kind))[0] : null;
    if (tower && part.rate === "") part.rate = String(tower.rate);
    if (tower && part.channels === "") part.channels = tower.channels.join(", ");
    return el("li", { class: part.away ? "away" : "" },
      part.kind === "image" ? el("img", { src: part.preview, alt: "" }) : null,
      part.kind === "audio" ? el("audio", { src: part.preview, controls: true, "aria-label": part.name }) : null,
      picture ? el("img", { src: api.media(part.of, part.id, picture.modality, 128), alt: "" }) : null,
      el("span", { class: "named", title: part.name }, part.kind === "like" ? `like ${part.name}` : part.name),
      part.kind === "timeseries" ? [change("rate", "Hz", ""), change("channels", "channels", "wide")] : null,
      el("button", { type: "button", "aria-pressed": String(part.away), title: "Seek what is like it, or what is not", onclick: () => { part.away = !part.away; drawParts(); submit(); } }, part.away ? "away from it" : "like it"),
      el("button", { type: "button", "aria-label": `Remove ${part.name}`, onclick: () => { forget([part]); parts = parts.filter((other) => other !== part); drawParts(); submit(); } }, "✕"));
  }));
}

function forget(gone) {
  for (const part of gone) if (part.preview) URL.revokeObjectURL(part.preview);
}

async function take(files) {
  try {
    for (const file of files) {
      const kind = kindOf(file);
      if (kind && !accepts(kind)) throw new Error(`${file.name}: the model of ${$("index").value} knows ${named($("index").value).model.towers.map((t) => t.name).join(", ")}, and no such file.`);
      // A new picture or sound takes the place of the last one and of a sample; a signal, too.
      const part = { ...(await partOf(file)), away: false };
      forget(parts.filter((other) => other.kind === part.kind));
      parts = [...parts.filter((other) => other.kind !== part.kind && other.kind !== "like"), part];
    }
    drawParts();
    await submit();
  } catch (error) {
    problem(error);
  }
}

let recording = null;

async function toggleRecording() {
  if (recording) return recording.stop();
  const button = $("record"), said = button.querySelector("span");
  try {
    problem(null);
    recording = await record((passed) => { said.textContent = `${passed.toFixed(0)} s`; });
    button.classList.add("recording");
    button.setAttribute("aria-label", "End the recording");
    const part = { ...(await recording.part), away: false };
    forget(parts.filter((other) => other.kind === "audio"));
    parts = [...parts.filter((other) => other.kind !== "audio" && other.kind !== "like"), part];
    drawParts();
    await submit();
  } catch (error) {
    problem(error);
  } finally {
    recording = null;
    said.textContent = "";
    button.classList.remove("recording");
    button.setAttribute("aria-label", "Record a sound");
  }
}

// ------------------------------------------------------------------------------------------------ details

function show(d, hits, place) {
  const dialog = $("details"), last = hits.length - 1;
  const to = (other) => (other < 0 || other > last ? null : () => show(d, hits, other));
  const step = { before: to(place - 1), after: to(place + 1) };
  dialog.replaceChildren(details(d.name, hits[place], { like: () => like(d, hits[place]), step, close: () => dialog.close() }));
  dialog.onkeydown = (event) => {
    if (event.target.matches("audio, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") step.before?.();
    else if (event.key === "ArrowRight") step.after?.();
    else if (event.key.toLowerCase() === "m") like(d, hits[place]);
  };
  // Back to the answer that was looked at last.
  dialog.onclose = () => document.querySelector(`[data-index="${CSS.escape(d.name)}"] [data-id="${hits[place].id}"] .open`)?.focus();
  if (!dialog.open) dialog.showModal();
  dialog.focus();
}

function terminal() {
  const dialog = $("terminal");
  const lines = chosen().map((d) => {
    const asked = query(d);
    for (const part of asked.parts) if (part.data) part.data = "BASE64 OF THE FILE";
    if (!asked.parts.length) asked.parts = [{ text: "words" }];
    const json = JSON.stringify(asked).replaceAll("'", "'\\''");
    return `curl ${location.origin}/api/search -H 'content-type: application/json' \\\n  -d '${json}'`;
  });
  dialog.replaceChildren(el("div", { class: "inside" },
    el("div", { class: "bar" }, el("h2", {}, "This query for a terminal"), el("button", { type: "button", onclick: () => dialog.close() }, "Close")),
    el("pre", { tabindex: 0 }, lines.join("\n\n"))));
  dialog.showModal();
}

// ------------------------------------------------------------------------------------------------ address

const KEPT = { q: "text", away: "away", index: "index", beside: "beside", top: "top", where: "where", joint: "joint" };
const USUAL = { top: "24", joint: "auto" };

function remember() {
  const now = new URLSearchParams();
  for (const [name, id] of Object.entries(KEPT)) if ($(id).value.trim() && $(id).value !== USUAL[name]) now.set(name, $(id).value.trim());
  const stored = parts.find((part) => part.kind === "like" && !part.away);
  if (stored) { now.set("like", stored.id); now.set("of", stored.of); }
  if (filters.kept()) now.set("only", filters.kept());
  if (grouped) now.set("duplicates", $("threshold").value);
  if (`?${now}` !== location.search) history.pushState(null, "", `?${now}`);
}

async function restore() {
  const then = new URLSearchParams(location.search);
  $("text").value = then.get("q") ?? "";
  $("away").value = then.get("away") ?? "";
  $("index").value = named(then.get("index"))?.name ?? served[0].name;
  $("beside").value = named(then.get("beside"))?.name ?? "";
  $("top").value = [...$("top").options].some((o) => o.value === then.get("top")) ? then.get("top") : "24";
  $("where").value = then.get("where") ?? "";
  $("joint").value = then.get("joint") === "sum" ? "sum" : "auto";
  filters.restore(then.get("only"));
  grouped = then.has("duplicates");
  if (grouped) $("threshold").value = then.get("duplicates");
  forget(parts);
  parts = [];
  if (/^\d{1,9}-\d{1,18}$/.test(then.get("like") ?? "") && named(then.get("of"))) {
    try {
      const sample = await api.one(then.get("of"), then.get("like"));
      parts = [{ kind: "like", id: sample.id, of: then.get("of"), name: sample.text || sample.key, sample, away: false }];
    } catch (error) {
      problem(error);
    }
  }
  drawParts();
  await fit();
  await run();
}

// ------------------------------------------------------------------------------------------------ the page

function optionsSaid() {
  const where = filters.where($("where").value.trim());
  const said = [where, $("away").value.trim() ? `away from “${$("away").value.trim()}”` : null, $("top").value === "24" ? null : `${$("top").value} answers`].filter(Boolean);
  $("options-said").textContent = said.length ? `(${said.join(", ")})` : "";
}

// What can be asked depends on the towers of the models.
async function fit() {
  const known = [["text", "words"], ["image", "a picture"], ["audio", "a sound"], ["timeseries", "a signal"]].filter(([kind]) => accepts(kind));
  const [first, ...dropped] = known[0]?.[0] === "text" ? known : [null, ...known];
  const files = dropped.map(([, word]) => word).join(" or ");
  $("text").placeholder = first ? `Describe what you look for${files ? `, or drop ${files}` : ""}` : `Drop ${files}`;
  $("text").disabled = !first;
  $("away").disabled = !first;
  $("attach").hidden = !files;
  $("record").hidden = !(accepts("audio") && canRecord());
  $("drop").firstElementChild.textContent = `Drop ${files || "nothing: the models know words alone"}`;
  $("file").accept = dropped.map(([kind]) => (kind === "timeseries" ? ".npy,.csv" : `${kind}/*`)).join(",");
  for (const option of $("beside").options) option.disabled = option.value === $("index").value;
  if ($("beside").value === $("index").value) $("beside").value = "";
  $("joint-label").hidden = !chosen().some((d) => d.joint === "product");
  await filters.draw($("filters"), chosen().map((d) => d.name), () => submit({ groups: grouped }));
  $("where").placeholder = filters.example();
}

function move(event) {
  const focused = event.target.closest?.(".open");
  if (!focused) return;
  const list = focused.closest("ol"), all = [...list.querySelectorAll(".open")];
  const across = getComputedStyle(list).gridTemplateColumns.split(" ").length;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
  const target = by && all[all.indexOf(focused) + by];
  if (target) {
    event.preventDefault();
    target.focus();
  } else if (event.key.toLowerCase() === "m") focused.closest(".card").querySelector(".like").click();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === "/" && !event.target.matches("input, textarea, select")) {
    event.preventDefault();
    $("text").focus();
    $("text").select();
  } else move(event);
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const at = document.activeElement;
  submit({ groups: at?.id === "threshold" || (grouped && Boolean(at?.closest("#filters, #where"))) });
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") {
    event.preventDefault();
    document.querySelector(".open")?.focus();
  }
});
for (const id of ["index", "beside"]) $(id).addEventListener("change", async () => { await fit(); drawParts(); submit({ groups: grouped }); });
for (const id of ["top", "joint"]) $(id).addEventListener("change", () => submit());
$("where").addEventListener("change", () => submit({ groups: grouped }));
$("duplicates").addEventListener("click", () => submit({ groups: true }));
$("attach").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => { await take([...$("file").files]); $("file").value = ""; });
$("record").addEventListener("click", toggleRecording);
$("curl").addEventListener("click", () => { try { terminal(); } catch (error) { problem(error); } });
for (const dialog of document.querySelectorAll("dialog")) dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => { if (hasFiles(event)) { event.preventDefault(); $("drop").hidden = false; } });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!hasFiles(event)) return;
  event.preventDefault();
  take([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) {
    event.preventDefault();
    take([...event.clipboardData.files]);
  }
});
window.addEventListener("popstate", restore);

try {
  served = await api.indices();
  for (const d of served) {
    $("index").append(el("option", { value: d.name }, d.name));
    $("beside").append(el("option", { value: d.name }, d.name));
  }
  $("beside").prepend(el("option", { value: "", selected: true }, "none"));
  $("beside-label").hidden = served.length < 2;
  await restore();
  $("text").focus();
} catch (error) {
  problem(error);
}
