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
// Images are pixels in 0..255, one after another, each [C, H, W]; labels are 0..ways-1. Of a table's
// bundle (manifest.task.columns) the inputs are its raw rows, of double: NaN where a number is missing,
// dates in seconds since 1970-01-01 UTC, a category as its place in the manifest's list and -1 for any
// other. Bundles that predict values are in regressor.hpp.
// ONNX Runtime does not validate these values, so this header does. The files' hashes are not
// checked: compare them with manifest.json where a bundle may have been damaged. Both classes may be
// shared by threads.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
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

// Numbers as the graphs take them: double of a table's bundle, else float.
class Numbers {
 public:
  template <class T>
  Numbers(const std::vector<T>& values, bool raw) : raw_(raw) {
    if (raw) {
      doubles_.assign(values.begin(), values.end());
    } else {
      floats_.assign(values.begin(), values.end());
    }
  }
  Ort::Value view(const std::vector<std::int64_t>& shape) const {
    return raw_ ? detail::view(doubles_, shape) : detail::view(floats_, shape);
  }

 private:
  std::vector<double> doubles_;
  std::vector<float> floats_;
  bool raw_;
};

inline std::vector<Ort::Value> run(Ort::Session& session, const std::vector<const char*>& inputs,
                                   const std::vector<Ort::Value>& values,
                                   const std::vector<const char*>& outputs) {
  return session.Run(Ort::RunOptions{nullptr}, inputs.data(), values.data(), values.size(),
                     outputs.data(), outputs.size());
}

inline std::size_t input_of(const Ort::Session& session, const char* name) {
  Ort::AllocatorWithDefaultOptions allocator;
  for (std::size_t i = 0; i < session.GetInputCount(); ++i) {
    if (session.GetInputNameAllocated(i, allocator).get() == std::string(name)) return i;
  }
  throw std::invalid_argument(std::string("the graph has no input ") + name);
}

// What a task was learnt to be.
struct Learnt {
  std::vector<float> losses;
  std::vector<Tensor> weights;
};

// Shared by a model and everything adapted from it.
struct Bundle {
  Ort::Env env{ORT_LOGGING_LEVEL_WARNING, "few_shot"};
  Ort::Session adapt{nullptr};  // of a gradient learner
  Ort::Session embed{nullptr};  // this and the next of a closed-form learner
  Ort::Session fit{nullptr};
  Ort::Session predict{nullptr};
  std::vector<std::string> weights;  // names: inputs of `predict_adapted` but the images
  std::vector<std::int64_t> input_shape;
  std::int64_t outputs = 0;  // classes or values of each input
  bool values = false;       // predicts values, or else classes
  bool raw = false;          // inputs are the rows of a table
  bool closed_form = false;

