// The numbers and choices of the ops, in their order: NUMBERS and CHOICES of kdkernels/ops.py, which a test compares.
#pragma once

#include <cstdint>

namespace kdk {

struct ObjectiveNumbers {
  double scale, param0, param1, temperature, teacher_temperature, kd_weight, ce_weight, z_loss_weight, label_smoothing,
      student_softcap;
};
struct ObjectiveChoices {
  int64_t ignore_index, scale_by_t_squared;
};

struct DenseNumbers : ObjectiveNumbers {
  double teacher_softcap;
};
struct DenseChoices : ObjectiveChoices {
  int64_t teacher_form, mixture, standardize, student_form;
};

struct PixelNumbers : ObjectiveNumbers {
  double teacher_softcap;
};
struct PixelChoices : ObjectiveChoices {
  int64_t teacher_form, student_form;
};

struct TopkNumbers : ObjectiveNumbers {
  double min_tail, tail_rounding;
};
struct TopkChoices : ObjectiveChoices {
  int64_t tail;
};

struct DkdNumbers {
  double scale, alpha, beta, temperature, teacher_temperature;
};
struct DkdChoices {
  int64_t ignore_index, scale_by_t_squared;
};

struct MseNumbers {
  double scale;
};
struct MseChoices {
  int64_t ignore_index, centered;
};

struct UldNumbers {
  double scale, temperature, teacher_temperature;
};
struct UldChoices {
  int64_t ignore_index, exact;
};

struct ToppNumbers {
  double p, temperature;
};

struct ShardOptions {
  double param0, param1, student_softcap, teacher_softcap;
};
struct ShardChoices {
  int64_t stats;
};

struct CaptureNumbers {
  double temperature;
};

// Of token_fwd and token_bwd.
struct TokenNumbers {
  double temperature, softcap;
};
struct TokenChoices {
  int64_t ignore_index, entropy, tail_mass, stats;
};

}  // namespace kdk
