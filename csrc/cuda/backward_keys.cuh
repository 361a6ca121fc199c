// Backward pass, second part: dV = P^T dO and dK = scale dS^T Q (Dao, arXiv:2307.08691, algorithm
// 2, the column's half of it).
//
// Grid: a block for kKeys keys of one key head. Block: four warps, each with 16 or 32 keys of its
// own. The block's keys and values stay in shared memory, values that have no room there in global
// memory; tiles of queries and output gradients of all heads that share the key head pass by,
// copied ahead where two of them fit. Everything is transposed, keys being the rows, so that
// weights go from accumulators to operands in registers:
//     S^T = K Q^T;  dP^T = V dO^T;  P^T = exp2(S^T - lse);  dS^T = P^T (dP^T - term)
//     dV += P^T dO;  dK += dS^T Q
// Heads wider than 192 take two passes, one for dV and one for dK, whose sums would not fit the
// registers together. Tested like backward_queries.cuh.
#pragma once

#include "gradients.cuh"

namespace attn_ext::cuda {

enum class Pass { kBoth, kValues, kKeys };

template <typename Element, int kWidth>
struct KeyGradientShape {
  static constexpr int kMTiles = kIsHalf<Element> && !kIsTuring<Element> && kWidth <= 64 ? 2 : 1;
  static constexpr int kKeys = 16 * kMTiles * kWarps;
  static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(Element));
  // What fits the registers, and shared memory twice or, where it is short, once.
  static constexpr int kRows =
      kIsHalf<Element> && kRowBytes <= (kIsTuring<Element> ? 192 : 256) ? 32 : 16;
  static constexpr int kStages = kRowBytes <= (kIsTuring<Element> ? 192 : 768) ? 2 : 1;
  // The block's values of so many bytes are read where they lie.
  static constexpr bool kInPlace = kRowBytes >= (kIsTuring<Element> ? 512 : 768);
  using Keys = Tile<Element, kKeys, kWidth, 0>;
  using Values = Tile<Element, kKeys, kWidth, Keys::kEnd>;
  // Of each stage; the second one's are the first's, kStageBytes further.
  static constexpr uint32_t kStart = kInPlace ? Keys::kEnd : Values::kEnd;
  using Queries = Tile<Element, kRows, kWidth, kStart>;
  using Gradients = Tile<Element, kRows, kWidth, Queries::kEnd>;
  static constexpr uint32_t kStageBytes = Gradients::kEnd - kStart;
  static constexpr uint32_t kTileRows = kStart + kStages * kStageBytes;
  // What the rows of a tile bring along; minus their terms lie as a C fragment takes them, each
  // pair of columns twice.
  struct TileRows {
    struct alignas(16) Quad {
      float items[4];
    };
    struct alignas(8) Pair {
      float items[2];
    };
    Quad minus_terms[kRows / 2];
    Pair lse[kRows / 2], rest[kRows / 2];
    TileOrder order;

    __device__ __forceinline__ void set(int row, const RowValues& values) {
      lse[row / 2].items[row % 2] = values.lse;
      if (!kIsHalf<Element>) rest[row / 2].items[row % 2] = values.rest;
      minus_terms[row / 2].items[row % 2] = minus_terms[row / 2].items[row % 2 + 2] = -values.term;
    }
    // `item`: of a C fragment whose columns are these two rows.
    __device__ __forceinline__ RowValues get(int pair, int item) const {
      const Pair both_lse = lse[pair];
      const Pair both_rest = kIsHalf<Element> ? Pair{} : rest[pair];
      const Quad terms = minus_terms[pair];
      return {both_lse.items[item % 2], both_rest.items[item % 2], -terms.items[item]};
    }
  };
  static constexpr int kSharedBytes = kTileRows + sizeof(TileRows);
};

