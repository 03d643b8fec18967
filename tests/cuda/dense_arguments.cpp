// The dense kernels' argument, built for tests as the CUDA backend builds it: numbers in, the bytes of a DenseLaunch
// out.
#include <cstring>

#include "kdkernels/dense_plan.h"

namespace {

// Everything is 8 bytes wide, so that ctypes lays it out alike.
struct Call {
  int64_t batch, length, columns, width, ignore_index, scale_by_t_squared, probs;
  int64_t student, student_stride_b, student_stride_l, student_dtype;
  int64_t teacher, teacher_stride_b, teacher_stride_l, teacher_dtype;
  int64_t dstudent, dstudent_stride_b, dstudent_stride_l;
  int64_t labels, loss, stats;
  int64_t row_weight, row_weight_stride, student_temperature, student_temperature_stride;
  int64_t teacher_temperature, teacher_temperature_stride, param, param_stride;
  int64_t kd_weights, kd_weights_stride, ce_weights, ce_weights_stride, z_loss_weights, z_loss_weights_stride;
  double scale, param0, param1, temperature, teacher_temperature_value;
  double kd_weight, ce_weight, z_loss_weight, label_smoothing, student_softcap, teacher_softcap;
  int64_t shared_per_block, shared_per_multiprocessor, cluster, multiprocessors;
  // Filled in here.
  int64_t held, source, plan_cluster, threads, stages, shared_bytes;
};

void* pointer(int64_t address) { return reinterpret_cast<void*>(address); }
kdk::PerRow per_row(int64_t address, int64_t stride) { return {pointer(address), stride}; }

}  // namespace

extern "C" int64_t dense_launch_bytes() { return sizeof(kdk::cuda::DenseLaunch); }

extern "C" int64_t dense_launch(Call* c, const char* divergence, void* out) {
  using namespace kdk;
  DenseArgs a;
  a.batch = c->batch, a.length = c->length, a.columns = c->columns, a.width = c->width;
  a.student = {pointer(c->student), c->student_stride_b, c->student_stride_l, DType(c->student_dtype)};
  a.dstudent = {pointer(c->dstudent), c->dstudent_stride_b, c->dstudent_stride_l, DType(c->student_dtype)};
  a.teachers[0] = {pointer(c->teacher), c->teacher_stride_b, c->teacher_stride_l, DType(c->teacher_dtype)};
  a.teacher_form = c->probs ? TeacherForm::kProbs : TeacherForm::kLogits;
  a.wants_grad = c->dstudent != 0;
  a.labels = static_cast<const int64_t*>(pointer(c->labels));
  a.ignore_index = c->ignore_index;
  a.row_weight = per_row(c->row_weight, c->row_weight_stride);
  a.scale = c->scale;
  a.loss = pointer(c->loss);
  a.student_temperature = per_row(c->student_temperature, c->student_temperature_stride);
  a.teacher_temperature = per_row(c->teacher_temperature, c->teacher_temperature_stride);
  a.param = per_row(c->param, c->param_stride);
  a.kd_weights = per_row(c->kd_weights, c->kd_weights_stride);
  a.ce_weights = per_row(c->ce_weights, c->ce_weights_stride);
  a.z_loss_weights = per_row(c->z_loss_weights, c->z_loss_weights_stride);
  a.divergence = cuda::find_divergence(divergence, c->param0, c->param1);
  if (a.divergence < 0) return -1;
  a.param0 = c->param0, a.param1 = c->param1;
  a.temperature = c->temperature, a.teacher_temperature_value = c->teacher_temperature_value;
  a.kd_weight = c->kd_weight, a.ce_weight = c->ce_weight, a.z_loss_weight = c->z_loss_weight;
  a.label_smoothing = c->label_smoothing;
  a.scale_by_t_squared = c->scale_by_t_squared != 0;
  a.student_softcap = c->student_softcap, a.teacher_softcap = c->teacher_softcap;
  a.stats = pointer(c->stats);
  const cuda::Limits limits{int(c->shared_per_block), int(c->shared_per_multiprocessor), int(c->cluster)};
  const cuda::DenseLaunch launch = cuda::prepare_dense(a, limits, int(c->multiprocessors));
  c->held = int64_t(launch.plan.held), c->source = int64_t(launch.plan.source);
  c->plan_cluster = launch.plan.cluster, c->threads = launch.plan.threads, c->stages = launch.plan.stages;
  c->shared_bytes = launch.plan.shared_bytes;
  std::memcpy(out, &launch, sizeof(launch));
  return 0;
}
