// Inner loops of the small networks on a CPU: gather images, forward, backward, update, in float32;
// and predictions with their weights.
//
// The networks are so small that a framework spends its time between operations. Here a whole inner
// loop is one call, and the working set of a task stays in the caches.
//
// Layouts. Channels come in blocks of 16, the last one filled up with zeros, and the images of a
// mini-batch (B) lie side by side:
//   activations   [block][row][column][B][16]      first input   [channel][row][column][B]
//   convolution   [out block][tap][in channel][16 out], tap = 3 * ky + kx
//   head          [output][block][row][column][16], then the biases
// So each output position is a sum over taps of small products [B, in] x [in, 16]: nothing is
// unfolded, and taps that fall outside are left out. Only the first input has a frame of zeros.
// Padding channels stay zero throughout: their weights, activations and gradients are all zero.
// The MLP's layers are the same with a single position and tap, and with a bias and an activation
// in the place of batch norm.
//
// A step. Forward, layer by layer: products, the mean and squared deviations of each row while it
// is in cache, then normalise (and pool) with the rows' statistics joined. Backward likewise: the
// gradient of a layer's input row by row, with the two sums that batch norm needs. Each weight
// gradient tile is consumed by the optimiser where it is made, so no gradient vector exists; the
// input gradients use transposed copies of the weights, made before any of them moves.
//
// Threads. Two or more tasks: whole tasks a thread; what is left over, and single tasks, by all
// threads together (a Team). Every sum is made by one thread in an order that depends on shapes
// alone, so the results do not depend on the number of threads. The owner of a channel block
// convolves and normalises it, without a barrier in between where blocks divide evenly.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "block.h"
#include "shape.h"
#include "team.h"
#include "workspace.h"

namespace reptile {

// The arguments of one call; mirrored in __init__.py.
struct Call {
  const void* inputs;  // pixels (uint8) or values (float), image by image
  int64_t tasks, steps;
  const int64_t* starts;  // [tasks * steps + 1] where each mini-batch begins in rows and labels
  const int64_t* rows;
  const int64_t* labels;  // one of the two: labels, or targets [rows, outputs]
  const float* targets;
  const float* weights;
  const float* moment;
  int64_t start_step;  // floats from one task's start to the next; 0 if all share one
  int64_t size;        // weights of the canonical vector
  int64_t updates;     // the optimiser's updates so far
  int32_t in_turn;     // each task starts from the second moment that the last one left
  float* out_weights;
  float* out_moment;  // of each task; in turn, of the last one
  float* losses;
};

// The arguments of a call that predicts; mirrored in __init__.py. Every task has as many groups of
// images; a group is one forward pass, in which batch norm uses the statistics of its first images.
struct Prediction {
  const void* inputs;
  int64_t tasks, groups, images, measured;
  const int64_t* rows;   // [tasks, groups, images]
  const float* weights;  // [tasks, size]
  int64_t size;
  float* logits;  // [tasks, groups, images, outputs]
};

// The arguments of a call for the features of a batch, what the head sees, with the batch's own
// statistics; mirrored in __init__.py.
struct Features {
  const void* inputs;
  int64_t images;
  const int64_t* rows;
  const float* weights;
  float* features;  // [images, channels * positions], in the canonical order
};

// From the gradient of the last call's features to that of its weights; mirrored in __init__.py.
struct Gradient {
  int64_t images;
  const float* features;
  float* weights;
};

namespace {

constexpr float NORM_EPSILON = 1e-3f;  // models.BATCH_NORM_EPSILON
constexpr size_t TILE = WIDTH * WIDTH;

// ---- One inner loop

// A mini-batch: rows of the inputs, and their labels or targets.
struct Batch {
  const int64_t* rows;
  const int64_t* labels;
  const float* targets;
  int size;
};

class InnerLoop {
 public:
  InnerLoop(const Shape& shape, Workspace& work, const void* inputs, Team team)
      : shape_(shape), settings_(shape.settings), work_(work), inputs_(inputs), team_(team) {
    for (int i = 0; i < 256; i++) unit_[i] = static_cast<float>(i) / 255;
  }

  // What is null stays as it is.
  void pack(const float* weights, const float* moment) {
    shape_.pack(weights, work_.weights, team_);
    if (moment) shape_.pack(moment, work_.moment, team_);
    team_.wait();
  }
  void unpack(float* weights, float* moment) const {
    shape_.unpack(work_.weights, weights, team_);
    if (moment) shape_.unpack(work_.moment, moment, team_);
    team_.wait();
  }

