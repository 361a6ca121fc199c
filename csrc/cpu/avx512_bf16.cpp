// AVX-512 with products of bfloat16 pairs (vdpbf16ps): Zen 4, Cooper Lake, Sapphire Rapids and
// later.
#include "headers.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define ATTN_EXT_VECTOR_BYTES 64
#define ATTN_EXT_BFLOAT16_PRODUCTS 1
#include "instruction_set.h"

namespace attn_ext {
const Kernels kAvx512Bf16Kernels = {
    "avx512_bf16",
    [] { return kAvx512Kernels.available() && __builtin_cpu_supports("avx512bf16") != 0; },
    run_forward,
    run_backward,
    run_weights,
    run_forward_and_weights,
    run_linear};
}  // namespace attn_ext
#endif
