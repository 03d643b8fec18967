// The dense row patterns for one instruction set; dense_<type>_<isa>.cpp instantiates those of one type of student.
//
// A row is swept in tiles that stay in L1. Sweep 1 takes the exponentials of student and teacher relative to a running
// reference and keeps them in a row scratch (L2), with the sums that the divergence needs; what follows reads the
// scratch only, so that every logit costs one exponential and is read from memory once. The reference is the maximum of
// the first elements of the row; a row whose sums pass kRedo is swept again from its true maximum. The gradient of a
// row is written while the next one is swept, see Pending.
//
// x denotes a scaled logit relative to its reference in base 2: x = logit / (T ln 2) - r; z the sum of 2^x; p = 2^x /
// z.
#pragma once

#include "dense_patterns.h"

#include <kdkernels/divergences.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

namespace kdk {

template <>
struct SeriesTerms<VecD> : SeriesTerms<double> {};
template <>
struct SeriesTerms<Pair<Pair<VecD>>> : SeriesTerms<double> {};

inline namespace KDK_ISA {

constexpr double kLn2 = 0.6931471805599453;
constexpr double kLog2e = 1.4426950408889634;
constexpr int64_t kTileElements = 2048;
constexpr int64_t kSeedElements = 128;
// A sum of 2^x above this sends the row back for its true maximum: sums of 2^x * x stay finite up to it, those of a
// power of 2^x only up to its root.
constexpr double kRedo = 0x1p80;
constexpr int64_t kPrefetchBytes = 4096;
// Gradients larger than this are written around the caches, which they would only flush; but not short rows, where
// aligning the writes costs more than it saves. Rows may be shorter where the next one is read while they are written.
constexpr int64_t kStreamBytes = int64_t(8) << 20, kStreamRowBytes = 3 << 10, kStreamShortRowBytes = 512;

// Which sums over e^x sweep 1 makes: of et (xt - xs), of es (xs - xt), of et xt, of es xs with the maxima. With kKept
// what those of kReverse are made of is kept for the gradient, in a place of its own; kOneModel is for one model alone.
enum Sums {
  kNoSums = 0,
  kForward = 1,
  kReverse = 2,
  kTeacher = 4,
  kStudent = 8,
  kKept = 16,
  kSoft = kForward | kTeacher,
  kBoth = kForward | kReverse | kKept,
  kAll = kForward | kReverse | kTeacher | kStudent,
  kAllKept = kAll | kKept,
  kOneModel = 32
};
// What carries the exponentials at temperature 1 for cross entropy and z-loss: at T = 2, 3 and 4 a power of those at T.
enum CeSource { kCeNone, kCeSame, kCeSquare, kCeCube, kCeFourth, kCeOwn };
constexpr int power_of(int ce) { return ce == kCeSquare ? 2 : ce == kCeCube ? 3 : ce == kCeFourth ? 4 : 1; }

// 2^x to 3.0e-6 for 16-bit logits, which carry errors of 2^-9 and 2^-11 themselves. Degree 3 (7.5e-5) would be 4 %
// faster, but shows as divergences of -1e-4 where student and teacher are equally sure.
template <class T>
constexpr int kExpDegree = 5;
template <>
constexpr int kExpDegree<BFloat16> = 4;
template <>
constexpr int kExpDegree<Half> = 4;

inline double per_row(const PerRow& values, int64_t row, double otherwise, bool fp64) {
  if (values.data == nullptr) return otherwise;
  const int64_t offset = row * values.stride;
  return fp64 ? static_cast<const double*>(values.data)[offset]
              : double(static_cast<const float*>(values.data)[offset]);
}

template <class X>
X* row_pointer(const LogitsView& view, int64_t row, int64_t length) {
  const int64_t batch = row < length ? 0 : row / length;
  return static_cast<X*>(view.data) + batch * view.stride_b + (row - batch * length) * view.stride_l;
}

// Scale and reference of one side; see relative().
template <class C>
struct Affine {
  C c, r, m;
  KDK_INLINE Vec<C> operator()(Vec<C> x) const { return relative(x, c, r, m); }
  double reference() const { return double(m) * double(c) + double(r); }
  // The logit that all are relative to.
  double logit() const { return double(m) + double(r) / double(c); }
  double scalar(double x) const { return (x - double(m)) * double(c) - double(r); }
  // What exp2_of_logit takes.
  float scale() const { return float(c) * kUnit; }
  float bias() const { return 2.0f + float(127 - reference()) * kUnit; }
  // What logit * scale, a rounding of logit c ln 2, is less log 2^x / z. The rounding is made good for at the
  // reference, where most of the mass is; elsewhere it would set log p against p, 1.3e-8 for every unit of a logit.
  double log_normalizer(double log2_z, C scale) const {
    return kLn2 * (reference() + log2_z) + (double(scale) - kLn2 * double(c)) * logit();
  }
  // A logit whose exponential is exactly 0, without leaving the bounds of exp2_of_logit.
  float nothing() const { return float((reference() - 127) / double(c)); }
  // Differences of logits that are this small lose nothing to rounding, whatever they stand for.
  bool trusts(const Affine& other) const {
    return std::abs(reference()) <= 126 && std::abs(other.reference()) <= 126 &&
           std::abs(reference() - other.reference()) <= 32;
  }
};

template <class C>
Affine<C> affine(double c, double maximum) {
  constexpr C largest = std::numeric_limits<C>::max();
  const C cc = C(c);
  // A row that starts with -inf gets a finite reference, from which its first tile forces a new one.
  const C m = C(std::max(maximum, -double(largest)));
  const double whole = std::nearbyint(double(m) * double(cc));
  if (kFused && sizeof(C) == 4 && std::abs(whole) < 0x1p24) return {cc, C(whole), C(0)};
  return {cc, C(0), m};
}

// Rows go to exact_row where what is left of them after cancellation counts: the divergence is below kNearlyEqual, and
// one token has all but kFairlySure of the student's probability, or the largest has more than kTop and the models
// agree on those next to it (see agree); or it has all but kSure, and with it vanishes the gradient.
constexpr double kFairlySure = 0.5, kSure = 0x1p-10, kTop = 0x1p-4;
// Below this models need not be asked on which tokens they agree. And both KLs together, whose errors cancel in plain
// PyTorch, are asked for up to more.
constexpr double kAlike = 0x1p-20, kNearForBoth = 0x1p-3;
// Without fused multiply-adds the logits of near models are rounded apart when they are scaled.
constexpr double kNearlyEqual = kFused ? 0x1p-6 : 0x1p-4;

// A divergence, or an entropy, is not below 0; what rounds to less is 0.
inline double at_least_0(double x) { return x < 0 ? 0 : x; }

enum Part { kWhole, kBody, kEdges };

// What load_block is told of blocks of which every lane counts.
template <class X>
struct AllLanes {
  static constexpr bool kEdge = false;
};
// And of a single block of which only the elements [begin, end) count, less one that may be excluded.
template <class X>
struct SomeLanes {
  static constexpr bool kEdge = true;
  static constexpr int64_t kBlock = Io<X>::kBlock;
  using C = typename Io<X>::C;
  using Mask = typename VecOf<C>::Mask;
  using Lane = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  int64_t begin, end;
  Mask first, second;

  SomeLanes(int64_t from, int64_t to, int64_t excluded) : begin(from), end(to) {
    static constexpr Elements elements = in_order_of_slots(std::make_index_sequence<size_t(kBlock)>());
    first = counts(load<Mask>(elements.at), Lane(from), Lane(to), Lane(excluded));
    second = counts(load<Mask>(elements.at + kBlock / 2), Lane(from), Lane(to), Lane(excluded));
  }

 private:
  struct Elements {
    alignas(64) Lane at[size_t(kBlock)];
  };
  template <size_t... K>
  static constexpr Elements in_order_of_slots(std::index_sequence<K...>) {
    return {{Lane(Io<X>::element(int64_t(K)))...}};
  }
  static KDK_INLINE Mask counts(Mask j, Lane from, Lane to, Lane excluded) {
    return (j >= from) & (j < to) & (j != excluded);
  }
};

// A block of logits of type Y as the two vectors that it would be as X.
template <class X, class Y, class V>
KDK_INLINE void load2_as(const Y* y, V& a, V& b) {
  if constexpr (std::is_same_v<X, Y>) {
    Io<X>::load2(y, a, b);
  } else {
    static_assert(std::is_same_v<Y, typename Io<X>::C>, "the teacher's logits are of the student's type or its sums'");
    a = load<V>(y), b = load<V>(y + kLanes<Y>);
    if (Io<X>::element(1) == 2) even_and_odd(a, b);
  }
}

// The two vectors of a block, with padding in place of what does not count.
template <class X, class Y, class C>
KDK_INLINE void load_block(const Y* x, AllLanes<X>, C, Vec<C>& a, Vec<C>& b) {
  load2_as<X>(x, a, b);
}
template <class X, class Y, class C>
KDK_INLINE void load_block(const Y* x, const SomeLanes<X>& lanes, C padding, Vec<C>& a, Vec<C>& b) {
  load2_as<X>(x, a, b);
  a = kdk_where(lanes.first, a, Vec<C>{} + padding);
  b = kdk_where(lanes.second, b, Vec<C>{} + padding);
}

// One row of both models, cut into blocks, aligned where the gradient is streamed. What fills no block at either end is
// read in place, in a block of which only a part counts: the first and the last of the row. Copies of them, made when
// the row was begun, cost a wait for its last line from memory. X is the student's type, and gives the order of
// elements in a block, Y the teacher's: the same, or that of the sums.
template <class X, class Y = X>
struct Row {
  using C = typename Io<X>::C;
  static constexpr int64_t kBlock = Io<X>::kBlock;
  static constexpr int64_t kTileBlocks = kTileElements / kBlock;

  const X* s;
  const Y* t;
  int64_t n, head, body, tail;  // elements: all, before the body, and after it; the body in blocks
  int64_t excluded = -1;        // an element
  X short_s[kBlock];
  Y short_t[kBlock];

  Row(const X* student, const Y* teacher, int64_t columns, int64_t head_elements)
      : s(student), t(teacher), n(columns), head(columns < kBlock ? 0 : head_elements) {
    body = (n - head) / kBlock;
    tail = n - head - body * kBlock;
    if (n >= kBlock) return;
    // Nothing may be read before a row that is shorter than a block.
    std::memset(static_cast<void*>(short_s), 0, sizeof(short_s));
    std::memset(static_cast<void*>(short_t), 0, sizeof(short_t));
    std::copy(s, s + n, short_s + kBlock - n);
    std::copy(t, t + n, short_t + kBlock - n);
  }

  // Leaves element j out of all sums, by treating it as -inf on both sides.
  void exclude(int64_t j) { excluded = j; }

  bool padded(int64_t tile) const { return (tile == 0 && head > 0) || (tile == tiles() - 1 && tail > 0); }
  int64_t tiles() const { return std::max<int64_t>(1, (body + kTileBlocks - 1) / kTileBlocks); }
  int64_t slots() const { return (body + (head > 0) + (tail > 0)) * kBlock; }

  int64_t slot(int64_t j) const {
    if (j < head) return Io<X>::slot(j);
    const int64_t base = head > 0 ? kBlock : 0, rest = j - head, full = body * kBlock;
    if (rest >= full) return base + full + Io<X>::slot(j - (n - kBlock));
    return base + (rest / kBlock) * kBlock + Io<X>::slot(rest % kBlock);
  }

  // Calls visit(s, t, blocks, slot, first, lanes) for the pieces of a tile in order: first is the element at s, and of
  // the edges, a block each, only some lanes count.
  template <Part PART = kWhole, class Visit>
  KDK_INLINE void pieces(int64_t tile, Visit visit) const {
    const int64_t base = head > 0 ? 1 : 0;
    if constexpr (PART != kBody) {
      if (tile == 0 && head > 0) visit(s, t, int64_t(1), int64_t(0), int64_t(0), SomeLanes<X>(0, head, excluded));
    }
    if constexpr (PART != kEdges) inner_pieces(tile, visit, base);
    if constexpr (PART != kBody) {
      if (tile == tiles() - 1 && tail > 0) {
        const int64_t first = n - kBlock;
        visit(first < 0 ? short_s : s + first, first < 0 ? short_t : t + first, int64_t(1), (base + body) * kBlock,
              first, SomeLanes<X>(kBlock - tail, kBlock, excluded - first));
      }
    }
  }

 private:
  template <class Visit>
  KDK_INLINE void inner_pieces(int64_t tile, Visit visit, int64_t base) const {
    int64_t begin = tile * kTileBlocks;
    const int64_t end = std::min(body, begin + kTileBlocks);
    if (excluded >= head) {
      const int64_t hole = (excluded - head) / kBlock;
      if (hole >= begin && hole < end) {
        const int64_t first = head + hole * kBlock;
        span(visit, begin, hole, base);
        visit(s + first, t + first, int64_t(1), (base + hole) * kBlock, first,
              SomeLanes<X>(0, kBlock, excluded - first));
        begin = hole + 1;
      }
    }
    span(visit, begin, end, base);
  }

  template <class Visit>
  KDK_INLINE void span(Visit visit, int64_t begin, int64_t end, int64_t base) const {
    if (begin < end) {
      const int64_t first = head + begin * kBlock;
      visit(s + first, t + first, end - begin, (base + begin) * kBlock, first, AllLanes<X>());
    }
  }
};

struct Range {
  int64_t begin, end;
};

// The elements, and the slots, that belong to a tile.
template <class R>
Range tile_elements(const R& row, int64_t tile, int64_t n) {
  const int64_t begin = row.head + tile * R::kTileBlocks * R::kBlock;
  return {tile == 0 ? 0 : begin, tile == row.tiles() - 1 ? n : begin + R::kTileBlocks * R::kBlock};
}
template <class R>
Range tile_slots(const R& row, int64_t tile) {
  const int64_t base = row.head > 0 ? R::kBlock : 0;
  const int64_t begin = base + tile * R::kTileBlocks * R::kBlock;
  return {tile == 0 ? 0 : begin, tile == row.tiles() - 1 ? row.slots() : begin + R::kTileBlocks * R::kBlock};
}

template <class X>
double maximum(const X* x, int64_t n) {
  using C = typename Io<X>::C;
  constexpr int64_t block = Io<X>::kBlock;
  double best = -std::numeric_limits<double>::infinity();
  int64_t j = 0;
  if (n >= block) {
    Vec<C> high = Vec<C>{} - std::numeric_limits<C>::infinity();
    for (; j + block <= n; j += block) {
      Vec<C> a, b;
      Io<X>::load2(x + j, a, b);
      high = max_keep_nan(high, max_keep_nan(a, b));
    }
    best = double(horizontal_max<C>(high));
  }
  for (; j < n; ++j) best = std::max(best, double(to_compute(x[j])));
  return best;
}

// Fetches what comes kPrefetchBytes after COUNT elements, every cache line of it: the processor's own prefetching gives
// up where a part of the lines is there already. The addresses may lie past the end of the logits; they are only hints.
template <int64_t COUNT, class X>
KDK_INLINE void prefetch_ahead(const X* elements) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(elements) + kPrefetchBytes;
  for (int64_t offset = 0; offset < COUNT * int64_t(sizeof(X)); offset += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(first + uintptr_t(offset)));
}

template <class C>
struct Accumulators {
  Vec<C> zs = {}, zt = {}, forward = {}, teacher = {}, reverse = {}, student = {}, max_s, max_t;
};

// Sums of a row relative to its references, in double.
struct RowSums {
  double zs = 0, zt = 0, forward = 0, teacher = 0, reverse = 0, student = 0;
  double most = 0;  // of zs in one lane of one tile, at least what its largest exponential is
  double max_s = -std::numeric_limits<double>::infinity(), max_t = max_s;  // of x, under kStudent only
  int64_t best_tile_s = 0, best_tile_t = 0;

