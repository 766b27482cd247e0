/** A function of one number as an SVG chart: its points, and the predicted curve with its interval. */

import { node, text } from "./svg.js";

const WIDTH = 640;
const HEIGHT = 320;
const MARGIN = { left: 56, right: 12, top: 12, bottom: 28 };
const STEPS = 120; // of the curve

/** The chart; calls `add(x, y)` where it is clicked, and `remove(i)` for a point that is clicked. */
export class Chart {
  #host;
  #x;
  #y;
  #ranges;

  /**
   * @param {HTMLElement} host
   * @param {{name: string, show: (value: number) => string, range: [number, number]}} x the axis: its
   *     name, how a number on it is written, and the numbers that it shows at least.
   * @param y likewise.
   */
  constructor(host, x, y, add, remove) {
    this.#host = host;
    [this.#x, this.#y] = [x, y];
    this.#ranges = [x.range, y.range];
    host.addEventListener("click", ({ target, clientX, clientY }) => {
      if (target.dataset.point !== undefined) {
        remove(Number(target.dataset.point));
        return;
      }
      const box = host.firstChild.getBoundingClientRect();
      const right = ((clientX - box.left) / box.width) * WIDTH;
      const down = ((clientY - box.top) / box.height) * HEIGHT;
      const [across, up] = this.#places(right, down);
      if (across >= 0 && across <= 1 && up >= 0 && up <= 1) {
        const [[left, far], [low, high]] = this.#ranges;
        add(left + across * (far - left), low + up * (high - low));
      }
    });
  }

  /** The inputs at which the curve is drawn, from one end of the axis to the other. */
  grid(points) {
    const [left, right] = widened(this.#x.range, points.map(({ x }) => x));
    return Array.from({ length: STEPS + 1 }, (_, i) => left + (i / STEPS) * (right - left));
  }

  /**
   * Draw points and a curve, in place of what was there.
   *
   * @param {{x: number, y: number}[]} points
   * @param {{x: number, value: number, low?: number, high?: number}[]} curve
   */
  draw(points, curve) {
    const xs = widened(this.#x.range, points.map(({ x }) => x));
    const ys = widened(this.#y.range, points.map(({ y }) => y));
    this.#ranges = [xs, ys];
    const x = (value) => MARGIN.left + inner(WIDTH, "left", "right") * share(value, xs);
    const y = (value) => HEIGHT - MARGIN.bottom - inner(HEIGHT, "top", "bottom") * share(value, ys);
    const svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    svg.setAttribute("aria-label", this.#inWords(points, curve));
    const clip = node("clipPath", { id: "plot" });
    const frame = {
      x: MARGIN.left,
      y: MARGIN.top,
      width: inner(WIDTH, "left", "right"),
      height: inner(HEIGHT, "top", "bottom"),
    };
    clip.append(node("rect", frame));
    svg.append(clip, node("rect", { class: "frame", ...frame }));
    for (let i = 0; i <= 4; i++) {
      const [across, up] = [xs, ys].map(([from, to]) => from + (i / 4) * (to - from));
      const anchor = ["start", "middle", "middle", "middle", "end"][i];
      svg.append(
        node("path", { class: "grid", d: `M${MARGIN.left} ${y(up)}H${WIDTH - MARGIN.right}` }),
        text(this.#y.show(up), { x: MARGIN.left - 6, y: y(up) + 4, "text-anchor": "end" }),
        text(this.#x.show(across), { x: x(across), y: HEIGHT - 10, "text-anchor": anchor }),
      );
    }
    svg.append(
      text(this.#y.name, { class: "name", x: MARGIN.left + 8, y: MARGIN.top + 16 }),
      text(this.#x.name, {
        class: "name",
        x: WIDTH - MARGIN.right - 8,
        y: HEIGHT - MARGIN.bottom - 8,
        "text-anchor": "end",
      }),
    );
    const line = (key, rows = curve) =>
      rows.map((row) => `${x(row.x).toFixed(1)} ${y(row[key]).toFixed(1)}`).join("L");
    const plot = node("g", { "clip-path": "url(#plot)" });
    if (curve.length && curve[0].low !== undefined) {
      const band = `M${line("high")}L${line("low", [...curve].reverse())}Z`;
      plot.append(node("path", { class: "band", d: band }));
    }
    if (curve.length) {
      plot.append(node("path", { class: "function", d: `M${line("value")}` }));
    }
    svg.append(plot);
    points.forEach((point, i) => {
      const dot = node("circle", { cx: x(point.x), cy: y(point.y), r: 7, "data-point": i });
      const title = node("title", {});
      title.textContent = `Remove ${this.#x.show(point.x)}, ${this.#y.show(point.y)}`;
      dot.append(title);
      svg.append(dot);
    });
    this.#host.replaceChildren(svg);
  }

  /** Return the shares of the plot's width and height at which this place of the drawing is. */
  #places(right, down) {
    const across = (right - MARGIN.left) / inner(WIDTH, "left", "right");
    return [across, (HEIGHT - MARGIN.bottom - down) / inner(HEIGHT, "top", "bottom")];
  }

  #inWords(points, curve) {
    const count = `${points.length} ${points.length === 1 ? "point" : "points"}`;
    if (!curve.length) {
      return `${this.#y.name} by ${this.#x.name}: ${count}, nothing learnt yet.`;
    }
    const ends = [curve[0], curve.at(-1)].map(
      ({ x, value }) => `${this.#y.show(value)} at ${this.#x.show(x)}`,
    );
    return `${this.#y.name} by ${this.#x.name}, learnt from ${count}: from ${ends.join(" to ")}.`;
  }
}

const inner = (size, before, after) => size - MARGIN[before] - MARGIN[after];
const share = (value, [from, to]) => (value - from) / (to - from);

function widened([low, high], values) {
  return [Math.min(low, ...values), Math.max(high, ...values)];
}