// One key's dK and dV by a whole warp, pair by pair.
template <typename Element>
__device__ __attribute__((noinline)) void careful_key(const Problem& p, const BackwardArguments& to,
                                                      int batch, int key_head, int key) {
  constexpr int kColumns = kWidestTile / 32;
  const int group = static_cast<int>(p.query_heads / p.key_heads);
  const View none{};
  float dk[kColumns] = {}, dv[kColumns] = {};
  for (int i = 0; i < group; ++i) {
    const Head head = Head::make(p, batch, key_head * group + i);
    for (int row = 0; row < p.query_length; ++row) {
      const RowValues values =
          RowValues::load<Element>(p, to.lse, to.dweights ? none : to.row_term, head, row);
      const PairGradient pair = careful_pair<Element>(p, to, head, row, key, values);
      if (pair.weight == 0 && pair.of_product == 0) continue;
      const Element* q = at<const Element>(p.query, head.batch, head.head, row);
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const int d = lane_index() + 32 * column;
        if (d < p.head_dim) dk[column] += pair.of_product * to_float(q[d]);
        if (to.dout && d < p.value_dim) {
          dv[column] +=
              pair.weight * to_float(*at<const Element>(to.dout, batch, head.head, row, d));
        }
      }
    }
  }
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const int d = lane_index() + 32 * column;
    if (d < p.head_dim) {
      from_float(dk[column] * static_cast<float>(p.scale),
                 at<Element>(to.dkey, batch, key_head, key, d));
    }
    if (to.dvalue && d < p.value_dim) {
      from_float(dv[column], at<Element>(to.dvalue, batch, key_head, key, d));
    }
  }
}

