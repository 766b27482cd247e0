/**
 * Use a regressor's bundle from JavaScript: adapt it to a function from a few of its points.
 *
 *     import ort from "onnxruntime-node";
 *     const model = await FewShotRegressor.load("https://example.org/bundle/", ort);
 *     const adapted = await model.adapt([{ day: 0, diet: "1" }, { day: 2, diet: "1" }], [42, 51]);
 *     const [[weight]] = await adapted.predict([{ day: 21, diet: "1" }]);
 *     const [[{ low, high }]] = await adapted.predictInterval([{ day: 21, diet: "1" }]);
 *
 * Classifiers are opened by fewshot.js.
 */

import { InputError } from "./bundle.js";
import { checkInputs, checkValues } from "./inputs.js";
import { OpenedBundle } from "./opened.js";

/** A regressor's bundle opened in ONNX Runtime. */
export class FewShotRegressor extends OpenedBundle {
  static kind = "regression";
  static others = "classifier, which predicts no values: use FewShotModel";
  static graphs = {
    gradient: ["adapt", "predict_adapted"],
    closed_form: ["adapt", "predict_adapted"],
  };

  /** How many values are predicted for each input. */
  get outputs() {
    return this.manifest.task.outputs;
  }

  /**
   * Learn a function from a few of its points.
   *
   * @param {Array} inputs of a table's bundle its rows: objects by column name, or arrays in the
   *     columns' order. A number is a number; a date a Date, ISO 8601 text (UTC where it has no
   *     offset), or seconds since 1970; a category its name; null or undefined is missing. Of other
   *     bundles each input's numbers as one flat list, or the number where it is only one.
   * @param {Array} values for each input its values, or the value where there is one output.
   * @param {object} options steps, learningRate, seed or batches, as of `FewShotModel.adapt`; none
   *     of a bundle in closed form.
   * @returns {Promise<AdaptedRegressor>}
   * @throws {InputError} an argument that cannot be used, or an adaptation that diverged.
   */
  async adapt(inputs, values, options = {}) {
    const { task } = this.manifest;
    const numbers = this.check(inputs, options);
    const count = inputs.length;
    const targets = this.tensor(task.dtype, checkValues(values, count, task), [count, task.outputs]);
    const { losses, weights } = await this.learn(numbers, targets, options);
    const run = (images) => this.run("predict_adapted", { images, ...weights });
    return new AdaptedRegressor(this, losses, run);
  }
}

/** A bundle adapted to one function; made by `FewShotRegressor.adapt`. */
export class AdaptedRegressor {
  #model;
  #run;

  constructor(model, losses, run) {
    /** The loss of each inner step's mini-batch before that step; none in closed form. */
    this.losses = losses;
    this.#model = model;
    this.#run = run;
  }

  /**
   * Predict the values at each input independently of the others.
   *
   * @param {Array} inputs as in `FewShotRegressor.adapt`.
   * @returns {Promise<number[][]>} for each input its values; of a table's bundle in the units of
   *     its columns.
   */
  async predict(inputs) {
    return (await this.#answers(inputs)).map((row) => row.map(({ value }) => value));
  }

  /**
   * Predict intervals that hold the values at each input with a given probability.
   *
   * @param {Array} inputs as in `FewShotRegressor.adapt`.
   * @param {number} level the probability, between 0 and 1.
   * @returns {Promise<{low: number, high: number}[][]>} for each input an interval a value.
   * @throws {InputError} a level out of range, or a bundle that learns by gradient steps.
   */
  async predictInterval(inputs, level = 0.95) {
    if (!this.#model.closedForm) {
      throw new InputError(
        "this bundle learns by gradient steps and predicts no variances: use predict",
      );
    }
    if (!(level > 0 && level < 1)) {
      throw new InputError(`level must lie between 0 and 1, got ${level}`);
    }
    const width = normalWidth(level);
    return (await this.#answers(inputs)).map((row) =>
      row.map(({ value, variance }) => {
        const half = width * Math.sqrt(variance);
        return { low: value - half, high: value + half };
      }),
    );
  }

  async #answers(inputs) {
    const { outputs } = this.#model;
    const numbers = checkInputs(inputs, this.#model.manifest.task);
    const rows = [];
    for (const chunk of this.#model.chunks(numbers)) {
      const { logits, variance } = await this.#run(chunk);
      for (let i = 0; i < logits.data.length; i += outputs) {
        const row = Array.from({ length: outputs }, (_, j) => ({
          value: logits.data[i + j],
          variance: variance?.data[i + j],
        }));
        rows.push(row);
      }
    }
    return rows;
  }
}

/** Return how many standard deviations about the mean hold a normal value with a probability. */
function normalWidth(level) {
  let [low, high] = [0, 40];
  while (high - low > 1e-12) {
    const middle = (low + high) / 2;
    [low, high] = within(middle) < level ? [middle, high] : [low, middle];
  }
  return (low + high) / 2;
}

/** The probability that a normal value lies within so many deviations, by its power series. */
function within(deviations) {
  if (deviations > 9) {
    return 1;
  }
  let term = deviations;
  let sum = term;
  for (let n = 3; Math.abs(term) > 1e-17 * sum; n += 2) {
    term *= (deviations * deviations) / n;
    sum += term;
  }
  return 2 * sum * Math.exp((-deviations * deviations) / 2) / Math.sqrt(2 * Math.PI);
}
