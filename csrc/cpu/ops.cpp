// Torch glue of the CPU backend, through the LibTorch stable ABI: checks what would break memory safety, turns tensors
// into plain arguments, and runs rows in parallel on torch's threads. What a caller can get wrong was reported by
// kdkernels.checks before.
#include "dense.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) / 4096 * 4096;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / 4096 * 4096;
  // Advice only: a failure changes nothing.
  if (end > begin && end - begin >= 2 * kHuge)
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

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

// The best instruction set of this machine, or a lower one that KDKERNELS_CPU_ISA asks for.
const KernelTable& choose_kernels() {
  const char* wish = std::getenv("KDKERNELS_CPU_ISA");
  const std::string limit = wish == nullptr ? "avx512" : wish;
  STD_TORCH_CHECK(limit == "avx512" || limit == "avx2" || limit == "baseline",
                  "KDKERNELS_CPU_ISA must be avx512, avx2 or baseline, got ", limit);
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

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16, float16 or float64");
  }
}

LogitsView view(const Tensor& tensor, const char* name, bool written) {
  STD_TORCH_CHECK(tensor.dim() == 3 && (tensor.stride(2) == 1 || tensor.size(2) == 1), name,
                  " must be [B, L, V] with unit stride in the last dimension");
  LogitsView out;
  out.data = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  out.stride_b = tensor.stride(0);
  out.stride_l = tensor.stride(1);
  out.dtype = dtype_of(tensor);
  return out;
}

PerRow per_row(const std::optional<Tensor>& values, ScalarType dtype, int64_t rows, const char* name) {
  if (!values) return {};
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == rows && values->scalar_type() == dtype, name,
                  " must hold one value per row in the dtype of the sums");
  return {values->const_data_ptr(), values->stride(0)};
}

ScalarType sum_dtype(const Tensor& student) {
  return student.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor new_rows(const Tensor& student, std::vector<int64_t> shape) {
  return torch::stable::new_empty(student, shape, sum_dtype(student));
}

// Fills what all row losses share, and allocates the losses.
Tensor fill_rows(RowArgs& args, const Tensor& student, const std::optional<Tensor>& dstudent,
                 const std::optional<Tensor>& labels, const std::optional<Tensor>& row_weight, int64_t vocab_size,
                 int64_t ignore_index, double scale) {
  args.student = view(student, "student", false);
  args.batch = student.size(0);
  args.length = student.size(1);
  args.width = student.size(2);
  args.columns = vocab_size;
  const int64_t rows = args.batch * args.length;
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= args.width, "vocab_size must be in [1, ", args.width, "], got ",
                  vocab_size);
  if (dstudent) {
    args.wants_grad = true;
    args.dstudent = view(*dstudent, "dstudent", true);
    STD_TORCH_CHECK(dstudent->size(0) == args.batch && dstudent->size(1) == args.length &&
                        dstudent->size(2) == args.width && args.dstudent.dtype == args.student.dtype,
                    "dstudent must have the student's shape and dtype");
    if (dstudent->is_contiguous() && args.dstudent.data != args.student.data) {
      const size_t element = args.dstudent.dtype == DType::kFloat64   ? 8
                             : args.dstudent.dtype == DType::kFloat32 ? 4
                                                                      : 2;
      prefer_huge_pages(args.dstudent.data, size_t(rows * args.width) * element);
    }
  }
  if (labels) {
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rows && labels->scalar_type() == ScalarType::Long &&
                        labels->is_contiguous(),
                    "labels must be contiguous int64 [N]");
    args.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  }
  args.ignore_index = ignore_index;
  args.row_weight = per_row(row_weight, sum_dtype(student), rows, "row_weight");
  args.scale = scale;
  Tensor loss = new_rows(student, {rows});
  args.loss = loss.mutable_data_ptr();
  return loss;
}

LogitsView teacher_view(const Tensor& teacher, const RowArgs& args) {
  STD_TORCH_CHECK(teacher.dim() == 3 && teacher.size(0) == args.batch && teacher.size(1) == args.length &&
                      teacher.size(2) >= args.columns,
                  "teacher must have the student's rows and at least vocab_size columns");
  return view(teacher, "teacher", false);
}

