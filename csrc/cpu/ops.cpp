// Torch glue of the CPU backend: runs rows in parallel on torch's threads.
#include "contraction.h"
#include "kernels.h"
#include "memory.h"

#include "../glue.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace kdk {

namespace {

bool cpu_has_avx2() {
#if defined(KDK_HAVE_AVX2)
  // Every processor with AVX2 has F16C, a name that Clang did not know before version 15.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool cpu_has_avx512() {
#if defined(KDK_HAVE_AVX512)
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Why no kernel of this build may run on this machine; empty where they may.
std::string cpu_fault() {
  bool sound = baseline::contracts();
#if defined(KDK_HAVE_AVX2)
  sound = sound && (!cpu_has_avx2() || avx2::contracts());
#endif
#if defined(KDK_HAVE_AVX512)
  sound = sound && (!cpu_has_avx512() || avx512::contracts());
#endif
  return sound ? ""
               : "the C++ extension was compiled without fused multiply-adds, which its accuracy rests on: compile it "
                 "with -O2 or more, or with -O1 -fexpensive-optimizations, and without -ffp-contract=off";
}

// The best instruction set of this machine, or a lower one that KDKERNELS_CPU_ISA asks for.
const KernelTable& choose_kernels() {
  const char* wish = std::getenv("KDKERNELS_CPU_ISA");
  const std::string limit = wish == nullptr ? "avx512" : wish;
  STD_TORCH_CHECK(limit == "avx512" || limit == "avx2" || limit == "baseline",
                  "KDKERNELS_CPU_ISA must be avx512, avx2 or baseline, got ", limit);
  const std::string fault = cpu_fault();
  STD_TORCH_CHECK(fault.empty(), fault);
#if defined(KDK_HAVE_AVX512)
  if (limit == "avx512" && cpu_has_avx512()) return avx512_kernels();
#endif
#if defined(KDK_HAVE_AVX2)
  if (limit != "baseline" && cpu_has_avx2()) return avx2_kernels();
#endif
  (void)cpu_has_avx512, (void)cpu_has_avx2;
  return baseline_kernels();
}

const KernelTable& kernels() {
  static const KernelTable& table = choose_kernels();
  return table;
}

// A fresh gradient is faulted in faster by huge pages.
void prepare(const RowArgs& args) {
  const bool contiguous = args.dstudent.stride_l == args.width && args.dstudent.stride_b == args.length * args.width;
  if (!args.wants_grad || !contiguous || args.dstudent.data == args.student.data) return;
  const size_t element = args.dstudent.dtype == DType::kFloat64 ? 8 : args.dstudent.dtype == DType::kFloat32 ? 4 : 2;
  prefer_huge_pages(args.dstudent.data, size_t(args.batch * args.length * args.width) * element);
}

// The kernels leave out the statistics of rows that do not count.
void clear_stats(const ObjectiveArgs& args, int64_t columns) {
  const size_t element = args.student.dtype == DType::kFloat64 ? 8 : 4;
  if (args.stats != nullptr) std::memset(args.stats, 0, size_t(args.batch * args.length * columns) * element);
}

// Rows go to the threads in chunks of about this many elements, so that small problems stay on one.
constexpr int64_t kGrainElements = 16384;

template <class Body>
void parallel_rows(int64_t rows, int64_t width, const Body& body) {
  if (rows == 0) return;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(width, 1)), body);
}

void run_dense(const DenseArgs& args) {
  const KernelTable& table = kernels();
  parallel_rows(args.batch * args.length, args.width,
                [&](int64_t begin, int64_t end) { table.dense(args, begin, end); });
}

void run_dense_op(const DenseArgs& args, const Tensor&) {
  clear_stats(args, kStats);
  prepare(args);
  run_dense(args);
}

void run_pixels(const PixelArgs& args, const Tensor&) {
  clear_stats(args, kStats);
  const KernelTable& table = kernels();
  parallel_rows(args.batch * args.length, args.width,
                [&](int64_t begin, int64_t end) { table.pixels(args, begin, end); });
}

void run_topk_rows(const TopkArgs& args) {
  const KernelTable& table = kernels();
  parallel_rows(args.batch * args.length, args.width,
                [&](int64_t begin, int64_t end) { table.topk(args, begin, end); });
}

