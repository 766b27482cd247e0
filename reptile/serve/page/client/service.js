/**
 * FewShotModel and FewShotRegressor on a server: the same calls, answered by the task API of
 * `reptile serve`.
 */

import { openBundle, bundleAt } from "./bundle.js";

/** The server refused or did not answer; the message says what to do about it. */
export class ServiceError extends Error {
  name = "ServiceError";

  /**
   * @param {string} message
   * @param {number} status HTTP's, or 0 if there was no answer.
   */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** A bundle on a server. */
class Service {
  #address;
  #headers;

  constructor(address, headers, manifest) {
    this.manifest = manifest;
    this.#address = address;
    this.#headers = headers;
  }

  /**
   * @param {string | URL} address of the server.
   * @param {object} headers to send along, such as an Authorization.
   */
  static async load(address, headers = {}) {
    const base = new URL(address, globalThis.location?.href);
    const { manifest } = await openBundle(bundleAt(new URL("bundle/", base), headers));
    return new this(base, headers, manifest);
  }

  get imageShape() {
    return this.manifest.task.image_shape;
  }

  /** Return inputs as the server takes them: images, rows by name, or other numbers. */
  body(inputs) {
    const { image_shape: shape, columns, pixel_range: pixels } = this.manifest.task;
    if (columns) {
      return { rows: inputs.map((row) => named(row, columns)) };
    }
    const sizes = pixels ? shape : shape.filter((size) => size > 1); // as the server takes them
    return { [pixels ? "images" : "inputs"]: inputs.map((input) => nested(input, sizes)) };
  }

  async post(path, body) {
    const response = await this.send(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    return response.json();
  }

  async send(path, options) {
    const headers = { ...this.#headers, ...options.headers };
    let response;
    try {
      response = await fetch(new URL(path, this.#address), { ...options, headers });
    } catch (error) {
      throw new ServiceError("The server cannot be reached. Is it still running?", 0);
    }
    if (response.ok) {
      return response;
    }
    throw new ServiceError(await refusal(response), response.status);
  }
}

/** As `FewShotModel`, but on the server. */
export class ServiceModel extends Service {
  get ways() {
    return this.manifest.task.ways;
  }

  /** As `FewShotModel.adapt`; mini-batches cannot be given. */
  async adapt(inputs, labels, { steps, learningRate, seed } = {}) {
    const body = { ...this.body(inputs), steps, learning_rate: learningRate, seed };
    let query = "";
    if (body.rows) {
      const name = unused(body.rows, "label");
      body.rows.forEach((row, i) => (row[name] = labels[i]));
      query = `?label=${name}`;
    } else {
      body.labels = labels;
    }
    const task = await this.post(`tasks${query}`, body);
    const path = `tasks/${task.id}`;
    return {
      labels: task.labels,
      losses: Float32Array.from(task.losses),
      predict: async (queries) => {
        const answer = await this.post(`${path}/predict`, this.body(queries));
        return {
          labels: answer.predictions.map(({ label }) => label),
          probabilities: answer.predictions.map(({ probabilities }) =>
            Float32Array.from(task.labels, (label) => probabilities[label]),
          ),
        };
      },
      forget: () => this.send(path, { method: "DELETE" }),
    };
  }
}

/** As `FewShotRegressor`, but on the server. */
export class ServiceRegressor extends Service {
  /** As `FewShotRegressor.adapt`; mini-batches cannot be given. */
  async adapt(inputs, values, { steps, learningRate, seed } = {}) {
    const { targets, outputs } = this.manifest.task;
    const body = { ...this.body(inputs), steps, learning_rate: learningRate, seed };
    if (body.rows) {
      body.rows.forEach((row, i) => Object.assign(row, named(values[i], targets)));
    } else {
      body.values = values.map((value) => nested(value, outputs > 1 ? [outputs] : []));
    }
    const task = await this.post("tasks", body);
    const path = `tasks/${task.id}`;
    const names =
      targets?.map(({ name }) => name) ??
      (outputs > 1 ? Array.from({ length: outputs }, (_, i) => `y${i}`) : ["y"]);
    const predictions = async (queries, level) =>
      (await this.post(`${path}/predict`, { ...this.body(queries), level })).predictions;
    return {
      losses: Float32Array.from(task.losses),
      predict: async (queries) =>
        (await predictions(queries)).map(({ values: found }) => names.map((name) => found[name])),
      /** As `AdaptedRegressor.predictInterval`. */
      predictInterval: async (queries, level = 0.95) =>
        (await predictions(queries, level)).map(({ low, high }) =>
          names.map((name) => ({ low: low[name], high: high[name] })),
        ),
      forget: () => this.send(path, { method: "DELETE" }),
    };
  }
}

/** Return a flat list as nested ones of these sizes; as a number if there are none. */
function nested(values, sizes) {
  const list = typeof values === "number" ? [values] : Array.from(values);
  const cut = (items, size) =>
    Array.from({ length: items.length / size }, (_, i) => items.slice(i * size, (i + 1) * size));
  return sizes.length ? sizes.slice(1).reduceRight(cut, list) : list[0];
}

/** Return a row by the names of its columns, as JSON. */
function named(row, columns) {
  const list = Array.isArray(row) || ArrayBuffer.isView(row);
  const single = row === null || typeof row !== "object" || row instanceof Date;
  const entries = columns.map(({ name }, i) => [name, single ? row : row[list ? i : name]]);
  return Object.fromEntries(entries); // JSON writes a Date as ISO text, and NaN as null
}

function unused(rows, name) {
  return rows.some((row) => name in row) ? unused(rows, `_${name}`) : name;
}

async function refusal(response) {
  const { status, headers, url } = response;
  if (status === 429 || status === 503) {
    const seconds = headers.get("Retry-After") ?? "a few";
    return `The server is busy. Try again in ${seconds} ${seconds === "1" ? "second" : "seconds"}.`;
  }
  if (status === 404 && url.includes("/tasks/")) {
    return "The server no longer has this task: learn it again.";
  }
  const { error } = await response.json().catch(() => ({}));
  return `The server refused (${status}): ${error ?? response.statusText}`;
}
