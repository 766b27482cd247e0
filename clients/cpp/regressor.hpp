// Adapt a regressor's bundle to a function and predict values, with ONNX Runtime and C++17.
//
//     few_shot::Regressor model("artifacts/bundle");
//     auto adapted = model.adapt(inputs, values);           // of a closed-form bundle
//     std::vector<double> values = adapted.predict(queries);          // [queries, outputs]
//     few_shot::Interval interval = adapted.interval(queries, 0.95);  // likewise
//
// Inputs are numbers, one input's after the other's. Of a table's bundle (manifest.task.columns) they
// are raw rows: NaN where a number is missing, dates in seconds since 1970-01-01 UTC, a category as
// its place in the manifest's list and -1 for any other; values are in the units of their columns.
// Both classes may be shared by threads. Classifiers are in few_shot.hpp.
#pragma once

#include "few_shot.hpp"

namespace few_shot {

// Intervals that hold the values with the probability that was asked for: [queries, outputs].
struct Interval {
  std::vector<double> low;
  std::vector<double> high;
};

namespace detail {

inline Ort::Session open(Ort::Env& env, const std::filesystem::path& bundle, const char* graph,
                         int threads) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads);
  return Ort::Session(env, (bundle / graph / "1" / "model.onnx").c_str(), options);
}

inline std::size_t index_of(const std::vector<std::string>& names, const char* name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    throw std::invalid_argument(std::string("the graph has no tensor ") + name);
  }
  return static_cast<std::size_t>(found - names.begin());
}

// Numbers as the graphs take them: double of a table's bundle, else float.
class Numbers {
 public:
  Numbers(const std::vector<double>& values, bool raw) : doubles_(values) {
    if (!raw) floats_.assign(values.begin(), values.end());
    raw_ = raw;
  }
  Ort::Value view(const std::vector<std::int64_t>& shape) const {
    return raw_ ? detail::view(doubles_, shape) : detail::view(floats_, shape);
  }

 private:
  std::vector<double> doubles_;
  std::vector<float> floats_;
  bool raw_;
};

inline std::vector<double> doubles(const Ort::Value& value) {
  const auto type = value.GetTensorTypeAndShapeInfo();
  if (type.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE) {
    const double* data = value.GetTensorData<double>();
    return {data, data + type.GetElementCount()};
  }
  const auto found = floats(value);
  return {found.begin(), found.end()};
}

// How many deviations about the mean hold a normal value with a probability.
inline double normal_width(double level) {
  double low = 0, high = 40;
  while (high - low > 1e-12) {
    const double middle = (low + high) / 2;
    (std::erf(middle / std::sqrt(2.0)) < level ? low : high) = middle;
  }
  return (low + high) / 2;
}

// Shared by a regressor and everything adapted from it.
struct Values {
  Ort::Env env{ORT_LOGGING_LEVEL_WARNING, "few_shot"};
  Ort::Session adapt{nullptr};
  Ort::Session predict{nullptr};
  std::vector<std::string> weights;
  std::vector<std::int64_t> input_shape;
  std::int64_t outputs = 0;
  bool raw = false;
  bool closed_form = false;

  // Throws std::invalid_argument unless these are whole inputs; only raw ones may have a NaN.
  std::int64_t count(const std::vector<double>& inputs) const {
    std::size_t size = 1;
    for (std::int64_t n : input_shape) size *= static_cast<std::size_t>(n);
    if (inputs.size() % size != 0) {
      throw std::invalid_argument(std::to_string(inputs.size()) +
                                  " numbers are not whole inputs of " + std::to_string(size));
    }
    for (double value : inputs) {
      if (!std::isfinite(value) && !(raw && std::isnan(value))) {
        throw std::invalid_argument("inputs must be finite, or NaN where a row has no value");
      }
    }
    return static_cast<std::int64_t>(inputs.size() / size);
  }

  std::vector<std::int64_t> batch_of(std::int64_t inputs) const {
    std::vector<std::int64_t> shape{inputs};
    shape.insert(shape.end(), input_shape.begin(), input_shape.end());
    return shape;
  }
};

}  // namespace detail

