// The sweeps `push` and `reverse_push` of message_sweeps.py: derivatives along a direction, and theirs.
#pragma once

#include "message_first.h"

namespace equipot {

// A direction (P, Q, ρ, e), null where it is zero.
template <typename S>
struct Direction {
  using T = Wide<S>;
  Maybe at_receiver, at_sender, radial, envelope;
  const T *p, *q, *rho, *env;

  Direction(const Graph<S>& g, const std::vector<Maybe>& t)
      : at_receiver(t[0] ? Maybe(g.on_panels(*t[0])) : Maybe()),
        at_sender(t[1] ? Maybe(g.on_panels(*t[1])) : Maybe()), radial(wide(g, t[2])), envelope(wide(g, t[3])),
        p(pointer<T>(at_receiver)), q(pointer<T>(at_sender)), rho(pointer<T>(radial)), env(pointer<T>(envelope)) {}

  static Maybe wide(const Graph<S>& g, const Maybe& t) { return t ? Maybe(t->to(g.wide).contiguous()) : Maybe(); }

  // The derivative of z of edge e for a panel of columns.
  void first(const Graph<S>& g, int64_t e, int64_t panel, T* out) const {
    const int64_t c = panel * kPanel;
    g.affine(p ? p + g.to[e] * g.padded + c : nullptr, q ? q + g.from[e] * g.padded + c : nullptr,
             rho ? rho + e * g.radials : nullptr, panel, out);
  }
};

template <typename S>
std::vector<Maybe> push(const Graph<S>& g, const Direction<S>& t, const Maybe& y_any, bool keep) {
  using T = Wide<S>;
  Tensor out = g.per_atom(), kept = keep ? g.per_edge() : Tensor();
  const S* y_kept = pointer<S>(y_any);
  const Operand<S> hidden(y_kept ? 0 : g.room, g.padded), t_hidden(g.room, g.padded);
  const Packed<S> up = g.up();
  T* s = out.mutable_data_ptr<T>();
  S* t_y_kept = keep ? kept.mutable_data_ptr<S>() : nullptr;
  g.each_block([&](int64_t start, int64_t n) {
    g.each_panel([&](int64_t panel, int64_t c) {
      alignas(64) T z[kPanel], t_z[kPanel];
      for (int64_t r = 0; r < n; ++r) {
        g.first(start + r, panel, z);
        t.first(g, start + r, panel, t_z);
        each_vector<T>([&](int64_t k) {
          const Silu<T> a(get(z + k));
          put<T>(z + k, a.value);
          put<T>(t_z + k, get(t_z + k) * a.slope());
        });
        if (!y_kept) store(hidden.row(r) + c, z);
        store(t_hidden.row(r) + c, t_z);
      }
    });
    g.each_panel([&](int64_t panel, int64_t c) {
      alignas(64) T y[kRows * kPanel], t_y[kRows * kPanel], room[kPanel];
      const T* bias = g.bias + c;
      const S* w = up.panel(panel);
      g.each_tile(n, [&](int64_t row, int64_t m) {
        if (!y_kept) product(hidden.row(row), hidden.ld, m, g.padded, w, kPanel, kPanel, y, kPanel, false);
        product(t_hidden.row(row), t_hidden.ld, m, g.padded, w, kPanel, kPanel, t_y, kPanel, false);
        for (int64_t r = 0; r < m; ++r) {
          const int64_t e = start + row + r;
          const T* in = y_kept ? load(y_kept + e * g.padded + c, room) : y + r * kPanel;
          const T* t_in = t_y + r * kPanel;
          if (t_y_kept) store(t_y_kept + e * g.padded + c, t_in);
          T* to = s + g.to[e] * g.padded + c;
          const T env = g.env[e], t_env = t.env ? t.env[e] : T(0);
          each_vector<T>([&](int64_t k) {
            const Silu<T> a(get(in + k) + get(bias + k));
            put<T>(to + k, get(to + k) + t_env * a.value + env * a.slope() * get(t_in + k));
          });
        }
      });
    });
  });
  return {g.cut(out), keep ? Maybe(kept) : Maybe()};
}

// One step of `reverse_push` after the other; what they hand on lives between them.
template <typename S>
struct ReversePush {
  using T = Wide<S>;
  const Graph<S>& g;
  const Direction<S>& t;
  const Maybe g_out;
  const Tensor g_push;
  const S *y_kept, *t_y_kept, *g_hidden_kept;
  Sums<S> sums;
  // Values in the first rows of a block, derivatives along t after them.
  Operand<S> tall, tall_g;
  Operand<T> slope, curve;
  Packed<S> up, down;
  const T *gs, *gp;

  ReversePush(const Graph<S>& graph, const Direction<S>& direction, const Maybe& g_out_any, const Tensor& g_push_any,
              const Maybe& y, const Maybe& t_y, const Maybe& g_hidden, const std::vector<bool>& wanted)
      : g(graph), t(direction), g_out(g_out_any ? Maybe(g.on_panels(*g_out_any)) : Maybe()),
        g_push(g.on_panels(g_push_any)), y_kept(pointer<S>(y)), t_y_kept(pointer<S>(t_y)),
        g_hidden_kept(pointer<S>(g_hidden)), sums(g, wanted, 2), tall(2 * g.room, g.padded),
        tall_g(2 * g.room, g.padded), slope(g.room, g.padded), curve(g.room, g.padded),
        up(y && t_y ? Packed<S>() : g.up()), down(g.down()),
        gs(pointer<T>(g_out)), gp(g_push.template const_data_ptr<T>()) {}

