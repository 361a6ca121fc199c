// What becomes of a product of query and key before the softmax: the terms of the contract, one
// score at a time, in units of log2.
#pragma once

#include "tile.cuh"

namespace attn_ext::cuda {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = __builtin_huge_valf();

template <typename T>
__device__ __forceinline__ T* at(const View& view, int64_t b, int64_t h, int64_t row,
                                 int64_t column = 0) {
  return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[1] +
         row * view.stride[2] + column * view.stride[3];
}

// An entry of a tensor whose dtype is known when the kernel runs.
__device__ __forceinline__ float entry_of(const View& view, DType dtype, int64_t b, int64_t h,
                                          int64_t row, int64_t column) {
  if (dtype == DType::kFloat16) return to_float(*at<const Float16>(view, b, h, row, column));
  if (dtype == DType::kBFloat16) return to_float(*at<const BFloat16>(view, b, h, row, column));
  return *at<const float>(view, b, h, row, column);
}

// The product of two rows, by a whole warp.
template <typename Element>
__device__ __forceinline__ float dot_by_warp(const Element* a, const Element* b, int64_t width) {
  float sum = 0;
  for (int d = lane_index(); d < width; d += 32) sum += to_float(a[d]) * to_float(b[d]);
  return sum_over_warp(sum);
}

// The keys [begin, end) that a row may see by position, or the rows that may see a key.
struct Visible {
  int begin, end;

  __device__ __forceinline__ static Visible of_row(const Problem& p, int row) {
    const int64_t diagonal = row + p.diagonal;
    return within(diagonal - p.left, diagonal + p.right, p.key_length);
  }
  __device__ __forceinline__ static Visible of_key(const Problem& p, int key) {
    const int64_t diagonal = key - p.diagonal;
    return within(diagonal - p.right, diagonal + p.left, p.query_length);
  }

 private:
  __device__ __forceinline__ static Visible within(int64_t first, int64_t last, int64_t length) {
    const auto clamped = [&](int64_t x) {
      return static_cast<int>(x < 0 ? 0 : x < length ? x : length);
    };
    return {clamped(first), clamped(last + 1)};
  }
};

// One head of one batch, and what applies to all of its scores.
struct Head {
  int batch, head, key_head;
  float scale;  // takes a product to units of log2

  __device__ __forceinline__ static Head make(const Problem& p, int batch, int head) {
    return {batch, head, static_cast<int>(head / (p.query_heads / p.key_heads)),
            static_cast<float>(p.scale) * kLog2E};
  }
};

// An entry of a mask in units of log2, -inf where it forbids, by -inf or by about the lowest float.
__device__ __forceinline__ float mask_entry(const View& mask, int64_t b, int64_t h, int64_t row,
                                            int64_t column) {
  if (mask.dtype == DType::kBool) {
    return *at<const uint8_t>(mask, b, h, row, column) ? 0.0f : -kInfinity;
  }
  return kLog2E * entry_of(mask, mask.dtype, b, h, row, column);
}

// softcap * tanh(x / softcap); `slope` becomes its derivative.
__device__ __forceinline__ float capped(const Problem& p, float product, float* slope) {
  const float t = tanhf(product * p.single.scale_over_softcap);
  *slope = 1 - t * t;
  return t * p.single.softcap * kLog2E;
}

// A score from its product, -inf where the pair is hidden; `slope`: the softcap's derivative. The
// pair exists: row and key lie within the problem's lengths.
__device__ inline float score_of(const Problem& p, const Head& head, Visible visible, int row,
                                 int key, float product, float* slope) {
  if (key < visible.begin || key >= visible.end) return -kInfinity;
  float score = product * head.scale;
  *slope = 1;
  if (p.single.softcap != 0) score = capped(p, product, slope);
  if (p.alibi_slopes) {
    const float alibi = *at<const float>(p.alibi_slopes, head.batch, head.head, 0);
    score -= alibi * kLog2E * fabsf(static_cast<float>(row + p.diagonal - key));
  }
  for (const View* mask : {&p.mask, &p.key_mask}) {
    if (!*mask) continue;
    const float entry = mask_entry(*mask, head.batch, head.head, row, key);
    // By selection: NaN - inf would be NaN.
    score = entry == -kInfinity ? entry : score + entry;
  }
  return score;
}

// Where a lane's accumulators lie: tile (m, n), element i of a C fragment. Rows of C are rows of
// the problem, its columns are keys; or, transposed, the other way round.
template <bool kTransposed>
struct Place {
  int first_row, first_key;  // of this lane's first element

  __device__ __forceinline__ int row(int m, int n, int i) const {
    return first_row + (kTransposed ? 8 * n + i % 2 : 16 * m + i / 2 * 8);
  }
  __device__ __forceinline__ int key(int m, int n, int i) const {
    return first_key + (kTransposed ? 16 * m + i / 2 * 8 : 8 * n + i % 2);
  }
  __device__ __forceinline__ static Place of_lane(int row, int key, int lane = lane_index()) {
    const int g = lane / 4, t = lane % 4;
    return {row + (kTransposed ? 2 * t : g), key + (kTransposed ? g : 2 * t)};
  }

