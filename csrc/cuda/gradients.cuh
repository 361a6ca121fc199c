// What the backward kernels share: weights from products and LSE, and the gradients of scores.
//     P = exp2(S - lse),  dS = P (keep * dP - term),  term = sum(dO * O) - dlse, a value a row
#pragma once

#include "forward.cuh"

namespace attn_ext::cuda {

// What a row brings along. LSE is in units of log2, +inf for a row that sees nothing, which makes
// its weights 0; `rest` is what rounding took from it, which counts for float32.
struct alignas(16) RowValues {
  float lse, rest, term;

  // Of a natural LSE.
  template <typename Element>
  __device__ __forceinline__ static RowValues make(float lse, float term) {
    RowValues values{lse == -kInfinity ? kInfinity : lse * kLog2E, 0, term};
    if (!kIsHalf<Element> && values.lse - values.lse == 0) {
      constexpr double kExactLog2E = 1.4426950408889634074;
      values.rest = static_cast<float>(lse * kExactLog2E - values.lse);
    }
    return values;
  }
  template <typename Element>
  __device__ __forceinline__ static RowValues load(const Problem& p, const View& lse,
                                                   const View& term, const Head& head, int row) {
    if (row >= static_cast<int>(p.query_length)) return {kInfinity, 0, 0};
    return make<Element>(*at<const float>(lse, head.batch, head.head, row),
                         term ? *at<const float>(term, head.batch, head.head, row) : 0.0f);
  }
};

// Of one pair: the (dropped) weight, and the gradients before and after the softcap.
struct PairGradient {
  float weight, of_score, of_product;
};

// `dweight`: the gradient that the weight gets, dP; `keep`: dropout's factor. With every term of
// the contract.
__device__ __forceinline__ PairGradient gradient_of_pair(const Problem& p,
                                                         const BackwardArguments& to,
                                                         const Head& head, int row, int key,
                                                         float product, float dweight, float keep,
                                                         const RowValues& values) {
  PairGradient result{0, 0, 0};
  if (row >= static_cast<int>(p.query_length)) return result;
  float slope;
  const float score = score_of(p, head, Visible::of_row(p, row), row, key, product, &slope);
  if (score == -kInfinity) return result;
  const float weight = exp2(score - values.lse - values.rest);
  if (to.dweights) {
    dweight =
        to.dweights_scale_single * entry_of(to.dweights, p.dtype, head.batch, head.head, row, key);
  }
  result.weight = weight * keep;
  result.of_score = weight * (dweight * keep - values.term);
  result.of_product = result.of_score * slope;
  return result;
}

// A tile of products becomes (dropped) weights, and dP becomes dS, where scores are simple.
template <bool kTransposed, int kMTiles, int kNTiles, typename Rows, typename Keep>
__device__ __forceinline__ void simple_gradients(const Problem& p, const Head& head,
                                                 Place<kTransposed> place,
                                                 float (&s)[kMTiles][kNTiles][4],
                                                 float (&dp)[kMTiles][kNTiles][4], Rows rows,
                                                 const Keep& keep) {
  float entries[2 * (kTransposed ? kMTiles : kNTiles)];
  key_entries<kTransposed, kTransposed ? kMTiles : kNTiles>(p, head, place, entries);
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t visible = place.template visible_columns<kNTiles>(p, m, half);
      RowValues values;
      if (!kTransposed) values = rows(place.row(m, 0, 2 * half));
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (kTransposed) values = rows(place.row(m, n, i));
          const float entry = entries[kTransposed ? 2 * m + half : 2 * n + i];
          const bool hidden = (visible >> (2 * n + i) & 1) == 0 || entry == -kInfinity;
          float &score = s[m][n][2 * half + i], &gradient = dp[m][n][2 * half + i];
          const float weight = exp2(score * head.scale + entry - values.lse - values.rest);
          const float factor = keep[4 * (m * kNTiles + n) + 2 * half + i];
          gradient = hidden ? 0.0f : weight * (gradient * factor - values.term);
          score = hidden ? 0.0f : weight * factor;
        }
      }
    }
  }
}

// Which gradient of a score becomes of dP: that of the product, or that of the score itself, which
// a mask gets.
enum class Wanted { kProduct, kScore };