  Bundle(const std::filesystem::path& folder, int threads) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    const auto open = [&](const char* graph) {
      return Ort::Session(env, (folder / graph / "1" / "model.onnx").c_str(), options);
    };
    closed_form = std::filesystem::exists(folder / "embed" / "1" / "model.onnx");
    if (closed_form) {
      embed = open("embed");
      fit = open("fit");
    } else {
      adapt = open("adapt");
    }
    predict = open("predict_adapted");
    // What GetInputTypeInfo returns owns the memory that the line after it reads.
    const Ort::Session& learner = closed_form ? fit : adapt;
    const auto targets = learner.GetInputTypeInfo(input_of(learner, "support_labels"));
    const auto target = targets.GetTensorTypeAndShapeInfo();
    values = target.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    const std::size_t images = input_of(predict, "images");
    const auto inputs = predict.GetInputTypeInfo(images);
    const auto input = inputs.GetTensorTypeAndShapeInfo();
    const auto shape = input.GetShape();
    input_shape.assign(shape.begin() + 1, shape.end());
    raw = input.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
    const auto logits = predict.GetOutputTypeInfo(0);
    outputs = values ? target.GetShape().back()
                     : logits.GetTensorTypeAndShapeInfo().GetShape().back();
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < predict.GetInputCount(); ++i) {
      if (i != images) weights.push_back(predict.GetInputNameAllocated(i, allocator).get());
    }
  }

  // Whether inputs are images: the graphs tell no more of them than that they have three sizes.
  bool pixels() const { return !values && !raw && input_shape.size() == 3; }

  // Whether a number is finite in the type that the graphs take: double of a table's bundle, else
  // float.
  template <class T>
  bool fits(T value) const {
    return std::abs(value) <= (raw ? std::numeric_limits<T>::max() : std::numeric_limits<float>::max());
  }

  // Returns how many inputs these numbers are. Throws std::invalid_argument unless they are whole
  // inputs of finite numbers, of pixels in 0..255; only rows may have a NaN.
  template <class T>
  std::int64_t count(const std::vector<T>& numbers) const {
    std::size_t size = 1;
    for (std::int64_t n : input_shape) size *= static_cast<std::size_t>(n);
    if (numbers.size() % size != 0) {
      throw std::invalid_argument(std::to_string(numbers.size()) + " numbers are not whole " +
                                  (pixels() ? "images of " : "inputs of ") + std::to_string(size));
    }
    if (raw && std::is_same_v<T, float> && !numbers.empty()) {
      throw std::invalid_argument("give the rows of a table as double: float holds no dates");
    }
    for (const T value : numbers) {
      if (pixels() && !(value >= 0 && value <= 255)) {
        throw std::invalid_argument("pixels must be finite and lie in 0..255");
      }
      if (!fits(value) && !(raw && std::isnan(value))) {
        throw std::invalid_argument(raw ? "inputs must be finite, or NaN where a row has no value"
                                        : "inputs must be finite in float");
      }
    }
    return static_cast<std::int64_t>(numbers.size() / size);
  }

  std::vector<std::int64_t> batch_of(std::int64_t inputs) const {
    std::vector<std::int64_t> shape{inputs};
    shape.insert(shape.end(), input_shape.begin(), input_shape.end());
    return shape;
  }

  // Throws std::invalid_argument unless the bundle learns as `closed` says.
  void check_learner(bool closed) const {
    if (closed == closed_form) return;
    throw std::invalid_argument(
        closed_form ? "this bundle learns in closed form: leave out mini-batches and learning rate"
                    : "this bundle learns by gradient steps, which need every example: adapt to all, "
                      "with mini-batches and a learning rate");
  }

  // The features of checked inputs, row by row; of a closed-form learner.
  template <class T>
  std::vector<float> features_of(const std::vector<T>& numbers, std::int64_t inputs) {
    const Numbers images(numbers, raw);
    std::vector<Ort::Value> feeds;
    feeds.push_back(images.view(batch_of(inputs)));
    return floats(run(embed, {"images"}, feeds, {"features"})[0]);
  }

  // The task of these examples, of a closed-form learner.
  Learnt fitted(const std::vector<float>& features, Ort::Value targets, std::int64_t examples) {
    std::vector<Ort::Value> feeds;
    feeds.push_back(view(features, {examples, static_cast<std::int64_t>(features.size()) / examples}));
    feeds.push_back(std::move(targets));
    return learnt(fit, {"features", "support_labels"}, feeds);
  }

  // The task of checked inputs, by gradient steps. Throws std::invalid_argument for mini-batches and
  // learning rates that cannot be used.
  template <class T>
  Learnt steps(const std::vector<T>& numbers, std::int64_t inputs, Ort::Value targets,
               const MiniBatches& batches, float learning_rate) {
    if (batches.rows.size() != batches.steps * batches.batch || batches.batch == 0 ||
        !std::all_of(batches.rows.begin(), batches.rows.end(),
                     [inputs](std::int64_t v) { return v >= 0 && v < inputs; })) {
      throw std::invalid_argument("mini-batches must be [steps, batch] places of the support set");
    }
    if (!(learning_rate > 0) || !std::isfinite(learning_rate)) {
      throw std::invalid_argument("the learning rate must be above 0 and finite");
    }
    const Numbers images(numbers, raw);
    const std::vector<float> rate{learning_rate};
    std::vector<Ort::Value> feeds;
    feeds.push_back(images.view(batch_of(inputs)));
    feeds.push_back(std::move(targets));
    feeds.push_back(view(batches.rows, {static_cast<std::int64_t>(batches.steps),
                                        static_cast<std::int64_t>(batches.batch)}));
    feeds.push_back(view(rate, {}));
    return learnt(adapt, {"support_images", "support_labels", "batches", "learning_rate"}, feeds);
  }

  // Outputs of an adapted task for checked inputs.
  template <class T>
  std::vector<Ort::Value> answers(const std::vector<Tensor>& task, const std::vector<T>& numbers,
                                  std::int64_t inputs, const std::vector<const char*>& wanted) {
    const Numbers images(numbers, raw);
    std::vector<const char*> names{"images"};
    std::vector<Ort::Value> feeds;
    feeds.push_back(images.view(batch_of(inputs)));
    for (const Tensor& tensor : task) {
      names.push_back(tensor.name.c_str());
      feeds.push_back(view(tensor.values, tensor.shape));
    }
    return run(predict, names, feeds, wanted);
  }

 private:
  Learnt learnt(Ort::Session& session, const std::vector<const char*>& names,
                const std::vector<Ort::Value>& feeds) {
    std::vector<const char*> wanted{"finite"};
    for (const std::string& name : weights) wanted.push_back(name.c_str());
    if (!closed_form) wanted.push_back("losses");
    const auto found = run(session, names, feeds, wanted);
    if (!*found[0].GetTensorData<bool>()) {
      throw std::runtime_error(
          closed_form ? "what these examples give is not finite: give numbers of the size of the "
                        "training data's, or run the golden tensors here"
                      : "adaptation diverged: use a lower learning rate or fewer steps");
    }
    Learnt result;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const Ort::Value& value = found[i + 1];
      result.weights.push_back(
          {weights[i], value.GetTensorTypeAndShapeInfo().GetShape(), floats(value)});
    }
    if (!closed_form) result.losses = floats(found.back());
    return result;
  }
};

}  // namespace detail

