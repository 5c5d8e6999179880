// Matrix products whose every row has the same bits, whatever the other rows are and how many.
//
// An element of the product is one chain of fused multiply-adds in the order of the inner index, for any number of
// rows and threads. General libraries choose the order by the number of rows, so a structure's energy depends on who
// shares its batch. The right factor is packed by its reader once: panels of columns, each (inner, panel) contiguous.
#pragma once

#include <algorithm>
#include <cstdint>

namespace equipot {

// Columns of a panel fill two registers; so many rows of them and of their factors fill the others.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
constexpr int kRows = 14;
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32;
constexpr int kRows = 6;
#else
constexpr int64_t kVectorBytes = 16;
constexpr int kRows = 6;
#endif

// Measured: a panel of so many inner indices stays in the first-level cache beside its rows.
constexpr int64_t kInner = 256;

template <typename T>
struct Simd {
  typedef T V __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int64_t kLanes = kVectorBytes / sizeof(T), kPanel = 2 * kLanes;
  static const V& at(const T* p) { return *reinterpret_cast<const V*>(p); }
  static V& at(T* p) { return *reinterpret_cast<V*>(p); }
};

template <typename T>
int64_t padded(int64_t width) {
  return (width + Simd<T>::kPanel - 1) / Simd<T>::kPanel * Simd<T>::kPanel;
}

template <typename T, int M>
void tile(int64_t inner, const T* a, int64_t lda, const T* b, T* c, int64_t ldc, const T* bias, bool add) {
  using S = Simd<T>;
  typename S::V s[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < 2; ++v) {
      s[m][v] = typename S::V{};
      if (add) s[m][v] = S::at(c + m * ldc + v * S::kLanes);
      if (bias) s[m][v] += S::at(bias + v * S::kLanes);
    }
  }
  for (int64_t k = 0; k < inner; ++k, b += S::kPanel) {
    const typename S::V b0 = S::at(b), b1 = S::at(b + S::kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const T x = a[m * lda + k];
      s[m][0] += x * b0;
      s[m][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    S::at(c + m * ldc) = s[m][0];
    S::at(c + m * ldc + S::kLanes) = s[m][1];
  }
}

template <typename T, int M = kRows>
void part_tile(
    int rows, int64_t inner, const T* a, int64_t lda, const T* b, T* c, int64_t ldc, const T* bias, bool add) {
  if (rows == M) return tile<T, M>(inner, a, lda, b, c, ldc, bias, add);
  if constexpr (M > 1) part_tile<T, M - 1>(rows, inner, a, lda, b, c, ldc, bias, add);
}

// c (rows, columns) = [c +] a (rows, inner) × packed b [+ bias]; columns are padded, ldc and lda are too.
template <typename T>
void product(
    int64_t rows, int64_t columns, int64_t inner, const T* a, int64_t lda, const T* b, T* c, int64_t ldc,
    const T* bias = nullptr, bool add = false) {
  constexpr int64_t kPanel = Simd<T>::kPanel;
  for (int64_t k = 0; k < inner; k += kInner) {
    const int64_t count = std::min(kInner, inner - k);
    for (int64_t j = 0; j < columns; j += kPanel) {
      const T* panel = b + j * inner + k * kPanel;
      for (int64_t i = 0; i < rows; i += kRows) {
        const int some = static_cast<int>(std::min<int64_t>(kRows, rows - i));
        part_tile<T>(
            some, count, a + i * lda + k, lda, panel, c + i * ldc + j, ldc, bias && k == 0 ? bias + j : nullptr,
            add || k > 0);
      }
    }
  }
}

}  // namespace equipot
