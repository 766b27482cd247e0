// Adapts a classifier's bundle of a table to rows from .npy files and prints logits, twice: for the
// task of all rows, and for the task of all but the last, to which that one was added.
//
// row_classifier BUNDLE FOLDER: of FOLDER's inputs.npy and queries.npy [N, columns], float64, and
// labels.npy.
#include <cmath>
#include <cstdio>

#include "few_shot.hpp"
#include "npy.hpp"
#include "refusal.hpp"

int main(int, char** argv) {
  try {
    const std::filesystem::path folder(argv[2]);
    const few_shot::Model model(argv[1]);
    const auto inputs = npy::read<double>(folder / "inputs.npy").values;
    const auto labels = npy::read<std::int64_t>(folder / "labels.npy").values;
    const auto queries = npy::read<double>(folder / "queries.npy").values;
    const auto columns = model.image_shape().at(0);
    const std::vector<double> most(inputs.begin(), inputs.end() - columns);
    const std::vector<double> last(inputs.end() - columns, inputs.end());
    const auto grown = model.adapt(most, {labels.begin(), labels.end() - 1});
    for (const auto& task : {model.adapt(inputs, labels), grown.add(last, {labels.back()})}) {
      const auto logits = task.predict(queries);
      for (std::size_t i = 0; i < logits.size(); ++i) {
        const bool end = (i + 1) % static_cast<std::size_t>(task.ways()) == 0;
        std::printf("%.9g%s", static_cast<double>(logits[i]), end ? "\n" : " ");
      }
    }
    auto infinite = inputs;
    infinite[0] = INFINITY;
    const std::vector<float> narrow(inputs.begin(), inputs.end());
    expect_refusal([&] { model.adapt(infinite, labels); }, "an infinite input");
    expect_refusal([&] { model.adapt(narrow, labels); }, "dates as float");
    expect_refusal([&] { model.adapt(last, labels); }, "a label too many");
    expect_refusal([&] { grown.predict(std::vector<double>{1}); }, "part of a row");
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
