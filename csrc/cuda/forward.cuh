// Forward pass: out = softmax(scores) V and lse, by online softmax (Dao, arXiv:2307.08691,
// algorithm 1).
//
// Grid: a block for kRows query rows of one head, the last rows first (causality makes them long).
// Block: four warps, each with 16 or 32 rows of its own; no data passes between warps. Shared
// memory: the queries, kKeys keys and as many values. While scores are computed the tile's values
// are copied, while it is multiplied with them the next tile's keys:
//     S = Q K^T;  m' = max(m, max S);  P = exp2(S - m');  O = O exp2(m - m') + P V
// Tiles outside causality and the window are never visited; of the others, those at an edge go
// first, through code that tests every pair. The general kernel does that for all tiles: masks,
// softcap, ALiBi, and rows that don't lie on 16 bytes. Dropout without those has a kernel of its
// own, which drops weights once they are packed. A row whose output is not finite is done again by
// careful_row, since a hidden weight of 0 times NaN is NaN.
// Tested against backends/reference.py in tests/test_contract.py, through tests/cuda_emulator.
#pragma once

#include "dropout.cuh"

namespace attn_ext::cuda {

// The tiles that a block goes through, of keys or of rows, in the order of work: those at an edge
// first, where some pair may be hidden by position; then [full_first, full_end), where none is.
struct TileOrder {
  int first, end, full_first, full_end;

  // Of `size` keys (or rows) a tile, for a block whose first row (or key) sees `top`, its last one
  // `bottom`. A tile that is not whole is an edge.
  __device__ __forceinline__ static TileOrder make(Visible top, Visible bottom, int size,
                                                   bool all_edges) {
    TileOrder order;
    order.first = order.full_first = order.full_end = top.begin / size;
    order.end = (bottom.end + size - 1) / size;
    const int full_first = (bottom.begin + size - 1) / size, full_end = top.end / size;
    if (!all_edges && full_first < full_end) {
      order.full_first = full_first, order.full_end = full_end;
    }
    return order;
  }
  __device__ __forceinline__ static TileOrder of_keys(const Problem& p, int first_row, int last_row,
                                                      int size, bool all_edges) {
    return make(Visible::of_row(p, first_row), Visible::of_row(p, last_row), size, all_edges);
  }
  __device__ __forceinline__ static TileOrder of_rows(const Problem& p, int first_key, int last_key,
                                                      int size, bool all_edges) {
    return make(Visible::of_key(p, first_key), Visible::of_key(p, last_key), size, all_edges);
  }
  // This tile, or the next one that is at an edge.
  __device__ __forceinline__ int edge_from(int tile) const {
    return tile == full_first ? full_end : tile;
  }
  // What comes after the edges, or -1.
  __device__ __forceinline__ int after_edges() const {
    return full_first < full_end ? full_first : -1;
  }
  // The tile that comes first of all, or -1.
  __device__ __forceinline__ int start() const {
    const int edge = edge_from(first);
    return edge < end ? edge : after_edges();
  }

  // Calls visit(first of a tile, first of the next or negative, whether it is at an edge: a type).
  template <int kSize, bool kAllEdges, typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for (int tile = edge_from(first); tile < end;) {
      const int next = edge_from(tile + 1);
      visit(tile * kSize, (next < end ? next : after_edges()) * kSize, std::true_type{});
      tile = next;
    }
    if constexpr (!kAllEdges) {
      const int last = (full_end - 1) * kSize;
      for (int at = full_first * kSize; at <= last; at += kSize) {
        visit(at, at < last ? at + kSize : -1, std::false_type{});
      }
    }
  }
};

// What a kernel is for: scores that are products and hidden by position alone, the same with
// dropout, or anything.
enum class Variant { kPlain, kDropout, kGeneral };

