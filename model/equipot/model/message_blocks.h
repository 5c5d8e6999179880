// What the sweeps of message_first.h and message_second.h do on every block: gather, activate, sum up.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>

#include <optional>
#include <vector>

#include "message_products.h"

namespace equipot {

using Maybe = std::optional<Tensor>;

// Edges of a block. More would make the weights' gradients a little quicker and the room larger.
constexpr int64_t kBlock = 256;

template <typename T>
const T* pointer(const Maybe& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// The inputs in the type of the computation, padded to whole panels of columns.
template <typename S>
struct Graph {
  using T = Wide<S>;
  static constexpr int64_t kLanes = VectorOf<T>::lanes, kTile = 4 * kLanes;

  int64_t width, padded, panels, radials, atoms, edges, room;
  at::ScalarType wide, narrow;
  Tensor at_receiver, at_sender, radial, envelope, w_radial, w_radial_packed, w_down, b_down, senders, receivers;
  const T *p, *q, *rho, *env, *bias;
  const int64_t *from, *to;

  Graph(at::TensorList x, const Tensor& s, const Tensor& r)
      : width(x[0].size(1)), padded(up_to(width, kPanel)), panels(padded / kPanel), radials(x[2].size(1)),
        atoms(x[0].size(0)), edges(x[2].size(0)), room(std::min(kBlock, edges)),
        wide(c10::CppTypeToScalarType<T>::value), narrow(c10::CppTypeToScalarType<S>::value),
        at_receiver(on_panels(x[0])), at_sender(on_panels(x[1])), radial(x[2].to(wide).contiguous()),
        envelope(x[3].to(wide).contiguous()), w_radial(on_panels(x[4].t()).t().contiguous()), w_down(x[5]),
        b_down(on_panels(x[6])), senders(s.contiguous()), receivers(r.contiguous()) {
    w_radial_packed = w_radial.view({panels, kPanel, radials}).transpose(1, 2).contiguous();
    p = pointer<T>(at_receiver), q = pointer<T>(at_sender), rho = pointer<T>(radial);
    env = pointer<T>(envelope), bias = pointer<T>(b_down);
    from = senders.const_data_ptr<int64_t>(), to = receivers.const_data_ptr<int64_t>();
  }

  Tensor on_panels(const Tensor& t) const {
    const Tensor in = t.to(wide);
    return (width == padded ? in : at::constant_pad_nd(in, {0, padded - width})).contiguous();
  }

  at::TensorOptions options() const { return at::TensorOptions(wide); }
  Tensor per_atom() const { return at::zeros({atoms, padded}, options()); }
  Tensor per_edge() const { return at::empty({edges, padded}, at::TensorOptions(narrow)); }
  Tensor cut(const Tensor& t) const { return width == padded ? t : t.narrow(-1, 0, width).contiguous(); }

  Packed<S> up() const { return Packed<S>(w_down, true, padded, padded); }
  Packed<S> down() const { return Packed<S>(w_down, false, padded, padded); }

  // Calls f(first edge, edges) for block after block.
  template <typename F>
  void each_block(F&& f) const {
    for (int64_t start = 0; start < edges; start += kBlock) f(start, std::min(kBlock, edges - start));
  }

  // Calls f(panel, first column), shared between threads: each column's sums have one owner and one order.
  template <typename F>
  void each_panel(F&& f) const {
    at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) f(k, k * kPanel);
      release_core<S>();
    });
  }

  // Calls f(row, rows) for tiles of a block's n rows.
  template <typename F>
  static void each_tile(int64_t n, F&& f) {
    for (int64_t row = 0; row < n; row += kRows) f(row, std::min(kRows, n - row));
  }

  // z of edge e for a panel of columns.
  void first(int64_t e, int64_t panel, T* z) const {
    const int64_t c = panel * kPanel;
    affine(p + to[e] * padded + c, q + from[e] * padded + c, rho + e * radials, panel, z);
  }

  // out = a + b + W_r r for a panel of columns; all three may be null.
  void affine(const T* a, const T* b, const T* r, int64_t panel, T* out) const {
    const T* w = w_radial_packed.template const_data_ptr<T>() + panel * radials * kPanel;
    for (int64_t c = 0; c < kPanel; c += kTile) {
      tile(a ? a + c : nullptr, b ? b + c : nullptr, r, w + c, out + c);
    }
  }

  // Vectors by name: left to itself, the compiler keeps a tile's sums in memory, at more than twice the time.
  void tile(const T* a, const T* b, const T* r, const T* w, T* out) const {
    Vector<T> s0 = lanes(a, 0) + lanes(b, 0), s1 = lanes(a, 1) + lanes(b, 1);
    Vector<T> s2 = lanes(a, 2) + lanes(b, 2), s3 = lanes(a, 3) + lanes(b, 3);
    for (int64_t j = 0; r && j < radials; ++j, w += kPanel) {
      const T x = r[j];
      s0 += x * lanes(w, 0), s1 += x * lanes(w, 1), s2 += x * lanes(w, 2), s3 += x * lanes(w, 3);
    }
    const Vector<T> all[4] = {s0, s1, s2, s3};
    std::memcpy(out, all, sizeof all);
  }

  static Vector<T> lanes(const T* from, int64_t k) { return from ? get(from + k * kLanes) : Vector<T>{}; }
};

