/**
 * Image files as the pixels that a bundle takes, read by the browser.
 *
 * Not for Node: decode there with a library of your choice, then `fit` of pixels.js.
 */

import { InputError } from "./fewshot.js";
import { fit } from "./pixels.js";

const MAX_PIXELS = 50_000_000; // as in reptile/images.py

/**
 * Read a picture file as the pixels that a bundle takes.
 *
 * @param {File} file a PNG or JPEG file, or another that this browser reads.
 * @param {number[]} shape the image's channels, height and width.
 * @returns {Promise<Uint8Array>} its C*H*W pixels.
 * @throws {InputError} a file that is no picture, or too large.
 */
export async function pixelsOfFile(file, shape) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch (error) {
    throw new InputError(`${file.name} cannot be read as a picture: choose a PNG or JPEG file.`, {
      cause: error,
    });
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    bitmap.close();
    throw new InputError(`${file.name}: ${width} x ${height} pixels; at most ${MAX_PIXELS}.`);
  }
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return fit(context.getImageData(0, 0, width, height), shape);
}