  void see_maximum(int64_t tile, double high_s, double high_t) {
    if (high_s > max_s) max_s = high_s, best_tile_s = tile;
    if (high_t > max_t) max_t = high_t, best_tile_t = tile;
  }
};

// The gradient es (a + ks (xs - xt) + kst xt) - et b + e1 c1 + c0; the middle terms only where LOGS, et only of TWO
// models.
template <class C>
struct GradientTerms {
  double a = 0, b = 0, c0 = 0, c1 = 0, ks = 0, kst = 0;
  CeSource ce = kCeNone;
  bool logs = false, two_models = true;
  Affine<C> as{}, at{};
  C *es = nullptr, *et = nullptr, *e1 = nullptr;
  // Where it is wanted and et still holds the teacher's exponentials: sum min(es, et ratio) is added up on the way.
  double* accepted = nullptr;
  double ratio = 0;
};

template <int POWER, class V>
KDK_INLINE V power(V e) {
  if (POWER == 4) return (e * e) * (e * e);
  return POWER == 3 ? e * e * e : POWER == 2 ? e * e : e;
}

// Two vectors of a gradient, from where their exponentials and logits stand.
template <bool LOGS, int CE, bool ACCEPTED, bool TWO, class X>
struct GradientBlock {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  C a, b, c0, c1, ks, kst, ratio;
  Affine<C> as, at;

  explicit GradientBlock(const GradientTerms<C>& k)
      : a(C(k.a)),
        b(C(k.b)),
        c0(C(k.c0)),
        c1(C(k.c1)),
        ks(C(k.ks)),
        kst(C(k.kst)),
        ratio(C(k.ratio)),
        as(k.as),
        at(k.at) {}

  template <class Y = X>
  KDK_INLINE void operator()(const C* es, const C* et, const C* e1, const X* s, const Y* t, V& accepted, V& g0,
                             V& g1) const {
    const V zero = {};
    const V es0 = load<V>(es), es1 = load<V>(es + kLanes<C>);
    if (LOGS) {
      V s0, s1, t0, t1;
      Io<X>::load2(s, s0, s1);
      load2_as<X>(t, t0, t1);
      const V xs0 = as(s0), xs1 = as(s1), xt0 = at(t0), xt1 = at(t1);
      g0 = c0 + es0 * keep(es0 != zero, a + ks * (xs0 - xt0) + kst * xt0);
      g1 = c0 + es1 * keep(es1 != zero, a + ks * (xs1 - xt1) + kst * xt1);
    } else if (power_of(CE) > 1) {
      g0 = c0 + es0 * (a + power<power_of(CE) - 1>(es0) * c1);
      g1 = c0 + es1 * (a + power<power_of(CE) - 1>(es1) * c1);
    } else {
      g0 = c0 + es0 * a;
      g1 = c0 + es1 * a;
    }
    if (TWO) {
      const V et0 = load<V>(et), et1 = load<V>(et + kLanes<C>);
      g0 -= unfused(et0 * b);
      g1 -= unfused(et1 * b);
      if (ACCEPTED) accepted += min_of(es0, et0 * ratio) + min_of(es1, et1 * ratio);
    }
    if (CE == kCeOwn) {
      g0 += load<V>(e1) * c1;
      g1 += load<V>(e1 + kLanes<C>) * c1;
    }
  }
};

constexpr int64_t kLineBytes = 64;

// Those of the blocks at out that may be streamed around the caches: whole cache lines, for one that is half streamed
// and half stored costs a read.
template <class X>
KDK_INLINE Range streamed_blocks(const X* out, int64_t blocks) {
  constexpr int64_t bytes = Io<X>::kBlock * int64_t(sizeof(X));
  const auto in_line = [](const X* x) { return int64_t(reinterpret_cast<uintptr_t>(x) % kLineBytes); };
  return {(kLineBytes - in_line(out)) % kLineBytes / bytes, blocks - in_line(out + blocks * Io<X>::kBlock) / bytes};
}

// Writes the blocks of a piece of a row, one after the other; out is where the row begins.
template <bool STREAM, class X, class Lanes>
struct BlockWriter {
  static constexpr int64_t kBlock = Io<X>::kBlock;
  using V = Vec<typename Io<X>::C>;
  X* to;
  Range streamed = {0, 0};
  const Lanes lanes;

  KDK_INLINE BlockWriter(X* out, int64_t first, int64_t blocks, const Lanes& counting) : lanes(counting) {
    if constexpr (Lanes::kEdge) {
      to = out + (first + lanes.begin);
    } else {
      to = out + first;
      if (STREAM) streamed = streamed_blocks(to, blocks);
    }
  }
  // Block i of the piece.
  KDK_INLINE void put(int64_t i, V a, V b) {
    if constexpr (Lanes::kEdge) {
      alignas(64) X block[kBlock];
      Io<X>::template store2<false>(block, a, b);
      std::copy(block + lanes.begin, block + lanes.end, to);
    } else if (STREAM && i >= streamed.begin && i < streamed.end) {
      Io<X>::template store2<true>(to, a, b);
    } else {
      Io<X>::template store2<false>(to, a, b);
    }
    to += kBlock;
  }
};

// The gradient of the last row, which is written while the next one is swept, block for block: an exponential is read
// where that of the next row goes. So memory is read and written at the same time, and nothing waits for the sums that
// the gradient needs. Of the row's edges, which are stored, the elements wait here: what is stored after them would
// wait for the cache lines they share.
template <class X>
struct Pending {
  using C = typename Io<X>::C;
  static constexpr int64_t kBlock = Io<X>::kBlock;
  struct Edge {
    alignas(64) X block[kBlock];
    int64_t begin, end;
    X* to;
  };
  GradientTerms<C> terms;
  int64_t first_slot = 0;  // of the body
  X* out = nullptr;        // the next block
  int64_t written = 0;     // blocks before that
  int64_t blocks = 0;      // from there on
  Range streamed = {0, 0};
  int num_edges = 0;
  Edge edges[2];
  // What is left to do when all is written: the label's element, and the acceptance rate, which is a sum over the row.
  X* label = nullptr;
  C at_label = 0;
  C* acceptance = nullptr;
  double accepted = 0, acceptance_factor = 0;

  // terms: of the row, their es, et and e1 where its slots begin; to: where its gradient begins.
  template <class Y>
  void begin(const Row<X, Y>& row, X* to, bool stream) {
    first_slot = row.head > 0 ? kBlock : 0;
    out = to + row.head;
    written = 0;
    blocks = row.body;
    streamed = stream ? streamed_blocks(out, blocks) : Range{0, 0};
  }
  void accept(C* to, double factor) {
    acceptance = to;
    accepted = 0;
    terms.accepted = &accepted;
    acceptance_factor = factor;
  }
  KDK_INLINE void finish() {
    if (blocks > 0) write_blocks();
    for (int k = 0; k < num_edges; ++k)
      std::copy(edges[k].block + edges[k].begin, edges[k].block + edges[k].end, edges[k].to);
    num_edges = 0;
    if (label != nullptr) from_compute(at_label, std::exchange(label, nullptr));
    if (acceptance != nullptr) *std::exchange(acceptance, nullptr) = C(accepted * acceptance_factor);
  }

 private:
  void write_blocks();
};

// Nothing to do beside a sweep.
template <class X>
struct Alone {
  static constexpr bool kWrites = false;
  void stop(Pending<X>&) const {}
};

// What is pending, written beside a sweep.
template <int CE, bool ACCEPTED, bool TWO, class X>
struct Beside {
  static constexpr bool kWrites = true;
  static constexpr int64_t kBlock = Io<X>::kBlock;
  using C = typename Io<X>::C;
  using V = Vec<C>;

  GradientBlock<false, CE, ACCEPTED, TWO, X> gradient;
  const C* e1;
  X* out;
  int64_t done = 0, blocks, first_streamed, num_streamed;
  V accepted = {};

  explicit Beside(const Pending<X>& pending)
      : gradient(pending.terms),
        e1(pending.terms.e1 + pending.first_slot + pending.written * kBlock),
        out(pending.out),
        blocks(pending.blocks),
        first_streamed(pending.streamed.begin),
        num_streamed(pending.streamed.end - pending.streamed.begin) {}

  // The next block, whose exponentials are at es and et.
  KDK_INLINE void write_block(const C* es, const C* et) {
    V g0, g1;
    gradient(es, et, e1, nullptr, static_cast<const X*>(nullptr), accepted, g0, g1);
    if (uint64_t(done - first_streamed) < uint64_t(num_streamed)) {
      Io<X>::template store2<true>(out, g0, g1);
    } else {
      Io<X>::template store2<false>(out, g0, g1);
    }
    out += kBlock, ++done;
    if (CE == kCeOwn) e1 += kBlock;
  }
  void stop(Pending<X>& pending) const {
    pending.written += done;
    pending.out = out;
    pending.blocks = blocks - done;
    pending.streamed.begin -= done, pending.streamed.end -= done;
    if (ACCEPTED) pending.accepted += double(horizontal_sum<C>(accepted));
  }
};

// Calls write(Beside or Alone) with what writes a pending gradient while sums are made that are SUMS. What is never
// pending then, and so is not among them, beside_sweep() knows.
template <int SUMS, class X, class Write>
KDK_INLINE void with_pending(Pending<X>& pending, Write write) {
  const auto with = [&](auto beside) KDK_LAMBDA_INLINE {
    write(beside);
    beside.stop(pending);
  };
  if (pending.blocks == 0) return with(Alone<X>());
  if constexpr (SUMS == kForward || SUMS == kSoft) {
    // Cross entropy's part.
    switch (pending.terms.ce) {
      case kCeSquare: return with(Beside<kCeSquare, false, true, X>(pending));
      case kCeCube: return with(Beside<kCeCube, false, true, X>(pending));
      case kCeFourth: return with(Beside<kCeFourth, false, true, X>(pending));
      case kCeOwn: return with(Beside<kCeOwn, false, true, X>(pending));
      default: break;
    }
  } else if constexpr (SUMS & kStudent) {
    if constexpr (SUMS & kKept)
      if (pending.terms.ce == kCeOwn) return with(Beside<kCeOwn, true, true, X>(pending));
    if (pending.terms.accepted != nullptr) return with(Beside<kCeNone, true, true, X>(pending));
  } else if constexpr (SUMS == kBoth || SUMS == kOneModel) {
    if (pending.terms.ce == kCeOwn) return with(Beside<kCeOwn, false, SUMS == kBoth, X>(pending));
  }
  return with(Beside<kCeNone, false, SUMS != kOneModel, X>(pending));
}
template <class C>
bool beside_sweep(int sums, const GradientTerms<C>& terms) {
  return !terms.logs && (terms.ce == kCeNone || sums == kForward || sums == kSoft || (sums & kKept) != 0);
}

template <class X>
void Pending<X>::write_blocks() {
  // In tiles, as beside a sweep: an acceptance rate is the same to the last bit, whatever row comes next.
  while (blocks > 0) {
    const int64_t slot = first_slot + written * kBlock, count = Row<X>::kTileBlocks - written % Row<X>::kTileBlocks;
    const C *es = terms.es + slot, *et = terms.et + slot;
    const auto tile = [&](auto& beside) KDK_LAMBDA_INLINE {
      if constexpr (std::decay_t<decltype(beside)>::kWrites)
        for (const int64_t end = std::min(count, beside.blocks); beside.done < end; es += kBlock, et += kBlock)
          beside.write_block(es, et);
    };
    if (!terms.two_models) {
      with_pending<kOneModel>(*this, tile);
    } else if (terms.accepted != nullptr) {
      with_pending<kAllKept>(*this, tile);
    } else {
      with_pending<kForward>(*this, tile);
    }
  }
}

// Adds a block, two vectors of both models, to the sums, and stores its exponentials. A clamped x stands for x wherever
// its exponential is 0, so that 0 * inf does not arise. Only the other model's x must stay as it is, for mass where the
// other has none costs infinitely much; MASKING covers its -inf where there is no mass.
template <int SUMS, bool MASKING, int DEGREE, class C>
KDK_INLINE void accumulate(Vec<C> xs0, Vec<C> xs1, Vec<C> xt0, Vec<C> xt1, C* es_out, C* et_out, Accumulators<C>& acc) {
  using V = Vec<C>;
  const V zero = {};
  const V cs0 = clamp_exponent(xs0), cs1 = clamp_exponent(xs1), ct0 = clamp_exponent(xt0), ct1 = clamp_exponent(xt1);
  const V es0 = exp2_fast<DEGREE>(cs0), et0 = exp2_fast<DEGREE>(ct0);
  const V es1 = exp2_fast<DEGREE>(cs1), et1 = exp2_fast<DEGREE>(ct1);
  acc.zs += es0 + es1;
  acc.zt += et0 + et1;
  if (SUMS & kForward) {
    acc.forward += et0 * (MASKING ? keep(et0 != zero, ct0 - xs0) : ct0 - xs0);
    acc.forward += et1 * (MASKING ? keep(et1 != zero, ct1 - xs1) : ct1 - xs1);
  }
  if (SUMS & kReverse) {
    acc.reverse += es0 * (MASKING ? keep(es0 != zero, cs0 - xt0) : cs0 - xt0);
    acc.reverse += es1 * (MASKING ? keep(es1 != zero, cs1 - xt1) : cs1 - xt1);
  }
  if (SUMS & kTeacher) {
    acc.teacher += et0 * ct0;
    acc.teacher += et1 * ct1;
  }
  if (SUMS & kStudent) {
    acc.student += es0 * cs0;
    acc.student += es1 * cs1;
    acc.max_s = max_keep_nan(acc.max_s, max_keep_nan(xs0, xs1));
    acc.max_t = max_keep_nan(acc.max_t, max_keep_nan(xt0, xt1));
  }
  store(es_out, es0);
  store(es_out + kLanes<C>, es1);
  store(et_out, et0);
  store(et_out + kLanes<C>, et1);
}

template <int SUMS, bool MASKING, class X, class Y, class C>
void sweep_tile(const Row<X, Y>& row, int64_t tile, const Affine<C> as, const Affine<C> at, C* es, C* et,
                RowSums& sums) {
  constexpr int64_t block = Io<X>::kBlock;
  constexpr int degree = kExpDegree<X>;
  constexpr C nothing = -std::numeric_limits<C>::infinity();
  Accumulators<C> acc;
  acc.max_s = acc.max_t = Vec<C>{} - std::numeric_limits<C>::infinity();
  row.pieces(tile, [&](const X* s, const Y* t, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
    C *es_out = es + slot, *et_out = et + slot;
    Accumulators<C> local = acc;
    for (int64_t b = 0; b < blocks; ++b, s += block, t += block, es_out += block, et_out += block) {
      prefetch_ahead<block>(s);
      prefetch_ahead<block>(t);
      Vec<C> s0, s1, t0, t1;
      load_block(s, lanes, nothing, s0, s1);
      load_block(t, lanes, nothing, t0, t1);
      accumulate<SUMS, MASKING, degree, C>(as(s0), as(s1), at(t0), at(t1), es_out, et_out, local);
    }
    acc = local;
  });
  sums.zs += horizontal_sum<C>(acc.zs);
  sums.zt += horizontal_sum<C>(acc.zt);
  if (SUMS != kForward && SUMS != kSoft) sums.most = std::max<double>(sums.most, horizontal_max<C>(acc.zs));
  if (SUMS & kForward) sums.forward += horizontal_sum<C>(acc.forward);
  if (SUMS & kReverse) sums.reverse += horizontal_sum<C>(acc.reverse);
  if (SUMS & kTeacher) sums.teacher += horizontal_sum<C>(acc.teacher);
  if (SUMS & kStudent) {
    sums.student += horizontal_sum<C>(acc.student);
    sums.see_maximum(tile, horizontal_max<C>(acc.max_s), horizontal_max<C>(acc.max_t));
  }
}

// What a sweep without clamps takes of a row, and the teacher's scale over the student's.
struct Trusted {
  float scale_s, bias_s, nothing_s, middle_s, scale_t, bias_t, nothing_t, middle_t, ratio;

