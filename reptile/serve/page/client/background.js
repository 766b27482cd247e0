/**
 * FewShotModel in a worker, so that a page stays responsive while it adapts.
 *
 * The same calls as in fewshot.js; ONNX Runtime is given by the address of its module.
 *
 *     const model = await BackgroundModel.load("/bundle/", "/ort/ort.wasm.bundle.min.mjs");
 */

import { InputError } from "./bundle.js";

/** As `FewShotModel`, but in a worker. */
export class BackgroundModel {
  #worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  #waiting = new Map();
  #calls = 0;

  constructor() {
    this.#worker.addEventListener("message", ({ data: { id, result, error } }) => {
      const { resolve, reject } = this.#waiting.get(id);
      this.#waiting.delete(id);
      if (error === undefined) {
        resolve(result);
      } else {
        const Kind = error.name === "InputError" ? InputError : Error;
        reject(new Kind(error.message));
      }
    });
    this.#worker.addEventListener("error", (event) => {
      const error = new Error(`the worker stopped: ${event.message ?? "it could not be loaded"}`);
      this.#waiting.forEach(({ reject }) => reject(error));
      this.#waiting.clear();
    });
  }

  /**
   * @param {string | URL} bundle the address of the bundle's folder.
   * @param {string | URL} runtime the address of onnxruntime-web's module ort.wasm.bundle.min.mjs;
   *     its .wasm file lies beside it.
   * @param {object} headers to send along when fetching the bundle.
   */
  static async load(bundle, runtime, headers = {}) {
    const model = new BackgroundModel();
    const absolute = (address) => new URL(address, location.href).href;
    try {
      const values = { bundle: absolute(bundle), runtime: absolute(runtime), headers };
      model.manifest = await model.#call("load", values);
    } catch (error) {
      model.release();
      throw error;
    }
    return model;
  }

  get ways() {
    return this.manifest.task.ways;
  }

  get imageShape() {
    return this.manifest.task.image_shape;
  }

  /** As `FewShotModel.adapt`. */
  async adapt(images, labels, options = {}) {
    const task = ++this.#calls;
    return this.#task(task, await this.#call("adapt", { task, images, labels, options }));
  }

  #task(task, learnt) {
    const change = async (call, values) => {
      const grown = ++this.#calls;
      return this.#task(grown, await this.#call(call, { task, grown, ...values }));
    };
    return {
      ...learnt,
      add: (images, labels) => change("add", { images, labels }),
      remove: (label) => change("remove", { label }),
      predict: (queries) => this.#call("predict", { task, images: queries }),
      logits: (queries) => this.#call("logits", { task, images: queries }),
      forget: () => this.#call("forget", { task }),
    };
  }

  /** Stop the worker and free its memory. */
  release() {
    this.#worker.terminate();
  }

  #call(call, values) {
    const id = ++this.#calls;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, call, values });
    });
  }
}
