/** Runs a model off the page's own thread; see background.js for the other side. */

import { bundleAt } from "./bundle.js";
import { FewShotModel } from "./fewshot.js";
import { FewShotRegressor } from "./regressor.js";

const KINDS = { classification: FewShotModel, regression: FewShotRegressor };
let model;
const tasks = new Map();

const calls = {
  async load({ bundle, runtime, headers, kind }) {
    // Known only when it runs: bundlers are to leave this import to the browser.
    const ort = await import(/* webpackIgnore: true */ /* @vite-ignore */ runtime);
    ort.env.wasm.numThreads = 1; // more would need the page to be cross-origin isolated
    model = await KINDS[kind].load(bundleAt(bundle, headers), ort);
    return model.manifest;
  },
  async adapt({ task, inputs, targets, options }) {
    return kept(task, await model.adapt(inputs, targets, options));
  },
  async add({ task, grown, images, labels }) {
    return kept(grown, await tasks.get(task).add(images, labels));
  },
  async remove({ task, grown, label }) {
    return kept(grown, await tasks.get(task).remove(label));
  },
  predict: ({ task, inputs }) => tasks.get(task).predict(inputs),
  predictInterval: ({ task, inputs, level }) => tasks.get(task).predictInterval(inputs, level),
  logits: ({ task, inputs }) => tasks.get(task).logits(inputs),
  forget: ({ task }) => tasks.delete(task),
};

function kept(task, adapted) {
  tasks.set(task, adapted);
  return { labels: adapted.labels, losses: adapted.losses };
}

globalThis.addEventListener("message", async ({ data: { id, call, values } }) => {
  try {
    globalThis.postMessage({ id, result: await calls[call](values) });
  } catch (error) {
    globalThis.postMessage({ id, error: { name: error.name, message: error.message } });
  }
});