  Trusted(const Affine<float>& as, const Affine<float>& at)
      : scale_s(as.scale()),
        bias_s(as.bias()),
        nothing_s(as.nothing()),
        middle_s(float(as.logit())),
        scale_t(at.scale()),
        bias_t(at.bias()),
        nothing_t(at.nothing()),
        middle_t(float(at.logit())),
        ratio(float(double(at.c) / double(as.c))) {}
};

// What is summed up of a tile without clamps: sums over logits instead of x, and whether all of them were in bounds.
// Those of one model are of logits less one near the reference: of a row whose mass lies far from 0 the sum of et t
// would be a large number that cancels.
template <class X, class Y>
struct TrustedSums {
  Accumulators<float> sums;
  Bounds bounds;
  Peak<X> peak_s;
  Peak<Y> peak_t;
};

// Sweeps a tile without clamps. A block of what is pending is written for every block of the body. What the sums of
// kReverse are made of, es (t ratio - s), goes to terms where it is kKept, and for kReverse alone, whose gradient needs
// no exponential of t, to et.
template <int SUMS, class X, class Y, class Beside>
KDK_INLINE void sweep_trusting(const Row<X, Y>& row, int64_t tile, const Trusted& k, float* es, float* et, float* terms,
                               TrustedSums<X, Y>& all, Beside& beside) {
  using V = VecF;
  constexpr int64_t block = Io<X>::kBlock;
  constexpr int degree = kExpDegree<X>;
  row.pieces(tile, [&](const X* s, const Y* t, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
    float *es_out = es + slot, *et_out = et + slot, *terms_out = terms + slot;
    TrustedSums<X, Y> local = all;
    const auto sweep = [&]() KDK_LAMBDA_INLINE {
      prefetch_ahead<block>(s);
      prefetch_ahead<block>(t);
      V s0, s1, t0, t1;
      load_block(s, lanes, k.nothing_s, s0, s1);
      load_block(t, lanes, k.nothing_t, t0, t1);
      const V es0 = exp2_of_logit<degree>(s0, k.scale_s, k.bias_s, local.bounds);
      const V et0 = exp2_of_logit<degree>(t0, k.scale_t, k.bias_t, local.bounds);
      const V es1 = exp2_of_logit<degree>(s1, k.scale_s, k.bias_s, local.bounds);
      const V et1 = exp2_of_logit<degree>(t1, k.scale_t, k.bias_t, local.bounds);
      Accumulators<float>& sums = local.sums;
      sums.zs += es0 + es1;
      sums.zt += et0 + et1;
      const V difference0 = t0 * k.ratio - s0, difference1 = t1 * k.ratio - s1;
      if (SUMS & kForward) {
        sums.forward += et0 * difference0;
        sums.forward += et1 * difference1;
      }
      if (SUMS & kReverse) {
        sums.reverse -= es0 * difference0;
        sums.reverse -= es1 * difference1;
      }
      if (SUMS & kTeacher) {
        sums.teacher += et0 * (t0 - k.middle_t);
        sums.teacher += et1 * (t1 - k.middle_t);
      }
      if (SUMS & kStudent) {
        sums.student += es0 * (s0 - k.middle_s);
        sums.student += es1 * (s1 - k.middle_s);
        if constexpr (lanes.kEdge) {
          local.peak_s.see(s0, s1), local.peak_t.see(t0, t1);
        } else {
          local.peak_s.see(s, s0, s1), local.peak_t.see(t, t0, t1);
        }
      }
      store(es_out, es0);
      store(es_out + kLanes<float>, es1);
      store(et_out, SUMS == kReverse ? es0 * difference0 : et0);
      store(et_out + kLanes<float>, SUMS == kReverse ? es1 * difference1 : et1);
      if (SUMS & kKept) {
        store(terms_out, es0 * difference0);
        store(terms_out + kLanes<float>, es1 * difference1);
        terms_out += block;
      }
      s += block, t += block, es_out += block, et_out += block;
    };
    int64_t b = 0;
    if constexpr (Beside::kWrites && decltype(lanes)::kEdge) {
      // The last block of a body may be where the tail of the next row goes, and any where an element is left out.
      if ((slot > 0 || row.head == 0) && beside.done < beside.blocks) beside.write_block(es_out, et_out);
    }
    if constexpr (Beside::kWrites && !decltype(lanes)::kEdge) {
      // What is pending begins where the body does.
      const int64_t both = std::min(blocks, beside.blocks - beside.done);
      Beside local_beside = beside;
#pragma GCC unroll 2
      for (; b < both; ++b) {
        local_beside.write_block(es_out, et_out);
        sweep();
      }
      beside = local_beside;
    }
#pragma GCC unroll 2
    for (; b < blocks; ++b) sweep();
    all = local;
  });
}

// A tile without clamps. False when a logit was out of bounds: then nothing was added to the sums.
template <int SUMS, class X, class Y>
bool sweep_tile_trusting(const Row<X, Y>& row, int64_t tile, const Affine<float>& as, const Affine<float>& at,
                         float* es, float* et, float* terms, RowSums& sums, Pending<X>& pending) {
  TrustedSums<X, Y> all;
  const Trusted trusted(as, at);
  with_pending<SUMS>(pending, [&](auto& beside) KDK_LAMBDA_INLINE {
    sweep_trusting<SUMS>(row, tile, trusted, es, et, terms, all, beside);
  });
  const auto& [acc, bounds, peak_s, peak_t] = all;
  const double zs = horizontal_sum<float>(acc.zs), zt = horizontal_sum<float>(acc.zt);
  if (!bounds.kept() || std::isnan(zs) || std::isnan(zt)) return false;
  sums.zs += zs;
  sums.zt += zt;
  if (SUMS != kForward && SUMS != kSoft) sums.most = std::max<double>(sums.most, horizontal_max<float>(acc.zs));
  const double cs = as.c, ct = at.c, rs = as.reference(), rt = at.reference();
  if (SUMS & kForward) sums.forward += cs * double(horizontal_sum<float>(acc.forward)) - (rt - rs) * zt;
  if (SUMS & kReverse) sums.reverse += cs * double(horizontal_sum<float>(acc.reverse)) + (rt - rs) * zs;
  const double middle_s = trusted.middle_s, middle_t = trusted.middle_t;
  if (SUMS & kTeacher) sums.teacher += ct * double(horizontal_sum<float>(acc.teacher)) + (ct * middle_t - rt) * zt;
  if (SUMS & kStudent) {
    sums.student += cs * double(horizontal_sum<float>(acc.student)) + (cs * middle_s - rs) * zs;
    double high_s = peak_s.value(), high_t = peak_t.value();
    const auto [begin, end] = tile_elements(row, tile, row.n);
    if (std::isnan(high_s)) high_s = maximum(row.s + begin, end - begin);
    if (std::isnan(high_t)) high_t = maximum(row.t + begin, end - begin);
    sums.see_maximum(tile, as.scalar(high_s), at.scalar(high_t));
  }
  return true;
}

template <int SUMS, class X, class Y, class C>
void sweep_tile(const Row<X, Y>& row, int64_t tile, const Affine<C>& as, const Affine<C>& at, C* es, C* et, C* terms,
                bool& trusting, bool masking, RowSums& sums, Pending<X>& pending) {
  if constexpr (kFused && std::is_same_v<C, float>) {
    if (trusting && as.trusts(at)) {
      if (sweep_tile_trusting<SUMS>(row, tile, as, at, es, et, terms, sums, pending)) return;
      trusting = false;
    }
  }
  pending.finish();
  if (masking || row.padded(tile)) {
    sweep_tile<SUMS, true>(row, tile, as, at, es, et, sums);
  } else {
    sweep_tile<SUMS, false>(row, tile, as, at, es, et, sums);
  }
}

// The sum of value(j) over whole vectors j of a tile, in four chains of additions: one would be waited for.
template <class C, class Value>
KDK_INLINE double sum_in_chains(int64_t count, Value value) {
  Vec<C> sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes<C> <= count; j += 4 * kLanes<C>)
    for (int i = 0; i < 4; ++i) sums[i] += value(j + i * kLanes<C>);
  for (; j < count; j += kLanes<C>) sums[0] += value(j);
  return horizontal_sum<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The same over a row, whatever its length.
template <class C, class Value>
double sum_over_row(int64_t n, Value value) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kTileElements)
    total += sum_in_chains<C>(std::min(kTileElements, n - begin),
                              [&](int64_t j) KDK_LAMBDA_INLINE { return value(begin + j); });
  return total;
}

// Sum of a power of the exponentials of a tile: at T = 2, 3 and 4 these are the exponentials at T = 1. They go to kept,
// which is e where nobody needs them.
template <int POWER, class C>
double sum_of_powers(const C* e, C* kept, int64_t count) {
  using V = Vec<C>;
  const auto raised = [&](int64_t j) KDK_LAMBDA_INLINE {
    const V x = power<POWER>(load<V>(e + j));
    if (kept != e) store(kept + j, x);
    return x;
  };
  return sum_in_chains<C>(count, raised);
}
template <class C>
double sum_of_powers(int power, const C* e, C* kept, int64_t count) {
  switch (power) {
    case 2: return sum_of_powers<2>(e, kept, count);
    case 3: return sum_of_powers<3>(e, kept, count);
    default: return sum_of_powers<4>(e, kept, count);
  }
}

// Exponentials of a tile of the student into es, its x into xs where KEEP_X, and their sum.
template <bool KEEP_X, class X, class Y, class C>
double student_exponentials(const Row<X, Y>& row, int64_t tile, const Affine<C> student, C* es, C* xs) {
  using V = Vec<C>;
  constexpr int64_t block = Io<X>::kBlock;
  constexpr C nothing = -std::numeric_limits<C>::infinity();
  V sum0 = {}, sum1 = {};
  row.pieces(tile, [&](const X* s, const Y*, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
    C *es_out = es + slot, *xs_out = xs + slot;
    V local0 = sum0, local1 = sum1;
    const Affine<C> as = student;
    for (int64_t b = 0; b < blocks; ++b, s += block, es_out += block, xs_out += block) {
      prefetch_ahead<block>(s);
      V s0, s1;
      load_block(s, lanes, nothing, s0, s1);
      const V x0 = as(s0), x1 = as(s1);
      const V e0 = exp2_fast<kExpDegree<X>>(clamp_exponent(x0)), e1 = exp2_fast<kExpDegree<X>>(clamp_exponent(x1));
      local0 += e0;
      local1 += e1;
      store(es_out, e0);
      store(es_out + kLanes<C>, e1);
      if (KEEP_X) {
        store(xs_out, x0);
        store(xs_out + kLanes<C>, x1);
      }
    }
    sum0 = local0;
    sum1 = local1;
  });
  return horizontal_sum<C>(sum0 + sum1);
}

// A tile without clamps and x; NaN when a logit was out of bounds. A block of what is pending is written for every
// block of the body.
template <class X, class Y, class Beside>
KDK_INLINE double student_exponentials_trusting(const Row<X, Y>& row, int64_t tile, const Affine<float>& as, float* es,
                                                Beside& beside) {
  using V = VecF;
  constexpr int64_t block = Io<X>::kBlock;
  const float scale = as.scale(), bias = as.bias(), nothing = as.nothing();
  V sum0 = {}, sum1 = {};
  Bounds bounds;
  row.pieces(tile, [&](const X* s, const Y*, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
    float* es_out = es + slot;
    V local0 = sum0, local1 = sum1;
    Bounds local_bounds = bounds;
    int64_t b = 0;
    if constexpr (Beside::kWrites && decltype(lanes)::kEdge) {
      // The last block of a body may be where the tail of the next row goes.
      if (slot > 0 && beside.done < beside.blocks) beside.write_block(es_out, es_out);
    }
    if constexpr (Beside::kWrites && !decltype(lanes)::kEdge) {
      // What is pending begins where the body does.
      const int64_t both = std::min(blocks, beside.blocks - beside.done);
      Beside local_beside = beside;
#pragma GCC unroll 2
      for (; b < both; ++b, s += block, es_out += block) {
        local_beside.write_block(es_out, es_out);
        prefetch_ahead<block>(s);
        V e[2];
        Io<X>::load2(s, e[0], e[1]);
        exp2_of_logits<kExpDegree<X>>(e, scale, bias, local_bounds);
        local0 += e[0];
        local1 += e[1];
        store(es_out, e[0]);
        store(es_out + kLanes<float>, e[1]);
      }
      beside = local_beside;
    }
    for (; !lanes.kEdge && b + 2 <= blocks; b += 2, s += 2 * block, es_out += 2 * block) {
      prefetch_ahead<2 * block>(s);
      for (int h = 0; h < 2; ++h) {
        V e[2];
        Io<X>::load2(s + h * block, e[0], e[1]);
        exp2_of_logits<kExpDegree<X>>(e, scale, bias, local_bounds);
        local0 += e[0];
        local1 += e[1];
        store(es_out + h * block, e[0]);
        store(es_out + h * block + kLanes<float>, e[1]);
      }
    }
    if (b < blocks) {
      V e[2];
      load_block(s, lanes, nothing, e[0], e[1]);
      exp2_of_logits<kExpDegree<X>>(e, scale, bias, local_bounds);
      local0 += e[0];
      local1 += e[1];
      for (int i = 0; i < 2; ++i) store(es_out + i * kLanes<float>, e[i]);
    }
    sum0 = local0;
    sum1 = local1;
    bounds = local_bounds;
  });
  return bounds.kept() ? double(horizontal_sum<float>(sum0 + sum1)) : std::numeric_limits<double>::quiet_NaN();
}

// In place of a Pending where there is none.
struct NothingPending {
  void finish() const {}
};
constexpr NothingPending kNothingPending;
template <int SUMS, class X, class Write>
KDK_INLINE void with_pending(const NothingPending&, Write write) {
  const Alone<X> alone;
  write(alone);
}

template <bool KEEP_X, class X, class Y, class C, class Waiting>
double student_exponentials(const Row<X, Y>& row, int64_t tile, const Affine<C>& as, C* es, C* xs, bool& trusting,
                            Waiting& pending) {
  if constexpr (kFused && std::is_same_v<C, float> && !KEEP_X) {
    if (trusting && as.trusts(as)) {
      double z;
      with_pending<kOneModel, X>(pending, [&](auto& beside) KDK_LAMBDA_INLINE {
        z = student_exponentials_trusting(row, tile, as, es, beside);
      });
      if (!std::isnan(z)) return z;
      trusting = false;
    }
  }
  pending.finish();
  return student_exponentials<KEEP_X>(row, tile, as, es, xs);
}

// The student's exponentials of the whole row, and their sum, from the reference of its first elements, or from its
// maximum where those were too far below it. What is pending is written meanwhile.
template <bool KEEP_X, class X, class Waiting = const NothingPending>
double sweep_student(const Row<X>& row, int64_t n, double scale, Affine<typename Io<X>::C>& as, typename Io<X>::C* es,
                     typename Io<X>::C* xs, Waiting& pending = kNothingPending) {
  double high = maximum(row.s, std::min(n, kSeedElements));
  for (bool from_maximum = false;; from_maximum = true) {
    as = affine<typename Io<X>::C>(scale, high);
    double z = 0;
    bool trusting = true;
    for (int64_t tile = 0; tile < row.tiles() && (from_maximum || !(z > kRedo)); ++tile)
      z += student_exponentials<KEEP_X>(row, tile, as, es, xs, trusting, pending);
    pending.finish();
    if (from_maximum || !(z > kRedo)) return z;
    high = maximum(row.s, n);
  }
}

// Index of the first element from begin to end that is a number, or -1.
template <class X>
int64_t first_index(const X* x, int64_t begin, int64_t end, double number) {
  using C = typename Io<X>::C;
  constexpr int64_t block = Io<X>::kBlock;
  int64_t j = begin;
  for (; j + block <= end; j += block) {
    Vec<C> a, b;
    Io<X>::load2(x + j, a, b);
    if (any((a == C(number)) | (b == C(number)))) break;
  }
  for (; j < end; ++j)
    if (double(to_compute(x[j])) == number) return j;
  return -1;
}