template <typename Element, int kWidth, Variant kVariant>
struct ForwardShape {
  static constexpr bool kGeneral = kVariant == Variant::kGeneral;
  static constexpr int kWidest = kIsTuring<Element> ? 64 : 128;  // of two tiles of rows a warp
  static constexpr int kMTiles = kIsHalf<Element> && kWidth <= kWidest ? 2 : 1;
  static constexpr int kRows = 16 * kMTiles * kWarps;
  static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(Element));
  // Within 64 KiB together with the queries, except for float32 wider than 128.
  static constexpr bool kMany = kIsHalf<Element> && !kIsTuring<Element> && !kGeneral;
  static constexpr int kKeys = kRowBytes <= 128 && kMany             ? 128
                               : kRowBytes <= (kGeneral ? 128 : 256) ? 64
                               : kRowBytes <= 256                    ? 32
                                                                     : 16;
  using Queries = Tile<Element, kRows, kWidth, 0>;
  using Keys = Tile<Element, kKeys, kWidth, Queries::kEnd>;
  using Values = Tile<Element, kKeys, kWidth, Keys::kEnd>;
  // What all threads know lies in shared memory where registers are short: beside so many scores,
  // or the state of the generator.
  struct Known {
    TileOrder order;
    int first_row;
    uint32_t head_word;
  };
  static constexpr bool kDrops = kVariant == Variant::kDropout;
  static constexpr bool kWholeCalls = kKeys % kRandomColumns == 0;  // of dropout's generator
  static constexpr bool kShares = kKeys == 128 || kDrops;
  static constexpr int kSharedBytes =
      Values::kEnd + (kShares ? static_cast<int>(sizeof(Known)) : 0);
};

// The query rows of a thread block, the last ones first: causality makes them long.
struct BlockOfRows {
  Head head;
  int first, last;

  __device__ __forceinline__ static BlockOfRows make(const Problem& p, int size, uint32_t number) {
    const int length = static_cast<int>(p.query_length), heads = static_cast<int>(p.query_heads);
    const int blocks = (length + size - 1) / size, index = static_cast<int>(number);
    const int pair = index / blocks, first = (blocks - 1 - index % blocks) * size;
    return {Head::make(p, pair / heads, pair % heads), first, min(first + size, length) - 1};
  }
};

// A row's running maximum, in units of the scores that it is of, and this lane's part of its sum.
template <int kMTiles>
struct Softmax {
  float max[kMTiles][2], sum[kMTiles][2];
};

// Scores become weights; `scale`: what the rows' output so far is to be multiplied by, where the
// result says so. `factor` takes scores to units of log2.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ bool update_softmax(float factor, float (&s)[kMTiles][kNTiles][4],
                                               Softmax<kMTiles>& softmax,
                                               float (&scale)[kMTiles][2]) {
  bool grew = false;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = softmax.max[m][half];
      float after = before;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        after = fmaxf(after, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      }
      after = fmaxf(after, shuffle_xor(after, 1));
      after = fmaxf(after, shuffle_xor(after, 2));
      // A row that has seen nothing yet: exp2(-inf - 0) is the 0 that it needs.
      const float shift = after == -kInfinity ? 0.0f : after * factor;
      scale[m][half] = exp2(before * factor - shift);
      grew |= after > before;
      float sum = softmax.sum[m][half] * scale[m][half];
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[m][n][i] = exp2(s[m][n][i] * factor - shift);
          sum += s[m][n][i];
        }
      }
      softmax.max[m][half] = after;
      softmax.sum[m][half] = sum;
    }
  }
  return ballot(grew) != 0;
}

template <int kMTiles, int kOutTiles>
__device__ __forceinline__ void rescale(const float (&scale)[kMTiles][2],
                                        float (&out)[kMTiles][kOutTiles][4]) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[m][n][i] *= scale[m][i / 2];
    }
  }
}

// Hides what lies outside the rows' reach; scores stay in their units.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void hide_by_position(const Problem& p, Place<false> place,
                                                 float (&s)[kMTiles][kNTiles][4]) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t visible = place.template visible_columns<kNTiles>(p, m, half);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if ((visible >> (2 * n + i) & 1) == 0) s[m][n][2 * half + i] = -kInfinity;
        }
      }
    }
  }
}

// Products become scores in units of log2. Rows beyond the last are given the last one's.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void finish_scores(const Problem& p, const Head& head,
                                              Place<false> place, float (&s)[kMTiles][kNTiles][4]) {
  if (is_simple(p)) {
    float entries[2 * kNTiles];
    key_entries<false, kNTiles>(p, head, place, entries);
#pragma unroll
    for (int i = 0; i < 4 * kMTiles * kNTiles; ++i) {
      const int n = i / 4 % kNTiles;
      float& score = s[i / (4 * kNTiles)][n][i % 4];
      const float entry = entries[2 * n + i % 2];
      score = entry == -kInfinity ? entry : score * head.scale + entry;
    }
    return hide_by_position(p, place, s);
  }
  const int last = static_cast<int>(p.query_length) - 1;
  Unrolled<kMTiles, kNTiles> scores(s);
  for_each_place<false, kMTiles, kNTiles>(place, [&](int row, int key, int index) {
    float slope;
    row = min(row, last);
    scores.items[index] =
        score_of(p, head, Visible::of_row(p, row), row, key, scores.items[index], &slope);
  });
  scores.copy_to(s);
}