  // One step; `number` counts the optimiser's updates from 1. The loss is the one before it.
  void step(const Batch& batch, int64_t number, float* loss) {
    batch_ = batch;
    size_ = measured_ = batch.size;
    unbias_ = static_cast<float>(1 / std::sqrt(1 - std::pow(settings_.beta2, number)));
    if (settings_.weight_decay != 1) decay();
    gather();
    team_.wait();
    const int last = settings_.layers - 1;
    for (int i = 0; i <= last; i++) forward(i);
    head_forward(work_.layers[last].out, work_.layers[last].out_gradient);
    transpose_weights();
    team_.wait();
    head_update(work_.layers[last].out);
    norm_sums(last);
    for (int i = last; i >= 0; i--) backward(i);
    if (team_.index == 0) {
      double sum = 0;
      for (int b = 0; b < size_; b++) sum += work_.losses[b];
      *loss = static_cast<float>(sum / size_);
    }
    team_.wait();
  }

  // A forward pass; batch norm's statistics are those of the first `measured` images.
  void predict(const Batch& batch, int measured, float* logits) {
    batch_ = batch;
    size_ = batch.size;
    measured_ = measured;
    gather();
    team_.wait();
    for (int i = 0; i < settings_.layers; i++) forward(i);
    const float* features = work_.layers[settings_.layers - 1].out;
    const auto [begin, end] = team_.share(size_);
    for (size_t b = begin; b < end; b++) head_logits(features, b, logits + b * settings_.outputs);
    team_.wait();
  }

  // The features of a batch; what `features_gradient` needs stays in the workspace.
  void features(const Batch& batch, float* features) {
    batch_ = batch;
    size_ = measured_ = batch.size;
    gather();
    team_.wait();
    for (int i = 0; i < settings_.layers; i++) forward(i);
    const float* from = work_.layers[settings_.layers - 1].out;
    each_feature([&](size_t packed, size_t canonical, bool padding) {
      if (!padding) features[canonical] = from[packed];
    });
    team_.wait();
  }

  // The gradient of the weights, given that of the features of the batch just passed forward.
  void features_gradient(int size, const float* features, float* weights) {
    size_ = measured_ = size;
    keeps_gradient_ = true;
    const int last = settings_.layers - 1;
    float* to = work_.layers[last].out_gradient;
    each_feature([&](size_t packed, size_t canonical, bool padding) {
      to[packed] = padding ? 0 : features[canonical];
    });
    transpose_weights();
    team_.wait();
    norm_sums(last);
    for (int i = last; i >= 0; i--) backward(i);
    team_.wait();
    shape_.unpack(work_.moment, weights, team_);
    team_.wait();
  }

 private:
  // Call f(packed, canonical, padding) for where each feature of this thread's images lies;
  // `padding` marks the channels that fill up the last block.
  template <class F>
  void each_feature(F f) const {
    const size_t positions = shape_.positions, channels = settings_.units[settings_.layers - 1];
    const auto [begin, end] = team_.share(size_);
    for (size_t b = begin; b < end; b++)
      for (size_t c = 0; c < shape_.last().blocks * WIDTH; c++)
        for (size_t p = 0; p < positions; p++)
          f(((c / WIDTH * positions + p) * size_ + b) * WIDTH + c % WIDTH,
            (b * channels + c) * positions + p, c >= channels);
  }

  // -- Optimiser

  void decay() {
    const auto [begin, end] = team_.share(shape_.packed);
    for (size_t i = begin; i < end; i++) work_.weights[i] *= settings_.weight_decay;
    // No barrier: the one after `gather` comes before the first use.
  }

  // Update packed weights at..at + count from their gradient.
  void apply(size_t at, const float* __restrict gradient, int count) {
    if (keeps_gradient_) {  // in the place of the moment
      std::memcpy(work_.moment + at, gradient, sizeof(float) * count);
      return;
    }
    float* __restrict w = work_.weights + at;
    const float rate = settings_.learning_rate;
    if (!settings_.adam) {
      for (int i = 0; i < count; i++) w[i] -= rate * gradient[i];
      return;
    }
    float* __restrict v = work_.moment + at;
    const float keep = static_cast<float>(settings_.beta2);
    const float add = static_cast<float>(1 - settings_.beta2);
    const float unbias = unbias_, epsilon = settings_.epsilon;
    for (int i = 0; i < count; i++) {
      const float g = gradient[i], moment = keep * v[i] + add * g * g;
      // The moment of a dead unit decays into denormals, which are slow; epsilon hides them anyway.
      v[i] = moment < 1e-36f ? 0 : moment;
      w[i] -= rate * g / (std::sqrt(v[i]) * unbias + epsilon);
    }
  }
  void apply(size_t at, const Block& gradient) {
    alignas(64) float values[WIDTH];
    store(values, gradient);
    apply(at, values, WIDTH);
  }

  // -- Input

  float unit(uint8_t pixel) const { return unit_[pixel]; }
  float unit(float value) const { return value; }

