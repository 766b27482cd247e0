// Adapt a bundle to a new task and predict, with ONNX Runtime's C++ API and C++17.
//
//     few_shot::Model model("artifacts/bundle");
//     auto batches = few_shot::mini_batches(labels.size(), 5, 50, seed);  // manifest.inner
//     auto adapted = model.adapt(images, labels, batches, 0.001f);        // manifest.inner
//     std::vector<float> logits = adapted.predict(queries);               // [queries, ways]
//
// A closed-form bundle (manifest.learner) needs no mini-batches, and takes any number of classes:
//
//     auto adapted = model.adapt(images, labels);
//     adapted = adapted.add(more_images, more_labels);                    // a new class, say
//
// Images are float32 pixels in 0..255, one after another, each [C, H, W]; labels are 0..ways-1.
// ONNX Runtime does not validate these values, so this header does. The files' hashes are not
// checked: compare them with manifest.json where a bundle may have been damaged. Both classes may be
// shared by threads.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace few_shot {

// Which support images each gradient step sees: [steps, batch], row by row.
struct MiniBatches {
  std::vector<std::int64_t> rows;
  std::size_t steps = 0;
  std::size_t batch = 0;
};

// The paper's protocol: shuffle, cut into rows, shuffle again at the end; a row may cross it.
// `batch` is capped at `support`. For bundles whose manifest.inner.replacement is false.
inline MiniBatches mini_batches(std::size_t support, std::size_t batch, std::size_t steps,
                                std::uint64_t seed = 0) {
  if (support == 0 || batch == 0) {
    throw std::invalid_argument("mini-batches need at least one support image and a batch of one");
  }
  MiniBatches result{{}, steps, std::min(batch, support)};
  std::mt19937_64 random(seed);
  std::vector<std::int64_t> order(support);
  std::iota(order.begin(), order.end(), 0);
  while (result.rows.size() < steps * result.batch) {
    std::shuffle(order.begin(), order.end(), random);
    result.rows.insert(result.rows.end(), order.begin(), order.end());
  }
  result.rows.resize(steps * result.batch);
  return result;
}

// One named array of numbers, as the graphs exchange them.
struct Tensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

namespace detail {

template <class T>
Ort::Value view(const std::vector<T>& values, const std::vector<std::int64_t>& shape) {
  static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  // ONNX Runtime has one call for inputs and outputs; it only reads from an input.
  return Ort::Value::CreateTensor<T>(memory, const_cast<T*>(values.data()), values.size(),
                                     shape.data(), shape.size());
}

inline std::vector<float> floats(const Ort::Value& value) {
  const float* data = value.GetTensorData<float>();
  return {data, data + value.GetTensorTypeAndShapeInfo().GetElementCount()};
}

inline std::vector<Ort::Value> run(Ort::Session& session, const std::vector<const char*>& inputs,
                                   const std::vector<Ort::Value>& values,
                                   const std::vector<const char*>& outputs) {
  return session.Run(Ort::RunOptions{nullptr}, inputs.data(), values.data(), values.size(),
                     outputs.data(), outputs.size());
}

// Shared by a model and everything adapted from it.
struct Bundle {
  Ort::Env env{ORT_LOGGING_LEVEL_WARNING, "few_shot"};
  Ort::Session adapt{nullptr};  // of a gradient learner
  Ort::Session embed{nullptr};  // this and the next of a closed-form learner
  Ort::Session fit{nullptr};
  Ort::Session predict{nullptr};
  std::vector<std::string> weights;  // names: inputs of `predict_adapted` but the images
  std::vector<std::int64_t> image_shape;
  std::int64_t ways = 0;
  bool closed_form = false;

  // Throws std::invalid_argument unless the pixels are whole images of finite values in 0..255.
  std::int64_t count(const std::vector<float>& pixels) const {
    std::int64_t size = 1;
    for (std::int64_t n : image_shape) size *= n;
    if (pixels.size() % static_cast<std::size_t>(size) != 0) {
      throw std::invalid_argument(std::to_string(pixels.size()) +
                                  " pixels are not whole images of " + std::to_string(size));
    }
    if (!std::all_of(pixels.begin(), pixels.end(), [](float p) { return p >= 0 && p <= 255; })) {
      throw std::invalid_argument("pixels must be finite and lie in 0..255");
    }
    return static_cast<std::int64_t>(pixels.size()) / size;
  }

  // Throws std::invalid_argument unless there is a label for each image, each in 0..end-1.
  static void check(std::int64_t images, const std::vector<std::int64_t>& labels,
                    std::int64_t end) {
    if (images == 0 || static_cast<std::size_t>(images) != labels.size()) {
      throw std::invalid_argument(std::to_string(images) + " support images but " +
                                  std::to_string(labels.size()) + " labels");
    }
    if (!std::all_of(labels.begin(), labels.end(),
                     [end](std::int64_t v) { return v >= 0 && v < end; })) {
      throw std::invalid_argument("labels must lie in 0.." + std::to_string(end - 1));
    }
  }

