// Energies, forces and virials of a batch in one call, forward and back by hand: the formulas of inference.py.
//
// Threads share atoms by rows and edges by blocks. Every sum has an order that depends on its own structure alone, and
// products come from inference_gemm.h: the results have the same bits for any batch and any number of threads.

#include "inference_kernels.h"

#include <cmath>
#include <cstring>
#include <vector>

#include <omp.h>

#include "inference_gemm.h"

namespace equipot {
namespace {

// Cephes' polynomial, accurate to 2 ulp; compilers vectorise it, which they do not do to expf.
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
inline T slope(T x) {
  const T s = sigmoid(x), v = x * s;
  return v + s * (T(1) - v);
}

// Hands out aligned pieces of one buffer; from null it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    char* place = base_ ? base_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(place);
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Whole receivers: edges [start, stop).
struct Block {
  int64_t start, stop;
};

constexpr int64_t kChunk = 8 * kRows;
constexpr double kPi = 3.14159265358979323846;
constexpr int kEnvelopeOrder = 6;

template <typename T>
class Run {
 public:
  Run(const Model& model, const Systems& systems, const Wanted& wanted, char* workspace)
      : m_(model), s_(systems), w_(wanted), layer_(static_cast<const Layer<T>*>(model.layer)),
        heads_(*static_cast<const Heads<T>*>(model.heads)), arena_(workspace), width_(padded<T>(model.width)),
        // Rows a power of two apart would all fall into the same few lines of the first-level cache.
        ld_(width_ + kVectorBytes / static_cast<int64_t>(sizeof(T))), hidden_(padded<T>(model.hidden)),
        radials_(padded<T>(model.radials)), by_gradient_(!heads_.strengths && (wanted.forces || wanted.virial)) {
    cut();
    const int64_t n = s_.n_atoms, e = s_.n_edges, rows = std::max(n, s_.n_rows), per_block = longest_ * ld_;
    vectors_ = arena_.take<double>(3 * e), pull_ = arena_.take<double>(e), lengths_ = arena_.take<double>(e);
    envelope_ = arena_.take<T>(e), radial_ = arena_.take<T>(e * m_.radials);
    atomic_ = arena_.take<double>(n), itself_ = arena_.take<int64_t>(n);
    embedded_ = arena_.take<T>(s_.n_rows * ld_), own_ = arena_.take<T>(s_.n_rows * ld_);
    sums_ = arena_.take<T>(n * ld_), h_ = arena_.take<T>(rows * ld_);
    per_layer(stream_, n, m_.layers + 1);
    per_layer(update_, n, m_.layers);
    per_layer(at_receiver_, rows, m_.layers);
    per_layer(at_sender_, rows, m_.layers);
    for (int64_t l = 0; by_gradient_ && w_.keep && l < m_.layers; ++l) kept_.push_back(arena_.take<T>(e * ld_));
    if (by_gradient_) {
      g_stream_ = arena_.take<T>(n * ld_), g_h_ = arena_.take<T>(n * ld_), g_sums_ = arena_.take<T>(n * ld_);
      g_receiver_ = arena_.take<T>(n * ld_), g_sender_ = arena_.take<T>(n * ld_);
      drho_ = arena_.take<T>(e * m_.radials), denvelope_ = arena_.take<T>(e);
    }
    if (heads_.strengths && w_.forces) direct_ = arena_.take<double>(3 * n);
    for (int64_t t = 0; t < threads_; ++t) {
      first_.push_back(arena_.take<T>(std::max(per_block, kChunk * std::max(ld_, hidden_))));
      second_.push_back(arena_.take<T>(per_block));
      small_.push_back(arena_.take<T>(kRows * (ld_ + radials_)));
    }
  }

  int64_t bytes() const { return arena_.used(); }