  void gather() {
    settings_.values ? gather(static_cast<const float*>(inputs_))
                     : gather(static_cast<const uint8_t*>(inputs_));
  }
  template <class T>
  void gather(const T* inputs) {
    const int height = settings_.height, width = settings_.width;
    const int framed_height = shape_.framed_height(), framed_width = shape_.framed_width();
    const size_t image = shape_.inputs();
    const auto [begin, end] =
        team_.share(static_cast<size_t>(settings_.channels) * framed_height);
    for (size_t line = begin; line < end; line++) {
      const int channel = static_cast<int>(line / framed_height);
      const int y = static_cast<int>(line % framed_height) - shape_.pad_top;
      float* to = work_.input + line * framed_width * size_;
      if (framed_width != width || y < 0 || y >= height)
        std::memset(to, 0, sizeof(float) * framed_width * size_);
      if (y < 0 || y >= height) continue;
      to += shape_.pad_left * size_;
      for (int b = 0; b < size_; b++) {
        const T* from =
            inputs + batch_.rows[b] * image + (static_cast<size_t>(channel) * height + y) * width;
        for (int x = 0; x < width; x++) to[x * size_ + b] = unit(from[x]);
      }
    }
  }

  // -- Convolution and batch norm, forward

  const float* input_of(int i) const { return i ? work_.layers[i - 1].out : work_.input; }

  // Offset of (plane, row, column) for rows of `width` positions.
  size_t at(int plane, int height, int row, int width, int column, bool deep = true) const {
    const size_t position = (static_cast<size_t>(plane) * height + row) * width + column;
    return position * size_ * (deep ? WIDTH : 1);
  }

  // Without whole blocks a thread, the rows of a block have several owners.
  void wait_unless_blocks_are_owned(const Layer& layer) const {
    if (layer.blocks % team_.count) team_.wait();
  }

  void forward(int i) {
    const Layer& layer = shape_.layers[i];
    if (team_.index == 0) work_.layers[i].next = 0;
    team_.rows(layer.blocks, layer.y.out, [&](int block, int first, int last) {
      for (int row = first; row < last; row++) {
        layer.deep ? convolve<true>(i, block, row) : convolve<false>(i, block, row);
        shape_.mlp() ? activate(i, block) : measure(i, block, row);
      }
    });
    if (!shape_.mlp()) {
      wait_unless_blocks_are_owned(layer);
      team_.rows(layer.blocks, layer.height, [&](int block, int first, int last) {
        const Norm norm = join(i, block);
        if (first == 0) work_.layers[i].norms[block] = norm;
        for (int row = first; row < last; row++)
          shape_.pool() ? normalise<true>(i, block, row, norm)
                        : normalise<false>(i, block, row, norm);
      });
    }
    team_.wait();
  }

  template <bool Deep>
  void convolve(int i, int block, int row) {
    const Layer& layer = shape_.layers[i];
    const float* input = input_of(i);
    const float* weights = work_.weights + layer.weight + block * layer.block_size();
    for (int column = 0, run; column < layer.x.out; column += run) {
      Taps taps;
      for (int tap = 0; tap < TAPS; tap++) {
        const int y = layer.y.source(row, tap / 3), x = layer.x.source(column, tap % 3);
        if (y < 0 || x < 0) continue;
        taps.a[taps.count] = input + at(0, layer.y.in, y, layer.x.in, x, Deep);
        taps.w[taps.count++] = weights + tap * layer.tap_size();
      }
      run = layer.x.run(column);
      product<Deep>(taps, run * size_, layer.planes, at(1, layer.y.in, 0, layer.x.in, 0, Deep),
                    work_.layers[i].conv + at(block, layer.y.out, row, layer.x.out, column));
    }
  }

  float* partial(int i, int block, int row) const {
    const size_t rows = shape_.layers[i].y.out;
    return work_.layers[i].rows + (block * rows + row) * 2 * WIDTH;
  }

  // A row's mean and squared deviations from it, over the images that batch norm measures.
  void measure(int i, int block, int row) {
    const Layer& layer = shape_.layers[i];
    const float* y = work_.layers[i].conv + at(block, layer.y.out, row, layer.x.out, 0);
    const int columns = layer.x.out;
    float* to = partial(i, block, row);
    const Block mean = row_sum(y, columns, [](const Block& value) { return value; }) *
                       (1.f / (columns * measured_));
    store(to, mean);
    store(to + WIDTH, row_sum(y, columns, [&](const Block& value) {
            const Block off = value - mean;
            return off * off;
          }));
  }
  template <class F>
  INLINE Block row_sum(const float* y, int columns, F f) const {
    if (measured_ == size_)
      return sum(columns * size_, [&](int j) { return f(load(y + j * WIDTH)); });
    return sum(columns, [&](int x) {
      return sum(measured_, [&](int b) { return f(load(y + (x * size_ + b) * WIDTH)); });
    });
  }

