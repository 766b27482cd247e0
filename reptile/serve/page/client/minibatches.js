/**
 * The paper's mini-batches, number for number those of reptile/minibatches.py for the same seed.
 *
 * So that adapting in a browser gives the task that the service or Python gives.
 * Holds the part of numpy.random that this takes: SeedSequence, PCG64 and Generator.permuted.
 */

/** Return `steps` rows of `batch` places 0..size-1: shuffled and cycled, or fresh samples. */
export function miniBatches(seed, size, batch, steps, replacement = false) {
  const random = bits(seed);
  const rows = [];
  if (replacement) {
    for (let step = 0; step < steps; step++) {
      rows.push(shuffled(size, random).slice(0, batch));
    }
    return rows;
  }
  const order = [];
  while (order.length < steps * batch) {
    shuffled(size, random).forEach((place) => order.push(place));
  }
  for (let step = 0; step < steps; step++) {
    rows.push(order.slice(step * batch, (step + 1) * batch));
  }
  return rows;
}

function shuffled(size, random) {
  const order = Array.from({ length: size }, (_, i) => i);
  for (let i = size - 1; i > 0; i--) {
    const mask = 2 ** (32 - Math.clz32(i)) - 1;
    let j;
    do {
      j = (random() & mask) >>> 0;
    } while (j > i);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

const MASK64 = (1n << 64n) - 1n;
const MASK128 = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

/** numpy.random.PCG64(seed) as a source of 32-bit numbers: the low half of each draw first. */
function bits(seed) {
  const [a, b, c, d] = seedWords(seed);
  const increment = ((((c << 64n) | d) << 1n) | 1n) & MASK128;
  const advance = (state) => (state * MULTIPLIER + increment) & MASK128;
  let state = advance((increment + ((a << 64n) | b)) & MASK128);
  let high = null;
  return () => {
    if (high !== null) {
      const value = high;
      high = null;
      return value;
    }
    state = advance(state);
    const mixed = (state >> 64n) ^ (state & MASK64);
    const turn = state >> 122n;
    const draw = ((mixed >> turn) | (mixed << (64n - turn))) & MASK64;
    high = Number(draw >> 32n);
    return Number(draw & 0xffffffffn);
  };
}

/** numpy.random.SeedSequence(seed).generate_state(4, uint64). */
function seedWords(seed) {
  const entropy = [seed >>> 0, Math.floor(seed / 2 ** 32)];
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value = (value ^ constant) >>> 0;
    constant = Math.imul(constant, 0x931e8875) >>> 0;
    value = Math.imul(value, constant) >>> 0;
    return (value ^ (value >>> 16)) >>> 0;
  };
  const mix = (x, y) => {
    const value = (Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)) >>> 0;
    return (value ^ (value >>> 16)) >>> 0;
  };
  const pool = [0, 1, 2, 3].map((i) => hash(entropy[i] ?? 0));
  for (let source = 0; source < 4; source++) {
    for (let target = 0; target < 4; target++) {
      if (source !== target) {
        pool[target] = mix(pool[target], hash(pool[source]));
      }
    }
  }
  constant = 0x8b51f9dd;
  const words = Array.from({ length: 8 }, (_, i) => {
    let value = (pool[i % 4] ^ constant) >>> 0;
    constant = Math.imul(constant, 0x58f38ded) >>> 0;
    value = Math.imul(value, constant) >>> 0;
    return BigInt((value ^ (value >>> 16)) >>> 0);
  });
  return [0, 2, 4, 6].map((i) => (words[i + 1] << 32n) | words[i]);
}
