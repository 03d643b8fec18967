// Torch glue that all devices share, through the LibTorch stable ABI: checks what would break memory safety and turns
// tensors into plain arguments. Mistakes of a caller were reported by kdkernels.checks before.
//
// An op is a template over what a device does with the arguments, so that its long signature stands here once. FIND is
// int (*)(const char* name, double param0, double param1): the device's index of a divergence, or -1.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kdkernels/args.h"
#include "kdkernels/options.h"

namespace kdk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16, float16 or float64");
  }
}

inline LogitsView view(const Tensor& tensor, const char* name, bool written) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK((last == 1 || last == 2) && (tensor.stride(last) == 1 || tensor.size(last) == 1), name,
                  " must be [B, L, V] or [N, V] with unit stride in the last dimension");
  LogitsView out;
  out.data = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  out.stride_b = last == 2 ? tensor.stride(0) : 0;
  out.stride_l = tensor.stride(last - 1);
  out.dtype = dtype_of(tensor);
  return out;
}

// The shape of logits that passed view().
template <class Args>
void fill_shape(Args& args, const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  args.batch = last == 2 ? logits.size(0) : 1;
  args.length = logits.size(last - 1);
  args.width = logits.size(last);
}

// True where logits have the rows of others, and at least this many columns.
template <class Args>
bool has_rows(const Tensor& logits, const Args& args, int64_t columns) {
  const int64_t last = logits.dim() - 1;
  return (last == 2 ? logits.size(0) == args.batch : last == 1 && args.batch == 1) &&
         logits.size(last - 1) == args.length && logits.size(last) >= columns;
}

inline PerRow per_row(const std::optional<Tensor>& values, ScalarType dtype, int64_t rows, const char* name) {
  if (!values) return {};
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == rows && values->scalar_type() == dtype, name,
                  " must hold one value per row in the dtype of the sums");
  return {values->const_data_ptr(), values->stride(0)};
}

inline ScalarType sum_dtype(const Tensor& student) {
  return student.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// While it is set, new tensors on the CPU are filled with bytes of ones, NaN in every floating-point dtype: tests then
// see the elements that a kernel forgets to write. torch's own switch for that
// (deterministic.fill_uninitialized_memory) is beyond the stable ABI.
inline std::atomic<bool>& poisons_memory() {
  static std::atomic<bool> on{false};
  return on;
}
inline void poison(void* data, size_t bytes) {
  if (poisons_memory().load(std::memory_order_relaxed) && bytes > 0) std::memset(data, 0xff, bytes);
}

// An uninitialised tensor on the student's device. Not by torch::stable::new_empty, which looks the op up and packs its
// arguments: where the caches are cold that takes longer than all else here.
inline Tensor new_tensor(const Tensor& student, int64_t dimensions, const int64_t* shape, const int64_t* strides,
                         ScalarType dtype) {
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(student.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(student.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dimensions, shape, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  Tensor tensor(handle);
  if (device_type == aoti_torch_device_type_cpu() && poisons_memory().load(std::memory_order_relaxed)) {
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &type));
    poison(tensor.mutable_data_ptr(), size_t(tensor.numel()) * aoti_torch_dtype_element_size(type));
  }
  return tensor;
}
template <size_t DIMENSIONS>
Tensor new_tensor(const Tensor& student, const int64_t (&shape)[DIMENSIONS], ScalarType dtype) {
  int64_t strides[DIMENSIONS], step = 1;
  for (size_t d = DIMENSIONS; d-- > 0; step *= std::max<int64_t>(shape[d], 1)) strides[d] = step;
  return new_tensor(student, DIMENSIONS, shape, strides, dtype);
}
template <size_t DIMENSIONS>
Tensor new_rows(const Tensor& student, const int64_t (&shape)[DIMENSIONS]) {
  return new_tensor(student, shape, sum_dtype(student));
}

// Numbers or choices of an op by their names.
template <class Names, class T>
Names named(const std::vector<T>& values) {
  static_assert(std::is_trivially_copyable_v<Names> && sizeof(Names) % sizeof(T) == 0);
  constexpr size_t count = sizeof(Names) / sizeof(T);
  STD_TORCH_CHECK(values.size() == count, "the op takes ", count, " numbers or choices here, got ", values.size());
  Names names;
  std::memcpy(&names, values.data(), sizeof(Names));
  return names;
}

// A choice that is the place of a name among some.
template <class Choice>
Choice choice(int64_t code, Choice last, const char* name) {
  STD_TORCH_CHECK(code >= 0 && code <= int64_t(last), "this backend does not know the ", name, " ", code);
  return Choice(code);
}

// Fills the tensors that the rows of every loss have, of which there are args.columns columns.
inline void fill_tensors(RowArgs& args, const Tensor& student, const std::optional<Tensor>& dstudent,
                         const std::optional<Tensor>& labels) {
  args.student = view(student, "student", false);
  fill_shape(args, student);
  const int64_t rows = args.batch * args.length;
  STD_TORCH_CHECK(args.columns >= 1 && args.columns <= args.width, "vocab_size must be in [1, ", args.width, "], got ",
                  args.columns);
  if (dstudent) {
    args.wants_grad = true;
    args.dstudent = view(*dstudent, "dstudent", true);
    STD_TORCH_CHECK(has_rows(*dstudent, args, args.width) && dstudent->size(dstudent->dim() - 1) == args.width &&
                        args.dstudent.dtype == args.student.dtype,
                    "dstudent must have the student's shape and dtype");
  }
  if (labels) {
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rows && labels->scalar_type() == ScalarType::Long &&
                        labels->is_contiguous(),
                    "labels must be contiguous int64 [N]");
    args.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  }
}

