// Adapt a bundle to each of its golden tasks and compare the logits with the expected ones.
//
//     golden path/to/bundle
#include <cstdio>
#include <exception>
#include <set>

#include "few_shot.hpp"
#include "npy.hpp"

namespace {

constexpr float tolerance = 1e-4f;

struct Task {
  std::string name;
  std::vector<double> images;  // or the rows of a table
  std::vector<std::int64_t> labels;
  few_shot::MiniBatches batches;
  float learning_rate;
  std::vector<double> queries;
  std::vector<float> expected;
};

std::vector<double> read_inputs(const few_shot::Model& model, const std::filesystem::path& file) {
  if (model.raw()) return npy::read<double>(file).values;
  const auto values = npy::read<float>(file).values;
  return {values.begin(), values.end()};
}

Task read_support(const few_shot::Model& model, const std::filesystem::path& folder) {
  Task task{folder.filename().string(),
            read_inputs(model, folder / "support_images.npy"),
            npy::read<std::int64_t>(folder / "support_labels.npy").values,
            {},
            0,
            {},
            {}};
  if (std::filesystem::exists(folder / "batches.npy")) {  // of a gradient learner
    const auto batches = npy::read<std::int64_t>(folder / "batches.npy");
    task.batches = {batches.values, batches.shape.at(0), batches.shape.at(1)};
    task.learning_rate = npy::read<float>(folder / "learning_rate.npy").values.at(0);
  }
  return task;
}

Task read(const few_shot::Model& model, const std::filesystem::path& folder) {
  Task task = read_support(model, folder);
  task.queries = read_inputs(model, folder / "query_images.npy");
  task.expected = npy::read<float>(folder / "logits.npy").values;
  return task;
}

few_shot::Adapted adapt(const few_shot::Model& model, const Task& task,
                        const few_shot::MiniBatches& batches) {
  if (model.closed_form()) return model.adapt(task.images, task.labels);
  return model.adapt(task.images, task.labels, batches, task.learning_rate);
}

// Prints one line; returns whether all logits are within the tolerance.
bool check(const few_shot::Model& model, const Task& task) {
  const auto logits = adapt(model, task, task.batches).predict(task.queries);
  bool right = logits.size() == task.expected.size();
  float largest = 0;
  for (std::size_t i = 0; right && i < logits.size(); ++i) {
    const float deviation = std::abs(logits[i] - task.expected[i]);
    largest = std::max(largest, deviation);
    right = deviation <= tolerance * (1 + std::abs(task.expected[i]));  // NaN is not
  }
  std::printf("%-10s %5zu %7zu  %9.1e  %s\n", task.name.c_str(), task.batches.steps,
              task.labels.size(), largest, right ? "ok" : "BEYOND THE TOLERANCE");
  return right;
}

// Prints one line; returns whether an input that cannot be used is refused.
bool check_refusal(const few_shot::Model& model, const Task& task) {
  try {
    model.adapt(task.images, task.labels, task.batches, task.learning_rate);
  } catch (const std::exception&) {
    std::printf("%-10s ok\n", task.name.c_str());
    return true;
  }
  std::printf("%-10s ADAPTED, AND SHOULD NOT HAVE\n", task.name.c_str());
  return false;
}

// Adapts to the task again, with mini-batches drawn here, and classifies its support set.
void adapt_again(const few_shot::Model& model, const Task& task) {
  few_shot::MiniBatches batches;
  if (!model.closed_form()) {
    batches = few_shot::mini_batches(task.labels.size(), task.batches.batch, task.batches.steps);
  }
  const auto adapted = adapt(model, task, batches);
  const auto logits = adapted.predict(task.images);
  const auto ways = adapted.ways();
  std::size_t right = 0;
  for (std::size_t i = 0; i < task.labels.size(); ++i) {
    const auto row = logits.begin() + static_cast<std::ptrdiff_t>(i) * ways;
    right += std::max_element(row, row + ways) - row == task.labels[i];
  }
  std::printf("adapted again: %zu of %zu support images classified correctly\n", right, task.labels.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s BUNDLE\n", argv[0]);
    return 2;
  }
  try {
    const std::filesystem::path bundle(argv[1]);
    const few_shot::Model model(bundle);
    std::set<std::filesystem::path> folders;  // in the order of their names
    for (const auto& entry : std::filesystem::directory_iterator(bundle / "golden")) {
      const auto& folder = entry.path();
      if (std::filesystem::exists(folder / "support_images.npy")) folders.insert(folder);
    }
    const bool refusal = folders.erase(bundle / "golden" / "refused") == 1;
    if (folders.empty()) throw std::runtime_error("no golden tasks in " + bundle.string());
    std::printf("%-10s %5s %7s  %9s\n", "task", "steps", "support", "deviation");
    bool right = true;
    for (const auto& folder : folders) right = check(model, read(model, folder)) && right;
    if (refusal) {
      const Task task = read_support(model, bundle / "golden" / "refused");
      right = check_refusal(model, task) && right;
    }
    adapt_again(model, read(model, *folders.rbegin()));
    return right ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
