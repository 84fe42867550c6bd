"use strict";
const PAGE = 12;
const data = {};
for (const block of document.querySelectorAll("script[data-run]")) {
  data[block.dataset.run] = JSON.parse(block.textContent);
}
const number = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));
const percent = (share) => (share === null ? "–" : `${Number((100 * share).toPrecision(share < 0.1 ? 2 : 3))} %`);
const make = (tag, text, kind) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const rowOf = (run, latent) => data[run] ? data[run].table.latent.indexOf(latent) : -1;
const titleOf = (run, latent) => {
  const row = rowOf(run, latent);
  return (row >= 0 && data[run].table.name[row]) || "no name";
};
const labelOf = (table, row) => (table.label[row] < 0 ? "" : table.labels[table.label[row]]);

// One image, enlarged, with the shown latents that are active in it.
const light = document.getElementById("light");
const frame = light.querySelector(".frame");
const outline = light.querySelector("path");
let opened = null;
const drawnIn = (key, latent) => {
  const path = document.querySelector(`button.shot[data-key="${key}"][data-latent="${latent}"] path`);
  return path ? path.getAttribute("d") : "";
};
function open(shot) {
  const card = shot.closest(".card");
  const run = card.closest(".run").id;
  const key = shot.dataset.key;
  opened = shot;
  light.querySelector(".picture").className = `picture ${key}`;
  const drawn = card.closest(".latents").querySelector("svg.heat");
  frame.querySelector("svg").setAttribute("viewBox", drawn ? drawn.getAttribute("viewBox") : "0 0 1 1");
  light.querySelector(".what").textContent = shot.dataset.caption;
  const fires = (data[run] && data[run].fires[key]) || [];
  light.querySelector(".here").hidden = !fires.length;
  const list = light.querySelector("ul");
  list.replaceChildren(...fires.map(([latent, value, path]) => {
    const item = make("li");
    const row = rowOf(run, latent);
    const label = row < 0 || data[run].table.name[row] ? "" : labelOf(data[run].table, row);
    const button = make("button", `${titleOf(run, latent)} · latent ${latent}${label ? ` (${label})` : ""} `);
    button.type = "button";
    button.append(make("span", number(value)));
    button.addEventListener("click", () => show(run, latent, path || drawnIn(key, latent), number(value)));
    item.dataset.latent = latent;
    item.append(button);
    return item;
  }));
  const own = Number(shot.dataset.latent);
  show(run, own, drawnIn(key, own), shot.dataset.value);
  if (!light.open) light.showModal();
}
function show(run, latent, path, value) {
  outline.setAttribute("d", path);
  light.querySelector("h3").textContent = titleOf(run, latent);
  light.querySelector(".what").textContent =
    `latent ${latent}, activation ${value} · ${opened.dataset.caption}`;
  for (const item of light.querySelectorAll("li")) {
    if (Number(item.dataset.latent) === latent) item.setAttribute("aria-current", "true");
    else item.removeAttribute("aria-current");
  }
}
function step(by) {
  const shots = [...opened.closest(".card").querySelectorAll("button.shot")].filter((shot) => shot.dataset.key);
  open(shots[(shots.indexOf(opened) + by + shots.length) % shots.length]);
}
for (const shot of document.querySelectorAll("button.shot")) {
  if (shot.dataset.key) shot.addEventListener("click", () => open(shot));
  else shot.disabled = true;
}
light.querySelector(".close").addEventListener("click", () => light.close());
light.querySelector(".before").addEventListener("click", () => step(-1));
light.querySelector(".after").addEventListener("click", () => step(1));
light.addEventListener("click", (event) => { if (event.target === light) light.close(); });
light.addEventListener("close", () => { if (opened) opened.focus(); });
light.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});

