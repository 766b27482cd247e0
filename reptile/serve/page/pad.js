/**
 * A sheet of paper to draw on with a mouse, a finger, a pen or the keyboard.
 *
 * Keeps the strokes as points on the square from 0 to 1; what becomes of them is others' business.
 */

import { node } from "./svg.js";

const SHEET = 100; // the drawing's own units along each side
const KEY_STEP = 0.05;
const FINE_KEY_STEP = 0.01;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Emits "draw" on its element while the drawing changes, and "keep" when Enter is pressed. */
export class Pad {
  #paths = [];
  #pen = null; // the pointer that draws, or "keyboard"
  #cursor = [0.5, 0.5];
  #sheet = node("svg", { viewBox: `0 0 ${SHEET} ${SHEET}`, "aria-hidden": "true" });
  #ring = node("circle", { r: 2.5, class: "cursor" });

  /** @param {HTMLElement} host an empty element that becomes the pad. */
  constructor(host) {
    this.host = host;
    this.strokes = [];
    host.append(this.#sheet);
    this.#sheet.append(this.#ring);
    host.addEventListener("pointerdown", (event) => this.#press(event));
    host.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
      host.addEventListener(end, (event) => this.#lift(event.pointerId));
    }
    host.addEventListener("keydown", (event) => this.#key(event));
    host.addEventListener("blur", () => {
      this.#lift("keyboard");
      host.classList.remove("keys", "down", "pointed");
    });
  }

  get empty() {
    return this.strokes.length === 0;
  }

  /** Whether a stroke is being drawn just now. */
  get drawing() {
    return this.#pen !== null;
  }

  clear() {
    this.#pen = null;
    this.strokes = [];
    this.#paths.forEach((path) => path.remove());
    this.#paths = [];
    this.#changed();
  }

  undo() {
    this.#pen = null;
    this.strokes.pop();
    this.#paths.pop()?.remove();
    this.#changed();
  }

  #press(event) {
    if (this.#pen !== null || event.button !== 0) {
      return;
    }
    event.preventDefault(); // no text selection; hence the focus by hand
    this.host.focus({ preventScroll: true });
    this.host.setPointerCapture(event.pointerId);
    this.host.classList.remove("keys");
    this.host.classList.add("pointed");
    this.#begin(event.pointerId, this.#place(event));
  }

  #move(event) {
    if (this.#pen !== event.pointerId) {
      return;
    }
    const events = event.getCoalescedEvents?.() ?? [];
    for (const part of events.length ? events : [event]) {
      this.#line(this.#place(part));
    }
    this.#changed();
  }

  #place(event) {
    const { left, top, width, height } = this.#sheet.getBoundingClientRect();
    return [inside((event.clientX - left) / width), inside((event.clientY - top) / height)];
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) {
      return;
    }
    const arrow = ARROWS[event.key];
    if (arrow) {
      const step = event.shiftKey ? FINE_KEY_STEP : KEY_STEP;
      this.#cursor = this.#cursor.map((value, axis) => inside(value + step * arrow[axis]));
      if (this.#pen === "keyboard") {
        this.#line(this.#cursor);
        this.#changed();
      }
    } else if (event.key === " ") {
      if (this.#pen === "keyboard") {
        this.#lift("keyboard");
      } else if (this.#pen === null) {
        this.#begin("keyboard", this.#cursor);
      }
    } else if (event.key === "Enter") {
      this.#lift("keyboard");
      this.host.dispatchEvent(new CustomEvent("keep", { bubbles: true }));
    } else if (event.key === "Backspace") {
      this.undo();
    } else if (event.key === "Delete") {
      this.clear();
    } else {
      return;
    }
    event.preventDefault();
    this.host.classList.add("keys");
    this.host.classList.remove("pointed");
    this.host.classList.toggle("down", this.#pen === "keyboard");
    this.#ring.setAttribute("cx", this.#cursor[0] * SHEET);
    this.#ring.setAttribute("cy", this.#cursor[1] * SHEET);
  }

  #begin(pen, point) {
    this.#pen = pen;
    this.strokes.push([point]);
    this.#paths.push(node("path", { class: "stroke" }));
    this.#sheet.insertBefore(this.#paths.at(-1), this.#ring);
    this.#trace();
    this.#changed();
  }

  #line(point) {
    this.strokes.at(-1).push(point);
    this.#trace();
  }

  #lift(pen) {
    if (this.#pen === pen) {
      this.#pen = null;
      this.#changed();
    }
  }

  /** Draw the last stroke through the middles between its points, which rounds its corners. */
  #trace() {
    const points = this.strokes.at(-1).map((point) => point.map((value) => value * SHEET));
    const [x, y] = points[0];
    let path = `M${x} ${y}`;
    for (let i = 1; i < points.length; i++) {
      const [[ax, ay], [bx, by]] = [points[i - 1], points[i]];
      path += `Q${ax} ${ay} ${(ax + bx) / 2} ${(ay + by) / 2}`;
    }
    path += `L${points.at(-1).join(" ")}`;
    this.#paths.at(-1).setAttribute("d", path);
  }

  #changed() {
    this.host.classList.toggle("inked", !this.empty);
    this.host.dispatchEvent(new CustomEvent("draw", { bubbles: true }));
  }
}

function inside(value) {
  return Math.min(Math.max(value, 0), 1);
}
