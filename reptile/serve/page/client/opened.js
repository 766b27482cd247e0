/** What FewShotModel and FewShotRegressor share: a bundle opened in ONNX Runtime, and its inner loop. */

import { InputError, learnerOf, openBundle } from "./bundle.js";
import {
  checkBatches,
  checkInputs,
  checkInteger,
  checkLearningRate,
  checkSupport,
  sizeOf,
} from "./inputs.js";
import { miniBatches } from "./minibatches.js";

const NUMBERS_AT_ONCE = 2 ** 21; // of one run: bounds memory; inputs are independent
const IMAGES_AT_ONCE = 256;
const INPUTS_AT_ONCE = 4096; // that are no images

/** A bundle opened in ONNX Runtime. */
export class OpenedBundle {
  #ort;
  #sessions;

  /** Use `load`. */
  constructor(manifest, ort, sessions) {
    this.manifest = manifest;
    this.#ort = ort;
    this.#sessions = sessions;
  }

  /**
   * Open a bundle, each graph checked against its SHA-256 in manifest.json.
   *
   * @param {string | URL | ((path: string) => Promise<Uint8Array>)} bundle where manifest.json
   *     lies: its folder's address, or a function from a file's path to its bytes.
   * @param ort the module onnxruntime-web or onnxruntime-node.
   * @param {object} options ONNX Runtime's session options.
   * @template {typeof OpenedBundle} Kind
   * @this {Kind}
   * @returns {Promise<InstanceType<Kind>>}
   * @throws {InputError} a missing, damaged or unknown bundle, or one of the other kind.
   */
  static async load(bundle, ort, options = {}) {
    const { manifest, read } = await openBundle(bundle);
    if ((manifest.task.kind ?? "classification") !== this.kind) {
      throw new InputError(`manifest.json is that of a ${this.others}`);
    }
    const sessions = {};
    // One after the other: onnxruntime-web does not start twice at a time.
    for (const graph of this.graphs[learnerOf(manifest)]) {
      const content = await read(manifest.graphs[graph].path);
      sessions[graph] = await ort.InferenceSession.create(content, options);
    }
    return new this(manifest, ort, sessions);
  }

  /** Whether tasks are learnt in closed form, without gradient steps. */
  get closedForm() {
    return learnerOf(this.manifest) === "closed_form";
  }

  /** The columns of a row, of a table's bundle: name, kind and categories; else undefined. */
  get columns() {
    return this.manifest.task.columns;
  }

  /** The shape of an input: channels, height and width of an image. */
  get imageShape() {
    return this.manifest.task.image_shape;
  }

  /** Free the sessions' memory; nothing adapted from this model can predict after that. */
  async release() {
    for (const session of Object.values(this.#sessions)) {
      await session.release();
    }
  }

  /** Check a support set's inputs and the options; return all inputs in one array. For subclasses. */
  check(inputs, options) {
    const numbers = checkInputs(inputs, this.manifest.task);
    checkSupport(inputs.length, this.manifest);
    if (this.closedForm && Object.values(options).some((value) => value !== undefined)) {
      throw new InputError(
        "this bundle learns in closed form, without gradient steps: leave out steps, " +
          "learningRate, seed and batches",
      );
    }
    return numbers;
  }

  /** Return a graph's outputs by name. For subclasses. */
  async run(graph, feeds) {
    return this.#sessions[graph].run(feeds);
  }

  /** Return the tensor of these inputs, all in one array. For subclasses. */
  inputs(numbers) {
    const { dtype, image_shape: shape } = this.manifest.task;
    return this.tensor(dtype, numbers, [numbers.length / sizeOf(shape), ...shape]);
  }

  /** Return these inputs as tensors for one run after another. For subclasses. */
  chunks(numbers) {
    const { task } = this.manifest;
    const each = sizeOf(task.image_shape);
    const most = task.pixel_range ? IMAGES_AT_ONCE : INPUTS_AT_ONCE;
    const width = each * Math.max(1, Math.min(most, Math.floor(NUMBERS_AT_ONCE / each)));
    return cut(numbers, width).map((chunk) => this.inputs(chunk));
  }

  tensor(type, values, dims) {
    return new this.#ort.Tensor(type, values, dims);
  }

  int64(values, dims) {
    return this.tensor("int64", BigInt64Array.from(values, BigInt), dims);
  }

  /**
   * Run the graph `adapt` on a support set. For subclasses.
   *
   * @returns the losses of the steps, and what the graph hands to `predict_adapted`.
   */
  async learn(numbers, targets, options) {
    const { inner, adapted } = this.manifest;
    const feeds = { support_images: this.inputs(numbers), support_labels: targets };
    if (!this.closedForm) {
      Object.assign(feeds, this.#steps(feeds.support_images.dims[0], options));
    }
    const outputs = await this.run("adapt", feeds);
    if (!outputs.finite.data[0]) {
      throw new InputError(
        this.closedForm
          ? "what these points give is not finite: give values of the size of the training data's"
          : `adaptation diverged: its numbers are no longer finite after ${feeds.batches.dims[0]} ` +
              `steps at learning rate ${feeds.learning_rate.data[0]}; lower learningRate (this ` +
              `bundle was made for ${inner.learning_rate}) or steps`,
      );
    }
    const weights = Object.fromEntries(Object.keys(adapted).map((name) => [name, outputs[name]]));
    return { losses: Float32Array.from(outputs.losses?.data ?? []), weights };
  }

  #steps(count, { steps, learningRate, seed = 0, batches }) {
    const { inner, limits } = this.manifest;
    const rate = checkLearningRate(learningRate ?? inner.learning_rate);
    let rows = batches;
    if (rows === undefined) {
      checkInteger(steps ?? inner.steps, "steps", 0, limits.max_steps);
      checkInteger(seed, "seed", 0, Number.MAX_SAFE_INTEGER);
      const batch = Math.min(inner.batch, count);
      rows = miniBatches(seed, count, batch, steps ?? inner.steps, inner.replacement);
    } else if (steps !== undefined) {
      throw new InputError("give either steps or batches: a row of batches is a step");
    } else {
      checkBatches(rows, count, limits.max_steps);
    }
    return {
      batches: this.int64(rows.flatMap((row) => [...row]), [rows.length, rows[0]?.length ?? 1]),
      learning_rate: this.tensor("float32", Float32Array.of(rate), []),
    };
  }
}

/** Cut an array into rows of so many numbers; the last may be shorter. */
export function cut(values, width) {
  const rows = [];
  for (let start = 0; start < values.length; start += width) {
    rows.push(values.slice(start, start + width));
  }
  return rows;
}