// Rows go to the threads in chunks of about this many elements, so that small problems stay on one.
constexpr int64_t kGrainElements = 16384;

template <class Body>
void parallel_rows(int64_t rows, int64_t width, const Body& body) {
  if (rows == 0) return;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(width, 1)), body);
}

// Fills what the objectives with a divergence share.
void fill_objective(ObjectiveArgs& args, const Tensor& student, const std::optional<Tensor>& student_temperature_rows,
                    const std::optional<Tensor>& teacher_temperature_rows, const std::optional<Tensor>& param_rows,
                    const std::string& divergence, double param0, double param1, double temperature,
                    double teacher_temperature, double kd_weight, double ce_weight, double z_loss_weight,
                    double label_smoothing, bool scale_by_t_squared, double student_softcap) {
  STD_TORCH_CHECK(ce_weight == 0 || args.labels != nullptr || args.batch * args.length == 0, "ce_weight needs labels");
  const ScalarType dtype = sum_dtype(student);
  const int64_t rows = args.batch * args.length;
  args.student_temperature = per_row(student_temperature_rows, dtype, rows, "student_temperature_rows");
  args.teacher_temperature = per_row(teacher_temperature_rows, dtype, rows, "teacher_temperature_rows");
  args.param = per_row(param_rows, dtype, rows, "param_rows");
  args.divergence = find_divergence(divergence.c_str(), param0, param1);
  STD_TORCH_CHECK(args.divergence >= 0, "the cpu backend does not know the divergence ", divergence);
  args.param0 = param0;
  args.param1 = param1;
  args.temperature = temperature;
  args.teacher_temperature_value = teacher_temperature;
  args.kd_weight = kd_weight;
  args.ce_weight = ce_weight;
  args.z_loss_weight = z_loss_weight;
  args.label_smoothing = label_smoothing;
  args.scale_by_t_squared = scale_by_t_squared;
  args.student_softcap = student_softcap;
}

Tensor new_stats(ObjectiveArgs& args, const Tensor& student, int64_t columns) {
  Tensor stats = new_rows(student, {args.batch * args.length, columns});
  if (columns > 0 && args.batch * args.length > 0) {
    args.stats = stats.mutable_data_ptr();
    torch::stable::zero_(stats);  // rows that do not count are left out by the kernel
  }
  return stats;
}

std::tuple<Tensor, Tensor> dense_fwd(Tensor student, std::vector<Tensor> teachers, std::optional<Tensor> dstudent,
                                     std::optional<Tensor> labels, std::optional<Tensor> row_weight,
                                     std::optional<Tensor> student_temperature_rows,
                                     std::optional<Tensor> teacher_temperature_rows, std::optional<Tensor> param_rows,
                                     std::optional<Tensor> mixture_weights, std::string divergence, double param0,
                                     double param1, std::string mixture, int64_t vocab_size, int64_t ignore_index,
                                     double scale, double temperature, double teacher_temperature, double kd_weight,
                                     double ce_weight, double z_loss_weight, double label_smoothing,
                                     bool scale_by_t_squared, std::string teacher_form, double student_softcap,
                                     double teacher_softcap, bool standardize, bool stats) {
  DenseArgs args;
  Tensor loss = fill_rows(args, student, dstudent, labels, row_weight, vocab_size, ignore_index, scale);
  const int64_t rows = args.batch * args.length;
  STD_TORCH_CHECK(!teachers.empty() && teachers.size() <= size_t(kMaxTeachers), "1 to 4 teachers, got ",
                  teachers.size());
  STD_TORCH_CHECK(teachers.size() == 1 || mixture_weights, "a mixture needs mixture_weights");
  args.num_teachers = int(teachers.size());
  for (size_t k = 0; k < teachers.size(); ++k) args.teachers[k] = teacher_view(teachers[k], args);
  fill_objective(args, student, student_temperature_rows, teacher_temperature_rows, param_rows, divergence, param0,
                 param1, temperature, teacher_temperature, kd_weight, ce_weight, z_loss_weight, label_smoothing,
                 scale_by_t_squared, student_softcap);
  if (mixture_weights) {
    STD_TORCH_CHECK(mixture_weights->dim() == 2 && mixture_weights->size(0) == rows &&
                        mixture_weights->size(1) == int64_t(teachers.size()) &&
                        mixture_weights->scalar_type() == sum_dtype(student),
                    "mixture_weights must be [N, M] in the dtype of the sums");
    args.mixture_weights = mixture_weights->const_data_ptr();
    args.mixture_stride_n = mixture_weights->stride(0);
    args.mixture_stride_m = mixture_weights->stride(1);
    args.mixture = mixture == "logits" ? Mixture::kLogits : Mixture::kProbs;
  }
  args.teacher_form = teacher_form == "probs" ? TeacherForm::kProbs : TeacherForm::kLogits;
  args.teacher_softcap = teacher_softcap;
  args.standardize = standardize;
  Tensor out_stats = new_stats(args, student, stats ? kStats : 0);
  const KernelTable& table = kernels();
  parallel_rows(rows, args.width, [&](int64_t begin, int64_t end) { table.dense(args, begin, end); });
  return {loss, out_stats};
}

