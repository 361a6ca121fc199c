// Instances of backward_queries.cuh, backward_keys.cuh and mask_gradient.cuh.
#include "backward_keys.cuh"
#include "backward_queries.cuh"
#include "launch.cuh"
#include "mask_gradient.cuh"

namespace attn_ext::cuda {
namespace {

template <typename Element, int kWidth, bool kGeneral>
void run_gradients(const Problem& p, const BackwardArguments& to, const Settings& settings) {
  using QueryShape = QueryGradientShape<Element, kWidth>;
  using KeyShape = KeyGradientShape<Element, kWidth>;
  launch(settings, p.batch * p.query_heads * blocks_of(p.query_length, QueryShape::kRows),
         QueryShape::kSharedBytes, query_gradients<Element, kWidth, kGeneral>, p, to);
  const auto keys = [&](auto kernel) {
    launch(settings, p.batch * p.key_heads * blocks_of(p.key_length, KeyShape::kKeys),
           KeyShape::kSharedBytes, kernel, p, to);
  };
  if constexpr (kWidth <= 192) {
    keys(key_gradients<Element, kWidth, kGeneral, Pass::kBoth>);
  } else {
    keys(key_gradients<Element, kWidth, kGeneral, Pass::kKeys>);
    if (!to.dweights) keys(key_gradients<Element, kWidth, kGeneral, Pass::kValues>);
  }
}

template <typename Element, int kWidth>
void run_mask_gradient(const Problem& p, const BackwardArguments& to, const Settings& settings) {
  using Shape = MaskGradientShape<Element, kWidth>;
  const auto blocks = [&](int dimension, int64_t size, int step) {
    return to.dmask.stride[dimension] == 0 ? 1 : blocks_of(size, step);
  };
  launch(settings,
         blocks(0, p.batch, 1) * blocks(1, p.query_heads, 1) *
             blocks(2, p.query_length, Shape::kRows) * blocks(3, p.key_length, Shape::kKeys),
         Shape::kSharedBytes, mask_gradient<Element, kWidth>, p, to);
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
      const bool plain = !to.dweights && is_plain<Element>(p, p.query, p.key, p.value, to.dout,
                                                           to.dquery, to.dkey, to.dvalue);
      auto run = run_gradients<Element, width, true>;
      if constexpr (kIsHalf<Element>) {
        if (plain) run = run_gradients<Element, width, false>;
      }
      run(p, to, settings);
      if (to.dmask) run_mask_gradient<Element, width>(p, to, settings);
    });
  });
}

}  // namespace attn_ext::cuda