void run_topk(const TopkArgs& args, const Tensor&) {
  clear_stats(args, kTopkStats);
  prepare(args);
  run_topk_rows(args);
}

void run_scale(const ScaleArgs& args, const Tensor&) {
  const KernelTable& table = kernels();
  parallel_rows(args.batch * args.length, args.width,
                [&](int64_t begin, int64_t end) { table.scale(args, begin, end); });
}

// Calls that are made again and again have the arguments that all rows share packed into one tensor of bytes. Where the
// caches are cold, as in a step of training, the code around the kernel takes as long as it is long: to hand over and
// look at 28 arguments, to make the gradient in Python, and to sum the rows by another op cost 0.2 ms together.
template <class Args>
Tensor pack(const Args& args, const Tensor& student) {
  static_assert(std::is_trivially_copyable_v<Args>);
  Tensor bytes = new_tensor(student, {int64_t(sizeof(Args))}, ScalarType::Byte);
  std::memcpy(bytes.mutable_data_ptr(), &args, sizeof(Args));
  return bytes;
}

template <class Args>
Args unpack(const Tensor& call) {
  STD_TORCH_CHECK(call.dim() == 1 && call.size(0) == int64_t(sizeof(Args)) && call.scalar_type() == ScalarType::Byte &&
                      call.is_contiguous(),
                  "call must be what the op for calls returned");
  Args args;
  std::memcpy(&args, call.const_data_ptr(), sizeof(Args));
  return args;
}

template <class Args, class Numbers, class Choices>
Args shared_args(const std::string& divergence, int64_t vocab_size, const Numbers& numbers, const Choices& choices) {
  Args args;
  args.columns = vocab_size;
  args.ignore_index = choices.ignore_index;
  fill_objective(args, find_divergence, divergence, numbers, choices);
  return args;
}

Tensor dense_call(Tensor student, std::string divergence, int64_t vocab_size, std::vector<double> numbers,
                  std::vector<int64_t> choices) {
  const auto number = named<DenseNumbers>(numbers);
  const auto chosen = named<DenseChoices>(choices);
  auto args = shared_args<DenseArgs>(divergence, vocab_size, number, chosen);
  fill_dense(args, number, chosen);
  return pack(args, student);
}

Tensor topk_call(Tensor student, std::string divergence, int64_t vocab_size, std::vector<double> numbers,
                 std::vector<int64_t> choices) {
  const auto number = named<TopkNumbers>(numbers);
  const auto chosen = named<TopkChoices>(choices);
  auto args = shared_args<TopkArgs>(divergence, vocab_size, number, chosen);
  fill_tail(args, number, chosen);
  return pack(args, student);
}

template <class T>
double sum(const T* rows, int64_t count) {
  constexpr int64_t kChains = 8;
  double sums[kChains] = {0};
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains)
    for (int64_t chain = 0; chain < kChains; ++chain) sums[chain] += double(rows[i + chain]);
  for (; i < count; ++i) sums[0] += double(rows[i]);
  return std::accumulate(sums, sums + kChains, 0.0);
}

// The sum of the losses of all rows, and the gradient where it is asked for and there is no memory for it yet.
template <class Args, class Fill, class Run>
std::tuple<Tensor, Tensor> summed_loss(const Tensor& student, std::optional<Tensor> dstudent, const Tensor& call,
                                       double scale, bool needs_grad, const std::optional<Tensor>& labels, Fill fill,
                                       Run run) {
  Args args = unpack<Args>(call);
  std::optional<Tensor> gradient;
  if (needs_grad && !dstudent) dstudent = gradient = new_gradient(student);
  fill_tensors(args, student, dstudent, labels);
  check_labels(args);
  fill(args);
  args.scale = scale;
  const int64_t rows = args.batch * args.length;
  std::vector<double> losses(static_cast<size_t>(rows));  // of fp32 where the sums are
  poison(losses.data(), losses.size() * sizeof(double));
  args.loss = losses.data();
  run(args);
  Tensor loss = new_tensor(student, 0, nullptr, nullptr, sum_dtype(student));
  if (sum_dtype(student) == ScalarType::Double)
    *static_cast<double*>(loss.mutable_data_ptr()) = sum(losses.data(), rows);
  else
    *static_cast<float*>(loss.mutable_data_ptr()) = float(sum(reinterpret_cast<const float*>(losses.data()), rows));
  return {loss, gradient ? *gradient : new_rows(student, {0})};
}

