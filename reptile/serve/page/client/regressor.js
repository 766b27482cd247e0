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

import {
  InputError,
  checkBatches,
  checkInteger,
  checkLearningRate,
  checkSupport,
  openBundle,
} from "./fewshot.js";
import { miniBatches } from "./minibatches.js";

const AT_ONCE = 4096; // inputs of one run: bounds memory; they are independent

/** A regressor's bundle opened in ONNX Runtime. */
export class FewShotRegressor {
  #ort;
  #sessions;

  /** Use `FewShotRegressor.load`. */
  constructor(manifest, ort, sessions) {
    this.manifest = manifest;
    this.#ort = ort;
    this.#sessions = sessions;
  }

  /**
   * Open a bundle; the arguments are those of `FewShotModel.load`.
   *
   * @throws {InputError} a missing, damaged or unknown bundle, or a classifier's.
   */
  static async load(bundle, ort, options = {}) {
    const { manifest, read } = await openBundle(bundle);
    if (manifest.task.kind !== "regression") {
      throw new InputError(
        "manifest.json is that of a classifier, which predicts no values: use FewShotModel",
      );
    }
    const sessions = {};
    // One after the other: onnxruntime-web does not start twice at a time.
    for (const graph of ["adapt", "predict_adapted"]) {
      const content = await read(manifest.graphs[graph].path);
      sessions[graph] = await ort.InferenceSession.create(content, options);
    }
    return new FewShotRegressor(manifest, ort, sessions);
  }

  /** Whether functions are learnt in closed form, with variances and without gradient steps. */
  get closedForm() {
    return this.manifest.learner === "closed_form";
  }

  /** The columns of a row, of a table's bundle: name, kind and categories; else undefined. */
  get columns() {
    return this.manifest.task.columns;
  }

  /** How many values are predicted for each input. */
  get outputs() {
    return this.manifest.task.outputs;
  }

  /**
   * Learn a function from a few of its points.
   *
   * @param {Array} inputs of a table's bundle its rows: objects by column name, or arrays in the
   *     columns' order. A number is a number; a date a Date, or seconds since 1970; a category its
   *     name; null or undefined is missing. Of other bundles each input's numbers as one flat list,
   *     or the number where it is only one.
   * @param {Array} values for each input its values, or the value where there is one output.
   * @param {object} options steps, learningRate, seed or batches, as of `FewShotModel.adapt`; none
   *     of a bundle in closed form.
   * @returns {Promise<AdaptedRegressor>}
   * @throws {InputError} an argument that cannot be used, or an adaptation that diverged.
   */
  async adapt(inputs, values, options = {}) {
    const points = this.#inputs(inputs);
    const targets = this.#values(values);
    const count = inputs.length;
    checkSupport(count, this.manifest, "points");
    if (values.length !== count) {
      throw new InputError(`${count} inputs but ${values.length} values: give each point both`);
    }
    const feeds = { support_images: points, support_labels: targets };
    if (!this.closedForm) {
      Object.assign(feeds, this.#steps(count, options));
    } else if (Object.values(options).some((value) => value !== undefined)) {
      throw new InputError(
        "this bundle learns in closed form, without gradient steps: leave out steps, " +
          "learningRate, seed and batches",
      );
    }
    const outputs = await this.#sessions.adapt.run(feeds);
    if (!outputs.finite.data[0]) {
      throw new InputError(
        "what these points give is not finite: give values of the size of the training data's" +
          (this.closedForm ? "" : ", or lower learningRate or steps"),
      );
    }
    const names = Object.keys(this.manifest.adapted);
    const weights = Object.fromEntries(names.map((name) => [name, outputs[name]]));
    const run = async (chunk) =>
      this.#sessions.predict_adapted.run({ images: this.#inputs(chunk), ...weights });
    return new AdaptedRegressor(this, Float32Array.from(outputs.losses?.data ?? []), run);
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
    const places = BigInt64Array.from(rows.flatMap((row) => [...row]), BigInt);
    return {
      batches: new this.#ort.Tensor("int64", places, [rows.length, rows[0]?.length ?? 1]),
      learning_rate: new this.#ort.Tensor("float32", Float32Array.of(rate), []),
    };
  }

  #inputs(inputs) {
    const { image_shape: shape, columns } = this.manifest.task;
    const size = shape.reduce((product, n) => product * n, 1);
    checkList(inputs, "inputs");
    const rows = columns
      ? inputs.map((row, i) => coded(row, columns, `input ${i}`))
      : inputs.map((row, i) => finite(row, size, `input ${i}`));
    return this.#tensor(rows, shape);
  }

