// What the sweeps of message_kernels.cpp do on every block: gather, activate, sum up.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kColumnsPerThread = 128;

// Cephes' polynomial, accurate to 2 ulp; written so that compilers vectorise it, which they do not do to expf.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

inline double exponential(double x) { return std::exp(x); }

template <typename T>
inline T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

template <typename T>
const T* pointer(const Tensor& t) {
  return t.const_data_ptr<T>();
}

template <typename T>
const T* pointer(const Maybe& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

template <typename T>
T* writable(Maybe& t) {
  return t ? t->mutable_data_ptr<T>() : nullptr;
}

Maybe contiguous(const Maybe& t) { return t ? Maybe(t->contiguous()) : Maybe(); }

Tensor rows(const Tensor& t, int64_t start, int64_t count) { return t.narrow(0, start, count); }

template <typename F>
void by_columns(int64_t width, F&& work) {
  at::parallel_for(0, width, kColumnsPerThread, work);
}

// The inputs, and the columns that all sweeps read.
template <typename T>
struct Graph {
  typedef T Vector __attribute__((vector_size(32)));
  static constexpr int64_t kLanes = 32 / sizeof(T), kTile = 4 * kLanes;

  Tensor at_receiver, at_sender, radial, envelope, w_radial_t, w_radial, w_down, b_down, senders, receivers;
  int64_t width, radials, longest = 0;
  at::IntArrayRef bounds;
  const T *p, *q, *rho, *env, *wr, *bias;
  const int64_t *from, *to;

  Graph(at::TensorList x, const Tensor& s, const Tensor& r, at::IntArrayRef b)
      : at_receiver(x[0].contiguous()), at_sender(x[1].contiguous()), radial(x[2].contiguous()),
        envelope(x[3].contiguous()), w_radial_t(x[4].t().contiguous()), w_radial(x[4].contiguous()),
        w_down(x[5].contiguous()), b_down(x[6].contiguous()), senders(s.contiguous()),
        receivers(r.contiguous()), width(x[0].size(1)), radials(x[2].size(1)), bounds(b) {
    p = pointer<T>(at_receiver), q = pointer<T>(at_sender), rho = pointer<T>(radial);
    env = pointer<T>(envelope), wr = pointer<T>(w_radial_t), bias = pointer<T>(b_down);
    from = senders.const_data_ptr<int64_t>(), to = receivers.const_data_ptr<int64_t>();
    for (size_t k = 0; k + 1 < bounds.size(); ++k) longest = std::max(longest, bounds[k + 1] - bounds[k]);
  }

  Tensor room(int64_t per_edge = 1) const { return at::empty({per_edge * longest, width}, w_down.options()); }

  // Calls f(edge, column, count, z) for tiles of one edge's pre-activations; `more` adds to z where given.
  template <typename F>
  void each_z(int64_t start, int64_t stop, int64_t c0, int64_t c1, F&& f) const {
    T z[kTile];
    for (int64_t c = c0; c < c1; c += kTile) {
      const int64_t n = std::min(kTile, c1 - c);
      for (int64_t e = start; e < stop; ++e) {
        const T* pi = p + to[e] * width + c;
        const T* qj = q + from[e] * width + c;
        affine(pi, qj, rho + e * radials, c, n, z);
        f(e, c, n, z);
      }
    }
  }

  // out = a + b + W_r ρ for n columns from c; a and b may be null.
  void affine(const T* a, const T* b, const T* r, int64_t c, int64_t n, T* out) const {
    if (n == kTile) {
      whole_tile(a, b, r, wr + c, out);
    } else {
      part_of_tile(a, b, r, wr + c, n, out);
    }
  }

  // Vectors by name: left to itself, the compiler keeps a tile's sums in memory, at more than twice the time.
  void whole_tile(const T* a, const T* b, const T* r, const T* w, T* out) const {
    Vector s0 = load(a, 0) + load(b, 0), s1 = load(a, 1) + load(b, 1);
    Vector s2 = load(a, 2) + load(b, 2), s3 = load(a, 3) + load(b, 3);
    for (int64_t j = 0; r && j < radials; ++j, w += width) {
      const T x = r[j];
      s0 += x * load(w, 0), s1 += x * load(w, 1), s2 += x * load(w, 2), s3 += x * load(w, 3);
    }
    const Vector all[4] = {s0, s1, s2, s3};
    std::memcpy(out, all, sizeof all);
  }

  static Vector load(const T* from, int64_t k) {
    Vector v = {};
    if (from) std::memcpy(&v, from + k * kLanes, sizeof v);
    return v;
  }

  void part_of_tile(const T* a, const T* b, const T* r, const T* w, int64_t n, T* out) const {
    for (int64_t k = 0; k < n; ++k) out[k] = (a ? a[k] : T(0)) + (b ? b[k] : T(0));
    for (int64_t j = 0; r && j < radials; ++j, w += width) {
      for (int64_t k = 0; k < n; ++k) out[k] += r[j] * w[k];
    }
  }
};

// What reverse sweeps sum up; undefined where not wanted.
template <typename T>
struct Sums {
  Maybe at_receiver, at_sender, radial, envelope, w_radial, w_down, b_down;

  Sums(const Graph<T>& g, const std::vector<bool>& wanted) {
    const auto zeros = [](bool want, const Tensor& like) { return want ? Maybe(at::zeros_like(like)) : Maybe(); };
    at_receiver = zeros(wanted[0], g.at_receiver), at_sender = zeros(wanted[1], g.at_sender);
    radial = zeros(wanted[2], g.radial), envelope = zeros(wanted[3], g.envelope);
    w_radial = zeros(wanted[4], g.w_radial);
    w_down = zeros(wanted[5], g.w_down), b_down = zeros(wanted[5], g.b_down);
  }

  void down(const Tensor& g_y, const Tensor& hidden) {
    if (w_down) w_down->addmm_(g_y.t(), hidden);
  }

  void first(const Graph<T>& g, int64_t start, int64_t n, const Tensor& g_z) {
    if (radial) {
      Tensor out = rows(*radial, start, n);
      at::mm_out(out, g_z, g.w_radial);
    }
    if (w_radial) w_radial->addmm_(g_z.t(), rows(g.radial, start, n));
  }

  void scatter(const Graph<T>& g, int64_t e, int64_t c, int64_t n, const T* g_z) {
    if (at_receiver) add(at_receiver->template mutable_data_ptr<T>() + g.to[e] * g.width + c, g_z, n);
    if (at_sender) add(at_sender->template mutable_data_ptr<T>() + g.from[e] * g.width + c, g_z, n);
  }

  static void add(T* out, const T* in, int64_t n) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] += in[k];
  }

  std::vector<Maybe> result() { return {at_receiver, at_sender, radial, envelope, w_radial, w_down, b_down}; }
};

// Sums over columns that several threads hold parts of: one row per thread, added up in the threads' order.
template <typename T>
struct EnvelopeSums {
  Tensor parts;
  Maybe& out;

  EnvelopeSums(const Graph<T>& g, Maybe& target)
      : parts(target ? at::zeros({at::get_num_threads(), g.longest}, g.w_down.options()) : Tensor()), out(target) {}

  T* mine() { return out ? parts.template mutable_data_ptr<T>() + at::get_thread_num() * parts.size(1) : nullptr; }

  void flush(int64_t start, int64_t n) {
    if (!out) return;
    Tensor rows_out = rows(*out, start, n).view({n}), used = parts.narrow(1, 0, n);
    at::sum_out(rows_out, used, 0);
    used.zero_();
  }
};

}  // namespace