  void operator()(const Out& out) {
#pragma omp parallel num_threads(static_cast<int>(threads_))
    {
      geometry();
      begin();
      for (int64_t l = 0; l < m_.layers; ++l) {
        messages(l);
        update(l);
      }
      heads();
      if (direct_) strengths();
      if (by_gradient_) {
        for (int64_t l = m_.layers - 1; l >= 0; --l) {
          back_update(l);
          back_messages(l);
          if (l > 0) back_projections(l);
        }
      }
    }
    add_up(out);
  }

 private:
  // What the way back reads again; without one, the same rows serve all layers.
  void per_layer(std::vector<T*>& all, int64_t rows, int64_t layers) {
    for (int64_t l = 0; l < layers; ++l) all.push_back(l == 0 || by_gradient_ ? arena_.take<T>(rows * ld_) : all[0]);
  }

  void cut() {
    for (int64_t start = 0, end = 0; start < s_.n_edges; start = end) {
      while (end < s_.n_edges) {
        int64_t stop = end;
        while (stop < s_.n_edges && s_.receivers[stop] == s_.receivers[end]) ++stop;
        if (end > start && stop - start > w_.block_edges) break;
        end = stop;
      }
      blocks_.push_back({start, end});
      longest_ = std::max(longest_, end - start);
    }
    threads_ = std::min(w_.threads, std::max<int64_t>(1, blocks_.size()));
  }

  // Runs f(first row, count, scratch) over rows of atoms, shared between threads.
  template <typename F>
  void by_rows(int64_t rows, F&& f) const {
    const int64_t fair = (rows + threads_ - 1) / threads_;
    const int64_t chunk = std::min(kChunk, (fair + kRows - 1) / kRows * kRows);
    if (rows == 0) return;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r += chunk) f(r, std::min(chunk, rows - r), first_[omp_get_thread_num()]);
  }

  void geometry() {
    const double step = 1.0 / m_.cutoff;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < s_.n_atoms; ++i) itself_[i] = i;
#pragma omp for schedule(static)
    for (int64_t e = 0; e < s_.n_edges; ++e) {
      const int64_t i = s_.receivers[e], j = s_.senders[e];
      const double *cell = s_.cell + 9 * s_.system_idx[i], *shift = s_.shifts + 3 * e;
      double squared = 0;
      for (int k = 0; k < 3; ++k) {
        const double image = shift[0] * cell[k] + shift[1] * cell[3 + k] + shift[2] * cell[6 + k];
        const double r = s_.positions[3 * j + k] - s_.positions[3 * i + k] + image;
        vectors_[3 * e + k] = r;
        squared += r * r;
      }
      const double d = std::sqrt(squared), x = d * step;
      lengths_[e] = d;
      pull_[e] = 0;
      expand_envelope(e, x, step);
      expand_radial(e, x, step);
    }
  }

  // (1−x)³ Σ_k C(k+2, 2) x^k, and its derivative −C x^(p−1) (1−x)² with C = p (p+1) (p+2) / 2.
  void expand_envelope(int64_t e, double x, double step) {
    constexpr int p = kEnvelopeOrder;
    const double t = std::min(x, 1.0);
    double series = p * (p + 1) / 2.0;
    for (int k = p - 2; k >= 0; --k) series = series * t + (k + 2) * (k + 1) / 2.0;
    static_assert(p == 6, "the derivative's power is written out");
    const double left = 1.0 - t;
    envelope_[e] = static_cast<T>(left * left * left * series);
    if (!by_gradient_) return;
    denvelope_[e] = static_cast<T>(-0.5 * p * (p + 1) * (p + 2) * t * t * t * t * t * left * left * step);
  }

  // √(2/3) sin(nπx)/x for n = 1, 2, …, each from the one before by a rotation, and its derivative.
  void expand_radial(int64_t e, double x, double step) {
    const double s1 = std::sin(kPi * x), c1 = std::cos(kPi * x), factor = std::sqrt(2.0 / 3.0) / x;
    double s = s1, c = c1;
    for (int64_t n = 0; n < m_.radials; ++n) {
      const int64_t at = e * m_.radials + n;
      radial_[at] = static_cast<T>(factor * s);
      if (by_gradient_) drho_[at] = static_cast<T>(factor * ((n + 1) * kPi * c - s / x) * step);
      const double turned = s * c1 + c * s1;
      c = c * c1 - s * s1;
      s = turned;
    }
  }