  std::vector<std::int64_t> batch_of(std::int64_t images) const {
    return {images, image_shape[0], image_shape[1], image_shape[2]};
  }
};

}  // namespace detail

// A bundle adapted to one task: plain weights, which may be copied, stored and sent.
class Adapted {
 public:
  // The loss of each step's mini-batch before that step.
  const std::vector<float>& losses() const { return losses_; }
  const std::vector<Tensor>& weights() const { return weights_; }

  // How many logits each image gets: the bundle's, or in closed form the largest label + 1.
  std::int64_t ways() const {
    return bundle_->closed_form ? weights_.back().shape[0] : bundle_->ways;
  }

  // The task with more examples, of its classes or of new ones; of closed-form bundles. Only the
  // new images run through the network; the result equals adapting to all again.
  // Throws as `Model::adapt`.
  Adapted add(const std::vector<float>& images, const std::vector<std::int64_t>& labels) const {
    check_closed_form();
    Adapted result(bundle_, {}, {});
    result.features_ = features_;
    result.labels_ = labels_;
    result.append(images, labels);
    result.fit();
    return result;
  }

  // The task without one of its classes; the others keep their labels. Throws as `add`.
  Adapted remove(std::int64_t label) const {
    check_closed_form();
    const std::size_t size = features_.size() / labels_.size();
    Adapted result(bundle_, {}, {});
    for (std::size_t i = 0; i < labels_.size(); ++i) {
      if (labels_[i] == label) continue;
      result.labels_.push_back(labels_[i]);
      const auto row = features_.begin() + static_cast<std::ptrdiff_t>(i * size);
      result.features_.insert(result.features_.end(), row, row + static_cast<std::ptrdiff_t>(size));
    }
    if (result.labels_.empty() || result.labels_.size() == labels_.size()) {
      throw std::invalid_argument("no class " + std::to_string(label) + ", or no other");
    }
    result.fit();
    return result;
  }

  // Logits [images, ways], row by row; drop the outputs of unused classes before a softmax.
  // Throws std::invalid_argument for invalid images, and Ort::Exception.
  std::vector<float> predict(const std::vector<float>& images) const {
    const std::int64_t count = bundle_->count(images);
    if (count == 0) return {};
    std::vector<const char*> names{"images"};
    std::vector<Ort::Value> values;
    values.push_back(detail::view(images, bundle_->batch_of(count)));
    for (const Tensor& tensor : weights_) {
      names.push_back(tensor.name.c_str());
      values.push_back(detail::view(tensor.values, tensor.shape));
    }
    return detail::floats(detail::run(bundle_->predict, names, values, {"logits"})[0]);
  }

 private:
  friend class Model;
  Adapted(std::shared_ptr<detail::Bundle> bundle, std::vector<float> losses,
          std::vector<Tensor> weights)
      : bundle_(std::move(bundle)), losses_(std::move(losses)), weights_(std::move(weights)) {}

  void check_closed_form() const {
    if (!bundle_->closed_form) {
      throw std::invalid_argument(
          "this bundle learns by gradient steps, which need every example: adapt again with all");
    }
  }

  void append(const std::vector<float>& images, const std::vector<std::int64_t>& labels) {
    const std::int64_t count = bundle_->count(images);
    detail::Bundle::check(count, labels, max_ways);
    std::vector<Ort::Value> values;
    values.push_back(detail::view(images, bundle_->batch_of(count)));
    const auto outputs = detail::run(bundle_->embed, {"images"}, values, {"features"});
    const std::vector<float> found = detail::floats(outputs[0]);
    features_.insert(features_.end(), found.begin(), found.end());
    labels_.insert(labels_.end(), labels.begin(), labels.end());
  }

  void fit() {
    const auto count = static_cast<std::int64_t>(labels_.size());
    std::vector<Ort::Value> values;
    const auto size = static_cast<std::int64_t>(features_.size());
    values.push_back(detail::view(features_, {count, size / count}));
    values.push_back(detail::view(labels_, {count}));
    const auto results = detail::run(bundle_->fit, {"features", "support_labels"}, values,
                                     {"finite", "head.weight", "head.bias"});
    if (!*results[0].GetTensorData<bool>()) {
      throw std::runtime_error("the classifier is not finite: run the golden tensors here");
    }
    for (const std::size_t i : {1, 2}) {
      weights_.push_back({i == 1 ? "head.weight" : "head.bias",
                          results[i].GetTensorTypeAndShapeInfo().GetShape(),
                          detail::floats(results[i])});
    }
  }

  static constexpr std::int64_t max_ways = 1000;  // manifest.task.ways may allow fewer or more

  std::shared_ptr<detail::Bundle> bundle_;
  std::vector<float> losses_;
  std::vector<Tensor> weights_;
  std::vector<float> features_;  // this and the next of a closed-form learner: its examples
  std::vector<std::int64_t> labels_;
};

