// Products of rows of two tensors whatever their width, for kernels that are not worth an instance
// for each: shared memory holds kPartWidth columns at a time.
#pragma once

#include "gradients.cuh"

namespace attn_ext::cuda {

constexpr int kPartWidth = 64;

// Where a tile's products are not finite: those of accurate float32 may be NaN where exact ones
// are not.
template <typename Element, int kNTiles>
__device__ __forceinline__ void repair_products(const View& left, const View& right,
                                                const Head& head, int64_t width, Place<false> place,
                                                int rows, int keys,
                                                float (&products)[1][kNTiles][4]) {
  if constexpr (std::is_same_v<Element, float>) {
    const bool first = row_is_finite(products[0], 0), second = row_is_finite(products[0], 1);
    if (first && second) return;
    Unrolled<1, kNTiles> repaired(products);
    for_each_place<false, 1, kNTiles>(place, [&](int row, int key, int index) {
      float& product = repaired.items[index];
      if (product - product == 0 || row >= rows || key >= keys) return;
      const float* a = at<const float>(left, head.batch, head.head, row);
      const float* b = at<const float>(right, head.batch, head.key_head, key);
      product = 0;
      for (int d = 0; d < width; ++d) product += a[d] * b[d];
    });
    repaired.copy_to(products);
  }
}

// The products of a block's rows of `left`, which has the problem's queries, from `row` on, with
// rows of `right`, which has its keys, from `key` on; both are `width` wide. A warp gets 16 rows.
template <typename Rows, typename Keys, int kNTiles>
__device__ __forceinline__ void multiply_by_parts(const Problem& p, const View& left,
                                                  const View& right, const Head& head,
                                                  int64_t width, int row, int key,
                                                  float (&products)[1][kNTiles][4]) {
  using Element = typename Rows::Item;
  static_assert(Rows::kTileWidth == kPartWidth && Keys::kTileWidth == kPartWidth);
  const int warp_row = warp_index() * 16;
#pragma unroll
  for (int i = 0; i < 4 * kNTiles; ++i) products[0][i / 4][i % 4] = 0;
  const auto rows = source_of<Rows, false>(left, head.batch, head.head, p.query_length, width);
  const auto keys = source_of<Keys, false>(right, head.batch, head.key_head, p.key_length, width);
  for (int column = 0; column < width; column += kPartWidth) {
    synchronize_block();  // nobody reads the tiles before any more
    rows.from_column(column).copy(row);
    keys.from_column(column).copy(key);
    commit_copies();
    wait_for_copies<0>();
    synchronize_block();
    multiply_rows<Keys, kPartWidth / kDepth<Element>>(products, Rows::Lane::of_a(warp_row),
                                                      Keys::Lane::of_b(), Element{});
  }
  repair_products<Element>(left, right, head, width, Place<false>::of_lane(row + warp_row, key),
                           static_cast<int>(p.query_length), static_cast<int>(p.key_length),
                           products);
}

}  // namespace attn_ext::cuda
