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

}  // namespace detail

// A bundle adapted to one function: plain weights, which may be copied, stored and sent.
class AdaptedRegressor {
 public:
  // The loss of each step's mini-batch before that step; none in closed form.
  const std::vector<float>& losses() const { return learnt_.losses; }
  const std::vector<Tensor>& weights() const { return learnt_.weights; }

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
  AdaptedRegressor(std::shared_ptr<detail::Bundle> bundle, detail::Learnt learnt)
      : bundle_(std::move(bundle)), learnt_(std::move(learnt)) {}

  std::vector<std::vector<double>> run(const std::vector<double>& inputs,
                                       const std::vector<const char*>& outputs) const {
    std::vector<std::vector<double>> found(outputs.size());
    const std::int64_t count = bundle_->count(inputs);
    if (count == 0) return found;
    const auto answers = bundle_->answers(weights(), inputs, count, outputs);
    std::transform(answers.begin(), answers.end(), found.begin(), detail::doubles);
    return found;
  }

  std::shared_ptr<detail::Bundle> bundle_;
  detail::Learnt learnt_;
};

// A regressor's bundle, ready to adapt to functions.
class Regressor {
 public:
  // `threads`: the most that one call uses. Throws Ort::Exception if a graph cannot be opened, and
  // std::invalid_argument for a classifier's bundle.
  explicit Regressor(const std::filesystem::path& bundle, int threads = 1)
      : bundle_(std::make_shared<detail::Bundle>(bundle, threads)) {
    if (!bundle_->values) {
      throw std::invalid_argument("this bundle names classes and predicts no values: use Model");
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
    bundle_->check_learner(true);
    const std::int64_t count = checked(inputs, values);
    const detail::Numbers targets(values, raw());
    const auto features = bundle_->features_of(inputs, count);
    return {bundle_, bundle_->fitted(features, targets.view({count, outputs()}), count)};
  }

  // Adapt by gradient steps; as the other.
  AdaptedRegressor adapt(const std::vector<double>& inputs, const std::vector<double>& values,
                         const MiniBatches& batches, float learning_rate) const {
    bundle_->check_learner(false);
    const std::int64_t count = checked(inputs, values);
    const detail::Numbers targets(values, raw());
    return {bundle_, bundle_->steps(inputs, count, targets.view({count, outputs()}), batches,
                                    learning_rate)};
  }

 private:
  // Returns how many points these are.
  std::int64_t checked(const std::vector<double>& inputs, const std::vector<double>& values) const {
    const std::int64_t count = bundle_->count(inputs);
    if (count == 0 || values.size() != static_cast<std::size_t>(count * outputs())) {
      throw std::invalid_argument(std::to_string(count) + " inputs but " +
                                  std::to_string(values.size()) + " values");
    }
    if (!std::all_of(values.begin(), values.end(), [this](double v) { return bundle_->fits(v); })) {
      throw std::invalid_argument("values must be finite in the type of the bundle's graphs");
    }
    return count;
  }

  std::shared_ptr<detail::Bundle> bundle_;
};

}  // namespace few_shot
