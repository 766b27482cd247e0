/** The page at /: symbols are drawn, learnt on the server or in the browser, and recognised. */

import { BackgroundModel } from "./client/background.js";
import { curveInWords, drawCurve } from "./curve.js";
import { InputError } from "./client/bundle.js";
import { $, begin, fail, openModel, place, say } from "./frame.js";
import { Pad } from "./pad.js";
import { acceptFiles, paint } from "./files.js";
import { drawingPixels } from "./client/pixels.js";
import { ServiceModel } from "./client/service.js";
import { SymbolCard } from "./symbols.js";

const FIRST_SYMBOLS = 3;

const symbols = [];
let manifest;
let task = null; // what was learnt last, and where
let query;

begin(build);

function build(found) {
  manifest = found;
  const { ways, image_shape: shape } = manifest.task;
  for (let i = 0; i < Math.min(FIRST_SYMBOLS, ways); i++) {
    addSymbol();
  }
  $("add").addEventListener("click", () => addSymbol().focus());
  $("symbols").addEventListener("remove", ({ detail }) => removeSymbol(detail));
  $("symbols").addEventListener("change", outdated);
  document.addEventListener("refused", ({ detail }) => fail(detail));
  // A file that misses its target must not replace the page.
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => event.preventDefault());
  $("learn").addEventListener("click", learn);
  for (const radio of document.getElementsByName("where")) {
    radio.addEventListener("change", changePlace);
  }
  query = new Query(shape);
  const [channels, height, width] = shape;
  $("about").textContent =
    `${manifest.name}: up to ${ways} symbols, pictures of ${width} × ${height} pixels` +
    `${channels === 3 ? " in colour" : ""}${inSteps(", ", " of learning")}.`;
}

function addSymbol() {
  const symbol = new SymbolCard(manifest.task.image_shape);
  symbols.push(symbol);
  $("symbols").append(symbol.card);
  number();
  return symbol;
}

function removeSymbol(symbol) {
  symbols.splice(symbols.indexOf(symbol), 1);
  symbol.card.remove();
  number();
  outdated();
  $("add").focus();
}

function number() {
  symbols.forEach((symbol, i) => symbol.number(i + 1, symbols.length > 2));
  $("add").hidden = symbols.length >= manifest.task.ways;
}

function changePlace() {
  task?.forget().catch(() => {}); // the server forgets it by itself in time
  task = null;
  query.show(null);
  fail(null);
  say(
    place() === "browser"
      ? "Nothing you draw leaves this computer. Press Learn."
      : "Your drawings go to this server. Press Learn.",
  );
}

function outdated() {
  if (task) {
    say("Your examples have changed. Press Learn to adapt to them.");
  }
}

async function learn() {
  symbols.forEach((symbol) => symbol.keep());
  const drawn = symbols.filter(({ examples }) => examples.length);
  const names = drawn.map(({ name }) => name);
  try {
    if (drawn.length < 2) {
      throw new InputError("Draw at least one example of two symbols, so that there is a choice.");
    }
    const twice = names.find((name, i) => names.indexOf(name) !== i);
    if (twice !== undefined) {
      throw new InputError(`Two symbols are called ${twice}: give each a different name.`);
    }
    fail(null);
    busy(true);
    say("");
    const model = await openModel(ServiceModel, BackgroundModel);
    const images = drawn.flatMap(({ examples }) => examples);
    const labels = drawn.flatMap(({ name, examples }) => examples.map(() => name));
    say(`Learning from ${images.length} examples${inSteps(" in ", "")} …`);
    const began = performance.now();
    const learnt = await model.adapt(images, labels);
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    task?.forget().catch(() => {});
    task = learnt;
    const curve = task.losses.length > 0; // none in closed form
    $("curve").hidden = !curve;
    if (curve) {
      drawCurve($("curve"), task.losses);
    }
    const words = curve ? ` ${curveInWords(task.losses)}` : "";
    say(`Learnt from ${images.length} examples in ${seconds} s.${words}`);
    query.begin(task);
    $("query").scrollIntoView({ block: "nearest" });
  } catch (error) {
    say("");
    fail(error);
  } finally {
    busy(false);
  }
}

