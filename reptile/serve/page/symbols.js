/** The cards on which symbols are named and drawn, and the examples kept on them. */

import { Pad } from "./pad.js";
import { drawingPixels } from "./client/pixels.js";
import { acceptFiles, paint } from "./files.js";

/** One symbol; emits "change" on its card when its name or examples change. */
export class SymbolCard {
  #shape;
  #pad;
  #name;
  #list;

  /** @param {number[]} shape the images' channels, height and width. */
  constructor(shape) {
    this.#shape = shape;
    this.examples = [];
    const template = document.getElementById("symbol");
    this.card = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => this.card.querySelector(selector);
    this.#name = find(".name");
    this.#list = find(".examples");
    this.#pad = new Pad(find(".pad"));
    this.#name.addEventListener("input", () => this.#changed());
    find(".keep").addEventListener("click", () => {
      this.keep();
      this.#pad.host.focus();
    });
    find(".clear").addEventListener("click", () => this.#pad.clear());
    find(".remove").addEventListener("click", () => this.#emit("remove"));
    this.#pad.host.addEventListener("keep", () => this.keep());
    acceptFiles(this.card, find("input[type=file]"), shape, (pixels) => this.#add(pixels));
  }

  get name() {
    return this.#name.value.trim() || this.#name.placeholder;
  }

  /** Number the card among its fellows, for its labels. */
  number(number, removable) {
    this.#name.placeholder = `symbol ${number}`;
    this.#name.setAttribute("aria-label", `Name of symbol ${number}`);
    this.card.querySelector(".remove").hidden = !removable;
    this.#relabel();
  }

  /** Make an example of what is on the pad, if anything is. */
  keep() {
    if (!this.#pad.empty) {
      const pixels = drawingPixels(this.#pad.strokes, this.#shape);
      this.#pad.clear();
      this.#add(pixels);
    }
  }

  focus() {
    this.#name.focus();
  }

  #add(pixels) {
    const item = document.createElement("li");
    const button = item.appendChild(document.createElement("button"));
    button.type = "button";
    paint(button.appendChild(document.createElement("canvas")), pixels, this.#shape);
    button.addEventListener("click", () => {
      const place = this.examples.indexOf(pixels);
      this.examples.splice(place, 1);
      item.remove();
      (this.#list.children[Math.min(place, this.examples.length - 1)]?.firstChild ??
        this.#pad.host).focus();
      this.#changed();
    });
    this.#list.append(item);
    this.examples.push(pixels);
    this.#changed();
  }

  #changed() {
    this.#relabel();
    this.#emit("change");
  }

  #relabel() {
    const label = (selector, text) =>
      this.card.querySelector(selector).setAttribute("aria-label", text);
    label(".pad", `Drawing pad for ${this.name}`);
    label(".keep", `Keep this drawing of ${this.name}`);
    label(".clear", `Clear the drawing of ${this.name}`);
    label(".remove", `Remove ${this.name}`);
    label("input[type=file]", `Files with examples of ${this.name}`);
    label(".examples", `Examples of ${this.name}`);
    Array.from(this.#list.children, ({ firstChild }, i) => {
      firstChild.setAttribute("aria-label", `Remove example ${i + 1} of ${this.name}`);
      firstChild.title = "Remove";
    });
  }

  #emit(name) {
    this.card.dispatchEvent(new CustomEvent(name, { bubbles: true, detail: this }));
  }
}
