/**
 * FewShotModel and FewShotRegressor in a worker, so that a page stays responsive while they adapt.
 *
 * The same calls as in fewshot.js and regressor.js; ONNX Runtime is given by the address of its module.
 *
 *     const model = await BackgroundModel.load("/bundle/", "/ort/ort.wasm.bundle.min.mjs");
 */

import { InputError } from "./bundle.js";

/** A bundle in a worker. */
class Background {
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
    const model = new this();
    const absolute = (address) => new URL(address, location.href).href;
    try {
      const addresses = { bundle: absolute(bundle), runtime: absolute(runtime) };
      model.manifest = await model.call("load", { ...addresses, headers, kind: this.kind });
    } catch (error) {
      model.release();
      throw error;
    }
    return model;
  }

  get imageShape() {
    return this.manifest.task.image_shape;
  }

  /** Learn in the worker; returns the task's number there, its labels and its losses. */
  async learn(inputs, targets, options) {
    const task = ++this.#calls;
    return { task, ...(await this.call("adapt", { task, inputs, targets, options })) };
  }

  /** Return a new number for a task. */
  number() {
    return ++this.#calls;
  }

  /** Stop the worker and free its memory. */
  release() {
    this.#worker.terminate();
  }

  call(call, values) {
    const id = ++this.#calls;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, call, values });
    });
  }
}

/** As `FewShotModel`, but in a worker. */
export class BackgroundModel extends Background {
  static kind = "classification";

  get ways() {
    return this.manifest.task.ways;
  }

  /** As `FewShotModel.adapt`. */
  async adapt(images, labels, options = {}) {
    return this.#task(await this.learn(images, labels, options));
  }

  #task({ task, ...learnt }) {
    const change = async (call, values) => {
      const grown = this.number();
      return this.#task({ task: grown, ...(await this.call(call, { task, grown, ...values })) });
    };
    return {
      ...learnt,
      add: (images, labels) => change("add", { images, labels }),
      remove: (label) => change("remove", { label }),
      predict: (inputs) => this.call("predict", { task, inputs }),
      logits: (inputs) => this.call("logits", { task, inputs }),
      forget: () => this.call("forget", { task }),
    };
  }
}

/** As `FewShotRegressor`, but in a worker. */
export class BackgroundRegressor extends Background {
  static kind = "regression";

  /** As `FewShotRegressor.adapt`. */
  async adapt(inputs, values, options = {}) {
    const { task, losses } = await this.learn(inputs, values, options);
    return {
      losses,
      predict: (queries) => this.call("predict", { task, inputs: queries }),
      predictInterval: (queries, level) =>
        this.call("predictInterval", { task, inputs: queries, level }),
      forget: () => this.call("forget", { task }),
    };
  }
}
