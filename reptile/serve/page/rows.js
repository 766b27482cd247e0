/** The page at / of bundles that take no images: rows are typed or clicked, learnt and predicted. */

import { BackgroundModel, BackgroundRegressor } from "./client/background.js";
import { InputError } from "./client/bundle.js";
import { ServiceModel, ServiceRegressor } from "./client/service.js";
import { Chart } from "./chart.js";
import { curveInWords, drawCurve } from "./curve.js";
import { $, begin, fail, openModel, place, say } from "./frame.js";

const MOST_NUMBERS = 12; // of an input without named columns
const ROWS = 3; // to begin with
const WIDE = 2.5; // deviations about the mean that the chart shows
const UNKNOWN = "other"; // a category that is in no list

const rows = [];
let manifest;
let inputs; // columns
let targets; // columns; of a classifier one of labels
let chart = null;
let task = null; // what was learnt last
let points = []; // of the chart
let waiting = false;
let running = false;

begin(build);

function build(found) {
  manifest = found;
  const { kind, columns, targets: values, outputs, image_shape: shape } = manifest.task;
  const size = shape.reduce((product, n) => product * n, 1);
  const numbered = (name, count) =>
    Array.from({ length: count }, (_, i) => ({
      name: count > 1 ? `${name}${i}` : name,
      kind: "number",
    }));
  inputs = columns ?? numbered("x", size);
  targets = regresses(kind) ? (values ?? numbered("y", outputs)) : [{ name: "label", kind: "label" }];
  const named = targets.map(({ name }) => name).join(", ");
  const many = inputs.length > MOST_NUMBERS && !columns;
  const given = many ? `${size} numbers` : inputs.map(({ name }) => name).join(", ");
  const steps = manifest.inner ? `, ${manifest.inner.steps} steps of learning` : "";
  $("about").textContent = `${manifest.name}: ${named} from ${given}${steps}.`;
  if (many) {
    $("hint").textContent =
      `This bundle takes inputs of ${size} numbers, too many to type: use it over HTTP or from a ` +
      "program.";
    $("add-row").hidden = true;
    return;
  }
  const [x] = inputs;
  const clicked = inputs.length === 1 && x.kind !== "category" && regresses(kind) && outputs === 1;
  $("hint").textContent =
    (clicked ? "Click where a point of the function lies, or type it below. " : "") +
    `Rows with ${named} are learnt; where it is empty it is predicted.` +
    (regresses(kind) && manifest.learner === "closed_form"
      ? " A value lies in its interval with a probability of 95 %."
      : "") +
    (columns ? " Other cells may be empty: a value is missing." : "") +
    ([...inputs, ...targets].some(({ kind }) => kind === "date") ? " Dates are UTC." : "");
  $("rows").tHead.replaceChildren(heading());
  for (let i = 0; i < (clicked ? 1 : ROWS); i++) {
    addRow();
  }
  $("add-row").addEventListener("click", () => addRow().focus());
  $("rows").addEventListener("change", learn);
  for (const radio of document.getElementsByName("where")) {
    radio.addEventListener("change", learn);
  }
  if (clicked) {
    document.querySelector("main").classList.add("charted");
    $("chart").hidden = false;
    chart = new Chart($("chart"), axis(x), axis(targets[0]), addPoint, removePoint);
    chart.draw([], []);
  }
}

const regresses = (kind) => kind === "regression";

function heading() {
  const row = document.createElement("tr");
  for (const name of [...inputs, ...targets].map((column) => column.name).concat("predicted", "")) {
    const cell = row.appendChild(document.createElement("th"));
    cell.scope = "col";
    cell.textContent = name;
  }
  row.lastChild.innerHTML = '<span class="hidden">Remove</span>';
  return row;
}

/** How a column is drawn and written: about three digits of its deviation. */
function axis({ name, kind, mean = 0, deviation = 2 }) {
  const digits = Math.min(20, Math.max(0, 2 - Math.floor(Math.log10(deviation))));
  return {
    name,
    range: [mean - WIDE * deviation, mean + WIDE * deviation],
    show: (value) =>
      kind === "date" ? dateOf(value).replace("T", " ") : String(Number(value.toFixed(digits))),
  };
}

const dateOf = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 19);

/** A row of the table. */
class Row {
  constructor() {
    this.line = document.createElement("tr");
    this.cells = [...inputs, ...targets].map(field);
    this.output = document.createElement("output");
    this.button = document.createElement("button");
    this.button.type = "button";
    this.button.className = "remove";
    this.button.textContent = "×";
    this.button.addEventListener("click", () => {
      const place = rows.indexOf(this);
      removeRow(this);
      (rows[Math.min(place, rows.length - 1)]?.button ?? $("add-row")).focus();
    });
    for (const part of [...this.cells, this.output, this.button]) {
      this.line.appendChild(document.createElement("td")).append(part);
    }
  }

  number(number) {
    [...inputs, ...targets].forEach(({ name }, i) =>
      this.cells[i].setAttribute("aria-label", `${name}, row ${number}`),
    );
    this.output.setAttribute("aria-label", `predicted, row ${number}`);
    this.button.setAttribute("aria-label", `Remove row ${number}`);
  }

  focus() {
    this.cells[0].focus();
  }

  get empty() {
    return this.cells.every((cell) => cell.value === "" && !cell.validity.badInput);
  }