// A bundle adapted to one task: plain weights, which may be copied, stored and sent.
class Adapted {
 public:
  // The loss of each step's mini-batch before that step.
  const std::vector<float>& losses() const { return learnt_.losses; }
  const std::vector<Tensor>& weights() const { return learnt_.weights; }

  // How many logits each image gets: the bundle's, or in closed form the largest label + 1.
  std::int64_t ways() const {
    return bundle_->closed_form ? weights().front().shape[0] : bundle_->outputs;
  }

  // The task with more examples, of its classes or of new ones; of closed-form bundles. Only the
  // new images run through the network; the result equals adapting to all again.
  // Throws as `Model::adapt`.
  template <class T = float>
  Adapted add(const std::vector<T>& images, const std::vector<std::int64_t>& labels) const {
    bundle_->check_learner(true);
    Adapted result(bundle_);
    result.features_ = features_;
    result.labels_ = labels_;
    result.append(images, labels);
    return result;
  }

  // The task without one of its classes; the others keep their labels. Throws as `add`.
  Adapted remove(std::int64_t label) const {
    bundle_->check_learner(true);
    const std::size_t size = features_.size() / labels_.size();
    Adapted result(bundle_);
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
  template <class T = float>
  std::vector<float> predict(const std::vector<T>& images) const {
    const std::int64_t count = bundle_->count(images);
    if (count == 0) return {};
    return detail::floats(bundle_->answers(weights(), images, count, {"logits"})[0]);
  }

 private:
  friend class Model;
  explicit Adapted(std::shared_ptr<detail::Bundle> bundle) : bundle_(std::move(bundle)) {}

  template <class T>
  void append(const std::vector<T>& images, const std::vector<std::int64_t>& labels) {
    const std::int64_t count = bundle_->count(images);
    check(count, labels, max_ways);
    const std::vector<float> found = bundle_->features_of(images, count);
    features_.insert(features_.end(), found.begin(), found.end());
    labels_.insert(labels_.end(), labels.begin(), labels.end());
    fit();
  }

  void fit() {
    const auto count = static_cast<std::int64_t>(labels_.size());
    learnt_ = bundle_->fitted(features_, detail::view(labels_, {count}), count);
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

  static constexpr std::int64_t max_ways = 1000;  // manifest.task.ways may allow fewer or more

  std::shared_ptr<detail::Bundle> bundle_;
  detail::Learnt learnt_;
  std::vector<float> features_;  // this and the next of a closed-form learner: its examples
  std::vector<std::int64_t> labels_;
};

// A bundle, ready to adapt to tasks.
class Model {
 public:
  // `threads`: the most that one call uses. Throws Ort::Exception if a graph cannot be opened, and
  // std::invalid_argument for a regressor's bundle.
  explicit Model(const std::filesystem::path& bundle, int threads = 1)
      : bundle_(std::make_shared<detail::Bundle>(bundle, threads)) {
    if (bundle_->values) {
      throw std::invalid_argument("this bundle predicts values and names no classes: use Regressor");
    }
  }

  // Whether tasks are learnt in closed form, without gradient steps.
  bool closed_form() const { return bundle_->closed_form; }
  // Whether inputs are the raw rows of a table: manifest.task.columns says which.
  bool raw() const { return bundle_->raw; }
  // The most classes one task may have; -1 in closed form, where manifest.task.ways says it.
  std::int64_t ways() const { return bundle_->outputs; }
  // Channels, height, width; the shape of any other input.
  const std::vector<std::int64_t>& image_shape() const { return bundle_->input_shape; }

  // Adapt a closed-form bundle to a task, given a support set: images and one label for each.
  // Throws std::invalid_argument for invalid arguments or a bundle that takes gradient steps,
  // std::runtime_error if the classifier is not finite, and Ort::Exception.
  template <class T = float>
  Adapted adapt(const std::vector<T>& images, const std::vector<std::int64_t>& labels) const {
    bundle_->check_learner(true);
    Adapted result(bundle_);
    result.append(images, labels);
    return result;
  }

  // Adapt by gradient steps, given a support set: images and one label for each.
  // Throws std::invalid_argument for invalid arguments, std::runtime_error if the adaptation
  // diverged, and Ort::Exception.
  template <class T = float>
  Adapted adapt(const std::vector<T>& images, const std::vector<std::int64_t>& labels,
                const MiniBatches& batches, float learning_rate) const {
    bundle_->check_learner(false);
    const std::int64_t count = bundle_->count(images);
    Adapted::check(count, labels, ways());
    Adapted result(bundle_);
    result.learnt_ =
        bundle_->steps(images, count, detail::view(labels, {count}), batches, learning_rate);
    return result;
  }

 private:
  std::shared_ptr<detail::Bundle> bundle_;
};

}  // namespace few_shot