std::tuple<Tensor, Tensor> dense_loss(Tensor student, std::optional<Tensor> dstudent, Tensor call, double scale,
                                      bool needs_grad, Tensor teacher, std::optional<Tensor> labels) {
  const auto fill = [&](DenseArgs& args) { args.teachers[0] = teacher_view(teacher, args); };
  return summed_loss<DenseArgs>(student, dstudent, call, scale, needs_grad, labels, fill, run_dense);
}

std::tuple<Tensor, Tensor> topk_loss(Tensor student, std::optional<Tensor> dstudent, Tensor call, double scale,
                                     bool needs_grad, Tensor teacher_ids, Tensor teacher_logprobs,
                                     std::optional<Tensor> labels, std::optional<Tensor> tail_rows) {
  const auto fill = [&](TopkArgs& args) { fill_entries(args, student, teacher_ids, teacher_logprobs, tail_rows); };
  return summed_loss<TopkArgs>(student, dstudent, call, scale, needs_grad, labels, fill, run_topk_rows);
}

std::tuple<Tensor, Tensor, Tensor> capture_topk(Tensor teacher, std::optional<Tensor> temperature_rows, int64_t k,
                                                int64_t vocab_size, std::vector<double> numbers,
                                                std::vector<int64_t> choices) {
  STD_TORCH_CHECK(choices.empty(), "the op takes no choices, got ", choices.size());
  CaptureArgs args;
  args.teacher = view(teacher, "teacher", false);
  args.length = teacher.size(1);
  args.columns = vocab_size;
  args.k = k;
  const int64_t rows = teacher.size(0) * teacher.size(1);
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= teacher.size(2) && vocab_size <= INT32_MAX,
                  "vocab_size must be in [1, ", teacher.size(2), "], got ", vocab_size);
  STD_TORCH_CHECK(k >= 1 && k <= vocab_size, "k must be in [1, ", vocab_size, "], got ", k);
  args.temperature_rows = per_row(temperature_rows, sum_dtype(teacher), rows, "temperature_rows");
  args.temperature = named<CaptureNumbers>(numbers).temperature;
  Tensor ids = new_tensor(teacher, {rows, k}, ScalarType::Int);
  Tensor logprobs = new_rows(teacher, {rows, k}), tail = new_rows(teacher, {rows});
  args.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  args.logprobs = logprobs.mutable_data_ptr();
  args.tail = tail.mutable_data_ptr();
  const KernelTable& table = kernels();
  parallel_rows(rows, vocab_size, [&](int64_t begin, int64_t end) { table.capture(args, begin, end); });
  return {ids, logprobs, tail};
}

void run_tokens(const TokenArgs& args, const Tensor&) {
  const KernelTable& table = kernels();
  parallel_rows(args.batch * args.length, args.width,
                [&](int64_t begin, int64_t end) { table.tokens(args, begin, end); });
}

