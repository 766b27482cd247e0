// What few_shot.hpp promises beyond right logits; run by test_cpp_example.py with a 3-way bundle and
// one in closed form.
#include "few_shot.hpp"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <optional>
#include <set>
#include <thread>

namespace {

using few_shot::MiniBatches;
using few_shot::mini_batches;
using few_shot::Model;

void expect(bool claim, const char* what) {
  if (!claim) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

template <class Error, class F>
void expect_refusal(F f, const char* what) {
  try {
    f();
  } catch (const Error&) {
    return;
  }
  expect(false, what);
}

void mini_batches_cycle_through_shuffles() {
  const auto batches = mini_batches(7, 3, 10, 4);
  expect(batches.rows.size() == 30, "30 places");
  for (std::size_t start = 0; start + 7 <= 30; start += 7) {
    const auto first = batches.rows.begin() + static_cast<std::ptrdiff_t>(start);
    expect(std::set<std::int64_t>(first, first + 7).size() == 7, "each shuffle has every image");
  }
  expect(batches.rows == mini_batches(7, 3, 10, 4).rows, "the same seed gives the same");
  expect(batches.rows != mini_batches(7, 3, 10, 5).rows, "another seed gives another");
  expect(mini_batches(2, 5, 3).batch == 2, "no more than the support set");
  expect(mini_batches(2, 5, 0).rows.empty(), "no steps");
  expect_refusal<std::invalid_argument>([] { mini_batches(0, 1, 1); }, "an empty support set");
}

struct Task {
  std::vector<float> images;
  std::vector<std::int64_t> labels{0, 1, 2, 0, 1, 2};
};

Task task_for(const Model& model) {
  Task task;
  std::size_t size = 1;
  for (const auto n : model.image_shape()) size *= static_cast<std::size_t>(n);
  std::mt19937 random(1);
  for (std::size_t i = 0; i < size * task.labels.size(); ++i) {
    task.images.push_back(static_cast<float>(random() % 256));
  }
  return task;
}

void bad_input_is_refused(const Model& model, const Task& task) {
  const auto batches = mini_batches(6, 3, 5);
  const auto adapt = [&](auto change, const char* what) {
    Task t = task;
    MiniBatches b = batches;
    float rate = 0.001f;
    change(t, b, rate);
    expect_refusal<std::invalid_argument>([&] { model.adapt(t.images, t.labels, b, rate); }, what);
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  adapt([](auto& t, auto&, auto&) { t.labels[0] = 3; }, "a label beyond the ways");
  adapt([](auto& t, auto&, auto&) { t.labels[0] = -1; }, "a negative label");
  adapt([](auto& t, auto&, auto&) { t.labels.pop_back(); }, "a label too few");
  adapt([](auto& t, auto&, auto&) { t.images.pop_back(); }, "a pixel too few");
  adapt([](auto& t, auto&, auto&) { t.images[5] = 256; }, "a pixel too bright");
  adapt([&](auto& t, auto&, auto&) { t.images[5] = nan; }, "a pixel that is no number");
  adapt([](auto& t, auto&, auto&) { t = {{}, {}}; }, "an empty support set");
  adapt([](auto&, auto& b, auto&) { b.rows[0] = 6; }, "a place beyond the support set");
  adapt([](auto&, auto& b, auto&) { b.steps = 6; }, "rows that are not there");
  adapt([](auto&, auto& b, auto&) { b = {}; }, "a batch of none");
  adapt([](auto&, auto&, auto& rate) { rate = 0; }, "a learning rate of 0");
  adapt([&](auto&, auto&, auto& rate) { rate = nan; }, "a learning rate that is no number");
  expect_refusal<std::runtime_error>(
      [&] { model.adapt(task.images, task.labels, batches, 1e38f); }, "a divergence");
  expect_refusal<Ort::Exception>([] { Model("/nowhere"); }, "no bundle");
}

void what_was_adapted_outlives_its_model_and_may_be_copied(const char* bundle, const Task& task) {
  std::optional<Model> model(std::in_place, bundle);
  const auto adapted = model->adapt(task.images, task.labels, mini_batches(6, 3, 5), 0.001f);
  const auto before = adapted.predict(task.images);
  model.reset();
  const auto copy = adapted;
  expect(copy.predict(task.images) == before, "a copy predicts the same");
  expect(copy.losses().size() == 5, "a loss a step");
  expect(adapted.predict({}).empty(), "no images, no logits");
  expect_refusal<std::invalid_argument>([&] { adapted.predict({1, 2, 3}); }, "part of an image");
}

void threads_share_a_model(const Model& model, const Task& task) {
  const auto batches = mini_batches(6, 3, 20);
  const auto learn = [&] {
    return model.adapt(task.images, task.labels, batches, 0.001f).predict(task.images);
  };
  const auto expected = learn();
  std::vector<std::vector<float>> found(4);
  std::vector<std::thread> threads;
  for (auto& logits : found) threads.emplace_back([&] { logits = learn(); });
  for (auto& thread : threads) thread.join();
  for (const auto& logits : found) expect(logits == expected, "every thread finds the same");
}

bool close(const std::vector<float>& a, const std::vector<float>& b) {
  bool same = a.size() == b.size();
  for (std::size_t i = 0; same && i < a.size(); ++i) same = std::abs(a[i] - b[i]) < 1e-4f;
  return same;
}

void classes_come_and_go_in_closed_form(const Model& model, const Task& task) {
  expect(model.closed_form(), "the bundle is in closed form");
  const auto middle = task.images.begin() + static_cast<std::ptrdiff_t>(task.images.size() / 2);
  const std::vector<float> half(task.images.begin(), middle), rest(middle, task.images.end());
  const auto all = model.adapt(task.images, {0, 1, 0, 2, 3, 2});
  const auto two = model.adapt(half, {0, 1, 0});
  const auto grown = two.add(rest, {2, 3, 2});
  expect(two.ways() == 2 && grown.ways() == 4, "as many logits as classes");
  expect(close(grown.predict(half), all.predict(half)), "adding equals adapting to all");
  const auto shrunk = grown.remove(3).remove(2);
  expect(close(shrunk.predict(half), two.predict(half)), "removing equals adapting to the rest");
  expect(grown.remove(1).predict(half)[1] < -1e8f, "a label that is gone is masked");
  expect_refusal<std::invalid_argument>([&] { two.remove(5); }, "a class that is not there");
  expect_refusal<std::invalid_argument>([&] { two.add(half, {1}); }, "a label too few");
  expect_refusal<std::invalid_argument>([&] { two.add(half, {1, -1, 0}); }, "a negative label");
  expect_refusal<std::invalid_argument>(
      [&] { model.adapt(half, {0, 1, 0}, mini_batches(3, 2, 1), 0.1f); }, "mini-batches");
}

}  // namespace

int main(int, char** argv) {
  const Model model(argv[1]);
  expect(model.ways() == 3, "the bundle's ways");
  const Task task = task_for(model);
  mini_batches_cycle_through_shuffles();
  bad_input_is_refused(model, task);
  what_was_adapted_outlives_its_model_and_may_be_copied(argv[1], task);
  threads_share_a_model(model, task);
  expect_refusal<std::invalid_argument>([&] { model.adapt(task.images, task.labels); }, "no steps");
  classes_come_and_go_in_closed_form(Model(argv[2]), task);
}
