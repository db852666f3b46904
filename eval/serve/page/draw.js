// Elements, answers as cards, sounds and signals as plots. Text enters as text: nothing here parses markup.

import * as api from "./api.js";

const SVG = "http://www.w3.org/2000/svg";

export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

export const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 3 });
// Whether scores are of Symile's product instead of cosines.
let product = false;
export const scoresAre = (joint) => { product = joint === "product"; };

export const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

const seconds = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(3).replace(/\.?0+$/, "")) + " s";

// Channels above each other, each scaled to itself, from the least to the greatest value of every column.
export function drawPlot(plot, { most, axis }) {
  const channels = plot.channels.slice(0, most);
  const width = 600, left = axis ? 84 : 0, row = channels.length > 1 ? 44 : 110;
  const height = row * channels.length, bottom = axis ? 20 : 0;
  const lines = channels.map((channel, i) => {
    const least = Math.min(...channel.low), greatest = Math.max(...channel.high), span = greatest - least || 1;
    const y = (value) => (row * (i + 0.92 - 0.84 * ((value - least) / span))).toFixed(1);
    const step = (width - left) / Math.max(1, channel.low.length - 1);
    const x = (j) => (left + j * step).toFixed(1);
    const top = channel.high.map((value, j) => `${x(j)} ${y(value)}`);
    const under = channel.low.map((value, j) => `${x(j)} ${y(value)}`).reverse();
    return svg("path", { class: "wave", d: `M${[...top, ...under].join("L")}Z` });
  });
  const names = left ? channels.flatMap((channel, i) => {
    const [least, greatest] = [Math.min(...channel.low), Math.max(...channel.high)].map((value) => String(Number(value.toPrecision(3))));
    return [svg("text", { x: 4, y: row * (i + 0.5) }, channel.name.slice(0, 11)), svg("text", { class: "span", x: 4, y: row * (i + 0.5) + 13 }, `${least} … ${greatest}`)];
  }) : [];
  const marks = [];
  if (axis) {
    marks.push(svg("line", { class: "axis", x1: left, x2: width, y1: height + 2, y2: height + 2 }));
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
      const at = left + share * (width - left);
      marks.push(svg("text", { x: at, y: height + 15, "text-anchor": anchor }, share ? seconds(share * plot.seconds) : "0"));
    }
  }
  const label = `${plural(plot.channels.length + plot.omitted, "channel")}, ${seconds(plot.seconds)}`;
  return svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height + bottom}`, role: "img", "aria-label": label }, lines, names, marks);
}

const waiting = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) {
      waiting.unobserve(target);
      target.load();
    }
  }
}, { rootMargin: "300px" });

function drawing(index, sample, medium, { most, axis }) {
  const place = el("div", { class: "drawing" });
  place.load = async () => {
    try {
      const plot = await api.plot(index, sample.id, medium.modality);
      const left = plot.channels.length - most + plot.omitted;
      const facts = [seconds(plot.seconds), `${number(plot.rate)} Hz`, plot.units && axis ? plot.units : null, left > 0 ? `${left} more channels` : null];
      place.replaceChildren(drawPlot(plot, { most, axis }));
      if (axis) place.append(el("p", { class: "facts" }, facts.filter(Boolean).join(" · ")));
    } catch (error) {
      place.replaceChildren(el("p", { class: "facts bad" }, error.message));
    }
  };
  // Within the dialog at once: what lies below its edge would never be seen to come near.
  if (axis) place.load();
  else waiting.observe(place);
  return place;
}

const shown = (sample) => sample.text || sample.key;

function picture(index, sample, medium, side) {
  const image = el("img", { alt: shown(sample), loading: "lazy", decoding: "async", src: api.media(index, sample.id, medium.modality, side) });
  image.addEventListener("error", () => image.replaceWith(el("div", { class: "empty" }, "this picture cannot be read")));
  return image;
}

function player(index, sample, medium) {
  return el("audio", { controls: true, preload: "none", src: api.media(index, sample.id, medium.modality), "aria-label": `Sound of ${shown(sample)}` });
}

// Only one sound at a time.
document.addEventListener("play", (event) => {
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
}, true);

export const isLong = (sample) => !sample.media.some((medium) => medium.kind === "image");

function card(index, sample, { best, like, open }) {
  const first = sample.media[0];
  const opener = el("button", { type: "button", class: "open", "aria-label": `Details of ${shown(sample)}`, onclick: open });
  if (!first) opener.append(el("p", { class: "said only" }, shown(sample)));
  else if (first.kind === "image") opener.append(picture(index, sample, first, 384));
  else opener.append(drawing(index, sample, first, { most: 4, axis: false }));
  const sound = sample.media.find((medium) => medium.kind === "audio");
  const tags = tagsOf(sample);
  return el("li", { class: "card", "data-id": sample.id },
    opener,
    sound ? player(index, sample, sound) : null,
    first ? el("p", { class: "said" }, shown(sample)) : null,
    tags.length ? el("div", { class: "tags" }, tags.map(([title, said]) => el("span", { title }, said))) : null,
    el("div", { class: "foot" }, sample.score === undefined ? null : score(sample.score, best),
      el("button", { type: "button", class: "like", onclick: like }, "More like this")));
}

// Short metadata. What repeats the caption says nothing, nor does how a signal is stored.
function tagsOf(sample) {
  const known = new Set([shown(sample).toLowerCase()]), tags = [];
  const stored = sample.media.some((medium) => medium.kind === "timeseries") ? ["rate", "scale", "units"] : [];
  for (const [key, value] of Object.entries(sample.metadata)) {
    const word = typeof value === "string" ? value : `${key} ${value}`;
    if (value === null || typeof value === "object" || word.length > 40 || stored.includes(key) || known.has(word.toLowerCase())) continue;
    known.add(word.toLowerCase());
    tags.push([`${key}: ${value}`, word]);
  }
  return tags.slice(0, 3);
}

function written(value) {
  if (Array.isArray(value) && value.every((item) => typeof item !== "object")) return value.join(", ");
  return typeof value === "object" && value !== null ? JSON.stringify(value, null, 1) : String(value);
}

function score(value, best) {
  const bar = el("i");
  bar.style.setProperty("--share", Math.max(0, Math.min(1, best > 0 ? value / best : 0)));
  return el("div", { class: "score", title: `${product ? "score of the product" : "cosine"} ${value}` }, bar, value.toFixed(3));
}

export function cards(index, samples, { like, open }) {
  const best = Math.max(...samples.map((sample) => sample.score ?? 0));
  const found = samples.map((sample, place) => card(index, sample, { best, like: () => like(sample), open: () => open(place) }));
  return el("ol", { class: samples.some(isLong) ? "hits long" : "hits" }, found);
}

export function groups(index, found, { like, open }) {
  const said = `${plural(found.count, "group")} of near-duplicates among ${plural(found.looked_at, "sample")}; ${number(found.redundant)} beyond the first of each group.`;
  const more = found.count > found.groups.length ? el("p", { class: "facts" }, `${number(found.count - found.groups.length)} smaller groups are not shown.`) : null;
  return [el("p", { class: "facts" }, said), found.groups.map((group) => el("section", { class: "group" },
    el("h3", {}, plural(group.count, "sample") + (group.count > group.samples.length ? `, the first ${group.samples.length}` : "")),
    cards(index, group.samples, { like, open: (place) => open(group.samples, place) }))), more];
}

export function modelFacts(d) {
  const recall = d.recall_at_10 === null ? "" : ` · recall@10 ${d.recall_at_10.toFixed(3)} against exact search`;
  const things = { image: "picture", text: "text", audio: "sound", timeseries: "signal" }[d.kind] ?? d.kind;
  return el("p", { class: "facts" }, `${plural(d.count, things)}${things === d.modality || d.modality === d.kind ? "" : ` (${d.modality})`} · made by the model `, el("b", {}, d.model.name),
    ` (${d.model.hash}) · ${d.dim} dimensions · ${d.type}${recall}`,
    d.readable ? "" : el("span", { class: "bad" }, " · pictures and sounds cannot be shown: its shards are not there, or changed"));
}

export function details(index, sample, { like, step, close }) {
  const media = sample.media.map((medium) =>
    medium.kind === "image" ? picture(index, sample, medium, 1600)
      : [drawing(index, sample, medium, { most: 16, axis: true }), medium.kind === "audio" ? player(index, sample, medium) : null]);
  const facts = Object.entries({ key: sample.key, shard: sample.shard, id: sample.id, score: sample.score, ...sample.metadata })
    .filter(([, value]) => value !== undefined)
    .flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, written(value))]);
  return el("div", { class: "inside" },
    el("div", { class: "bar" }, el("h2", {}, sample.key),
      el("button", { type: "button", "aria-label": "Previous answer", disabled: !step.before, onclick: step.before }, "←"),
      el("button", { type: "button", "aria-label": "Next answer", disabled: !step.after, onclick: step.after }, "→"),
      el("button", { type: "button", class: "primary", onclick: like }, "More like this"),
      el("button", { type: "button", "aria-label": "Close", onclick: close }, "✕")),
    el("div", { class: media.length ? "sides" : "sides single" },
      media.length ? el("div", { class: "media" }, media) : null,
      el("div", {}, sample.text ? el("p", { class: "whole" }, sample.text) : null, el("dl", {}, facts))));
}
