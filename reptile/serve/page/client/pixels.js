/**
 * Drawings and image files as the pixels that a bundle takes: dark ink on white, 0..255.
 *
 * Plain arithmetic, no canvas: the same pixels in every browser and in Node.
 */

const INK_SIZE = 0.68; // of the square: about what the training data's letters fill
const LEAST_EXTENT = 0.25; // of the pad: a dot must not blow up into a letter
const PEN_RADIUS = 0.72; // pixels of 28, as in the training data
const LANCZOS_LOBES = 3;
const PRECISION = 2 ** 22;

/**
 * Draw strokes into an image, scaled and centred as the training data is.
 *
 * @param {number[][][]} strokes points [x, y] on the pad, which is the square from 0 to 1.
 * @param {number[]} shape channels, height and width; the channels are all alike.
 * @returns {Uint8Array} the image's C*H*W pixels.
 */
export function drawingPixels(strokes, [channels, height, width]) {
  const points = strokes.flat();
  const [left, right] = range(points.map(([x]) => x));
  const [top, bottom] = range(points.map(([, y]) => y));
  const side = Math.min(height, width);
  const scale = (side * INK_SIZE) / Math.max(right - left, bottom - top, LEAST_EXTENT);
  const place = ([x, y]) => [
    (x - (left + right) / 2) * scale + width / 2,
    (y - (top + bottom) / 2) * scale + height / 2,
  ];
  const pieces = strokes.flatMap((stroke) => {
    const path = stroke.map(place);
    return path.map((point, i) => [path[Math.max(i - 1, 0)], point]);
  });
  const radius = (PEN_RADIUS * side) / 28;
  const plane = new Uint8Array(height * width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const distance = Math.sqrt(nearest(pieces, x + 0.5, y + 0.5));
      const ink = Math.min(Math.max(radius + 0.5 - distance, 0), 1);
      plane[y * width + x] = Math.round(255 * (1 - ink));
    }
  }
  return repeated(plane, channels);
}

function range(values) {
  return [Math.min(...values), Math.max(...values)];
}

/** Squared distance from a point to the nearest of some line pieces. */
function nearest(pieces, x, y) {
  let least = Infinity;
  for (const [[ax, ay], [bx, by]] of pieces) {
    const dx = bx - ax;
    const dy = by - ay;
    const along = ((x - ax) * dx + (y - ay) * dy) / Math.max(dx * dx + dy * dy, 1e-12);
    const t = Math.min(Math.max(along, 0), 1);
    least = Math.min(least, (x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2);
  }
  return least;
}

function repeated(plane, channels) {
  const pixels = new Uint8Array(channels * plane.length);
  for (let channel = 0; channel < channels; channel++) {
    pixels.set(plane, channel * plane.length);
  }
  return pixels;
}

/**
 * Stretch an image to a bundle's shape with Pillow's Lanczos, as `fit` in reptile/images.py does.
 *
 * Square images come out pixel for pixel the same; for others newer Pillows sometimes take the
 * columns first, which can round differently.
 *
 * @param {{data: Uint8ClampedArray, width: number, height: number}} image RGBA, as ImageData is;
 *     transparent pixels become white paper.
 * @param {number[]} shape channels (1 is grey, 3 is RGB), height and width.
 * @returns {Uint8Array} the image's C*H*W pixels.
 */
export function fit(image, [channels, height, width]) {
  const planes = channels === 1 ? [grey(image)] : onPaper(image);
  const pixels = new Uint8Array(channels * height * width);
  planes.forEach((plane, channel) => {
    const narrow = resizeRows(plane, image.width, image.height, width);
    const turned = transpose(narrow, width, image.height);
    const small = resizeRows(turned, image.height, width, height);
    pixels.set(transpose(small, height, width), channel * height * width);
  });
  return pixels;
}

function onPaper({ data }) {
  const planes = [0, 1, 2].map(() => new Uint8Array(data.length / 4));
  planes.forEach((plane, channel) => {
    for (let i = 0; i < plane.length; i++) {
      const alpha = data[4 * i + 3];
      plane[i] = Math.round((data[4 * i + channel] * alpha + 255 * (255 - alpha)) / 255);
    }
  });
  return planes;
}

/** ITU-R 601 luma in the integers that Pillow uses. */
function grey(image) {
  const [red, green, blue] = onPaper(image);
  return red.map((r, i) => (r * 19595 + green[i] * 38470 + blue[i] * 7471 + 0x8000) >> 16);
}

/** Pillow's Lanczos along rows, in its fixed-point arithmetic so that every pixel is the same. */
function resizeRows(plane, width, height, target) {
  const result = new Uint8ClampedArray(target * height);
  const step = width / target;
  const stretch = Math.max(step, 1);
  const reach = LANCZOS_LOBES * stretch;
  for (let x = 0; x < target; x++) {
    const centre = (x + 0.5) * step;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach + 0.5), width);
    const weights = [];
    for (let i = first; i < end; i++) {
      weights.push(lanczos((i - centre + 0.5) / stretch));
    }
    const sum = weights.reduce((total, weight) => total + weight, 0);
    const fixed = weights.map((weight) => {
      const scaled = (weight / sum) * PRECISION;
      return Math.trunc(scaled + (scaled < 0 ? -0.5 : 0.5));
    });
    for (let y = 0; y < height; y++) {
      let total = PRECISION / 2;
      for (let i = 0; i < fixed.length; i++) {
        total += plane[y * width + first + i] * fixed[i];
      }
      result[y * target + x] = Math.floor(total / PRECISION);
    }
  }
  return result;
}

function lanczos(x) {
  if (Math.abs(x) >= LANCZOS_LOBES) {
    return 0;
  }
  return sinc(x) * sinc(x / LANCZOS_LOBES);
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function transpose(plane, width, height) {
  const result = new Uint8Array(plane.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      result[x * height + y] = plane[y * width + x];
    }
  }
  return result;
}
