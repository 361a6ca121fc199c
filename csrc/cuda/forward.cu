// Instances of forward.cuh.
#include "forward.cuh"
#include "launch.cuh"

namespace attn_ext::cuda {
namespace {

template <typename Element, int kWidth, bool kGeneral>
void run(const Problem& p, const ForwardArguments& to, const Settings& settings) {
  using Shape = ForwardShape<Element, kWidth, kGeneral>;
  launch(settings, p.batch * p.query_heads * blocks_of(p.query_length, Shape::kRows),
         Shape::kSharedBytes, run_forward<Element, kWidth, kGeneral>, p, to);
}

}  // namespace

void forward(const Problem& p, const ForwardArguments& to, const Settings& settings) {
  with_element(p, settings, [&](auto element) {
    with_width(p, [&](auto width) {
      using Element = decltype(element);
      auto chosen = run<Element, width, true>;
      if constexpr (kIsHalf<Element>) {
        if (is_plain<Element>(p, p.query, p.key, p.value, to.out)) {
          chosen = run<Element, width, false>;
        }
      }
      chosen(p, to, settings);
    });
  });
}

}  // namespace attn_ext::cuda
