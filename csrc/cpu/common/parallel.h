// Tasks for all threads, each taken by whichever is free: what a task computes must not depend on who takes it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace transkd {

// Calls f(next) on every thread that pays; next() gives the number of a task, or one from `count` on when none is left.
// `work` is the number of operations of all tasks.
template <class F>
void over_tasks(int64_t count, int64_t work, const F& f) {
  constexpr int64_t kGrain = 1 << 17;  // operations below which a second thread does not pay
  const int64_t threads = std::min({static_cast<int64_t>(torch::stable::get_num_threads()), count, work / kGrain});
  std::atomic<int64_t> taken{0};
  const auto next = [&] { return taken.fetch_add(1, std::memory_order_relaxed); };
  torch::stable::parallel_for(0, std::max<int64_t>(1, threads), 1, [&](int64_t, int64_t) { f(next); });
}

}  // namespace transkd
