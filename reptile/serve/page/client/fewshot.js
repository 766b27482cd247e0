/**
 * Use a bundle from JavaScript: adapt it to a new task from a few labelled images, then predict.
 * Bundles that predict values are opened by regressor.js.
 *
 * For the browser (onnxruntime-web) and Node (onnxruntime-node) alike: the module is handed in.
 * Not for drawing or reading image files (see pixels.js), nor for the service (see service.js).
 *
 *     import ort from "onnxruntime-node";
 *     const model = await FewShotModel.load("https://example.org/bundle/", ort);
 *     const adapted = await model.adapt(images, ["cat", "cat", "dog", "dog"]);
 *     const { labels, probabilities } = await adapted.predict(moreImages);
 *
 * Of a table's bundle the inputs are rows, such as [{ day: 0, diet: "1" }].
 */

import { InputError } from "./bundle.js";
import { checkInputs, checkLabels, checkSupport, checkWays } from "./inputs.js";
import { OpenedBundle, cut } from "./opened.js";

export { InputError, bundleAt, openBundle } from "./bundle.js";

/** A classifier's bundle opened in ONNX Runtime, ready to adapt to tasks. */
export class FewShotModel extends OpenedBundle {
  static kind = "classification";
  static others = "regressor, which names no classes: use FewShotRegressor";
  static graphs = { gradient: ["adapt", "predict_adapted"], closed_form: ["embed", "fit"] };

  /** The most names one task may have. */
  get ways() {
    return this.manifest.task.ways;
  }

  /**
   * Learn a new task. The same arguments give the same result, and the one that Python gives.
   *
   * @param {ArrayLike} images the support set: for each image its C*H*W pixels 0..255, row by row,
   *     channel after channel. Of a table's bundle its rows, and of others their numbers: as in
   *     `FewShotRegressor.adapt`.
   * @param {Array} labels a name for each image; 2 to `ways` distinct ones.
   * @param {object} options none of a bundle in closed form, which has no inner steps.
   * @param {number} [options.steps] inner steps; the bundle's if left out.
   * @param {number} [options.learningRate] of the inner steps; the bundle's if left out.
   * @param {number} [options.seed] chooses the mini-batches.
   * @param {number[][]} [options.batches] the mini-batches themselves, instead of steps and seed:
   *     one row of image numbers a step, all of one length.
   * @returns {Promise<AdaptedModel>}
   * @throws {InputError} an argument that cannot be used, or an adaptation that diverged.
   */
  async adapt(images, labels, options = {}) {
    const numbers = this.check(images, options);
    const { names, targets } = checkLabels(labels, images.length, this.manifest.task);
    checkWays(names, this.manifest, this.closedForm);
    if (this.closedForm) {
      return this.#fit(names, await this.#embed(this.chunks(numbers)), targets);
    }
    const support = this.int64(targets, [targets.length]);
    const { losses, weights } = await this.learn(numbers, support, options);
    return new AdaptedModel(this, names, losses, async (chunk) => {
      const { logits } = await this.run("predict_adapted", { images: chunk, ...weights });
      return cut(logits.data, this.ways);
    });
  }