  Norm join(int i, int block) const {
    const Layer& layer = shape_.layers[i];
    const int rows = layer.y.out, n = layer.x.out * measured_;
    const float* row = partial(i, block, 0);
    Norm norm;
    norm.mean = sum(rows, [=](int j) { return load(row + j * 2 * WIDTH); }) * (1.f / rows);
    const Block squares = sum(rows, [&](int j) {
      const Block off = load(row + j * 2 * WIDTH) - norm.mean;
      return load(row + j * 2 * WIDTH + WIDTH) + off * off * static_cast<float>(n);
    });
    const Block variance = squares * (1.f / (static_cast<float>(rows) * n)) + splat(NORM_EPSILON);
    for (int p = 0; p < PARTS; p++)
      for (int j = 0; j < LANES; j++) norm.inverse.part[p][j] = 1 / std::sqrt(variance.part[p][j]);
    norm.slope = load(work_.weights + layer.scale + block * WIDTH) * norm.inverse;
    norm.shift = load(work_.weights + layer.shift + block * WIDTH);
    return norm;
  }

  // A stretch of a row that batch norm treats alike: its outputs, and the convolution's positions
  // (cells) that make them. With pooling, one output column and its window; without, a whole row.
  struct Stretch {
    int count;  // positions x images
    size_t out;
    int cells;
    float* cell[4];
  };
  template <bool Pool, class F>
  INLINE void stretches(int i, int block, int row, F f) const {
    const Layer& layer = shape_.layers[i];
    float* conv = work_.layers[i].conv;
    Stretch stretch;
    stretch.cells = 1;
    stretch.out = at(block, layer.height, row, layer.width, 0);
    if (!Pool) {
      stretch.count = layer.width * size_;
      stretch.cell[0] = conv + stretch.out;
      return f(stretch);
    }
    stretch.count = size_;
    for (int column = 0; column < layer.width; column++, stretch.out += size_ * WIDTH) {
      stretch.cells = 0;
      for (int y = 2 * row; y < std::min(2 * row + 2, layer.y.out); y++)
        for (int x = 2 * column; x < std::min(2 * column + 2, layer.x.out); x++)
          stretch.cell[stretch.cells++] = conv + at(block, layer.y.out, y, layer.x.out, x);
      f(stretch);
    }
  }

  // The cell that wins a window: its convolution value, normalised value and number. The first
  // of equals wins, as in PyTorch.
  template <bool Pool>
  INLINE void winner(const Stretch& stretch, size_t offset, const Norm& norm, Block& value,
                     Block& normal, Block& number) const {
    value = load(stretch.cell[0] + offset);
    normal = (value - norm.mean) * norm.slope + norm.shift;
    number = {};
    for (int c = 1; Pool && c < stretch.cells; c++) {
      const Block other = load(stretch.cell[c] + offset);
      const Block other_normal = (other - norm.mean) * norm.slope + norm.shift;
      value = if_greater(other_normal, normal, other, value);
      number = if_greater(other_normal, normal, splat(static_cast<float>(c)), number);
      normal = if_greater(other_normal, normal, other_normal, normal);
    }
  }

  template <bool Pool>
  void normalise(int i, int block, int row, const Norm& norm) {
    stretches<Pool>(i, block, row, [&](const Stretch& stretch) {
      float* out = work_.layers[i].out + stretch.out;
      for (int j = 0; j < stretch.count * WIDTH; j += WIDTH) {
        Block value, normal, number;
        winner<Pool>(stretch, j, norm, value, normal, number);
        store(out + j, relu(normal));
      }
    });
  }

  // -- The MLP's bias and activation

  void activate(int i, int block) {
    const float* from = work_.layers[i].conv + at(block, 1, 0, 1, 0);
    float* to = work_.layers[i].out + at(block, 1, 0, 1, 0);
    const Block bias = load(work_.weights + shape_.layers[i].shift + block * WIDTH);
    for (int j = 0; j < size_ * WIDTH; j += WIDTH) {
      const Block x = load(from + j) + bias;
      store(to + j, settings_.tanh ? tanh(x) : relu(x));
    }
  }

  // Turn the gradient of the activation into that of its input; update the bias.
  void activate_backward(int i, int block) {
    const float* out = work_.layers[i].out + at(block, 1, 0, 1, 0);
    const float* from = work_.layers[i].out_gradient + at(block, 1, 0, 1, 0);
    float* to = work_.layers[i].conv + at(block, 1, 0, 1, 0);
    for (int j = 0; j < size_ * WIDTH; j += WIDTH) {
      const Block y = load(out + j), d = load(from + j);
      store(to + j, settings_.tanh ? d * (splat(1) - y * y) : gate(d, y));
    }
    apply(shape_.layers[i].shift + block * WIDTH,
          sum(size_, [=](size_t b) { return load(to + b * WIDTH); }));
  }

