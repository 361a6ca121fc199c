// matmul.h's product for pairs of bfloat16, by the tiles of AMX.
//
// A block of C is two by two tiles, the four sums of which stay in registers while two tiles of A
// and two of B pass by: all eight registers, and each operand loaded is used twice. Rows and depths
// that don't fill a tile are left to vectors.

template <int... kIndex, typename Call>
inline __attribute__((always_inline)) void for_each_index(std::integer_sequence<int, kIndex...>,
                                                          Call call) {
  (call(std::integral_constant<int, kIndex>{}), ...);
}

// C (tall x wide tiles) = A B or C += A B, `depth` being that of whole tiles. The sums are in
// registers 0 to 3, A's tiles in 4 and 5, B's in 6 and 7.
template <int kTall, int kWide>
void multiply_tiles(int64_t depth, const BFloat16Pair* a, int64_t lda, const BFloat16Pair* b,
                    int64_t ldb, const Into<float>& into) {
  constexpr auto kRowTiles = std::make_integer_sequence<int, kTall>{};
  constexpr auto kColumnTiles = std::make_integer_sequence<int, kWide>{};
  constexpr auto kSums = std::make_integer_sequence<int, kTall * kWide>{};
  const auto place = [&](int sum) {
    return into.c + sum / kWide * kTileSide * into.stride + sum % kWide * kTileSide;
  };
  for_each_index(kSums, [&](auto sum) {
    if (into.accumulate) {
      load_tile<sum>(place(sum), into.stride);
    } else {
      zero_tile<sum>();
    }
  });
  for (int64_t k = 0; k < depth; k += kTileSide) {
    for_each_index(kRowTiles, [&](auto m) { load_tile<4 + m>(a + m * kTileSide * lda + k, lda); });
    for_each_index(kColumnTiles,
                   [&](auto n) { load_tile<6 + n>(b + k * ldb + n * kTileSide, ldb); });
    for_each_index(kSums,
                   [&](auto sum) { multiply_add_tiles<sum, 4 + sum / kWide, 6 + sum % kWide>(); });
  }
  for_each_index(kSums, [&](auto sum) { store_tile<sum>(place(sum), into.stride); });
  if (!into.top) return;
  for (int n = 0; n < kWide * kTileSide; n += kTileSide) {
    Vec<float> top = load(into.top + n);
    for (int m = 0; m < kTall * kTileSide; ++m) {
      top = simd_max<float>(load(into.c + m * into.stride + n), top);
    }
    store<float>(into.top + n, top);
  }
}

template <bool kRowsAdjacent>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const BFloat16Pair* a, int64_t lda,
              const BFloat16Pair* b, int64_t ldb, Into<float> into) {
  static_assert(!kRowsAdjacent, "a tile of A has its depth along the row");
  const auto by_vectors = multiply<false, BFloat16Pair, float>;
  const int64_t tile_depth = depth / kTileSide * kTileSide;
  const int64_t tile_rows = tile_depth > 0 ? rows / kTileSide * kTileSide : 0;
  if (tile_rows < rows) {
    by_vectors(rows - tile_rows, vectors, depth, a + tile_rows * lda, lda, b, ldb,
               into.at(tile_rows, 0));
  }
  if (tile_rows == 0) return;
  if (tile_depth < depth || into.scale) {
    // First, so that the maxima are of the whole sums; over no depth at all it only scales.
    by_vectors(tile_rows, vectors, depth - tile_depth, a + tile_depth, lda, b + tile_depth * ldb,
               ldb, {into.c, into.stride, into.accumulate, into.scale});
    into.accumulate = true;
  }
  for (int64_t row = 0; row < tile_rows; row += 2 * kTileSide) {
    for (int64_t vector = 0; vector < vectors; vector += 2) {
      const bool tall = row + 2 * kTileSide <= tile_rows, wide = vector + 2 <= vectors;
      const auto block = tall   ? wide ? multiply_tiles<2, 2> : multiply_tiles<2, 1>
                         : wide ? multiply_tiles<1, 2>
                                : multiply_tiles<1, 1>;
      block(tile_depth, a + row * lda, lda, b + vector * kTileSide, ldb,
            into.at(row, vector * kTileSide));
    }
  }
}