// A bundle adapted to one function: plain weights, which may be copied, stored and sent.
class AdaptedRegressor {
 public:
  // The loss of each step's mini-batch before that step; none in closed form.
  const std::vector<float>& losses() const { return losses_; }
  const std::vector<Tensor>& weights() const { return weights_; }

  // Values [inputs, outputs], row by row.
  // Throws std::invalid_argument for invalid inputs, and Ort::Exception.
  std::vector<double> predict(const std::vector<double>& inputs) const {
    return run(inputs, {"logits"})[0];
  }

  // Throws as `predict`, for a level outside of 0..1, and for a bundle that learns by gradient
  // steps, which predicts no variances.
  Interval interval(const std::vector<double>& inputs, double level = 0.95) const {
    if (!bundle_->closed_form) {
      throw std::invalid_argument("this bundle learns by gradient steps: it has no variances");
    }
    if (!(level > 0 && level < 1)) {
      throw std::invalid_argument("the level must lie between 0 and 1");
    }
    const auto found = run(inputs, {"logits", "variance"});
    const double width = detail::normal_width(level);
    Interval result{found[0], found[0]};
    for (std::size_t i = 0; i < found[0].size(); ++i) {
      const double half = width * std::sqrt(found[1][i]);
      result.low[i] -= half;
      result.high[i] += half;
    }
    return result;
  }

 private:
  friend class Regressor;
  AdaptedRegressor(std::shared_ptr<detail::Values> bundle, std::vector<float> losses,
                   std::vector<Tensor> weights)
      : bundle_(std::move(bundle)), losses_(std::move(losses)), weights_(std::move(weights)) {}

  std::vector<std::vector<double>> run(const std::vector<double>& inputs,
                                       const std::vector<const char*>& outputs) const {
    const std::int64_t count = bundle_->count(inputs);
    if (count == 0) return std::vector<std::vector<double>>(outputs.size());
    const detail::Numbers numbers(inputs, bundle_->raw);
    std::vector<const char*> names{"images"};
    std::vector<Ort::Value> values;
    values.push_back(numbers.view(bundle_->batch_of(count)));
    for (const Tensor& tensor : weights_) {
      names.push_back(tensor.name.c_str());
      values.push_back(detail::view(tensor.values, tensor.shape));
    }
    std::vector<std::vector<double>> found;
    for (const Ort::Value& value : detail::run(bundle_->predict, names, values, outputs)) {
      found.push_back(detail::doubles(value));
    }
    return found;
  }

  std::shared_ptr<detail::Values> bundle_;
  std::vector<float> losses_;
  std::vector<Tensor> weights_;
};

// A regressor's bundle, ready to adapt to functions.
class Regressor {
 public:
  // `threads`: the most that one call uses. Throws Ort::Exception if a graph cannot be opened, and
  // std::invalid_argument for a classifier's bundle.
  explicit Regressor(const std::filesystem::path& bundle, int threads = 1)
      : bundle_(std::make_shared<detail::Values>()) {
    bundle_->adapt = detail::open(bundle_->env, bundle, "adapt", threads);
    bundle_->predict = detail::open(bundle_->env, bundle, "predict_adapted", threads);
    bundle_->closed_form = std::filesystem::exists(bundle / "embed" / "1" / "model.onnx");
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<std::string> names;
    for (std::size_t i = 0; i < bundle_->adapt.GetInputCount(); ++i) {
      names.push_back(bundle_->adapt.GetInputNameAllocated(i, allocator).get());
    }
    // What these return owns the memory that the next line reads.
    const auto inputs = bundle_->adapt.GetInputTypeInfo(detail::index_of(names, "support_images"));
    const auto values = bundle_->adapt.GetInputTypeInfo(detail::index_of(names, "support_labels"));
    const auto input = inputs.GetTensorTypeAndShapeInfo();
    const auto value = values.GetTensorTypeAndShapeInfo();
    if (value.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) {
      throw std::invalid_argument("this bundle names classes and predicts no values: use Model");
    }
    const auto shape = input.GetShape();
    bundle_->input_shape.assign(shape.begin() + 1, shape.end());
    bundle_->outputs = value.GetShape().back();
    bundle_->raw = input.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
    for (std::size_t i = 0; i < bundle_->predict.GetInputCount(); ++i) {
      const std::string name = bundle_->predict.GetInputNameAllocated(i, allocator).get();
      if (name != "images") bundle_->weights.push_back(name);
    }
  }