  // out = norm(x) for some rows; the padding stays zero.
  void normalised(const T* x, int64_t rows, const T* weight, const T* bias, T* out) const {
    for (int64_t r = 0; r < rows; ++r, x += ld_, out += ld_) {
      if (!weight) {
        std::memcpy(out, x, width_ * sizeof(T));
        continue;
      }
      const Moments row = moments(x);
#pragma omp simd
      for (int64_t c = 0; c < width_; ++c) out[c] = (x[c] - row.mean) * row.scale * weight[c] + bias[c];
    }
  }

  struct Moments {
    T mean, scale;
  };

  Moments moments(const T* x) const {
    T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < m_.width; ++c) sum += x[c];
    const T mean = sum / m_.width;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < m_.width; ++c) squares += (x[c] - mean) * (x[c] - mean);
    return {mean, T(1) / std::sqrt(squares / m_.width + static_cast<T>(m_.norm_eps))};
  }

  // g_stream (=, or += for a residual) the gradient by x of ⟨g, norm(x)⟩.
  void back_normalised(const T* g, const T* x, int64_t rows, const T* weight, bool add, T* out) const {
    for (int64_t r = 0; r < rows; ++r, g += ld_, x += ld_, out += ld_) {
      if (!weight) {
#pragma omp simd
        for (int64_t c = 0; c < width_; ++c) out[c] = (add ? out[c] : T(0)) + g[c];
        continue;
      }
      const Moments row = moments(x);
      T sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
      for (int64_t c = 0; c < m_.width; ++c) {
        const T v = g[c] * weight[c];
        sum += v;
        along += v * (x[c] - row.mean);
      }
      const T mean = sum / m_.width, tilt = along * row.scale * row.scale / m_.width;
#pragma omp simd
      for (int64_t c = 0; c < m_.width; ++c) {
        const T v = g[c] * weight[c] - mean - (x[c] - row.mean) * tilt;
        out[c] = (add ? out[c] : T(0)) + row.scale * v;
      }
      if (!add) std::memset(out + m_.width, 0, (width_ - m_.width) * sizeof(T));
    }
  }

  void linear(int64_t rows, const T* x, const T* weight, T* out, const T* bias = nullptr, bool add = false) const {
    product<T>(rows, width_, m_.width, x, ld_, weight, out, ld_, bias, add);
  }

  void scaled(T* x, int64_t rows, T by) const {
    for (int64_t r = 0; r < rows; ++r, x += ld_) {
#pragma omp simd
      for (int64_t c = 0; c < width_; ++c) x[c] *= by;
    }
  }

  // The first layer's products are those of the few different rows that atoms begin with.
  void begin() {
    const T* given = static_cast<const T*>(s_.embedded);
    by_rows(s_.n_rows, [&](int64_t r, int64_t n, T*) {
      for (int64_t i = r; i < r + n; ++i) {
        T* row = embedded_ + i * ld_;
        std::memcpy(row, given + i * m_.width, m_.width * sizeof(T));
        std::memset(row + m_.width, 0, (width_ - m_.width) * sizeof(T));
      }
      project(0, embedded_, r, n, own_);
    });
    by_rows(s_.n_atoms, [&](int64_t r, int64_t n, T*) {
      for (int64_t i = r; i < r + n; ++i) {
        std::memcpy(stream_[0] + i * ld_, embedded_ + s_.row[i] * ld_, width_ * sizeof(T));
        std::memcpy(update_[0] + i * ld_, own_ + s_.row[i] * ld_, width_ * sizeof(T));
      }
    });
  }

  void project(int64_t l, const T* x, int64_t r, int64_t n, T* own) {
    const Layer<T>& layer = layer_[l];
    T* h = h_ + r * ld_;
    normalised(x + r * ld_, n, layer.norm_weight, layer.norm_bias, h);
    linear(n, h, layer.receiver_t, at_receiver_[l] + r * ld_, layer.receiver_bias);
    linear(n, h, layer.sender_t, at_sender_[l] + r * ld_);
    linear(n, h, layer.own_t, own + r * ld_, layer.own_bias);
  }

  const int64_t* rows_of(int64_t l) const { return l == 0 ? s_.row : itself_; }

  // z = P_i + Q_j + W_r ρ for some edges.
  void first(int64_t l, const T* radial_t, const int64_t* row, int64_t e, int64_t n, T* z) const {
    for (int64_t k = 0; k < n; ++k) {
      const T* p = at_receiver_[l] + row[s_.receivers[e + k]] * ld_;
      const T* q = at_sender_[l] + row[s_.senders[e + k]] * ld_;
      T* out = z + k * ld_;
#pragma omp simd
      for (int64_t c = 0; c < width_; ++c) out[c] = p[c] + q[c];
    }
    product<T>(n, width_, m_.radials, radial_ + e * m_.radials, m_.radials, radial_t, z, ld_, nullptr, true);
  }

  // y = W_2 silu(z) + b_2 for a block; `hidden` is overwritten.
  void second(int64_t l, Block b, T* hidden, T* y) const {
    const Layer<T>& layer = layer_[l];
    for (int64_t e = b.start; e < b.stop; e += kRows) {
      const int64_t n = std::min<int64_t>(kRows, b.stop - e);
      T* a = hidden + (e - b.start) * ld_;
      first(l, layer.radial_t, rows_of(l), e, n, a);
      for (int64_t k = 0; k < n; ++k, a += ld_) {
#pragma omp simd
        for (int64_t c = 0; c < width_; ++c) a[c] *= sigmoid(a[c]);
      }
    }
    linear(b.stop - b.start, hidden, layer.message_t, y, layer.message_bias);
  }

  T* kept(int64_t l, Block b, T* otherwise) const { return kept_.empty() ? otherwise : kept_[l] + b.start * ld_; }

  void messages(int64_t l) {
    by_rows(s_.n_atoms, [&](int64_t r, int64_t n, T*) { std::memset(sums_ + r * ld_, 0, n * ld_ * sizeof(T)); });
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < static_cast<int64_t>(blocks_.size()); ++k) {
      const Block b = blocks_[k];
      const int t = omp_get_thread_num();
      T* y = kept(l, b, second_[t]);
      second(l, b, first_[t], y);
      for (int64_t e = b.start; e < b.stop; ++e, y += ld_) {
        T* sum = sums_ + s_.receivers[e] * ld_;
        const T envelope = envelope_[e];
#pragma omp simd
        for (int64_t c = 0; c < width_; ++c) sum[c] += envelope * y[c] * sigmoid(y[c]);
      }
    }
  }

  void update(int64_t l) {
    const Layer<T>& layer = layer_[l];
    const T scale = static_cast<T>(m_.message_scale);
    by_rows(s_.n_atoms, [&](int64_t r, int64_t n, T* a) {
      T *sums = sums_ + r * ld_, *u = update_[l] + r * ld_, *next = stream_[l + 1] + r * ld_;
      scaled(sums, n, scale);
      linear(n, sums, layer.gathered_t, u, nullptr, true);
      for (int64_t k = 0; k < n; ++k) {
        const T* row = u + k * ld_;
#pragma omp simd
        for (int64_t c = 0; c < width_; ++c) a[k * ld_ + c] = row[c] * sigmoid(row[c]);
      }
      if (m_.residual && next != stream_[l] + r * ld_) std::memcpy(next, stream_[l] + r * ld_, n * ld_ * sizeof(T));
      linear(n, a, layer.down_t, next, layer.down_bias, m_.residual);
      if (l + 1 < m_.layers) project(l + 1, stream_[l + 1], r, n, update_[l + 1]);
    });
  }

  void heads() {
    by_rows(s_.n_atoms, [&](int64_t r, int64_t n, T* t) {
      T* h = h_ + r * ld_;
      normalised(stream_[m_.layers] + r * ld_, n, heads_.norm_weight, heads_.norm_bias, h);
      product<T>(n, hidden_, m_.width, h, ld_, heads_.up_t, t, hidden_, heads_.up_bias);
      for (int64_t k = 0; k < n; ++k, t += hidden_) {
        const int64_t level = level_of(r + k);
        const T* weight = heads_.energies + level * hidden_;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < hidden_; ++c) sum += weight[c] * t[c] * sigmoid(t[c]);
        atomic_[r + k] =
            m_.scale[level] * sum + m_.reference[level * m_.n_elements + s_.element_idx[r + k]];
        if (!by_gradient_) continue;
        const T scale = static_cast<T>(m_.scale[level]);
#pragma omp simd
        for (int64_t c = 0; c < hidden_; ++c) t[c] = scale * weight[c] * slope(t[c]);
      }
      if (by_gradient_) {
        T* g = g_h_ + r * ld_;
        product<T>(n, width_, m_.hidden, t - n * hidden_, hidden_, heads_.up, g, ld_);
        back_normalised(
            g, stream_[m_.layers] + r * ld_, n, heads_.norm_weight, false, g_stream_ + r * ld_);
      }
      if (direct_) {
        linear(n, h, heads_.receiver_t, at_receiver_[0] + r * ld_, heads_.receiver_bias);
        linear(n, h, heads_.sender_t, at_sender_[0] + r * ld_);
      }
    });
  }

  int64_t level_of(int64_t atom) const { return s_.level_idx[s_.system_idx[atom]]; }

  // F_i = scale Σ_j envelope ⟨w, silu(z_ij)⟩ r_ij / |r_ij|: one block holds all of an atom's.
  void strengths() {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < 3 * s_.n_atoms; ++k) direct_[k] = 0;
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < static_cast<int64_t>(blocks_.size()); ++k) {
      const Block b = blocks_[k];
      T* z = small_[omp_get_thread_num()];
      for (int64_t start = b.start; start < b.stop; start += kRows) {
        const int64_t n = std::min<int64_t>(kRows, b.stop - start);
        first(0, heads_.radial_t, itself_, start, n, z);
        for (int64_t e = start; e < start + n; ++e) {
          const int64_t i = s_.receivers[e], level = level_of(i);
          const T *row = z + (e - start) * ld_, *weight = heads_.strengths + level * width_;
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t c = 0; c < width_; ++c) sum += weight[c] * row[c] * sigmoid(row[c]);
          const double strength = m_.scale[level] * sum * envelope_[e] / lengths_[e];
          for (int x = 0; x < 3; ++x) direct_[3 * i + x] += strength * vectors_[3 * e + x];
        }
      }
    }
  }

  // From the gradient by a layer's output to that by its message sums, and by its own h.
  void back_update(int64_t l) {
    const Layer<T>& layer = layer_[l];
    const T scale = static_cast<T>(m_.message_scale);
    by_rows(s_.n_atoms, [&](int64_t r, int64_t n, T* g) {
      T *g_sums = g_sums_ + r * ld_, *u = update_[l] + r * ld_;
      linear(n, g_stream_ + r * ld_, layer.down, g);
      for (int64_t k = 0; k < n; ++k) {
        const T* row = u + k * ld_;
#pragma omp simd
        for (int64_t c = 0; c < width_; ++c) g[k * ld_ + c] *= slope(row[c]);
      }
      linear(n, g, layer.gathered, g_sums);
      scaled(g_sums, n, scale);
      // The embedding is a constant: the way back ends at the first layer's edges.
      if (l == 0) return;
      linear(n, g, layer.own, g_h_ + r * ld_);
      std::memset(g_receiver_ + r * ld_, 0, n * ld_ * sizeof(T));
      std::memset(g_sender_ + r * ld_, 0, n * ld_ * sizeof(T));
    });
  }

  void back_messages(int64_t l) {
    const int64_t count = static_cast<int64_t>(blocks_.size()), threads = threads_;
    if (l == 0) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t k = 0; k < count; ++k) back_block(l, blocks_[k], omp_get_thread_num());
      return;
    }
    // As many blocks at a time as there are threads; then senders gather from all of them, in the edges' order.
    for (int64_t k = 0; k < count; k += threads) {
      const int64_t some = std::min(threads, count - k);
#pragma omp for schedule(static, 1)
      for (int64_t t = 0; t < some; ++t) back_block(l, blocks_[k + t], t);
      by_columns([&](int64_t c0, int64_t c1) {
        for (int64_t t = 0; t < some; ++t) {
          const T* g = second_[t];
          for (int64_t e = blocks_[k + t].start; e < blocks_[k + t].stop; ++e, g += ld_) {
            T* out = g_sender_ + s_.senders[e] * ld_;
#pragma omp simd
            for (int64_t c = c0; c < c1; ++c) out[c] += g[c];
          }
        }
      });
    }
  }

  template <typename F>
  void by_columns(F&& f) const {
    constexpr int64_t kPanel = Simd<T>::kPanel;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < threads_; ++t) {
      const int64_t panels = width_ / kPanel;
      f(panels * t / threads_ * kPanel, panels * (t + 1) / threads_ * kPanel);
    }
  }

  // Leaves the gradient by z in the thread's second buffer.
  void back_block(int64_t l, Block b, int64_t t) {
    const Layer<T>& layer = layer_[l];
    T *g_y = first_[t], *g_z = second_[t], *y = kept(l, b, first_[t]);
    const int64_t n = b.stop - b.start;
    if (kept_.empty()) second(l, b, g_z, y);
    for (int64_t e = b.start; e < b.stop; ++e, y += ld_, g_y += ld_) {
      const T* g = g_sums_ + s_.receivers[e] * ld_;
      const T envelope = envelope_[e];
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < width_; ++c) {
        const T s = sigmoid(y[c]), v = y[c] * s;
        sum += g[c] * v;
        g_y[c] = g[c] * envelope * (v + s * (T(1) - v));
      }
      pull_[e] += static_cast<double>(sum * denvelope_[e]);
    }
    linear(n, first_[t], layer.message, g_z);
    for (int64_t e = b.start; e < b.stop; e += kRows, g_z += kRows * ld_) {
      const int64_t some = std::min<int64_t>(kRows, b.stop - e);
      back_first(l, e, some, small_[t], small_[t] + kRows * ld_, g_z);
    }
  }

  void back_first(int64_t l, int64_t e, int64_t n, T* z, T* g_rho, T* g_z) {
    first(l, layer_[l].radial_t, rows_of(l), e, n, z);
    for (int64_t k = 0; k < n; ++k) {
      const T* row = z + k * ld_;
      T *g = g_z + k * ld_, *sum = g_receiver_ + s_.receivers[e + k] * ld_;
#pragma omp simd
      for (int64_t c = 0; c < width_; ++c) g[c] *= slope(row[c]);
      if (l == 0) continue;
#pragma omp simd
      for (int64_t c = 0; c < width_; ++c) sum[c] += g[c];
    }
    product<T>(n, radials_, m_.width, g_z, ld_, layer_[l].radial, g_rho, radials_);
    for (int64_t k = 0; k < n; ++k) {
      const T *g = g_rho + k * radials_, *slopes = drho_ + (e + k) * m_.radials;
      double sum = 0;
      for (int64_t c = 0; c < m_.radials; ++c) sum += static_cast<double>(g[c] * slopes[c]);
      pull_[e + k] += sum;
    }
  }

  void back_projections(int64_t l) {
    const Layer<T>& layer = layer_[l];
    by_rows(s_.n_atoms, [&](int64_t r, int64_t n, T*) {
      T* g = g_h_ + r * ld_;
      linear(n, g_receiver_ + r * ld_, layer.receiver, g, nullptr, true);
      linear(n, g_sender_ + r * ld_, layer.sender, g, nullptr, true);
      back_normalised(g, stream_[l] + r * ld_, n, layer.norm_weight, m_.residual, g_stream_ + r * ld_);
    });
  }

  // One thread, in the edges' order: it is a few numbers per edge.
  void add_up(const Out& out) const {
    std::fill(out.energy, out.energy + s_.n_systems, 0.0);
    for (int64_t i = 0; i < s_.n_atoms; ++i) out.energy[s_.system_idx[i]] += atomic_[i];
    if (direct_) std::memcpy(out.forces, direct_, 3 * s_.n_atoms * sizeof(double));
    if (!by_gradient_) return;
    if (out.forces) std::fill(out.forces, out.forces + 3 * s_.n_atoms, 0.0);
    if (out.virial) std::fill(out.virial, out.virial + 9 * s_.n_systems, 0.0);
    for (int64_t e = 0; e < s_.n_edges; ++e) {
      const int64_t i = s_.receivers[e], j = s_.senders[e];
      const double *r = vectors_ + 3 * e, along = pull_[e] / lengths_[e];
      for (int a = 0; a < 3; ++a) {
        const double pull = along * r[a];
        if (out.forces) out.forces[3 * i + a] += pull, out.forces[3 * j + a] -= pull;
        for (int b = 0; out.virial && b < 3; ++b) out.virial[9 * s_.system_idx[i] + 3 * b + a] += r[b] * pull;
      }
    }
  }

  const Model& m_;
  const Systems& s_;
  const Wanted& w_;
  const Layer<T>* layer_;
  const Heads<T>& heads_;
  Arena arena_;
  const int64_t width_, ld_, hidden_, radials_;
  const bool by_gradient_;
  int64_t longest_ = 0, threads_ = 1;
  std::vector<Block> blocks_;
  double *vectors_, *pull_, *lengths_, *atomic_, *direct_ = nullptr;
  int64_t* itself_;
  T *envelope_, *radial_, *drho_ = nullptr, *denvelope_ = nullptr, *embedded_, *own_;
  T *sums_, *h_;
  T *g_stream_ = nullptr, *g_h_ = nullptr, *g_sums_ = nullptr, *g_receiver_ = nullptr, *g_sender_ = nullptr;
  std::vector<T*> stream_, update_, at_receiver_, at_sender_, kept_, first_, second_, small_;
};

template <typename T>
int64_t infer(const Model* model, const Systems* systems, const Wanted* wanted, const Out* out, char* workspace) {
  Run<T> run(*model, *systems, *wanted, workspace);
  if (workspace) run(*out);
  return run.bytes();
}

}  // namespace
}  // namespace equipot

extern "C" {

// Columns of a panel of packed weights.
int64_t equipot_panel_float() { return equipot::Simd<float>::kPanel; }
int64_t equipot_panel_double() { return equipot::Simd<double>::kPanel; }

// Without a workspace only the bytes it must have are returned; it must be aligned to 64 bytes.
int64_t equipot_infer_float(
    const equipot::Model* model, const equipot::Systems* systems, const equipot::Wanted* wanted,
    const equipot::Out* out, char* workspace) {
  return equipot::infer<float>(model, systems, wanted, out, workspace);
}

int64_t equipot_infer_double(
    const equipot::Model* model, const equipot::Systems* systems, const equipot::Wanted* wanted,
    const equipot::Out* out, char* workspace) {
  return equipot::infer<double>(model, systems, wanted, out, workspace);
}
}
