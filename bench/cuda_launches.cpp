// Says how the CUDA kernels are launched: threads and dynamic shared memory of each, which are in
// no cubin. Linked with the objects of csrc/cuda in place of the CUDA runtime, so that what answers
// is the code that launches, and nothing runs.
//
// usage: cuda_launches SHARED_LIMIT HAS_BFLOAT16_AND_TF32
//   SHARED_LIMIT  bytes of shared memory that a block may have on the device in question
// Prints, for each kind of problem and each launch: the kind, the kernel's mangled and its readable
// name, threads and bytes, between tabs. A problem whose kernels need more is left out: the backend
// refuses it.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "attention.h"
#include "cuda/kernels.h"

using attn_ext::DType;
using attn_ext::View;

namespace {

std::map<const void*, const char*> names;  // of kernels, by the address of what stands for them
const char* kind;

struct Dim3 {
  unsigned x, y, z;
};

void print_launch(const void* kernel, Dim3 threads, std::size_t shared_bytes) {
  char* readable = abi::__cxa_demangle(names.at(kernel), nullptr, nullptr, nullptr);
  std::printf("%s\t%s\t%s\t%u\t%zu\n", kind, names.at(kernel), readable,
              threads.x * threads.y * threads.z, shared_bytes);
  std::free(readable);
}

}  // namespace

// The CUDA runtime, as far as nvcc's objects call it.
extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, ...) {
  names[host] = device;
}
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
int cudaLaunchKernel(const void* kernel, Dim3, Dim3 threads, void**, std::size_t shared_bytes,
                     void*) {
  print_launch(kernel, threads, shared_bytes);
  return 0;
}
// For launches by <<<>>>, which there are none of.
int __cudaGetKernel(void**, const void*) { std::abort(); }
int __cudaLaunchKernel(void*, Dim3, Dim3, void**, std::size_t, void*) { std::abort(); }
unsigned __cudaPopCallConfiguration(Dim3*, Dim3*, std::size_t*, void*) { std::abort(); }
}

namespace attn_ext::cuda {
void check(int, const char*) {}
}  // namespace attn_ext::cuda

namespace {

constexpr int64_t kBatch = 2, kHeads = 3, kLength = 300;

// Contiguous (B, H, L, width); nobody looks at what is there.
View view(DType dtype, int64_t width) {
  View result;
  result.data = reinterpret_cast<void*>(1 << 20);
  result.dtype = dtype;
  const int64_t strides[4] = {kHeads * kLength * width, kLength * width, width, 1};
  for (int i = 0; i < 4; ++i) result.stride[i] = strides[i];
  return result;
}

attn_ext::Problem problem(DType dtype, int64_t head_dim) {
  attn_ext::Problem p{};
  p.dtype = dtype;
  p.batch = kBatch, p.query_heads = p.key_heads = kHeads;
  p.query_length = p.key_length = kLength;
  p.head_dim = p.value_dim = head_dim;
  p.query = p.key = p.value = view(dtype, head_dim);
  p.scale = 1, p.left = p.right = p.diagonal = kLength;
  return p;
}

void launch_all(const attn_ext::Problem& p, const attn_ext::cuda::Settings& settings,
                bool weights_gradient) {
  const View row = view(p.dtype, p.head_dim), score = view(DType::kFloat32, kLength);
  View single = view(DType::kFloat32, 1);
  if (attn_ext::cuda::shared_bytes(p, settings) > settings.shared_limit) return;
  if (!weights_gradient) attn_ext::cuda::forward(p, {row, single}, settings);
  attn_ext::BackwardArguments to{};
  to.lse = to.row_term = single;
  to.dquery = to.dkey = row;
  if (weights_gradient) {
    to.dweights = view(p.dtype, kLength), to.dweights_scale = 1;
  } else {
    to.out = to.dout = to.dvalue = row;
  }
  if (p.mask) to.dmask = score;
  attn_ext::cuda::backward(p, to, settings);
  if (weights_gradient) attn_ext::cuda::weights(p, {single, score, true}, settings);
}

void launch_every_kind(DType dtype, int64_t width, const attn_ext::cuda::Settings& settings) {
  const attn_ext::Problem plain = problem(dtype, width);
  attn_ext::Problem p = plain;
  kind = "plain", launch_all(p, settings, false);
  kind = "causal", p.diagonal = p.right = 0, launch_all(p, settings, false);
  kind = "dropout", p = plain, p.dropout_p = 0.5, launch_all(p, settings, false);
  kind = "softcap", p = plain, p.softcap = 1, launch_all(p, settings, false);
  kind = "mask", p = plain, p.mask = view(dtype, kLength), launch_all(p, settings, false);
  kind = "odd head_dim", p = problem(dtype, width - 1), launch_all(p, settings, false);
  kind = "weights", p = plain, launch_all(p, settings, true);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 1;
  attn_ext::cuda::Settings settings{nullptr, false, std::atoi(arguments[1])};
  const bool newer = std::atoi(arguments[2]) != 0;
  for (const int width : {32, 64, 96, 128, 192, 256}) {
    settings.allow_tf32 = false;
    launch_every_kind(DType::kFloat16, width, settings);
    launch_every_kind(DType::kFloat32, width, settings);
    if (!newer) continue;
    launch_every_kind(DType::kBFloat16, width, settings);
    settings.allow_tf32 = true;
    launch_every_kind(DType::kFloat32, width, settings);
  }
}
