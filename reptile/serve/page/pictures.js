/** Picture files in, pixels on the screen: all of the page's dealings with canvases. */

import { InputError } from "./fewshot.js";
import { fit } from "./pixels.js";

const MAX_PIXELS = 50_000_000; // as in reptile/images.py

/**
 * Take picture files that are dropped on an element or chosen in an input.
 *
 * @param {HTMLElement} target
 * @param {HTMLInputElement} input
 * @param {number[]} shape the images' channels, height and width.
 * @param {(pixels: Uint8Array) => void} take is called with each picture's pixels. A file that
 *     cannot be read emits "refused" on the target with the error.
 */
export function acceptFiles(target, input, shape, take) {
  const readAll = async (files) => {
    for (const file of files) {
      try {
        take(await pixelsOfFile(file, shape));
      } catch (error) {
        target.dispatchEvent(new CustomEvent("refused", { bubbles: true, detail: error }));
      }
    }
  };
  const pad = target.querySelector(".pad") ?? target;
  target.addEventListener("dragover", (event) => {
    event.preventDefault();
    pad.classList.add("over");
  });
  target.addEventListener("dragleave", () => pad.classList.remove("over"));
  target.addEventListener("drop", (event) => {
    event.preventDefault();
    pad.classList.remove("over");
    readAll([...event.dataTransfer.files]);
  });
  input.addEventListener("change", () => {
    readAll([...input.files]);
    input.value = ""; // so that the same file can be chosen again
  });
}

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

/** Show an image's pixels as they are. */
export function paint(canvas, pixels, [channels, height, width]) {
  canvas.width = width;
  canvas.height = height;
  const size = height * width;
  const rgba = new ImageData(width, height);
  for (let i = 0; i < size; i++) {
    for (let channel = 0; channel < 3; channel++) {
      rgba.data[4 * i + channel] = pixels[(channels === 1 ? 0 : channel * size) + i];
    }
    rgba.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(rgba, 0, 0);
}