  get inputs() {
    return inputs.map((column, i) => this.#value(column, this.cells[i]));
  }

  get targets() {
    return targets.map((column, i) => this.#value(column, this.cells[inputs.length + i]));
  }

  /** Whether it can be asked about. */
  get usable() {
    return !this.empty && (manifest.task.columns || !this.inputs.includes(null));
  }

  /** Whether it is to be learnt. */
  get known() {
    return this.usable && !this.targets.includes(null);
  }

  #value({ kind }, cell) {
    if (cell.validity.badInput) {
      throw new InputError(`${cell.getAttribute("aria-label")}: this is no ${kind}.`);
    }
    if (cell.value === "") {
      return null;
    }
    return kind === "number" ? Number(cell.value) : cell.value.trim();
  }
}

function field({ kind, categories }) {
  if (kind === "category") {
    const select = document.createElement("select");
    const names = categories.includes(UNKNOWN) ? categories : [...categories, UNKNOWN];
    select.append(...["", ...names].map((name) => new Option(name, name)));
    return select;
  }
  const input = document.createElement("input");
  input.type = { number: "number", date: "datetime-local", label: "text" }[kind];
  if (kind === "label") {
    input.maxLength = 200;
  } else {
    input.step = kind === "date" ? 1 : "any";
  }
  return input;
}

function addRow() {
  const row = new Row();
  rows.push(row);
  $("rows").tBodies[0].append(row.line);
  row.number(rows.length);
  return row;
}

function removeRow(row) {
  rows.splice(rows.indexOf(row), 1);
  row.line.remove();
  if (!rows.length) {
    addRow();
  }
  rows.forEach((each, i) => each.number(i + 1));
  learn();
}

function addPoint(x, y) {
  const row = rows.at(-1).empty ? rows.at(-1) : addRow();
  const [across, up] = [inputs[0], targets[0]].map(axis);
  row.cells[0].value = across.show(x).replace(" ", "T");
  row.cells[1].value = up.show(y).replace(" ", "T");
  learn();
}

function removePoint(place) {
  removeRow(rows.filter((row) => row.known)[place]);
}

/** Learn what the rows say by now; one task at a time, and what is overtaken is left out. */
async function learn() {
  waiting = true;
  if (running) {
    return;
  }
  running = true;
  while (waiting) {
    waiting = false;
    try {
      await learnOnce();
      fail(null);
    } catch (error) {
      say("");
      clear();
      fail(error);
    }
  }
  running = false;
}

async function learnOnce() {
  const usable = rows.filter((row) => row.usable);
  const known = usable.filter((row) => row.known);
  points = chart ? known.map(pointOf) : [];
  const kind = manifest.task.kind;
  const few = regresses(kind)
    ? known.length < 1
    : new Set(known.map((row) => row.targets[0])).size < 2;
  if (few) {
    clear();
    say(regresses(kind) ? "" : "Give rows of two labels, so that there is a choice.");
    return;
  }
  const model = await (regresses(kind)
    ? openModel(ServiceRegressor, BackgroundRegressor)
    : openModel(ServiceModel, BackgroundModel));
  const began = performance.now();
  const given = known.map((row) => row.targets);
  const learnt = await model.adapt(
    known.map((row) => row.inputs),
    regresses(kind) ? given : given.map(([label]) => label),
  );
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  task?.forget().catch(() => {}); // the server forgets it by itself in time
  task = learnt;
  const grid = chart?.grid(points) ?? [];
  const asked = [...usable.map((row) => row.inputs), ...grid.map((x) => [x])];
  const answers = await predicted(learnt, asked);
  clear();
  usable.forEach((row, i) => (row.output.value = inWords(answers[i])));
  chart?.draw(points, grid.map((x, i) => ({ x, ...answers[usable.length + i][0] })));
  const where = place() === "browser" ? "in this browser" : "on the server";
  const count = `${known.length} ${known.length === 1 ? "row" : "rows"}`;
  $("curve").hidden = !learnt.losses.length; // none in closed form
  if (learnt.losses.length) {
    drawCurve($("curve"), learnt.losses);
  }
  const words = learnt.losses.length ? ` ${curveInWords(learnt.losses)}` : "";
  say(`Learnt from ${count} in ${seconds} s ${where}.${words}`);
}

/** Return the answers for each row: of a regressor one for each value. */
async function predicted(learnt, asked) {
  if (!regresses(manifest.task.kind)) {
    const { labels, probabilities } = await learnt.predict(asked);
    return labels.map((label, i) => ({ label, probability: Math.max(...probabilities[i]) }));
  }
  if (manifest.learner !== "closed_form") {
    return (await learnt.predict(asked)).map((row) => row.map((value) => ({ value })));
  }
  const intervals = await learnt.predictInterval(asked);
  return intervals.map((row) =>
    row.map(({ low, high }) => ({ value: (low + high) / 2, low, high })), // symmetrical
  );
}

function pointOf(row) {
  const number = (value) => (typeof value === "string" ? Date.parse(`${value}Z`) / 1000 : value);
  return { x: number(row.inputs[0]), y: number(row.targets[0]) };
}

/** Take away what was predicted; the points of the chart stay. */
function clear() {
  for (const row of rows) {
    row.output.value = "";
  }
  $("curve").hidden = true;
  chart?.draw(points, []);
}

function inWords(answer) {
  if (!regresses(manifest.task.kind)) {
    return `${answer.label}, ${Math.round(100 * answer.probability)} %`;
  }
  return answer
    .map(({ value, low, high }, i) => {
      const { show: written } = axis(targets[i]);
      return written(value) + (low === undefined ? "" : ` (${written(low)} to ${written(high)})`);
    })
    .join("; ");
}
