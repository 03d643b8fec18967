/* Memory streams, one share of a block per call: what no kernel that moves the same bytes can beat. */
#include <stddef.h>

#if defined(__AVX__)
#include <immintrin.h>
#define WIDTH 8
#define STORE(p, x) _mm256_stream_ps((p), (x))
#define LOAD(p) _mm256_load_ps(p)
#define FMA(x, y, k) _mm256_add_ps((x), _mm256_mul_ps((y), (k)))
#define SPLAT(k) _mm256_set1_ps(k)
#define FENCE() _mm_sfence()
#else
#define WIDTH 1
#define STORE(p, x) (*(p) = (x))
#define LOAD(p) (*(p))
#define FMA(x, y, k) ((x) + (y) * (k))
#define SPLAT(k) (k)
#define FENCE()
#endif

float read_stream(const float* a, size_t n) {
  float sums[64] = {0};
  for (size_t i = 0; i + 64 <= n; i += 64)
    for (int j = 0; j < 64; ++j) sums[j] += a[i + j];
  for (int j = 1; j < 64; ++j) sums[0] += sums[j];
  return sums[0];
}

void fill_stream(float* a, size_t n) {
  for (size_t i = 0; i < n; ++i) a[i] = 1.0f;
}

void copy_stream(float* a, const float* b, size_t n) {
  for (size_t i = 0; i < n; i += WIDTH) STORE(a + i, LOAD(b + i));
  FENCE();
}

void triad_stream(float* a, const float* b, const float* c, size_t n) {
  for (size_t i = 0; i < n; i += WIDTH) STORE(a + i, FMA(LOAD(b + i), LOAD(c + i), SPLAT(3.0f)));
  FENCE();
}
