"use strict";
// Texts come from file and class names of others: they are only ever set as textContent.
const content = JSON.parse(document.getElementById("content").textContent);
const items = content.items;
const at = (id) => document.getElementById(id);
const decisions = new Map(); // index -> {kind, label}
const past = []; // [index, decision before]
let current = 0;
const unsaved = new Set(); // names of files that lack a decision

function decide(kind, label) {
  if (!items.length) return;
  past.push([current, decisions.get(current)]);
  decisions.set(current, { kind, label });
  touch();
  move(1);
}

function touch() {
  for (const name of ["fixes.csv", "exclude.csv"]) unsaved.add(name);
}

function relabel(name) {
  // A label that is the one it has is kept.
  decide(name === items[current].label ? "keep" : "relabel", name);
}

function undo() {
  if (!past.length) return;
  const [index, before] = past.pop();
  if (before === undefined) decisions.delete(index);
  else decisions.set(index, before);
  current = index;
  touch();
  show();
}

function move(step) {
  current = Math.min(Math.max(current + step, 0), items.length - 1);
  show();
}

function row(cells) {
  const line = document.createElement("tr");
  for (const cell of cells) line.insertCell().textContent = cell;
  return line;
}

function words(decision) {
  if (!decision) return "not decided yet";
  return decision.kind === "relabel" ? "relabel as " + decision.label : decision.kind;
}

function picture(image, source, text) {
  image.hidden = !source;
  if (source) image.src = source;
  image.alt = text;
}

function show() {
  const item = items[current];
  at("review").hidden = !item;
  if (item) {
    picture(at("image"), item.thumb, item.path);
    picture(at("twin"), item.twin, "the image that it nearly equals");
    at("path").textContent = item.path;
    at("reason").textContent = item.reason;
    at("label").textContent = item.label;
    at("suggested").textContent = item.suggested;
    at("votes").textContent = item.votes ? "members say: " + item.votes : "";
    at("guesses").replaceChildren(
      ...item.guesses.map((g, i) => row([i + 1, g.name, g.prob.toFixed(4), g.votes])));
    at("classes").value = "";
    const decision = decisions.get(current);
    at("state").textContent = current + 1 + " of " + items.length + ": " + words(decision);
    at("state").className = decision ? decision.kind : "";
  }
  strip();
  count();
}

function strip() {
  const first = Math.max(0, Math.min(current - 5, items.length - 12));
  at("strip").replaceChildren(...items.slice(first, first + 12).map((item, i) => {
    const button = document.createElement("button");
    const decision = decisions.get(first + i);
    button.className = decision ? decision.kind : "";
    button.title = item.path;
    button.setAttribute("aria-current", first + i === current);
    const image = document.createElement("img");
    if (item.thumb) image.src = item.thumb;
    image.alt = item.path;
    button.append(image);
    button.onclick = () => { current = first + i; show(); };
    return button;
  }));
}

function tally(kind) {
  return [...decisions.values()].filter((d) => d.kind === kind).length;
}

function count() {
  const earlier = content.earlier.fixes.length + content.earlier.dropped.length;
  at("count").textContent = items.length
    ? `${decisions.size} of ${items.length} decided: ${tally("keep")} kept, ` +
      `${tally("relabel")} relabelled, ${tally("drop")} dropped` +
      (earlier ? `; ${earlier} changes of the run's own lists are in the files, too` : "")
    : "No label looks wrong.";
  const files = [];
  if (fixes().length) files.push("data.fixes=fixes.csv");
  if (drops().length) files.push("data.exclude=exclude.csv");
  at("use").textContent = files.length
    ? "A new run with them: foldrace run CONFIG " + files.map((f) => "--set " + f).join(" ") : "";
  at("save-fixes").disabled = !fixes().length;
  at("save-drops").disabled = !drops().length;
}

function fixes() {
  // path -> label as the training data write it; a later decision replaces an earlier list's.
  const found = new Map(content.earlier.fixes);
  for (const [index, { kind, label }] of decisions) {
    if (kind === "relabel") found.set(items[index].path, content.fixed[label] ?? label);
    if (kind === "drop") found.delete(items[index].path);
  }
  return [...found];
}

function drops() {
  const found = new Set(content.earlier.dropped);
  for (const [index, { kind }] of decisions) if (kind === "drop") found.add(items[index].path);
  return [...found];
}

function cell(text) {
  return /[",\r\n]|^\s|\s$/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
}

function bytes(text) {
  // File names that are no UTF-8 have their bytes as U+DC80 to U+DCFF: they get them back.
  const parts = text.split(/([\udc80-\udcff](?<![\ud800-\udbff].))/);
  return parts.map((part, i) =>
    i % 2 ? Uint8Array.of(part.charCodeAt(0) - 0xdc00) : new TextEncoder().encode(part));
}

function table(lines) {
  return lines.map((line) => line.map(cell).join(",") + "\n").join("");
}

function fixesTable() {
  const columns = content.columns;
  const labels = (label) => columns.length === 1
    ? [label] : columns.map((name) => (name === label ? "1" : "0"));
  return table([["image_path", ...columns], ...fixes().map(([p, l]) => [p, ...labels(l)])]);
}

function dropsTable() {
  return table([["image_path"], ...drops().map((path) => [path])]);
}

function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(bytes(text), { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  unsaved.delete(name);
}

const actions = {
  k: () => decide("keep"),
  r: () => items.length && relabel(items[current].suggested),
  d: () => decide("drop"),
  u: undo,
  backspace: undo,
  arrowleft: () => move(-1),
  arrowright: () => move(1),
  s: () => fixes().length && download("fixes.csv", fixesTable()),
  x: () => drops().length && download("exclude.csv", dropsTable()),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  const guess = items.length ? items[current].guesses[Number(event.key) - 1] : undefined;
  const action = guess ? () => relabel(guess.name) : actions[event.key.toLowerCase()];
  if (!action || (event.repeat && !event.key.startsWith("Arrow"))) return;
  event.preventDefault();
  action();
});
addEventListener("beforeunload", (event) => {
  const lost = (unsaved.has("fixes.csv") && fixes().length) ||
    (unsaved.has("exclude.csv") && drops().length);
  if (lost) event.preventDefault();
});

for (const [id, key] of [["keep", "k"], ["relabel", "r"], ["drop", "d"], ["undo", "u"],
  ["back", "arrowleft"], ["next", "arrowright"], ["save-fixes", "s"], ["save-drops", "x"]]) {
  at(id).onclick = () => { actions[key](); at(id).blur(); };
}
const choice = at("classes");
for (const name of ["", ...content.classes]) {
  const option = document.createElement("option");
  option.value = name;
  option.textContent = name || "choose …";
  choice.append(option);
}
choice.onchange = () => {
  const name = choice.value;
  choice.blur();
  if (name) relabel(name);
};
show();