Tensor shard_fwd(Tensor student, Tensor teacher, std::optional<Tensor> dstudent, std::optional<Tensor> labels,
                 Tensor row_numbers, std::optional<Tensor> param_rows, std::string divergence, int64_t vocab_size,
                 std::vector<double> numbers, std::vector<int64_t> choices) {
  const auto number = named<ShardOptions>(numbers);
  ShardArgs args;
  args.stats = named<ShardChoices>(choices).stats != 0;
  args.student = view(student, "student", false);
  fill_shape(args, student);
  args.columns = vocab_size;
  const int64_t rows = args.batch * args.length;
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= args.width, "vocab_size must be in [1, ", args.width, "], got ",
                  vocab_size);
  args.teacher = view(teacher, "teacher", false);
  STD_TORCH_CHECK(has_rows(teacher, args, args.columns),
                  "the teacher must have the student's rows, and a column for each that counts");
  constexpr int64_t of_row = int64_t(sizeof(ShardNumbers<float>) / sizeof(float));
  STD_TORCH_CHECK(row_numbers.dim() == 2 && row_numbers.size(0) == rows && row_numbers.size(1) == of_row &&
                      row_numbers.is_contiguous() && row_numbers.scalar_type() == sum_dtype(student),
                  "row_numbers must be contiguous [N, ", of_row, "] in the dtype of the sums");
  args.numbers = row_numbers.const_data_ptr();
  args.param = per_row(param_rows, sum_dtype(student), rows, "param_rows");
  args.divergence = find_divergence(divergence.c_str(), number.param0, number.param1);
  STD_TORCH_CHECK(args.divergence >= 0, "this backend does not know the divergence ", divergence);
  args.param0 = number.param0;
  args.param1 = number.param1;
  args.student_softcap = number.student_softcap;
  args.teacher_softcap = number.teacher_softcap;
  if (labels) {
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rows && labels->scalar_type() == ScalarType::Long &&
                        labels->is_contiguous(),
                    "labels must be contiguous int64 [N]");
    args.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  }
  Tensor sums = new_rows(student, {dstudent ? 0 : rows, args.stats ? 7 : 2});
  if (dstudent) {
    args.dstudent = view(*dstudent, "dstudent", true);
    STD_TORCH_CHECK(has_rows(*dstudent, args, args.width) && dstudent->size(dstudent->dim() - 1) == args.width &&
                        args.dstudent.dtype == args.student.dtype,
                    "dstudent must have the student's shape and dtype");
  } else {
    args.sums = sums.mutable_data_ptr();
  }
  const KernelTable& table = kernels();
  parallel_rows(rows, args.width, [&](int64_t begin, int64_t end) { table.shards(args, begin, end); });
  return sums;
}

enum class Slot { kUnused, kUsed, kBad };

template <class I, class Judge>
bool all_sound(const I* ids, int64_t count, int64_t columns, Judge judge) {
  std::atomic<bool> sound{true};
  torch::stable::parallel_for(0, count, int64_t(1) << 16, [&](int64_t begin, int64_t end) {
    bool wrong = false;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t id = int64_t(ids[j]);
      const Slot slot = judge(j);
      wrong |= id != -1 && slot != Slot::kUnused && (slot == Slot::kBad || id < 0 || id >= columns);
    }
    if (wrong) sound = false;
  });
  return sound;
}

// True where the ids of all slots that are used are columns, and their log-probabilities neither NaN nor above highest.
// One call where plain PyTorch takes six, each of them slow when its code has left the caches: 0.25 ms of a step.
bool sparse_teacher_is_sound(Tensor ids, Tensor logprobs, int64_t columns, double highest) {
  const int64_t count = ids.numel();
  STD_TORCH_CHECK(ids.is_contiguous() && logprobs.is_contiguous() && logprobs.numel() == count,
                  "teacher_ids and teacher_logprobs must be contiguous and of one size");
  const auto with_ids = [&](auto judge) {
    const void* data = ids.const_data_ptr();
    return ids.scalar_type() == ScalarType::Long ? all_sound(static_cast<const int64_t*>(data), count, columns, judge)
                                                 : all_sound(static_cast<const int32_t*>(data), count, columns, judge);
  };
  // The bits of 16-bit numbers: sign, exponent, mantissa. Positive ones are in the order of their bits, and so are
  // negative ones, with NaN past -inf.
  const auto bits = [&](uint16_t infinity, uint16_t no_entry, int mantissa_bits, int bias) {
    int exponent;
    const double mantissa = std::frexp(highest, &exponent);  // in [1/2, 1); rounded down
    const uint16_t limit =
        uint16_t((exponent - 1 + bias) << mantissa_bits) + uint16_t((2 * mantissa - 1) * (1 << mantissa_bits));
    const uint16_t* x = static_cast<const uint16_t*>(logprobs.const_data_ptr());
    const uint16_t lowest = 0x8000 | infinity, unused = 0x8000 | no_entry;
    return with_ids([=](int64_t j) {
      if (x[j] < 0x8000) return x[j] > limit ? Slot::kBad : Slot::kUsed;
      return x[j] > lowest ? Slot::kBad : x[j] >= unused ? Slot::kUnused : Slot::kUsed;
    });
  };
  const auto numbers = [&](auto* x) {
    return with_ids([=](int64_t j) {
      if (x[j] <= kNoEntry) return Slot::kUnused;
      return x[j] <= highest ? Slot::kUsed : Slot::kBad;
    });
  };
  switch (dtype_of(logprobs)) {
    case DType::kFloat32: return numbers(static_cast<const float*>(logprobs.const_data_ptr()));
    case DType::kFloat64: return numbers(static_cast<const double*>(logprobs.const_data_ptr()));
    case DType::kBFloat16: return bits(0x7f80, 0x460d, 7, 127);  // 9024, the next to 9000
    case DType::kFloat16: return bits(0x7c00, 0x7065, 10, 15);
  }
  return false;
}

