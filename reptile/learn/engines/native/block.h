// Sixteen floats at once, and the two small products everything is made of.
//
// A Block is 16 channels of one position: one cache line, in as many vectors as the processor
// needs. Written with the compilers' vector extensions, so that one source serves all of them.

#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>

namespace reptile {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE_ROWS = 6;
#else
constexpr int LANES = 4, TILE_ROWS = 3;
#endif
constexpr int WIDTH = 16;  // channels in a block
constexpr int PARTS = WIDTH / LANES;
constexpr int TAPS = 9;  // of a 3x3 convolution

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE inline __attribute__((always_inline))

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), may_alias));

struct Block {
  Vector part[PARTS];
};

template <class F>
INLINE Block each(F f) {
  Block result;
  UNROLL for (int i = 0; i < PARTS; i++) result.part[i] = f(i);
  return result;
}
INLINE Block load(const float* p) {
  return each([=](int i) { return *reinterpret_cast<const Vector*>(p + i * LANES); });
}
INLINE void store(float* p, const Block& a) {
  UNROLL for (int i = 0; i < PARTS; i++) *reinterpret_cast<Vector*>(p + i * LANES) = a.part[i];
}
INLINE Block splat(float value) {
  return each([=](int) { return Vector{} + value; });
}
INLINE Block operator+(const Block& a, const Block& b) {
  return each([&](int i) { return a.part[i] + b.part[i]; });
}
INLINE Block operator-(const Block& a, const Block& b) {
  return each([&](int i) { return a.part[i] - b.part[i]; });
}
INLINE Block operator*(const Block& a, const Block& b) {
  return each([&](int i) { return a.part[i] * b.part[i]; });
}
INLINE Block operator*(const Block& a, float b) {
  return each([&](int i) { return a.part[i] * b; });
}
// Comparisons are turned so that a NaN goes on: a diverged run must show in its loss.
INLINE Block relu(const Block& a) {
  return each([&](int i) { return a.part[i] < 0 ? Vector{} : a.part[i]; });
}
INLINE Block gate(const Block& value, const Block& by) {
  return each([&](int i) { return by.part[i] <= 0 ? Vector{} : value.part[i]; });
}
INLINE Block if_greater(const Block& a, const Block& b, const Block& then, const Block& otherwise) {
  return each([&](int i) { return a.part[i] > b.part[i] ? then.part[i] : otherwise.part[i]; });
}
INLINE Block if_equal(const Block& a, float b, const Block& then) {
  return each([&](int i) { return a.part[i] == b ? then.part[i] : Vector{}; });
}
// By Lambert's continued fraction at x / 4, p / q, whose argument is doubled twice with
// tanh 2x = 2 tanh x / (1 + tanh² x): within 7 units in the last place, and many floats at once.
INLINE Block tanh(const Block& a) {
  return each([&](int i) {
    const Vector limit = Vector{} + 9.f;  // tanh is 1 beyond
    Vector x = a.part[i] > limit ? limit : a.part[i] < -limit ? -limit : a.part[i];
    x *= .25f;
    const Vector s = x * x;
    Vector p = x * (((s + 378.f) * s + 17325.f) * s + 135135.f);
    Vector q = ((s * 28.f + 3150.f) * s + 62370.f) * s + 135135.f;
    for (int doubling = 0; doubling < 2; doubling++) {
      const Vector twice = 2.f * p * q;
      q = p * p + q * q;
      p = twice;
    }
    return p / q;
  });
}
INLINE float total(const Block& a) {
  float sum = 0;
  for (int i = 0; i < PARTS; i++)
    for (int j = 0; j < LANES; j++) sum += a.part[i][j];
  return sum;
}