// Rows (edges of a block, R) that threads sum over their columns, added up in the threads' order.
template <typename T>
struct SharedRows {
  Tensor parts;
  Maybe& out;
  int64_t columns;

  SharedRows(Maybe& target, int64_t room)
      : out(target), columns(target ? target->size(1) : 0) {
    if (out) parts = at::zeros({at::get_num_threads(), up_to(room, kRows), columns}, target->options());
  }

  T* mine() { return out ? parts.template mutable_data_ptr<T>() + at::get_thread_num() * parts.stride(0) : nullptr; }

  void flush(int64_t start, int64_t n) {
    if (!out) return;
    Tensor rows = out->narrow(0, start, n), used = parts.narrow(1, 0, n);
    at::sum_out(rows, used, 0);
    parts.zero_();
  }
};

// What reverse sweeps sum up; undefined where not wanted.
template <typename S>
struct Sums {
  using T = Wide<S>;
  const Graph<S>& g;
  Maybe at_receiver, at_sender, radial, envelope, w_radial, w_down, b_down;
  SharedRows<T> by_radial, by_envelope;
  Operand<S> turned, paired;

  Sums(const Graph<S>& graph, const std::vector<bool>& wanted, int64_t rows_per_edge)
      : g(graph), at_receiver(maybe(wanted[0], {g.atoms, g.padded})),
        at_sender(maybe(wanted[1], {g.atoms, g.padded})), radial(maybe(wanted[2], {g.edges, g.radials})),
        envelope(maybe(wanted[3], {g.edges, 1})), w_radial(maybe(wanted[4], {g.panels, g.radials, kPanel})),
        w_down(maybe(wanted[5], {g.padded, g.padded})), b_down(maybe(wanted[5], {g.padded})),
        by_radial(radial, g.room), by_envelope(envelope, g.room),
        turned(wanted[5] ? g.padded : 0, up_to(rows_per_edge * g.room, 2)),
        paired(wanted[5] && in_pairs<S> ? up_to(rows_per_edge * g.room, 2) / 2 : 0, 2 * g.padded) {}

  Maybe maybe(bool want, at::IntArrayRef size) const { return want ? Maybe(at::zeros(size, g.options())) : Maybe(); }

  // What y = W_2 a + b_2 adds to W_2's gradient, from n rows of the gradient by y and of a.
  void down(const Operand<S>& g_y, const Operand<S>& hidden, int64_t n) {
    if (!w_down) return;
    const int64_t k = in_pairs<S> ? up_to(n, 2) : n;
    if (k > n) {
      std::fill_n(g_y.row(n), g.padded, S(0));
      std::fill_n(hidden.row(n), g.padded, S(0));
    }
    g.each_panel([&](int64_t, int64_t c) {
      transpose(k, kPanel, g_y.begin + c, g_y.ld, turned.row(c), turned.ld);
      if constexpr (in_pairs<S>) pair_rows(hidden, k, c);
    });
    const Operand<S>& right = in_pairs<S> ? paired : hidden;
    T* out = w_down->template mutable_data_ptr<T>();
    g.each_panel([&](int64_t, int64_t c) {
      const S* b = right.begin + (in_pairs<S> ? 2 * c : c);
      const int64_t ldb = in_pairs<S> ? right.ld / 2 : right.ld;
      for (int64_t r = 0; r < g.padded; r += kRows) {
        product(turned.row(r), turned.ld, kRows, k, b, ldb, kPanel, out + r * g.padded + c, g.padded, true);
      }
    });
  }

