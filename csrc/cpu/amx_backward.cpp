// The backward pass of amx.cpp.
#include "headers.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#define ATTN_EXT_VECTOR_BYTES 64
#define ATTN_EXT_BFLOAT16_PRODUCTS 1
#define ATTN_EXT_AMX_PRODUCTS 1
#define ATTN_EXT_AMX_BACKWARD 1
#include "instruction_set.h"

namespace attn_ext {
void run_amx_backward(const Problem& p, const BackwardArguments& to, int threads) {
  run_backward(p, to, threads);
}
}  // namespace attn_ext
#endif