// Sum of f(0) … f(n - 1) in four chains: faster, and less rounding, than in one.
template <class F>
INLINE Block sum(size_t n, F f) {
  Block chain[4] = {};
  size_t i = 0;
  for (; i + 4 <= n; i += 4) UNROLL for (int j = 0; j < 4; j++) chain[j] = chain[j] + f(i + j);
  for (; i < n; i++) chain[0] = chain[0] + f(i);
  return (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

// to[c][r] = from[r][c], 16 x 16, in squares of four.
inline void transpose(const float* from, float* to) {
  typedef float Quad __attribute__((vector_size(16), may_alias));
  for (int r = 0; r < WIDTH; r += 4)
    for (int c = 0; c < WIDTH; c += 4) {
      Quad row[4], pair[4];
      for (int i = 0; i < 4; i++)
        row[i] = *reinterpret_cast<const Quad*>(from + (r + i) * WIDTH + c);
      for (int i = 0; i < 2; i++) {
        pair[i] = __builtin_shufflevector(row[2 * i], row[2 * i + 1], 0, 4, 1, 5);
        pair[i + 2] = __builtin_shufflevector(row[2 * i], row[2 * i + 1], 2, 6, 3, 7);
      }
      for (int i = 0; i < 2; i++) {
        float* out = to + (c + 2 * i) * WIDTH + r;
        const Quad a = pair[2 * i], b = pair[2 * i + 1];
        *reinterpret_cast<Quad*>(out) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
        *reinterpret_cast<Quad*>(out + WIDTH) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
      }
    }
}

// ---- Products

// Inputs are Deep (blocks of 16 channels) or shallow (the first input: rows of B, plane by plane).
template <bool Deep>
constexpr int row_step = Deep ? WIDTH : 1;

// One output row is the sum over taps of (row of a) x (weights w of the tap).
struct Taps {
  int count = 0;
  const float* a[TAPS];
  const float* w[TAPS];
};

// out[r][16] = Σ over taps, planes and their channels of a[r][k] · w[k][16], for R rows at `row`.
template <int R, bool Deep>
void product_tile(const Taps& taps, int row, int planes, size_t plane, float* out) {
  Block sums[R] = {};
  for (int tap = 0; tap < taps.count; tap++) {
    const float* a = taps.a[tap] + row * row_step<Deep>;
    const float* w = taps.w[tap];
    for (int p = 0; p < planes; p++, a += plane) {
      UNROLL for (int k = 0; k < (Deep ? WIDTH : 1); k++, w += WIDTH) {
        const Block weights = load(w);
        UNROLL for (int r = 0; r < R; r++)
          sums[r] = sums[r] + weights * a[r * row_step<Deep> + k];
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) store(out + (row + r) * WIDTH, sums[r]);
}

// The part of two activations that a weight gradient sums over: lines of positions, a mini-batch
// at each. Steps are in floats; positions of d lie side by side.
struct Patch {
  int lines, positions, batch;
  size_t x_line, x_step, d_line;
};

// out[r][16] += Σ over a patch of x_r · d[16]: R rows of a weight gradient. Row r of a deep input
// is its channel x[0] + r; of a shallow one, wherever x[r] points.
template <int R, bool Deep>
void gradient_tile(const Patch& patch, const float* const* x, const float* d, float* out) {
  Block sums[R] = {};
  for (int line = 0; line < patch.lines; line++) {
    const float* d_at = d + line * patch.d_line;
    for (int position = 0; position < patch.positions; position++) {
      const size_t offset = line * patch.x_line + position * patch.x_step;
      for (int b = 0; b < patch.batch; b++, d_at += WIDTH) {
        const Block gradient = load(d_at);
        UNROLL for (int r = 0; r < R; r++)
          sums[r] = sums[r] + gradient * (Deep ? x[0][offset + b * WIDTH + r] : x[r][offset + b]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) store(out + r * WIDTH, load(out + r * WIDTH) + sums[r]);
}

// Both tiles for every number of rows, as tables: ragged ends cost no slow path.
template <bool Deep, class Rows>
struct Tiles;
template <bool Deep, int... R>
struct Tiles<Deep, std::integer_sequence<int, R...>> {
  static constexpr decltype(&product_tile<1, Deep>) product[] = {&product_tile<R + 1, Deep>...};
  static constexpr decltype(&gradient_tile<1, Deep>) gradient[] = {&gradient_tile<R + 1, Deep>...};
};
template <bool Deep>
using AllTiles = Tiles<Deep, std::make_integer_sequence<int, TILE_ROWS>>;

// Cut n rows into the fewest tiles, of nearly equal size.
template <class F>
INLINE void in_tiles(int n, F f) {
  const int tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
  for (int i = 0; i < tiles; i++) {
    const int begin = n * i / tiles, end = n * (i + 1) / tiles;
    f(begin, end - begin);
  }
}

template <bool Deep>
void product(const Taps& taps, int rows, int planes, size_t plane, float* out) {
  in_tiles(rows, [&](int row, int count) {
    AllTiles<Deep>::product[count - 1](taps, row, planes, plane, out);
  });
}

// Rows summed at once: those of x and d together stay in the first-level cache.
constexpr int CHUNK = 160;

// Add a patch to `rows` rows of a weight gradient.
template <bool Deep>
void gradient(const Patch& patch, const float* const* x, const float* d, int rows, float* out) {
  const int lines = std::max(1, CHUNK / (patch.positions * patch.batch));
  const int positions = std::max(1, CHUNK / patch.batch);
  for (int line = 0; line < patch.lines; line += lines)
    for (int position = 0; position < patch.positions; position += positions) {
      Patch part = patch;
      part.lines = std::min(lines, patch.lines - line);
      part.positions = std::min(positions, patch.positions - position);
      if (part.x_step == static_cast<size_t>(part.batch) * row_step<Deep>) {
        part.batch *= part.positions;  // at stride 1 they lie side by side in x too
        part.positions = 1;
      }
      const size_t x_skip = line * patch.x_line + position * patch.x_step;
      const size_t d_step = static_cast<size_t>(patch.batch) * WIDTH;
      const size_t d_skip = line * patch.d_line + position * d_step;
      in_tiles(rows, [&](int row, int count) {
        const float* from[TILE_ROWS];
        for (int r = 0; r < count; r++) from[r] = (Deep ? x[0] + row + r : x[row + r]) + x_skip;
        AllTiles<Deep>::gradient[count - 1](part, from, d + d_skip, out + row * WIDTH);
      });
    }
}

}  // namespace reptile
