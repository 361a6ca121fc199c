// Instances of backward_keys.cuh.
#include "backward_keys.cuh"
#include "launch.cuh"

namespace attn_ext::cuda {
namespace {

template <typename Element, int kWidth, bool kGeneral>
void run_key_gradients(const Problem& p, const BackwardArguments& to, const Settings& settings) {
  using Shape = KeyGradientShape<Element, kWidth>;
  const auto run = [&](auto kernel) {
    launch(settings, p.batch * p.key_heads * blocks_of(p.key_length, Shape::kKeys),
           Shape::kSharedBytes, kernel, p, to);
  };
  if constexpr (kWidth > 192) {
    run(key_gradients<Element, kWidth, kGeneral, Pass::kKeys>);
    if (!to.dweights) run(key_gradients<Element, kWidth, kGeneral, Pass::kValues>);
  } else {
    run(key_gradients<Element, kWidth, kGeneral, Pass::kBoth>);
  }
}

}  // namespace

void backward_keys(const Problem& p, const BackwardArguments& to, const Settings& settings) {
  with_element(p, settings, [&](auto element) {
    with_width(p, [&](auto width) {
      using Element = decltype(element);
      auto run = run_key_gradients<Element, width, true>;
      if constexpr (kIsHalf<Element>) {
        if (is_plain_backward<Element>(p, to)) run = run_key_gradients<Element, width, false>;
      }
      run(p, to, settings);
    });
  });
}

int backward_keys_shared_bytes(const Problem& p, const Settings& settings) {
  int bytes = 0;
  with_element(p, settings, [&](auto element) {
    with_width(
        p, [&](auto width) { bytes = KeyGradientShape<decltype(element), width>::kSharedBytes; });
  });
  return bytes;
}

}  // namespace attn_ext::cuda
