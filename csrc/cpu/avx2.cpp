// AVX2 with FMA and half-precision conversions: 8 floats a vector, 16 registers.
#include "headers.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define ATTN_EXT_VECTOR_BYTES 32
#include "instruction_set.h"

namespace attn_ext {
const Kernels kAvx2Kernels = {"avx2",
                              [] {
                                return __builtin_cpu_supports("avx2") &&
                                       __builtin_cpu_supports("fma") &&
                                       __builtin_cpu_supports("f16c");
                              },
                              run_forward,
                              run_backward,
                              run_weights,
                              run_forward_and_weights,
                              run_linear};
}  // namespace attn_ext
#endif
