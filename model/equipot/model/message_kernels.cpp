// The sweeps of message_sweeps.py, and the two passes of strengths_blocked.py, as operators of torch.
//
// Work is shared between threads by panels of columns, so sums over edges need no locks and each has one order.

#include <torch/library.h>

#include "message_second.h"

namespace {

using at::Tensor;
using equipot::Direction;
using equipot::Graph;
using equipot::Maybe;

std::vector<Maybe> unpack(const c10::List<Maybe>& list) {
  std::vector<Maybe> out;
  for (size_t k = 0; k < list.size(); ++k) out.push_back(list.get(k));
  return out;
}

c10::List<Maybe> pack(const std::vector<Maybe>& tensors) {
  c10::List<Maybe> out;
  for (const Maybe& t : tensors) out.push_back(t);
  return out;
}

std::vector<bool> flags(at::IntArrayRef wanted) { return std::vector<bool>(wanted.begin(), wanted.end()); }

template <typename F>
auto dispatch(at::TensorList x, F&& run) {
  switch (x[0].scalar_type()) {
    case at::kFloat:
      return run(float());
    case at::kBFloat16:
      return run(at::BFloat16());
    default:
      return run(double());
  }
}

}  // namespace

TORCH_LIBRARY(equipot, m) {
  m.def("has_bfloat16() -> bool", [] { return equipot::has_microkernel<at::BFloat16>(); });
  m.def("forward(Tensor[] x, Tensor s, Tensor r, bool keep) -> Tensor?[]",
        [](at::TensorList x, const Tensor& s, const Tensor& r, bool keep) {
          return dispatch(x, [&](auto one) { return pack(equipot::forward(Graph<decltype(one)>(x, s, r), keep)); });
        });
  m.def("reverse(Tensor[] x, Tensor s, Tensor r, Tensor g, Tensor? y, int[] wanted, bool keep) -> Tensor?[]",
        [](at::TensorList x, const Tensor& s, const Tensor& r, const Tensor& g, const Maybe& y,
           at::IntArrayRef wanted, bool keep) {
          return dispatch(x, [&](auto one) {
            return pack(equipot::reverse(Graph<decltype(one)>(x, s, r), g, y, flags(wanted), keep));
          });
        });
  m.def("push(Tensor[] x, Tensor s, Tensor r, Tensor?[] t, Tensor? y, bool keep) -> Tensor?[]",
        [](at::TensorList x, const Tensor& s, const Tensor& r, const c10::List<Maybe>& t, const Maybe& y, bool keep) {
          return dispatch(x, [&](auto one) {
            const Graph<decltype(one)> graph(x, s, r);
            return pack(equipot::push(graph, Direction<decltype(one)>(graph, unpack(t)), y, keep));
          });
        });
  m.def("reverse_push(Tensor[] x, Tensor s, Tensor r, Tensor? g_out, Tensor g_push, Tensor?[] t, Tensor? y, "
        "Tensor? t_y, Tensor? g_hidden, int[] wanted) -> Tensor?[]",
        [](at::TensorList x, const Tensor& s, const Tensor& r, const Maybe& g_out, const Tensor& g_push,
           const c10::List<Maybe>& t, const Maybe& y, const Maybe& t_y, const Maybe& g_hidden,
           at::IntArrayRef wanted) {
          return dispatch(x, [&](auto one) {
            using S = decltype(one);
            const Graph<S> graph(x, s, r);
            const Direction<S> direction(graph, unpack(t));
            equipot::ReversePush<S> sweep(graph, direction, g_out, g_push, y, t_y, g_hidden, flags(wanted));
            sweep.run();
            return pack(sweep.sums.result());
          });
        });
  m.def("strengths(Tensor[] x, Tensor s, Tensor r) -> Tensor",
        [](at::TensorList x, const Tensor& s, const Tensor& r) {
          return dispatch(x, [&](auto one) { return equipot::strengths(Graph<decltype(one)>(x, s, r)); });
        });
  m.def("strengths_reverse(Tensor[] x, Tensor s, Tensor r, Tensor g, int[] wanted) -> Tensor?[]",
        [](at::TensorList x, const Tensor& s, const Tensor& r, const Tensor& g, at::IntArrayRef wanted) {
          return dispatch(x, [&](auto one) {
            return pack(equipot::strengths_reverse(Graph<decltype(one)>(x, s, r), g, flags(wanted)));
          });
        });
}