template <typename Element, int kWidth, bool kGeneral, Pass kPass>
__global__ void __launch_bounds__(kThreads, kIsHalf<Element> && !kIsTuring<Element> ? 0 : 2)
    key_gradients(const __grid_constant__ Problem p, const __grid_constant__ BackwardArguments to) {
  if (!kAvailable<Element>) return;
  using Shape = KeyGradientShape<Element, kWidth>;
  using Keys = typename Shape::Keys;
  using Values = typename Shape::Values;
  using Queries = typename Shape::Queries;
  using Gradients = typename Shape::Gradients;
  constexpr int kMTiles = Shape::kMTiles, kRows = Shape::kRows, kOutTiles = kWidth / 8;
  constexpr int kSteps = kWidth / kDepth<Element>, kStages = Shape::kStages;
  constexpr bool kWantsKeys = kPass != Pass::kValues, kWantsValues = kPass != Pass::kKeys;

  const int query_length = static_cast<int>(p.query_length);
  const int key_length = static_cast<int>(p.key_length);
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int blocks = (key_length + Shape::kKeys - 1) / Shape::kKeys;
  const int pair = static_cast<int>(blockIdx.x) / blocks;
  const int block = static_cast<int>(blockIdx.x) % blocks;
  const int key_heads = static_cast<int>(p.key_heads);
  const int batch = pair / key_heads, key_head = pair % key_heads;
  const int group = static_cast<int>(p.query_heads) / key_heads;
  const int first_key = block * Shape::kKeys;
  auto& tile_rows = *reinterpret_cast<typename Shape::TileRows*>(shared_pointer(Shape::kTileRows));
  // Registers are short. What is in shared memory, is computed where it is used (`here`), or is
  // `kept`, was found by trying: nothing spills so up to 128 wide at 7.5 to 9.0.
  constexpr bool kNarrow = Shape::kRowBytes <= 128;
  const auto placed = [](auto lane) {
    if constexpr (kNarrow) return lane.here();
    return lane;
  };
  TileOrder own_order;
  TileOrder& order = kNarrow ? own_order : tile_rows.order;
  if (kNarrow || threadIdx.x == 0) {
    order = TileOrder::of_rows(p, first_key, first_key + Shape::kKeys - 1, kRows, kGeneral);
  }
  if (!kNarrow) synchronize_block();
  const bool weights_only = kGeneral && to.dweights;

  source_of<Keys, !kGeneral>(p.key, batch, key_head, p.key_length, p.head_dim).copy(first_key);
  if (kWantsKeys && !weights_only && !Shape::kInPlace) {
    source_of<Values, !kGeneral>(p.value, batch, key_head, p.key_length, p.value_dim)
        .copy(first_key);
  }
  commit_copies();

  const int warp_key = warp_index() * 16 * kMTiles;
  const auto lane_k = placed(Keys::Lane::of_a(warp_key));
  const auto lane_v = placed(rows_of_a<Values, Shape::kInPlace>(p.value, batch, key_head, first_key,
                                                                warp_key, key_length, p.value_dim));
  const auto lane_q = placed(Queries::Lane::of_b());
  const auto lane_do = placed(Gradients::Lane::of_b());
  const auto lane_q_by_row = Queries::Lane::by_row();
  const auto lane_do_by_row = Gradients::Lane::by_row();
  float dk[kWantsKeys ? kMTiles : 1][kOutTiles][4] = {};
  float dv[kWantsValues ? kMTiles : 1][kOutTiles][4] = {};
  uint32_t stage = 0;
  const int thread = static_cast<int>(threadIdx.x);

  using Scores = float[kMTiles][kRows / 8][4];
  for (int i = 0; i < group; ++i) {
    const Head head = Head::make(p, batch, key_head * group + i);
    const auto queries =
        source_of<Queries, !kGeneral>(p.query, batch, head.head, p.query_length, p.head_dim);
    const auto douts =
        source_of<Gradients, !kGeneral>(to.dout, batch, head.head, p.query_length, p.value_dim);
    // LSE and term of row `thread` of a tile.
    const float* lse = at<const float>(to.lse, batch, head.head, thread);
    const float* terms = at<const float>(to.row_term, batch, head.head, thread);
    if (!kNarrow) lse = kept(lse), terms = kept(terms);
    RowValues ahead{};  // of the next tile's row of this thread
    const auto copy_rows = [&](int row, uint32_t to_stage, auto edge) {
      constexpr bool kWhole = !decltype(edge)::value;
      queries.template copy<kWhole>(row, to_stage);
      if (!weights_only) (kNarrow ? douts.here() : douts).template copy<kWhole>(row, to_stage);
      commit_copies();
      ahead = {kInfinity, 0, 0};
      if (thread >= kRows || (!kWhole && row + thread >= query_length)) return;
      ahead = RowValues::make<Element>(
          lse[row * static_cast<int>(to.lse.stride[2])],
          weights_only ? 0.0f : terms[row * static_cast<int>(to.row_term.stride[2])]);
    };

    const auto visit = [&](int row, int next, auto edge) {
      if (thread < kRows) tile_rows.set(thread, ahead);
      wait_for_copies<0>();
      synchronize_block();  // this tile is here; with two stages, the other's is read no more
      const uint32_t now = stage;
      if (kStages == 2) {
        stage ^= Shape::kStageBytes;
        if (next >= 0) copy_rows(next, stage, edge);
      }
      Scores s = {}, dp;
      const auto values_of = [&](int, int n, int j) {
        return tile_rows.get(4 * n + lane_index() % 4, j);
      };
      start_gradients<!kGeneral>(dp, values_of);
      multiply_rows<Queries, kSteps>(s, lane_k, lane_q.moved(now), Element{});
      if (kWantsKeys && !weights_only) {
        multiply_rows<Gradients, kSteps>(dp, lane_v, lane_do.moved(now), Element{});
      }
      const int here = static_cast<int>(thread_here() / 32) * 16 * kMTiles;
      const int lane = kGeneral ? static_cast<int>(thread_here() % 32) : lane_index();
      const auto place = Place<true>::of_lane(row, first_key + here, lane);
      if constexpr (kGeneral) {
        general_gradients<Wanted::kProduct>(p, to, head, place, s, dp, [&](int of) {
          return tile_rows.get((of - row) / 2, (of - row) % 2);
        });
      } else {
        plain_gradients<Element, decltype(edge)::value>(p, head, place, s, dp, values_of);
      }
      if constexpr (kWantsValues) {
        if (!weights_only) {
          multiply_accumulators<Gradients>(dv, s, lane_do_by_row.moved(now), Element{});
        }
      }
      if constexpr (kWantsKeys) {
        multiply_accumulators<Queries>(dk, dp, lane_q_by_row.moved(now), Element{});
      }
      synchronize_block();  // nobody reads this tile or its row values any more
      if (kStages == 1 && next >= 0) copy_rows(next, 0, edge);
    };
    if (order.start() >= 0) {
      if (kStages == 2) {
        queries.clear_beyond_width(stage ^ Shape::kStageBytes);
        douts.clear_beyond_width(stage ^ Shape::kStageBytes);
      }
      copy_rows(order.start() * kRows, stage, std::true_type{});
    }
    order.for_each<kRows, kGeneral>(visit);
  }
  wait_for_copies<0>();

  const auto write = [&](const View& view, int width, float factor, const auto& sums) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = first_key + warp_key + 16 * m + 8 * half + lane_index() / 4;
        if (key >= key_length) continue;
        write_row(at<Element>(view, batch, key_head, key), width, half, factor, sums[m], !kGeneral);
      }
    }
  };
  const auto redo = [&](int key) { careful_key<Element>(p, to, batch, key_head, key); };
  if constexpr (kWantsKeys) write(to.dkey, head_dim, static_cast<float>(p.scale), dk);
  if constexpr (kWantsValues) {
    if (!weights_only) write(to.dvalue, value_dim, 1.0f, dv);
  }
  uint32_t to_redo = 0;
  if constexpr (kWantsKeys) to_redo |= not_finite(dk);
  if constexpr (kWantsValues) to_redo |= not_finite(dv);
  redo_rows(to_redo, first_key + warp_key, key_length, redo);
}

}  // namespace attn_ext::cuda
