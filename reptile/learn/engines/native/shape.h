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
constexpr int MAX_LAYERS = 4;  // below the head; ModelSettings.hidden has as many at most

// Mirrored in __init__.py.
struct Settings {
  int32_t network, outputs, channels, height, width;
  int32_t layers, units[MAX_LAYERS];  // filters of the convolutions, or hidden units
  int32_t tanh;                       // instead of ReLU; in the MLP only
  int32_t squared_error;              // instead of cross-entropy
  int32_t values;                     // inputs are float values, not pixels
  int32_t adam;
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

// A hidden layer of the MLP is a convolution of a single position by a single tap.
struct Layer {
  bool deep;
  int planes;  // of the input: blocks if deep, else channels (the MLP: all its inputs)
  int blocks;  // of 16 filters or hidden units
  int taps = TAPS;
  Axis y{1, 0, 1, 1}, x{1, 0, 1, 1};  // the input of the first layer is framed, so its pad is 0
  int height = 1, width = 1;          // after pooling
  // Where they start in the packed weights; the MLP's shift is its bias, and it has no scale.
  size_t weight, scale = 0, shift;

  size_t tap_size() const { return static_cast<size_t>(planes) * (deep ? WIDTH * WIDTH : WIDTH); }
  size_t block_size() const { return taps * tap_size(); }
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
  int positions;  // of the last activation
  int pad_top = 0, pad_left = 0;
  Layer layers[MAX_LAYERS];
  size_t head, head_bias;
  size_t canonical = 0, packed = 0;  // numbers of weights
  std::vector<Piece> pieces;

  explicit Shape(const Settings& s) : settings(s) {
    int in = mlp() ? inputs() : s.channels, height = s.height, width = s.width;
    for (int i = 0; i < s.layers; i++) {
      Layer& layer = layers[i];
      layer.deep = i > 0;
      layer.planes = layer.deep ? blocks_of(in) : in;
      layer.blocks = blocks_of(s.units[i]);
      if (mlp()) {
        layer.taps = 1;
      } else {
        layer.y = axis(height, i ? nullptr : &pad_top);
        layer.x = axis(width, i ? nullptr : &pad_left);
        layer.height = height = (height + 1) / 2;
        layer.width = width = (width + 1) / 2;
      }
      layer.weight = matrix(s.units[i], in, layer.deep ? layer.planes * WIDTH : in, layer.taps);
      if (!mlp()) layer.scale = matrix(s.units[i], 1, 1, 1);
      layer.shift = matrix(s.units[i], 1, 1, 1);
      in = s.units[i];
    }
    positions = last().height * last().width;
    head = packed;
    for (int output = 0; output < s.outputs; output++) matrix(in, positions, positions, 1);
    head_bias = matrix(s.outputs, 1, 1, 1);
  }

  bool mlp() const { return settings.network == MLP; }
  bool pool() const { return settings.network == POOL; }
  const Layer& last() const { return layers[settings.layers - 1]; }
  int inputs() const { return settings.channels * settings.height * settings.width; }
  int framed_height() const { return mlp() ? settings.height : layers[0].y.in; }
  int framed_width() const { return mlp() ? settings.width : layers[0].x.in; }
  int head_blocks() const { return last().blocks * positions; }

  // Multiply-adds of one image's forward pass.
  double cost() const {
    double sum = 0;
    for (int i = 0; i < settings.layers; i++) {
      const Layer& layer = layers[i];
      sum += static_cast<double>(layer.y.out) * layer.x.out * layer.blocks * layer.block_size();
    }
    return sum;
  }

  void pack(const float* from, float* to, const Team& team) const {
    for (size_t i = team.index; i < pieces.size(); i += team.count) pieces[i].pack(from, to);
  }
  void unpack(const float* from, float* to, const Team& team) const {
    for (size_t i = team.index; i < pieces.size(); i += team.count) pieces[i].unpack(from, to);
  }

 private:
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