// Fills what all row losses share, and allocates the losses.
inline Tensor fill_rows(RowArgs& args, const Tensor& student, const std::optional<Tensor>& dstudent,
                        const std::optional<Tensor>& labels, const std::optional<Tensor>& row_weight,
                        int64_t vocab_size, int64_t ignore_index, double scale) {
  args.columns = vocab_size;
  fill_tensors(args, student, dstudent, labels);
  const int64_t rows = args.batch * args.length;
  args.ignore_index = ignore_index;
  args.row_weight = per_row(row_weight, sum_dtype(student), rows, "row_weight");
  args.scale = scale;
  Tensor loss = new_rows(student, {rows});
  args.loss = loss.mutable_data_ptr();
  return loss;
}

inline void check_labels(const ObjectiveArgs& args) {
  STD_TORCH_CHECK(args.ce_weight == 0 || args.labels != nullptr || args.batch * args.length == 0,
                  "ce_weight needs labels");
}

// Fills what the objectives with a divergence take for each row.
inline void fill_objective_rows(ObjectiveArgs& args, const Tensor& student,
                                const std::optional<Tensor>& student_temperature_rows,
                                const std::optional<Tensor>& teacher_temperature_rows,
                                const std::optional<Tensor>& param_rows, const std::optional<Tensor>& kd_weight_rows,
                                const std::optional<Tensor>& ce_weight_rows,
                                const std::optional<Tensor>& z_loss_weight_rows) {
  check_labels(args);
  const ScalarType dtype = sum_dtype(student);
  const int64_t rows = args.batch * args.length;
  args.student_temperature = per_row(student_temperature_rows, dtype, rows, "student_temperature_rows");
  args.teacher_temperature = per_row(teacher_temperature_rows, dtype, rows, "teacher_temperature_rows");
  args.param = per_row(param_rows, dtype, rows, "param_rows");
  args.kd_weights = per_row(kd_weight_rows, dtype, rows, "kd_weight_rows");
  args.ce_weights = per_row(ce_weight_rows, dtype, rows, "ce_weight_rows");
  args.z_loss_weights = per_row(z_loss_weight_rows, dtype, rows, "z_loss_weight_rows");
}

// Fills what the objectives with a divergence take for all rows alike. FIND is int (*)(const char*, double, double).
inline void fill_objective(ObjectiveArgs& args, int (*find)(const char*, double, double), const std::string& divergence,
                           const ObjectiveNumbers& numbers, const ObjectiveChoices& choices) {
  args.divergence = find(divergence.c_str(), numbers.param0, numbers.param1);
  STD_TORCH_CHECK(args.divergence >= 0, "this backend does not know the divergence ", divergence);
  args.param0 = numbers.param0;
  args.param1 = numbers.param1;
  args.temperature = numbers.temperature;
  args.teacher_temperature_value = numbers.teacher_temperature;
  args.kd_weight = numbers.kd_weight;
  args.ce_weight = numbers.ce_weight;
  args.z_loss_weight = numbers.z_loss_weight;
  args.label_smoothing = numbers.label_smoothing;
  args.scale_by_t_squared = choices.scale_by_t_squared != 0;
  args.student_softcap = numbers.student_softcap;
}

