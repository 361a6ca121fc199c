// The kernels compiled for one instruction set: included once by the file of each (avx512.cpp and
// its like), which defines ATTN_EXT_VECTOR_BYTES first. Everything is local to that file.
//
// With ATTN_EXT_BFLOAT16_PRODUCTS only bfloat16 differs from AVX-512, and with AMX float16's
// forward pass (planes.h); the rest is left to AVX-512.

namespace attn_ext {
namespace {

#include "simd.h"
//
#include "../philox_rounds.h"
//
#include "amx.h"
//
#include "upcoming.h"
//
#include "matmul.h"
//
#include "tile.h"
//
#include "masks.h"
//
#ifdef ATTN_EXT_AMX_PRODUCTS
#include "matmul_amx.h"
#endif
//
#include "scores.h"
//
#ifdef ATTN_EXT_AMX_PRODUCTS
#include "planes.h"
#endif
//
#include "forward.h"
//
#include "decode_products.h"
//
#include "decode.h"
//
#include "linear.h"
//
#include "weights.h"
//
#include "decode_weights.h"
//
#include "forward_and_weights.h"
//
#include "backward.h"
//
#include "decode_backward.h"

// Pairs of bfloat16 can't be multiplied with a scale's sign, and few rows are multiplied in float.
[[maybe_unused]] inline bool left_to_avx512(const Problem& p) {
  return p.dtype != DType::kBFloat16 || p.scale <= 0 || suits_decode(p);
}

// Runs the kernel for few rows, with values of the storage type and of the compute type, or the
// general one, which takes one of the elements that are multiplied, too.
template <typename FewRows, typename General>
void with_types(const Problem& p, FewRows few_rows, General general) {
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
  (void)p, (void)few_rows;  // see left_to_avx512
  general(BFloat16{}, float{}, BFloat16Pair{});
#else
  const auto run = [&](auto t, auto real) {
    suits_decode(p) ? few_rows(t, real) : general(t, real, real);
  };
  switch (p.dtype) {
    case DType::kFloat32:
      return run(float{}, float{});
    case DType::kBFloat16:
      return run(BFloat16{}, float{});
    case DType::kFloat16:
      return run(Float16{}, float{});
    default:
      return run(double{}, double{});
  }
#endif
}

void run_forward(const Problem& p, const ForwardArguments& to, int threads) {
#ifdef ATTN_EXT_AMX_PRODUCTS
  if (suits_planes(p, to) && all_finite_halves(p, threads)) {
    return forward<Float16, float, PlanePair>(p, to, threads);
  }
#endif
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
  if (left_to_avx512(p)) return kAvx512Kernels.forward(p, to, threads);
#endif
  with_types(
      p, [&](auto t, auto real) { decode<decltype(t), decltype(real)>(p, to, threads); },
      [&](auto t, auto real, auto element) {
        forward<decltype(t), decltype(real), decltype(element)>(p, to, threads);
      });
}
void run_weights(const Problem& p, const WeightsArguments& to, int threads) {
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
  if (left_to_avx512(p)) return kAvx512Kernels.weights(p, to, threads);
#endif
  with_types(
      p, [&](auto t, auto real) { decode_weights<decltype(t), decltype(real)>(p, to, threads); },
      [&](auto t, auto real, auto element) {
        weights<decltype(t), decltype(real), decltype(element)>(p, to, threads);
      });
}
void run_forward_and_weights(const Problem& p, const ForwardArguments& to,
                             const WeightsArguments& weights_to, int threads) {
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
  if (left_to_avx512(p)) return kAvx512Kernels.forward_and_weights(p, to, weights_to, threads);
#endif
  with_types(
      p,
      [&](auto t, auto real) {
        decode<decltype(t), decltype(real)>(p, to, threads);
        decode_weights<decltype(t), decltype(real)>(p, weights_to, threads);
      },
      [&](auto t, auto real, auto element) {
        forward_and_weights<decltype(t), decltype(real), decltype(element)>(p, to, weights_to,
                                                                            threads);
      });
}
void run_linear(const LinearArguments& arguments, int threads) {
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
  kAvx512Kernels.linear(arguments, threads);
#else
  linear<float>(arguments, threads);
#endif
}
void run_backward(const Problem& p, const BackwardArguments& to, int threads) {
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
  if (left_to_avx512(p)) return kAvx512Kernels.backward(p, to, threads);
#endif
  with_types(
      p, [&](auto t, auto real) { decode_backward<decltype(t), decltype(real)>(p, to, threads); },
      [&](auto t, auto real, auto element) {
        backward<decltype(t), decltype(real), decltype(element)>(p, to, threads);
      });
}

}  // namespace
}  // namespace attn_ext