  // -- Head: logits and loss

  void head_logits(const float* features, size_t b, float* logits) const {
    const size_t outputs = settings_.outputs, blocks = shape_.head_blocks();
    const float* weights = work_.weights + shape_.head;
    const float* bias = work_.weights + shape_.head_bias;
    for (size_t o = 0; o < outputs; o++)
      logits[o] = bias[o] + total(sum(blocks, [&](size_t f) {
                    return load(weights + (o * blocks + f) * WIDTH) *
                           load(features + (f * size_ + b) * WIDTH);
                  }));
  }

  // Both losses turn the logits of an image into their gradient, and return its loss.
  float cross_entropy(size_t b, float* logits) const {
    const size_t ways = settings_.outputs, label = batch_.labels[b];
    const float largest = *std::max_element(logits, logits + ways), correct = logits[label];
    float scale = 0;
    for (size_t way = 0; way < ways; way++) scale += std::exp(logits[way] - largest);
    for (size_t way = 0; way < ways; way++)
      logits[way] = (std::exp(logits[way] - largest) / scale - (way == label)) / size_;
    return std::log(scale) + largest - correct;
  }
  float squared_error(size_t b, float* values) const {
    const size_t outputs = settings_.outputs;
    float sum = 0;
    for (size_t o = 0; o < outputs; o++) {
      const float error = values[o] - batch_.targets[b * outputs + o];
      sum += error * error;
      values[o] = 2 * error / (static_cast<float>(outputs) * size_);
    }
    return sum / outputs;
  }

  // Loss of each image, and the gradients of logits and features.
  void head_forward(const float* features, float* gradient) {
    const size_t outputs = settings_.outputs, blocks = shape_.head_blocks();
    const float* weights = work_.weights + shape_.head;
    const auto [begin, end] = team_.share(size_);
    for (size_t b = begin; b < end; b++) {
      float* logits = work_.logits + b * outputs;
      head_logits(features, b, logits);
      work_.losses[b] = settings_.squared_error ? squared_error(b, logits)
                                                : cross_entropy(b, logits);
      for (size_t f = 0; f < blocks; f++)
        store(gradient + (f * size_ + b) * WIDTH, sum(outputs, [&](size_t o) {
                return load(weights + (o * blocks + f) * WIDTH) * logits[o];
              }));
    }
  }

  void head_update(const float* features) {
    const size_t outputs = settings_.outputs, blocks = shape_.head_blocks();
    const auto [begin, end] = team_.share(outputs);
    for (size_t o = begin; o < end; o++) {
      for (size_t f = 0; f < blocks; f++)
        apply(shape_.head + (o * blocks + f) * WIDTH, sum(size_, [&](size_t b) {
                return load(features + (f * size_ + b) * WIDTH) * work_.logits[b * outputs + o];
              }));
      float bias = 0;
      for (int b = 0; b < size_; b++) bias += work_.logits[b * outputs + o];
      apply(shape_.head_bias + o, &bias, 1);
    }
  }

  // -- Layers, backward

  void transpose_weights() {
    for (int i = 1; i < settings_.layers; i++) {
      const Layer& layer = shape_.layers[i];
      const int planes = layer.planes, taps = layer.taps;
      const auto [begin, end] = team_.share(static_cast<size_t>(layer.blocks) * taps * planes);
      for (size_t item = begin; item < end; item++) {
        const size_t in = item % planes, tap = item / planes % taps, out = item / planes / taps;
        transpose(work_.weights + layer.weight + item * TILE,
                  work_.layers[i].transposed + ((in * taps + tap) * layer.blocks + out) * TILE);
      }
    }
  }

  void norm_sums(int i) {
    if (shape_.mlp()) return;
    team_.rows(shape_.layers[i].blocks, shape_.layers[i].height,
               [&](int block, int first, int last) {
                 for (int row = first; row < last; row++) norm_sums(i, block, row);
               });
  }
  // A row's share of Σ d and Σ d · (y - mean), where d is the gradient at batch norm's output.
  void norm_sums(int i, int block, int row) {
    shape_.pool() ? norm_sums<true>(i, block, row) : norm_sums<false>(i, block, row);
  }
  template <bool Pool>
  void norm_sums(int i, int block, int row) {
    const Norm norm = work_.layers[i].norms[block];
    const float* gradient = work_.layers[i].out_gradient;
    Block plain{}, by_value{};
    stretches<Pool>(i, block, row, [&](const Stretch& stretch) {
      Block own_plain{}, own_by_value{};  // sums of sums round less
      for (int j = 0; j < stretch.count * WIDTH; j += WIDTH) {
        Block value, normal, number;
        winner<Pool>(stretch, j, norm, value, normal, number);
        const Block d = gate(load(gradient + stretch.out + j), normal);
        own_plain = own_plain + d;
        own_by_value = own_by_value + d * (value - norm.mean);
      }
      plain = plain + own_plain;
      by_value = by_value + own_by_value;
    });
    store(partial(i, block, row), plain);
    store(partial(i, block, row) + WIDTH, by_value);
  }

