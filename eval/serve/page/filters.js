// Filters on the columns of the metadata: what was chosen of them becomes words of the filter language.

import * as api from "./api.js";
import { el, number } from "./draw.js";

const MOST_COLUMNS = 12;
let columns = []; // of the indices that are asked
let chosen = {}; // name -> {is: value} or {from, to}

const quoted = (text) => `'${String(text).replaceAll("'", "''")}'`;
const name = (text) => (/^[^\W\d][\w.-]*$/u.test(text) && !/^(and|or|not|in|is|null|true|false)$/i.test(text) ? text : quoted(text));

function clauses(column, wish) {
  if (!wish) return [];
  if (wish.is !== undefined) return [wish.is === null ? `${name(column)} is null` : `${name(column)} = ${typeof wish.is === "boolean" ? wish.is : quoted(wish.is)}`];
  return [wish.from ? `${name(column)} >= ${wish.from}` : null, wish.to ? `${name(column)} <= ${wish.to}` : null].filter(Boolean);
}

// What was chosen and what was written, together; null where neither was.
export function where(written) {
  const said = Object.entries(chosen).flatMap(([column, wish]) => clauses(column, wish));
  if (written) said.push(said.length ? `(${written})` : written);
  return said.length ? said.join(" and ") : null;
}

export const kept = () => (Object.keys(chosen).length ? JSON.stringify(chosen) : "");

export function restore(text) {
  chosen = {};
  try {
    for (const [column, wish] of Object.entries(JSON.parse(text || "{}"))) {
      if (wish && typeof wish === "object" && ["is", "from", "to"].some((key) => key in wish)) chosen[column] = wish;
    }
  } catch {
    chosen = {}; // an address that somebody wrote
  }
}

// An example of a filter in words, of a column that there is.
export function example() {
  const column = columns.find((other) => other.values.length) ?? columns.find((other) => other.low !== null);
  if (!column) return "key = '000012'";
  return column.low === null ? `${name(column.name)} = ${typeof column.values[0].value === "boolean" ? column.values[0].value : quoted(column.values[0].value)}` : `${name(column.name)} >= ${column.low}`;
}

// Reads the columns of some indices, and draws a field for each that has values to choose from.
export async function draw(place, indices, changed) {
  const found = await Promise.all(indices.map((index) => api.columns(index).catch(() => [])));
  columns = [];
  for (const column of found.flat()) {
    const same = columns.find((other) => other.name === column.name);
    if (!same) columns.push({ ...column, values: [...column.values] });
    else for (const value of column.values) if (!same.values.some((other) => other.value === value.value)) same.values.push(value);
  }
  for (const name of Object.keys(chosen)) if (!columns.some((column) => column.name === name)) delete chosen[name];
  const tells = (column) => column.values.length > 1 || (column.values.length && column.lacking) || column.low !== column.high;
  const useful = columns.filter((column) => chosen[column.name] || tells(column));
  useful.sort((one, other) => Boolean(chosen[other.name]) - Boolean(chosen[one.name])); // what was chosen can be taken back
  place.replaceChildren(...useful.slice(0, MOST_COLUMNS).map((column) => (column.low === null ? choice(column, changed) : range(column, changed))));
}

function wish(column, change, changed) {
  const next = { ...chosen[column.name], ...change };
  for (const key of Object.keys(next)) if (next[key] === undefined || next[key] === "") delete next[key];
  if (Object.keys(next).length) chosen[column.name] = next;
  else delete chosen[column.name];
  changed();
}

function choice(column, changed) {
  const now = chosen[column.name]?.is;
  const options = [{ value: undefined, label: "any" }, ...column.values.map(({ value, count }) => ({ value, label: `${value === "" ? "empty" : value} (${number(count)})` }))];
  if (column.lacking) options.push({ value: null, label: `no value (${number(column.lacking)})` });
  const select = el("select", { "data-column": column.name, onchange: (event) => wish(column, { is: options[event.target.selectedIndex].value }, changed) },
    options.map((option) => el("option", { selected: option.value === now }, option.label)));
  return el("label", { class: "field" }, column.name, select);
}

function range(column, changed) {
  const input = (key, label, end) => el("input", {
    type: "number", step: "any", placeholder: number(end), value: chosen[column.name]?.[key] ?? null, "aria-label": `${column.name} ${label}`,
    "data-column": column.name, onchange: (event) => wish(column, { [key]: event.target.value }, changed),
  });
  return el("div", { class: "field range" }, el("span", {}, column.name), el("span", {}, input("from", "from", column.low), "–", input("to", "to", column.high)));
}