  // Which pairs of one row of C are visible by position: bit 2n + i for column i of tile n. One
  // register, where two bounds to compare with would be two, and twice the instructions.
  template <int kNTiles>
  __device__ __forceinline__ uint32_t visible_columns(const Problem& p, int m, int half) const {
    static_assert(kNTiles <= 16, "a word has 32 bits");
    const auto below = [](int column) {
      const int bits = column < 0 ? 0 : column / 8 * 2 + min(column % 8, 2);
      return bits < 2 * kNTiles ? (1u << bits) - 1 : ~0u;
    };
    const Visible visible = kTransposed ? Visible::of_key(p, key(m, 0, 2 * half))
                                        : Visible::of_row(p, row(m, 0, 2 * half));
    const int first = kTransposed ? first_row : first_key;
    return below(visible.end - first) & ~below(visible.begin - first);
  }
};

// Calls visit(row, key, element number) for all of a lane's places in a tile, in a loop that is not
// unrolled: what the general kernels do with a pair is long, and would be compiled for each.
template <bool kTransposed, int kMTiles, int kNTiles, typename Visit>
__device__ __forceinline__ void for_each_place(Place<kTransposed> place, Visit visit) {
#pragma unroll 1
  for (int index = 0; index < 4 * kMTiles * kNTiles; ++index) {
    const int m = index / (4 * kNTiles), n = index / 4 % kNTiles, i = index % 4;
    visit(place.row(m, n, i), place.key(m, n, i), index);
  }
}

// What a mask of keys adds to a lane's places: entry 2n + i for column i of tile n, or, transposed,
// 2m + half for a row; -inf also beyond the last key.
template <bool kTransposed, int kTiles>
__device__ __forceinline__ void key_entries(const Problem& p, const Head& head,
                                            Place<kTransposed> place,
                                            float (&entries)[2 * kTiles]) {
#pragma unroll 1
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int key = kTransposed ? place.key(i / 2, 0, i % 2 * 2) : place.key(0, i / 2, i % 2);
    entries[i] = key >= p.key_length ? -kInfinity
                 : p.key_mask        ? mask_entry(p.key_mask, head.batch, head.head, 0, key)
                                     : 0.0f;
  }
}

// Whether scores are products times a factor, and whatever hides pairs goes by position or key.
__device__ __forceinline__ bool is_simple(const Problem& p) {
  return p.single.softcap == 0 && !p.alibi_slopes && !p.mask && p.key_mask.stride[2] == 0;
}

// Accumulators in memory of the lane's own, where a loop can count through them.
template <int kMTiles, int kNTiles>
struct Unrolled {
  float items[4 * kMTiles * kNTiles];

  __device__ __forceinline__ explicit Unrolled(const float (&c)[kMTiles][kNTiles][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kMTiles * kNTiles; ++i) {
      items[i] = c[i / (4 * kNTiles)][i / 4 % kNTiles][i % 4];
    }
  }
  __device__ __forceinline__ void copy_to(float (&c)[kMTiles][kNTiles][4]) const {
#pragma unroll
    for (int i = 0; i < 4 * kMTiles * kNTiles; ++i) {
      c[i / (4 * kNTiles)][i / 4 % kNTiles][i % 4] = items[i];
    }
  }
};

// Whether every row of a tensor starts on 16 bytes.
template <typename Element>
__host__ __device__ __forceinline__ bool rows_are_aligned(const View& view) {
  const int64_t strides = view.stride[0] | view.stride[1] | view.stride[2];
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  return ((strides * static_cast<int64_t>(sizeof(Element)) | static_cast<int64_t>(address)) & 15) ==
         0;
}

// The rows of one head as a source of tiles.
template <typename Tile, bool kPlain>
__device__ __forceinline__ Source<Tile, kPlain> source_of(const View& view, int batch, int head,
                                                          int64_t rows, int64_t width) {
  using Element = typename Tile::Item;
  return Source<Tile, kPlain>::make(at<const Element>(view, batch, head, 0), view.stride[2],
                                    static_cast<int>(rows), static_cast<int>(width),
                                    rows_are_aligned<Element>(view));
}

// A warp's rows of one head as an operand A: of a tile in shared memory that starts at row `first`,
// or in place. `row`: the warp's first, of the tile.
template <typename Tile, bool kInPlace>
__device__ __forceinline__ auto rows_of_a(const View& view, int batch, int head, int first, int row,
                                          int rows, int64_t width) {
  if constexpr (kInPlace) {
    using Element = typename Tile::Item;
    return RowsInPlace<Element>::make(at<const Element>(view, batch, head, 0), view.stride[2],
                                      first + row, rows, static_cast<int>(width));
  } else {
    return Tile::Lane::of_a(row);
  }
}

}  // namespace attn_ext::cuda