template <int kMTiles, int kNTiles>
__device__ __forceinline__ void drop(const Problem& p, const Head& head, Place<false> place,
                                     float (&s)[kMTiles][kNTiles][4]) {
  if (!drops_weights(p)) return;
  const auto keep = KeepFactors<false, kMTiles, kNTiles>::make(p, head, place);
#pragma unroll
  for (int i = 0; i < 4 * kMTiles * kNTiles; ++i) {
    if (!keep.keeps(i)) s[i / (4 * kNTiles)][i / 4 % kNTiles][i % 4] = 0;
  }
}

// The same of weights that are packed as operands of the product with values: a call serves two of
// its steps. `first`: of the lane's first place.
template <int kMTiles, int kSteps>
__device__ __forceinline__ void drop_operands(const Problem& p, RandomByte first,
                                              uint32_t head_word,
                                              uint32_t (&a)[kMTiles][kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; step += 2) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      const auto random =
          RandomBytes::make(p, first.column_word + 2 * step, first.row_word + 8 * m, head_word);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a[m][step + i / 4][i % 4] &= random.mask(2 * (i % 2) + i / 4, i / 2 % 2 != 0);
      }
    }
  }
}

__device__ __forceinline__ float lse_of(float max, float sum) {
  if (max == kInfinity || sum == 0) return max;
  return kLn2 * max + logf(sum);
}

// One row by a whole warp, key by key, so that hidden values are never touched.
template <typename Element>
__device__ __attribute__((noinline)) void careful_row(const Problem& p, const ForwardArguments& to,
                                                      const Head& head, int row) {
  constexpr int kColumns = kWidestTile / 32;
  const int lane = lane_index();
  const Element* query = at<const Element>(p.query, head.batch, head.head, row);
  const Visible visible = Visible::of_row(p, row);
  float out[kColumns] = {}, max = -kInfinity, sum = 0;
  if (p.sinks) {
    max = kLog2E * *at<const float>(p.sinks, 0, head.head, 0);
    sum = max == -kInfinity ? 0 : 1;
  }
  for (int key = visible.begin; key < visible.end; ++key) {
    const Element* k = at<const Element>(p.key, head.batch, head.key_head, key);
    const float product = dot_by_warp(query, k, p.head_dim);
    float slope;
    const float score = score_of(p, head, visible, row, key, product, &slope);
    if (score == -kInfinity) continue;
    const float after = fmaxf(max, score), shift = after == -kInfinity ? 0 : after;
    const float scale = exp2(max - shift);
    const float whole = exp2(score - shift), weight = whole * keep_factor(p, head, row, key);
    max = after, sum = sum * scale + whole;
    const Element* value = at<const Element>(p.value, head.batch, head.key_head, key);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int d = lane + 32 * i;
      const float x = d < p.value_dim ? to_float(value[d]) : 0;
      out[i] = weight == 0 ? out[i] * scale : out[i] * scale + weight * x;
    }
  }
  const float inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int d = lane + 32 * i;
    if (d < p.value_dim) {
      from_float(out[i] * inverse, at<Element>(to.out, head.batch, head.head, row, d));
    }
  }
  if (to.lse && lane == 0) *at<float>(to.lse, head.batch, head.head, row) = lse_of(max, sum);
}

// Writes a lane's accumulators of one row, times `factor`: pairs of neighbouring columns.
template <typename Element, int kNTiles>
__device__ __forceinline__ void write_row(Element* row, int width, int half, float factor,
                                          const float (&x)[kNTiles][4], bool in_pairs) {
  const int first = lane_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    const int column = 8 * n + first;
    const float low = x[n][2 * half] * factor, high = x[n][2 * half + 1] * factor;
    struct alignas(2 * sizeof(Element)) Pair {
      Element items[2];
    };
    if (in_pairs && column + 1 < width) {
      Pair pair;
      from_float(low, &pair.items[0]), from_float(high, &pair.items[1]);
      *reinterpret_cast<Pair*>(row + column) = pair;
    } else {
      if (column < width) from_float(low, row + column);
      if (column + 1 < width) from_float(high, row + column + 1);
    }
  }
}

// Whether all of a row's accumulators are finite: the same answer in the four lanes that hold it.
template <int kNTiles>
__device__ __forceinline__ bool row_is_finite(const float (&x)[kNTiles][4], int half) {
  float sum = 0;  // of products with 0: NaN if anything was not finite
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) sum += x[n][2 * half] * 0.0f + x[n][2 * half + 1] * 0.0f;
  sum = sum_over_row(sum);
  return sum == sum;
}