// Whether the first largest element of both models is the same one; it stands in these tiles.
template <class X, class Y>
bool same_maximum(const Row<X, Y>& row, int64_t tile_s, int64_t tile_t, int64_t n) {
  if (tile_s != tile_t) return false;
  const auto [begin, end] = tile_elements(row, tile_s, n);
  const double best_s = maximum(row.s + begin, end - begin), best_t = maximum(row.t + begin, end - begin);
  return first_index(row.s, begin, end, best_s) == first_index(row.t, begin, end, best_t);
}

// The sum of the logits of a row, less a reference each.
template <class X>
double sum_of_logits(const X* s, int64_t n, double reference = 0) {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  constexpr int64_t block = Io<X>::kBlock;
  const C centre = C(reference);
  double total = 0;
  int64_t j = 0;
  while (j + block <= n) {
    V sums[4] = {};
    const int64_t end = std::min(n - n % block, j + kTileElements);
    for (; j + 2 * block <= end; j += 2 * block) {
      for (int i = 0; i < 2; ++i) {
        V a, b;
        Io<X>::load2(s + j + i * block, a, b);
        sums[2 * i] += a - centre;
        sums[2 * i + 1] += b - centre;
      }
    }
    for (; j < end; j += block) {
      V a, b;
      Io<X>::load2(s + j, a, b);
      sums[0] += a - centre;
      sums[1] += b - centre;
    }
    total += horizontal_sum<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  for (; j < n; ++j) total += double(to_compute(s[j])) - double(centre);
  if (!std::isfinite(total)) {
    // In double the largest logits have a sum too.
    total = 0;
    for (j = 0; j < n; ++j) total += double(to_compute(s[j])) - double(centre);
  }
  return total + double(n) * (double(centre) - reference);
}

template <class C>
KDK_INLINE Pair<Pair<Vec<C>>> load4(const C* x) {
  using V = Vec<C>;
  return {{load<V>(x), load<V>(x + kLanes<C>)}, {load<V>(x + 2 * kLanes<C>), load<V>(x + 3 * kLanes<C>)}};
}
template <class C>
KDK_INLINE void store4(C* x, const Pair<Pair<Vec<C>>>& v) {
  store(x, v.a.a);
  store(x + kLanes<C>, v.a.b);
  store(x + 2 * kLanes<C>, v.b.a);
  store(x + 3 * kLanes<C>, v.b.b);
}

// Functors go four vectors abreast (see Pair). Not with AVX-512: its processors look far enough ahead by themselves,
// and one vector after the other needs no register spilled, 3 to 5 % faster.
constexpr bool kQuads = kVectorBytes < 64;

// Values and scores of a tile; the scores replace the teacher's exponentials. GUARDED: see divergences.h.
template <bool GUARDED, Part PART, class F, class X, class Y>
void value_tile(const Row<X, Y>& row, int64_t tile, const Affine<typename Io<X>::C>& student,
                const Affine<typename Io<X>::C>& teacher, double log2_zs, double log2_zt,
                Params<Vec<typename Io<X>::C>> parameters, const typename Io<X>::C* es, typename Io<X>::C* et,
                double& value_sum, double& score_sum) {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  constexpr int64_t block = Io<X>::kBlock;
  using Quad = Pair<Pair<V>>;
  constexpr bool paired = Paired<F>::value;
  const V ip = V{} + C(std::exp2(-log2_zt)), iq = V{} + C(std::exp2(-log2_zs));
  const V lzs = V{} + C(kLn2 * log2_zs), lzt = V{} + C(kLn2 * log2_zt), ln2 = V{} + C(kLn2);
  const C cs = C(kLn2 * double(student.c)), ct = C(kLn2 * double(teacher.c));
  const V rs = V{} + C(student.log_normalizer(log2_zs, cs)), rt = V{} + C(teacher.log_normalizer(log2_zt, ct));
  const auto quad = [](V x) { return Quad({x, x}, {x, x}); };
  V values = {}, scores = {};
  row.template pieces<PART>(
      tile, [&](const X* s, const Y* t, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
        const C* es_in = es + slot;
        C* et_io = et + slot;
        const Affine<C> as = student, at = teacher;
        const Params<Quad> params4{quad(parameters.x0), quad(parameters.x1)};
        V local_values = values, local_scores = scores;
        // Where the guard bounds the logits, one multiplication is exact enough.
        const auto log_p = [&](V x) KDK_LAMBDA_INLINE { return GUARDED ? x * ct - rt : at(x) * ln2 - lzt; };
        const auto log_q = [&](V x) KDK_LAMBDA_INLINE { return GUARDED ? x * cs - rs : as(x) * ln2 - lzs; };
        while (kQuads && !lanes.kEdge && blocks >= 2) {
          const Quad p = unfused(load4<C>(et_io) * quad(ip)), q = unfused(load4<C>(es_in) * quad(iq));
          Quad value, score;
          if constexpr (paired) {
            F::paired(params4, p, q, value, score);
          } else {
            V s0, s1, s2, s3, t0, t1, t2, t3;
            Io<X>::load2(s, s0, s1);
            Io<X>::load2(s + block, s2, s3);
            load2_as<X>(t, t0, t1);
            load2_as<X>(t + block, t2, t3);
            const Quad logp = GUARDED ? Quad({t0, t1}, {t2, t3}) * quad(V{} + ct) - quad(rt)
                                      : Quad({at(t0), at(t1)}, {at(t2), at(t3)}) * quad(ln2) - quad(lzt);
            const Quad logq = GUARDED ? Quad({s0, s1}, {s2, s3}) * quad(V{} + cs) - quad(rs)
                                      : Quad({as(s0), as(s1)}, {as(s2), as(s3)}) * quad(ln2) - quad(lzs);
            F::template eval<GUARDED>(params4, p, logp, q, logq, value, score);
          }
          local_values += horizontal(horizontal(value));
          local_scores += horizontal(horizontal(score));
          store4<C>(et_io, score);
          blocks -= 2, s += 2 * block, t += 2 * block, es_in += 2 * block, et_io += 2 * block;
        }
        for (; blocks > 0; --blocks, s += block, t += block, es_in += block, et_io += block) {
          V value0, score0, value1, score1;
          const V p0 = unfused(load<V>(et_io) * ip), p1 = unfused(load<V>(et_io + kLanes<C>) * ip);
          const V q0 = unfused(load<V>(es_in) * iq), q1 = unfused(load<V>(es_in + kLanes<C>) * iq);
          if constexpr (paired) {
            F::paired(parameters, p0, q0, value0, score0);
            F::paired(parameters, p1, q1, value1, score1);
          } else {
            constexpr C nothing = -std::numeric_limits<C>::infinity();
            V s0, s1, t0, t1;
            load_block(s, lanes, nothing, s0, s1);
            load_block(t, lanes, nothing, t0, t1);
            const V logp0 = log_p(t0), logp1 = log_p(t1), logq0 = log_q(s0), logq1 = log_q(s1);
            F::template eval<GUARDED>(parameters, p0, logp0, q0, logq0, value0, score0);
            F::template eval<GUARDED>(parameters, p1, logp1, q1, logq1, value1, score1);
          }
          local_values += value0 + value1;
          local_scores += score0 + score1;
          store(et_io, score0);
          store(et_io + kLanes<C>, score1);
        }
        values = local_values;
        scores = local_scores;
      });
  value_sum += horizontal_sum<C>(Paired<F>::less_score ? values + scores : values);
  score_sum += horizontal_sum<C>(scores);
}

template <class C>
double accepted(const C* es, const C* et, int64_t count, double iq, double ip) {
  const C ratio = C(ip / iq);
  double total = 0;
  for (int64_t j = 0; j < count;) {
    Vec<C> sum = {};
    for (const int64_t end = std::min(count, j + kTileElements); j < end; j += kLanes<C>)
      sum += min_of(load<Vec<C>>(es + j), load<Vec<C>>(et + j) * ratio);
    total += horizontal_sum<C>(sum);
  }
  return total * iq;
}

template <bool LOGS, int CE, bool STREAM, bool ACCEPTED, bool TWO, class X, class Y>
void write_gradient(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& k, X* out) {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  constexpr int64_t block = Io<X>::kBlock;
  const GradientBlock<LOGS, CE, ACCEPTED, TWO, X> gradient(k);
  // Backwards: of a row whose exponentials do not all fit the cache, the last are still there.
  for (int64_t tile = row.tiles() - 1; tile >= 0; --tile) {
    V accepted = {};
    row.pieces(tile,
               [&](const X* s, const Y* t, int64_t blocks, int64_t slot, int64_t first, auto lanes) KDK_LAMBDA_INLINE {
                 BlockWriter<STREAM, X, decltype(lanes)> writer(out, first, blocks, lanes);
                 V local_accepted = accepted;
                 const auto local_gradient = gradient;
                 const C *es_in = k.es + slot, *et_in = k.et + slot, *e1_in = k.e1 + slot;
                 for (int64_t i = 0; i < blocks; ++i, es_in += block, et_in += block, e1_in += block) {
                   V g0, g1;
                   local_gradient(es_in, et_in, e1_in, s + i * block, t + i * block, local_accepted, g0, g1);
                   writer.put(i, g0, g1);
                 }
                 accepted = local_accepted;
               });
    if (ACCEPTED) *k.accepted += horizontal_sum<C>(accepted);
  }
}

// Whether rows of this type can be written with the next ones: their exponentials are taken without clamps.
template <class X>
constexpr bool kDefers = kFused && std::is_same_v<typename Io<X>::C, float>;

// Asks for the cache lines of the edges of a row that is streamed: they are stored, and what is stored after them waits
// until the lines are there.
template <class X, class Y>
KDK_INLINE void prefetch_edges(const Row<X, Y>& row, const X* out) {
  if (row.head > 0) __builtin_prefetch(out, 1);
  if (row.tail > 0 && out != nullptr) __builtin_prefetch(out + row.n - 1, 1);
}

// The edges of a row whose body is pending; out is where its gradient begins.
template <int CE, bool ACCEPTED, bool TWO, class X, class Y>
KDK_INLINE void add_edges(const Row<X, Y>& row, X* out, Pending<X>& pending) {
  using C = typename Io<X>::C;
  const GradientTerms<C>& k = pending.terms;
  const GradientBlock<false, CE, ACCEPTED, TWO, X> gradient(k);
  Vec<C> accepted = {};
  const auto add = [&](const X* s, const Y* t, int64_t, int64_t slot, int64_t first, auto lanes) KDK_LAMBDA_INLINE {
    if constexpr (decltype(lanes)::kEdge) {
      Vec<C> g0, g1;
      gradient(k.es + slot, k.et + slot, k.e1 + slot, s, t, accepted, g0, g1);
      auto& edge = pending.edges[pending.num_edges++];
      Io<X>::template store2<false>(edge.block, g0, g1);
      edge.begin = lanes.begin, edge.end = lanes.end;
      edge.to = out + (first + lanes.begin);
    }
  };
  row.template pieces<kEdges>(0, add);
  if (row.tiles() > 1) row.template pieces<kEdges>(row.tiles() - 1, add);
  if (ACCEPTED) pending.accepted += double(horizontal_sum<C>(accepted));
}
template <class X, class Y>
void add_edges(const Row<X, Y>& row, X* out, Pending<X>& pending) {
  if (!pending.terms.two_models) {
    return pending.terms.ce == kCeOwn ? add_edges<kCeOwn, false, false>(row, out, pending)
                                      : add_edges<kCeNone, false, false>(row, out, pending);
  }
  if (pending.terms.accepted != nullptr) {
    return pending.terms.ce == kCeOwn ? add_edges<kCeOwn, true, true>(row, out, pending)
                                      : add_edges<kCeNone, true, true>(row, out, pending);
  }
  switch (pending.terms.ce) {
    case kCeSquare: return add_edges<kCeSquare, false, true>(row, out, pending);
    case kCeCube: return add_edges<kCeCube, false, true>(row, out, pending);
    case kCeFourth: return add_edges<kCeFourth, false, true>(row, out, pending);
    case kCeOwn: return add_edges<kCeOwn, false, true>(row, out, pending);
    default: return add_edges<kCeNone, false, true>(row, out, pending);
  }
}

// Leaves the gradient of a row to be written with the next one. Where terms want the acceptance rate it goes to
// acceptance, times factor.
template <class X, class Y>
void postpone(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& terms, X* out, bool streamed,
              Pending<X>& pending, typename Io<X>::C* acceptance = nullptr, double factor = 0) {
  pending.terms = terms;
  pending.begin(row, out, streamed);
  if (terms.accepted != nullptr) pending.accept(acceptance, factor);
  add_edges(row, out, pending);
}

template <bool LOGS, int CE, bool ACCEPTED, bool TWO, class X, class Y>
void write_gradient(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& k, X* out, bool streamed) {
  return streamed ? write_gradient<LOGS, CE, true, ACCEPTED, TWO>(row, k, out)
                  : write_gradient<LOGS, CE, false, ACCEPTED, TWO>(row, k, out);
}
template <bool LOGS, int CE, class X, class Y>
void write_gradient(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& k, X* out, bool streamed) {
  return k.accepted != nullptr ? write_gradient<LOGS, CE, true, true>(row, k, out, streamed)
                               : write_gradient<LOGS, CE, false, true>(row, k, out, streamed);
}

// With logarithms powers come as kCeOwn, and as nothing else of one model.
template <class X, class Y>
void write_gradient(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& k, X* out, bool streamed) {
  if (!k.two_models) {
    return k.ce == kCeOwn ? write_gradient<false, kCeOwn, false, false>(row, k, out, streamed)
                          : write_gradient<false, kCeNone, false, false>(row, k, out, streamed);
  }
  if (k.logs) {
    return k.ce == kCeOwn ? write_gradient<true, kCeOwn>(row, k, out, streamed)
                          : write_gradient<true, kCeNone>(row, k, out, streamed);
  }
  switch (k.ce) {
    case kCeSquare: return write_gradient<false, kCeSquare>(row, k, out, streamed);
    case kCeCube: return write_gradient<false, kCeCube>(row, k, out, streamed);
    case kCeFourth: return write_gradient<false, kCeFourth>(row, k, out, streamed);
    case kCeOwn: return write_gradient<false, kCeOwn>(row, k, out, streamed);
    default: return write_gradient<false, kCeNone>(row, k, out, streamed);
  }
}

// Makes g the gradient of the element at slot, by what stands for it in the scratch; false, and nothing done, where
// that leaves the range. Stored when the row is written, an element brings a line back that was just streamed to
// memory, and all that are stored after it wait for that.
template <class C>
bool set_gradient(const GradientTerms<C>& k, int64_t slot, double g) {
  const double x = g - k.c0;
  const auto within = [&](double factor) { return std::abs(factor) > 1e-30 && std::abs(x) < 1e30 * std::abs(factor); };
  const bool by_teacher = k.two_models && within(k.b);
  if (k.logs || k.accepted != nullptr || !(by_teacher || (power_of(k.ce) == 1 && within(k.a)))) return false;
  k.es[slot] = by_teacher ? C(0) : C(x / k.a);
  if (k.two_models) k.et[slot] = by_teacher ? C(-x / k.b) : C(0);
  if (k.ce == kCeOwn) k.e1[slot] = C(0);
  return true;
}

// The same formula for element j alone, less the label's part of cross entropy.
template <class X, class Y>
double gradient_at(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& k, int64_t j, double xs, double xt) {
  const int64_t slot = row.slot(j);
  const double es = k.es[slot];
  double g = k.c0 + es * k.a;
  if (k.two_models) g -= double(k.et[slot]) * k.b;
  if (k.logs && es != 0) g += es * (k.ks * (xs - xt) + k.kst * xt);
  if (power_of(k.ce) > 1) g += std::pow(es, power_of(k.ce)) * k.c1;
  if (k.ce == kCeOwn) g += double(k.e1[slot]) * k.c1;
  return g;
}

// How many elements stand before the first aligned one, so that whole blocks, and at best whole cache lines, can be
// streamed.
template <class X>
int64_t head_elements(const X* out, bool streamed) {
  if (!streamed) return 0;
  constexpr int64_t alignment = std::min<int64_t>(kLineBytes, Io<X>::kBlock * int64_t(sizeof(X)));
  const int64_t over = int64_t(reinterpret_cast<uintptr_t>(out) % alignment);
  return over == 0 ? 0 : (alignment - over) / int64_t(sizeof(X));
}

// Growing buffers of one thread, kept between calls, each at a place of its own within a page: what a row costs does
// not depend on where the C library puts them.
constexpr size_t kPageBytes = 4096;
template <class C>
struct Scratch {
  std::vector<C> storage[8];
  C* get(int which, int64_t elements) {
    std::vector<C>& buffer = storage[which];
    const size_t needed = size_t(elements) + 2 * kPageBytes / sizeof(C);
    if (buffer.size() < needed) buffer.resize(needed);
    const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data());
    return reinterpret_cast<C*>((address + kPageBytes - 1) / kPageBytes * kPageBytes) +
           uintptr_t(which) * kPageBytes / 8 / sizeof(C);
  }
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
};
enum ScratchUse { kEs, kEt, kE1, kTerms, kStudentRow, kTeacherRow, kOtherRow, kGradientRow };