  void backward(int i) {
    const Layer& layer = shape_.layers[i];
    if (!shape_.mlp()) wait_unless_blocks_are_owned(layer);
    team_.rows(layer.blocks, layer.height, [&](int block, int first, int last) {
      shape_.mlp()    ? activate_backward(i, block)
      : shape_.pool() ? norm_backward<true>(i, block, first, last)
                      : norm_backward<false>(i, block, first, last);
    });
    team_.wait();
    if (!layer.deep) {
      first_weight_gradients();
      return;
    }
    team_.rows(layer.planes, layer.y.in, [&](int block, int first, int last) {
      for (int row = first; row < last; row++) {
        input_gradient(i, block, row);
        if (!shape_.mlp()) norm_sums(i - 1, block, row);
      }
    });
    weight_gradients(i);
  }

  // Turn the convolution's output into the gradient there, in place; update scale and shift.
  template <bool Pool>
  void norm_backward(int i, int block, int first, int last) {
    const Layer& layer = shape_.layers[i];
    const Norm norm = work_.layers[i].norms[block];
    const float* row_sums = partial(i, block, 0);
    const Block plain = sum(layer.height, [=](int j) { return load(row_sums + j * 2 * WIDTH); });
    const Block by_value =
        sum(layer.height, [=](int j) { return load(row_sums + j * 2 * WIDTH + WIDTH); });
    if (first == 0) {
      apply(layer.scale + block * WIDTH, by_value * norm.inverse);
      apply(layer.shift + block * WIDTH, plain);
    }
    const float share = 1.f / (static_cast<float>(layer.y.out) * layer.x.out * size_);
    const Block mean_d = plain * share;
    const Block per_value = by_value * norm.inverse * norm.inverse * share;
    for (int row = first; row < last; row++)
      stretches<Pool>(i, block, row, [&](const Stretch& stretch) {
        const float* from = work_.layers[i].out_gradient + stretch.out;
        for (int j = 0; j < stretch.count * WIDTH; j += WIDTH) {
          Block value, normal, number;
          winner<Pool>(stretch, j, norm, value, normal, number);
          const Block d = gate(load(from + j), normal);
          for (int c = 0; c < (Pool ? stretch.cells : 1); c++) {
            float* y = stretch.cell[c] + j;
            const Block own = Pool ? if_equal(number, static_cast<float>(c), d) : d;
            store(y, norm.slope * (own - mean_d - (load(y) - norm.mean) * per_value));
          }
        }
      });
  }

  // A row of the gradient of layer i's input, for one block of its channels.
  void input_gradient(int i, int block, int row) {
    const Layer& layer = shape_.layers[i];
    const float* gradient = work_.layers[i].conv;
    const float* weights = work_.layers[i].transposed + block * layer.taps * layer.blocks * TILE;
    for (int column = 0, run; column < layer.x.in; column += run) {
      Taps taps;
      for (int tap = 0; tap < TAPS; tap++) {
        const int y = layer.y.target(row, tap / 3), x = layer.x.target(column, tap % 3);
        if (y < 0 || x < 0) continue;
        taps.a[taps.count] = gradient + at(0, layer.y.out, y, layer.x.out, x);
        taps.w[taps.count++] = weights + tap * layer.blocks * TILE;
      }
      run = layer.x.run(column);
      product<true>(taps, run * size_, layer.blocks, at(1, layer.y.out, 0, layer.x.out, 0),
                    work_.layers[i - 1].out_gradient +
                        at(block, layer.y.in, row, layer.x.in, column));
    }
  }

  // Tiles of 16 inputs x 16 outputs; whoever is free takes the next one.
  void weight_gradients(int i) {
    const int taps = shape_.layers[i].taps, blocks = shape_.layers[i].blocks;
    const int tiles = shape_.layers[i].planes * blocks * taps;
    for (int item; (item = work_.layers[i].next.fetch_add(1, std::memory_order_relaxed)) < tiles;)
      weight_gradient(i, item / taps / blocks, item / taps % blocks, item % taps);
  }