std::tuple<Tensor, Tensor> topk_fwd(Tensor student, Tensor teacher_ids, Tensor teacher_logprobs,
                                    std::optional<Tensor> dstudent, std::optional<Tensor> labels,
                                    std::optional<Tensor> row_weight, std::optional<Tensor> student_temperature_rows,
                                    std::optional<Tensor> teacher_temperature_rows, std::optional<Tensor> param_rows,
                                    std::optional<Tensor> tail_rows, std::string tail, std::string divergence,
                                    double param0, double param1, int64_t vocab_size, int64_t ignore_index,
                                    double scale, double temperature, double teacher_temperature, double kd_weight,
                                    double ce_weight, double z_loss_weight, double label_smoothing,
                                    bool scale_by_t_squared, double student_softcap, bool stats) {
  TopkArgs args;
  Tensor loss = fill_rows(args, student, dstudent, labels, row_weight, vocab_size, ignore_index, scale);
  fill_objective(args, student, student_temperature_rows, teacher_temperature_rows, param_rows, divergence, param0,
                 param1, temperature, teacher_temperature, kd_weight, ce_weight, z_loss_weight, label_smoothing,
                 scale_by_t_squared, student_softcap);
  const int64_t rows = args.batch * args.length;
  for (const Tensor* tensor : {&teacher_ids, &teacher_logprobs})
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == rows && tensor->size(1) == teacher_ids.size(1) &&
                        tensor->is_contiguous(),
                    "teacher_ids and teacher_logprobs must be contiguous [N, K]");
  STD_TORCH_CHECK(teacher_ids.scalar_type() == ScalarType::Int || teacher_ids.scalar_type() == ScalarType::Long,
                  "teacher_ids must be int32 or int64");
  args.entries = teacher_ids.size(1);
  args.ids = teacher_ids.const_data_ptr();
  args.ids_are_64_bits = teacher_ids.scalar_type() == ScalarType::Long;
  args.logprobs.data = const_cast<void*>(teacher_logprobs.const_data_ptr());
  args.logprobs.stride_l = args.entries;
  args.logprobs.dtype = dtype_of(teacher_logprobs);
  args.tail_rows = per_row(tail_rows, sum_dtype(student), rows, "tail_rows");
  static const char* const tails[] = {"bucket", "renormalize", "renormalize_both", "uniform", "drop"};
  const auto found = std::find(std::begin(tails), std::end(tails), tail);
  STD_TORCH_CHECK(found != std::end(tails), "the cpu backend does not know the tail ", tail);
  args.tail = Tail(found - std::begin(tails));
  Tensor out_stats = new_stats(args, student, stats ? kTopkStats : 0);
  const KernelTable& table = kernels();
  parallel_rows(rows, args.width, [&](int64_t begin, int64_t end) { table.topk(args, begin, end); });
  return {loss, out_stats};
}

