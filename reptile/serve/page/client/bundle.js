/**
 * Reading a bundle: its manifest, checked, and its files, each against its SHA-256.
 *
 * For running its graphs see fewshot.js and regressor.js.
 */

// The first two have no learner: it is "gradient". The last takes the raw rows of a table.
const FORMATS = [1, 2, 3, 4];
export const MAX_LEARNING_RATE = 100; // as in the Python runtime

/** Something the caller can mend; the message names the value, the limit and the way out. */
export class InputError extends Error {
  name = "InputError";
}

/**
 * Read a bundle's manifest and return it with a reader of the files it lists.
 *
 * @param {string | URL | ((path: string) => Promise<Uint8Array>)} bundle where manifest.json lies: its
 *     folder's address, or a function from a file's path to its bytes.
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
export function learnerOf({ format, learner }) {
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