inline void fill_tail(TopkArgs& args, const TopkNumbers& numbers, const TopkChoices& choices) {
  args.tail = choice(choices.tail, Tail::kDrop, "tail");
  args.min_tail = numbers.min_tail;
  args.tail_rounding = numbers.tail_rounding;
}

// Fills a sparse teacher's tensors.
inline void fill_entries(TopkArgs& args, const Tensor& student, const Tensor& teacher_ids,
                         const Tensor& teacher_logprobs, const std::optional<Tensor>& tail_rows) {
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
}

inline Tensor new_stats(ObjectiveArgs& args, const Tensor& student, int64_t columns) {
  Tensor stats = new_rows(student, {args.batch * args.length, columns});
  if (columns > 0 && args.batch * args.length > 0) args.stats = stats.mutable_data_ptr();
  return stats;
}

inline LogitsView teacher_view(const Tensor& teacher, const RowArgs& args, int64_t columns) {
  const LogitsView out = view(teacher, "teacher", false);
  STD_TORCH_CHECK(has_rows(teacher, args, columns),
                  "teacher must have the student's rows and at least vocab_size columns");
  return out;
}
inline LogitsView teacher_view(const Tensor& teacher, const RowArgs& args) {
  return teacher_view(teacher, args, args.columns);
}

// Names of kdkernels.choices.TeacherForm and MIXTURES by their places.
enum class Form { kLogits, kLogProbs, kProbs };
enum class Mixed { kProbs, kLogits, kSigned };
// And of StudentForm.
enum class OfStudent { kLogits, kLogProbs };

inline void fill_dense(DenseArgs& args, const DenseNumbers& numbers, const DenseChoices& choices) {
  const Form form = choice(choices.teacher_form, Form::kProbs, "teacher_form");
  args.teacher_form = form == Form::kProbs ? TeacherForm::kProbs : TeacherForm::kLogits;
  args.teacher_softcap = numbers.teacher_softcap;
  args.standardize = choices.standardize != 0;
  args.student_log_probs = choice(choices.student_form, OfStudent::kLogProbs, "student_form") == OfStudent::kLogProbs;
}

// Fills what is shared by all rows: one number or index for each of ``columns``.
inline void fill_columns(ColumnArgs& args, const Tensor& student, int64_t columns,
                         const std::optional<Tensor>& student_bias, const std::optional<Tensor>& teacher_bias,
                         const std::optional<Tensor>& teacher_columns) {
  const auto of_columns = [&](const std::optional<Tensor>& values, ScalarType dtype, const char* name) -> const void* {
    if (!values) return nullptr;
    STD_TORCH_CHECK(
        values->dim() == 1 && values->size(0) == columns && values->is_contiguous() && values->scalar_type() == dtype,
        name, " must be contiguous and hold one value per column: biases in the dtype of the sums, columns in int32");
    return values->const_data_ptr();
  };
  args.student_bias = of_columns(student_bias, sum_dtype(student), "student_bias");
  args.teacher_bias = of_columns(teacher_bias, sum_dtype(student), "teacher_bias");
  args.teacher_columns = static_cast<const int32_t*>(of_columns(teacher_columns, ScalarType::Int, "teacher_columns"));
}