// A tile of products becomes (dropped) weights, and dP becomes dS, with every term of the contract.
// `rows` gives the RowValues of a row of the problem. The gradients of a row's scores are added to
// `row_sums`, if given.
template <Wanted kWanted, bool kTransposed, int kMTiles, int kNTiles, typename Rows>
__device__ __forceinline__ void general_gradients(const Problem& p, const BackwardArguments& to,
                                                  const Head& head, Place<kTransposed> place,
                                                  float (&s)[kMTiles][kNTiles][4],
                                                  float (&dp)[kMTiles][kNTiles][4], Rows rows,
                                                  float (*row_sums)[2] = nullptr) {
  const auto keep = KeepFactors<kTransposed, kMTiles, kNTiles>::make(p, head, place);
  if (kWanted == Wanted::kProduct && is_simple(p) && !to.dweights) {
    return simple_gradients(p, head, place, s, dp, rows, keep);
  }
  Unrolled<kMTiles, kNTiles> weights(s), gradients(dp), of_scores(dp);
  for_each_place<kTransposed, kMTiles, kNTiles>(place, [&](int row, int key, int index) {
    const PairGradient pair = gradient_of_pair(p, to, head, row, key, weights.items[index],
                                               gradients.items[index], keep[index], rows(row));
    weights.items[index] = pair.weight;
    of_scores.items[index] = pair.of_score;
    gradients.items[index] = kWanted == Wanted::kScore ? pair.of_score : pair.of_product;
  });
  weights.copy_to(s);
  if (row_sums) {
#pragma unroll
    for (int i = 0; i < 4 * kMTiles * kNTiles; ++i) {
      row_sums[i / (4 * kNTiles)][i % 4 / 2] += of_scores.items[i];
    }
  }
  gradients.copy_to(dp);
}

// The same by one multiply-add, where the product alone makes the score, and dP started at minus
// the row terms. `values_of` gives the RowValues of (m, n, i).
template <typename Element, bool kEdge, bool kTransposed, int kMTiles, int kNTiles, typename Values>
__device__ __forceinline__ void plain_gradients(const Problem& p, const Head& head,
                                                Place<kTransposed> place,
                                                float (&s)[kMTiles][kNTiles][4],
                                                float (&dp)[kMTiles][kNTiles][4],
                                                Values values_of) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
    uint32_t visible[2] = {~0u, ~0u};
    if constexpr (kEdge) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        visible[half] = place.template visible_columns<kNTiles>(p, m, half);
      }
    }
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const RowValues values = values_of(m, n, i);
        float exponent = s[m][n][i] * head.scale - values.lse;
        if constexpr (!kIsHalf<Element>) exponent -= values.rest;
        const bool hidden = (visible[i / 2] >> (2 * n + i % 2) & 1) == 0;
        const float weight = exp2(exponent);
        dp[m][n][i] = hidden ? 0.0f : weight * dp[m][n][i];
        s[m][n][i] = hidden ? 0.0f : weight;
      }
    }
  }
}

// Where dP starts: at minus the row terms, for plain_gradients, or at 0.
template <bool kPlain, int kMTiles, int kNTiles, typename Values>
__device__ __forceinline__ void start_gradients(float (&dp)[kMTiles][kNTiles][4],
                                                Values values_of) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[m][n][i] = kPlain ? -values_of(m, n, i).term : 0.0f;
    }
  }
}

// The products of one pair by a whole warp, and what follows from them.
template <typename Element>
__device__ inline PairGradient careful_pair(const Problem& p, const BackwardArguments& to,
                                            const Head& head, int row, int key,
                                            const RowValues& values) {
  const Visible visible = Visible::of_row(p, row);
  if (key < visible.begin || key >= visible.end) return {0, 0, 0};
  const Element* q = at<const Element>(p.query, head.batch, head.head, row);
  const Element* k = at<const Element>(p.key, head.batch, head.key_head, key);
  const float product = dot_by_warp(q, k, p.head_dim);
  float dweight = 0;
  if (to.dout) {
    dweight = dot_by_warp(at<const Element>(p.value, head.batch, head.key_head, key),
                          at<const Element>(to.dout, head.batch, head.head, row), p.value_dim);
  }
  const float keep = keep_factor(p, head, row, key);
  return gradient_of_pair(p, to, head, row, key, product, dweight, keep, values);
}

}  // namespace attn_ext::cuda
