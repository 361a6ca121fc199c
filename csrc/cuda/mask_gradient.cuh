// The gradient of a floating mask: dS, summed over whatever the mask broadcasts over.
//
// Grid: a block for kRows by kKeys entries of the mask, as it is in memory; where a dimension
// broadcasts, the block goes through all of it, adding in registers, so that nothing is atomic and
// no (Lq, Lk) tensor is needed beyond the mask's own. Block: four warps of 16 rows. Shared memory:
// a tile of queries or output gradients and one of keys or values, 64 columns of them at a time.
// Tested against backends/reference.py in tests/test_contract.py.
#pragma once

#include "row_products.cuh"

namespace attn_ext::cuda {

template <typename Element>
struct MaskGradientShape {
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = kIsHalf<Element> ? 64 : 32;
  using Rows = Tile<Element, kRows, kPartWidth, 0>;
  using Keys = Tile<Element, kKeys, kPartWidth, Rows::kEnd>;
  // In the end, the block's sums take the place of the tiles.
  static constexpr int kSumBytes = kRows * kKeys * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes =
      static_cast<int>(Keys::kEnd) > kSumBytes ? static_cast<int>(Keys::kEnd) : kSumBytes;
};

// The part of one dimension that a block goes through: all of it where the mask broadcasts.
struct Span {
  int first, end, step;

  __device__ __forceinline__ static Span make(bool broadcasts, int block, int size, int step) {
    return broadcasts ? Span{0, size, step}
                      : Span{block * step, min(size, (block + 1) * step), step};
  }
};

template <typename Element>
__global__ void __launch_bounds__(kThreads, 2)
    mask_gradient(const __grid_constant__ Problem p, const __grid_constant__ BackwardArguments to) {
  if (!kAvailable<Element>) return;
  using Shape = MaskGradientShape<Element>;
  using Rows = typename Shape::Rows;
  using Keys = typename Shape::Keys;
  constexpr int kNTiles = Shape::kKeys / 8;

  const int query_length = static_cast<int>(p.query_length);
  const int key_length = static_cast<int>(p.key_length);
  const View& mask = to.dmask;
  const auto blocks_of = [&](int dimension, int64_t size, int step) {
    return mask.stride[dimension] == 0 ? 1 : (static_cast<int>(size) + step - 1) / step;
  };
  const int key_blocks = blocks_of(3, p.key_length, Shape::kKeys);
  const int row_blocks = blocks_of(2, p.query_length, Shape::kRows);
  const int head_blocks = blocks_of(1, p.query_heads, 1);
  int index = static_cast<int>(blockIdx.x);
  const Span keys = Span::make(mask.stride[3] == 0, index % key_blocks, key_length, Shape::kKeys);
  index /= key_blocks;
  const Span rows = Span::make(mask.stride[2] == 0, index % row_blocks, query_length, Shape::kRows);
  index /= row_blocks;
  const Span heads =
      Span::make(mask.stride[1] == 0, index % head_blocks, static_cast<int>(p.query_heads), 1);
  const Span batches =
      Span::make(mask.stride[0] == 0, index / head_blocks, static_cast<int>(p.batch), 1);

  const int warp_row = warp_index() * 16;
  float total[4 * kNTiles] = {};
  const auto visit = [&](const Head& head, int row, int key) {
    const auto place = Place<false>::of_lane(row + warp_row, key);
    float s[1][kNTiles][4], dp[1][kNTiles][4] = {};
    multiply_by_parts<Rows, Keys>(p, p.query, p.key, head, p.head_dim, row, key, s);
    if (to.dout) {
      multiply_by_parts<Rows, Keys>(p, to.dout, p.value, head, p.value_dim, row, key, dp);
    }
    const View none{};
    const auto of_row = [&](int i) {
      return RowValues::load<Element>(p, to.lse, to.dweights ? none : to.row_term, head, i);
    };
    general_gradients<Wanted::kScore>(p, to, head, place, s, dp, of_row);
#pragma unroll
    for (int i = 0; i < 4 * kNTiles; ++i) total[i] += dp[0][i / 4][i % 4];
  };
  // Where keys broadcast, a lane's columns all go into one entry; where rows do, its rows.
  for (int batch = batches.first; batch < batches.end; ++batch) {
    for (int h = heads.first; h < heads.end; ++h) {
      const Head head = Head::make(p, batch, h);
      for (int row = rows.first; row < rows.end; row += rows.step) {
        for (int key = keys.first; key < keys.end; key += keys.step) visit(head, row, key);
      }
    }
  }

  // Through shared memory, [row of the tile][key of the tile], for the sums over rows or keys.
  synchronize_block();
  auto* const tile = reinterpret_cast<float*>(shared_pointer(0));
  const auto place = Place<false>::of_lane(warp_row, 0);
#pragma unroll
  for (int i = 0; i < 4 * kNTiles; ++i) {
    tile[place.row(0, i / 4, i % 4) * Shape::kKeys + place.key(0, i / 4, i % 4)] = total[i];
  }
  synchronize_block();
  const int row_step = mask.stride[2] == 0 ? Shape::kRows : 1;
  const int key_step = mask.stride[3] == 0 ? Shape::kKeys : 1;
  const int columns = Shape::kKeys / key_step, entries = Shape::kRows / row_step * columns;
  for (int i = static_cast<int>(threadIdx.x); i < entries; i += kThreads) {
    const int row = i / columns * row_step, key = i % columns * key_step;
    if (rows.first + row >= query_length || keys.first + key >= key_length) continue;
    float sum = 0;
    for (int r = row; r < row + row_step; ++r) {
      for (int k = key; k < key + key_step; ++k) sum += tile[r * Shape::kKeys + k];
    }
    *at<float>(mask, batches.first, heads.first, rows.first + row, keys.first + key) = sum;
  }
}

}  // namespace attn_ext::cuda