// RUN is void (*)(const DenseArgs&, const Tensor& student).
template <auto FIND, auto RUN>
std::tuple<Tensor, Tensor> dense_fwd(Tensor student, std::vector<Tensor> teachers, std::optional<Tensor> dstudent,
                                     std::optional<Tensor> labels, std::optional<Tensor> row_weight,
                                     std::optional<Tensor> student_temperature_rows,
                                     std::optional<Tensor> teacher_temperature_rows, std::optional<Tensor> param_rows,
                                     std::optional<Tensor> kd_weight_rows, std::optional<Tensor> ce_weight_rows,
                                     std::optional<Tensor> z_loss_weight_rows, std::optional<Tensor> mixture_weights,
                                     std::optional<Tensor> teacher_lse_rows, std::optional<Tensor> student_bias,
                                     std::optional<Tensor> teacher_bias, std::optional<Tensor> teacher_columns,
                                     std::string divergence, int64_t vocab_size,
                                     std::vector<double> numbers, std::vector<int64_t> choices, bool stats) {
  const auto number = named<DenseNumbers>(numbers);
  const auto chosen = named<DenseChoices>(choices);
  DenseArgs args;
  Tensor loss = fill_rows(args, student, dstudent, labels, row_weight, vocab_size, chosen.ignore_index, number.scale);
  fill_objective(args, FIND, divergence, number, chosen);
  fill_objective_rows(args, student, student_temperature_rows, teacher_temperature_rows, param_rows, kd_weight_rows,
                      ce_weight_rows, z_loss_weight_rows);
  fill_dense(args, number, chosen);
  const int64_t rows = args.batch * args.length;
  args.teacher_lse = per_row(teacher_lse_rows, sum_dtype(student), rows, "teacher_lse_rows");
  STD_TORCH_CHECK(!teachers.empty() && teachers.size() <= size_t(kMaxTeachers), "1 to 4 teachers, got ",
                  teachers.size());
  STD_TORCH_CHECK(teachers.size() == 1 || mixture_weights, "a mixture needs mixture_weights");
  args.num_teachers = int(teachers.size());
  fill_columns(args.of_columns, student, args.columns, student_bias, teacher_bias, teacher_columns);
  const bool changed = student_bias || args.of_columns.change_teacher() || args.student_log_probs;
  STD_TORCH_CHECK(!changed || (teachers.size() == 1 && !args.standardize),
                  "biases, teacher_columns and log-probabilities of a student take one teacher and no standardize");
  for (size_t k = 0; k < teachers.size(); ++k)
    args.teachers[k] = teacher_view(teachers[k], args, teacher_columns ? 1 : args.columns);
  args.of_columns.teacher_width = teachers[0].size(teachers[0].dim() - 1);
  if (mixture_weights) {
    STD_TORCH_CHECK(mixture_weights->dim() == 2 && mixture_weights->size(0) == rows &&
                        mixture_weights->size(1) == int64_t(teachers.size()) &&
                        mixture_weights->scalar_type() == sum_dtype(student),
                    "mixture_weights must be [N, M] in the dtype of the sums");
    args.mixture_weights = mixture_weights->const_data_ptr();
    args.mixture_stride_n = mixture_weights->stride(0);
    args.mixture_stride_m = mixture_weights->stride(1);
    const Mixed mixed = choice(chosen.mixture, Mixed::kSigned, "mixture");
    args.mixture = mixed == Mixed::kProbs ? Mixture::kProbs : Mixture::kLogits;
  }
  Tensor out_stats = new_stats(args, student, stats ? kStats : 0);
  if (rows > 0) RUN(args, student);
  return {loss, out_stats};
}

// A view [B, L, V] of logits whose rows lie next to each other.
inline LogitsView pixel_view(const Tensor& tensor, const char* name, bool written, int64_t& class_stride) {
  STD_TORCH_CHECK(tensor.dim() == 3 && (tensor.stride(1) == 1 || tensor.size(1) == 1), name,
                  " must be [B, L, V] with unit stride in the dimension of the rows");
  LogitsView out;
  out.data = written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  out.stride_b = tensor.stride(0);
  out.stride_l = 1;
  out.dtype = dtype_of(tensor);
  class_stride = tensor.stride(2);
  return out;
}