// True where all labels are a column or ignore_index: one call where plain PyTorch takes six.
bool labels_are_sound(Tensor labels, int64_t columns, int64_t ignore_index) {
  STD_TORCH_CHECK(labels.is_contiguous() && labels.scalar_type() == ScalarType::Long,
                  "labels must be contiguous and int64");
  const int64_t* label = static_cast<const int64_t*>(labels.const_data_ptr());
  bool wrong = false;
  const int64_t count = labels.numel();
  for (int64_t i = 0; i < count; ++i) wrong |= label[i] != ignore_index && (label[i] < 0 || label[i] >= columns);
  return !wrong;
}

Tensor dkd_fwd(Tensor student, Tensor teacher, std::optional<Tensor> dstudent, Tensor labels,
               std::optional<Tensor> row_weight, int64_t vocab_size, std::vector<double> numbers,
               std::vector<int64_t> choices) {
  const auto number = named<DkdNumbers>(numbers);
  const auto chosen = named<DkdChoices>(choices);
  DkdArgs args;
  Tensor loss = fill_rows(args, student, dstudent, labels, row_weight, vocab_size, chosen.ignore_index, number.scale);
  args.teacher = teacher_view(teacher, args);
  args.alpha = number.alpha;
  args.beta = number.beta;
  args.temperature = number.temperature;
  args.teacher_temperature = number.teacher_temperature;
  args.scale_by_t_squared = chosen.scale_by_t_squared != 0;
  prepare(args);
  const KernelTable& table = kernels();
  parallel_rows(args.batch * args.length, args.width, [&](int64_t begin, int64_t end) { table.dkd(args, begin, end); });
  return loss;
}

Tensor mse_fwd(Tensor student, Tensor teacher, std::optional<Tensor> dstudent, std::optional<Tensor> labels,
               std::optional<Tensor> row_weight, int64_t vocab_size, std::vector<double> numbers,
               std::vector<int64_t> choices) {
  const auto number = named<MseNumbers>(numbers);
  const auto chosen = named<MseChoices>(choices);
  MseArgs args;
  Tensor loss = fill_rows(args, student, dstudent, labels, row_weight, vocab_size, chosen.ignore_index, number.scale);
  args.teacher = teacher_view(teacher, args);
  args.centered = chosen.centered != 0;
  prepare(args);
  const KernelTable& table = kernels();
  parallel_rows(args.batch * args.length, args.width, [&](int64_t begin, int64_t end) { table.mse(args, begin, end); });
  return loss;
}

Tensor uld_fwd(Tensor student, Tensor teacher, std::optional<Tensor> dstudent, std::optional<Tensor> labels,
               std::optional<Tensor> row_weight, std::optional<Tensor> student_temperature_rows,
               std::optional<Tensor> teacher_temperature_rows, int64_t vocab_size, int64_t teacher_vocab_size,
               std::vector<double> numbers, std::vector<int64_t> choices) {
  const auto number = named<UldNumbers>(numbers);
  const auto chosen = named<UldChoices>(choices);
  UldArgs args;
  Tensor loss = fill_rows(args, student, dstudent, labels, row_weight, vocab_size, chosen.ignore_index, number.scale);
  args.teacher = view(teacher, "teacher", false);
  STD_TORCH_CHECK(teacher_vocab_size >= 1 && has_rows(teacher, args, teacher_vocab_size),
                  "teacher must have the student's rows and at least teacher_vocab_size columns");
  STD_TORCH_CHECK(std::max(vocab_size, teacher_vocab_size) < INT32_MAX, "there are too many columns");
  args.teacher_columns = teacher_vocab_size;
  const int64_t rows = args.batch * args.length;
  args.student_temperature = per_row(student_temperature_rows, sum_dtype(student), rows, "student_temperature_rows");
  args.teacher_temperature = per_row(teacher_temperature_rows, sum_dtype(student), rows, "teacher_temperature_rows");
  args.temperature = number.temperature;
  args.teacher_temperature_value = number.teacher_temperature;
  args.exact = chosen.exact != 0;
  prepare(args);
  const KernelTable& table = kernels();
  parallel_rows(rows, args.width, [&](int64_t begin, int64_t end) { table.uld(args, begin, end); });
  return loss;
}

