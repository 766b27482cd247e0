/**
 * Run a bundle's golden cases: inputs, and the outputs that PyTorch gave for them.
 *
 * Shows that ONNX Runtime on this machine, or in this browser, computes what was exported.
 */

import { InputError, openBundle } from "./bundle.js";

const TYPES = {
  "<f4": ["float32", Float32Array],
  "<f8": ["float64", Float64Array],
  "<i8": ["int64", BigInt64Array],
  "|b1": ["bool", Uint8Array],
};

/**
 * Compare every case within its own tolerance; the first that deviates more is an InputError.
 *
 * @param bundle as in `FewShotModel.load`.
 * @param ort the module onnxruntime-web or onnxruntime-node.
 * @returns {Promise<{graph: string, folder: string, deviation: number, logits?: number[]}[]>} for
 *     each case its graph, where its tensors lie, the largest absolute deviation and the logits.
 */
export async function checkGolden(bundle, ort) {
  const { manifest, read } = await openBundle(bundle);
  const { cases } = JSON.parse(new TextDecoder().decode(await read("golden/golden.json")));
  const tensors = async (paths) => {
    const entries = Object.entries(paths).map(async ([name, path]) => [
      name,
      npy(await read(`golden/${path}`), ort.Tensor),
    ]);
    return Object.fromEntries(await Promise.all(entries));
  };
  const sessions = {};
  const results = [];
  for (const golden of cases) {
    sessions[golden.graph] ??= await ort.InferenceSession.create(
      await read(manifest.graphs[golden.graph].path),
    );
    const outputs = await sessions[golden.graph].run(await tensors(golden.inputs));
    let deviation = 0;
    for (const [name, expected] of Object.entries(await tensors(golden.outputs))) {
      deviation = Math.max(deviation, compare(outputs[name], expected, golden, name));
    }
    results.push({
      graph: golden.graph,
      folder: Object.values(golden.outputs)[0].split("/")[0],
      deviation,
      ...(outputs.logits && { logits: Array.from(outputs.logits.data) }),
    });
  }
  for (const session of Object.values(sessions)) {
    await session.release();
  }
  return results;
}

function compare(found, expected, { graph, atol, rtol }, name) {
  if (String(found.dims) !== String(expected.dims)) {
    throw new InputError(`${graph}: ${name} has shape [${found.dims}], not [${expected.dims}]`);
  }
  let largest = 0;
  for (let i = 0; i < expected.data.length; i++) {
    const value = Number(expected.data[i]);
    const deviation = Math.abs(Number(found.data[i]) - value);
    if (!(deviation <= atol + rtol * Math.abs(value))) {
      throw new InputError(
        `${graph}: ${name}[${i}] is ${found.data[i]}, expected ${value} within ${atol} + ${rtol} ` +
          "of it: this ONNX Runtime does not compute what was exported",
      );
    }
    largest = Math.max(largest, deviation);
  }
  return largest;
}

/** Read NumPy's .npy format, as far as bundles use it, into a tensor. */
function npy(bytes, Tensor) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = bytes[6] === 1 ? 10 : 12;
  const end = start + (bytes[6] === 1 ? view.getUint16(8, true) : view.getUint32(8, true));
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, end));
  const type = TYPES[header.match(/'descr': '([^']*)'/)?.[1]];
  const shape = header.match(/'shape': \(([^)]*)\)/)?.[1];
  if (type === undefined || shape === undefined || header.includes("'fortran_order': True")) {
    throw new InputError(`a golden file is not a .npy of a known type: ${header.trim()}`);
  }
  const [name, Values] = type;
  const dims = (shape.match(/\d+/g) ?? []).map(Number);
  return new Tensor(name, new Values(Uint8Array.from(bytes.subarray(end)).buffer), dims);
}
