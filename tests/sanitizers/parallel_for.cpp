// torch's parallel_for on threads that ThreadSanitizer knows, linked into the library in place of torch's: to it the
// threads of OpenMP, whose runtime is not instrumented, seem to race wherever they meet.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func,
                                             void* ctx) {
  // More threads than processors, so that they are interrupted anywhere; pieces of one grain, which nobody owns.
  const int64_t grain = std::max<int64_t>(1, grain_size);
  std::atomic<int64_t> next{begin};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    for (int64_t first; (first = next.fetch_add(grain)) < end;) {
      try {
        func(first, std::min(end, first + grain), ctx);
      } catch (...) {
        failed = true;
      }
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  return failed ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}
