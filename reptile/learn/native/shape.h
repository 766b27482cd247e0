// What follows from the settings: the shapes of the layers, and where each weight lies.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "block.h"
#include "team.h"

namespace reptile {

enum Network : int32_t { STRIDE = 0, POOL = 1, MLP = 2 };

// Mirrored in __init__.py.
struct Settings {
  int32_t network, ways, channels, height, width, units, adam;
  float learning_rate, weight_decay, epsilon;
  double beta2;
};

constexpr int blocks_of(int channels) { return (channels + WIDTH - 1) / WIDTH; }

// One side of a convolution: output o reads input o · stride + tap - pad. Stride is 1 or 2.
struct Axis {
  int stride, pad, in, out;
  // The input read, or a negative number if it is outside.
  int source(int o, int tap) const {
    const int i = o * stride + tap - pad;
    return i < in ? i : -1;
  }
  // The output that reads input i through `tap`, or a negative number if there is none.
  int target(int i, int tap) const {
    const int o = i + pad - tap, shift = stride - 1;
    return o < 0 || (o & shift) || (o >> shift) >= out ? -1 : o >> shift;
  }
  // The outputs first..last that read an input through `tap`.
  std::pair<int, int> reached(int tap) const {
    int first = 0, last = out;
    while (first < last && source(first, tap) < 0) first++;
    while (first < last && source(last - 1, tap) < 0) last--;
    return {first, last};
  }
  // How many positions from `at` read the same taps and lie in line.
  int run(int at) const { return stride == 1 && at == 1 ? std::max(1, out - 2) : 1; }
};

struct Layer {
  bool deep;
  int planes;         // of the input: blocks if deep, else channels
  Axis y, x;          // the input of the first layer is framed, so its pad is 0
  int height, width;  // after pooling
  size_t weight, scale, shift;  // where they start in the packed weights

  size_t tap_size() const { return static_cast<size_t>(planes) * (deep ? WIDTH * WIDTH : WIDTH); }
};

// Up to 16 rows of a matrix: canonical [row][in][tap], packed [tap][in, padded][16].
struct Piece {
  size_t canonical, packed;
  int rows, in, padded, taps;

  void pack(const float* from, float* to) const {
    from += canonical;
    to += packed;
    if (rows < WIDTH || in < padded)
      std::memset(to, 0, sizeof(float) * taps * padded * WIDTH);
    for (int k = 0; k < in; k++)
      for (int tap = 0; tap < taps; tap++)
        for (int r = 0; r < rows; r++)
          to[(tap * padded + k) * WIDTH + r] = from[(static_cast<size_t>(r) * in + k) * taps + tap];
  }
  void unpack(const float* from, float* to) const {
    from += packed;
    to += canonical;
    for (int k = 0; k < in; k++)
      for (int tap = 0; tap < taps; tap++)
        for (int r = 0; r < rows; r++)
          to[(static_cast<size_t>(r) * in + k) * taps + tap] = from[(tap * padded + k) * WIDTH + r];
  }
};

struct Shape {
  Settings settings;
  int blocks;         // of 16 filters or hidden units
  int positions = 1;  // of the last activation
  int pad_top = 0, pad_left = 0;
  Layer layers[4];
  size_t hidden = 0, hidden_bias = 0, head, head_bias;
  size_t canonical = 0, packed = 0;  // numbers of weights
  std::vector<Piece> pieces;

  explicit Shape(const Settings& s) : settings(s), blocks(blocks_of(s.units)) {
    if (s.network == MLP) {
      hidden = matrix(s.units, inputs(), inputs(), 1);
      hidden_bias = matrix(s.units, 1, 1, 1);
    } else {
      convolutions();
    }
    head = packed;
    for (int way = 0; way < s.ways; way++) matrix(s.units, positions, positions, 1);
    head_bias = matrix(s.ways, 1, 1, 1);
  }

  bool pool() const { return settings.network == POOL; }
  int inputs() const { return settings.channels * settings.height * settings.width; }
  int framed_height() const { return settings.network == MLP ? settings.height : layers[0].y.in; }
  int framed_width() const { return settings.network == MLP ? settings.width : layers[0].x.in; }
  int head_blocks() const { return blocks * positions; }

  // Multiply-adds of one image's forward pass.
  double cost() const {
    if (settings.network == MLP) return static_cast<double>(settings.units) * inputs();
    double sum = 0;
    for (const Layer& layer : layers)
      sum += static_cast<double>(layer.y.out) * layer.x.out * blocks * layer.tap_size() * TAPS;
    return sum;
  }

  void pack(const float* from, float* to, const Team& team) const {
    for (size_t i = team.index; i < pieces.size(); i += team.count) pieces[i].pack(from, to);
  }
  void unpack(const float* from, float* to, const Team& team) const {
    for (size_t i = team.index; i < pieces.size(); i += team.count) pieces[i].unpack(from, to);
  }

 private:
  void convolutions() {
    int height = settings.height, width = settings.width;
    for (int i = 0; i < 4; i++) {
      Layer& layer = layers[i];
      const int channels = i ? settings.units : settings.channels;
      layer.deep = i > 0;
      layer.planes = layer.deep ? blocks : channels;
      layer.y = axis(height, i ? nullptr : &pad_top);
      layer.x = axis(width, i ? nullptr : &pad_left);
      layer.height = height = (height + 1) / 2;
      layer.width = width = (width + 1) / 2;
      layer.weight = matrix(settings.units, channels, layer.deep ? blocks * WIDTH : channels, TAPS);
      layer.scale = matrix(settings.units, 1, 1, 1);
      layer.shift = matrix(settings.units, 1, 1, 1);
    }
    positions = height * width;
  }
  Axis axis(int size, int* frame) const {
    const int stride = pool() ? 1 : 2;
    // TensorFlow's SAME: at stride 2 an even size is padded by (0, 1), an odd one by (1, 1).
    const int pad = pool() ? 1 : size % 2, out = pool() ? size : (size + 1) / 2;
    if (!frame) return {stride, pad, size, out};
    *frame = pad;
    return {stride, 0, size + pad + 1, out};
  }
  // Append a canonical matrix [out][in][taps]; return where it starts among the packed weights.
  size_t matrix(int out, int in, int padded, int taps) {
    const size_t start = packed;
    for (int row = 0; row < out; row += WIDTH) {
      pieces.push_back({canonical + static_cast<size_t>(row) * in * taps, packed,
                        std::min(WIDTH, out - row), in, padded, taps});
      packed += static_cast<size_t>(taps) * padded * WIDTH;
    }
    canonical += static_cast<size_t>(out) * in * taps;
    return start;
  }
};

}  // namespace reptile
