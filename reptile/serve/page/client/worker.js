/** Runs a FewShotModel off the page's own thread; see background.js for the other side. */

import { FewShotModel, bundleAt } from "./fewshot.js";

let model;
const tasks = new Map();

const calls = {
  async load({ bundle, runtime, headers }) {
    // Known only when it runs: bundlers are to leave this import to the browser.
    const ort = await import(/* webpackIgnore: true */ /* @vite-ignore */ runtime);
    ort.env.wasm.numThreads = 1; // more would need the page to be cross-origin isolated
    model = await FewShotModel.load(bundleAt(bundle, headers), ort);
    return model.manifest;
  },
  async adapt({ task, images, labels, options }) {
    const adapted = await model.adapt(images, labels, options);
    tasks.set(task, adapted);
    return { labels: adapted.labels, losses: adapted.losses };
  },
  async add({ task, grown, images, labels }) {
    const adapted = await tasks.get(task).add(images, labels);
    tasks.set(grown, adapted);
    return { labels: adapted.labels, losses: adapted.losses };
  },
  async remove({ task, grown, label }) {
    const adapted = await tasks.get(task).remove(label);
    tasks.set(grown, adapted);
    return { labels: adapted.labels, losses: adapted.losses };
  },
  predict: ({ task, images }) => tasks.get(task).predict(images),
  logits: ({ task, images }) => tasks.get(task).logits(images),
  forget: ({ task }) => tasks.delete(task),
};

globalThis.addEventListener("message", async ({ data: { id, call, values } }) => {
  try {
    globalThis.postMessage({ id, result: await calls[call](values) });
  } catch (error) {
    globalThis.postMessage({ id, error: { name: error.name, message: error.message } });
  }
});
