// The dense patterns of one type of student, KDK_STUDENT; included once by every dense_<type>_<isa>.cpp.
#pragma once

#include "dense.h"
#include "dkd.h"
#include "mse.h"
#include "scale.h"

// Rows that 16-bit students bring to fp32 are those of fp32 students, and compiled with them alone.
#ifndef KDK_ROWS_IN_F32
#define KDK_ROWS_IN_F32 extern template
#endif

namespace kdk {
inline namespace KDK_ISA {

KDK_ROWS_IN_F32 RowResult ObjectiveRows<float>::add(const RowNumbers&, const float*, const float*, int64_t, float*,
                                                    float*);
KDK_ROWS_IN_F32 RowResult log_prob_row(const DenseArgs&, const RowNumbers&, const float*, const float*, int64_t,
                                       float*);
KDK_ROWS_IN_F32 double DkdRows<float>::add(double, const float*, const float*, int64_t, float*);
KDK_ROWS_IN_F32 const float* teacher_row(const DenseArgs&, int64_t, double&);

template void dense_rows<KDK_STUDENT>(const DenseArgs&, int64_t, int64_t);
template void dkd_rows<KDK_STUDENT>(const DkdArgs&, int64_t, int64_t);
template void mse_rows<KDK_STUDENT>(const MseArgs&, int64_t, int64_t);
template void scale_rows<KDK_STUDENT>(const ScaleArgs&, int64_t, int64_t);

}  // namespace KDK_ISA
}  // namespace kdk
