// The kernels compiled for one instruction set: included once by the file of each (avx512.cpp and
// its like), which defines ATTN_EXT_VECTOR_BYTES first. Everything is local to that file.
//
// With ATTN_EXT_BFLOAT16_PRODUCTS only bfloat16 differs from AVX-512, and the rest is left to it.

namespace attn_ext {
namespace {

#include "simd.h"
//
#include "matmul.h"
//
#include "tile.h"
//
#include "scores.h"
//
#include "forward.h"
//
#include "weights.h"
//
#include "backward.h"

// Runs `call` with values of the storage type, the compute type and the type of the elements that
// are multiplied. False: another file's kernels must run it.
template <typename Call>
bool with_types(const Problem& p, Call call) {
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
  if (p.dtype != DType::kBFloat16 || p.scale <= 0) return false;
  call(BFloat16{}, float{}, BFloat16Pair{});
#else
  switch (p.dtype) {
    case DType::kFloat32:
      call(float{}, float{}, float{});
      break;
    case DType::kBFloat16:
      call(BFloat16{}, float{}, float{});
      break;
    case DType::kFloat16:
      call(Float16{}, float{}, float{});
      break;
    default:
      call(double{}, double{}, double{});
  }
#endif
  return true;
}

#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
constexpr const Kernels* kOthers = &kAvx512Kernels;
#else
constexpr const Kernels* kOthers = nullptr;
#endif

void run_forward(const Problem& p, const ForwardArguments& to, int threads) {
  const auto call = [&](auto t, auto real, auto element) {
    forward<decltype(t), decltype(real), decltype(element)>(p, to, threads);
  };
  if (!with_types(p, call)) kOthers->forward(p, to, threads);
}
void run_backward(const Problem& p, const BackwardArguments& to, int threads) {
  const auto call = [&](auto t, auto real, auto element) {
    backward<decltype(t), decltype(real), decltype(element)>(p, to, threads);
  };
  if (!with_types(p, call)) kOthers->backward(p, to, threads);
}
void run_weights(const Problem& p, const WeightsArguments& to, int threads) {
  const auto call = [&](auto t, auto real, auto element) {
    weights<decltype(t), decltype(real), decltype(element)>(p, to, threads);
  };
  if (!with_types(p, call)) kOthers->weights(p, to, threads);
}

}  // namespace
}  // namespace attn_ext
