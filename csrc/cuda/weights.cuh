// The attention weights themselves, from the LSE: P = dropout(exp(S - lse)), per head or averaged
// over heads, in one pass that never holds (B, Hq, Lq, Lk) if averaged.
//
// Grid: a block for kRows queries by kKeys keys of one head, or of all heads of a batch, whose
// tiles it sums before it writes them. Block: four warps of 16 rows. Shared memory: a tile of
// queries and one of keys, 64 columns of them at a time. Tested against backends/reference.py in
// tests/test_contract.py.
#pragma once

#include "row_products.cuh"

namespace attn_ext::cuda {

template <typename Element>
struct WeightsShape {
  static constexpr int kRows = 16 * kWarps, kKeys = 64;
  using Rows = Tile<Element, kRows, kPartWidth, 0>;
  using Keys = Tile<Element, kKeys, kPartWidth, Rows::kEnd>;
  static constexpr int kSharedBytes = Keys::kEnd;
};

template <typename Element>
__global__ void __launch_bounds__(kThreads, 2)
    run_weights(const __grid_constant__ Problem p, const __grid_constant__ WeightsArguments to) {
  if (!kAvailable<Element>) return;
  using Shape = WeightsShape<Element>;
  constexpr int kNTiles = Shape::kKeys / 8;

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
    float s[1][kNTiles][4];
    multiply_by_parts<typename Shape::Rows, typename Shape::Keys>(p, p.query, p.key, head,
                                                                  p.head_dim, first_row, key, s);
    const auto keep = KeepFactors<false, 1, kNTiles>::make(p, head, place);
    Unrolled<1, kNTiles> scores(s);
    for_each_place<false, 1, kNTiles>(place, [&](int row, int column, int number) {
      float slope, weight = 0;
      if (row < query_length) {
        const RowValues values = RowValues::load<Element>(p, to.lse, View{}, head, row);
        const float score =
            score_of(p, head, Visible::of_row(p, row), row, column, scores.items[number], &slope);
        if (score != -kInfinity) weight = exp2(score - values.lse - values.rest);
        weight *= keep[number];
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
