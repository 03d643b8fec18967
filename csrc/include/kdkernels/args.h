// The arguments of every pattern as the kernels of all devices see them: plain data, no torch.
#pragma once

#include <cstdint>

namespace kdk {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };
enum class TeacherForm { kLogits, kProbs };
enum class Mixture { kNone, kProbs, kLogits };
// The treatment of the mass outside a sparse teacher's entries; in the order of kdkernels.choices.Tail.
enum class Tail { kBucket, kRenormalize, kRenormalizeBoth, kUniform, kDrop };

// A sparse teacher's log-probability that is no larger marks a slot that is unused, as an id of -1 does.
constexpr double kNoEntry = -9000;
// A token whose column is in another shard of the vocabulary, as kdkernels.ops.ELSEWHERE: its gradient counts in the
// sum that all columns take part of.
constexpr int64_t kElsewhere = -(int64_t(1) << 62) - 1;

constexpr int kMaxTeachers = 4;
constexpr int kStats = 9, kTopkStats = 6;

// Logits [B, L, V] with unit stride in V.
struct LogitsView {
  void* data = nullptr;
  int64_t stride_b = 0, stride_l = 0;
  DType dtype = DType::kFloat32;
};

// One value per row, fp32 or fp64 as the student's sums; null means the scalar.
struct PerRow {
  const void* data = nullptr;
  int64_t stride = 0;
};

struct RowArgs {
  int64_t batch = 0, length = 0;
  int64_t columns = 0;  // V: the real columns
  int64_t width = 0;    // the student's columns, padding included
  LogitsView student, dstudent;
  bool wants_grad = false;
  const int64_t* labels = nullptr;
  int64_t ignore_index = -100;
  PerRow row_weight;
  double scale = 1;
  void* loss = nullptr;  // [N]
};

// A divergence with cross entropy and z-loss.
struct ObjectiveArgs : RowArgs {
  PerRow student_temperature, teacher_temperature, param;
  PerRow kd_weights, ce_weights, z_loss_weights;  // times the weight of all rows
  PerRow teacher_lse;                             // of a dense teacher that is normalised elsewhere; null: here
  int divergence = 0;                             // index into divergence_table.h
  double param0 = 0, param1 = 0;
  double temperature = 1, teacher_temperature_value = 1;
  double kd_weight = 1, ce_weight = 0, z_loss_weight = 0, label_smoothing = 0;
  bool scale_by_t_squared = true;
  double student_softcap = 0;
  void* stats = nullptr;  // [N, columns] or null

  // True if the cross entropy is asked for: by its weight, or by statistics where there are labels.
  bool values_ce(double weight) const { return weight != 0 || (stats != nullptr && labels != nullptr); }
  // True if a number that is not the weight of the whole row may be another one in the next row.
  bool numbers_differ() const {
    return student_temperature.data != nullptr || teacher_temperature.data != nullptr || param.data != nullptr ||
           kd_weights.data != nullptr || ce_weights.data != nullptr || z_loss_weights.data != nullptr ||
           teacher_lse.data != nullptr;
  }
};

// Numbers that all rows share, one for each column, in the type of the sums; and the teacher's column that each column
// is compared with, -1 for none.
struct ColumnArgs {
  const void *student_bias = nullptr, *teacher_bias = nullptr;
  const int32_t* teacher_columns = nullptr;
  int64_t teacher_width = 0;
  bool change_teacher() const { return teacher_bias != nullptr || teacher_columns != nullptr; }
};

struct DenseArgs : ObjectiveArgs {
  LogitsView teachers[kMaxTeachers];
  int num_teachers = 1;
  const void* mixture_weights = nullptr;
  int64_t mixture_stride_n = 0, mixture_stride_m = 0;
  Mixture mixture = Mixture::kNone;
  TeacherForm teacher_form = TeacherForm::kLogits;
  double teacher_softcap = 0;
  bool standardize = false;
  bool student_log_probs = false;
  ColumnArgs of_columns;
};

// As DenseArgs with one teacher, for logits whose rows lie next to each other: the stride of a row is 1, and that of a
// class is given.
struct PixelArgs : ObjectiveArgs {
  LogitsView teacher;
  int64_t student_stride = 0, teacher_stride = 0, dstudent_stride = 0;  // from class to class
  TeacherForm teacher_form = TeacherForm::kLogits;
  double teacher_softcap = 0;
  bool student_log_probs = false;
  ColumnArgs of_columns;
};

