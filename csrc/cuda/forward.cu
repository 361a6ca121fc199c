// Instances of forward.cuh.
#include "forward.cuh"
#include "launch.cuh"

namespace attn_ext::cuda {
namespace {

// Whether the generator's counters go up by one from call to call: positions count in 32 bits.
bool counts_on(int64_t start, int64_t length) {
  constexpr int64_t kPositions = int64_t{1} << 32;
  return (start & (kPositions - 1)) + length <= kPositions;
}

template <typename Element, int kWidth, Variant kVariant>
void run(const Problem& p, const ForwardArguments& to, const Settings& settings) {
  using Shape = ForwardShape<Element, kWidth, kVariant>;
  launch(settings, p.batch * p.query_heads * blocks_of(p.query_length, Shape::kRows),
         Shape::kSharedBytes, run_forward<Element, kWidth, kVariant>, p, to);
}

}  // namespace

void forward(const Problem& p, const ForwardArguments& to, const Settings& settings) {
  with_element(p, settings, [&](auto element) {
    with_width(p, [&](auto width) {
      using Element = decltype(element);
      auto chosen = run<Element, width, Variant::kGeneral>;
      if constexpr (kIsHalf<Element>) {
        if (is_plain<Element>(p, p.query, p.key, p.value, to.out)) {
          if (p.dropout_p == 0) {
            chosen = run<Element, width, Variant::kPlain>;
          } else if constexpr (ForwardShape<Element, width, Variant::kDropout>::kWholeCalls) {
            if (calls_are_aligned(p) && counts_on(p.query_start, p.query_length) &&
                counts_on(p.key_start, p.key_length)) {
              chosen = run<Element, width, Variant::kDropout>;
            }
          }
        }
      }
      chosen(p, to, settings);
    });
  });
}

}  // namespace attn_ext::cuda