template <class X, class Y, class C = typename Io<X>::C>
using ValueTile = void (*)(const Row<X, Y>&, int64_t, const Affine<C>&, const Affine<C>&, double, double,
                           Params<Vec<C>>, const C*, C*, double&, double&);

// A functor's value_tile for one type of logits each: for any row, and for one whose bounds were watched.
template <class X, class Y = X>
struct ValueTiles {
  ValueTile<X, Y> any = nullptr, guarded = nullptr;
  // See Paired.
  double (*limit)(double) = nullptr;
  double (*as_forward_kl)(double, double) = nullptr;
};
template <class F>
double limit_of(double parameter) {
  if constexpr (Paired<F>::value) return F::limit(parameter);
  return HUGE_VAL;
}
template <class F>
double as_forward_kl(double value, double parameter) {
  if constexpr (Paired<F>::value) return F::as_forward_kl(value, parameter);
  return value;
}
template <class F, class X, class Y>
void guarded_value_tile(const Row<X, Y>& row, int64_t tile, const Affine<float>& student, const Affine<float>& teacher,
                        double log2_zs, double log2_zt, Params<VecF> parameters, const float* es, float* et,
                        double& value_sum, double& score_sum) {
  value_tile<true, kBody, F>(row, tile, student, teacher, log2_zs, log2_zt, parameters, es, et, value_sum, score_sum);
  // The padding of the edges is -inf.
  if (row.padded(tile))
    value_tile<false, kEdges, F>(row, tile, student, teacher, log2_zs, log2_zt, parameters, es, et, value_sum,
                                 score_sum);
}
template <class F, class X, class Y = X>
constexpr ValueTiles<X, Y> value_tiles() {
  if constexpr (kFused && Io<X>::kCoarse && !Paired<F>::value) {
    return {value_tile<false, kWhole, F, X, Y>, guarded_value_tile<F, X, Y>, limit_of<F>, as_forward_kl<F>};
  } else {
    return {value_tile<false, kWhole, F, X, Y>, value_tile<false, kWhole, F, X, Y>, limit_of<F>, as_forward_kl<F>};
  }
}

// An entry of divergence_table.h before it is known what is made of it: the functor, or the coefficients.
template <class F>
struct General {
  const char* name;
};
struct OfLogs {
  const char* name;
  Linear coefficients;
};
template <class F>
constexpr General<F> general(const char* name) {
  return {name};
}
constexpr OfLogs linear(const char* name, Linear c) { return {name, c}; }

struct Divergence {
  const char* name;
  bool linear;
  Linear coefficients;
  template <class F>
  constexpr Divergence(General<F> entry) : name(entry.name), linear(false), coefficients{} {}
  constexpr Divergence(OfLogs entry) : name(entry.name), linear(true), coefficients(entry.coefficients) {}
};

#include "kdkernels/divergence_table.h"

// The same table for the value_tiles of two types of logits, of which only the files of the student's type know.
template <class X, class Y>
struct ValueTable {
  struct Divergence : ValueTiles<X, Y> {
    template <class F>
    constexpr Divergence(General<F>) : ValueTiles<X, Y>(value_tiles<F, X, Y>()) {}
    constexpr Divergence(OfLogs) : ValueTiles<X, Y>{} {}
  };
#include "kdkernels/divergence_table.h"
};

// Whether the gradient has terms in q log p or q log q.
inline bool has_logs(const Divergence& divergence) {
  return divergence.linear && (divergence.coefficients.c_qp != 0 || divergence.coefficients.c_qq != 0);
}

inline CeSource ce_source(double student_scale) {
  for (const CeSource ce : {kCeSame, kCeSquare, kCeCube, kCeFourth}) {
    if (student_scale == kLog2e / power_of(ce)) return ce;
  }
  return kCeOwn;
}

inline Sums sums_for(const DenseArgs& args) {
  const Divergence& divergence = kDivergences[args.divergence];
  const Linear& k = divergence.coefficients;
  const bool entropies = k.c_pp + k.c_pq != 0 || k.c_qp + k.c_qq != 0;
  if (args.stats != nullptr) return divergence.linear && k.c_qp != 0 && !entropies ? kAllKept : kAll;
  if (!divergence.linear) return kNoSums;
  if (k.c_qp == 0 && k.c_qq == 0) return entropies ? kSoft : kForward;
  if (entropies) return kAll;
  return k.c_pq == 0 ? kReverse : kBoth;
}

// What one row of the objective needs, resolved for the row.
struct RowNumbers {
  double weight;                        // omega
  double student_scale, teacher_scale;  // log2(e) / T
  double kd, tau, ce, z;                // weights of the terms, before omega
  double param0;
};

// Losses and statistics of a row, before omega.
struct RowResult {
  double loss = 0;
  double stats[kStats] = {};
};

// Maxima of the first elements of a row, which give it its references.
struct Seeds {
  double s, t;
};
template <class X>
KDK_INLINE double maximum_of_seed(const X* x) {
  using C = typename Io<X>::C;
  Vec<C> high, next, a, b;
  Io<X>::load2(x, high, next);
  for (int64_t j = Io<X>::kBlock; j < kSeedElements; j += Io<X>::kBlock) {
    Io<X>::load2(x + j, a, b);
    high = max_keep_nan(high, a);
    next = max_keep_nan(next, b);
  }
  return double(horizontal_max<C>(max_keep_nan(high, next)));
}
template <class X, class Y>
KDK_INLINE Seeds seeds_of(const X* s, const Y* t, int64_t n) {
  if (n < kSeedElements) return {maximum(s, n), maximum(t, n)};
  return {maximum_of_seed(s), maximum_of_seed(t)};
}

// Seeds of a row, found while the processor waited for the sums of the row before it; and the row whose seeds are to be
// found next. Null where there is none.
template <class X, class Y>
struct SeedsAhead {
  const X *s = nullptr, *next_s = nullptr;
  const Y *t = nullptr, *next_t = nullptr;
  Seeds seeds{};

  Seeds of(const X* student, const Y* teacher, int64_t n) const {
    return s == student && t == teacher ? seeds : seeds_of(student, teacher, n);
  }
  KDK_INLINE void find(int64_t n) {
    s = next_s, t = next_t;
    if (s != nullptr) seeds = seeds_of(s, t, n);
  }
};

// log_z less the smoothed logit of the label, both relative to a reference: the logarithm of a sum of exponentials and
// a logit that share a large part would lose the difference.
template <class X>
double cross_entropy_of(const X* s, int64_t n, int64_t label, double smoothing, double reference, double log_z) {
  const bool inside = label >= 0 && label < n;
  const double picked = inside ? double(to_compute(s[label])) : std::numeric_limits<double>::quiet_NaN();
  // Smoothing 1 gives the label no part, and smoothing 0 none to the mean: 0 * inf must not make a NaN.
  double cross_entropy = log_z;
  if (smoothing != 1) cross_entropy -= (1 - smoothing) * (picked - reference);
  if (smoothing != 0) cross_entropy -= smoothing * sum_of_logits(s, n, reference) / double(n);
  return cross_entropy;
}

// The rows of one call, one after the other.
template <class X, class Y = X>
struct ObjectiveRows {
  using C = typename Io<X>::C;
  const DenseArgs& args;
  // Whether gradients go around the caches, and whether one may be written with the next row or by finish(): its memory
  // must be there till then.
  const bool streamed, deferred;
  // To the gradient's cache lines: across them, rows of 1,000 in place take 15 % longer.
  const bool aligned = streamed || args.columns * int64_t(sizeof(X)) >= kStreamRowBytes;
  int64_t n = args.columns;
  const Divergence& divergence = kDivergences[args.divergence];
  const Sums sums_needed = sums_for(args);
  Scratch<C>& scratch = Scratch<C>::mine();
  // With a block for either edge; what is pending is read where the next row goes, so the body begins in one place.
  C* const es_of_body = scratch.get(kEs, n + 2 * Row<X>::kBlock) + Row<X>::kBlock;
  C* const et_of_body = scratch.get(kEt, n + 2 * Row<X>::kBlock) + Row<X>::kBlock;
  bool masking = false;  // set where a row needs it
  SeedsAhead<X, Y> ahead = {};
  Pending<X> pending = {};

  ObjectiveRows(const DenseArgs& arguments, bool streams, bool defers)
      : args(arguments), streamed(streams), deferred(defers) {}

  // Student and teacher of one row; the gradient goes to out (null: none), the acceptance rate to where it is known.
  RowResult add(const RowNumbers& num, const X* s, const Y* t, int64_t label, X* out, C* acceptance);
  RowResult add_exactly(const RowNumbers& num, const X* s, const Y* t, int64_t label, X* out);
  void finish() { pending.finish(); }
};

// See exact_row.h.
RowResult exact_row(const DenseArgs& args, const RowNumbers& num, double* s, double* t, double top_logit, int64_t label,
                    double* g);

template <class X, class Y>
__attribute__((noinline)) RowResult ObjectiveRows<X, Y>::add_exactly(const RowNumbers& num, const X* s, const Y* t,
                                                                     int64_t label, X* out) {
  static thread_local std::vector<double> room;
  const size_t width = size_t(n + kLanes<double>);
  room.resize(3 * width);
  double *const ds = room.data(), *const dt = ds + width, *const g = out == nullptr ? nullptr : dt + width;
  const double high_s = maximum(s, n), high_t = maximum(t, n);
  for (int64_t j = 0; j < n; ++j) ds[j] = double(to_compute(s[j])) - high_s;
  for (int64_t j = 0; j < n; ++j) dt[j] = double(to_compute(t[j])) - high_t;
  const RowResult result = exact_row(args, num, ds, dt, high_s, label, g);
  for (int64_t j = 0; g != nullptr && j < n; ++j) from_compute(C(g[j]), out + j);
  return result;
}

// The largest logits of the parts of a row, so that those next to the largest of all need be looked for in few of them.
template <class X>
struct Peaks {
  static constexpr int64_t kParts = 64;
  const X* x;
  int64_t n, part;
  int parts = 0, best = 0;
  double of_part[kParts], highest = -std::numeric_limits<double>::infinity();

  Peaks(const X* logits, int64_t length)
      : x(logits), n(length), part(std::max<int64_t>(512, (length + kParts - 1) / kParts)) {
    for (int64_t begin = 0; begin < n; begin += part) {
      const double high = maximum(x + begin, std::min(part, n - begin));
      of_part[parts] = high;
      if (high > highest) highest = high, best = parts;
      ++parts;
    }
  }
};

// Whether a few tokens, the largest with a share of top, have most of the student's mass, and the models agree on them
// and differ in the others: next to what those few carry their differences are rounded away. distance: a forward KL.
// Where each token differs by as much as any, the mean square here is twice the distance. A distance that is less than
// the error of the exponentials may be anything below it.
template <class X, class Y, class C>
__attribute__((noinline)) bool agree(const Row<X, Y>& row, const Peaks<X>& peaks, const Affine<C>& as,
                                     const Affine<C>& at, double log2_zs, double log2_zt, double top, double distance) {
  constexpr int64_t block = Io<X>::kBlock;
  constexpr double error = kExpDegree<X> < 5 ? 0x1p-18 : 0x1p-22;
  const double lowest = peaks.highest - 4 / double(as.c), bound = 0.125 * std::max(distance, error);
  double squares = 0, weights = 0, mass = 0;
  const auto see = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const double s = double(to_compute(row.s[j]));
      if (!(s >= lowest)) continue;
      const double log2_q = as.scalar(s) - log2_zs, log2_p = at.scalar(double(to_compute(row.t[j]))) - log2_zt;
      const double q = std::exp2(log2_q), d = kLn2 * (log2_p - log2_q);
      squares += q * q * d * d, weights += q * q, mass += q;
    }
  };
  // Models that do not agree are told by the largest of all already, mostly: the weights are at most top.
  for (int i = 0; i < peaks.parts && squares < bound * top; ++i) {
    const int k = i == 0 ? peaks.best : i <= peaks.best ? i - 1 : i;
    if (!(peaks.of_part[k] >= lowest)) continue;
    int64_t j = k * peaks.part;
    const int64_t end = std::min(row.n, j + peaks.part);
    for (; j + block <= end; j += block) {
      Vec<C> a, b;
      Io<X>::load2(row.s + j, a, b);
      if (any((a >= C(lowest)) | (b >= C(lowest)))) see(j, j + block);
    }
    see(j, end);
  }
  return mass > 0.5 && squares < bound * weights;
}