Tensor topp_count(Tensor logits, std::optional<Tensor> temperature_rows, int64_t vocab_size,
                  std::vector<double> numbers, std::vector<int64_t> choices) {
  STD_TORCH_CHECK(choices.empty(), "the op takes no choices, got ", choices.size());
  const auto number = named<ToppNumbers>(numbers);
  ToppArgs args;
  args.logits = view(logits, "logits", false);
  args.length = logits.size(1);
  args.columns = vocab_size;
  const int64_t rows = logits.size(0) * logits.size(1);
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= logits.size(2) && vocab_size < INT32_MAX,
                  "vocab_size must be in [1, ", logits.size(2), "], got ", vocab_size);
  args.temperature_rows = per_row(temperature_rows, sum_dtype(logits), rows, "temperature_rows");
  args.p = number.p;
  args.temperature = number.temperature;
  Tensor counts = new_tensor(logits, {rows}, ScalarType::Long);
  args.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  const KernelTable& table = kernels();
  parallel_rows(rows, vocab_size, [&](int64_t begin, int64_t end) { table.topp(args, begin, end); });
  return counts;
}

std::string cpu_isa() { return kernels().name; }

}  // namespace
}  // namespace kdk

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("capture_topk_cpu", TORCH_BOX(&kdk::capture_topk));
  m.impl("dense_call_cpu", TORCH_BOX(&kdk::dense_call));
  m.impl("dense_fwd_cpu", TORCH_BOX((&kdk::dense_fwd<kdk::find_divergence, kdk::run_dense_op>)));
  m.impl("dense_loss_cpu", TORCH_BOX(&kdk::dense_loss));
  m.impl("dkd_fwd_cpu", TORCH_BOX(&kdk::dkd_fwd));
  m.impl("mse_fwd_cpu", TORCH_BOX(&kdk::mse_fwd));
  m.impl("pixel_fwd_cpu", TORCH_BOX((&kdk::pixel_fwd<kdk::find_divergence, kdk::run_pixels>)));
  m.impl("shard_fwd_cpu", TORCH_BOX(&kdk::shard_fwd));
  m.impl("token_bwd_cpu", TORCH_BOX(&kdk::token_bwd<kdk::run_tokens>));
  m.impl("token_fwd_cpu", TORCH_BOX(&kdk::token_fwd<kdk::run_tokens>));
  m.impl("topp_count_cpu", TORCH_BOX(&kdk::topp_count));
  m.impl("uld_fwd_cpu", TORCH_BOX(&kdk::uld_fwd));
  m.impl("topk_call_cpu", TORCH_BOX(&kdk::topk_call));
  m.impl("topk_loss_cpu", TORCH_BOX(&kdk::topk_loss));
  m.impl("topk_fwd_cpu", TORCH_BOX((&kdk::topk_fwd<kdk::find_divergence, kdk::run_topk>)));
  m.impl("labels_are_sound", TORCH_BOX(&kdk::labels_are_sound));
  m.impl("sparse_teacher_is_sound", TORCH_BOX(&kdk::sparse_teacher_is_sound));
  m.impl("scale_grad_cpu", TORCH_BOX(&kdk::scale_grad<kdk::run_scale>));
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeImplicitAutograd, m) {
  m.impl("cpu_fault", TORCH_BOX(&kdk::cpu_fault));
  m.impl("cpu_isa", TORCH_BOX(&kdk::cpu_isa));
  m.impl("kept_blocks", TORCH_BOX(&kdk::kept_blocks));
  m.impl("poison_memory", TORCH_BOX(&kdk::poison_memory));
  m.impl("kept_release", TORCH_BOX(&kdk::kept_release));
}

// Explicit: beside fake tensors its fake makes one.
STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("kept_empty", TORCH_BOX(&kdk::kept_empty));
}