  // Whether functions are learnt in closed form, without gradient steps.
  bool closed_form() const { return bundle_->closed_form; }
  // Whether inputs are the raw rows of a table: manifest.task.columns says which.
  bool raw() const { return bundle_->raw; }
  std::int64_t outputs() const { return bundle_->outputs; }
  const std::vector<std::int64_t>& input_shape() const { return bundle_->input_shape; }

  // Adapt a closed-form bundle to a function, given points: inputs, and `outputs` values for each.
  // Throws std::invalid_argument for invalid arguments or a bundle that takes gradient steps,
  // std::runtime_error if what these points give is not finite, and Ort::Exception.
  AdaptedRegressor adapt(const std::vector<double>& inputs,
                         const std::vector<double>& values) const {
    if (!closed_form()) {
      throw std::invalid_argument(
          "this bundle learns by gradient steps: give mini-batches and a learning rate");
    }
    return learn(inputs, values, {}, 0);
  }

  // Adapt by gradient steps; as the other.
  AdaptedRegressor adapt(const std::vector<double>& inputs, const std::vector<double>& values,
                         const MiniBatches& batches, float learning_rate) const {
    if (closed_form()) {
      throw std::invalid_argument(
          "this bundle learns in closed form: leave out mini-batches and learning rate");
    }
    const std::int64_t count = bundle_->count(inputs);
    if (batches.rows.size() != batches.steps * batches.batch || batches.batch == 0 ||
        !std::all_of(batches.rows.begin(), batches.rows.end(),
                     [count](std::int64_t v) { return v >= 0 && v < count; })) {
      throw std::invalid_argument("mini-batches must be [steps, batch] places of points");
    }
    if (!(learning_rate > 0) || !std::isfinite(learning_rate)) {
      throw std::invalid_argument("the learning rate must be above 0 and finite");
    }
    return learn(inputs, values, batches, learning_rate);
  }

 private:
  AdaptedRegressor learn(const std::vector<double>& inputs, const std::vector<double>& values,
                         const MiniBatches& batches, float learning_rate) const {
    const std::int64_t count = bundle_->count(inputs);
    if (count == 0 || values.size() != static_cast<std::size_t>(count * outputs())) {
      throw std::invalid_argument(std::to_string(count) + " inputs but " +
                                  std::to_string(values.size()) + " values");
    }
    if (!std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); })) {
      throw std::invalid_argument("values must be finite");
    }
    const detail::Numbers points(inputs, raw()), targets(values, raw());
    const std::vector<float> rate{learning_rate};
    std::vector<const char*> names{"support_images", "support_labels"};
    std::vector<Ort::Value> feeds;
    feeds.push_back(points.view(bundle_->batch_of(count)));
    feeds.push_back(targets.view({count, outputs()}));
    std::vector<const char*> results{"finite"};
    if (!closed_form()) {
      names.insert(names.end(), {"batches", "learning_rate"});
      feeds.push_back(detail::view(batches.rows, {static_cast<std::int64_t>(batches.steps),
                                                  static_cast<std::int64_t>(batches.batch)}));
      feeds.push_back(detail::view(rate, {}));
    }
    for (const std::string& name : bundle_->weights) results.push_back(name.c_str());
    if (!closed_form()) results.push_back("losses");
    const auto found = detail::run(bundle_->adapt, names, feeds, results);
    if (!*found[0].GetTensorData<bool>()) {
      throw std::runtime_error("what these points give is not finite: give values of the size of "
                               "the training data's, or a lower learning rate or fewer steps");
    }
    std::vector<Tensor> weights;
    for (std::size_t i = 1; i <= bundle_->weights.size(); ++i) {
      weights.push_back({results[i], found[i].GetTensorTypeAndShapeInfo().GetShape(),
                         detail::floats(found[i])});
    }
    std::vector<float> losses;
    if (!closed_form()) losses = detail::floats(found.back());
    return {bundle_, std::move(losses), std::move(weights)};
  }

  std::shared_ptr<detail::Values> bundle_;
};

}  // namespace few_shot
