// The attention weights themselves, from the LSE: P = dropout(exp(S - lse)), per head or averaged
// over heads, in one pass that never holds (B, Hq, Lq, Lk) if averaged.
//
// Grid: a block for kRows queries by kKeys keys of one head, or of all heads of a batch, whose
// tiles it sums before it writes them. Block: four warps of 16 rows. Shared memory: a tile of
// queries and one of keys. Tested against backends/reference.py in tests/test_contract.py.
#pragma once

#include "gradients.cuh"

namespace attn_ext::cuda {

template <typename Element, int kWidth>
struct WeightsShape {
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(Element));
  static constexpr int kKeys = kRowBytes <= 512 ? 64 : 32;
  using Queries = Tile<Element, kRows, kWidth, 0>;
  using Keys = Tile<Element, kKeys, kWidth, Queries::kEnd>;
  static constexpr int kSharedBytes = Keys::kEnd;
};

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    run_weights(const __grid_constant__ Problem p, const __grid_constant__ WeightsArguments to) {
  if (!kAvailable<Element>) return;
  using Shape = WeightsShape<Element, kWidth>;
  using Queries = typename Shape::Queries;
  using Keys = typename Shape::Keys;
  constexpr int kNTiles = Shape::kKeys / 8, kSteps = kWidth / kDepth<Element>;

  const int query_length = static_cast<int>(p.query_length);
  const int key_length = static_cast<int>(p.key_length);
  const int heads = static_cast<int>(p.query_heads);
  const int row_blocks = (query_length + Shape::kRows - 1) / Shape::kRows;
  const int key_blocks = (key_length + Shape::kKeys - 1) / Shape::kKeys;
  const int key = static_cast<int>(blockIdx.x) % key_blocks * Shape::kKeys;
  const int others = static_cast<int>(blockIdx.x) / key_blocks;
  const int first_row = others % row_blocks * Shape::kRows, index = others / row_blocks;
  const int batch = to.average ? index : index / heads;
  const int first_head = to.average ? 0 : index % heads, count = to.average ? heads : 1;

  const int warp_row = warp_index() * 16;
  const auto place = Place<false>::of_lane(first_row + warp_row, key);
  float total[1][kNTiles][4] = {};
  for (int i = 0; i < count; ++i) {
    const Head head = Head::make(p, batch, first_head + i);
    synchronize_block();  // nobody reads the tiles before any more
    source_of<Queries, false>(p.query, head.batch, head.head, p.query_length, p.head_dim)
        .copy(first_row);
    source_of<Keys, false>(p.key, head.batch, head.key_head, p.key_length, p.head_dim).copy(key);
    commit_copies();
    wait_for_copies<0>();
    synchronize_block();
    float s[1][kNTiles][4] = {};
    multiply_rows<Keys, kSteps>(s, Queries::Lane::of_a(warp_row), Keys::Lane::of_b(), Element{});
    repair_products<Element>(p.query, p.key, head, head.key_head, p.head_dim, place, query_length,
                             key_length, s);
    float keep[4 * kNTiles];
    if (drops_weights(p)) keep_factors<false, 1, kNTiles>(p, head, place, keep);
    Unrolled<1, kNTiles> scores(s);
    for_each_place<false, 1, kNTiles>(place, [&](int row, int column, int number) {
      float slope, weight = 0;
      if (row < query_length) {
        const RowValues values = RowValues::load<Element>(p, to.lse, View{}, head, row);
        const float score =
            score_of(p, head, Visible::of_row(p, row), row, column, scores.items[number], &slope);
        if (score != -kInfinity) weight = exp2(score - values.lse - values.rest);
        if (drops_weights(p)) weight *= keep[number];
      }
      scores.items[number] = weight;
    });
    scores.copy_to(s);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) total[0][n][j] += s[0][n][j];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + warp_row + 8 * half + lane_index() / 4;
    if (row >= query_length) continue;
    write_row(at<Element>(to.weights, batch, first_head, row, key), key_length - key, half,
              1.0f / static_cast<float>(count), total[0], false);
  }
}

}  // namespace attn_ext::cuda