  void weight_gradient(int i, int in, int out, int tap) {
    const Layer& layer = shape_.layers[i];
    alignas(64) float tile[TILE] = {};
    const auto [top, bottom] = layer.y.reached(tap / 3);
    const auto [left, right] = layer.x.reached(tap % 3);
    if (top < bottom && left < right) {
      const int y = layer.y.source(top, tap / 3), x = layer.x.source(left, tap % 3);
      const float* input = input_of(i) + at(in, layer.y.in, y, layer.x.in, x);
      gradient<true>(patch(layer, bottom - top, right - left), &input,
                     work_.layers[i].conv + at(out, layer.y.out, top, layer.x.out, left), WIDTH,
                     tile);
    }
    const size_t number = static_cast<size_t>(out * layer.taps + tap) * layer.planes + in;
    apply(layer.weight + number * TILE, tile, TILE);
  }

  Patch patch(const Layer& layer, int lines, int positions) const {
    const size_t x_step = at(0, 1, 0, 1, layer.x.stride, layer.deep);
    return {lines, positions, size_, x_step * layer.x.in, x_step, at(0, 1, 0, 1, layer.x.out)};
  }

  // Of the first layer: tiles of up to 16 rows, which are the channels of each tap in turn.
  void first_weight_gradients() {
    const Layer& layer = shape_.layers[0];
    const size_t plane = at(1, layer.y.in, 0, layer.x.in, 0, false);
    const int rows = layer.taps * layer.planes, strips = (rows + WIDTH - 1) / WIDTH;
    const int tiles = layer.blocks * strips;
    for (int item; (item = work_.layers[0].next.fetch_add(1, std::memory_order_relaxed)) < tiles;) {
      const int block = item / strips, first = item % strips * WIDTH;
      const int count = std::min(WIDTH, rows - first);
      alignas(64) float tile[TILE] = {};
      const float* x[WIDTH];
      int tap = first / layer.planes, channel = first % layer.planes;
      for (int r = 0; r < count; tap++, channel = 0) {
        const float* from = work_.input + at(0, layer.y.in, tap / 3, layer.x.in, tap % 3, false);
        for (; r < count && channel < layer.planes; channel++) x[r++] = from + channel * plane;
      }
      gradient<false>(patch(layer, layer.y.out, layer.x.out), x,
                      work_.layers[0].conv + at(block, layer.y.out, 0, layer.x.out, 0), count,
                      tile);
      apply(layer.weight + (static_cast<size_t>(block) * rows + first) * WIDTH, tile,
            count * WIDTH);
    }
  }

  const Shape& shape_;
  const Settings& settings_;
  Workspace& work_;
  const void* inputs_;
  const Team team_;
  Batch batch_{};
  int size_ = 0;      // images in the mini-batch
  int measured_ = 0;  // the first of them, whose statistics batch norm uses: all when learning
  bool keeps_gradient_ = false;  // instead of updating the weights
  float unbias_ = 1;  // Adam's correction of the second moment, 1 / sqrt(1 - beta2^number)
  float unit_[256];
};

// ---- Many inner loops

void run_task(const Shape& shape, Workspace& work, const Call& call, int64_t task, Team team) {
  InnerLoop loop(shape, work, call.inputs, team);
  // In turn, the second moment stays in the workspace from task to task.
  const bool first = !call.in_turn || task == 0, last = !call.in_turn || task + 1 == call.tasks;
  const int64_t updates = call.updates + (call.in_turn ? task * call.steps : 0);
  loop.pack(call.weights + task * call.start_step,
            first ? call.moment + task * call.start_step : nullptr);
  for (int64_t step = 0; step < call.steps; step++) {
    const int64_t index = task * call.steps + step, begin = call.starts[index];
    const Batch batch{call.rows + begin, call.labels ? call.labels + begin : nullptr,
                      call.targets ? call.targets + begin * shape.settings.outputs : nullptr,
                      static_cast<int>(call.starts[index + 1] - begin)};
    loop.step(batch, updates + step + 1, call.losses + index);
  }
  loop.unpack(call.out_weights + task * call.size,
              last ? call.out_moment + (call.in_turn ? 0 : task * call.size) : nullptr);
}

void predict_task(const Shape& shape, Workspace& work, const Prediction& call, int64_t task,
                  Team team) {
  InnerLoop loop(shape, work, call.inputs, team);
  loop.pack(call.weights + task * call.size, nullptr);
  for (int64_t group = task * call.groups; group < (task + 1) * call.groups; group++) {
    const Batch batch{call.rows + group * call.images, nullptr, nullptr,
                      static_cast<int>(call.images)};
    loop.predict(batch, static_cast<int>(call.measured),
                 call.logits + group * call.images * shape.settings.outputs);
  }
}

struct Engine {
  explicit Engine(const Settings& settings) : shape(settings) {}

  Shape shape;
  std::vector<std::unique_ptr<Workspace>> workspaces;
  std::mutex mutex;  // the workspaces serve one call at a time

