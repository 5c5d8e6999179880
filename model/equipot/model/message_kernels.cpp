// The sweeps of message_sweeps.py with a block's element-wise work fused between matrix products.
//
// The formulas and names are explained there. Work on elements is shared between threads by columns, so sums over
// edges need no locks and have the same order whatever the number of threads; matrix products are torch's own.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
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

template <typename T>
std::vector<Maybe> forward(const Graph<T>& g, bool keep) {
  Tensor out = at::zeros_like(g.at_receiver), hidden = g.room();
  Tensor y_room = keep ? at::empty({g.radial.size(0), g.width}, hidden.options()) : g.room();
  T *s = out.mutable_data_ptr<T>(), *a = hidden.mutable_data_ptr<T>();
  const Tensor w_t = g.w_down.t();
  for (size_t b = 0; b + 1 < g.bounds.size(); ++b) {
    const int64_t start = g.bounds[b], stop = g.bounds[b + 1], n = stop - start;
    by_columns(g.width, [&](int64_t c0, int64_t c1) {
      g.each_z(start, stop, c0, c1, [&](int64_t e, int64_t c, int64_t m, const T* z) {
        T* row = a + (e - start) * g.width + c;
#pragma omp simd
        for (int64_t k = 0; k < m; ++k) row[k] = z[k] * sigmoid(z[k]);
      });
    });
    Tensor y_rows = rows(y_room, keep ? start : 0, n);
    at::mm_out(y_rows, rows(hidden, 0, n), w_t);
    const T* y = y_rows.const_data_ptr<T>();
    by_columns(g.width, [&](int64_t c0, int64_t c1) {
      for (int64_t e = start; e < stop; ++e) {
        const T* row = y + (e - start) * g.width;
        T* to = s + g.to[e] * g.width;
        const T env = g.env[e];
#pragma omp simd
        for (int64_t c = c0; c < c1; ++c) {
          const T v = row[c] + g.bias[c];
          to[c] += env * v * sigmoid(v);
        }
      }
    });
  }
  return {out, keep ? Maybe(y_room) : Maybe()};
}

template <typename T>
std::vector<Maybe> reverse(
    const Graph<T>& g, const Tensor& g_out_any, const Maybe& y_kept, const std::vector<bool>& wanted, bool keep) {
  const Tensor g_out = g_out_any.to(g.w_down.scalar_type()).contiguous();
  Sums<T> sums(g, wanted);
  EnvelopeSums<T> by_env(g, sums.envelope);
  Tensor hidden = g.room(), slope = g.room(), y_room = g.room(), g_hidden_room;
  g_hidden_room = keep ? at::empty({g.radial.size(0), g.width}, hidden.options()) : g.room();
  T *a = hidden.mutable_data_ptr<T>(), *s1 = slope.mutable_data_ptr<T>(), *dy = y_room.mutable_data_ptr<T>();
  const T* gs = g_out.const_data_ptr<T>();
  T* db = writable<T>(sums.b_down);
  const Tensor w_t = g.w_down.t();
  for (size_t b = 0; b + 1 < g.bounds.size(); ++b) {
    const int64_t start = g.bounds[b], stop = g.bounds[b + 1], n = stop - start;
    const Tensor hidden_rows = rows(hidden, 0, n), slope_rows = rows(slope, 0, n);
    by_columns(g.width, [&](int64_t c0, int64_t c1) {
      g.each_z(start, stop, c0, c1, [&](int64_t e, int64_t c, int64_t m, const T* z) {
        T *row = a + (e - start) * g.width + c, *d = s1 + (e - start) * g.width + c;
#pragma omp simd
        for (int64_t k = 0; k < m; ++k) {
          const T s = sigmoid(z[k]), v = z[k] * s;
          row[k] = v;
          d[k] = v + s * (T(1) - v);
        }
      });
    });
    Tensor y_rows = rows(y_room, 0, n);
    if (!y_kept) at::mm_out(y_rows, hidden_rows, w_t);
    const T* y = y_kept ? y_kept->const_data_ptr<T>() + start * g.width : dy;
    by_columns(g.width, [&](int64_t c0, int64_t c1) {
      T* part = by_env.mine();
      for (int64_t e = start; e < stop; ++e) {
        const T *row = y + (e - start) * g.width, *gi = gs + g.to[e] * g.width;
        T* out = dy + (e - start) * g.width;
        const T env = g.env[e];
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = c0; c < c1; ++c) {
          const T u = row[c] + g.bias[c], s = sigmoid(u), v = u * s;
          sum += gi[c] * v;
          out[c] = gi[c] * env * (v + s * (T(1) - v));
        }
        if (part) part[e - start] += sum;
        if (db) Sums<T>::add(db + c0, out + c0, c1 - c0);
      }
    });
    by_env.flush(start, n);
    sums.down(y_rows, hidden_rows);
    Tensor g_hidden = rows(g_hidden_room, keep ? start : 0, n);
    at::mm_out(g_hidden, y_rows, g.w_down);
    const T* da = g_hidden.const_data_ptr<T>();
    by_columns(g.width, [&](int64_t c0, int64_t c1) {
      for (int64_t e = start; e < stop; ++e) {
        T* row = s1 + (e - start) * g.width;
        const T* d = da + (e - start) * g.width;
#pragma omp simd
        for (int64_t c = c0; c < c1; ++c) row[c] *= d[c];
        sums.scatter(g, e, c0, c1 - c0, row + c0);
      }
    });
    sums.first(g, start, n, slope_rows);
  }
  std::vector<Maybe> result = sums.result();
  result.push_back(keep ? Maybe(g_hidden_room) : Maybe());
  return result;
}