std::tuple<Tensor, Tensor, Tensor> capture_topk(Tensor teacher, std::optional<Tensor> temperature_rows, int64_t k,
                                                int64_t vocab_size, double temperature) {
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
  args.temperature = temperature;
  Tensor ids = torch::stable::new_empty(teacher, {rows, k}, ScalarType::Int);
  Tensor logprobs = new_rows(teacher, {rows, k}), tail = new_rows(teacher, {rows});
  args.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  args.logprobs = logprobs.mutable_data_ptr();
  args.tail = tail.mutable_data_ptr();
  const KernelTable& table = kernels();
  parallel_rows(rows, vocab_size, [&](int64_t begin, int64_t end) { table.capture(args, begin, end); });
  return {ids, logprobs, tail};
}

Tensor dkd_fwd(Tensor student, Tensor teacher, std::optional<Tensor> dstudent, Tensor labels,
               std::optional<Tensor> row_weight, double alpha, double beta, double temperature,
               double teacher_temperature, int64_t vocab_size, int64_t ignore_index, double scale,
               bool scale_by_t_squared) {
  DkdArgs args;
  Tensor loss = fill_rows(args, student, dstudent, labels, row_weight, vocab_size, ignore_index, scale);
  args.teacher = teacher_view(teacher, args);
  args.alpha = alpha;
  args.beta = beta;
  args.temperature = temperature;
  args.teacher_temperature = teacher_temperature;
  args.scale_by_t_squared = scale_by_t_squared;
  const KernelTable& table = kernels();
  parallel_rows(args.batch * args.length, args.width, [&](int64_t begin, int64_t end) { table.dkd(args, begin, end); });
  return loss;
}

Tensor mse_fwd(Tensor student, Tensor teacher, std::optional<Tensor> dstudent, std::optional<Tensor> labels,
               std::optional<Tensor> row_weight, bool centered, int64_t vocab_size, int64_t ignore_index,
               double scale) {
  MseArgs args;
  Tensor loss = fill_rows(args, student, dstudent, labels, row_weight, vocab_size, ignore_index, scale);
  args.teacher = teacher_view(teacher, args);
  args.centered = centered;
  const KernelTable& table = kernels();
  parallel_rows(args.batch * args.length, args.width, [&](int64_t begin, int64_t end) { table.mse(args, begin, end); });
  return loss;
}

void scale_grad(Tensor grad, Tensor grad_output) {
  ScaleArgs args;
  args.grad = view(grad, "grad", true);
  args.batch = grad.size(0);
  args.length = grad.size(1);
  args.width = grad.size(2);
  const int64_t rows = args.batch * args.length;
  STD_TORCH_CHECK(grad_output.numel() == 1 || grad_output.numel() == rows,
                  "grad_output must hold one value, or one per row");
  STD_TORCH_CHECK(grad_output.dim() <= 1, "grad_output must be 0-d or [N]");
  args.factor = grad_output.const_data_ptr();
  args.factor_dtype = dtype_of(grad_output);
  args.factor_stride = grad_output.dim() == 0 || grad_output.numel() == 1 ? 0 : grad_output.stride(0);
  const KernelTable& table = kernels();
  parallel_rows(rows, args.width, [&](int64_t begin, int64_t end) { table.scale(args, begin, end); });
}

std::string cpu_isa() { return kernels().name; }

}  // namespace
}  // namespace kdk

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("capture_topk_cpu", TORCH_BOX(&kdk::capture_topk));
  m.impl("dense_fwd_cpu", TORCH_BOX(&kdk::dense_fwd));
  m.impl("dkd_fwd_cpu", TORCH_BOX(&kdk::dkd_fwd));
  m.impl("mse_fwd_cpu", TORCH_BOX(&kdk::mse_fwd));
  m.impl("topk_fwd_cpu", TORCH_BOX(&kdk::topk_fwd));
  m.impl("scale_grad_cpu", TORCH_BOX(&kdk::scale_grad));
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeImplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&kdk::cpu_isa)); }