  /** Return the features of each input. */
  async #embed(chunks) {
    const features = [];
    for (const images of chunks) {
      const { data, dims } = (await this.run("embed", { images })).features;
      features.push(...cut(data, dims[1]));
    }
    return features;
  }

  /** Return the task of these examples: a linear classifier of their features. */
  async #fit(names, features, targets) {
    const { data: weight, dims, bias, finite } = await this.#classifier(features, targets);
    if (!finite) {
      throw new InputError(
        "the classifier of these examples is not finite: run checkGolden on this machine",
      );
    }
    const rows = cut(weight, dims[1]);
    const predict = async (chunk) => {
      const queries = await this.#embed([chunk]);
      return queries.map((query) => Float32Array.from(rows, (row, i) => bias[i] + dot(row, query)));
    };
    const change = {
      add: async (images, labels) => {
        const { task } = this.manifest;
        const numbers = checkInputs(images, task);
        const added = checkLabels(labels, images.length, task, names);
        checkWays(added.names, this.manifest, true);
        checkSupport(features.length + images.length, this.manifest);
        const all = [...features, ...(await this.#embed(this.chunks(numbers)))];
        return this.#fit(added.names, all, [...targets, ...added.targets]);
      },
      remove: async (name) => {
        const place = names.indexOf(name);
        if (place < 0) {
          throw new InputError(`no class ${name}: the task has ${names.join(", ")}`);
        }
        const rest = names.filter((_, i) => i !== place);
        checkWays(rest, this.manifest, true);
        const kept = targets.flatMap((target, i) => (target === place ? [] : [i]));
        const places = kept.map((i) => targets[i] - (targets[i] > place ? 1 : 0));
        return this.#fit(rest, kept.map((i) => features[i]), places);
      },
    };
    return new AdaptedModel(this, names, new Float32Array(), predict, change);
  }

  async #classifier(features, targets) {
    const count = features.length;
    const flat = new Float32Array(count * features[0].length);
    features.forEach((row, i) => flat.set(row, i * row.length));
    const outputs = await this.run("fit", {
      features: this.tensor("float32", flat, [count, features[0].length]),
      support_labels: this.int64(targets, [count]),
    });
    const { data, dims } = outputs["head.weight"];
    return { data, dims, bias: outputs["head.bias"].data, finite: outputs.finite.data[0] };
  }
}

/** A bundle adapted to one task; made by `FewShotModel.adapt`. */
export class AdaptedModel {
  #model;
  #run;
  #change;

  constructor(model, labels, losses, run, change) {
    /** The task's names, in the order of the columns of probabilities. */
    this.labels = labels;
    /** The loss of each inner step's mini-batch before that step; none in closed form. */
    this.losses = losses;
    this.#model = model;
    this.#run = run;
    this.#change = change;
  }

  /**
   * Return the task with more examples, of its classes or of new ones; of closed-form bundles.
   *
   * Only the new images run through the network; the result equals adapting to all again.
   *
   * @param images, labels as in `FewShotModel.adapt`.
   * @returns {Promise<AdaptedModel>}
   * @throws {InputError} an argument that cannot be used, or a bundle that takes gradient steps.
   */
  async add(images, labels) {
    return this.#changes().add(images, labels);
  }

  /** Return the task without one of its classes; of closed-form bundles, as `add`. */
  async remove(label) {
    return this.#changes().remove(label);
  }

  #changes() {
    if (this.#change === undefined) {
      throw new InputError(
        "this bundle learns by gradient steps, which need every example: adapt again with all",
      );
    }
    return this.#change;
  }

  /**
   * Name each image; each answer depends on its own image only.
   *
   * @param {ArrayLike<ArrayLike<number>>} images as in `FewShotModel.adapt`.
   * @returns {Promise<{labels: Array, probabilities: Float32Array[]}>} the likeliest name of each
   *     image, and each image's probabilities in the order of `labels`; they sum to 1.
   * @throws {InputError} images of another size or range.
   */
  async predict(images) {
    const logits = await this.logits(images);
    const probabilities = logits.map((row) => softmax(row.subarray(0, this.labels.length)));
    const labels = probabilities.map((row) => this.labels[row.indexOf(Math.max(...row))]);
    return { labels, probabilities };
  }

  /** The head's raw outputs for each image, also those of labels that a task does not use. */
  async logits(images) {
    const numbers = checkInputs(images, this.#model.manifest.task);
    const rows = [];
    for (const chunk of this.#model.chunks(numbers)) {
      rows.push(...(await this.#run(chunk)));
    }
    return rows;
  }
}

function dot(row, other) {
  let sum = 0;
  for (let i = 0; i < row.length; i++) {
    sum += row[i] * other[i];
  }
  return sum;
}

/** Share out probability among the outputs in use; the head's spare ones never get any. */
function softmax(logits) {
  const highest = Math.max(...logits);
  const exponentials = Array.from(logits, (logit) => Math.exp(logit - highest));
  const sum = exponentials.reduce((total, value) => total + value, 0);
  return Float32Array.from(exponentials, (value) => value / sum);
}