  void adapt(const Call& call, int threads) {
    int batch = 1;
    for (int64_t i = 0; i < call.tasks * call.steps; i++)
      batch = std::max(batch, static_cast<int>(call.starts[i + 1] - call.starts[i]));
    run(call.tasks, batch, threads, call.in_turn, [&](Workspace& work, int64_t task, Team team) {
      run_task(shape, work, call, task, team);
    });
  }

  void features(const Features& call, int threads) {
    const int size = static_cast<int>(call.images);
    run(1, size, threads, false, [&](Workspace& work, int64_t, Team team) {
      InnerLoop loop(shape, work, call.inputs, team);
      loop.pack(call.weights, nullptr);
      loop.features({call.rows, nullptr, nullptr, size}, call.features);
    });
  }

  void gradient(const Gradient& call, int threads) {
    const int size = static_cast<int>(call.images);
    run(1, size, threads, false, [&](Workspace& work, int64_t, Team team) {
      InnerLoop(shape, work, nullptr, team).features_gradient(size, call.features, call.weights);
    });
  }

  void predict(const Prediction& call, int threads) {
    run(call.tasks, static_cast<int>(call.images), threads, false,
        [&](Workspace& work, int64_t task, Team team) {
          predict_task(shape, work, call, task, team);
        });
  }

 private:
  // Multiply-adds in a forward pass, below which waiting for each other costs more than it saves.
  static constexpr double WORTH_SHARING = 1e6;

  // Run `one` for every task, with workspaces for `batch` images; in turn, all in the first.
  template <class F>
  void run(int64_t tasks, int batch, int threads, bool in_turn, F one) {
    const std::lock_guard<std::mutex> lock(mutex);
    const int64_t beside = std::min<int64_t>(threads, in_turn ? 1 : tasks);
    while (static_cast<int64_t>(workspaces.size()) < beside)
      workspaces.push_back(std::make_unique<Workspace>());
    for (auto& workspace : workspaces) workspace->reserve(shape, batch);

    const bool apart = batch * shape.cost() < WORTH_SHARING;
    if (apart) threads = static_cast<int>(beside);
    std::atomic<int64_t> next{0};
    Barrier barrier;
    const auto work = [&](int index) {
      const Team team{index, barrier.count(), &barrier};
      // Tasks left over are shared by the whole team, unless they would keep most of it busy.
      const int64_t rest = tasks % team.count;
      const int64_t whole = in_turn ? 0 : apart || rest * 2 > team.count ? tasks : tasks - rest;
      if (index < static_cast<int>(workspaces.size()))
        for (int64_t task; (task = next.fetch_add(1)) < whole;)
          one(*workspaces[index], task, Team{});
      team.wait();
      for (int64_t task = whole; task < tasks; task++) one(*workspaces[0], task, team);
    };
    std::vector<std::thread> helpers;
    helpers.reserve(threads);
    try {
      while (static_cast<int>(helpers.size()) + 1 < threads)
        helpers.emplace_back(work, static_cast<int>(helpers.size()) + 1);
    } catch (const std::exception&) {
      // The system gives no more threads; the results do not depend on how many there are.
    }
    barrier.open(static_cast<int>(helpers.size()) + 1);
    work(0);
    for (auto& helper : helpers) helper.join();
  }
};

}  // namespace
}  // namespace reptile

// ---- Interface

#define EXPORT extern "C" __attribute__((visibility("default")))

// Returns null if there is no memory.
EXPORT void* reptile_create(const reptile::Settings* settings) {
  try {
    return new reptile::Engine(*settings);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

EXPORT void reptile_destroy(void* engine) { delete static_cast<reptile::Engine*>(engine); }

// Returns 0, or 1 if there is no memory. All sizes and indices have been checked by the caller.
EXPORT int reptile_adapt(void* engine, int threads, const reptile::Call* call) {
  try {
    static_cast<reptile::Engine*>(engine)->adapt(*call, threads);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Returns 0, or 1 if there is no memory. All sizes and indices have been checked by the caller.
EXPORT int reptile_predict(void* engine, int threads, const reptile::Prediction* call) {
  try {
    static_cast<reptile::Engine*>(engine)->predict(*call, threads);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Returns 0, or 1 if there is no memory. All sizes and indices have been checked by the caller.
EXPORT int reptile_features(void* engine, int threads, const reptile::Features* call) {
  try {
    static_cast<reptile::Engine*>(engine)->features(*call, threads);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Must follow `reptile_features` on this engine, with as many images; needs no further memory.
EXPORT void reptile_gradient(void* engine, int threads, const reptile::Gradient* call) {
  static_cast<reptile::Engine*>(engine)->gradient(*call, threads);
}