// All latents: find, sort, and go to a card or the command.
const tables = {};
for (const part of document.querySelectorAll(".all")) {
  const run = part.dataset.run;
  const table = data[run].table;
  const body = part.querySelector("tbody");
  const find = part.querySelector("input");
  const said = part.querySelector(".count");
  const longer = part.querySelector(".longer");
  const every = table.latent.map((_, row) => row);
  const words = every.map((row) => `${table.latent[row]} ${table.name[row] || "no name"} ${labelOf(table, row)}`.toLowerCase());
  let sorted = every;
  let length = PAGE;
  let marked = null;
  const draw = () => {
    const asked = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = sorted.filter((row) => asked.every((word) =>
      /^\d+$/.test(word) ? String(table.latent[row]) === word : words[row].includes(word)));
    const listed = every.length < table.of ? `the ${every.length.toLocaleString("en")} best understood of ` : "";
    said.textContent = `${rows.length.toLocaleString("en")} of ${listed}${table.of.toLocaleString("en")}`;
    longer.hidden = rows.length <= length;
    body.replaceChildren(...rows.slice(0, length).map((row) => {
      const line = make("tr", undefined, table.latent[row] === marked ? "on" : "");
      const latent = table.latent[row];
      const first = make("td");
      if (document.getElementById(`${run}-l${latent}`)) {
        const link = make("a", latent);
        link.href = `#${run}-l${latent}`;
        first.append(link);
      } else first.textContent = latent;
      line.append(
        first,
        make("td", table.name[row] || "no name", table.name[row] ? "words" : "words noname"),
        make("td", labelOf(table, row), "words"),
        make("td", table.share[row] === null ? "–" : percent(table.share[row])),
        make("td", table.images[row].toLocaleString("en")),
        make("td", percent(table.density[row])),
        make("td", number(table.mean[row])),
        make("td", number(table.max[row])),
      );
      return line;
    }));
    hint(part.querySelector(".scroll"));
  };
  find.addEventListener("input", () => { length = PAGE; marked = null; draw(); });
  longer.addEventListener("click", () => { length = 4 * length; draw(); });
  for (const button of part.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const by = button.dataset.by;
      const text = by === "name" || by === "label";
      const head = button.closest("th");
      const up = head.ariaSort ? head.ariaSort === "descending" : text || by === "latent";
      for (const other of part.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = by === "label" ? (row) => labelOf(table, row) || null : (row) => table[by][row];
      sorted = [...every].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return (up ? 1 : -1) * (text ? x.localeCompare(y) : x - y);
      });
      draw();
    });
  }
  part.hidden = false;
  tables[run] = (latent) => {
    find.value = String(latent);
    marked = latent;
    draw();
    part.scrollIntoView();
    find.focus({ preventScroll: true });
  };
  draw();
}
function go(run, latent) {
  const card = document.getElementById(`${run}-l${latent}`);
  if (card) {
    for (let box = card.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    card.scrollIntoView();
    card.focus({ preventScroll: true });
  } else if (tables[run]) tables[run](latent);
}
for (const link of document.querySelectorAll("a.to")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    go(link.dataset.run, Number(link.dataset.latent));
  });
}

// A dot of the scatter plot tells which latent it is.
for (const drawing of document.querySelectorAll(".drawing[data-axes]")) {
  const run = drawing.dataset.run;
  if (!data[run]) continue;
  const axes = JSON.parse(drawing.dataset.axes);
  const table = data[run].table;
  const place = (value, [low, high], log) => log
    ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  const spots = table.latent.map((latent, row) => [
    axes.box[0] + axes.box[2] * place(table.density[row], axes.x, axes.log[0]),
    axes.box[1] + axes.box[3] * (1 - place(table.mean[row], axes.y, axes.log[1])),
    row,
  ]).filter((spot) => table.density[spot[2]] > 0);
  const said = drawing.parentElement.querySelector(".dot");
  const ring = make("span", undefined, "ring");
  drawing.addEventListener("click", (event) => {
    const box = drawing.querySelector("svg").getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null;
    let least = 20 ** 2;
    for (const spot of spots) {
      const away = (spot[0] * box.width - x) ** 2 + (spot[1] * box.height - y) ** 2;
      if (away < least) [best, least] = [spot, away];
    }
    if (!best) return;
    const [left, top, row] = best;
    ring.style.left = `${100 * left}%`;
    ring.style.top = `${top * box.height}px`;
    drawing.append(ring);
    const latent = table.latent[row];
    const button = make("button", `latent ${latent}`);
    button.type = "button";
    button.addEventListener("click", () => go(run, latent));
    const label = labelOf(table, row);
    said.replaceChildren(button, ` · ${table.name[row] || "no name"}${label ? ` · ${label} ${percent(table.share[row])}` : ""} · in ${table.images[row].toLocaleString("en")} images`);
  });
}

// A table that is cut off says so.
function hint(scroll) {
  scroll.classList.toggle("wide", scroll.scrollWidth > scroll.clientWidth + 1);
}
const hints = () => document.querySelectorAll(".scroll").forEach(hint);
addEventListener("resize", hints);
document.addEventListener("toggle", hints, true);
hints();
