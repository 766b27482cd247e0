/** Check a bundle with its golden tensors, adapt it to three symbols, and classify new ones. */

import { readFile } from "node:fs/promises";
import { join } from "node:path";

import ort from "onnxruntime-node";

import { FewShotModel } from "reptile-fewshot";
import { checkGolden } from "reptile-fewshot/golden.js";
import { drawingPixels } from "reptile-fewshot/pixels.js";

const folder = process.argv[2] ?? "artifacts/bundle";
const bundle = (path) => readFile(join(folder, path));

for (const { graph, deviation } of await checkGolden(bundle, ort)) {
  console.log(`golden ${graph}: at most ${deviation.toExponential(1)} off`);
}

const model = await FewShotModel.load(bundle, ort);

// Any image of the bundle's shape does, as one flat list of pixels 0..255.
const shake = () => (Math.random() - 0.5) / 10;
const draw = (stroke) =>
  drawingPixels([stroke.map(([x, y]) => [x + shake(), y + shake()])], model.imageShape);
const symbols = {
  corner: [[0.2, 0.1], [0.2, 0.9], [0.8, 0.9]],
  zigzag: [[0.1, 0.2], [0.35, 0.8], [0.6, 0.2], [0.9, 0.8]],
  dash: [[0.1, 0.5], [0.9, 0.5]],
};
const names = Object.keys(symbols).slice(0, model.ways);
const labels = names.flatMap((name) => [name, name, name]);
const adapted = await model.adapt(labels.map((name) => draw(symbols[name])), labels);
if (adapted.losses.length) { // none where a classifier is fitted in closed form
  console.log(`loss ${adapted.losses[0].toFixed(2)} -> ${adapted.losses.at(-1).toFixed(2)}`);
}

const answer = await adapted.predict(names.map((name) => draw(symbols[name])));
names.forEach((name, i) => {
  const percent = Math.round(100 * Math.max(...answer.probabilities[i]));
  console.log(`a new ${name} is classified as ${answer.labels[i]} (${percent} %)`);
});
