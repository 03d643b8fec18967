// The memory that is kept between steps (csrc/cpu/memory.cpp), taken and given back by several threads in any order.
// Built with a sanitizer by scripts/sanitize and tests/test_sanitizers.py; exits with 0 if no tensor met another.
#include "../../csrc/cpu/memory.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <random>
#include <thread>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 4;
constexpr size_t kMegabyte = size_t(1) << 20;

// Below and above what is kept, small and large blocks; two uses, so that shelves are added while others are searched.
constexpr int64_t kSizes[] = {1, 9, 10, 17, 33, 40};
const char* const kUses[] = {"gradient", "logits"};

// A tensor whose pages bear a mark of their own.
struct Marked {
  Tensor tensor;
  uint64_t mark;
  size_t bytes;

  uint64_t* at(size_t offset) const {
    return reinterpret_cast<uint64_t*>(static_cast<char*>(tensor.mutable_data_ptr()) + offset);
  }
  void write() const {
    for (size_t offset = 0; offset < bytes; offset += kMegabyte / 4) *at(offset) = mark + offset;
    *at(bytes - sizeof(uint64_t)) = mark;
  }
  bool intact() const {
    for (size_t offset = 0; offset < bytes; offset += kMegabyte / 4)
      if (*at(offset) != mark + offset) return false;
    return *at(bytes - sizeof(uint64_t)) == mark;
  }
};

// Tensors on their way to a thread that did not make them.
std::mutex mutex;
std::deque<Marked> handed_on;

bool run(int thread, int steps) {
  std::mt19937 random(thread);
  std::deque<Marked> mine;
  bool sound = true;
  for (int step = 0; step < steps; ++step) {
    const int64_t megabytes = kSizes[random() % std::size(kSizes)];
    Marked made{kdk::kept_empty({megabytes, int64_t(kMegabyte) / 4}, ScalarType::Float, kUses[random() % 2]),
                (uint64_t(thread + 1) << 56) | (uint64_t(step) << 32), size_t(megabytes) * kMegabyte};
    made.write();
    mine.push_back(std::move(made));
    if (mine.size() > 2) {
      sound = sound && mine.front().intact();
      if (random() % 2 == 0) {
        const std::lock_guard<std::mutex> lock(mutex);
        handed_on.push_back(std::move(mine.front()));
      }
      mine.pop_front();
    }
    if (random() % 3 == 0) {
      std::deque<Marked> got;
      {
        const std::lock_guard<std::mutex> lock(mutex);
        got.swap(handed_on);
      }
      for (const Marked& other : got) sound = sound && other.intact();
    }
    if (random() % 16 == 0) (void)kdk::kept_blocks(kUses[random() % 2]);
    if (random() % 64 == 0) kdk::kept_release();
  }
  return sound;
}

}  // namespace

int main(int, char** arguments) {
  const int steps = std::atoi(arguments[1]);
  bool sound[kThreads];
  std::deque<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back([&sound, i, steps] { sound[i] = run(i, steps); });
  for (std::thread& thread : threads) thread.join();
  handed_on.clear();
  bool all = true;
  for (bool one : sound) all = all && one;
  std::printf("%s; %zu blocks kept\n", all ? "sound" : "a tensor was written by another",
              kdk::kept_blocks("gradient").size() + kdk::kept_blocks("logits").size());
  kdk::kept_release();
  return all ? 0 : 1;
}