// RUN is void (*)(const PixelArgs&, const Tensor& student).
template <auto FIND, auto RUN>
std::tuple<Tensor, Tensor> pixel_fwd(Tensor student, Tensor teacher, std::optional<Tensor> dstudent,
                                     std::optional<Tensor> labels, std::optional<Tensor> row_weight,
                                     std::optional<Tensor> student_temperature_rows,
                                     std::optional<Tensor> teacher_temperature_rows, std::optional<Tensor> param_rows,
                                     std::optional<Tensor> kd_weight_rows, std::optional<Tensor> ce_weight_rows,
                                     std::optional<Tensor> z_loss_weight_rows, std::optional<Tensor> student_bias,
                                     std::optional<Tensor> teacher_bias, std::optional<Tensor> teacher_columns,
                                     std::string divergence, int64_t vocab_size, std::vector<double> numbers,
                                     std::vector<int64_t> choices, bool stats) {
  const auto number = named<PixelNumbers>(numbers);
  const auto chosen = named<PixelChoices>(choices);
  PixelArgs args;
  args.student = pixel_view(student, "student", false, args.student_stride);
  fill_shape(args, student);
  args.columns = vocab_size;
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= args.width, "vocab_size must be in [1, ", args.width, "], got ",
                  vocab_size);
  const int64_t rows = args.batch * args.length;
  if (dstudent) {
    args.wants_grad = true;
    args.dstudent = pixel_view(*dstudent, "dstudent", true, args.dstudent_stride);
    STD_TORCH_CHECK(has_rows(*dstudent, args, args.width) && dstudent->size(2) == args.width &&
                        args.dstudent.dtype == args.student.dtype,
                    "dstudent must have the student's shape and dtype");
  }
  if (labels) {
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rows && labels->scalar_type() == ScalarType::Long &&
                        labels->is_contiguous(),
                    "labels must be contiguous int64 [N]");
    args.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  }
  args.ignore_index = chosen.ignore_index;
  args.row_weight = per_row(row_weight, sum_dtype(student), rows, "row_weight");
  args.scale = number.scale;
  Tensor loss = new_rows(student, {rows});
  args.loss = loss.mutable_data_ptr();
  fill_objective(args, FIND, divergence, number, chosen);
  fill_objective_rows(args, student, student_temperature_rows, teacher_temperature_rows, param_rows, kd_weight_rows,
                      ce_weight_rows, z_loss_weight_rows);
  args.teacher_form = choice(chosen.teacher_form, Form::kProbs, "teacher_form") == Form::kProbs ? TeacherForm::kProbs
                                                                                                : TeacherForm::kLogits;
  args.teacher_softcap = number.teacher_softcap;
  args.student_log_probs = choice(chosen.student_form, OfStudent::kLogProbs, "student_form") == OfStudent::kLogProbs;
  fill_columns(args.of_columns, student, args.columns, student_bias, teacher_bias, teacher_columns);
  args.teacher = pixel_view(teacher, "teacher", false, args.teacher_stride);
  STD_TORCH_CHECK(has_rows(teacher, args, teacher_columns ? 1 : args.columns),
                  "teacher must have the student's rows and at least vocab_size columns");
  args.of_columns.teacher_width = teacher.size(2);
  Tensor out_stats = new_stats(args, student, stats ? kStats : 0);
  if (rows > 0) RUN(args, student);
  return {loss, out_stats};
}

// RUN is void (*)(const TopkArgs&, const Tensor& student).
template <auto FIND, auto RUN>
std::tuple<Tensor, Tensor> topk_fwd(Tensor student, Tensor teacher_ids, Tensor teacher_logprobs,
                                    std::optional<Tensor> dstudent, std::optional<Tensor> labels,
                                    std::optional<Tensor> row_weight, std::optional<Tensor> student_temperature_rows,
                                    std::optional<Tensor> teacher_temperature_rows, std::optional<Tensor> param_rows,
                                    std::optional<Tensor> kd_weight_rows, std::optional<Tensor> ce_weight_rows,
                                    std::optional<Tensor> z_loss_weight_rows, std::optional<Tensor> tail_rows,
                                    std::string divergence, int64_t vocab_size, std::vector<double> numbers,
                                    std::vector<int64_t> choices, bool stats) {
  const auto number = named<TopkNumbers>(numbers);
  const auto chosen = named<TopkChoices>(choices);
  TopkArgs args;
  Tensor loss = fill_rows(args, student, dstudent, labels, row_weight, vocab_size, chosen.ignore_index, number.scale);
  fill_objective(args, FIND, divergence, number, chosen);
  fill_objective_rows(args, student, student_temperature_rows, teacher_temperature_rows, param_rows, kd_weight_rows,
                      ce_weight_rows, z_loss_weight_rows);
  fill_entries(args, student, teacher_ids, teacher_logprobs, tail_rows);
  fill_tail(args, number, chosen);
  const int64_t rows = args.batch * args.length;
  Tensor out_stats = new_stats(args, student, stats ? kTopkStats : 0);
  if (rows > 0) RUN(args, student);
  return {loss, out_stats};
}

// Fills what both ops on tokens take, and checks it.
inline TokenArgs token_args(const Tensor& logits, const Tensor& ids, const std::optional<Tensor>& temperature_rows,
                            int64_t vocab_size, const std::vector<double>& numbers,
                            const std::vector<int64_t>& choices) {
  const auto number = named<TokenNumbers>(numbers);
  TokenArgs args;
  args.logits = view(logits, "logits", false);
  fill_shape(args, logits);
  args.columns = vocab_size;
  const int64_t rows = args.batch * args.length;
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= args.width && vocab_size <= INT32_MAX, "vocab_size must be in [1, ",
                  args.width, "], got ", vocab_size);
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == rows && ids.is_contiguous() && ids.scalar_type() == ScalarType::Long,
                  "ids must be contiguous int64 [N, K]");
  args.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  args.entries = ids.size(1);
  args.ignore_index = named<TokenChoices>(choices).ignore_index;
  args.temperature_rows = per_row(temperature_rows, sum_dtype(logits), rows, "temperature_rows");
  args.temperature = number.temperature;
  args.softcap = number.softcap;
  return args;
}

