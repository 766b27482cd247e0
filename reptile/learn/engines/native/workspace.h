// The memory of one task at a time.

#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "block.h"
#include "shape.h"

namespace reptile {

// Floats on cache-line boundaries; grows, never shrinks.
class Buffer {
 public:
  float* reserve(size_t size) {
    if (size > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<float*>(::operator new(size * sizeof(float), ALIGN)));
      size_ = size;
    }
    return data_.get();
  }
  operator float*() const { return data_.get(); }

 private:
  static constexpr std::align_val_t ALIGN{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, ALIGN); }
  };
  std::unique_ptr<float, Free> data_;
  size_t size_ = 0;
};

// Batch norm of one channel block on the batch: u = (y - mean) · slope + shift.
struct Norm {
  Block mean, inverse, slope, shift;  // inverse: 1 / sqrt(variance + epsilon)
};

struct LayerBuffers {
  Buffer conv;       // convolution's output, in the backward pass its gradient
  Buffer out;        // after batch norm, pooling and ReLU
  Buffer out_gradient;
  Buffer transposed;  // weights as [in block][tap][out channel][16 in]
  Buffer rows;       // [block][row][2][16]: partial sums of batch norm
  std::vector<Norm> norms;
  std::atomic<int> next{0};  // weight gradient tiles handed out
};

// What one task at a time needs; sized once for the largest mini-batch.
struct Workspace {
  Buffer weights, moment, input, logits, losses;
  LayerBuffers layers[MAX_LAYERS];

  void reserve(const Shape& shape, int batch) {
    const size_t b = batch;
    weights.reserve(shape.packed);
    moment.reserve(shape.packed);
    input.reserve(b * shape.settings.channels * shape.framed_height() * shape.framed_width());
    logits.reserve(b * shape.settings.outputs);
    losses.reserve(b);
    for (int i = 0; i < shape.settings.layers; i++) {
      const Layer& layer = shape.layers[i];
      LayerBuffers& buffers = layers[i];
      const size_t plane = b * layer.blocks * WIDTH;
      buffers.conv.reserve(plane * layer.y.out * layer.x.out);
      buffers.out.reserve(plane * layer.height * layer.width);
      buffers.out_gradient.reserve(plane * layer.height * layer.width);
      if (layer.deep) buffers.transposed.reserve(layer.blocks * layer.block_size());
      buffers.rows.reserve(static_cast<size_t>(layer.blocks) * layer.y.out * 2 * WIDTH);
      buffers.norms.resize(layer.blocks);
    }
  }
};

}  // namespace reptile
