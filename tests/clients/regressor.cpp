// Adapts a regressor's bundle to points from .npy files and prints values and intervals.
//
// regressor BUNDLE FOLDER: of FOLDER's inputs.npy [N, ...], values.npy [N, outputs] and
// queries.npy, all float64, and batches.npy of a gradient learner, with learning rate 0.01.
#include <cstdio>

#include "npy.hpp"
#include "refusal.hpp"
#include "regressor.hpp"

int main(int, char** argv) {
  try {
    const std::filesystem::path folder(argv[2]);
    const few_shot::Regressor model(argv[1]);
    const auto inputs = npy::read<double>(folder / "inputs.npy").values;
    const auto values = npy::read<double>(folder / "values.npy").values;
    const auto queries = npy::read<double>(folder / "queries.npy").values;
    few_shot::MiniBatches batches;
    if (!model.closed_form()) {
      const auto rows = npy::read<std::int64_t>(folder / "batches.npy");
      batches = {rows.values, rows.shape.at(0), rows.shape.at(1)};
    }
    const auto adapted = model.closed_form() ? model.adapt(inputs, values)
                                             : model.adapt(inputs, values, batches, 0.01f);
    const auto found = adapted.predict(queries);
    for (std::size_t i = 0; i < found.size(); ++i) {
      std::printf("%.17g", found[i]);
      if (model.closed_form()) {
        const auto interval = adapted.interval(queries, 0.9);
        std::printf(" %.17g %.17g", interval.low[i], interval.high[i]);
      }
      std::printf("\n");
    }
    auto infinite = inputs;
    infinite[0] = INFINITY;
    auto unknown = values;
    unknown[0] = NAN;
    expect_refusal([&] { adapted.predict({infinite}); }, "an infinite input");
    expect_refusal([&] { adapted.interval(queries, 1); }, "a level of one, or no variances");
    if (!model.raw()) {
      auto large = queries;
      large[0] = 1e39;
      auto far = values;
      far[0] = -1e39;
      expect_refusal([&] { adapted.predict(large); }, "an input that is infinite as float");
      expect_refusal([&] { model.adapt(inputs, far); }, "a value that is infinite as float");
    }
    if (model.closed_form()) {
      expect_refusal([&] { model.adapt(inputs, unknown); }, "a value that is NaN");
      expect_refusal([&] { model.adapt(inputs, {}); }, "no values");
      expect_refusal([&] { model.adapt(inputs, values, batches, 0.1f); }, "mini-batches");
    } else {
      expect_refusal([&] { model.adapt(inputs, values); }, "no mini-batches");
      expect_refusal([&] { model.adapt(inputs, values, {{99}, 1, 1}, 0.1f); }, "a far place");
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
