/** The learning curve as an SVG figure: the loss of each step's mini-batch, and its trend. */

import { node, text } from "./svg.js";

const WIDTH = 320;
const HEIGHT = 150;
const MARGIN = { left: 34, right: 8, top: 10, bottom: 24 };
const SMOOTHING = 0.75; // of the running mean, as loss curves are usually shown

/**
 * Draw the curve into an element, in place of what was there.
 *
 * @param {HTMLElement} host
 * @param {ArrayLike<number>} losses of each step, at least one.
 */
export function drawCurve(host, losses) {
  const values = Array.from(losses);
  const top = Math.max(...values, 0.6); // above the tick at 0.5
  const inner = [WIDTH - MARGIN.left - MARGIN.right, HEIGHT - MARGIN.top - MARGIN.bottom];
  const x = (step) => MARGIN.left + (inner[0] * step) / Math.max(values.length - 1, 1);
  const y = (loss) => MARGIN.top + inner[1] * (1 - loss / top);
  const svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  svg.setAttribute("aria-label", curveInWords(values));

  const ticks = top > 2 ? [0, 1, 2] : top > 1 ? [0, 1] : [0, 0.5];
  for (const tick of ticks) {
    svg.append(
      node("path", { class: "grid", d: `M${MARGIN.left} ${y(tick)}H${WIDTH - MARGIN.right}` }),
      text(tick, { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }),
    );
  }
  svg.append(
    text("loss", { x: 0, y: MARGIN.top + 4 }),
    text("step 1", { x: x(0), y: HEIGHT - 6 }),
    text(values.length, { x: WIDTH - MARGIN.right, y: HEIGHT - 6, "text-anchor": "end" }),
  );
  const line = (name, points) => {
    const d = points.map((loss, step) => `${step ? "L" : "M"}${x(step)} ${y(loss)}`).join("");
    return node("path", { class: name, d, pathLength: 1 });
  };
  svg.append(line("losses", values), line("trend", trend(values)));
  host.replaceChildren(svg);
}

/** Say what the curve shows, for those who cannot see it. */
export function curveInWords(losses) {
  const smooth = trend(Array.from(losses));
  const [first, last] = [smooth[0], smooth.at(-1)].map((loss) => loss.toFixed(2));
  return `The loss went from ${first} to ${last} in ${smooth.length} steps.`;
}

function trend(values) {
  let mean = 0;
  return values.map((value, i) => {
    mean = SMOOTHING * mean + (1 - SMOOTHING) * value;
    return mean / (1 - SMOOTHING ** (i + 1));
  });
}