  void pair_rows(const Operand<S>& hidden, int64_t k, int64_t c) {
    for (int64_t r = 0; r < k; r += 2) {
      const uint16_t *even = reinterpret_cast<const uint16_t*>(hidden.row(r) + c);
      const uint16_t* odd = reinterpret_cast<const uint16_t*>(hidden.row(r + 1) + c);
      uint32_t* out = reinterpret_cast<uint32_t*>(paired.row(r / 2) + 2 * c);
#pragma omp simd
      for (int64_t i = 0; i < kPanel; ++i) out[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    }
  }

  // What z = P_i + Q_j + W_r ρ adds, from the gradient by z of m edges in a panel; rows beyond m become zeros.
  void first(int64_t start, int64_t row, int64_t m, int64_t panel, T* g_z) {
    const int64_t c = panel * kPanel;
    T* to_receiver = at_receiver ? at_receiver->template mutable_data_ptr<T>() + c : nullptr;
    T* to_sender = at_sender ? at_sender->template mutable_data_ptr<T>() + c : nullptr;
    for (int64_t r = 0; r < m; ++r) {
      const int64_t e = start + row + r;
      if (to_receiver) add(to_receiver + g.to[e] * g.padded, g_z + r * kPanel);
      if (to_sender) add(to_sender + g.from[e] * g.padded, g_z + r * kPanel);
    }
    if (T* part = by_radial.mine()) {
      const T* w = g.w_radial.template const_data_ptr<T>() + c * g.radials;
      product(g_z, kPanel, m, kPanel, w, g.radials, g.radials, part + row * g.radials, g.radials, true);
    }
    radial_weight(g.rho + (start + row) * g.radials, m, panel, g_z);
  }

  // What W_r ρ adds to W_r's gradient, from m rows of ρ and of the gradient by z.
  void radial_weight(const T* rho, int64_t m, int64_t panel, T* g_z) {
    if (!w_radial) return;
    const int64_t k = up_to(m, 8), rows = up_to(g.radials, 8);
    std::fill_n(g_z + m * kPanel, (k - m) * kPanel, T(0));
    std::vector<T>& left = rho_turned();
    left.assign(rows * kRows, T(0));
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t j = 0; j < g.radials; ++j) left[j * kRows + r] = rho[r * g.radials + j];
    }
    T sum[kMaxRadials * kPanel];
    for (int64_t j = 0; j < g.radials; j += kMaxRadials) {
      const int64_t n = std::min(kMaxRadials, g.radials - j);
      product(left.data() + j * kRows, kRows, n, k, g_z, kPanel, kPanel, sum, kPanel, false);
      T* out = w_radial->template mutable_data_ptr<T>() + (panel * g.radials + j) * kPanel;
      for (int64_t i = 0; i < n; ++i) add(out + i * kPanel, sum + i * kPanel);
    }
  }

  static constexpr int64_t kMaxRadials = 32;

  static std::vector<T>& rho_turned() {
    static thread_local std::vector<T> room;
    return room;
  }

  std::vector<Maybe> result() {
    const auto cast = [&](const Maybe& t) { return t ? Maybe(t->to(g.narrow)) : Maybe(); };
    const auto cut = [&](const Maybe& t) { return t ? Maybe(g.cut(*t)) : Maybe(); };
    if (w_radial) w_radial = w_radial->transpose(1, 2).reshape({g.padded, g.radials}).narrow(0, 0, g.width);
    if (w_down && g.width != g.padded) w_down = w_down->narrow(0, 0, g.width);
    return {cast(cut(at_receiver)), cast(cut(at_sender)), cast(radial), cast(envelope),
            w_radial ? cast(w_radial->contiguous()) : Maybe(), cast(cut(w_down)), cast(cut(b_down))};
  }
};

}  // namespace equipot