// A direction (P, Q, ρ, e), null where it is zero.
template <typename T>
struct Direction {
  Maybe at_receiver, at_sender, radial, envelope;
  const T *p, *q, *rho, *env;

  explicit Direction(const std::vector<Maybe>& t)
      : at_receiver(contiguous(t[0])), at_sender(contiguous(t[1])), radial(contiguous(t[2])),
        envelope(contiguous(t[3])), p(pointer<T>(at_receiver)), q(pointer<T>(at_sender)), rho(pointer<T>(radial)),
        env(pointer<T>(envelope)) {}

  // The derivative of z for n columns from c of edge e.
  void z(const Graph<T>& g, int64_t e, int64_t c, int64_t n, T* out) const {
    g.affine(
        p ? p + g.to[e] * g.width + c : nullptr, q ? q + g.from[e] * g.width + c : nullptr,
        rho ? rho + e * g.radials : nullptr, c, n, out);
  }
};

template <typename T>
std::vector<Maybe> push(const Graph<T>& g, const Direction<T>& t, const Maybe& y_kept, bool keep) {
  Tensor out = at::zeros_like(g.at_receiver), tall = g.room(2), tall_y = g.room(2);
  Tensor kept = keep ? at::empty({g.radial.size(0), g.width}, out.options()) : Tensor();
  T *s = out.mutable_data_ptr<T>(), *a = tall.mutable_data_ptr<T>();
  const Tensor w_t = g.w_down.t();
  for (size_t b = 0; b + 1 < g.bounds.size(); ++b) {
    const int64_t start = g.bounds[b], stop = g.bounds[b + 1], n = stop - start;
    T* ta = a + n * g.width;
    by_columns(g.width, [&](int64_t c0, int64_t c1) {
      g.each_z(start, stop, c0, c1, [&](int64_t e, int64_t c, int64_t m, const T* z) {
        T tz[Graph<T>::kTile];
        t.z(g, e, c, m, tz);
        T *row = a + (e - start) * g.width + c, *t_row = ta + (e - start) * g.width + c;
#pragma omp simd
        for (int64_t k = 0; k < m; ++k) {
          const T sg = sigmoid(z[k]), v = z[k] * sg;
          row[k] = v;
          t_row[k] = tz[k] * (v + sg * (T(1) - v));
        }
      });
    });
    const T *y, *ty;
    if (y_kept) {
      Tensor t_rows = keep ? rows(kept, start, n) : rows(tall_y, 0, n);
      at::mm_out(t_rows, rows(tall, n, n), w_t);
      y = y_kept->const_data_ptr<T>() + start * g.width, ty = t_rows.const_data_ptr<T>();
    } else {
      Tensor both = rows(tall_y, 0, 2 * n);
      at::mm_out(both, rows(tall, 0, 2 * n), w_t);
      if (keep) rows(kept, start, n).copy_(rows(tall_y, n, n));
      y = both.const_data_ptr<T>(), ty = y + n * g.width;
    }
    by_columns(g.width, [&](int64_t c0, int64_t c1) {
      for (int64_t e = start; e < stop; ++e) {
        const T *row = y + (e - start) * g.width, *t_row = ty + (e - start) * g.width;
        T* to = s + g.to[e] * g.width;
        const T env = g.env[e], t_env = t.env ? t.env[e] : T(0);
#pragma omp simd
        for (int64_t c = c0; c < c1; ++c) {
          const T u = row[c] + g.bias[c], sg = sigmoid(u), v = u * sg;
          to[c] += t_env * v + env * (v + sg * (T(1) - v)) * t_row[c];
        }
      }
    });
  }
  return {out, keep ? Maybe(kept) : Maybe()};
}

