// The kernels compiled for one instruction set: included once by each of avx512.cpp, avx2.cpp and
// portable.cpp, which define ATTN_EXT_VECTOR_BYTES first. Everything is local to that file.

namespace attn_ext {
namespace {

#include "simd.h"
//
#include "matmul.h"
//
#include "tile.h"
//
#include "forward.h"
//
#include "weights.h"
//
#include "backward.h"

// Runs `call` with the storage and compute types of a dtype.
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

void run_forward(const Problem& p, const ForwardArguments& to, int threads) {
  with_types(p.dtype,
             [&](auto t, auto real) { forward<decltype(t), decltype(real)>(p, to, threads); });
}
void run_backward(const Problem& p, const BackwardArguments& to, int threads) {
  with_types(p.dtype,
             [&](auto t, auto real) { backward<decltype(t), decltype(real)>(p, to, threads); });
}
void run_weights(const Problem& p, const WeightsArguments& to, int threads) {
  with_types(p.dtype,
             [&](auto t, auto real) { weights<decltype(t), decltype(real)>(p, to, threads); });
}

}  // namespace
}  // namespace attn_ext
