// Tiles of query, key and value rows in shared memory, and the fragments that products take from
// them.
//
// A tile is divided into panels of 128 bytes of each row (64 where the width is no multiple of
// that), and a row's chunks of 16 bytes are exchanged within a panel by the row's number, so that
// eight rows of one column of chunks lie in eight different groups of banks (for 64 bytes: two rows
// share the 128). An address is the lane's own part, exclusive-or a constant, plus a constant.
#pragma once

#include "primitives.cuh"

namespace attn_ext::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWidestTile = 256;

// kRows rows of kWidth elements at byte `kStart` of shared memory.
template <typename Element, int kRows, int kWidth, uint32_t kStart>
struct Tile {
  using Item = Element;
  static constexpr int kTileRows = kRows, kTileWidth = kWidth;
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kChunks = kWidth / kChunk;
  static constexpr int kPanelChunks = kChunks % 8 == 0 ? 8 : 4;
  static constexpr int kPanels = kChunks / kPanelChunks;
  static constexpr uint32_t kRowBytes = 16 * kPanelChunks;
  static constexpr uint32_t kPanelBytes = kRows * kRowBytes;
  static constexpr uint32_t kEnd = kStart + kPanels * kPanelBytes;
  static_assert(kChunks % 4 == 0, "a row is a whole number of panels");

  __device__ __forceinline__ static uint32_t exchanged(int row, int chunk) {
    return static_cast<uint32_t>(chunk ^ (kPanelChunks == 8 ? row & 7 : row >> 1 & 3));
  }
  // Where a chunk of the first panel lies.
  __device__ __forceinline__ static uint32_t chunk_offset(int row, int chunk) {
    return kStart + row * kRowBytes + 16 * exchanged(row, chunk);
  }
  // Where an element lies.
  __device__ __forceinline__ static uint32_t offset(int row, int column) {
    const int chunk = column / kChunk, panel = chunk / kPanelChunks;
    return chunk_offset(row, chunk % kPanelChunks) + panel * kPanelBytes +
           column % kChunk * static_cast<uint32_t>(sizeof(Element));
  }

  // Fragments of A or B that lie along the rows: the lane's part of the address, for rows
  // `row` + r0 and the two chunks of step `step`. The order of the four matrices differs.
  struct Lane {
    uint32_t start, shift;  // bytes between this tile and the one meant, where several take turns

    // Of A, from `row` on: rows 0 to 7, 8 to 15, then the same of the next chunk.
    __device__ __forceinline__ static Lane of_a(int row = 0) {
      const int lane = lane_index();
      return make(row + lane % 16, lane / 16);
    }
    // Of B, two column groups: rows 0 to 7, the same of the next chunk, then rows 8 to 15.
    __device__ __forceinline__ static Lane of_b() {
      const int lane = lane_index();
      return make(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
    // Of B, whose rows are those of the tile: halves are transposed as they are loaded; of four
    // float32 the first, see at_value.
    __device__ __forceinline__ static Lane by_row() {
      if constexpr (sizeof(Element) == 2) return of_a();
      const int g = lane_index() / 4, t = lane_index() % 4;
      Lane lane = make(2 * t, g / 4);
      lane.start += g % 4 * static_cast<uint32_t>(sizeof(Element));
      return lane;
    }
    __device__ __forceinline__ static Lane make(int row, int chunk) {
      return {row * kRowBytes + 16 * exchanged(row, chunk), 0};
    }
    // The same, whose addresses are computed where they are used: a register instead of four.
    __device__ __forceinline__ Lane here() const { return {opaque(start), shift}; }
    // The same tile of another stage, `bytes` further.
    __device__ __forceinline__ Lane moved(uint32_t bytes) const { return {start, shift + bytes}; }
    __device__ __forceinline__ uint32_t at(int first_row, int step) const {
      const uint32_t turned = start ^ static_cast<uint32_t>(2 * step % kPanelChunks * 16);
      return turned + shift + kStart + 2 * step / kPanelChunks * kPanelBytes +
             first_row * kRowBytes;
    }
    // For of_a: the fragment of A.
    __device__ __forceinline__ void load_a(uint32_t (&a)[4], int first_row, int step) const {
      load_matrices<false>(a, at(first_row, step));
    }
    // For by_row: of the lane's four values in rows `first_row` + 2 t and + 2 t + 1 and columns
    // 16 * `block` + g and + g + 8, value i, those of one column first. Rows count by eights.
    __device__ __forceinline__ uint32_t at_value(int first_row, int block, int i) const {
      static_assert(sizeof(Element) == 2 || kPanelChunks == 8, "a row's number turns 8 chunks");
      const int chunk = 4 * block + i / 2 * 2;
      const uint32_t turned = start ^ static_cast<uint32_t>((chunk % 8 ^ i % 2) * 16);
      return turned + shift + kStart + chunk / 8 * kPanelBytes + (first_row + i % 2) * kRowBytes;
    }
  };
};

// Where tiles come from: `rows` rows of `width` elements in global memory. kPlain: every row starts
// on 16 bytes and is a whole number of chunks, and rows are less than 2^31 bytes apart, so that an
// address is one multiply-add. Else `aligned` says whether rows start so.
template <typename Tile, bool kPlain>
struct Source {
  using Element = typename Tile::Item;
  const Element* start;
  int64_t stride;
  int rows, width;
  bool aligned;
  int own_row, own_chunk;  // of a tile: the first that this thread copies
  const char* own;         // where those are for the tile at row 0