template <typename T>
std::vector<Maybe> reverse_push(
    const Graph<T>& g, const Maybe& g_out_any, const Tensor& g_push_any, const Direction<T>& t, const Maybe& y_kept,
    const Maybe& t_y_kept, const Maybe& g_hidden_kept, const std::vector<bool>& wanted) {
  const auto dtype = g.w_down.scalar_type();
  const Maybe g_out = g_out_any ? Maybe(g_out_any->to(dtype).contiguous()) : Maybe();
  const Tensor g_push = g_push_any.to(dtype).contiguous();
  Sums<T> sums(g, wanted);
  EnvelopeSums<T> by_env(g, sums.envelope);
  // Pairs of rows per edge: values first, then derivatives along t, so that one product serves both.
  Tensor tall = g.room(2), tall_y = g.room(2), slope = g.room(), curve = g.room(), tall_g = g.room(2);
  T *a = tall.mutable_data_ptr<T>(), *s1 = slope.mutable_data_ptr<T>(), *s2 = curve.mutable_data_ptr<T>();
  T* dy = tall_g.mutable_data_ptr<T>();
  T* db = writable<T>(sums.b_down);
  const T *gs = pointer<T>(g_out), *gp = g_push.const_data_ptr<T>();
  const Tensor w_t = g.w_down.t();
  for (size_t b = 0; b + 1 < g.bounds.size(); ++b) {
    const int64_t start = g.bounds[b], stop = g.bounds[b + 1], n = stop - start;
    T *ta = a + n * g.width, *dty = dy + n * g.width;
    by_columns(g.width, [&](int64_t c0, int64_t c1) {
      g.each_z(start, stop, c0, c1, [&](int64_t e, int64_t c, int64_t m, const T* z) {
        T tz[Graph<T>::kTile];
        t.z(g, e, c, m, tz);
        const int64_t at = (e - start) * g.width + c;
#pragma omp simd
        for (int64_t k = 0; k < m; ++k) {
          const T s = sigmoid(z[k]), v = z[k] * s, d = v + s * (T(1) - v);
          a[at + k] = v;
          ta[at + k] = tz[k] * d;
          s1[at + k] = d;
          s2[at + k] = tz[k] * (T(1) - s) * (T(2) * d - v);
        }
      });
    });
    if (!y_kept && !t_y_kept) {
      Tensor both = rows(tall_y, 0, 2 * n);
      at::mm_out(both, rows(tall, 0, 2 * n), w_t);
    } else {
      Tensor one = rows(tall_y, 0, n), other = rows(tall_y, n, n);
      if (!y_kept) at::mm_out(one, rows(tall, 0, n), w_t);
      if (!t_y_kept) at::mm_out(other, rows(tall, n, n), w_t);
    }
    const T* room_y = tall_y.const_data_ptr<T>();
    const T* y = y_kept ? y_kept->const_data_ptr<T>() + start * g.width : room_y;
    const T* ty = t_y_kept ? t_y_kept->const_data_ptr<T>() + start * g.width : room_y + n * g.width;
    by_columns(g.width, [&](int64_t c0, int64_t c1) {
      T* part = by_env.mine();
      for (int64_t e = start; e < stop; ++e) {
        const int64_t at = (e - start) * g.width;
        const T *gi = gp + g.to[e] * g.width, *go = gs ? gs + g.to[e] * g.width : nullptr;
        const T env = g.env[e], t_env = t.env ? t.env[e] : T(0);
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = c0; c < c1; ++c) {
          const T u = y[at + c] + g.bias[c], s = sigmoid(u), v = u * s;
          const T d = v + s * (T(1) - v), dd = (T(1) - s) * (T(2) * d - v);
          const T out = go ? go[c] : T(0);
          sum += out * v + gi[c] * d * ty[at + c];
          dy[at + c] = d * (out * env + gi[c] * t_env) + dd * gi[c] * env * ty[at + c];
          dty[at + c] = gi[c] * env * d;
        }
        if (part) part[e - start] += sum;
        if (db) Sums<T>::add(db + c0, dy + at + c0, c1 - c0);
      }
    });
    by_env.flush(start, n);
    sums.down(rows(tall_g, 0, 2 * n), rows(tall, 0, 2 * n));
    const T* dta;
    if (g_hidden_kept) {
      Tensor g_hidden = rows(tall, 0, n);
      at::mm_out(g_hidden, rows(tall_g, 0, n), g.w_down);
      dta = g_hidden_kept->const_data_ptr<T>() + start * g.width;
    } else {
      Tensor both = rows(tall, 0, 2 * n);
      at::mm_out(both, rows(tall_g, 0, 2 * n), g.w_down);
      dta = ta;
    }
    by_columns(g.width, [&](int64_t c0, int64_t c1) {
      for (int64_t e = start; e < stop; ++e) {
        const int64_t at = (e - start) * g.width;
#pragma omp simd
        for (int64_t c = c0; c < c1; ++c) {
          const T d = s1[at + c], back = dta[at + c];
          s2[at + c] = a[at + c] * d + back * s2[at + c];
          s1[at + c] = back * d;
        }
        sums.scatter(g, e, c0, c1 - c0, s2 + at + c0);
      }
    });
    sums.first(g, start, n, rows(curve, 0, n));
    if (sums.w_radial && t.radial) sums.w_radial->addmm_(rows(slope, 0, n).t(), rows(*t.radial, start, n));
  }
  return sums.result();
}

