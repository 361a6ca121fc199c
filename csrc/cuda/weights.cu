// Instances of weights.cuh, and what the kernels of a problem need.
#include "weights.cuh"

#include "backward_queries.cuh"
#include "launch.cuh"
#include "mask_gradient.cuh"

namespace attn_ext::cuda {

void weights(const Problem& p, const WeightsArguments& to, const Settings& settings) {
  with_exact_element(p, settings, [&](auto element) {
    using Shape = WeightsShape<decltype(element)>;
    const int64_t heads = to.average ? 1 : p.query_heads;
    launch(settings,
           p.batch * heads * blocks_of(p.query_length, Shape::kRows) *
               blocks_of(p.key_length, Shape::kKeys),
           Shape::kSharedBytes, run_weights<decltype(element)>, p, to);
  });
}

int shared_bytes(const Problem& p, const Settings& settings) {
  int bytes = backward_keys_shared_bytes(p, settings);
  with_element(p, settings, [&](auto element) {
    with_width(p, [&](auto width) {
      using Element = decltype(element);
      bytes =
          std::max({bytes, ForwardShape<Element, width, Variant::kGeneral>::kSharedBytes,
                    ForwardShape<Element, width, Variant::kPlain>::kSharedBytes,
                    ForwardShape<Element, width, Variant::kDropout>::kSharedBytes,
                    QueryGradientShape<Element, width>::kSharedBytes,
                    WeightsShape<Element>::kSharedBytes, MaskGradientShape<Element>::kSharedBytes});
    });
  });
  return bytes;
}

}  // namespace attn_ext::cuda