// The rows of a warp for which something holds, said by each of their lanes. Of each nibble, bit i
// stands for the row 8 i below.
__device__ __forceinline__ uint32_t row_bits(bool holds, int i) {
  return (ballot(holds) & 0x11111111) << i;
}

// The rows of a warp that are not finite, as row_bits.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ uint32_t not_finite(const float (&x)[kMTiles][kNTiles][4]) {
  static_assert(kMTiles <= 2, "a nibble has four bits");
  uint32_t rows = 0;
#pragma unroll
  for (int i = 0; i < 2 * kMTiles; ++i) {
    rows |= row_bits(!row_is_finite(x[i / 2], i % 2), i);
  }
  return rows;
}

// Calls redo(row) by the whole warp for those; `first` is the warp's first row, `end` that after
// the last that exists.
template <typename Redo>
__device__ __forceinline__ void redo_rows(uint32_t rows, int first, int end, Redo redo) {
  synchronize_warp();  // after what was written of these rows
  for (; rows != 0; rows &= rows - 1) {
    const int bit = 31 - count_leading_zeros(rows & -rows);
    const int row = first + bit % 4 * 8 + bit / 4;
    if (row < end) redo(row);
  }
}

// Writes the rows of a warp. What it computes again of the block's place would else take registers
// all through the loop.
template <typename Element, Variant kVariant, int kMTiles, int kOutTiles>
__device__ __forceinline__ void finish_rows(const Problem& p, const ForwardArguments& to,
                                            const Softmax<kMTiles>& softmax,
                                            const float (&out)[kMTiles][kOutTiles][4]) {
  constexpr bool kGeneral = kVariant == Variant::kGeneral;
  const float factor =
      kVariant != Variant::kPlain && drops_weights(p) ? p.single.dropout_factor : 1.0f;
  const BlockOfRows block = BlockOfRows::make(p, 16 * kMTiles * kWarps, opaque(blockIdx.x));
  const Head& head = block.head;
  const int thread = static_cast<int>(thread_here()), g = thread % 32 / 4, t = thread % 4;
  const int first_row = block.first + thread / 32 * 16 * kMTiles;
  const int length = static_cast<int>(p.query_length);
  uint32_t to_redo = 0;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = sum_over_row(softmax.sum[m][half]);
      // The parts that float32 is multiplied in make NaN of an infinite key, which dropout may
      // drop.
      if (!kIsHalf<Element>) to_redo |= row_bits(sum != sum, 2 * m + half);
      const int row = first_row + 16 * m + 8 * half + g;
      if (row >= length) continue;
      const float inverse = sum == 0 ? 0.0f : factor / sum;
      write_row(at<Element>(to.out, head.batch, head.head, row), static_cast<int>(p.value_dim),
                half, inverse, out[m], !kGeneral);
      if (to.lse && t == 0) {
        *at<float>(to.lse, head.batch, head.head, row) =
            lse_of(softmax.max[m][half] * (kGeneral ? 1.0f : head.scale), sum);
      }
    }
  }
  redo_rows(to_redo | not_finite(out), first_row, length,
            [&](int row) { careful_row<Element>(p, to, head, row); });
}

// How many blocks ptxas is to leave registers for, found by trying: 0 leaves it to itself, and is
// what it spills nothing with in the other kernels.
template <typename Element, Variant kVariant>
constexpr int kForwardBlocks = kVariant == Variant::kGeneral || kIsTuring<Element> ? 2 : 0;

