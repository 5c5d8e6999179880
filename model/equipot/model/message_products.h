// Matrix products of tiles: torch's own micro-kernels where the processor has them, torch.mm elsewhere.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/native/cpu/utils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "message_lanes.h"

namespace equipot {

using at::Tensor;

// Rows of one product. 64 × 64 numbers of the result stay in a first-level cache until they are read.
constexpr int64_t kRows = 64;

// What is computed in where operands of products are stored as S.
template <typename S>
using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename S>
constexpr bool in_pairs = std::is_same_v<S, at::BFloat16>;

inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Whether this processor has micro-kernels for S; asked once, by trying.
template <typename S>
bool has_microkernel() {
  if constexpr (std::is_same_v<S, double>) {
    return false;
  } else {
    static const bool has = [] {
      const S a[4] = {}, b[4] = {};
      float c[4];
      try {
        at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, a, b, c, in_pairs<S>);
        at::native::cpublas::brgemm_release(in_pairs<S>);
        return true;
      } catch (const std::exception&) {
        return false;
      }
    }();
    return has;
  }
}

// Gives back what micro-kernels hold of a core: its tile registers, where it has any.
template <typename S>
void release_core() {
  if constexpr (in_pairs<S>) at::native::cpublas::brgemm_release(true);
}

// c (m, n) = a (m, k) · b (k, n), added to c if so asked; b in pairs of rows where S comes in pairs.
// Rows of a beyond m may be read, and of c be written, up to a multiple of 8: a kernel is made for every m.
template <typename S>
void product(const S* a, int64_t lda, int64_t m, int64_t k, const S* b, int64_t ldb, int64_t n, Wide<S>* c,
             int64_t ldc, bool add) {
  if constexpr (!std::is_same_v<S, double>) {
    if (has_microkernel<S>()) {
      at::native::cpublas::brgemm(up_to(m, 8), n, k, lda, ldb, ldc, add, a, b, c, in_pairs<S>);
      return;
    }
  }
  if constexpr (!in_pairs<S>) {
    const auto view = [](const S* data, int64_t rows, int64_t columns, int64_t ld) {
      return at::from_blob(const_cast<S*>(data), {rows, columns}, {ld, 1}, c10::CppTypeToScalarType<S>::value);
    };
    Tensor out = view(c, m, n, ldc);
    const Tensor left = view(a, m, k, lda), right = view(b, k, n, ldb);
    if (add) {
      out.addmm_(left, right);
    } else {
      at::mm_out(out, left, right);
    }
  }
}

inline void store(float* to, const float* from) { std::memcpy(to, from, kPanel * sizeof(float)); }
inline void store(double* to, const double* from) { std::memcpy(to, from, kPanel * sizeof(double)); }

// Rounds to the nearest, to even from the middle; what is no number stays none.
inline void store(at::BFloat16* to, const float* from) {
  uint16_t* bits = reinterpret_cast<uint16_t*>(to);
  const uint32_t* in = reinterpret_cast<const uint32_t*>(from);
#ifdef __AVX512BF16__
  for (int64_t k = 0; k < kPanel; k += 16) {
    const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + k));
    std::memcpy(bits + k, &narrow, sizeof narrow);
  }
  return;
#endif
#pragma omp simd
  for (int64_t k = 0; k < kPanel; ++k) {
    const uint32_t x = in[k], rounded = (x + 0x7FFFu + ((x >> 16) & 1u)) >> 16;
    bits[k] = static_cast<uint16_t>((x & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
}

inline const float* load(const float* from, float*) { return from; }
inline const double* load(const double* from, double*) { return from; }

inline const float* load(const at::BFloat16* from, float* room) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
  uint32_t* out = reinterpret_cast<uint32_t*>(room);
#pragma omp simd
  for (int64_t k = 0; k < kPanel; ++k) out[k] = static_cast<uint32_t>(bits[k]) << 16;
  return room;
}

template <typename S>
void transpose(int64_t rows, int64_t columns, const S* from, int64_t ld_from, S* to, int64_t ld_to) {
  if constexpr (in_pairs<S>) {
    at::native::utils::transpose<uint16_t>(rows, columns, reinterpret_cast<const uint16_t*>(from), ld_from,
                                           reinterpret_cast<uint16_t*>(to), ld_to);
  } else {
    at::native::utils::transpose<S>(rows, columns, from, ld_from, to, ld_to);
  }
}

// Rows of operands of products, and no power of two apart: those would share a few sets of the caches.
template <typename S>
struct Operand {
  Tensor data;
  int64_t ld;
  S* begin;

  Operand(int64_t rows, int64_t columns)
      : data(at::zeros({up_to(rows, kRows) + 8, columns + 64 / int64_t(sizeof(S))},
                       c10::CppTypeToScalarType<S>::value)),
        ld(data.size(1)), begin(data.mutable_data_ptr<S>()) {}

  S* row(int64_t r) const { return begin + r * ld; }
};

// b (k, n) of a product in panels of columns, zeros where the last one has none.
template <typename S>
struct Packed {
  Tensor data;
  int64_t k = 0;

  // Of nothing, where no product needs it.
  Packed() = default;

  // From w (rows, columns), or its transpose; k and n are the padded sizes.
  Packed(const Tensor& w, bool transposed, int64_t k_padded, int64_t n_padded) : k(k_padded) {
    const Tensor b = w.contiguous();
    data = at::zeros({n_padded / kPanel, k, kPanel}, b.options());
    const S* from = b.const_data_ptr<S>();
    S* to = data.template mutable_data_ptr<S>();
    const int64_t rows = b.size(transposed ? 1 : 0), columns = b.size(transposed ? 0 : 1), ld = b.size(1);
    // A few lines at once, and no transpose of all: that would be a tensor as large as the weights.
    S lines[kLines * kPanel];
    for (int64_t c = 0; c < columns; c += kPanel, to += k * kPanel) {
      const int64_t n = std::min(kPanel, columns - c);
      for (int64_t r = 0; r < rows; r += kLines) {
        const int64_t m = std::min(kLines, rows - r);
        if (transposed) {
          transpose(n, m, from + c * ld + r, ld, lines, kPanel);
        } else {
          for (int64_t i = 0; i < m; ++i) std::memcpy(lines + i * kPanel, from + (r + i) * ld + c, n * sizeof(S));
        }
        for (int64_t i = 0; i < m; ++i) put_line(to, r + i, lines + i * kPanel, n);
      }
    }
  }

  static constexpr int64_t kLines = 32;

  static void put_line(S* panel, int64_t r, const S* line, int64_t n) {
    if constexpr (in_pairs<S>) {
      S* pair = panel + (r / 2) * 2 * kPanel + r % 2;
      for (int64_t i = 0; i < n; ++i) pair[2 * i] = line[i];
    } else {
      std::memcpy(panel + r * kPanel, line, n * sizeof(S));
    }
  }

  const S* panel(int64_t p) const {
    return data.defined() ? data.template const_data_ptr<S>() + p * k * kPanel : nullptr;
  }
};

}  // namespace equipot