struct TopkArgs : ObjectiveArgs {
  const void* ids = nullptr;  // [N, K] int32 or int64
  bool ids_are_64_bits = false;
  LogitsView logprobs;                     // [N, K]; stride_l from row to row
  int64_t entries = 0;                     // K
  PerRow tail_rows;                        // log of the teacher's mass outside the entries; null: what is missing to 1
  double min_tail = 0, tail_rounding = 0;  // that mass is at least min_tail + tail_rounding * sum p |log p|
  Tail tail = Tail::kBucket;
};

struct CaptureArgs {
  int64_t length = 0;   // rows of a batch, as in RowArgs
  int64_t columns = 0;  // V
  LogitsView teacher;
  int64_t k = 0;
  PerRow temperature_rows;
  double temperature = 1;
  int32_t* ids = nullptr;                     // [N, K]
  void *logprobs = nullptr, *tail = nullptr;  // [N, K], [N]
};

// Log-probabilities of given tokens, or where there is dlogits the gradient of what was made of them.
struct TokenArgs {
  int64_t batch = 0, length = 0;
  int64_t columns = 0;  // V: the real columns
  int64_t width = 0;    // of the logits, padding included
  LogitsView logits, dlogits;
  const int64_t* ids = nullptr;  // [N, K]; -1 and ignore_index do not count
  int64_t entries = 0, ignore_index = -100;
  PerRow temperature_rows;
  double temperature = 1, softcap = 0;
  void *logprobs = nullptr, *lse = nullptr;  // [N, K], [N]
  void *entropy = nullptr, *tail = nullptr;  // [N], or null
  void* stats = nullptr;                     // [N, 2 + K], or null
  void* norm = nullptr;                      // [N, 2]: a logit, and the sum of exponentials relative to it
  const void *dlogprobs = nullptr, *dentropy = nullptr;
};

// Of a row, in the dtype of the sums: the softmax of both models over all shards, log q = (s - top) unit - log z, where
// a unit of 0 marks a row that is not read, and the gradient
//   of_score score - of_q q + of_p p + of_hard e^(s - top - hard_log_z) + constant, and at_label more at the label.
template <class C>
struct ShardNumbers {
  C student_unit, student_top, student_log_z, teacher_unit, teacher_top, teacher_log_z;
  C of_score, of_q, of_p, of_hard, hard_log_z, constant, at_label;
};

// Some of the columns of a divergence's rows: their sums, or where there is dstudent their gradient.
struct ShardArgs {
  int64_t batch = 0, length = 0;
  int64_t columns = 0;  // V: the real columns
  int64_t width = 0;    // of the student, padding included
  LogitsView student, teacher, dstudent;
  const int64_t* labels = nullptr;  // [N]; a column, or -1
  const void* numbers = nullptr;    // ShardNumbers [N]
  PerRow param;
  int divergence = 0;  // index into divergence_table.h
  double param0 = 0, param1 = 0, student_softcap = 0, teacher_softcap = 0;
  void* sums = nullptr;  // [N, 2]: of values and of scores, or null; [N, 7] with those of Distances
  bool stats = false;
};

struct DkdArgs : RowArgs {
  LogitsView teacher;
  double alpha = 1, beta = 1, temperature = 1, teacher_temperature = 1;
  bool scale_by_t_squared = true;
};

struct MseArgs : RowArgs {
  LogitsView teacher;
  bool centered = false;
};

// Probabilities in order, of vocabularies that may differ.
struct UldArgs : RowArgs {
  LogitsView teacher;
  int64_t teacher_columns = 0;
  PerRow student_temperature, teacher_temperature;
  double temperature = 1, teacher_temperature_value = 1;
  bool exact = false;  // sorts what is not counted by its bits
};

struct ToppArgs {
  int64_t length = 0;   // rows of a batch, as in RowArgs
  int64_t columns = 0;  // V
  LogitsView logits;
  PerRow temperature_rows;
  double p = 1, temperature = 1;
  int64_t* counts = nullptr;  // [N]
};

struct ScaleArgs {
  int64_t batch = 0, length = 0, width = 0;
  LogitsView grad;
  const void* factor = nullptr;
  int64_t factor_stride = 0;  // 0: one factor for all rows
  DType factor_dtype = DType::kFloat32;
};

}  // namespace kdk
