// The sweeps of message_sweeps.py with a block's element-wise work fused between matrix products.
//
// The formulas and names are explained there. Work on elements is shared between threads by columns, so sums over
// edges need no locks and have the same order whatever the number of threads; matrix products are torch's own.

#include "message_kernels.h"

#include <torch/library.h>

namespace {

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