/** Say how many steps learning takes, if it takes any. */
function inSteps(before, after) {
  return manifest.inner ? `${before}${manifest.inner.steps} steps${after}` : "";
}

function busy(is) {
  $("learn").disabled = is;
  $("progress").hidden = !is;
  document.getElementsByName("where").forEach((radio) => (radio.disabled = is));
}

/** The third part: a new drawing or picture, and what it is taken for. */
class Query {
  #shape;
  #pad = new Pad($("query"));
  #picture = null; // pixels and canvas of a picture file, instead of a drawing
  #waiting = false;
  #running = false;

  constructor(shape) {
    this.#shape = shape;
    this.#pad.host.addEventListener("draw", () => {
      if (!this.#pad.empty) {
        this.#remove();
      }
      this.#ask();
    });
    $("query-clear").addEventListener("click", () => {
      this.#remove();
      this.#pad.clear();
    });
    acceptFiles(this.#pad.host, $("query-file"), shape, (pixels) => {
      this.#pad.clear();
      this.#remove();
      const canvas = document.createElement("canvas");
      paint(canvas, pixels, shape);
      this.#pad.host.prepend(canvas);
      this.#pad.host.classList.add("pictured");
      this.#picture = { pixels, canvas };
      this.#ask();
    });
  }

  /** Start afresh with what was just learnt. */
  begin(learnt) {
    $("probabilities").replaceChildren(...learnt.labels.map(row));
    this.show(null);
    this.#ask();
  }

  /** Show one image's probabilities, or none. */
  show(probabilities) {
    Array.from($("probabilities").children, (item, i) => {
      const percent = Math.round(100 * (probabilities?.[i] ?? 0));
      item.querySelector(".fill").style.width = `${percent}%`;
      item.querySelector(".percent").textContent = probabilities ? `${percent} %` : "";
    });
    if (probabilities === null) {
      $("verdict").textContent = task
        ? "Draw a new symbol to see how it is classified."
        : "First let it learn; then draw a new one here.";
      $("spoken").textContent = "";
      return;
    }
    const best = probabilities.indexOf(Math.max(...probabilities));
    const name = document.createElement("strong");
    name.textContent = task.labels[best];
    $("verdict").replaceChildren("looks like", name);
    if (!this.#pad.drawing) {
      const percent = Math.round(100 * probabilities[best]);
      $("spoken").textContent = `Looks like ${task.labels[best]}, ${percent} percent.`;
    }
  }

  #remove() {
    this.#picture?.canvas.remove();
    this.#picture = null;
    this.#pad.host.classList.remove("pictured");
  }

  #pixels() {
    if (this.#picture) {
      return this.#picture.pixels;
    }
    return this.#pad.empty ? null : drawingPixels(this.#pad.strokes, this.#shape);
  }

  /** Ask about the newest drawing; one question at a time, and what is overtaken is left out. */
  async #ask() {
    this.#waiting = true;
    if (this.#running) {
      return;
    }
    this.#running = true;
    while (this.#waiting) {
      this.#waiting = false;
      const pixels = this.#pixels();
      paint($("seen"), pixels ?? new Uint8Array(this.#size()).fill(255), this.#shape);
      if (pixels === null || task === null) {
        this.show(null);
        continue;
      }
      const asked = task;
      try {
        const { probabilities } = await asked.predict([pixels]);
        if (asked === task) {
          this.show(this.#pixels() === null ? null : probabilities[0]);
          fail(null);
        }
      } catch (error) {
        if (asked === task) {
          fail(error);
        }
      }
    }
    this.#running = false;
  }

  #size() {
    return this.#shape.reduce((product, n) => product * n, 1);
  }
}

function row(label) {
  const item = document.createElement("li");
  for (const name of ["label", "percent", "bar"]) {
    const part = document.createElement(name === "bar" ? "div" : "span");
    part.className = name;
    item.append(part);
  }
  item.querySelector(".label").textContent = label;
  const fill = item.querySelector(".bar").appendChild(document.createElement("div"));
  fill.className = "fill";
  return item;
}
