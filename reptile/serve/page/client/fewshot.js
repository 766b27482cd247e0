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
 */

import { miniBatches } from "./minibatches.js";

// The first two have no learner: it is "gradient". The last takes the raw rows of a table.
const FORMATS = [1, 2, 3, 4];
const MAX_LEARNING_RATE = 100; // as in the Python runtime
const PIXELS_AT_ONCE = 2 ** 21; // of the images of one run: bounds memory; they are independent
const RUN = { gradient: ["adapt", "predict_adapted"], closed_form: ["embed", "fit"] };

/** Something the caller can mend; the message names the value, the limit and the way out. */
export class InputError extends Error {
  name = "InputError";
}

/** A bundle opened in ONNX Runtime, ready to adapt to tasks. */
export class FewShotModel {
  #ort;
  #sessions;

  /** Use `FewShotModel.load`. */
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
   * @throws {InputError} a missing, damaged or unknown bundle.
   */
  static async load(bundle, ort, options = {}) {
    const files = await openBundle(bundle);
    const { kind, pixel_range: pixels } = files.manifest.task;
    if (kind === "regression") {
      throw new InputError(
        "manifest.json is that of a regressor, which names no classes: use FewShotRegressor",
      );
    }
    if (pixels === undefined) {
      throw new InputError(
        "manifest.json is of inputs that are no images: this class takes images, Python any",
      );
    }
    const sessions = {};
    // One after the other: onnxruntime-web does not start twice at a time.
    for (const graph of RUN[learnerOf(files.manifest)]) {
      const content = await files.read(files.manifest.graphs[graph].path);
      sessions[graph] = await ort.InferenceSession.create(content, options);
    }
    return new FewShotModel(files.manifest, ort, sessions);
  }

  /** Whether tasks are learnt in closed form, without gradient steps. */
  get closedForm() {
    return learnerOf(this.manifest) === "closed_form";
  }

  /** The most names one task may have. */
  get ways() {
    return this.manifest.task.ways;
  }

  /** Channels, height and width of every image. */
  get imageShape() {
    return this.manifest.task.image_shape;
  }

