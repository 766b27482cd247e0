/**
 * FewShotModel on a server: the calls of fewshot.js, answered by the task API of `reptile serve`.
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

/** As `FewShotModel`, but on the server. */
export class ServiceModel {
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
    return new ServiceModel(base, headers, manifest);
  }

  get ways() {
    return this.manifest.task.ways;
  }

  get imageShape() {
    return this.manifest.task.image_shape;
  }

  /** As `FewShotModel.adapt`; mini-batches cannot be given. */
  async adapt(images, labels, { steps, learningRate, seed } = {}) {
    const body = { images: this.#nested(images), labels, steps, learning_rate: learningRate, seed };
    const task = await this.#post("tasks", body);
    const path = `tasks/${task.id}`;
    return {
      labels: task.labels,
      losses: Float32Array.from(task.losses),
      predict: async (queries) => {
        const answer = await this.#post(`${path}/predict`, { images: this.#nested(queries) });
        return {
          labels: answer.predictions.map(({ label }) => label),
          probabilities: answer.predictions.map(({ probabilities }) =>
            Float32Array.from(task.labels, (label) => probabilities[label]),
          ),
        };
      },
      forget: () => this.#send(path, { method: "DELETE" }),
    };
  }

  #nested(images) {
    const [, height, width] = this.manifest.task.image_shape;
    const cut = (values, size) =>
      Array.from({ length: values.length / size }, (_, i) =>
        values.slice(i * size, (i + 1) * size),
      );
    return images.map((image) => cut(cut(Array.from(image), width), height));
  }

  async #post(path, body) {
    const response = await this.#send(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    return response.json();
  }

  async #send(path, options) {
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

async function refusal(response) {
  const { status, headers, url } = response;
  if (status === 429 || status === 503) {
    const seconds = headers.get("Retry-After") ?? "a few";
    return `The server is busy. Try again in ${seconds} ${seconds === "1" ? "second" : "seconds"}.`;
  }
  if (status === 404 && url.includes("/tasks/")) {
    return "The server no longer has this task. Press Learn to adapt again.";
  }
  const { error } = await response.json().catch(() => ({}));
  return `The server refused (${status}): ${error ?? response.statusText}`;
}