template <class X, class Y>
RowResult ObjectiveRows<X, Y>::add(const RowNumbers& num, const X* s, const Y* t, int64_t label, X* out,
                                   C* acceptance) {
  Row<X, Y> row(s, t, n, head_elements(out, aligned));
  prefetch_edges(row, out);
  const bool whole_row = out != nullptr || !divergence.linear || args.stats != nullptr;
  const int64_t head_slots = row.head > 0 ? Row<X>::kBlock : 0;
  C *es = es_of_body - head_slots, *et = et_of_body - head_slots;

  const bool wants_ce = num.ce != 0 || num.z != 0 || args.stats != nullptr;
  CeSource ce = kCeNone;
  if (wants_ce) ce = ce_source(num.student_scale);
  const int power = power_of(ce);
  const bool keeps_powers = power > 1 && has_logs(divergence) && out != nullptr;
  C* e1 = es;
  const auto another = [&](ScratchUse use) {
    return scratch.get(use, n + 2 * Row<X>::kBlock) + Row<X>::kBlock - head_slots;
  };
  if (ce == kCeOwn || keeps_powers) e1 = another(kE1);
  C* const kept = sums_needed & kKept ? another(kTerms) : es;

  auto [max_s, max_t] = ahead.of(s, t, n);
  Affine<C> as, at, a1{};
  RowSums sums;
  double z1 = 0;
  const double limit = power == 1 ? kRedo : std::pow(kRedo, 1.0 / power);
  bool trusting = false;
  for (bool from_maximum = false;;) {
    as = affine<C>(num.student_scale, max_s);
    at = affine<C>(num.teacher_scale, max_t);
    if (ce == kCeOwn) a1 = affine<C>(kLog2e, max_s);
    sums = RowSums();
    z1 = 0;
    bool redo = false, own_trusting = true;
    trusting = true;
    for (int64_t tile = 0; tile < row.tiles() && !redo; ++tile) {
      // Without a gradient nothing reads the exponentials again: every tile lands on the first one's place.
      C* tile_es = whole_row ? es : es - tile * kTileElements;
      C* tile_et = whole_row ? et : et - tile * kTileElements;
      C* tile_e1 = whole_row ? e1 : e1 - tile * kTileElements;
      C* tile_kept = whole_row ? kept : kept - tile * kTileElements;
      const auto sweep = [&](auto made) {
        sweep_tile<made>(row, tile, as, at, tile_es, tile_et, tile_kept, trusting, masking, sums, pending);
      };
      switch (sums_needed) {
        case kNoSums: sweep(std::integral_constant<int, kNoSums>()); break;
        case kForward: sweep(std::integral_constant<int, kForward>()); break;
        case kReverse: sweep(std::integral_constant<int, kReverse>()); break;
        case kBoth: sweep(std::integral_constant<int, kBoth>()); break;
        case kSoft: sweep(std::integral_constant<int, kSoft>()); break;
        case kAllKept: sweep(std::integral_constant<int, kAllKept>()); break;
        default: sweep(std::integral_constant<int, kAll>()); break;
      }
      if (power > 1) {
        const auto [first, last] = tile_slots(row, tile);
        z1 += sum_of_powers(power, tile_es + first, keeps_powers ? e1 + first : tile_es + first, last - first);
      }
      if (ce == kCeOwn) {
        z1 += student_exponentials<false>(row, tile, a1, tile_e1, tile_e1, own_trusting, kNothingPending);
      }
      redo = !from_maximum && (sums.zs > limit || sums.zt > limit || z1 > kRedo);
    }
    const bool broken = std::isnan(sums.forward) || std::isnan(sums.reverse);
    if (!redo && broken && !masking && !std::isnan(sums.zs) && !std::isnan(sums.zt)) {
      masking = true;
      redo = true;
    } else if (redo) {
      from_maximum = true;
      max_s = maximum(s, n);
      max_t = maximum(t, n);
    }
    // What is pending goes with the first sweep, from its first block on.
    pending.finish();
    if (!redo) break;
  }
  if (ce == kCeSame) z1 = sums.zs;
  ahead.find(n);

  const double log2_zs = std::log2(sums.zs), log2_zt = std::log2(sums.zt);
  const double iq = 1 / sums.zs, ip = 1 / sums.zt;
  // In nats: the two KLs and the sums p logp, q logq.
  const double kl_forward = kLn2 * (sums.forward * ip - log2_zt + log2_zs);
  const double kl_reverse = kLn2 * (sums.reverse * iq - log2_zs + log2_zt);
  const double p_logp = kLn2 * (sums.teacher * ip - log2_zt), q_logq = kLn2 * (sums.student * iq - log2_zs);
  // Of one model and itself nothing is left but the rounding, unless the entropy is asked for as well.
  bool equal = false;
  if constexpr (std::is_same_v<X, Y>) {
    const Linear& k = divergence.coefficients;
    equal = num.kd != 0 && args.stats == nullptr && num.student_scale == num.teacher_scale && std::isfinite(sums.zs) &&
            sums.zs > 0 && std::memcmp(s, t, size_t(n) * sizeof(X)) == 0 &&
            (!divergence.linear || (k.c_pp + k.c_pq == 0 && k.c_qp + k.c_qq == 0));
  }

  RowResult result;
  // A general divergence overwrites the teacher's exponentials before the gradient is written.
  const bool with_gradient = out != nullptr && divergence.linear && num.kd != 0;
  if (args.stats != nullptr) {
    result.stats[3] = at_least_0(kl_forward);
    result.stats[4] = at_least_0(kl_reverse);
    result.stats[5] = at_least_0(-p_logp);
    result.stats[6] = at_least_0(-q_logq);
    result.stats[7] = same_maximum(row, sums.best_tile_s, sums.best_tile_t, n);
    if (!with_gradient) result.stats[8] = accepted(es, et, row.slots(), iq, ip);
  }

  const double f = num.weight * num.kd * num.tau * num.student_scale * kLn2;  // omega kd tau / T
  GradientTerms<C> terms;
  terms.as = as;
  terms.at = at;
  terms.es = es;
  terms.et = et;
  terms.e1 = e1;
  double d = 0, distance = sums_needed & kForward ? kl_forward : kl_reverse;
  bool apart = false;
  if (divergence.linear) {
    const Linear& k = divergence.coefficients;
    // Terms whose coefficient is 0 may be infinite.
    if (k.c_pp + k.c_pq != 0) d += (k.c_pp + k.c_pq) * p_logp;
    if (k.c_pq != 0) d -= k.c_pq * kl_forward;
    double over_q = 0;  // sum q (c_qp logp + c_qq logq)
    if (k.c_qp + k.c_qq != 0) over_q += (k.c_qp + k.c_qq) * q_logq;
    if (k.c_qp != 0) over_q -= k.c_qp * kl_reverse;
    d += over_q;
    const double score_sum = k.c_pq + k.c_qq + over_q;
    terms.b = -f * ip * k.c_pq;
    terms.a = f * iq * (k.c_qq - score_sum);
    terms.logs = has_logs(divergence);
    if (terms.logs) {
      terms.a -= f * iq * kLn2 * (k.c_qp * log2_zt + k.c_qq * log2_zs);
      terms.ks = f * iq * kLn2 * k.c_qq;
      terms.kst = f * iq * kLn2 * (k.c_qp + k.c_qq);
    }
  } else {
    // A NaN logit has spoilt the whole row, and a row of -inf has no distribution; functors see neither.
    double score_sum = !(sums.zs > 0 && sums.zt > 0) ? std::numeric_limits<double>::quiet_NaN() : 0;
    d = score_sum;
    const Params<Vec<C>> params{Vec<C>{} + C(num.param0), Vec<C>{} + C(args.param1)};
    const auto& tiles = ValueTable<X, Y>::kDivergences[args.divergence];
    const auto value_of_tile = trusting && as.trusts(at) ? tiles.guarded : tiles.any;
    const bool wanted = (num.kd != 0 || args.stats != nullptr) && !equal;
    for (int64_t tile = 0; tile < row.tiles() && wanted && !std::isnan(score_sum); ++tile)
      value_of_tile(row, tile, as, at, log2_zs, log2_zt, params, es, et, d, score_sum);
    apart = score_sum > (1 - kNearlyEqual) * tiles.limit(num.param0);
    distance = tiles.as_forward_kl(d, num.param0);
    terms.b = -f;
    terms.a = -f * iq * score_sum;
  }
  d = equal ? 0 : at_least_0(d);
  if (num.kd != 0 && sums.zs > 0 && sums.zt > 0 && !equal) {
    const Linear& k = divergence.coefficients;
    const bool near = (divergence.linear ? distance : d) < kNearlyEqual;
    const bool may_agree = near || (k.c_pq != 0 && k.c_qp != 0 && distance < kNearForBoth);
    // Of forward KL's gradient the teacher's part stays. Nothing was added up of most there.
    const bool vanishes = sums.most >= (1 - kSure) * sums.zs;
    bool exactly = !std::isfinite(d) || apart;
    if (!exactly && (may_agree || vanishes)) {
      const Peaks<X> peaks(s, n);
      const double top = std::exp2(as.scalar(peaks.highest));
      exactly = (near && !kFused) || sums.zs - top < (near ? kFairlySure : kSure) * sums.zs;
      if (!exactly && may_agree && top > kTop * sums.zs) {
        exactly = distance < kAlike || agree(row, peaks, as, at, log2_zs, log2_zt, top * iq, distance);
      }
    }
    if (exactly && std::isfinite(sums.zs) && std::isfinite(sums.zt)) return add_exactly(num, s, t, label, out);
  }
  if (num.kd != 0) result.loss = num.kd * num.tau * d;
  if (num.kd == 0 || num.weight == 0 || equal) {
    terms.a = terms.b = terms.ks = terms.kst = 0;
    terms.logs = false;
  }
  // Left out: 0 times what a NaN of the teacher, or an infinite score, made of et would still be NaN.
  if (num.kd == 0 && out != nullptr && !(divergence.linear && std::isfinite(sums.zt)))
    std::fill(et, et + row.slots(), C(0));

  if (wants_ce) {
    const Affine<C>& base = ce == kCeOwn ? a1 : as;
    const double log_z = kLn2 * std::log2(z1), reference = base.logit(), lse = reference + log_z;
    double cross_entropy = 0;
    if (num.ce != 0) {
      cross_entropy = cross_entropy_of(s, n, label, args.label_smoothing, reference, log_z);
      result.loss += num.ce * cross_entropy;
      terms.c0 = -num.weight * num.ce * args.label_smoothing / double(n);
    }
    if (num.z != 0) result.loss += num.z * lse * lse;
    const double c1 = num.weight * (num.ce + (num.z != 0 ? 2 * num.z * lse : 0)) / z1;
    if (num.ce == 0 && num.z == 0) {
      // For the statistics alone.
    } else if (ce == kCeSame) {
      terms.a += c1;
    } else if (c1 != 0) {
      terms.ce = keeps_powers ? kCeOwn : ce;
      terms.c1 = c1;
    }
    result.stats[1] = cross_entropy;
    result.stats[2] = lse;
  }
  result.stats[0] = d;

  // es (xs - xt) was kept, but for scale and references: in the place of et, or where cross entropy has no part of its
  // own.
  const bool in_et = sums_needed == kReverse, in_kept = (sums_needed & kKept) != 0 && terms.ce == kCeNone;
  if (kFused && std::is_same_v<C, float> && terms.logs && (in_et || in_kept) && trusting && as.trusts(at)) {
    terms.a -= terms.ks * (as.reference() - at.reference());
    if (in_et) {
      terms.b = terms.ks * double(as.c);
    } else {
      terms.ce = kCeOwn;
      terms.e1 = kept;
      terms.c1 = -terms.ks * double(as.c);
    }
    terms.ks = 0;
    terms.logs = false;
  }

  if (out != nullptr) {
    const bool has_label = num.ce != 0 && label >= 0 && label < n;
    // Read before the gradient may overwrite the student.
    const double xs = has_label && terms.logs ? as.scalar(to_compute(s[label])) : 0;
    const double xt = has_label && terms.logs ? at.scalar(to_compute(t[label])) : 0;
    double accepted_sum = 0;
    if (args.stats != nullptr && with_gradient) {
      terms.accepted = &accepted_sum;
      terms.ratio = ip / iq;
    }
    double at_label = 0;
    if (has_label) at_label = gradient_at(row, terms, label, xs, xt) - num.weight * num.ce * (1 - args.label_smoothing);
    const bool stores_label = has_label && !(streamed && set_gradient(terms, row.slot(label), at_label));
    if (deferred && beside_sweep(sums_needed, terms)) {
      postpone(row, terms, out, streamed, pending, acceptance, iq);
      if (stores_label) pending.label = out + label, pending.at_label = C(at_label);
    } else {
      write_gradient(row, terms, out, streamed);
      if (terms.accepted != nullptr) result.stats[8] = accepted_sum * iq;
      if (stores_label) from_compute(C(at_label), out + label);
    }
  }
  return result;
}

template <class X>
void fill_zero(X* out, int64_t begin, int64_t end) {
  if (begin < end) std::memset(static_cast<void*>(out + begin), 0, size_t(end - begin) * sizeof(X));
}

template <class C>
void put(void* array, int64_t index, double value) {
  static_cast<C*>(array)[index] = C(value);
}

// Runs body(row, label, weight, out) for the rows that count, and writes zeros for the others; then finish().
template <class X, class Body, class Finish>
void for_rows(const RowArgs& args, int64_t begin, int64_t end, Body body, Finish finish) {
  using C = typename Io<X>::C;
  constexpr bool fp64 = sizeof(C) == 8;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = args.labels == nullptr ? 0 : args.labels[row];
    X* out = args.wants_grad ? row_pointer<X>(args.dstudent, row, args.length) : nullptr;
    if (args.labels != nullptr && label == args.ignore_index) {
      if (out != nullptr) fill_zero(out, 0, args.width);
      put<C>(args.loss, row, 0);
      continue;
    }
    const double weight = args.scale * per_row(args.row_weight, row, 1.0, fp64);
    put<C>(args.loss, row, weight * body(row, label, weight, out));
    if (out != nullptr) fill_zero(out, args.columns, args.width);
  }
  finish();
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
template <class X, class Body>
void for_rows(const RowArgs& args, int64_t begin, int64_t end, Body body) {
  for_rows<X>(args, begin, end, body, [] {});
}

inline bool streams(const RowArgs& args, int64_t element_bytes, bool deferred = false) {
  const int64_t row_bytes = deferred ? kStreamShortRowBytes : kStreamRowBytes;
  return args.wants_grad && args.dstudent.data != args.student.data && args.width * element_bytes >= row_bytes &&
         args.batch * args.length * args.width * element_bytes > kStreamBytes;
}

template <class C>
RowNumbers row_numbers(const ObjectiveArgs& args, int64_t row, double weight) {
  constexpr bool fp64 = sizeof(C) == 8;
  const double temperature = per_row(args.student_temperature, row, args.temperature, fp64);
  const double teacher_temperature = per_row(args.teacher_temperature, row, args.teacher_temperature_value, fp64);
  return {weight,
          kLog2e / temperature,
          kLog2e / teacher_temperature,
          args.kd_weight,
          args.scale_by_t_squared ? temperature * temperature : 1.0,
          args.ce_weight,
          args.z_loss_weight,
          per_row(args.param, row, args.param0, fp64)};
}

template <class C, int COLUMNS = kStats>
void put_stats(const ObjectiveArgs& args, int64_t row, const RowResult& result) {
  if (args.stats == nullptr) return;
  for (int k = 0; k < COLUMNS; ++k) put<C>(args.stats, row * COLUMNS + k, result.stats[k]);
}

// Whether a row before end is one of those whose logits are read.
inline bool is_read(const RowArgs& args, int64_t row, int64_t end) {
  return row < end && (args.labels == nullptr || args.labels[row] != args.ignore_index);
}

// Asks for the lines of a short row that will be written, so that they are there when the gradient is.
template <class X>
void prefetch_for_writing(X* out, int64_t n) {
  constexpr int64_t per_line = kLineBytes / int64_t(sizeof(X));
  for (int64_t j = 0; j < std::min(n, kStreamRowBytes / int64_t(sizeof(X))); j += per_line)
    __builtin_prefetch(out + j, 1);
}

// Element by element where the type of the sums is not that of the logits.
template <class C, class X>
KDK_INLINE Vec<C> widened(const X* in) {
  if constexpr (std::is_same_v<C, typename Io<X>::C>) {
    return Io<X>::widen(in);
  } else {
    Vec<C> v;
    for (int i = 0; i < kLanes<C>; ++i) v[i] = C(to_compute(in[i]));
    return v;
  }
}

// Writes map(j, x) for the vectors x of a row of logits in C, padded with zeros up to whole vectors (the scratch has
// room), and returns the sum of what it wrote for the row. What can be done on the way is: a pass over a row in C costs
// half as much as its exponentials.
template <class C, class X, class Map>
double widen_row(const X* in, int64_t n, C* out, Map map) {
  double total = 0;
  const int64_t whole = n - n % kLanes<C>;
  for (int64_t j = 0; j < whole;) {
    Vec<C> sum = {};
    for (const int64_t end = std::min(whole, j + kTileElements); j < end; j += kLanes<C>) {
      prefetch_ahead<kLanes<C>>(in + j);
      const Vec<C> x = map(j, widened<C>(in + j));
      store(out + j, x);
      sum += x;
    }
    total += horizontal_sum<C>(sum);
  }
  if (whole < n) {
    X last[kLanes<C>] = {};
    std::copy(in + whole, in + n, last);
    store(out + whole, map(whole, widened<C>(last)));
    for (int64_t j = whole; j < n; ++j) total += double(out[j]);
  }
  return total;
}
template <class C, class Map>
double widen_row(const LogitsView& view, int64_t row, int64_t length, int64_t n, C* out, Map map) {
  switch (view.dtype) {
    case DType::kFloat32: return widen_row(row_pointer<float>(view, row, length), n, out, map);
    case DType::kBFloat16: return widen_row(row_pointer<BFloat16>(view, row, length), n, out, map);
    case DType::kFloat16: return widen_row(row_pointer<Half>(view, row, length), n, out, map);
    case DType::kFloat64: return widen_row(row_pointer<double>(view, row, length), n, out, map);
  }
  return 0;
}
// What leaves logits as they are.
struct AsIs {
  template <class V>
  KDK_INLINE V operator()(int64_t, V x) const {
    return x;
  }
};