  static constexpr int kRowsAtOnce = kThreads / Tile::kPanelChunks;
  static_assert(Tile::kTileRows % kRowsAtOnce == 0, "all threads copy equally much");
  using Step = std::conditional_t<kPlain, int, int64_t>;

  __device__ __forceinline__ static Source make(const Element* start, int64_t stride, int rows,
                                                int width, bool aligned) {
    Source source{start, stride, rows, width, kPlain || aligned, 0, 0, nullptr};
    source.become_of(threadIdx.x);
    source.own = kept(source.own);
    return source;
  }
  // The same, whose part of this thread is computed where it is used: no registers in between.
  __device__ __forceinline__ Source here() const {
    Source source = *this;
    source.become_of(thread_here());
    return source;
  }
  // Its columns from there on; a whole number of chunks lies before them.
  __device__ __forceinline__ Source from_column(int column) const {
    return make(start + column, stride, rows, width - column, aligned);
  }
  __device__ __forceinline__ void become_of(uint32_t thread) {
    own_row = static_cast<int>(thread / Tile::kPanelChunks);
    own_chunk = static_cast<int>(thread % Tile::kPanelChunks);
    own = address_of(reinterpret_cast<const char*>(start), own_row, step()) + 16 * own_chunk;
  }
  // Bytes between rows.
  __device__ __forceinline__ Step step() const {
    return static_cast<Step>(stride) * static_cast<int>(sizeof(Element));
  }

  // Copies a tile, the rows from `first` on; zeros beyond the last row and the width. What is not
  // aligned goes element by element and at once. `shift`: as Lane's. kWhole: all rows exist, and
  // zeros lie beyond the width already.
  template <bool kWhole = false>
  __device__ __forceinline__ void copy(int first, uint32_t shift = 0) const {
    if (!kPlain && !aligned) return copy_elements(first, shift);
    constexpr int kSize = static_cast<int>(sizeof(Element));
    const char* start_of_tile = address_of(own, first, step());
    const uint32_t to = shift + Tile::chunk_offset(own_row, own_chunk);
#pragma unroll
    for (int row = 0; row < Tile::kTileRows; row += kRowsAtOnce) {
      const char* from = address_of(start_of_tile, row, step());
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        const int left = width - (panel * Tile::kPanelChunks + own_chunk) * Tile::kChunk;
        if (kWhole && left <= 0) continue;
        const bool exists = kWhole || (left > 0 && first + own_row + row < rows);
        const int bytes = kPlain || left >= Tile::kChunk ? 16 : left * kSize;
        copy_16_bytes(to + panel * Tile::kPanelBytes + row * Tile::kRowBytes,
                      from + 16 * panel * Tile::kPanelChunks, exists ? bytes : 0);
      }
    }
  }

  // Zeros beyond the width, in all rows of the tile, before whole tiles are copied there.
  __device__ __forceinline__ void clear_beyond_width(uint32_t shift = 0) const {
    if constexpr (kPlain) {
      if (width > Tile::kTileWidth - Tile::kChunk) return;
      for (int i = static_cast<int>(threadIdx.x); i < Tile::kTileRows * Tile::kChunks;
           i += kThreads) {
        const int row = i / Tile::kChunks, column = i % Tile::kChunks * Tile::kChunk;
        if (column >= width) copy_16_bytes(Tile::offset(row, column) + shift, start, 0);
      }
    }
  }

 private:
  __device__ __attribute__((noinline)) void copy_elements(int first, uint32_t shift) const {
    for (int i = static_cast<int>(threadIdx.x); i < Tile::kTileRows * Tile::kTileWidth;
         i += kThreads) {
      const int row = i / Tile::kTileWidth, column = i % Tile::kTileWidth;
      Element x{};
      if (first + row < rows && column < width) x = start[(first + row) * stride + column];
      *reinterpret_cast<Element*>(shared_pointer(Tile::offset(row, column) + shift)) = x;
    }
  }
};

// What a step of a product takes: two chunks along the summed dimension.
template <typename Element>
constexpr int kDepth = 32 / static_cast<int>(sizeof(Element));  // 16 or 8 elements

// B (depth x 16), its rows being rows of the tile from `row` on, its columns the tile's from
// 16 * `block` on. Of float32, row t + 4 i of B is row 2 t + i, as accumulators_as_a has it.
template <typename Tile, typename Element>
__device__ __forceinline__ void load_b_by_row(uint32_t (&b)[4], typename Tile::Lane lane, int row,
                                              int block, Element) {
  if constexpr (kIsHalf<Element>) {
    load_matrices<true>(b, lane.at(row, block));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i] = *reinterpret_cast<const uint32_t*>(shared_pointer(lane.at_value(row, block, i)));
    }
  }
}