  void run() {
    g.each_block([&](int64_t start, int64_t n) {
      g.each_panel([&](int64_t panel, int64_t c) { activate_pair(start, n, panel, c); });
      g.each_panel([&](int64_t panel, int64_t c) { through_second(start, n, panel, c); });
      sums.by_envelope.flush(start, n);
      sums.down(tall_g, tall, 2 * n);
      g.each_panel([&](int64_t panel, int64_t c) { back_to_first(start, n, panel, c); });
      sums.by_radial.flush(start, n);
    });
  }

  void activate_pair(int64_t start, int64_t n, int64_t panel, int64_t c) {
    alignas(64) T z[kPanel], t_z[kPanel];
    for (int64_t r = 0; r < n; ++r) {
      g.first(start + r, panel, z);
      t.first(g, start + r, panel, t_z);
      T *d = slope.row(r) + c, *dd = curve.row(r) + c;
      each_vector<T>([&](int64_t k) {
        const Silu<T> a(get(z + k));
        const Vector<T> x = get(t_z + k), first = a.slope();
        put<T>(z + k, a.value);
        put<T>(d + k, first);
        put<T>(dd + k, x * a.curve());
        put<T>(t_z + k, x * first);
      });
      store(tall.row(r) + c, z);
      store(tall.row(n + r) + c, t_z);
    }
  }

  void through_second(int64_t start, int64_t n, int64_t panel, int64_t c) {
    alignas(64) T y[kRows * kPanel], t_y[kRows * kPanel], room[kPanel], t_room[kPanel], out[kPanel], t_out[kPanel];
    const T zeros[kPanel] = {};
    const T* bias = g.bias + c;
    T* part = sums.by_envelope.mine();
    T* db = sums.b_down ? sums.b_down->template mutable_data_ptr<T>() + c : nullptr;
    const S* w = up.panel(panel);
    g.each_tile(n, [&](int64_t row, int64_t m) {
      if (!y_kept) product(tall.row(row), tall.ld, m, g.padded, w, kPanel, kPanel, y, kPanel, false);
      if (!t_y_kept) product(tall.row(n + row), tall.ld, m, g.padded, w, kPanel, kPanel, t_y, kPanel, false);
      for (int64_t r = 0; r < m; ++r) {
        const int64_t e = start + row + r, at = g.to[e] * g.padded + c;
        const T* in = y_kept ? load(y_kept + e * g.padded + c, room) : y + r * kPanel;
        const T* t_in = t_y_kept ? load(t_y_kept + e * g.padded + c, t_room) : t_y + r * kPanel;
        const T *gi = gp + at, *go = gs ? gs + at : zeros;
        const T env = g.env[e], t_env = t.env ? t.env[e] : T(0);
        Vector<T> sum = {};
        each_vector<T>([&](int64_t k) {
          const Silu<T> a(get(in + k) + get(bias + k));
          const Vector<T> x = get(gi + k), o = get(go + k), d = a.slope(), by_slope = x * get(t_in + k);
          sum += o * a.value + by_slope * d;
          put<T>(out + k, d * (o * env + x * t_env) + a.curve() * env * by_slope);
          put<T>(t_out + k, x * env * d);
        });
        if (part) part[row + r] += sum_of<T>(sum);
        if (db) add(db, out);
        store(tall_g.row(row + r) + c, out);
        store(tall_g.row(n + row + r) + c, t_out);
      }
    });
  }

  void back_to_first(int64_t start, int64_t n, int64_t panel, int64_t c) {
    alignas(64) T g_z[kRows * kPanel], g_t[kRows * kPanel], room[kPanel];
    const S* w = down.panel(panel);
    g.each_tile(n, [&](int64_t row, int64_t m) {
      product(tall_g.row(row), tall_g.ld, m, g.padded, w, kPanel, kPanel, g_z, kPanel, false);
      if (!g_hidden_kept) {
        product(tall_g.row(n + row), tall_g.ld, m, g.padded, w, kPanel, kPanel, g_t, kPanel, false);
      }
      for (int64_t r = 0; r < m; ++r) {
        T *line = g_z + r * kPanel, *t_line = g_t + r * kPanel;
        const T* back = g_hidden_kept ? load(g_hidden_kept + (start + row + r) * g.padded + c, room) : t_line;
        const T *d = slope.row(row + r) + c, *dd = curve.row(row + r) + c;
        each_vector<T>([&](int64_t k) {
          const Vector<T> x = get(back + k), first = get(d + k);
          put<T>(line + k, get(line + k) * first + x * get(dd + k));
          put<T>(t_line + k, x * first);
        });
      }
      sums.first(start, row, m, panel, g_z);
      if (t.rho) sums.radial_weight(t.rho + (start + row) * g.radials, m, panel, g_t);
    });
  }
};

}  // namespace equipot
