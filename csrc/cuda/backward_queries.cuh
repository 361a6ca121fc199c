// Backward pass, first part: the row terms, and dQ = scale dS K (Dao, arXiv:2307.08691, algorithm
// 2, the row's half of it: nothing is atomic, so the result does not depend on timing).
//
// Grid and block as in forward.cuh, whose plan this follows: a block of query rows stays, tiles of
// keys and values pass by. Shared memory: the block's queries and, where there is room, output
// gradients, a tile of keys, a tile of values.
//     S = Q K^T;  dP = dO V^T;  dS = exp2(S - lse) (dP - term);  dQ += dS K
// With a gradient of the weights instead of one of the output (dweights), dP is read, the term is 0
// and minus the sum of each row of dS is written as the LSE's gradient.
// Tested against backends/reference.py and by gradcheck in tests/test_contract.py.
#pragma once

#include "gradients.cuh"

namespace attn_ext::cuda {

// row_term = sum(dO * O) - dlse, a warp a row. In double: it is subtracted from every dP, which it
// nearly cancels where few keys are visible.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    row_terms(const __grid_constant__ Problem p, const __grid_constant__ BackwardArguments to) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index();
  if (index >= p.batch * p.query_heads * p.query_length) return;
  const int64_t row = index % p.query_length, pair = index / p.query_length;
  const int64_t batch = pair / p.query_heads, head = pair % p.query_heads;
  const Element* out = at<const Element>(to.out, batch, head, row);
  const Element* dout = at<const Element>(to.dout, batch, head, row);
  double sum = 0;
  for (int d = lane_index(); d < p.value_dim; d += 32) {
    sum += static_cast<double>(to_float(out[d])) * to_float(dout[d]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float high = static_cast<float>(sum);  // as two floats, which shuffle
    const float low = static_cast<float>(sum - high);
    sum += static_cast<double>(shuffle_xor(high, mask)) + shuffle_xor(low, mask);
  }
  if (to.dlse) sum -= *at<const float>(to.dlse, batch, head, row);
  if (lane_index() == 0) *at<float>(to.row_term, batch, head, row) = static_cast<float>(sum);
}

template <typename Element, int kWidth>
struct QueryGradientShape {
  static constexpr int kMTiles = kIsHalf<Element> && kWidth <= 64 ? 2 : 1;
  static constexpr int kRows = 16 * kMTiles * kWarps;
  static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(Element));
  static constexpr int kKeys = kRowBytes <= 256 && !kIsTuring<Element> ? 64
                               : kRowBytes <= 512                      ? 32
                                                                       : 16;
  // The output gradients of so many bytes are read where they lie.
  static constexpr bool kInPlace = kRowBytes >= (kIsTuring<Element> ? 384 : 768);
  using Queries = Tile<Element, kRows, kWidth, 0>;
  using Gradients = Tile<Element, kRows, kWidth, Queries::kEnd>;
  using Keys = Tile<Element, kKeys, kWidth, kInPlace ? Queries::kEnd : Gradients::kEnd>;
  using Values = Tile<Element, kKeys, kWidth, Keys::kEnd>;
  // Two rows of values a lane are too many for its registers.
  static constexpr bool kSharesRows = kMTiles == 2;
  static constexpr int kSharedBytes =
      Values::kEnd + (kSharesRows ? kRows * static_cast<int>(sizeof(RowValues)) : 0);
};

// One row of dQ by a whole warp, pair by pair: a hidden key that is not finite is never touched. Of
// weights, its dLSE as well.
template <typename Element>
__device__ __attribute__((noinline)) void careful_query(const Problem& p,
                                                        const BackwardArguments& to,
                                                        const Head& head, int row) {
  constexpr int kColumns = kWidestTile / 32;
  const Visible visible = Visible::of_row(p, row);
  const View none{};
  const RowValues values =
      RowValues::load<Element>(p, to.lse, to.dweights ? none : to.row_term, head, row);
  float sum[kColumns] = {}, of_scores = 0;
  for (int key = visible.begin; key < visible.end; ++key) {
    const PairGradient pair = careful_pair<Element>(p, to, head, row, key, values);
    of_scores += pair.of_score;
    if (pair.of_product == 0) continue;
    const Element* k = at<const Element>(p.key, head.batch, head.key_head, key);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int d = lane_index() + 32 * i;
      if (d < p.head_dim) sum[i] += pair.of_product * to_float(k[d]);
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int d = lane_index() + 32 * i;
    if (d < p.head_dim) {
      from_float(sum[i] * static_cast<float>(p.scale),
                 at<Element>(to.dquery, head.batch, head.head, row, d));
    }
  }
  if (to.dweights && lane_index() == 0) {
    *at<float>(to.row_term, head.batch, head.head, row) = -of_scores;
  }
}