template <typename Element, int kWidth, Variant kVariant>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<Element, kVariant>)
    run_forward(const __grid_constant__ Problem p, const __grid_constant__ ForwardArguments to) {
  if (!kAvailable<Element>) return;
  using Shape = ForwardShape<Element, kWidth, kVariant>;
  using Queries = typename Shape::Queries;
  using Keys = typename Shape::Keys;
  using Values = typename Shape::Values;
  constexpr bool kGeneral = Shape::kGeneral;
  constexpr int kMTiles = Shape::kMTiles, kKeys = Shape::kKeys, kOutTiles = kWidth / 8;
  constexpr int kSteps = kWidth / kDepth<Element>;

  const BlockOfRows block = BlockOfRows::make(p, Shape::kRows, blockIdx.x);
  const Head& head = block.head;
  const int first_row = block.first;
  typename Shape::Known own;
  auto& known = Shape::kShares
                    ? *reinterpret_cast<typename Shape::Known*>(shared_pointer(Values::kEnd))
                    : own;
  if (!Shape::kShares || threadIdx.x == 0) {
    known.order = TileOrder::of_keys(p, first_row, block.last, kKeys, kGeneral);
    if (Shape::kDrops) {
      known.first_row = first_row, known.head_word = RandomBytes::head_word(p, head);
    }
  }
  if (Shape::kShares) synchronize_block();
  const TileOrder& order = known.order;

  const auto queries =
      source_of<Queries, !kGeneral>(p.query, head.batch, head.head, p.query_length, p.head_dim);
  const auto keys =
      source_of<Keys, !kGeneral>(p.key, head.batch, head.key_head, p.key_length, p.head_dim);
  const auto values =
      source_of<Values, !kGeneral>(p.value, head.batch, head.key_head, p.key_length, p.value_dim);
  queries.copy(first_row);
  if (order.start() >= 0) keys.copy(order.start() * kKeys);
  values.clear_beyond_width();
  commit_copies();

  const int t = lane_index() % 4, warp_row = warp_index() * 16 * kMTiles;
  const auto lane_q = Queries::Lane::of_a(warp_row);
  const auto lane_k = Keys::Lane::of_b();
  const auto lane_v = Values::Lane::by_row();
  // The general kernel's scores are in units of log2 already.
  const float factor = kGeneral ? 1.0f : head.scale;
  Softmax<kMTiles> softmax;
  float out[kMTiles][kOutTiles][4] = {};
  const float sink =
      p.sinks ? *at<const float>(p.sinks, 0, head.head, 0) * kLog2E / factor : -kInfinity;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.max[m][half] = sink;
      softmax.sum[m][half] = t == 0 && sink != -kInfinity ? 1.0f : 0.0f;
    }
  }

  // A place from what is known, where that is better than a register.
  const auto place_of = [&](uint32_t thread, int lane, int key) {
    const int row = known.first_row + static_cast<int>(thread / 32) * 16 * kMTiles;
    return Place<false>::of_lane(row, key, lane);
  };

  using Scores = float[kMTiles][kKeys / 8][4];
  const auto visit = [&](int key, int next, auto edge) {
    Scores s = {};
    wait_for_copies<0>();
    synchronize_block();  // the keys are here, and nobody reads the values before any more
    values.here().template copy<!decltype(edge)::value>(key);
    commit_copies();
    multiply_rows<Keys, kSteps>(s, lane_q.here(), Shape::kDrops ? lane_k : lane_k.here(),
                                Element{});
    wait_for_copies<0>();
    synchronize_block();  // the values are here, and nobody reads the keys any more
    if (next >= 0) keys.here().template copy<!decltype(edge)::value>(next);
    commit_copies();
    auto place = Place<false>::of_lane(first_row + warp_row, key);
    if constexpr (Shape::kDrops) place = place_of(thread_here(), lane_index(), key);
    if constexpr (kGeneral) {
      finish_scores(p, head, place, s);
    } else if constexpr (decltype(edge)::value) {
      hide_by_position(p, place, s);
    }
    float scale[kMTiles][2];
    const bool rescales = update_softmax(factor, s, softmax, scale);
    if constexpr (kVariant == Variant::kDropout) {
      const uint32_t thread = thread_here();
      place = place_of(thread, static_cast<int>(thread % 32), key);
      const RandomByte first = RandomBytes::place_of(p, place.row(0, 0, 0), place.key(0, 0, 0));
      uint32_t a[kMTiles][kKeys / 16][4];
#pragma unroll
      for (int i = 0; i < kMTiles * kKeys / 16; ++i) {
        accumulators_as_a<Element>(s[i % kMTiles], i / kMTiles, a[i % kMTiles][i / kMTiles]);
      }
      if (rescales) rescale(scale, out);
      drop_operands(p, first, known.head_word, a);
      multiply_operands<Values, kKeys / 16>(
          out,
          [&](int m, int step, uint32_t (&to)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) to[i] = a[m][step][i];
          },
          lane_v.here(), Element{});
    } else {
      if (rescales) rescale(scale, out);
      if constexpr (kGeneral) drop(p, head, place, s);
      multiply_accumulators<Values>(out, s, lane_v.here(), Element{});
    }
  };
  order.for_each<kKeys, kGeneral>(visit);

  wait_for_copies<0>();
  finish_rows<Element, kVariant>(p, to, softmax, out);
}

}  // namespace attn_ext::cuda
