// The K entries of a sparse teacher's row, in double, and what the teacher says of all other outcomes.
#pragma once

#include "numbers.h"
#include "reduce.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kdk {
inline namespace KDK_ISA {

namespace topk {

// The distinct entries of a row, and the room to compute with them; kept by a thread between calls.
struct Entries {
  int64_t count = 0;
  std::vector<int64_t> ids, slots;  // slots: of the ids, in the scratch of the row
  enum Column { kP, kLogP, kQ, kLogQ, kValue, kScore, kColumns };
  std::vector<double> columns[kColumns];
  std::vector<int32_t> table;  // finds an id: 1 + its entry at the first free place from its hash on, 0 for none
  bool invalid = false;        // an id out of range was met
  double mass = 0;             // sum of the probabilities as they were given

  double* operator[](Column c) { return columns[c].data(); }
  static Entries& mine() {
    static thread_local Entries entries;
    return entries;
  }

  template <class I, class L>
  __attribute__((noinline)) void read(const I* id, const L* logprob, int64_t given, int64_t vocabulary) {
    // At most a quarter full, and of the size of the entries: it stays in L1, as one place for each id would not.
    int bits = 4;
    while ((int64_t(1) << bits) < 4 * given) ++bits;
    const size_t places = size_t(1) << bits;
    if (table.size() < places) table.resize(places);
    std::fill(table.begin(), table.begin() + int64_t(places), 0);
    // One more for the bucket, and whole vectors.
    const size_t room = size_t(given) + 1 + 8;
    if (ids.size() < room) {
      ids.resize(room);
      slots.resize(room);
      for (auto& column : columns) column.resize(room);
    }
    // Local variables: the compiler has to assume that the writes below reach members.
    int64_t distinct = 0;
    bool outside = false;
    double* const logp = columns[kLogP].data();
    int64_t* const known = ids.data();
    int32_t* const entry_at = table.data();
    for (int64_t j = 0; j < given; ++j) {
      const int64_t v = int64_t(id[j]);
      const double l = double(to_compute(logprob[j]));
      if (v == -1 || l <= kNoEntry) continue;
      if (v < 0 || v >= vocabulary) {
        outside = true;
        continue;
      }
      size_t place = size_t((uint64_t(v) * 0x9e3779b97f4a7c15u) >> (64 - bits));
      while (entry_at[place] != 0 && known[entry_at[place] - 1] != v) place = (place + 1) & (places - 1);
      if (entry_at[place] != 0) {
        double& sum = logp[entry_at[place] - 1];
        sum = log_add(sum, l);
      } else {
        known[distinct] = v;
        logp[distinct] = l;
        entry_at[place] = int32_t(++distinct);
      }
    }
    count = distinct;
    invalid = outside;
    mass = exponentials(logp, columns[kP].data(), count);
  }

  // sum p |log p|: a relative rounding of log p by half an epsilon moves sum p by that much of it.
  double nats() const {
    const double *p = columns[kP].data(), *logp = columns[kLogP].data();
    double total = 0;
    for (int64_t k = 0; k < count; ++k) total += p[k] * std::abs(logp[k]);
    return total;
  }

  static double log_add(double a, double b) {
    const double high = std::max(a, b), low = std::min(a, b);
    return std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
  }
  // e^x of count numbers, and their sum.
  static double exponentials(const double* x, double* e, int64_t count) {
    for (int64_t j = 0; j < count; j += kLanes<double>) store(e + j, exp_double(load<VecD>(x + j)));
    return sum_of_doubles(e, count);
  }
};

// The teacher's word on the outcomes outside its entries.
struct Outside {
  double log_rest = 0;  // of the probability of all of them, for the bucket
  double each = 0;      // probability of each, for the uniform tail
  double log_each = 0;
  bool known = true;  // false: there is no teacher at all
};

// Turns the log-probabilities as given into the teacher's distribution over the entries, by the tail mode; log_rest is
// the log of the mass outside them.
inline Outside resolve_teacher(Tail tail, double inverse_temperature, int64_t outcomes_outside, double log_rest,
                               Entries& entries) {
  Outside outside;
  double *p = entries[Entries::kP], *logp = entries[Entries::kLogP];
  const int64_t count = entries.count;
  const double infinity = std::numeric_limits<double>::infinity();
  if (outcomes_outside == 0) log_rest = -infinity;
  outside.log_rest = log_rest;
  if (tail == Tail::kDrop || tail == Tail::kBucket) return outside;
  double log_each = -infinity;
  if (tail == Tail::kUniform && log_rest > -infinity)
    log_each = inverse_temperature * (log_rest - std::log(double(outcomes_outside)));
  double high = log_each;
  for (int64_t k = 0; k < count; ++k) {
    logp[k] *= inverse_temperature;
    high = std::max(high, logp[k]);
  }
  if (high == -infinity) {
    outside.known = false;
    return outside;
  }
  for (int64_t k = 0; k < count; ++k) logp[k] -= high;
  double z = Entries::exponentials(logp, p, count);
  z += double(outcomes_outside) * std::exp(log_each - high);
  const double log_z = std::log(z);
  for (int64_t k = 0; k < count; ++k) logp[k] -= log_z;
  Entries::exponentials(logp, p, count);
  outside.log_each = log_each - high - log_z;
  outside.each = std::exp(outside.log_each);
  return outside;
}

}  // namespace topk

}  // namespace KDK_ISA
}  // namespace kdk
