// The problem that every native kernel takes: pointers with their strides, sizes and settings.
//
// No torch here: Python allocates, checks every argument and passes addresses. All strides count
// elements; a stride of 0 broadcasts. Sizes are B, Hq, Hkv, Lq, Lk, D, Dv: batch, query heads,
// key/value heads, query and key length, head_dim of query/key and of value.
#pragma once

#include <cstdint>

// What GPU kernels call too.
#ifdef __CUDACC__
#define ATTN_EXT_HOST_DEVICE __host__ __device__
#else
#define ATTN_EXT_HOST_DEVICE
#endif

namespace attn_ext {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kBool = 4 };

// Four dimensions, (batch, head, row, column) unless said otherwise. Null: not given.
struct View {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  DType dtype = DType::kFloat32;

  ATTN_EXT_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

// "compute type": double for float64, else float.
struct Problem {
  DType dtype;
  int64_t batch, query_heads, key_heads, query_length, key_length, head_dim, value_dim;
  View query, key, value;  // (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv); last stride 1
  View mask;               // (B, Hq, Lq, Lk), bool (true takes part) or floating (added)
  View key_mask;           // (B, -, -, Lk), bool or floating
  View alibi_slopes;       // (B, Hq, -, -), compute type
  View sinks;              // (-, Hq, -, -), compute type
  double scale;
  double softcap;                  // 0: none
  int64_t diagonal;                // the key index that stands on row 0's diagonal
  int64_t left;                    // keys that a row sees before its diagonal
  int64_t right;                   // and after it
  int64_t query_start, key_start;  // absolute positions of row 0 and key 0, for dropout
  double dropout_p;
  uint32_t dropout_threshold;  // dropout_p * 2^32, see philox.h
  uint32_t offset;
  uint32_t philox_keys[2 * 10];  // of the seed, see philox.h
  // What GPUs, whose double is slow, need in their loops.
  struct Single {
    float softcap, scale_over_softcap;
    float dropout_factor;  // 1 / (1 - dropout_p), or 0 without dropout
  } single;
};

struct ForwardArguments {
  View out;  // (B, Hq, Lq, Dv)
  View lse;  // (B, Hq, Lq, -), compute type, or null
};

// Gradients of an output and of LSE (dout, dlse), or of the weights (dweights); never both.
struct BackwardArguments {
  View out, lse, dout;
  View dlse;              // (B, Hq, Lq, -), compute type, or null
  View dweights;          // (B, Hq, Lq, Lk), problem's dtype, or null; times dweights_scale
  double dweights_scale;  // 1 / Hq where the weights were averaged over heads
  float dweights_scale_single;
  View dquery, dkey, dvalue;  // written
  View dmask;                 // float or double, zeroed by the caller, or null; broadcasts as mask
  View row_term;              // (B, Hq, Lq, -), compute type: sum(dout * out) - dlse, or null;
                              // with dweights: minus the sum over a row of its score gradients
};

struct WeightsArguments {
  View lse;      // (B, Hq, Lq, -), compute type
  View weights;  // (B, Hq, Lq, Lk), or (B, -, Lq, Lk) for the mean over heads; written
  bool average;
};

// out (rows, columns) = input (rows, depth) weight (columns, depth)^T + bias (columns); all float32
// and contiguous, depth a multiple of kDepthMultiple.
constexpr int64_t kDepthMultiple = 16;
struct LinearArguments {
  int64_t rows, columns, depth;
  const float *input, *weight;
  const float* bias;  // or null
  float* out;
};

}  // namespace attn_ext