// RUN is void (*)(const TokenArgs&, const Tensor& logits).
template <auto RUN>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_fwd(Tensor logits, Tensor ids,
                                                                     std::optional<Tensor> temperature_rows,
                                                                     int64_t vocab_size, std::vector<double> numbers,
                                                                     std::vector<int64_t> choices) {
  TokenArgs args = token_args(logits, ids, temperature_rows, vocab_size, numbers, choices);
  const auto chosen = named<TokenChoices>(choices);
  const int64_t rows = args.batch * args.length;
  Tensor logprobs = new_rows(logits, {rows, args.entries}), lse = new_rows(logits, {rows});
  Tensor entropy = new_rows(logits, {chosen.entropy != 0 ? rows : 0});
  Tensor tail = new_rows(logits, {chosen.tail_mass != 0 ? rows : 0}), norm = new_rows(logits, {rows, 2});
  Tensor stats = chosen.stats != 0 ? new_rows(logits, {rows, 2 + args.entries}) : new_rows(logits, {0});
  args.logprobs = logprobs.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  args.norm = norm.mutable_data_ptr();
  if (chosen.entropy != 0) args.entropy = entropy.mutable_data_ptr();
  if (chosen.tail_mass != 0) args.tail = tail.mutable_data_ptr();
  if (chosen.stats != 0) args.stats = stats.mutable_data_ptr();
  if (rows > 0) RUN(args, logits);
  return {logprobs, entropy, lse, tail, norm, stats};
}

template <auto RUN>
void token_bwd(Tensor logits, Tensor ids, Tensor norm, std::optional<Tensor> entropy, Tensor dlogprobs,
               std::optional<Tensor> dentropy, Tensor dlogits, std::optional<Tensor> temperature_rows,
               int64_t vocab_size, std::vector<double> numbers, std::vector<int64_t> choices) {
  TokenArgs args = token_args(logits, ids, temperature_rows, vocab_size, numbers, choices);
  const int64_t rows = args.batch * args.length;
  const auto of_rows = [&](const Tensor& tensor, int64_t columns) {
    return tensor.numel() == rows * columns && tensor.is_contiguous() && tensor.scalar_type() == sum_dtype(logits);
  };
  STD_TORCH_CHECK(
      of_rows(norm, 2) && of_rows(dlogprobs, args.entries) && entropy.has_value() == dentropy.has_value() &&
          (!dentropy || (of_rows(*dentropy, 1) && of_rows(*entropy, 1))),
      "norm, dlogprobs, entropy and dentropy must be contiguous, of the rows, and in the dtype of the sums");
  args.dlogits = view(dlogits, "dlogits", true);
  STD_TORCH_CHECK(has_rows(dlogits, args, args.width) && dlogits.size(dlogits.dim() - 1) == args.width &&
                      args.dlogits.dtype == args.logits.dtype,
                  "dlogits must have the shape and dtype of logits");
  args.norm = const_cast<void*>(norm.const_data_ptr());
  args.dlogprobs = dlogprobs.const_data_ptr();
  if (dentropy) {
    args.entropy = const_cast<void*>(entropy->const_data_ptr());
    args.dentropy = dentropy->const_data_ptr();
  }
  if (rows > 0) RUN(args, logits);
}

// RUN is void (*)(const ScaleArgs&, const Tensor& grad).
template <auto RUN>
void scale_grad(Tensor grad, Tensor grad_output) {
  ScaleArgs args;
  args.grad = view(grad, "grad", true);
  fill_shape(args, grad);
  const int64_t rows = args.batch * args.length;
  STD_TORCH_CHECK(grad_output.numel() == 1 || grad_output.numel() == rows,
                  "grad_output must hold one value, or one per row");
  STD_TORCH_CHECK(grad_output.dim() <= 1, "grad_output must be 0-d or [N]");
  args.factor = grad_output.const_data_ptr();
  args.factor_dtype = dtype_of(grad_output);
  args.factor_stride = grad_output.dim() == 0 || grad_output.numel() == 1 ? 0 : grad_output.stride(0);
  if (grad.numel() > 0) RUN(args, grad);
}

}  // namespace kdk
