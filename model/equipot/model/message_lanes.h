// Vectors of a few numbers, and silu with its derivatives on them.
//
// By name, as compilers vectorise a loop with an exponential in it or do not, as it pleases them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace equipot {

// All columns come in panels of this many: every loop over columns has a length the compiler knows.
constexpr int64_t kPanel = 64;

#ifdef __AVX512F__
constexpr int64_t kVectorBytes = 64;
#else
constexpr int64_t kVectorBytes = 32;
#endif

template <typename T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(T);
};

template <typename T>
using Vector = typename VectorOf<T>::Type;

template <typename T>
inline Vector<T> get(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename T>
inline void put(T* to, Vector<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// Calls f(column) for the vectors of a panel.
template <typename T, typename F>
inline void each_vector(F&& f) {
#pragma GCC unroll 8
  for (int64_t k = 0; k < kPanel; k += VectorOf<T>::lanes) f(k);
}

template <typename T>
inline void add(T* out, const T* in) {
  each_vector<T>([&](int64_t k) { put<T>(out + k, get(out + k) + get(in + k)); });
}

template <typename T>
inline T sum_of(Vector<T> v) {
  T sum = 0;
  for (int64_t k = 0; k < VectorOf<T>::lanes; ++k) sum += v[k];
  return sum;
}

// Between two bounds; what is no number stays none.
inline Vector<float> clamped(Vector<float> x, float least, float most) {
#ifdef __AVX512F__
  return _mm512_min_ps(_mm512_set1_ps(most), _mm512_max_ps(_mm512_set1_ps(least), x));
#else
  const Vector<float> low = Vector<float>{} + least, high = Vector<float>{} + most;
  x = x < low ? low : x;
  return x > high ? high : x;
#endif
}

// 1 / x to 1 ulp, for 1 ≤ x < 2^126. A division takes three times as long as a guess and a step of Newton's.
inline Vector<float> reciprocal(Vector<float> x) {
#ifdef __AVX512F__
  const Vector<float> guess = _mm512_rcp14_ps(x);
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

inline Vector<double> reciprocal(Vector<double> x) { return 1.0 / x; }

// Cephes' polynomial, accurate to 2 ulp.
inline Vector<float> exponential(Vector<float> x) {
  x = clamped(x, -87.0f, 87.0f);
  const Vector<float> shifted = x * 1.44269504088896341f + 12582912.0f;
  const Vector<float> n = shifted - 12582912.0f;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Vector<int32_t> bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  Vector<float> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

inline Vector<double> exponential(Vector<double> x) {
  for (int64_t k = 0; k < VectorOf<double>::lanes; ++k) x[k] = std::exp(x[k]);
  return x;
}

// silu of u, and what its derivatives are made of.
template <typename T>
struct Silu {
  Vector<T> sigmoid, value;

  explicit Silu(Vector<T> u) : sigmoid(reciprocal(T(1) + exponential(-u))), value(u * sigmoid) {}

  Vector<T> slope() const { return value + sigmoid * (T(1) - value); }
  Vector<T> curve() const { return (T(1) - sigmoid) * (T(2) * slope() - value); }
};

}  // namespace equipot