std::vector<Maybe> unpack(const c10::List<Maybe>& list) {
  std::vector<Maybe> out;
  for (size_t k = 0; k < list.size(); ++k) out.push_back(list.get(k));
  return out;
}

std::vector<bool> flags(at::IntArrayRef wanted) { return std::vector<bool>(wanted.begin(), wanted.end()); }

c10::List<Maybe> pack(const std::vector<Maybe>& tensors) {
  c10::List<Maybe> out;
  for (const Maybe& t : tensors) out.push_back(t);
  return out;
}

template <typename F>
c10::List<Maybe> dispatch(at::TensorList x, F&& run) {
  return x[0].scalar_type() == at::kFloat ? pack(run(float())) : pack(run(double()));
}

}  // namespace

TORCH_LIBRARY(equipot, m) {
  m.def("forward(Tensor[] x, Tensor s, Tensor r, int[] b, bool keep) -> Tensor?[]",
        [](at::TensorList x, const Tensor& s, const Tensor& r, at::IntArrayRef b, bool keep) {
          return dispatch(x, [&](auto one) { return forward(Graph<decltype(one)>(x, s, r, b), keep); });
        });
  m.def("reverse(Tensor[] x, Tensor s, Tensor r, int[] b, Tensor g, Tensor? y, int[] wanted, bool keep) -> Tensor?[]",
        [](at::TensorList x, const Tensor& s, const Tensor& r, at::IntArrayRef b, const Tensor& g, const Maybe& y,
           at::IntArrayRef wanted, bool keep) {
          return dispatch(x, [&](auto one) {
            return reverse(Graph<decltype(one)>(x, s, r, b), g, y, flags(wanted), keep);
          });
        });
  m.def("push(Tensor[] x, Tensor s, Tensor r, int[] b, Tensor?[] t, Tensor? y, bool keep) -> Tensor?[]",
        [](at::TensorList x, const Tensor& s, const Tensor& r, at::IntArrayRef b, const c10::List<Maybe>& t,
           const Maybe& y, bool keep) {
          return dispatch(x, [&](auto one) {
            using T = decltype(one);
            return push(Graph<T>(x, s, r, b), Direction<T>(unpack(t)), y, keep);
          });
        });
  m.def("reverse_push(Tensor[] x, Tensor s, Tensor r, int[] b, Tensor? g_out, Tensor g_push, Tensor?[] t, Tensor? y, "
        "Tensor? t_y, Tensor? g_hidden, int[] wanted) -> Tensor?[]",
        [](at::TensorList x, const Tensor& s, const Tensor& r, at::IntArrayRef b, const Maybe& g_out,
           const Tensor& g_push, const c10::List<Maybe>& t, const Maybe& y, const Maybe& t_y, const Maybe& g_hidden,
           at::IntArrayRef wanted) {
          return dispatch(x, [&](auto one) {
            using T = decltype(one);
            return reverse_push(
                Graph<T>(x, s, r, b), g_out, g_push, Direction<T>(unpack(t)), y, t_y, g_hidden, flags(wanted));
          });
        });
}
