// What goes into and out of the compiled inference of inference.py: its mirror there has the same names and order.
#pragma once

#include <cstdint>

namespace equipot {

// Weights of one layer. Names ending in _t are packed for products with the transposed weight (x Wᵀ, a linear's own
// direction), the same names without it for products with the weight itself (the way back). Biases are padded.
template <typename T>
struct Layer {
  const T *norm_weight, *norm_bias;  // null without normalisation
  const T *receiver_t, *receiver, *receiver_bias, *sender_t, *sender, *radial_t, *radial;
  const T *message_t, *message, *message_bias;
  const T *own_t, *own, *own_bias, *gathered_t, *gathered, *down_t, *down, *down_bias;
};

// What follows the last layer; those of a direct head are null in a conservative model.
template <typename T>
struct Heads {
  const T *norm_weight, *norm_bias;
  const T *up_t, *up, *up_bias, *energies;  // energies: (levels, padded hidden)
  const T *receiver_t, *receiver_bias, *sender_t, *radial_t, *strengths;  // strengths: (levels, padded width)
};

struct Model {
  int64_t width, hidden, radials, layers, residual, n_levels, n_elements;
  double cutoff, message_scale, norm_eps;
  const void *layer, *heads;
  const double *reference, *scale;  // (levels, elements) eV and (levels,) eV
};

struct Systems {
  int64_t n_systems, n_atoms, n_edges, n_rows;
  const double *positions, *cell, *shifts;
  const int64_t *senders, *receivers, *system_idx, *level_idx, *element_idx;
  const int64_t* row;  // (N,) which row of `embedded` an atom begins with
  const void* embedded;  // (n_rows, width), of the weights' type
};

struct Wanted {
  int64_t forces, virial, keep, block_edges, threads;
};

struct Out {
  double *energy, *forces, *virial;
};

}  // namespace equipot
