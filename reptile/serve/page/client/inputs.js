/**
 * Checks of what callers give, before a graph runs: ONNX Runtime itself checks next to nothing.
 *
 * Inputs become one flat array of the type that the bundle's graphs take.
 */

import { InputError, MAX_LEARNING_RATE } from "./bundle.js";

const DATE = /^(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d(?:\.\d+)?)?)(Z|[+-]\d\d:\d\d)?)?$/;

export const sizeOf = (shape) => shape.reduce((product, n) => product * n, 1);
const isList = (value) => Array.isArray(value) || ArrayBuffer.isView(value);

/** What one input of a bundle is called in messages. */
export function inputName({ pixel_range: pixels, columns }) {
  return pixels ? "image" : columns ? "row" : "input";
}

/**
 * Return all inputs in one array: Float32Array, or Float64Array of a table's bundle.
 *
 * @param {Array} inputs images as flat lists of pixels 0..255; the rows of a table; or for each input
 *     its numbers as one flat list, or the number where it is only one.
 * @param {object} task of the manifest.
 */
export function checkInputs(inputs, task) {
  const { image_shape: shape, columns, pixel_range: pixels } = task;
  const what = inputName(task);
  if (typeof inputs?.length !== "number" || typeof inputs === "string") {
    throw new InputError(`${what}s must be a list`);
  }
  if (pixels) {
    return checkImages(inputs, shape);
  }
  const size = sizeOf(shape);
  const rows = Array.from(inputs, (row, i) =>
    columns ? coded(row, columns, `${what} ${i}`) : finite(row, size, `${what} ${i}`),
  );
  return numbersOf(rows, task);
}

/** Return the values of all points in one array, as `checkInputs`; `count` is that of the inputs. */
export function checkValues(values, count, task) {
  if (!Array.isArray(values) || values.length !== count) {
    throw new InputError(`${count} inputs but ${values?.length} values: give each point both`);
  }
  const { outputs, targets } = task;
  const rows = values.map((row, i) => {
    const named = row !== null && typeof row === "object" && !(row instanceof Date);
    const list = targets && named && !isList(row) ? coded(row, targets, `value ${i}`) : row;
    return finite(isList(list) ? Array.from(list, seconds) : seconds(list), outputs, `value ${i}`);
  });
  return numbersOf(rows, task);
}

function numbersOf(rows, { dtype }) {
  const numbers = rows.flat();
  if (dtype === "float64") {
    return Float64Array.from(numbers);
  }
  const wrong = numbers.find((value) => !Number.isFinite(Math.fround(value)));
  if (wrong !== undefined) {
    throw new InputError(`${wrong} is not finite in float32: give smaller numbers`);
  }
  return Float32Array.from(numbers);
}

function checkImages(images, shape) {
  const each = sizeOf(shape);
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

/** Return seconds since 1970 of a Date or of ISO 8601 text, UTC where it has no offset. */
function seconds(value) {
  if (value instanceof Date) {
    return value.getTime() / 1000;
  }
  const [, day, time = "00:00", zone = "Z"] = DATE.exec(value) ?? [];
  return typeof value === "string" ? Date.parse(`${day}T${time}${zone}`) / 1000 : value;
}

export function checkSupport(count, { limits, task }) {
  if (count < 1 || count > limits.max_support) {
    throw new InputError(
      `the support set has ${count} ${inputName(task)}s: this bundle adapts to ` +
        `1..${limits.max_support}`,
    );
  }
}

/** Return the known names with the new ones in order of appearance, and each label's place. */
export function checkLabels(labels, count, task, known = []) {
  const what = inputName(task);
  if (!Array.isArray(labels) || labels.length !== count) {
    throw new InputError(`${count} ${what}s but ${labels?.length} labels: give each ${what} one`);
  }
  if (labels.some((label) => label === undefined || label === null || Number.isNaN(label))) {
    throw new InputError(`a label is missing or NaN: drop the unlabelled ${what}s`);
  }
  const names = [...new Set([...known, ...labels])];
  return { names, targets: labels.map((label) => names.indexOf(label)) };
}

export function checkWays(names, { task }, closedForm) {
  const { ways } = task;
  if (names.length >= 2 && names.length <= ways) {
    return;
  }
  const most = closedForm
    ? `this bundle takes at most ${ways}, use fewer`
    : `this bundle's head has ${ways} ways, use fewer or a bundle with more`;
  const one = `with one name there is nothing to tell apart, add ${inputName(task)}s of another`;
  const wayOut = names.length < 2 ? one : most;
  throw new InputError(`labels have ${names.length} distinct names: ${wayOut}`);
}

export function checkBatches(rows, count, maxSteps) {
  if (!Array.isArray(rows) || rows.length > maxSteps) {
    throw new InputError(`batches must be a list of at most ${maxSteps} rows, one a step`);
  }
  for (const row of rows) {
    if (!(row.length >= 1) || row.length !== rows[0].length) {
      throw new InputError("the rows of batches must all hold the same number of image numbers");
    }
    Array.from(row, (place) => checkInteger(Number(place), "a number in batches", 0, count - 1));
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
