// Values under the pointer, or by arrow keys, of the charts of a page that stands alone. Without it nothing is lost:
// the numbers stand in a table below each chart. Text enters as text.
"use strict";

const NS = "http://www.w3.org/2000/svg";
const said = (value) => {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1e5 || Math.abs(value) < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
};
const element = (name, text, className) => {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
};

function place({ low, high, from, to, log }, value) {
  const at = log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  return from + at * (to - from);
}

// What one chart shows: lines by their x, points by their distance.
function targets(chart) {
  if (chart.points) {
    return chart.points.map(({ x, y, name, said: text }) => ({ x, y, head: text, rows: [{ name }], dots: [[x, y]] }));
  }
  const found = new Map();
  chart.lines.forEach((line, order) => line.x.forEach((x, i) => {
    if (line.y[i] === null) return;
    if (!found.has(x)) found.set(x, { x: place(chart.x, x), y: null, head: `${chart.x.name} ${said(x)}`, rows: [], dots: [] });
    const target = found.get(x), range = line.low && line.low[i] !== null && line.low[i] !== line.high[i];
    target.rows.push({ name: line.name, value: said(line.y[i]), range: range ? `${said(line.low[i])} … ${said(line.high[i])}` : "", colour: line.colour, order });
    target.dots.push([target.x, place(chart.y, line.y[i]), line.colour]);
  }));
  return [...found.values()].sort((a, b) => a.x - b.x);
}

function attach(svg) {
  const all = targets(JSON.parse(svg.dataset.chart));
  if (!all.length) return;
  const figure = svg.closest("figure"), box = element("div", "", "tip"), layer = document.createElementNS(NS, "g");
  box.hidden = true;
  figure.append(box);
  svg.append(layer);
  // The browser would show the title as a tip of its own, over ours.
  svg.removeAttribute("aria-labelledby");
  svg.setAttribute("aria-label", [...svg.querySelectorAll(":scope > title, :scope > desc")].map((n) => n.textContent).join(". "));
  svg.querySelector(":scope > title")?.remove();
  svg.setAttribute("tabindex", "0");
  let current = -1;

  function show(index) {
    current = index;
    const target = all[index], view = svg.viewBox.baseVal, shown = svg.getBoundingClientRect(), outer = figure.getBoundingClientRect();
    box.replaceChildren(element("b", target.head));
    for (const row of target.rows) {
      const line = element("div", "");
      if (row.colour !== undefined) line.append(element("i", "", `c${row.colour}`));
      line.append(element("span", row.name), element("strong", row.value ?? ""), element("small", row.range ?? ""));
      box.append(line);
    }
    layer.replaceChildren(...target.dots.map(([x, y, colour]) => {
      const dot = document.createElementNS(NS, "circle");
      for (const [key, value] of Object.entries({ cx: x, cy: y, r: 4, class: colour === undefined ? "ring" : `dot c${colour}` })) dot.setAttribute(key, value);
      return dot;
    }));
    if (target.y === null) {
      const guide = document.createElementNS(NS, "line");
      for (const [key, value] of Object.entries({ class: "guide", x1: target.x, x2: target.x, y1: 8, y2: view.height - 34 })) guide.setAttribute(key, value);
      layer.prepend(guide);
    }
    box.hidden = false;
    const scale = shown.width / view.width, x = shown.left - outer.left + target.x * scale;
    const left = x + 12 + box.offsetWidth <= outer.width ? x + 12 : Math.max(0, x - 12 - box.offsetWidth);
    box.style.left = `${Math.min(left, Math.max(0, outer.width - box.offsetWidth))}px`;
    box.style.top = `${shown.top - outer.top + (target.y === null ? 8 : target.y * scale + 10)}px`;
  }
  function hide() {
    current = -1;
    box.hidden = true;
    layer.replaceChildren();
  }
  svg.addEventListener("pointermove", (event) => {
    const shown = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / shown.width;
    const x = (event.clientX - shown.left) * scale, y = (event.clientY - shown.top) * scale;
    const far = (target) => (target.y === null ? Math.abs(target.x - x) : Math.hypot(target.x - x, target.y - y));
    let best = 0;
    all.forEach((target, i) => { if (far(target) < far(all[best])) best = i; });
    if (far(all[best]) < (all[best].y === null ? Infinity : 24)) show(best);
    else hide();
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") show(Math.min(all.length - 1, current + 1));
    else if (event.key === "ArrowLeft") show(Math.max(0, current - 1));
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });
}

for (const svg of document.querySelectorAll("svg[data-chart]")) attach(svg);
