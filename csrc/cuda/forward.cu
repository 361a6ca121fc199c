// Instances of forward.cuh.
#include "forward.cuh"
#include "launch.cuh"

namespace attn_ext::cuda {

void forward(const Problem& p, const ForwardArguments& to, const Settings& settings) {
  with_element(p, settings, [&](auto element) {
    with_width(p, [&](auto width) {
      using Element = decltype(element);
      using Shape = ForwardShape<Element, width>;
      const bool plain = is_plain<Element>(p, p.query, p.key, p.value, to.out);
      const int64_t blocks = p.batch * p.query_heads * blocks_of(p.query_length, Shape::kRows);
      auto kernel = run_forward<Element, width, true>;
      if constexpr (kIsHalf<Element>) {
        if (plain) kernel = run_forward<Element, width, false>;
      }
      launch(settings, blocks, Shape::kSharedBytes, kernel, p, to);
    });
  });
}

}  // namespace attn_ext::cuda
