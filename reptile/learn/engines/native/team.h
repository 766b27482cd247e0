// Threads that share the work of one task.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <utility>

namespace reptile {

// Spins for some microseconds, as phases are short, then sleeps, as cores may be shared.
// It also holds the team back until its size is known, by `open`.
class Barrier {
 public:
  void open(int count) {
    count_ = count;
    count_.notify_all();
  }
  int count() {
    count_.wait(0);
    return count_;
  }
  void wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
      return;
    }
    for (int spin = 0; spin < SPINS; spin++) {
      if (round_.load(std::memory_order_acquire) != round) return;
      pause();
    }
    round_.wait(round, std::memory_order_acquire);
  }

 private:
  static constexpr int SPINS = 2000;
  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  std::atomic<int> count_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// One thread's view of the threads that share a task.
struct Team {
  int index = 0, count = 1;
  Barrier* barrier = nullptr;

  void wait() const {
    if (count > 1) barrier->wait();
  }
  std::pair<size_t, size_t> share(size_t items) const {
    return {items * index / count, items * (index + 1) / count};
  }
  // This thread's part of blocks x rows, as f(block, first row, end of rows).
  template <class F>
  void rows(int blocks, int rows, F f) const {
    auto [item, end] = share(static_cast<size_t>(blocks) * rows);
    while (item < end) {
      const size_t first = item % rows, last = std::min<size_t>(rows, first + end - item);
      f(static_cast<int>(item / rows), static_cast<int>(first), static_cast<int>(last));
      item += last - first;
    }
  }
};

}  // namespace reptile
