// AVX-512 with bfloat16 products by the tiles of AMX: Sapphire Rapids and later.
#include "headers.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#define ATTN_EXT_VECTOR_BYTES 64
#define ATTN_EXT_BFLOAT16_PRODUCTS 1
#define ATTN_EXT_AMX_PRODUCTS 1
#include "instruction_set.h"

namespace attn_ext {
#ifdef ATTN_EXT_EMULATE_AMX
const Kernels kAmxKernels = {"amx_emulated", [] { return kAvx512Bf16Kernels.available(); },
                             run_forward,    run_backward,
                             run_weights,    run_forward_and_weights,
                             run_linear};
#else
namespace {
// Linux gives the registers to processes that ask for them (its documentation, x86/xstate), since
// signal handlers then need larger stacks; it refuses where a stack is too small.
bool tiles_are_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of <asm/prctl.h>, Linux 5.16
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
}  // namespace

const Kernels kAmxKernels = {"amx",
                             [] {
                               return kAvx512Bf16Kernels.available() &&
                                      __builtin_cpu_supports("amx-tile") &&
                                      __builtin_cpu_supports("amx-bf16") && tiles_are_granted();
                             },
                             run_forward,
                             run_backward,
                             run_weights,
                             run_forward_and_weights,
                             run_linear};
#endif
}  // namespace attn_ext
#endif
