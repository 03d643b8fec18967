// Log-probabilities of given tokens, and their backward.
#pragma once

#include "patterns.h"
#include "student.h"
#include "widen.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kdk {
inline namespace KDK_ISA {

// An id that counts, of one row.
struct Token {
  int64_t id, slot;
  double logit;     // after the softcap
  double gradient;  // to the log-probability
};

// The ids of a row that count, in their order.
inline void tokens_of(const TokenArgs& args, int64_t row, std::vector<Token>& tokens) {
  tokens.clear();
  for (int64_t k = 0; k < args.entries; ++k) {
    const int64_t id = args.ids[row * args.entries + k];
    if (id != -1 && id != args.ignore_index) tokens.push_back({id, k, 0, 0});
  }
}

// A row's softmax at its temperature: x = 2^affine / 2^log2_z.
template <class C>
struct Softmax {
  Affine<C> affine;
  double log2_z;
};

// Of a row the sums of 2^x x and of 4^x, the mean logit and the largest one.
struct TokenSums {
  double weighted = 0, squares = 0, mean = 0, largest = -std::numeric_limits<double>::infinity();
};
enum class Wanted { kLogprobs, kEntropy, kStats };

// The sum of 2^x of a row, and what else is wanted: with the entropy the first of the other sums, with the statistics
// all. They are relative to the reference of the row's first elements, or to its maximum. A tile's exponentials stay in
// L1, one place for all tiles.
template <Wanted WANTED, class X, class C = typename Io<X>::C>
Softmax<C> sweep_tokens(const X* s, int64_t n, double scale, TokenSums& sums) {
  constexpr C lowest = -std::numeric_limits<C>::infinity();
  const Row<X> row(s, s, n, 0);
  const C each = C(1) / C(n);
  C* const es = Scratch<C>::mine().get(kEs, kTileElements + 2 * Row<X>::kBlock);
  Affine<C> as;
  double z = 0;
  const auto sweep = [&](double reference, bool from_maximum) {
    as = affine<C>(scale, reference);
    z = 0;
    sums = {};
    bool unclamped = true;
    for (int64_t tile = 0; tile < row.tiles() && (from_maximum || !(z > kLargestSum)); ++tile) {
      C* const tile_es = es - tile * kTileElements;
      z += student_exponentials<false>(row, tile, as, tile_es, tile_es, unclamped, kNothingPending);
      if (WANTED == Wanted::kLogprobs) continue;
      Vec<C> sum0 = {}, sum1 = {}, squares0 = {}, squares1 = {}, mean0 = {}, mean1 = {}, high = Vec<C>{} + lowest;
      row.pieces(tile, [&](const X* x, const X*, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
        const C* e = tile_es + slot;
        const Vec<C> zero = {};
        for (int64_t b = 0; b < blocks; ++b, x += Row<X>::kBlock, e += Row<X>::kBlock) {
          Vec<C> x0, x1;
          load_block(x, lanes, lowest, x0, x1);
          const Vec<C> e0 = load<Vec<C>>(e), e1 = load<Vec<C>>(e + kLanes<C>);
          sum0 += e0 * keep(e0 != zero, as(x0));
          sum1 += e1 * keep(e1 != zero, as(x1));
          if (WANTED == Wanted::kEntropy) continue;
          squares0 += e0 * e0;
          squares1 += e1 * e1;
          high = max_keep_nan(high, max_keep_nan(x0, x1));
          load_block(x, lanes, C(0), x0, x1);
          mean0 += x0 * each;
          mean1 += x1 * each;
        }
      });
      sums.weighted += horizontal_sum<C>(sum0 + sum1);
      if (WANTED == Wanted::kEntropy) continue;
      sums.squares += horizontal_sum<C>(squares0 + squares1);
      sums.mean += horizontal_sum<C>(mean0 + mean1);
      sums.largest = std::max(sums.largest, double(horizontal_max<C>(high)));
    }
    return !(z > kLargestSum || (WANTED == Wanted::kStats && sums.squares > kLargestSum));
  };
  sweep_in_range(maximum(s, std::min(n, kSeedElements)), sweep, [&] { return maximum(s, n); });
  return {as, std::log2(z)};
}

// A row of logits after its softcap: as it is where there is none.
template <class X>
const X* token_row(const TokenArgs& args, int64_t row) {
  using C = typename Io<X>::C;
  if constexpr (std::is_same_v<X, C>) {
    if (args.softcap != 0) {
      C* out = Scratch<C>::mine().get(kStudentRow, args.columns);
      capped_row(args.logits, row, args.length, args.columns, args.softcap, out, AsIs());
      return out;
    }
  }
  return row_pointer<X>(args.logits, row, args.length);
}

template <class C>
double token_scale(const TokenArgs& args, int64_t row) {
  return kLog2e / per_row(args.temperature_rows, row, args.temperature, sizeof(C) == 8);
}

// The logarithm of the probability of all that are no token: summed for itself, relative to its own maximum.
template <class X, class C = typename Io<X>::C>
double log_outside(const TokenArgs& args, const X* s, double scale, const Softmax<C>& q,
                   const std::vector<Token>& tokens) {
  C* others = Scratch<C>::mine().get(kOtherRow, args.columns);
  widen_row(s, args.columns, others, AsIs());
  for (const Token& token : tokens)
    if (token.id >= 0 && token.id < args.columns) others[token.id] = -std::numeric_limits<C>::infinity();
  TokenSums sums;
  const Softmax<C> rest = sweep_tokens<Wanted::kLogprobs>(others, args.columns, scale, sums);
  if (rest.log2_z == -std::numeric_limits<double>::infinity()) return rest.log2_z + 0 * q.log2_z;
  return kLn2 * (rest.affine.reference() - q.affine.reference() + rest.log2_z - q.log2_z);
}

template <class X>
void token_rows_of(const TokenArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  C *const logprobs = static_cast<C*>(args.logprobs), *const norm = static_cast<C*>(args.norm);
  std::vector<Token> tokens;
  for (int64_t row = begin; row < end; ++row) {
    std::fill(logprobs + row * args.entries, logprobs + (row + 1) * args.entries, C(0));
    norm[2 * row] = norm[2 * row + 1] = 0;
    for (void* result : {args.lse, args.entropy, args.tail})
      if (result != nullptr) put<C>(result, row, 0);
    C* const stats = args.stats == nullptr ? nullptr : static_cast<C*>(args.stats) + row * (2 + args.entries);
    if (stats != nullptr) std::fill(stats, stats + 2 + args.entries, C(0));
    tokens_of(args, row, tokens);
    if (tokens.empty()) continue;
    const X* s = token_row<X>(args, row);
    const double scale = token_scale<C>(args, row);
    TokenSums sums;
    const Softmax<C> q = stats != nullptr          ? sweep_tokens<Wanted::kStats>(s, args.columns, scale, sums)
                         : args.entropy != nullptr ? sweep_tokens<Wanted::kEntropy>(s, args.columns, scale, sums)
                                                   : sweep_tokens<Wanted::kLogprobs>(s, args.columns, scale, sums);
    for (const Token& token : tokens) {
      const bool inside = token.id >= 0 && token.id < args.columns;
      const double x = inside ? q.affine.scalar(to_compute(s[token.id])) : std::numeric_limits<double>::quiet_NaN();
      // One class alone is certain, to the last bit.
      const double logprob = args.columns == 1 ? x - x : kLn2 * (x - q.log2_z);
      logprobs[row * args.entries + token.slot] = C(std::isnan(logprob) ? logprob : std::min(logprob, 0.0));
    }
    // A logit near the reference, and the sum relative to it: their logarithm alone would lose what is behind its
    // point.
    const C logit = C(q.affine.logit());
    norm[2 * row] = logit;
    norm[2 * row + 1] = C(std::exp2(q.log2_z - q.affine.scalar(double(logit))));
    const bool none = q.log2_z == -std::numeric_limits<double>::infinity();
    put<C>(args.lse, row,
           none ? std::numeric_limits<double>::quiet_NaN()
                : double(logit) * scale * kLn2 + kLn2 * (q.log2_z - q.affine.scalar(double(logit))));
    if (args.tail != nullptr) put<C>(args.tail, row, log_outside<X>(args, s, scale, q, tokens));
    if (args.entropy != nullptr) {
      const double entropy = kLn2 * (q.log2_z - sums.weighted / std::exp2(q.log2_z));
      put<C>(args.entropy, row, entropy < 0 || (args.columns == 1 && entropy == entropy) ? 0 : entropy);
    }
    if (stats != nullptr) {
      // NaN where there is no distribution.
      const double missing = 0 * q.log2_z, squares = kLn2 * (std::log2(sums.squares) - 2 * q.log2_z) + missing;
      stats[0] = C(squares > 0 || (args.columns == 1 && squares == squares) ? 0 : squares);
      stats[1] = C(sums.mean + missing);
      for (const Token& token : tokens) {
        const bool inside = token.id >= 0 && token.id < args.columns;
        if (missing == 0 && inside && double(to_compute(s[token.id])) == sums.largest) stats[2 + token.slot] = C(1);
      }
    }
  }
}

// The gradient q (a + b x) of a row, and of its tokens; s may be out.
template <bool STREAM, bool ENTROPY, class X, class C = typename Io<X>::C>
void token_gradient(const X* s, int64_t n, const Affine<C>& as, double a, double b, double log2_z, double per_token,
                    const std::vector<Token>& tokens, X* out) {
  if (n == 1) {
    // One class alone is certain whatever its logit.
    from_compute(C(0 * (a + b + as.scalar(to_compute(s[0])))), out);
    return;
  }
  constexpr int64_t block = Io<X>::kBlock;
  const double iq = std::exp2(-log2_z);
  const Vec<C> zero = {}, slope = zero + C(a * iq), by_x = zero + C(b * iq);
  const auto gradient = [&](const X* x, Vec<C>& g0, Vec<C>& g1) KDK_LAMBDA_INLINE {
    Vec<C> s0, s1;
    Io<X>::load2(x, s0, s1);
    const Vec<C> x0 = as(s0), x1 = as(s1);
    const Vec<C> e0 = exp2_fast<kExpDegree<X>>(clamp_exponent(x0)), e1 = exp2_fast<kExpDegree<X>>(clamp_exponent(x1));
    g0 = ENTROPY ? e0 * keep(e0 != zero, slope + by_x * x0) : e0 * slope;
    g1 = ENTROPY ? e1 * keep(e1 != zero, slope + by_x * x1) : e1 * slope;
  };
  const int64_t head = n < block ? 0 : head_elements(out, STREAM);
  const auto part = [&](int64_t first, int64_t count) {
    if (count == 0) return;
    X some[block] = {};
    std::copy(s + first, s + first + count, some);
    Vec<C> g0, g1;
    gradient(some, g0, g1);
    Io<X>::template store2<false>(some, g0, g1);
    std::copy(some, some + count, out + first);
  };
  part(0, head);
  int64_t j = head;
  for (; j + block <= n; j += block) {
    prefetch_ahead<block>(s + j);
    Vec<C> g0, g1;
    gradient(s + j, g0, g1);
    Io<X>::template store2<STREAM>(out + j, g0, g1);
  }
  part(j, n - j);
  // The tokens' own, of equal ones together, rounded once.
  for (size_t k = 0; k < tokens.size();) {
    const int64_t id = tokens[k].id;
    const double x = as.scalar(tokens[k].logit), e = std::exp2(x) * iq;
    double g = e == 0 ? 0 : e * (ENTROPY ? a + b * x : a);
    for (; k < tokens.size() && tokens[k].id == id; ++k) g += tokens[k].gradient * per_token;
    from_compute(C(g), out + id);
  }
}

template <class X>
void token_gradient_rows_of(const TokenArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  const C *const given = static_cast<const C*>(args.dlogprobs), *const norm = static_cast<const C*>(args.norm),
                 *const of_entropy = static_cast<const C*>(args.dentropy);
  const bool streamed = args.softcap == 0 && args.dlogits.data != args.logits.data &&
                        args.width * int64_t(sizeof(X)) >= kStreamRowBytes &&
                        args.batch * args.length * args.width * int64_t(sizeof(X)) > kStreamBytes;
  std::vector<Token> tokens;
  for (int64_t row = begin; row < end; ++row) {
    double sum = 0, h = 0;
    tokens_of(args, row, tokens);
    bool any = false;
    for (Token& token : tokens) {
      token.gradient = double(given[row * args.entries + token.slot]);
      sum += token.gradient;
      any = any || token.gradient != 0;
    }
    if (of_entropy != nullptr && !tokens.empty()) h = double(of_entropy[row]);
    with_dtype(args.dlogits.dtype, [&](auto type) {
      auto* out = row_pointer<decltype(type)>(args.dlogits, row, args.length);
      if (!any && h == 0) return fill_zero(out, 0, args.width);
      fill_zero(out, args.columns, args.width);
    });
    // A row that nothing asks for is not read: its gradient is 0, whatever is in it.
    if (!any && h == 0) continue;
    const X* s = token_row<X>(args, row);
    const double scale = token_scale<C>(args, row), per_token = scale / kLog2e;
    for (Token& token : tokens) {
      const bool inside = token.id >= 0 && token.id < args.columns;
      if (inside) token.logit = to_compute(s[token.id]);
      if (!inside && token.id != kElsewhere) token.gradient = sum = std::numeric_limits<double>::quiet_NaN();
    }
    tokens.erase(std::remove_if(tokens.begin(), tokens.end(),
                                [&](const Token& token) { return token.id < 0 || token.id >= args.columns; }),
                 tokens.end());
    std::stable_sort(tokens.begin(), tokens.end(), [](const Token& x, const Token& y) { return x.id < y.id; });
    const Affine<C> as = affine<C>(scale, double(norm[2 * row]));
    const double log2_z = as.scalar(double(norm[2 * row])) + std::log2(double(norm[2 * row + 1]));
    // -h q (log q + H) / T of the entropy, in x.
    const double entropy = h != 0 ? double(static_cast<const C*>(args.entropy)[row]) : 0;
    const double a = -per_token * (sum + h * (entropy - kLn2 * log2_z)), b = -per_token * h * kLn2;
    if (std::isnan(a + b + log2_z)) {
      // Also where an exponential is 0.
      with_dtype(args.dlogits.dtype, [&](auto type) {
        using Out = decltype(type);
        Out nan;
        from_compute(typename Io<Out>::C(std::numeric_limits<float>::quiet_NaN()), &nan);
        Out* out = row_pointer<Out>(args.dlogits, row, args.length);
        std::fill(out, out + args.columns, nan);
      });
      continue;
    }
    const auto write = [&](auto* out) {
      using Out = std::remove_pointer_t<decltype(out)>;
      if constexpr (std::is_same_v<Out, X>) {
        if (h != 0) {
          streamed ? token_gradient<true, true>(s, args.columns, as, a, b, log2_z, per_token, tokens, out)
                   : token_gradient<false, true>(s, args.columns, as, a, b, log2_z, per_token, tokens, out);
        } else {
          streamed ? token_gradient<true, false>(s, args.columns, as, a, b, log2_z, per_token, tokens, out)
                   : token_gradient<false, false>(s, args.columns, as, a, b, log2_z, per_token, tokens, out);
        }
      }
    };
    if (args.softcap == 0) {
      write(row_pointer<X>(args.dlogits, row, args.length));
      continue;
    }
    C* g = Scratch<C>::mine().get(kGradientRow, args.columns);
    write(reinterpret_cast<X*>(g));  // a row that is capped is in C
    const C* capped = reinterpret_cast<const C*>(s);
    const C inverse = C(1 / args.softcap);
    with_dtype(args.dlogits.dtype, [&](auto type) {
      using Out = decltype(type);
      if constexpr (std::is_same_v<typename Io<Out>::C, C>)
        narrow_row(args.columns, row_pointer<Out>(args.dlogits, row, args.length), [&](int64_t j) KDK_LAMBDA_INLINE {
          return load<Vec<C>>(g + j) * slope_of_cap(load<Vec<C>>(capped + j), inverse);
        });
    });
  }
  finish_streams();
}

// Logits after a softcap are in the type of the sums.
template <class X>
void token_rows(const TokenArgs& args, int64_t begin, int64_t end) {
  const auto run = [&](auto type) {
    using Y = decltype(type);
    args.dlogits.data == nullptr ? token_rows_of<Y>(args, begin, end) : token_gradient_rows_of<Y>(args, begin, end);
  };
  args.softcap != 0 ? run(typename Io<X>::C()) : run(X());
}

}  // namespace KDK_ISA
}  // namespace kdk
