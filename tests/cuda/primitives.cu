// One kernel for each wrapper of csrc/cuda/primitives.cuh that holds inline PTX; test_primitives.py
// reads what nvcc makes of them.
#include "cuda/primitives.cuh"

using namespace attn_ext::cuda;

#define PRODUCT(name, Element)                                                                  \
  extern "C" __global__ void name(float4* d, const uint4* a, const uint2* b, const float4* c) { \
    const float4 x = *c;                                                                        \
    const uint4 y = *a;                                                                         \
    const uint2 z = *b;                                                                         \
    float sums[4] = {x.x, x.y, x.z, x.w};                                                       \
    const uint32_t left[4] = {y.x, y.y, y.z, y.w};                                              \
    multiply_add(sums, left, z.x, z.y, Element{});                                              \
    *d = float4{sums[0], sums[1], sums[2], sums[3]};                                            \
  }

PRODUCT(product_float16, Float16)
#if ATTN_EXT_TESTED >= 80
PRODUCT(product_bfloat16, BFloat16)

extern "C" __global__ void product_tf32(float4* d, const uint4* a, const uint2* b,
                                        const float4* c) {
  const float4 x = *c;
  const uint4 y = *a;
  const uint2 z = *b;
  float sums[4] = {x.x, x.y, x.z, x.w};
  const uint32_t left[4] = {y.x, y.y, y.z, y.w};
  multiply_add_tf32(sums, left, z.x, z.y);
  *d = float4{sums[0], sums[1], sums[2], sums[3]};
}
extern "C" __global__ void pack_float16(uint32_t* d, float low, float high) {
  *d = pack<Float16>(low, high);
}
extern "C" __global__ void pack_bfloat16(uint32_t* d, float low, float high) {
  *d = pack<BFloat16>(low, high);
}
extern "C" __global__ void round_to_tf32(uint32_t* d, float x) { *d = to_tf32(x); }
extern "C" __global__ void copy(uint32_t to, const void* from, int valid) {
  copy_16_bytes(to, from, valid);
}
extern "C" __global__ void commit() { commit_copies(); }
extern "C" __global__ void wait() { wait_for_copies<3>(); }
#endif
extern "C" __global__ void load_plain(uint4* d, uint32_t row) {
  uint32_t to[4];
  load_matrices<false>(to, row);
  *d = uint4{to[0], to[1], to[2], to[3]};
}
extern "C" __global__ void load_transposed(uint4* d, uint32_t row) {
  uint32_t to[4];
  load_matrices<true>(to, row);
  *d = uint4{to[0], to[1], to[2], to[3]};
}
extern "C" __global__ void address(const char** d, const char* start, int index, int step) {
  *d = address_of(start, index, step);
}
extern "C" __global__ void product_wide(uint64_t* d, uint32_t a, uint32_t b) {
  *d = multiply_wide(a, b);
}
extern "C" __global__ void bytes(uint32_t* d, uint32_t a, uint32_t b, uint32_t selector) {
  *d = permute_bytes(a, b, selector);
}
extern "C" __global__ void comparison(uint32_t* d, uint32_t a, uint32_t b) { *d = at_least(a, b); }
extern "C" __global__ void power(float* d, float x) { *d = attn_ext::cuda::exp2(x); }
extern "C" __global__ void shuffle_by_xor(uint32_t* d, uint32_t x, int mask) {
  *d = shuffle_xor(x, mask);
}
extern "C" __global__ void shuffle_by_lane(uint32_t* d, uint32_t x, int lane) {
  *d = shuffle(x, lane);
}