template <typename Element, int kWidth, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kIsTuring<Element> || !kIsHalf<Element> ? 2 : 0)
    query_gradients(const __grid_constant__ Problem p,
                    const __grid_constant__ BackwardArguments to) {
  if (!kAvailable<Element>) return;
  using Shape = QueryGradientShape<Element, kWidth>;
  using Queries = typename Shape::Queries;
  using Gradients = typename Shape::Gradients;
  using Keys = typename Shape::Keys;
  using Values = typename Shape::Values;
  constexpr int kMTiles = Shape::kMTiles, kKeys = Shape::kKeys, kOutTiles = kWidth / 8;
  constexpr int kSteps = kWidth / kDepth<Element>;

  const int query_length = static_cast<int>(p.query_length);
  const int head_dim = static_cast<int>(p.head_dim);
  const BlockOfRows block = BlockOfRows::make(p, Shape::kRows, blockIdx.x);
  const Head& head = block.head;
  const int first_row = block.first;
  const TileOrder order = TileOrder::of_keys(p, first_row, block.last, kKeys, kGeneral);
  const bool weights_only = kGeneral && to.dweights;

  const auto queries =
      source_of<Queries, !kGeneral>(p.query, head.batch, head.head, p.query_length, p.head_dim);
  const auto keys =
      source_of<Keys, !kGeneral>(p.key, head.batch, head.key_head, p.key_length, p.head_dim);
  const auto values =
      source_of<Values, !kGeneral>(p.value, head.batch, head.key_head, p.key_length, p.value_dim);
  queries.copy(first_row);
  if (!weights_only && !Shape::kInPlace) {
    source_of<Gradients, !kGeneral>(to.dout, head.batch, head.head, p.query_length, p.value_dim)
        .copy(first_row);
  }
  if (order.start() >= 0) keys.copy(order.start() * kKeys);
  values.clear_beyond_width();
  commit_copies();

  const int g = lane_index() / 4, warp_row = warp_index() * 16 * kMTiles;
  const auto lane_q = Queries::Lane::of_a(warp_row);
  const auto lane_do = rows_of_a<Gradients, Shape::kInPlace>(
      to.dout, head.batch, head.head, first_row, warp_row, query_length, p.value_dim);
  const auto lane_k = Keys::Lane::of_b();
  const auto lane_v = Values::Lane::of_b();
  const auto lane_k_by_row = Keys::Lane::by_row();
  const auto load_row = [&](int row) {
    return RowValues::load<Element>(p, to.lse, weights_only ? View{} : to.row_term, head, row);
  };
  auto* const shared_rows = reinterpret_cast<RowValues*>(shared_pointer(Values::kEnd));
  RowValues own_rows[Shape::kSharesRows ? 1 : 2 * kMTiles];
  if constexpr (Shape::kSharesRows) {
    static_assert(Shape::kRows == kThreads, "a row a thread");
    shared_rows[threadIdx.x] = load_row(first_row + static_cast<int>(threadIdx.x));
  } else {
#pragma unroll
    for (int i = 0; i < 2 * kMTiles; ++i) own_rows[i] = load_row(first_row + warp_row + 8 * i + g);
  }
  float dq[kMTiles][kOutTiles][4] = {}, sums[kMTiles][2] = {};

  using Scores = float[kMTiles][kKeys / 8][4];
  const auto visit = [&](int key, int next, auto edge) {
    Scores s = {}, dp;
    const auto values_of = [&](int m, int, int i) {
      return Shape::kSharesRows ? shared_rows[warp_row + 16 * m + i / 2 * 8 + g]
                                : own_rows[2 * m + i / 2];
    };
    wait_for_copies<0>();
    synchronize_block();  // the keys are here, and nobody reads the values before any more
    start_gradients<!kGeneral>(dp, values_of);
    if (!weights_only) values.template copy<!decltype(edge)::value>(key);
    commit_copies();
    multiply_rows<Keys, kSteps>(s, lane_q, lane_k, Element{});
    wait_for_copies<0>();
    synchronize_block();  // the values are here
    if (!weights_only) {
      multiply_rows<Values, kSteps>(dp, lane_do, lane_v, Element{});
    }
    const auto place = Place<false>::of_lane(first_row + warp_row, key);
    if constexpr (kGeneral) {
      general_gradients<Wanted::kProduct>(p, to, head, place, s, dp, load_row,
                                          weights_only ? sums : nullptr);
    } else {
      plain_gradients<Element, decltype(edge)::value>(p, head, place, s, dp, values_of);
    }
    multiply_accumulators<Keys>(dq, dp, lane_k_by_row, Element{});
    synchronize_block();  // nobody reads the keys any more
    if (next >= 0) keys.template copy<!decltype(edge)::value>(next);
    commit_copies();
  };
  order.for_each<kKeys, kGeneral>(visit);
  wait_for_copies<0>();

#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + warp_row + 16 * m + 8 * half + g;
      const float sum = sum_over_row(sums[m][half]);
      if (row >= query_length) continue;
      write_row(at<Element>(to.dquery, head.batch, head.head, row), head_dim, half,
                static_cast<float>(p.scale), dq[m], !kGeneral);
      if (weights_only && lane_index() % 4 == 0) {
        *at<float>(to.row_term, head.batch, head.head, row) = -sum;
      }
    }
  }
  redo_rows(not_finite(dq), first_row + warp_row, query_length,
            [&](int row) { careful_query<Element>(p, to, head, row); });
}

}  // namespace attn_ext::cuda
