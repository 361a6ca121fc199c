// Instances of backward_queries.cuh and mask_gradient.cuh, and the backward pass as a whole.
#include "backward_queries.cuh"
#include "launch.cuh"
#include "mask_gradient.cuh"

namespace attn_ext::cuda {
namespace {

template <typename Element, int kWidth, bool kGeneral>
void run_query_gradients(const Problem& p, const BackwardArguments& to, const Settings& settings) {
  using Shape = QueryGradientShape<Element, kWidth>;
  launch(settings, p.batch * p.query_heads * blocks_of(p.query_length, Shape::kRows),
         Shape::kSharedBytes, query_gradients<Element, kWidth, kGeneral>, p, to);
}

template <typename Element>
void run_mask_gradient(const Problem& p, const BackwardArguments& to, const Settings& settings) {
  using Shape = MaskGradientShape<Element>;
  const auto blocks = [&](int dimension, int64_t size, int step) {
    return to.dmask.stride[dimension] == 0 ? 1 : blocks_of(size, step);
  };
  launch(settings,
         blocks(0, p.batch, 1) * blocks(1, p.query_heads, 1) *
             blocks(2, p.query_length, Shape::kRows) * blocks(3, p.key_length, Shape::kKeys),
         Shape::kSharedBytes, mask_gradient<Element>, p, to);
}

}  // namespace

void backward(const Problem& p, const BackwardArguments& to, const Settings& settings) {
  with_element(p, settings, [&](auto element) {
    with_width(p, [&](auto width) {
      using Element = decltype(element);
      if (!to.dweights) {
        launch(settings, blocks_of(p.batch * p.query_heads * p.query_length, kWarps), 0,
               row_terms<Element>, p, to);
      }
      auto run = run_query_gradients<Element, width, true>;
      if constexpr (kIsHalf<Element>) {
        if (is_plain_backward<Element>(p, to)) run = run_query_gradients<Element, width, false>;
      }
      run(p, to, settings);
    });
  });
  backward_keys(p, to, settings);
  if (!to.dmask) return;
  with_exact_element(p, settings,
                     [&](auto element) { run_mask_gradient<decltype(element)>(p, to, settings); });
}

}  // namespace attn_ext::cuda