  /**
   * Learn a new task. The same arguments give the same result, and the one that Python gives.
   *
   * @param {ArrayLike<ArrayLike<number>>} images the support set: for each image its C*H*W pixels
   *     0..255, row by row, channel after channel.
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
    const pixels = checkImages(images, this.imageShape);
    checkSupport(images.length, this.manifest);
    const { names, targets } = checkLabels(labels, images.length);
    checkWays(names, this);
    if (!this.closedForm) {
      return this.#takeSteps(pixels, names, targets, options);
    }
    if (Object.values(options).some((value) => value !== undefined)) {
      throw new InputError(
        "this bundle fits a classifier in closed form, without gradient steps: leave out steps, " +
          "learningRate, seed and batches",
      );
    }
    return this.#fit(names, await this.#embed(pixels), targets);
  }

  async #takeSteps(pixels, names, targets, { steps, learningRate, seed = 0, batches }) {
    const { inner, limits, adapted } = this.manifest;
    const count = targets.length;
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
    const outputs = await this.#sessions.adapt.run({
      support_images: this.#images(pixels),
      support_labels: this.#int64(targets, [count]),
      batches: this.#int64(rows.flatMap((row) => [...row]), [rows.length, rows[0]?.length ?? 1]),
      learning_rate: this.#float32(Float32Array.of(rate), []),
    });
    if (!outputs.finite.data[0]) {
      throw new InputError(
        `adaptation diverged: its numbers are no longer finite after ${rows.length} steps at ` +
          `learning rate ${rate}; lower learningRate (this bundle was made for ` +
          `${inner.learning_rate}) or steps`,
      );
    }
    const weights = Object.fromEntries(Object.keys(adapted).map((name) => [name, outputs[name]]));
    const losses = Float32Array.from(outputs.losses.data);
    return new AdaptedModel(this, names, losses, async (chunk) => {
      const feeds = { images: this.#images(chunk), ...weights };
      const { logits } = await this.#sessions.predict_adapted.run(feeds);
      return cut(logits.data, this.ways);
    });
  }

  /** Return the features of each image, from the pixels of all. */
  async #embed(pixels) {
    const features = [];
    for (const chunk of chunks(pixels, this.imageShape)) {
      const outputs = await this.#sessions.embed.run({ images: this.#images(chunk) });
      const { data, dims } = outputs.features;
      features.push(...cut(data, dims[1]));
    }
    return features;
  }

  /** Return the task of these examples: a linear classifier of their features. */
  async #fit(names, features, targets) {
    const { data: weight, dims, bias, finite } = await this.#classifier(features, targets);
    if (!finite) {
      throw new InputError(
        "the classifier of these images is not finite: run checkGolden on this machine",
      );
    }
    const rows = cut(weight, dims[1]);
    const predict = async (chunk) => {
      const queries = await this.#embed(chunk);
      return queries.map((query) => Float32Array.from(rows, (row, i) => bias[i] + dot(row, query)));
    };
    const change = {
      add: async (images, labels) => {
        const pixels = checkImages(images, this.imageShape);
        const added = checkLabels(labels, images.length, names);
        checkWays(added.names, this);
        checkSupport(features.length + images.length, this.manifest);
        const all = [...features, ...(await this.#embed(pixels))];
        return this.#fit(added.names, all, [...targets, ...added.targets]);
      },
      remove: async (name) => {
        const place = names.indexOf(name);
        if (place < 0) {
          throw new InputError(`no class ${name}: the task has ${names.join(", ")}`);
        }
        const rest = names.filter((_, i) => i !== place);
        checkWays(rest, this);
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
    const outputs = await this.#sessions.fit.run({
      features: this.#float32(flat, [count, features[0].length]),
      support_labels: this.#int64(targets, [count]),
    });
    const { data, dims } = outputs["head.weight"];
    return { data, dims, bias: outputs["head.bias"].data, finite: outputs.finite.data[0] };
  }

  #float32(values, dims) {
    return new this.#ort.Tensor("float32", values, dims);
  }

  #int64(values, dims) {
    return new this.#ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  }

  #images(pixels) {
    return this.#float32(pixels, [pixels.length / size(this.imageShape), ...this.imageShape]);
  }

  /** Free the sessions' memory; nothing adapted from this model can predict after that. */
  async release() {
    for (const session of Object.values(this.#sessions)) {
      await session.release();
    }
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
    const pixels = checkImages(images, this.#model.imageShape);
    const rows = [];
    for (const chunk of chunks(pixels, this.#model.imageShape)) {
      rows.push(...(await this.#run(chunk)));
    }
    return rows;
  }
}

/**
 * Read a bundle's manifest and return it with a reader of the files it lists.
 *
 * @param bundle as in `FewShotModel.load`.
 * @returns {Promise<{manifest: object, read: (path: string) => Promise<Uint8Array>}>} `read`
 *     gives a file's bytes if they match their SHA-256.
 */
export async function openBundle(bundle) {
  const fetchBytes = typeof bundle === "function" ? bundle : bundleAt(bundle);
  const content = await fetchBytes("manifest.json");
  let manifest;
  try {
    manifest = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(content));
  } catch (error) {
    throw new InputError(`manifest.json is not JSON: ${error.message}`);
  }
  checkManifest(manifest);
  const read = async (path) => {
    const expected = manifest.files[path];
    if (typeof expected !== "string") {
      throw new InputError(`manifest.json does not list the file ${path}`);
    }
    const bytes = await fetchBytes(path, expected);
    // Absent on pages from plain http, where only the browser's own check in `bundleAt` is left.
    if (globalThis.crypto?.subtle && (await sha256(bytes)) !== expected) {
      throw new InputError(
        `${path} does not match its SHA-256 in manifest.json: ` +
          "the file was damaged or changed; fetch the bundle again",
      );
    }
    return bytes;
  };
  return { manifest, read };
}

/**
 * Return a reader of the files of a bundle's folder at an address, for `load` and `openBundle`.
 *
 * @param {string | URL} address of the folder that holds manifest.json.
 * @param {object} headers to send along, such as an Authorization.
 */
export function bundleAt(address, headers = {}) {
  const folder = new URL(address, globalThis.location?.href);
  folder.pathname = folder.pathname.replace(/\/*$/, "/");
  return async (path, expected) => {
    const url = new URL(path, folder);
    const secure = globalThis.crypto?.subtle !== undefined;
    const integrity = secure || expected === undefined ? "" : `sha256-${base64(expected)}`;
    let response;
    try {
      // Asked for anew each time, or a replaced bundle's graphs would not match its manifest.
      response = await fetch(url, { headers, integrity, cache: "no-cache" });
    } catch (error) {
      const damaged = integrity ? " or does not match its SHA-256 in manifest.json" : "";
      throw new InputError(`${url} cannot be fetched${damaged}`, { cause: error });
    }
    if (!response.ok) {
      throw new InputError(`${url} answers ${response.status}: give the address of a bundle`);
    }
    return new Uint8Array(await response.arrayBuffer());
  };
}

function base64(hex) {
  return btoa(hex.replace(/../g, (byte) => String.fromCharCode(Number.parseInt(byte, 16))));
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function checkManifest(manifest) {
  if (!FORMATS.includes(manifest?.format)) {
    throw new InputError(
      `manifest.json: format ${manifest?.format} is not a format this version reads (1 to 4): ` +
        "update this module or export the bundle again",
    );
  }
  let sound;
  try {
    sound = isSound(manifest);
  } catch {
    sound = false; // a part is missing, or of another type
  }
  if (!sound) {
    throw new InputError("manifest.json is not that of a bundle: export the bundle again");
  }
}

/** How a bundle learns: by gradient steps before format 3. */
function learnerOf({ format, learner }) {
  return format < 3 ? "gradient" : learner;
}

const whole = (value, low, high = 1e6) =>
  Number.isSafeInteger(value) && value >= low && value <= high;
const sizes = (shape) => Array.isArray(shape) && shape.every((n) => whole(n, 1));

/** Say whether a manifest's parts are what schemas/manifest.schema.json asks for, and agree. */
function isSound(manifest) {
  const { task, limits, files, format } = manifest;
  const kind = task.kind ?? "classification";
  const learns = { gradient: takesSteps, closed_form: fitsInClosedForm }[learnerOf(manifest)];
  return (
    ["classification", "regression"].includes(kind) &&
    task.dtype === (format === 4 ? "float64" : "float32") &&
    (kind === "regression" ? whole(task.outputs, 1) : whole(task.ways, 2)) &&
    task.image_shape.length >= 1 &&
    sizes(task.image_shape) &&
    (task.image_shape.length !== 3 || task.layout === "NCHW") &&
    (task.pixel_range === undefined || kind === "regression" || hasPixels(task)) &&
    (format < 4 || hasColumns(task, kind)) &&
    whole(limits.max_support, 1) &&
    learns(manifest) &&
    !Array.isArray(files) &&
    Object.values(files).every((digest) => typeof digest === "string")
  );
}

const hasPixels = ({ pixel_range: range, image_shape: shape }) =>
  String(range) === "0,255" && shape.length === 3;

function hasColumns({ columns, targets, image_shape: shape, outputs }, kind) {
  const isNumber = (column) =>
    typeof column.name === "string" && ["number", "date"].includes(column.kind);
  const isCategory = ({ name, kind, categories }) =>
    typeof name === "string" &&
    kind === "category" &&
    categories.every((category) => typeof category === "string");
  return (
    columns.length >= 1 &&
    String(shape) === String(columns.length) &&
    columns.every((column) => isNumber(column) || isCategory(column)) &&
    targets.every(isNumber) &&
    targets.length === (kind === "regression" ? outputs : 0)
  );
}

/** The tensors of labels or values, and the type and number of what is predicted. */
function answers({ kind, dtype, outputs, ways }) {
  return kind === "regression"
    ? { labels: ["support_labels", dtype, [null, outputs]], type: dtype, width: outputs }
    : { labels: ["support_labels", "int64", [null]], type: "float32", width: ways };
}

function takesSteps({ task, inner, limits, graphs, adapted }) {
  const { labels, type, width } = answers(task);
  const weights = Object.entries(adapted).map(([name, shape]) => [name, "float32", shape]);
  const { adapt, predict_adapted: predict } = graphs;
  const images = [null, ...task.image_shape];
  return (
    whole(limits.max_steps, 1) &&
    whole(inner.steps, 0, limits.max_steps) &&
    whole(inner.batch, 1) &&
    typeof inner.learning_rate === "number" &&
    inner.learning_rate > 0 &&
    inner.learning_rate <= MAX_LEARNING_RATE &&
    typeof inner.replacement === "boolean" &&
    weights.every(([, , shape]) => sizes(shape)) &&
    [adapt, predict].every(({ path }) => typeof path === "string") &&
    areTensors(adapt.inputs, [
      ["support_images", task.dtype, images],
      labels,
      ["batches", "int64", [null, null]],
      ["learning_rate", "float32", []],
    ]) &&
    areTensors(adapt.outputs, [["losses", "float32", [null]], ["finite", "bool", []], ...weights]) &&
    areTensors(predict.inputs, [["images", task.dtype, images], ...weights]) &&
    areTensors(predict.outputs, [["logits", type, [null, width]]])
  );
}

function fitsInClosedForm({ task, graphs, adapted }) {
  const { embed, fit, adapt, predict_adapted: predict } = graphs;
  const width = embed.outputs[0].shape[1];
  const images = [null, ...task.image_shape];
  const { labels, type, width: outputs } = answers(task);
  const features = ["features", "float32", [null, width]];
  const values = task.kind === "regression";
  const weights = values
    ? [
        ["head.mean", "float32", [width + 1, outputs]],
        ["head.covariance", "float32", [width + 1, width + 1]],
      ]
    : [
        ["head.weight", "float32", [null, width]],
        ["head.bias", "float32", [null]],
      ];
  const predicted = values
    ? ["logits", "variance"].map((name) => [name, type, [null, outputs]])
    : [["logits", "float32", [null, null]]];
  const finite = ["finite", "bool", []];
  const listed = Object.entries(adapted).map(([name, shape]) => ({ name, dtype: "float32", shape }));
  return (
    whole(width, 1) &&
    areTensors(listed, weights) &&
    [embed, fit, adapt, predict].every(({ path }) => typeof path === "string") &&
    areTensors(embed.inputs, [["images", task.dtype, images]]) &&
    areTensors(embed.outputs, [features]) &&
    areTensors(fit.inputs, [features, labels]) &&
    areTensors(fit.outputs, [...weights, finite]) &&
    areTensors(adapt.inputs, [["support_images", task.dtype, images], labels]) &&
    areTensors(adapt.outputs, [features, ...weights, finite]) &&
    areTensors(predict.inputs, [["images", task.dtype, images], ...weights]) &&
    areTensors(predict.outputs, predicted)
  );
}

/** Compare a graph's tensors, in any order, with name, dtype and shape; null is a free size. */
function areTensors(tensors, expected) {
  const text = ([name, dtype, shape]) =>
    JSON.stringify([name, dtype, shape.map((n) => (typeof n === "number" ? n : null))]);
  const found = tensors.map(({ name, dtype, shape }) => text([name, dtype, shape]));
  return String(found.sort()) === String(expected.map(text).sort());
}

const size = (shape) => shape.reduce((product, n) => product * n, 1);

/** Cut the pixels of images into those of one run after another. */
function chunks(pixels, shape) {
  const each = size(shape);
  return cut(pixels, each * Math.max(1, Math.min(256, Math.floor(PIXELS_AT_ONCE / each))));
}

/** Cut an array into rows of so many numbers; the last may be shorter. */
function cut(values, width) {
  const rows = [];
  for (let start = 0; start < values.length; start += width) {
    rows.push(values.slice(start, start + width));
  }
  return rows;
}

function dot(row, other) {
  let sum = 0;
  for (let i = 0; i < row.length; i++) {
    sum += row[i] * other[i];
  }
  return sum;
}

export function checkSupport(count, { limits }, what = "images") {
  if (count < 1 || count > limits.max_support) {
    throw new InputError(
      `the support set has ${count} ${what}: this bundle adapts to 1..${limits.max_support}`,
    );
  }
}

/** Return all pixels in one Float32Array: ONNX Runtime itself checks next to nothing. */
function checkImages(images, shape) {
  if (typeof images?.length !== "number" || typeof images === "string") {
    throw new InputError("images must be a list with the pixels of each image");
  }
  const each = size(shape);
  const pixels = new Float32Array(images.length * each);
  let highest = 0;
  let scaled = images.length > 0;
  for (let i = 0; i < images.length; i++) {
    const image = images[i];
    if (image?.length !== each) {
      throw new InputError(
        `image ${i} has ${image?.length ?? "no"} numbers, expected the ${each} pixels of ` +
          `(${shape.join(", ")}): one flat list, channel after channel; resize before`,
      );
    }
    for (const value of image) {
      if (!(value >= 0 && value <= 255)) {
        throw new InputError(`image ${i} holds the pixel ${value}: pixels are numbers, 0..255`);
      }
      highest = Math.max(highest, value);
    }
    scaled &&= !(image instanceof Uint8Array || image instanceof Uint8ClampedArray);
    pixels.set(image, i * each);
  }
  if (scaled && highest > 0 && highest <= 1) {
    throw new InputError(
      `images hold numbers of at most ${highest} and look scaled to 0..1, expected 0..255: ` +
        "multiply by 255 (or pass a Uint8Array if the images really are that dark)",
    );
  }
  return pixels;
}

/** Return the known names with the new ones in order of appearance, and each label's place. */
function checkLabels(labels, images, known = []) {
  if (!Array.isArray(labels) || labels.length !== images) {
    throw new InputError(`${images} images but ${labels?.length} labels: give each image one`);
  }
  if (labels.some((label) => label === undefined || label === null || Number.isNaN(label))) {
    throw new InputError("a label is missing or NaN: drop the unlabelled images");
  }
  const names = [...new Set([...known, ...labels])];
  return { names, targets: labels.map((label) => names.indexOf(label)) };
}

function checkWays(names, { ways, closedForm }) {
  if (names.length >= 2 && names.length <= ways) {
    return;
  }
  const most = closedForm
    ? `this bundle takes at most ${ways}, use fewer`
    : `this bundle's head has ${ways} ways, use fewer or a bundle with more`;
  const wayOut =
    names.length < 2 ? "with one name there is nothing to tell apart, add images of another" : most;
  throw new InputError(`labels have ${names.length} distinct names: ${wayOut}`);
}

export function checkBatches(rows, images, maxSteps) {
  if (!Array.isArray(rows) || rows.length > maxSteps) {
    throw new InputError(`batches must be a list of at most ${maxSteps} rows, one a step`);
  }
  for (const row of rows) {
    if (!(row.length >= 1) || row.length !== rows[0].length) {
      throw new InputError("the rows of batches must all hold the same number of image numbers");
    }
    Array.from(row, (place) => checkInteger(Number(place), "a number in batches", 0, images - 1));
  }
}

export function checkInteger(value, what, low, high) {
  if (!Number.isSafeInteger(value) || value < low || value > high) {
    throw new InputError(`${what} must be an integer in ${low}..${high}, got ${value}`);
  }
}

export function checkLearningRate(value) {
  if (typeof value !== "number" || !(Math.fround(value) > 0 && value <= MAX_LEARNING_RATE)) {
    throw new InputError(
      `learningRate must be above 0 and at most ${MAX_LEARNING_RATE}, got ${value}`,
    );
  }
  return value;
}

/** Share out probability among the outputs in use; the head's spare ones never get any. */
function softmax(logits) {
  const highest = Math.max(...logits);
  const exponentials = Array.from(logits, (logit) => Math.exp(logit - highest));
  const sum = exponentials.reduce((total, value) => total + value, 0);
  return Float32Array.from(exponentials, (value) => value / sum);
}