// A bundle, ready to adapt to tasks.
class Model {
 public:
  // `threads`: the most that one call uses. Throws Ort::Exception if a graph cannot be opened.
  explicit Model(const std::filesystem::path& bundle, int threads = 1)
      : bundle_(std::make_shared<detail::Bundle>()) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    const auto open = [&](const char* graph) {
      return Ort::Session(bundle_->env, (bundle / graph / "1" / "model.onnx").c_str(), options);
    };
    bundle_->closed_form = std::filesystem::exists(bundle / "embed" / "1" / "model.onnx");
    if (bundle_->closed_form) {
      bundle_->embed = open("embed");
      bundle_->fit = open("fit");
    } else {
      bundle_->adapt = open("adapt");
    }
    bundle_->predict = open("predict_adapted");
    Ort::AllocatorWithDefaultOptions allocator;
    const auto& predict = bundle_->predict;
    for (std::size_t i = 0; i < predict.GetInputCount(); ++i) {
      const std::string name = predict.GetInputNameAllocated(i, allocator).get();
      if (name != "images") {
        bundle_->weights.push_back(name);
        continue;
      }
      const auto type = predict.GetInputTypeInfo(i);  // owns the memory that the next line reads
      const auto shape = type.GetTensorTypeAndShapeInfo().GetShape();
      bundle_->image_shape.assign(shape.begin() + 1, shape.end());
    }
    const auto type = predict.GetOutputTypeInfo(0);
    bundle_->ways = type.GetTensorTypeAndShapeInfo().GetShape().back();
  }

  // Whether tasks are learnt in closed form, without gradient steps.
  bool closed_form() const { return bundle_->closed_form; }
  // The most classes one task may have; -1 in closed form, where manifest.task.ways says it.
  std::int64_t ways() const { return bundle_->ways; }
  // Channels, height, width.
  const std::vector<std::int64_t>& image_shape() const { return bundle_->image_shape; }

  // Adapt a closed-form bundle to a task, given a support set: images and one label for each.
  // Throws std::invalid_argument for invalid arguments or a bundle that takes gradient steps,
  // std::runtime_error if the classifier is not finite, and Ort::Exception.
  Adapted adapt(const std::vector<float>& images, const std::vector<std::int64_t>& labels) const {
    if (!closed_form()) {
      throw std::invalid_argument(
          "this bundle learns by gradient steps: give mini-batches and a learning rate");
    }
    Adapted result(bundle_, {}, {});
    result.append(images, labels);
    result.fit();
    return result;
  }

  // Adapt by gradient steps, given a support set: images and one label for each.
  // Throws std::invalid_argument for invalid arguments, std::runtime_error if the adaptation
  // diverged, and Ort::Exception.
  Adapted adapt(const std::vector<float>& images, const std::vector<std::int64_t>& labels,
                const MiniBatches& batches, float learning_rate) const {
    if (closed_form()) {
      throw std::invalid_argument(
          "this bundle fits a classifier in closed form: leave out mini-batches and learning rate");
    }
    const std::int64_t count = bundle_->count(images);
    detail::Bundle::check(count, labels, ways());
    if (batches.rows.size() != batches.steps * batches.batch || batches.batch == 0 ||
        !std::all_of(batches.rows.begin(), batches.rows.end(),
                     [count](std::int64_t v) { return v >= 0 && v < count; })) {
      throw std::invalid_argument("mini-batches must be [steps, batch] places of support images");
    }
    if (!(learning_rate > 0) || !std::isfinite(learning_rate)) {
      throw std::invalid_argument("the learning rate must be above 0 and finite");
    }
    const std::vector<float> rate{learning_rate};
    std::vector<Ort::Value> values;
    values.push_back(detail::view(images, bundle_->batch_of(count)));
    values.push_back(detail::view(labels, {count}));
    values.push_back(detail::view(batches.rows, {static_cast<std::int64_t>(batches.steps),
                                                 static_cast<std::int64_t>(batches.batch)}));
    values.push_back(detail::view(rate, {}));
    std::vector<const char*> outputs{"finite", "losses"};
    for (const std::string& name : bundle_->weights) outputs.push_back(name.c_str());
    const auto results = detail::run(
        bundle_->adapt, {"support_images", "support_labels", "batches", "learning_rate"}, values,
        outputs);
    if (!*results[0].GetTensorData<bool>()) {
      throw std::runtime_error("adaptation diverged: use a lower learning rate or fewer steps");
    }
    std::vector<Tensor> weights;
    for (std::size_t i = 2; i < results.size(); ++i) {
      weights.push_back({outputs[i], results[i].GetTensorTypeAndShapeInfo().GetShape(),
                         detail::floats(results[i])});
    }
    return {bundle_, detail::floats(results[1]), std::move(weights)};
  }

 private:
  std::shared_ptr<detail::Bundle> bundle_;
};

}  // namespace few_shot
