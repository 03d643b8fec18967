// Packs operands for the products of product.cpp.
#include "product.h"

#include <immintrin.h>

#include <algorithm>

namespace kdk {

namespace {

__mmask16 first(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : __mmask16((1u << std::max<int64_t>(count, 0)) - 1);
}

__m512 widened(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

// Rounds to nearest even; NaN stays NaN.
__m256i to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// Transposes a tile of 16 x 16 numbers of 32 bits.
void transpose(__m512i (&row)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      row[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      row[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  }
  // row[4 g + c] holds column 4 l + c of rows 4 g .. 4 g + 3 in its lane l.
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x88),
                  low2 = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xdd);
    const __m512i high = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x88),
                  high2 = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(low, high, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(low, high, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(low2, high2, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(low2, high2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) row[i] = t[i];
}

}  // namespace

void pack_a_avx512(const ProductArgs& args, int64_t row, int64_t rows, int64_t start, int64_t length, uint16_t* out) {
  const int64_t width = packed_length(length), offset = row * args.a_row + start * args.a_column;
  const uint16_t* bf16 = static_cast<const uint16_t*>(args.a) + offset;
  const float* fp32 = static_cast<const float*>(args.a) + offset;
  // 16 numbers from a place on, 0 where they are not there.
  const auto load = [&](__mmask16 there, int64_t place) {
    return args.a_is_float ? _mm512_maskz_loadu_ps(there, fp32 + place)
                           : widened(_mm256_maskz_loadu_epi16(there, bf16 + place));
  };
  const auto store = [&](int64_t i, int64_t j, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * width + j), to_bf16(x));
  };
  if (args.a_column == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; j += 16) store(i, j, load(first(length - j), i * args.a_row + j));
    }
    return;
  }
  for (int64_t i = 0; i < rows; i += 16) {
    const __mmask16 there = first(rows - i);
    for (int64_t j = 0; j < width; j += 16) {
      __m512i tile[16];
      for (int64_t l = 0; l < 16; ++l) {
        tile[l] = _mm512_setzero_si512();
        if (j + l < length) tile[l] = _mm512_castps_si512(load(there, i + (j + l) * args.a_column));
      }
      transpose(tile);
      for (int64_t l = 0; l < std::min<int64_t>(16, rows - i); ++l) store(i + l, j, _mm512_castsi512_ps(tile[l]));
    }
  }
}

void pack_b_avx512(const ProductArgs& args, int64_t column, int64_t start, int64_t length, uint16_t* out) {
  const int64_t pairs = packed_length(length) / 2, columns = std::min(kPanelColumns, args.n - column);
  uint32_t* pair = reinterpret_cast<uint32_t*>(out);
  const uint16_t* b = args.b + start * args.b_row + column * args.b_column;
  if (args.b_row == 1) {
    for (int64_t j = 0; j < kPanelColumns; j += 16) {
      for (int64_t i = 0; i < pairs; i += 16) {
        __m512i tile[16];
        const int64_t left = length - 2 * i;
        const __mmask32 there = left >= 32 ? __mmask32(~0u) : __mmask32((1u << std::max<int64_t>(left, 0)) - 1);
        for (int64_t l = 0; l < 16; ++l) {
          tile[l] = j + l < columns ? _mm512_maskz_loadu_epi16(there, b + (j + l) * args.b_column + 2 * i)
                                    : _mm512_setzero_si512();
        }
        transpose(tile);
        for (int64_t l = 0; l < 16; ++l) _mm512_storeu_si512(pair + (i + l) * kPanelColumns + j, tile[l]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < pairs; ++i, pair += kPanelColumns) {
    for (int64_t j = 0; j < kPanelColumns; j += 16) {
      const __mmask16 there = first(columns - j);
      __m512i even = _mm512_setzero_si512(), odd = even;
      const uint16_t* from = b + 2 * i * args.b_row + j;
      if (2 * i < length) even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
      if (2 * i + 1 < length) odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from + args.b_row));
      _mm512_storeu_si512(pair + j, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

}  // namespace kdk