// Columns of C as the operand A of the next product, from column kDepth * step on.
template <typename Element, int kTiles>
__device__ __forceinline__ void accumulators_as_a(const float (&c)[kTiles][4], int step,
                                                  uint32_t (&a)[4]) {
  if constexpr (kIsHalf<Element>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* from = c[2 * step + i / 2] + i % 2 * 2;
      a[i] = pack<Element>(from[0], from[1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = bits_of(c[step][i % 2 * 2 + i / 2]);
  }
}

// A warp's rows of an operand A where they lie in global memory: of tiles so wide that shared
// memory has no room for one more. Takes the place of a Lane of A.
template <typename Element>
struct RowsInPlace {
  const Element* rows[2];  // this lane's, or nullptr beyond the last
  int width;

  // 16 rows from `first` on, of `count`.
  __device__ __forceinline__ static RowsInPlace make(const Element* start, int64_t stride,
                                                     int first, int count, int width) {
    const int row = first + lane_index() / 4;
    return {{row < count ? start + row * stride : nullptr,
             row + 8 < count ? start + (row + 8) * stride : nullptr},
            width};
  }
  __device__ __forceinline__ void load_a(uint32_t (&a)[4], int first_row, int step) const {
    (void)first_row;  // 0: of one tile of rows a warp
    constexpr int kSize = static_cast<int>(sizeof(Element)), kChunk = 16 / kSize;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = (2 * step + i / 2) * kChunk + lane_index() % 4 * (4 / kSize);
      const int left = rows[i % 2] == nullptr ? 0 : width - column;
      if constexpr (kIsHalf<Element>) {
        const uint32_t low = left > 0 ? rows[i % 2][column].bits : 0;
        const uint32_t high = left > 1 ? rows[i % 2][column + 1].bits : 0;
        a[i] = high << 16 | low;
      } else {
        a[i] = left > 0 ? bits_of(to_float(rows[i % 2][column])) : 0;
      }
    }
  }
};

// C (16 kMTiles rows x 8 kNTiles columns) += A B^T, both along the rows: queries and keys, say.
template <typename TileB, int kSteps, int kMTiles, int kNTiles, typename RowsOfA, typename Element>
__device__ __forceinline__ void multiply_rows(float (&c)[kMTiles][kNTiles][4], RowsOfA rows_a,
                                              typename TileB::Lane lane_b, Element element) {
  // A product of float32 is long already.
  [[maybe_unused]] constexpr int kUnrolled = kIsHalf<Element> ? kSteps : 1;
#pragma unroll kUnrolled
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) rows_a.load_a(a[m], 16 * m, step);
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
      uint32_t b[4];
      load_matrices<false>(b, lane_b.at(8 * n, step));
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        multiply_add(c[m][n], a[m], b[0], b[1], element);
        multiply_add(c[m][n + 1], a[m], b[2], b[3], element);
      }
    }
  }
}

// C (16 kMTiles rows x 8 kNTiles columns) += A B, where B's rows are those of a tile and
// operand(m, step, a) gives A.
template <typename TileB, int kSteps, int kMTiles, int kNTiles, typename Element, typename Operand>
__device__ __forceinline__ void multiply_operands(float (&c)[kMTiles][kNTiles][4], Operand operand,
                                                  typename TileB::Lane lane_b, Element element) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) operand(m, step, a[m]);
    const auto lane = kIsHalf<Element> ? lane_b : lane_b.here();
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
      uint32_t b[4];
      load_b_by_row<TileB>(b, lane, kDepth<Element> * step, n / 2, element);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        multiply_add(c[m][n], a[m], b[0], b[1], element);
        multiply_add(c[m][n + 1], a[m], b[2], b[3], element);
      }
    }
  }
}

// The same where A (16 kMTiles x 8 kPTiles) are accumulators: weights times values, say.
template <typename TileB, int kMTiles, int kPTiles, int kNTiles, typename Element>
__device__ __forceinline__ void multiply_accumulators(float (&c)[kMTiles][kNTiles][4],
                                                      const float (&p)[kMTiles][kPTiles][4],
                                                      typename TileB::Lane lane_b,
                                                      Element element) {
  multiply_operands<TileB, 8 * kPTiles / kDepth<Element>>(
      c, [&](int m, int step, uint32_t (&a)[4]) { accumulators_as_a<Element>(p[m], step, a); },
      lane_b, element);
}

}  // namespace attn_ext::cuda
