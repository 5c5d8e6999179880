// The sweeps `forward` and `reverse` of message_sweeps.py, and both passes of strengths_blocked.py.
//
// Formulas and names are explained there. Products and the work on elements that reads them alternate tile by tile,
// so that a tile is read from the cache it was written to.
#pragma once

#include "message_blocks.h"

namespace equipot {

template <typename S>
std::vector<Maybe> forward(const Graph<S>& g, bool keep) {
  using T = Wide<S>;
  Tensor out = g.per_atom(), kept = keep ? g.per_edge() : Tensor();
  const Operand<S> hidden(g.room, g.padded);
  const Packed<S> up = g.up();
  T* s = out.mutable_data_ptr<T>();
  S* y_kept = keep ? kept.mutable_data_ptr<S>() : nullptr;
  g.each_block([&](int64_t start, int64_t n) {
    g.each_panel([&](int64_t panel, int64_t c) {
      alignas(64) T z[kPanel];
      for (int64_t r = 0; r < n; ++r) {
        g.first(start + r, panel, z);
        each_vector<T>([&](int64_t k) { put<T>(z + k, Silu<T>(get(z + k)).value); });
        store(hidden.row(r) + c, z);
      }
    });
    g.each_panel([&](int64_t panel, int64_t c) {
      alignas(64) T y[kRows * kPanel];
      const T* bias = g.bias + c;
      g.each_tile(n, [&](int64_t row, int64_t m) {
        product(hidden.row(row), hidden.ld, m, g.padded, up.panel(panel), kPanel, kPanel, y, kPanel, false);
        for (int64_t r = 0; r < m; ++r) {
          const int64_t e = start + row + r;
          const T* in = y + r * kPanel;
          if (y_kept) store(y_kept + e * g.padded + c, in);
          T* to = s + g.to[e] * g.padded + c;
          const T env = g.env[e];
          each_vector<T>([&](int64_t k) {
            put<T>(to + k, get(to + k) + env * Silu<T>(get(in + k) + get(bias + k)).value);
          });
        }
      });
    });
  });
  return {g.cut(out), keep ? Maybe(kept) : Maybe()};
}

// a and silu'(z) of a block's edges in a panel of columns.
template <typename S>
void activate(const Graph<S>& g, int64_t start, int64_t n, int64_t panel, const Operand<S>& hidden,
              const Operand<Wide<S>>& slope) {
  using T = Wide<S>;
  const int64_t c = panel * kPanel;
  alignas(64) T z[kPanel];
  for (int64_t r = 0; r < n; ++r) {
    g.first(start + r, panel, z);
    T* d = slope.row(r) + c;
    each_vector<T>([&](int64_t k) {
      const Silu<T> a(get(z + k));
      put<T>(z + k, a.value);
      put<T>(d + k, a.slope());
    });
    store(hidden.row(r) + c, z);
  }
}

template <typename S>
std::vector<Maybe> reverse(const Graph<S>& g, const Tensor& g_out_any, const Maybe& y_any,
                           const std::vector<bool>& wanted, bool keep) {
  using T = Wide<S>;
  const Tensor g_out = g.on_panels(g_out_any);
  Sums<S> sums(g, wanted, 1);
  const Operand<S> hidden(g.room, g.padded), g_y(g.room, g.padded);
  const Operand<T> slope(g.room, g.padded);
  const Packed<S> up = y_any ? Packed<S>() : g.up(), down = g.down();
  Tensor kept = keep ? g.per_edge() : Tensor();
  S* g_kept = keep ? kept.mutable_data_ptr<S>() : nullptr;
  const S* y_kept = pointer<S>(y_any);
  const T* gs = g_out.const_data_ptr<T>();
  T* db_all = sums.b_down ? sums.b_down->template mutable_data_ptr<T>() : nullptr;
  g.each_block([&](int64_t start, int64_t n) {
    g.each_panel([&](int64_t panel, int64_t) { activate(g, start, n, panel, hidden, slope); });
    g.each_panel([&](int64_t panel, int64_t c) {
      alignas(64) T y[kRows * kPanel], room[kPanel], out[kPanel];
      const T* bias = g.bias + c;
      T* part = sums.by_envelope.mine();
      T* db = db_all ? db_all + c : nullptr;
      g.each_tile(n, [&](int64_t row, int64_t m) {
        if (!y_kept) product(hidden.row(row), hidden.ld, m, g.padded, up.panel(panel), kPanel, kPanel, y, kPanel, false);
        for (int64_t r = 0; r < m; ++r) {
          const int64_t e = start + row + r;
          const T* in = y_kept ? load(y_kept + e * g.padded + c, room) : y + r * kPanel;
          const T* gi = gs + g.to[e] * g.padded + c;
          const T env = g.env[e];
          Vector<T> sum = {};
          each_vector<T>([&](int64_t k) {
            const Silu<T> a(get(in + k) + get(bias + k));
            const Vector<T> x = get(gi + k);
            sum += x * a.value;
            put<T>(out + k, x * env * a.slope());
          });
          if (part) part[row + r] += sum_of<T>(sum);
          if (db) add(db, out);
          store(g_y.row(row + r) + c, out);
        }
      });
    });
    sums.by_envelope.flush(start, n);
    sums.down(g_y, hidden, n);
    g.each_panel([&](int64_t panel, int64_t c) {
      alignas(64) T g_z[kRows * kPanel];
      g.each_tile(n, [&](int64_t row, int64_t m) {
        product(g_y.row(row), g_y.ld, m, g.padded, down.panel(panel), kPanel, kPanel, g_z, kPanel, false);
        for (int64_t r = 0; r < m; ++r) {
          T* line = g_z + r * kPanel;
          const T* d = slope.row(row + r) + c;
          if (g_kept) store(g_kept + (start + row + r) * g.padded + c, line);
          each_vector<T>([&](int64_t k) { put<T>(line + k, get(line + k) * get(d + k)); });
        }
        sums.first(start, row, m, panel, g_z);
      });
    });
    sums.by_radial.flush(start, n);
  });
  std::vector<Maybe> result = sums.result();
  result.push_back(keep ? Maybe(kept) : Maybe());
  return result;
}

// s (E, outputs) = W silu(z), with W (outputs, H) in the place of the second weight.
template <typename S>
Tensor strengths(const Graph<S>& g) {
  using T = Wide<S>;
  const Tensor w = g.on_panels(g.w_down);
  Maybe out = at::zeros({g.edges, w.size(0)}, g.options());
  SharedRows<T> sums(out, g.room);
  const T* weights = w.const_data_ptr<T>();
  g.each_block([&](int64_t start, int64_t n) {
    g.each_panel([&](int64_t panel, int64_t c) {
      alignas(64) T z[kPanel];
      T* part = sums.mine();
      for (int64_t r = 0; r < n; ++r) {
        g.first(start + r, panel, z);
        each_vector<T>([&](int64_t k) { put<T>(z + k, Silu<T>(get(z + k)).value); });
        for (int64_t o = 0; o < w.size(0); ++o) {
          const T* line = weights + o * g.padded + c;
          Vector<T> sum = {};
          each_vector<T>([&](int64_t k) { sum += get(z + k) * get(line + k); });
          part[r * w.size(0) + o] += sum_of<T>(sum);
        }
      }
    });
    sums.flush(start, n);
  });
  return out->to(g.narrow);
}

// Gradients of ⟨G, s⟩ by P, Q, ρ, W_r and W, for G (E, outputs).
template <typename S>
std::vector<Maybe> strengths_reverse(const Graph<S>& g, const Tensor& g_out_any, const std::vector<bool>& wanted) {
  using T = Wide<S>;
  const Tensor g_out = g_out_any.to(g.wide).contiguous(), w = g.on_panels(g.w_down);
  const int64_t outputs = w.size(0);
  Sums<S> sums(g, wanted, 0);
  Tensor g_w = at::zeros_like(w);
  const T *gs = g_out.const_data_ptr<T>(), *weights = w.const_data_ptr<T>();
  T* by_w = g_w.mutable_data_ptr<T>();
  g.each_block([&](int64_t start, int64_t n) {
    g.each_panel([&](int64_t panel, int64_t c) {
      alignas(64) T g_z[kRows * kPanel], back[kPanel], a[kPanel];
      g.each_tile(n, [&](int64_t row, int64_t m) {
        for (int64_t r = 0; r < m; ++r) {
          const int64_t e = start + row + r;
          T* z = g_z + r * kPanel;
          g.first(e, panel, z);
          std::fill_n(back, kPanel, T(0));
          for (int64_t o = 0; o < outputs; ++o) {
            const T *line = weights + o * g.padded + c, x = gs[e * outputs + o];
            each_vector<T>([&](int64_t k) { put<T>(back + k, get(back + k) + x * get(line + k)); });
          }
          each_vector<T>([&](int64_t k) {
            const Silu<T> silu(get(z + k));
            put<T>(a + k, silu.value);
            put<T>(z + k, get(back + k) * silu.slope());
          });
          for (int64_t o = 0; o < outputs; ++o) {
            T *line = by_w + o * g.padded + c, x = gs[e * outputs + o];
            each_vector<T>([&](int64_t k) { put<T>(line + k, get(line + k) + x * get(a + k)); });
          }
        }
        sums.first(start, row, m, panel, g_z);
      });
    });
    sums.by_radial.flush(start, n);
  });
  std::vector<Maybe> all = sums.result();
  return {all[0], all[1], all[2], all[4], Maybe(g.cut(g_w).to(g.narrow))};
}

}  // namespace equipot
