/** Image files that are dropped or chosen, and pixels painted on a canvas. */

import { pixelsOfFile } from "./client/pictures.js";

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
