// Any machine: 4 floats a vector, which is SSE2 on x86-64 and NEON on AArch64.
#include "headers.h"

#define ATTN_EXT_VECTOR_BYTES 16
#include "instruction_set.h"

namespace attn_ext {
const Kernels kPortableKernels = {"portable",  [] { return true; },     run_forward, run_backward,
                                  run_weights, run_forward_and_weights, run_linear};
}  // namespace attn_ext
