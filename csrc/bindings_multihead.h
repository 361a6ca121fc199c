// Multi-head self-attention of few tokens with its projections, as one call: their products take
// less time than what Python spends between them.
#pragma once

#include <memory>
#include <new>
#include <optional>

#include "bindings_plain.h"

namespace attn_ext::bindings {

// What a module of few tokens is made of, all float32 and contiguous.
struct SelfAttentionTensors {
  const float* tokens;  // (L, E), (N, L, E) or (L, N, E)
  int64_t sizes[2];     // of its leading dimensions; (1, L) for (L, E)
  bool batched;
  const float *in_weight, *in_bias;    // (3E, E), and (3E) or null
  const float *out_weight, *out_bias;  // (E, E), and (E) or null
  int64_t width, heads;                // E, H
};

// Reads a tensor, if it is a dense float32 one in CPU memory and contiguous.
inline bool read_contiguous(py::handle tensor, dlpack::Tensor& read) {
  if (!read_dense(tensor, read) || as_dtype(read.type) != DType::kFloat32) return false;
  int64_t stride = 1;
  for (int i = read.dimensions - 1; i >= 0; --i) {
    if (read.shape[i] != 1 && read.strides[i] != stride) return false;
    stride *= read.shape[i];
  }
  return true;
}

// The address of a contiguous tensor of these sizes; null for any other.
template <int kDimensions>
inline const float* read_sized(py::handle tensor, const int64_t (&sizes)[kDimensions]) {
  dlpack::Tensor read;
  const bool fits = read_contiguous(tensor, read) && has_sizes(read, sizes);
  return fits ? static_cast<const float*>(address_of(read)) : nullptr;
}

// The tensors of a module if they fit each other and the kernels; nothing otherwise.
inline std::optional<SelfAttentionTensors> read_self_attention(py::handle tokens,
                                                               py::handle in_weight,
                                                               py::handle in_bias,
                                                               py::handle out_weight,
                                                               py::handle out_bias, int64_t heads) {
  dlpack::Tensor x;
  if (!read_contiguous(tokens, x) || (x.dimensions != 2 && x.dimensions != 3)) return std::nullopt;
  SelfAttentionTensors t{};
  t.tokens = static_cast<const float*>(address_of(x)), t.batched = x.dimensions == 3;
  t.sizes[0] = t.batched ? x.shape[0] : 1, t.sizes[1] = x.shape[x.dimensions - 2];
  t.width = x.shape[x.dimensions - 1], t.heads = heads;
  if (heads <= 0 || t.width % heads || t.width % kDepthMultiple) return std::nullopt;
  t.in_weight = read_sized(in_weight, {3 * t.width, t.width});
  t.out_weight = read_sized(out_weight, {t.width, t.width});
  if (!t.in_weight || !t.out_weight) return std::nullopt;
  if (!in_bias.is_none() && !(t.in_bias = read_sized(in_bias, {3 * t.width}))) return std::nullopt;
  if (!out_bias.is_none() && !(t.out_bias = read_sized(out_bias, {t.width}))) return std::nullopt;
  return t;
}

// The kernels' arguments, one after another: `in`, `attention` of `problem`, `out`.
class SelfAttention {
 public:
  LinearArguments in, out;
  attn_ext::Problem problem{};
  ForwardArguments attention;

  SelfAttention(const SelfAttentionTensors& t, const View& to, bool batch_first) {
    const bool batch_leads = batch_first || !t.batched;
    attn_ext::Problem& p = problem;
    p.dtype = DType::kFloat32;
    p.batch = t.sizes[batch_leads ? 0 : 1];
    p.query_length = p.key_length = t.sizes[batch_leads ? 1 : 0];
    p.query_heads = p.key_heads = t.heads;
    p.head_dim = p.value_dim = t.width / t.heads;
    p.scale = 1 / std::sqrt(static_cast<double>(p.head_dim));
    p.left = p.right = 2 * kFar;

    const int64_t tokens = p.batch * p.query_length;
    const auto count = static_cast<size_t>(tokens * (4 * t.width + t.heads));
    memory_.reset(static_cast<float*>(::operator new(count * sizeof(float), kLine)));
    float* projected = memory_.get();
    float* attended = projected + tokens * 3 * t.width;
    float* lse = attended + tokens * t.width;
    // (batch, head, row, column), `width` numbers for each token.
    const int64_t batch_stride = batch_leads ? p.query_length : 1;
    const int64_t row_stride = batch_leads ? 1 : p.batch;
    const auto by_token = [&](float* data, int64_t width) {
      return View{data, {batch_stride * width, p.head_dim, row_stride * width, 1}};
    };
    p.query = by_token(projected, 3 * t.width);
    p.key = by_token(projected + t.width, 3 * t.width);
    p.value = by_token(projected + 2 * t.width, 3 * t.width);
    attention.out = by_token(attended, t.width);
    attention.lse = {lse, {t.heads * p.query_length, p.query_length, 1, 0}};
    in = {tokens, 3 * t.width, t.width, t.tokens, t.in_weight, t.in_bias, projected};
    out = {
        tokens, t.width, t.width, attended, t.out_weight, t.out_bias, static_cast<float*>(to.data)};
  }

 private:
  static constexpr auto kLine = std::align_val_t{64};
  struct Delete {
    void operator()(float* memory) const { ::operator delete(memory, kLine); }
  };
  std::unique_ptr<float[], Delete> memory_;
};

}  // namespace attn_ext::bindings
