// AVX-512: 16 floats a vector, 32 registers.
#include "headers.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define ATTN_EXT_VECTOR_BYTES 64
#include "instruction_set.h"

namespace attn_ext {
const Kernels kAvx512Kernels = {
    "avx512",
    [] {
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    },
    run_forward,
    run_backward,
    run_weights,
    run_forward_and_weights,
    run_linear};
}  // namespace attn_ext
#endif