// Writes value(j) for the vectors of a row.
template <class X, class Value>
void narrow_row(int64_t n, X* out, Value value) {
  using C = typename Io<X>::C;
  int64_t j = 0;
  for (; j + kLanes<C> <= n; j += kLanes<C>) Io<X>::narrow(out + j, value(j));
  if (j < n) {
    X last[kLanes<C>];
    Io<X>::narrow(last, value(j));
    std::copy(last, last + (n - j), out + j);
  }
}

template <class C>
struct Stored {
  const C* values;
  KDK_INLINE Vec<C> operator()(int64_t j) const { return load<Vec<C>>(values + j); }
};

// tanh with a relative error of a few ulp: minimax x + x^3 P(x^2) below 5/8, 1 - 2 / (1 + e^2|x|) above.
KDK_INLINE VecF tanh_fast(VecF x) {
  const VecF zero = {}, magnitude = kdk_where(x < zero, -x, x), square = x * x;
  VecF poly = -0.005704987007f * square + 0.02063908726f;
  poly = poly * square + -0.05373971509f;
  poly = poly * square + 0.133314422f;
  poly = poly * square + -0.3333328194f;
  const VecF small = x + x * square * poly;
  const VecF large = 1.0f - 2.0f / (1.0f + kdk_exp(2.0f * magnitude));
  const VecF signed_large = kdk_where(x < zero, -large, large);
  return kdk_where(magnitude < 0.625f, small, kdk_where(x != x, x, signed_large));
}
KDK_INLINE VecD tanh_fast(VecD x) {
  VecD y = {};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::tanh(x[i]);
  return y;
}

// A row of logits in C after its softcap (0: none), seen by map; returns their sum.
template <class C, class Map>
double capped_row(const LogitsView& view, int64_t row, int64_t length, int64_t n, double cap, C* out, Map map) {
  if (cap == 0) return widen_row(view, row, length, n, out, map);
  const C up = C(cap), down = C(1 / cap);
  return widen_row(view, row, length, n, out,
                   [=](int64_t j, Vec<C> x) KDK_LAMBDA_INLINE { return map(j, up * tanh_fast(x * down)); });
}
// What takes the gradient by a capped logit to that by the logit itself.
template <class C>
KDK_INLINE Vec<C> slope_of_cap(Vec<C> capped, C inverse_cap) {
  const Vec<C> ratio = capped * inverse_cap;
  return 1 - ratio * ratio;
}

// The mean of a row is centre + rest, where x - centre is exact as far as C can be.
template <class C>
struct Moments {
  C centre;
  double rest, std;
};
// Mean and standard deviation, of n - 1 degrees of freedom, of n numbers with about this sum; a constant row counts as
// having deviation 1.
template <class C>
Moments<C> moments(const C* x, int64_t n, double sum) {
  const C centre = C(sum / double(n));
  const int64_t whole = n - n % kLanes<C>;
  const auto deviation = [&](int64_t j) KDK_LAMBDA_INLINE { return load<Vec<C>>(x + j) - centre; };
  double rest = sum_over_row<C>(whole, deviation);
  double squares = sum_over_row<C>(whole, [&](int64_t j) KDK_LAMBDA_INLINE {
    const Vec<C> d = deviation(j);
    return d * d;
  });
  for (int64_t j = whole; j < n; ++j) {
    const double d = double(x[j]) - double(centre);
    rest += d, squares += d * d;
  }
  rest /= double(n);
  const double variance = (squares - double(n) * rest * rest) / double(std::max<int64_t>(n - 1, 1));
  return {centre, rest, variance > 0 ? std::sqrt(variance) : (variance != variance ? variance : 1.0)};
}

// A teacher's row as logits in C, seen by map; returns their sum.
template <class C, class Map>
double logits_of_teacher(const DenseArgs& args, int k, int64_t row, C* out, Map map) {
  const LogitsView& view = args.teachers[k];
  if (args.teacher_form != TeacherForm::kProbs)
    return capped_row(view, row, args.length, args.columns, args.teacher_softcap, out, map);
  // kdk_log takes no numbers below the normal range, and of NaN it makes a number.
  const Vec<C> zero = {}, low = zero - std::numeric_limits<C>::infinity(), nan = low - low;
  const C smallest = std::numeric_limits<C>::min(), raised = C(0x1p64), log_raised = C(64 * kLn2);
  return widen_row(view, row, args.length, args.columns, out, [=](int64_t j, Vec<C> p) KDK_LAMBDA_INLINE {
    const auto small = p < smallest;
    const Vec<C> log_p = kdk_log(kdk_where(small, p * raised, p)) - kdk_where(small, zero + log_raised, zero);
    return map(j, kdk_where(p > zero, log_p, kdk_where(p == zero, low, nan)));
  });
}

// log(sum of 2^(x c)) in base 2, less the reference of a.
template <class C>
double log2_sum_exp(const C* x, int64_t n, const Affine<C>& a) {
  const int64_t whole = n - n % kLanes<C>;
  double total = sum_over_row<C>(
      whole, [&](int64_t j) KDK_LAMBDA_INLINE { return exp2_fast<5>(clamp_exponent(a(load<Vec<C>>(x + j)))); });
  for (int64_t j = whole; j < n; ++j) total += std::exp2(a.scalar(x[j]));
  return std::log2(total);
}

template <class C>
double log2_sum_exp(const C* x, int64_t n, double c) {
  const Affine<C> a = affine<C>(c, maximum(x, n));
  return a.reference() + log2_sum_exp(x, n, a);
}

template <class C>
double mixture_weight(const DenseArgs& args, int64_t row, int k) {
  return double(static_cast<const C*>(args.mixture_weights)[row * args.mixture_stride_n + k * args.mixture_stride_m]);
}

// The logarithm of the mixture of the teachers' probabilities: one exponential for each of them and one logarithm.
// False where a probability is too small for that, as next to a logit of -inf: its logarithm may matter all the same.
template <class C>
bool mixture_of_probabilities(const DenseArgs& args, int64_t row, double scale, C* out) {
  using V = Vec<C>;
  Scratch<C>& scratch = Scratch<C>::mine();
  const int64_t n = args.columns;
  C *logits = scratch.get(kOtherRow, n), *e = scratch.get(kGradientRow, n + Row<C>::kBlock);
  // The mixture so far is out * held + e * share: added up when the next one comes, and with its logarithm at the end.
  C held = 0, share = 0;
  int64_t teachers = 0;
  const auto mixed = [&](int64_t j) KDK_LAMBDA_INLINE { return load<V>(out + j) * held + load<V>(e + j) * share; };
  for (int k = 0; k < args.num_teachers; ++k) {
    const double weight = mixture_weight<C>(args, row, k);
    if (weight == 0) continue;
    if (teachers > 1) {
      for (int64_t j = 0; j < n; j += kLanes<C>) store(out + j, mixed(j));
      held = 1;
    }
    const double sum = logits_of_teacher(args, k, row, logits, AsIs());
    const double own_scale = args.standardize ? scale / moments(logits, n, sum).std : scale;
    // In the student's place of a row.
    C* const to = teachers == 0 ? out : e;
    Affine<C> affine;
    const double z = sweep_student<false>(Row<C>(logits, logits, n, 0), n, own_scale, affine, to, to);
    if (!(z > 0 && z < std::numeric_limits<double>::infinity())) return false;
    (teachers == 0 ? held : share) = C(weight / z);
    ++teachers;
  }
  if (teachers == 0) return false;
  if (teachers == 1) std::fill(e, e + n + kLanes<C>, C(0));
  V lowest = V{} + C(1);
  const int64_t whole = n - n % kLanes<C>;
  for (int64_t j = 0; j < whole; j += kLanes<C>) {
    const V p = mixed(j);
    lowest = min_of(p, lowest);
    store(out + j, kdk_log(p));
  }
  C least = fold_lanes<C>(lowest, [](auto x, auto y) KDK_LAMBDA_INLINE { return y < x ? y : x; });
  if (whole < n) {
    const V p = mixed(whole);
    for (int64_t j = whole; j < n; ++j) least = std::min<C>(least, p[j - whole]);
    store(out + whole, kdk_log(p));
  }
  return least > C(0x1p-100);
}

// The teacher's row as logits in C; scale becomes log2(e) / T of that row.
template <class C>
const C* teacher_row(const DenseArgs& args, int64_t row, double& scale) {
  Scratch<C>& scratch = Scratch<C>::mine();
  const int64_t n = args.columns;
  C* out = scratch.get(kTeacherRow, n);
  if (args.mixture == Mixture::kNone) {
    const double sum = logits_of_teacher(args, 0, row, out, AsIs());
    if (args.standardize) scale /= moments(out, n, sum).std;
    return out;
  }
  const bool logits = args.mixture == Mixture::kLogits;
  if (!logits && mixture_of_probabilities(args, row, scale, out)) {
    scale = kLog2e;
    return out;
  }
  C* one = scratch.get(kOtherRow, n);
  const Vec<C> low = Vec<C>{} - std::numeric_limits<C>::infinity(), zero = {};
  std::fill(out, out + n + kLanes<C>, logits ? C(0) : -std::numeric_limits<C>::infinity());
  for (int k = 0; k < args.num_teachers; ++k) {
    const double weight = mixture_weight<C>(args, row, k);
    if (weight == 0) continue;
    const C w = C(weight);
    if (logits && !args.standardize) {
      logits_of_teacher(args, k, row, out,
                        [=](int64_t j, Vec<C> x) KDK_LAMBDA_INLINE { return load<Vec<C>>(out + j) + w * x; });
      continue;
    }
    const double sum = logits_of_teacher(args, k, row, one, AsIs());
    double own_scale = scale;
    if (args.standardize) {
      const Moments<C> m = moments(one, n, sum);
      own_scale /= m.std;
      const C mean = m.centre, inverse = C(1 / m.std);
      if (logits) {
        for (int64_t j = 0; j < n; j += kLanes<C>)
          // The rest of the mean is the same for all, and so nothing to a softmax.
          store(out + j, load<Vec<C>>(out + j) + w * ((load<Vec<C>>(one + j) - mean) * inverse));
        continue;
      }
    }
    // log(e^u + e^v) with u the mixture so far, v = log w + log p of this teacher.
    const Affine<C> a = affine<C>(own_scale, maximum(one, n));
    const C offset = C(-log2_sum_exp(one, n, a)), ln2 = C(kLn2), log_weight = C(std::log(weight));
    for (int64_t j = 0; j < n; j += kLanes<C>) {
      const Vec<C> u = load<Vec<C>>(out + j), v = (a(load<Vec<C>>(one + j)) + offset) * ln2 + log_weight;
      const Vec<C> high = max_keep_nan(u, v), under = min_of(u, v) - high;
      const Vec<C> sum = high + kdk_log(1 + kdk_exp(kdk_where(high == low, zero, under)));
      // The maximum forgets a NaN in u.
      store(out + j, kdk_where(u != u, u, kdk_where(high == low, low, sum)));
    }
  }
  if (!logits) scale = kLog2e;
  return out;
}

// Cross entropy and z-loss of a row of logits alone, given less a centre, added to result; their gradient is added to
// g.
template <class C>
void add_hard_terms(const DenseArgs& args, const RowNumbers& num, const C* s, C centre, int64_t label, C* g,
                    RowResult& result) {
  const int64_t n = args.columns;
  const Affine<C> a = affine<C>(kLog2e, maximum(s, n));
  const double log2_z = log2_sum_exp(s, n, a), reference = a.logit(), lse = double(centre) + reference + kLn2 * log2_z;
  const double cross_entropy =
      num.ce != 0 ? cross_entropy_of(s, n, label, args.label_smoothing, reference, kLn2 * log2_z) : 0;
  result.loss += num.ce * cross_entropy + num.z * lse * lse;
  result.stats[1] = cross_entropy;
  result.stats[2] = lse;
  if (g == nullptr || (num.ce == 0 && num.z == 0)) return;
  const C c1 = C(num.weight * (num.ce + (num.z != 0 ? 2 * num.z * lse : 0)) * std::exp2(-log2_z));
  const C c0 = C(-num.weight * num.ce * args.label_smoothing / double(n));
  for (int64_t j = 0; j < n; j += kLanes<C>)
    store(g + j, load<Vec<C>>(g + j) + exp2_fast<5>(clamp_exponent(a(load<Vec<C>>(s + j)))) * c1 + c0);
  if (num.ce != 0 && label >= 0 && label < n) g[label] -= C(num.weight * num.ce * (1 - args.label_smoothing));
}

// The student's logits are read, and its gradient written, as they are; the teacher's too, of type Y, or brought to
// logits in C row by row where PREPARED.
template <class X, class Y, bool PREPARED>
void dense_direct(const DenseArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  // Where the gradient needs the logits again, it is written while they are in the caches.
  const Sums sums = sums_for(args);
  const bool needs_logits = has_logs(kDivergences[args.divergence]) && sums != kReverse && (sums & kKept) == 0;
  const bool deferred = kDefers<X> && !needs_logits;
  ObjectiveRows<X, Y> rows(args, streams(args, sizeof(X), deferred), deferred);
  const bool numbers_differ = PREPARED || args.student_temperature.data != nullptr ||
                              args.teacher_temperature.data != nullptr || args.param.data != nullptr;
  RowNumbers num = row_numbers<C>(args, begin, 1);
  const auto add = [&](int64_t row, int64_t label, double weight, X* out) {
    const X* s = row_pointer<X>(args.student, row, args.length);
    if (out != nullptr && !rows.streamed && out != s) prefetch_for_writing(out, args.width);
    if (numbers_differ) num = row_numbers<C>(args, row, 1);
    num.weight = weight;
    const Y* t;
    if constexpr (PREPARED) {
      t = teacher_row<C>(args, row, num.teacher_scale);
    } else {
      t = row_pointer<Y>(args.teachers[0], row, args.length);
      const bool has_next = is_read(args, row + 1, end);
      rows.ahead.next_s = has_next ? row_pointer<X>(args.student, row + 1, args.length) : nullptr;
      rows.ahead.next_t = has_next ? row_pointer<Y>(args.teachers[0], row + 1, args.length) : nullptr;
    }
    C* stats = args.stats == nullptr ? nullptr : static_cast<C*>(args.stats) + row * kStats;
    const RowResult result = rows.add(num, s, t, label, out, stats == nullptr ? nullptr : stats + 8);
    put_stats<C>(args, row, result);
    return result.loss;
  };
  for_rows<X>(args, begin, end, add, [&] { rows.finish(); });
}

