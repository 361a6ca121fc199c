// The CUDA kernels as the bindings see them: csrc/cuda/forward.cu, backward_queries.cu,
// backward_keys.cu and weights.cu.
//
// Everything is enqueued on a stream of the current device; nothing is allocated or waited for. A
// std::runtime_error says what CUDA refused.
#pragma once

#include "../attention.h"

namespace attn_ext::cuda {

struct Settings {
  void* stream;      // a cudaStream_t
  bool allow_tf32;   // float32 products may be rounded to TF32; from compute capability 8.0 on
  int shared_limit;  // what a block may have of shared memory, in bytes: 64 KiB on 7.5 alone
};

void forward(const Problem&, const ForwardArguments&, const Settings&);

// `row_term` must be given: the kernels share it. dmask, if any, is float32 and written whole.
void backward(const Problem&, const BackwardArguments&, const Settings&);

// The part of it that backward leaves to a file of its own.
void backward_keys(const Problem&, const BackwardArguments&, const Settings&);
int backward_keys_shared_bytes(const Problem&, const Settings&);

void weights(const Problem&, const WeightsArguments&, const Settings&);

// Shared memory that a block needs for the widest kernel of such a problem, in bytes.
int shared_bytes(const Problem&, const Settings&);

}  // namespace attn_ext::cuda
