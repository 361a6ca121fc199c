// The kernels compiled for one instruction set: included once by the file of each (avx512.cpp and
// its like), which defines ATTN_EXT_VECTOR_BYTES first. Everything is local to that file.
//
// With ATTN_EXT_BFLOAT16_PRODUCTS only bfloat16 differs from AVX-512, and the rest is left to it.

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
#ifdef ATTN_EXT_AMX_PRODUCTS
#include "matmul_amx.h"
#endif
//
#include "tile.h"
//
#include "scores.h"
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
#include "backward.h"
//
#include "decode_backward.h"

#ifndef ATTN_EXT_BFLOAT16_PRODUCTS
// Runs `call` with values of the storage type and of the compute type.
template <typename Call>
void with_types(DType dtype, Call call) {
  switch (dtype) {
    case DType::kFloat32:
      return call(float{}, float{});
    case DType::kBFloat16:
      return call(BFloat16{}, float{});
    case DType::kFloat16:
      return call(Float16{}, float{});
    default:
      return call(double{}, double{});
  }
}
#endif

#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
// Pairs of bfloat16 can't be multiplied with a scale's sign, and few rows are multiplied in float.
inline bool left_to_avx512(const Problem& p) {
  return p.dtype != DType::kBFloat16 || p.scale <= 0 || suits_decode(p);
}
#endif

void run_forward(const Problem& p, const ForwardArguments& to, int threads) {
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
  if (left_to_avx512(p)) return kAvx512Kernels.forward(p, to, threads);
  forward<BFloat16, float, BFloat16Pair>(p, to, threads);
#else
  with_types(p.dtype, [&](auto t, auto real) {
    using T = decltype(t);
    using Real = decltype(real);
    suits_decode(p) ? decode<T, Real>(p, to, threads) : forward<T, Real, Real>(p, to, threads);
  });
#endif
}
void run_weights(const Problem& p, const WeightsArguments& to, int threads) {
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
  if (left_to_avx512(p)) return kAvx512Kernels.weights(p, to, threads);
  weights<BFloat16, float, BFloat16Pair>(p, to, threads);
#else
  with_types(p.dtype, [&](auto t, auto real) {
    using T = decltype(t);
    using Real = decltype(real);
    suits_decode(p) ? decode_weights<T, Real>(p, to, threads)
                    : weights<T, Real, Real>(p, to, threads);
  });
#endif
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
  backward<BFloat16, float, BFloat16Pair>(p, to, threads);
#else
  with_types(p.dtype, [&](auto t, auto real) {
    using T = decltype(t);
    using Real = decltype(real);
    suits_decode(p) ? decode_backward<T, Real>(p, to, threads)
                    : backward<T, Real, Real>(p, to, threads);
  });
#endif
}

}  // namespace
}  // namespace attn_ext