  #values(values) {
    const { outputs, targets } = this.manifest.task;
    checkList(values, "values");
    const rows = values.map((row, i) => {
      const named = row !== null && typeof row === "object" && !(row instanceof Date);
      const given = targets && named && !isList(row);
      const list = given ? coded(row, targets, `value ${i}`) : row;
      return finite(isList(list) ? Array.from(list, seconds) : seconds(list), outputs, `value ${i}`);
    });
    return this.#tensor(rows, [outputs]);
  }

  #tensor(rows, shape) {
    const { dtype } = this.manifest.task;
    const Values = dtype === "float64" ? Float64Array : Float32Array;
    return new this.#ort.Tensor(dtype, Values.from(rows.flat()), [rows.length, ...shape]);
  }

  /** Free the sessions' memory; nothing adapted from this model can predict after that. */
  async release() {
    for (const session of Object.values(this.#sessions)) {
      await session.release();
    }
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
    checkList(inputs, "inputs");
    const { outputs } = this.#model;
    const rows = [];
    for (let start = 0; start < inputs.length; start += AT_ONCE) {
      const { logits, variance } = await this.#run(inputs.slice(start, start + AT_ONCE));
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

const isList = (value) => Array.isArray(value) || ArrayBuffer.isView(value);
const seconds = (value) => (value instanceof Date ? value.getTime() / 1000 : value);

function checkList(values, what) {
  if (!Array.isArray(values)) {
    throw new InputError(`${what} must be a list, one of each point`);
  }
}

/** Return one input's numbers. */
function finite(row, size, what) {
  const numbers = isList(row) ? Array.from(row) : [row];
  if (numbers.length !== size) {
    throw new InputError(`${what} has ${numbers.length} numbers, expected ${size}`);
  }
  const wrong = numbers.find((value) => !Number.isFinite(value));
  if (numbers.some((value) => !Number.isFinite(value))) {
    throw new InputError(`${what} holds ${wrong}: give finite numbers`);
  }
  return numbers;
}

/** Return a row of a table as the graph takes it: NaN where a value is missing. */
function coded(row, columns, what) {
  const names = columns.map(({ name }) => name);
  let values = row;
  if (!isList(row)) {
    const missing = names.find((name) => !(row !== null && Object.hasOwn(Object(row), name)));
    if (missing !== undefined && !(columns.length === 1 && typeof row !== "object")) {
      throw new InputError(
        `${what} has no ${missing}: give ${names.join(", ")}, null where a value is missing`,
      );
    }
    values = missing === undefined ? names.map((name) => row[name]) : [row];
  }
  if (values.length !== names.length) {
    throw new InputError(`${what} has ${values.length} values, expected ${names.join(", ")}`);
  }
  return Array.from(values, (value, i) => {
    const { name, kind, categories } = columns[i];
    if (value === null || value === undefined || Number.isNaN(value)) {
      return NaN;
    }
    if (kind === "category") {
      return categories.indexOf(String(value)); // -1 stands for all that are not in the list
    }
    const number = kind === "date" ? seconds(value) : value;
    if (!Number.isFinite(number)) {
      throw new InputError(`${what}: ${name} is ${value}, no ${kind}; null is missing`);
    }
    return number;
  });
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