// Anything else: rows are first brought to logits in C, and the gradient is taken back through what was done to the
// student.
template <class X>
void dense_generic(const DenseArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  const int64_t n = args.columns;
  Scratch<C>& scratch = Scratch<C>::mine();
  ObjectiveRows<C> rows(args, false, false);
  for_rows<X>(args, begin, end, [&](int64_t row, int64_t label, double weight, X* out) {
    RowNumbers num = row_numbers<C>(args, row, weight);
    const double tempered = num.student_scale;
    const C* t = teacher_row<C>(args, row, num.teacher_scale);
    C* s = scratch.get(kStudentRow, n);
    const double sum = capped_row(args.student, row, args.length, n, args.student_softcap, s, AsIs());
    C* g = out == nullptr ? nullptr : scratch.get(kGradientRow, n);
    RowResult result;
    C centre = 0, mean = 0, slope = 0;
    if (args.standardize) {
      // The divergence sees z = (s - mean) / std, whose softmax is that of s at T std; the other terms see s. A mean
      // that is large beside std would be most of every s: it is taken off before anything is multiplied.
      const Moments<C> m = moments(s, n, sum);
      centre = m.centre, mean = C(m.rest);
      for (int64_t j = 0; j < n; j += kLanes<C>) store(s + j, load<Vec<C>>(s + j) - centre);
      RowNumbers soft = num;
      soft.student_scale = tempered / m.std;
      soft.ce = soft.z = 0;
      result = rows.add(soft, s, t, label, g, nullptr);
      if (g != nullptr) {
        // add() divided by T std: dz = std * that, ds = (dz - z sum(dz z) / (n - 1)) / std.
        const int64_t whole = n - n % kLanes<C>;
        double along = sum_over_row<C>(
            whole, [&](int64_t j) KDK_LAMBDA_INLINE { return load<Vec<C>>(g + j) * (load<Vec<C>>(s + j) - mean); });
        for (int64_t j = whole; j < n; ++j) along += double(g[j]) * double(s[j] - mean);
        slope = C(along / (m.std * m.std * double(std::max<int64_t>(n - 1, 1))));
      }
      if (num.ce != 0 || num.z != 0 || args.stats != nullptr) {
        // Their gradient is that by the raw logits already.
        for (int64_t j = 0; g != nullptr && j < n; j += kLanes<C>)
          store(g + j, load<Vec<C>>(g + j) - (load<Vec<C>>(s + j) - mean) * slope);
        slope = 0;
        add_hard_terms(args, num, s, centre, label, g, result);
      }
    } else {
      result = rows.add(num, s, t, label, g, nullptr);
    }
    if (g != nullptr) {
      const C inverse = args.student_softcap == 0 ? C(0) : C(1 / args.student_softcap);
      if (slope == 0 && inverse == 0) {
        narrow_row(n, out, Stored<C>{g});
      } else {
        narrow_row(n, out, [&](int64_t j) KDK_LAMBDA_INLINE {
          const Vec<C> x = load<Vec<C>>(s + j);
          return (load<Vec<C>>(g + j) - (x - mean) * slope) * slope_of_cap(x + centre, inverse);
        });
      }
    }
    put_stats<C>(args, row, result);
    return result.loss;
  });
}

template <class X>
void dense_rows(const DenseArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  if (args.student_softcap != 0 || args.standardize) return dense_generic<X>(args, begin, end);
  const bool logits_alone =
      args.mixture == Mixture::kNone && args.teacher_form == TeacherForm::kLogits && args.teacher_softcap == 0;
  const DType teacher = args.teachers[0].dtype;
  if (logits_alone && teacher == args.student.dtype) return dense_direct<X, X, false>(args, begin, end);
  if constexpr (std::is_same_v<X, BFloat16>)
    if (logits_alone && teacher == DType::kFloat32) return dense_direct<X, float, false>(args, begin, end);
  // Not beside fp16: it would take the compiler as long again as bf16 does.
  if constexpr (std::is_same_v<X, Half>) {
    dense_generic<X>(args, begin, end);
  } else {
    dense_direct<X, C, true>(args, begin, end);
  }
}

// The rows of one call of decoupled distillation, one after the other: forward KL over the other classes, and the
// two-way KL of the label against them in scalars.
template <class X>
struct DkdRows {
  using C = typename Io<X>::C;
  const DkdArgs& args;
  // As of ObjectiveRows.
  const bool streamed, deferred;
  int64_t n = args.columns;
  Scratch<C>& scratch = Scratch<C>::mine();
  C* const es_of_body = scratch.get(kEs, n + 2 * Row<X>::kBlock) + Row<X>::kBlock;
  C* const et_of_body = scratch.get(kEt, n + 2 * Row<X>::kBlock) + Row<X>::kBlock;
  Pending<X> pending = {};

  DkdRows(const DkdArgs& arguments, bool streams, bool defers) : args(arguments), streamed(streams), deferred(defers) {}

  double add(double weight, const X* s, const X* t, int64_t label, X* out);
  void finish() { pending.finish(); }
};

template <class X>
double DkdRows<X>::add(double weight, const X* s, const X* t, int64_t label, X* out) {
  if (label < 0 || label >= n) {
    if (out != nullptr) fill_zero(out, 0, n);
    return std::numeric_limits<double>::quiet_NaN();
  }
  Row<X> row(s, t, n, head_elements(out, streamed));
  row.exclude(label);
  prefetch_edges(row, out);
  const int64_t head_slots = row.head > 0 ? Row<X>::kBlock : 0;
  C *const es = es_of_body - head_slots, *const et = et_of_body - head_slots;
  double max_s = maximum(s, std::min(n, kSeedElements)), max_t = maximum(t, std::min(n, kSeedElements));
  Affine<C> as, at;
  RowSums sums;
  for (int attempt = 0;; ++attempt) {
    as = affine<C>(kLog2e / args.temperature, max_s);
    at = affine<C>(kLog2e / args.teacher_temperature, max_t);
    sums = RowSums();
    bool trusting = true;
    for (int64_t tile = 0; tile < row.tiles(); ++tile)
      sweep_tile<kForward>(row, tile, as, at, es, et, es, trusting, true, sums, pending);
    pending.finish();
    // The label may have set the reference far above all others, which are alone in these sums.
    const auto lost = [](double z) { return z > kRedo || z < 1 / kRedo; };
    if (attempt > 0 || !(lost(sums.zs) || lost(sums.zt))) break;
    max_s = max_t = -std::numeric_limits<double>::infinity();
    for (int64_t tile = 0; tile < row.tiles(); ++tile)
      row.pieces(tile, [&](const X* ps, const X* pt, int64_t blocks, int64_t, int64_t, auto lanes) {
        const auto largest = [&](const X* x) {
          if constexpr (!lanes.kEdge) return maximum(x, blocks * Row<X>::kBlock);
          Vec<C> a, b;
          load_block(x, lanes, -std::numeric_limits<C>::infinity(), a, b);
          return double(horizontal_max<C>(max_keep_nan(a, b)));
        };
        max_s = std::max(max_s, largest(ps));
        max_t = std::max(max_t, largest(pt));
      });
  }
  const double label_s = to_compute(s[label]), label_t = to_compute(t[label]);
  const double xs = as.scalar(label_s), xt = at.scalar(label_t);
  const double log2_zs = std::log2(sums.zs), log2_zt = std::log2(sums.zt);
  const bool others = n > 1;
  const double nckd = others ? kLn2 * (sums.forward / sums.zt - log2_zt + log2_zs) : 0;
  // Two-way distribution from the difference between the label and all others, stable on both ends.
  const double gap_q = kLn2 * (xs - log2_zs), gap_p = kLn2 * (xt - log2_zt);
  const auto log_sigmoid = [](double x) { return x > 0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x)); };
  const double log_q = others ? log_sigmoid(gap_q) : 0, log_p = others ? log_sigmoid(gap_p) : 0;
  const double log_rest_q = log_sigmoid(-gap_q), log_rest_p = log_sigmoid(-gap_p);
  const double p = std::exp(log_p), rest_p = others ? std::exp(log_rest_p) : 0;
  // One class alone has all the probability, unless it has none.
  double tckd = p > 0 ? p * (log_p - log_q) : 0;
  if (!others) tckd = (label_s - label_s) + (label_t - label_t);
  if (rest_p > 0) tckd += rest_p * (log_rest_p - log_rest_q);
  const double tau = args.scale_by_t_squared ? args.temperature * args.temperature : 1;
  if (out != nullptr) {
    const double f = weight * tau / args.temperature;
    // p - q, from the two small ones of the four probabilities. For another class, dTCKD = q^ (p - q) with q^ its share
    // of the rest.
    const double difference = p < 0.5 ? p - std::exp(log_q) : std::exp(log_rest_q) - rest_p;
    GradientTerms<C> terms;
    terms.es = es;
    terms.et = et;
    terms.e1 = es;
    if (others) {
      terms.a = f * (args.beta + args.alpha * difference) / sums.zs;
      terms.b = f * args.beta / sums.zt;
    }
    const double at_label = others ? -f * args.alpha * difference : 0;
    const bool stores_label = !(streamed && set_gradient(terms, row.slot(label), at_label));
    if (deferred) {
      postpone(row, terms, out, streamed, pending);
      if (stores_label) pending.label = out + label, pending.at_label = C(at_label);
    } else {
      write_gradient(row, terms, out, streamed);
      if (stores_label) from_compute(C(at_label), out + label);
    }
  }
  return tau * (args.alpha * tckd + args.beta * nckd);
}

// A teacher's row as it is, or where it is of another type, in C.
template <class X>
const X* row_as(const LogitsView& teacher, const RowArgs& args, int64_t row, bool as_is) {
  using C = typename Io<X>::C;
  if constexpr (std::is_same_v<X, C>) {
    if (!as_is) {
      C* out = Scratch<C>::mine().get(kTeacherRow, args.columns);
      widen_row(teacher, row, args.length, args.columns, out, AsIs());
      return out;
    }
  }
  return row_pointer<X>(teacher, row, args.length);
}

// The student's logits are read, and its gradient written, as they are.
template <class X>
void dkd_direct(const DkdArgs& args, int64_t begin, int64_t end) {
  const bool as_is = args.teacher.dtype == args.student.dtype;
  DkdRows<X> rows(args, streams(args, sizeof(X), kDefers<X>), kDefers<X>);
  const auto add = [&](int64_t row, int64_t label, double weight, X* out) {
    const X* s = row_pointer<X>(args.student, row, args.length);
    if (out != nullptr && !rows.streamed && out != s) prefetch_for_writing(out, args.width);
    return rows.add(weight, s, row_as<X>(args.teacher, args, row, as_is), label, out);
  };
  for_rows<X>(args, begin, end, add, [&] { rows.finish(); });
}
// Both are brought to C.
template <class X>
void dkd_widened(const DkdArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  Scratch<C>& scratch = Scratch<C>::mine();
  DkdRows<C> rows(args, false, false);
  for_rows<X>(args, begin, end, [&](int64_t row, int64_t label, double weight, X* out) {
    C *student = scratch.get(kStudentRow, args.columns), *teacher = scratch.get(kTeacherRow, args.columns);
    C* g = out == nullptr ? nullptr : scratch.get(kGradientRow, args.columns);
    widen_row(args.student, row, args.length, args.columns, student, AsIs());
    widen_row(args.teacher, row, args.length, args.columns, teacher, AsIs());
    const double loss = rows.add(weight, student, teacher, label, g);
    if (g != nullptr) narrow_row(args.columns, out, Stored<C>{g});
    return loss;
  });
}
// Whether the student's logits are taken, and its gradient is given, as they are.
template <class X>
bool is_direct(const RowArgs& args, const LogitsView& teacher) {
  return std::is_same_v<X, typename Io<X>::C> || teacher.dtype == args.student.dtype;
}
template <class X>
void dkd_rows(const DkdArgs& args, int64_t begin, int64_t end) {
  return is_direct<X>(args, args.teacher) ? dkd_direct<X>(args, begin, end) : dkd_widened<X>(args, begin, end);
}

// Mean squared difference of the logits of one row: a pass over memory, or two over a row that the caches hold by then.
template <bool STREAM, class X>
double mse_row(const MseArgs& args, double weight, const X* s, const X* t, X* out) {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  constexpr int64_t block = Io<X>::kBlock;
  const int64_t n = args.columns;
  const Row<X> row(s, t, n, head_elements(out, STREAM));
  // Calls visit(difference, difference, first) for the whole blocks of a tile.
  const auto differences = [&](int64_t tile, V centre, auto visit) KDK_LAMBDA_INLINE {
    row.template pieces<kBody>(
        tile, [&](const X* ps, const X* pt, int64_t blocks, int64_t, int64_t first, auto) KDK_LAMBDA_INLINE {
          for (int64_t i = 0; i < blocks; ++i, ps += block, pt += block) {
            prefetch_ahead<block>(ps);
            prefetch_ahead<block>(pt);
            V s0, s1, t0, t1;
            Io<X>::load2(ps, s0, s1);
            Io<X>::load2(pt, t0, t1);
            visit(s0 - t0 - centre, s1 - t1 - centre, first + i * block);
          }
        });
  };
  // The elements that fill no block, one by one.
  const auto edges = [&](auto visit) KDK_LAMBDA_INLINE {
    for (int64_t j = 0; j < row.head; ++j) visit(j);
    for (int64_t j = n - row.tail; j < n; ++j) visit(j);
  };
  const auto difference = [&](int64_t j) { return double(to_compute(s[j])) - double(to_compute(t[j])); };
  double mean = 0;
  if (args.centered) {
    for (int64_t tile = 0; tile < row.tiles(); ++tile) {
      V sum0 = {}, sum1 = {};
      differences(tile, V{}, [&](V d0, V d1, int64_t) KDK_LAMBDA_INLINE { sum0 += d0, sum1 += d1; });
      mean += horizontal_sum<C>(sum0 + sum1);
    }
    edges([&](int64_t j) { mean += difference(j); });
    mean /= double(n);
  }
  // The derivative of the mean falls out: the centred differences sum to 0.
  const C factor = C(2 * weight / double(n));
  double squares = 0;
  edges([&](int64_t j) {
    const double d = difference(j) - mean;
    squares += d * d;
    if (out != nullptr) from_compute(C(double(factor) * d), out + j);
  });
  for (int64_t tile = 0; tile < row.tiles(); ++tile) {
    V sum0 = {}, sum1 = {};
    differences(tile, V{} + C(mean), [&](V d0, V d1, int64_t first) KDK_LAMBDA_INLINE {
      sum0 += d0 * d0;
      sum1 += d1 * d1;
      if (out != nullptr) Io<X>::template store2<STREAM>(out + first, d0 * factor, d1 * factor);
    });
    squares += horizontal_sum<C>(sum0 + sum1);
  }
  return squares / double(n);
}

template <class X>
void mse_rows(const MseArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  const bool direct = is_direct<X>(args, args.teacher), streamed = direct && streams(args, sizeof(X));
  const bool as_is = args.teacher.dtype == args.student.dtype;
  for_rows<X>(args, begin, end, [&](int64_t row, int64_t, double weight, X* out) {
    const X* s = row_pointer<X>(args.student, row, args.length);
    if (direct) {
      const X* t = row_as<X>(args.teacher, args, row, as_is);
      return streamed ? mse_row<true>(args, weight, s, t, out) : mse_row<false>(args, weight, s, t, out);
    }
    Scratch<C>& scratch = Scratch<C>::mine();
    C *student = scratch.get(kStudentRow, args.columns), *teacher = scratch.get(kTeacherRow, args.columns);
    C* g = out == nullptr ? nullptr : scratch.get(kGradientRow, args.columns);
    widen_row(args.student, row, args.length, args.columns, student, AsIs());
    widen_row(args.teacher, row, args.length, args.columns, teacher, AsIs());
    const double loss = mse_row<false, C>(args, weight, student, teacher, g);
    if (g != nullptr) narrow_row(args.columns, out, Stored<C>{g});
    return loss;
  });
}

template <class X>
void scale_rows(const ScaleArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  for (int64_t row = begin; row < end; ++row) {
    double factor = 1;
    const int64_t at = row * args.factor_stride;
    switch (args.factor_dtype) {
      case DType::kFloat32: factor = static_cast<const float*>(args.factor)[at]; break;
      case DType::kFloat64: factor = static_cast<const double*>(args.factor)[at]; break;
      case DType::kBFloat16: factor = to_compute(static_cast<const BFloat16*>(args.factor)[at]); break;
      case DType::kFloat16: factor = to_compute(static_cast<const Half*>(args.factor)[at]); break;
    }
    if (factor == 1) continue;
    X* g = row_pointer<X>(args.grad, row, args.length);
    const C c = C(factor);
    int64_t j = 0;
    for (; j + Io<X>::kBlock <= args.width; j += Io<X>::kBlock) {
      Vec<C> a, b;
      Io<X>::load2(g + j, a, b);
      Io<X>::template store2<false>(g + j, a * c, b * c);
    }
    for (; j < args.width; ++j) from_compute(to_compute(g[j]) * c, g + j);
  }
}

}  // namespace KDK_ISA
}  // namespace kdk
