// matmul.h's product for pairs of bfloat16, by the tiles of AMX.
//
// A block of C is two by two tiles, the four sums of which stay in registers while two tiles of A
// and two of B pass by: all eight registers, and each operand loaded is used twice. Rows and depths
// that don't fill a tile are left to vectors.
//
// The unit that multiplies tiles works beside those of vectors, but a core looks only about a
// hundred instructions ahead. Whoever has other work does a piece of it after each product of two
// tiles, in `meanwhile`.

struct NothingMeanwhile {
  void operator()() const {}
};

template <int... kIndex, typename Call>
inline __attribute__((always_inline)) void for_each_index(std::integer_sequence<int, kIndex...>,
                                                          Call call) {
  (call(std::integral_constant<int, kIndex>{}), ...);
}

// What a sum that is to be stored at c starts from.
template <int kTile>
inline __attribute__((always_inline)) void begin_sum(const float* c, int64_t stride,
                                                     bool accumulate) {
  if (accumulate) {
    load_tile<kTile>(c, stride);
  } else {
    zero_tile<kTile>();
  }
}

// Where the four sums in registers 0 to 3 go, which are stored while the next block is multiplied:
// a store that waits for the product before it fills a core's window, as it is of more than sixty
// of its instructions.
class SumsToStore {
 public:
  void set(float* c, int64_t stride) { c_ = c, stride_ = stride; }
  // Before register kSum is used again.
  template <int kSum>
  inline __attribute__((always_inline)) void store() const {
    if (c_) store_tile<kSum>(c_ + kSum / 2 * kTileSide * stride_ + kSum % 2 * kTileSide, stride_);
  }
  void store_all() {
    store<0>(), store<1>(), store<2>(), store<3>();
    c_ = nullptr;
  }

 private:
  float* c_ = nullptr;
  int64_t stride_ = 0;
};

// C (tall x wide tiles) = A B or C += A B, `depth` being that of whole tiles. The sums are in
// registers 0 to 3, A's tiles in 4 and 5, B's in 6 and 7. Sums of two by two tiles are left to
// `unstored`.
template <int kTall, int kWide, typename Meanwhile>
inline __attribute__((always_inline)) void multiply_tiles(int64_t depth, const BFloat16Pair* a,
                                                          int64_t lda, const BFloat16Pair* b,
                                                          int64_t ldb, const Into<float>& into,
                                                          SumsToStore& unstored,
                                                          Meanwhile& meanwhile) {
  constexpr auto kSums = std::make_integer_sequence<int, kTall * kWide>{};
  const auto place = [&](int sum) {
    return into.c + sum / kWide * kTileSide * into.stride + sum % kWide * kTileSide;
  };
  if (kTall * kWide < 4) unstored.store_all();
  const auto step = [&](int64_t k, auto first) {
    for_each_index(kSums, [&](auto sum) {
      constexpr int kRow = sum / kWide, kColumn = sum % kWide;
      if (first) {
        unstored.template store<sum>();
        begin_sum<sum>(place(sum), into.stride, into.accumulate);
      }
      if (kColumn == 0) load_tile<4 + kRow>(a + kRow * kTileSide * lda + k, lda);
      if (kRow == 0) load_tile<6 + kColumn>(b + k * ldb + kColumn * kTileSide, ldb);
      multiply_add_tiles<sum, 4 + kRow, 6 + kColumn>();
      meanwhile();
    });
  };
  step(0, std::true_type{});
  for (int64_t k = kTileSide; k < depth; k += kTileSide) step(k, std::false_type{});
  if (kTall * kWide == 4) {
    unstored.set(into.c, into.stride);
    if (into.top) unstored.store_all();
  } else {
    for_each_index(kSums, [&](auto sum) { store_tile<sum>(place(sum), into.stride); });
  }
  if (!into.top) return;
  for (int n = 0; n < kWide * kTileSide; n += kTileSide) {
    Vec<float> top = load(into.top + n);
    for (int m = 0; m < kTall * kTileSide; ++m) {
      top = simd_max<float>(load(into.c + m * into.stride + n), top);
    }
    store<float>(into.top + n, top);
  }
}

// The same for a B of two by two tiles, which stay in registers 4 to 7 while every tile of A passes
// by once, in 3. Sums are in 0 and 1; a store is 16 of a core's hundred pending stores, so that the
// second of two waits for the next row's first product.
template <typename Meanwhile>
void multiply_by_four(int64_t rows, const BFloat16Pair* a, int64_t lda, const BFloat16Pair* b,
                      int64_t ldb, float* c, int64_t stride, bool accumulate,
                      Meanwhile& meanwhile) {
  load_tile<4>(b, ldb);
  load_tile<5>(b + kTileSide, ldb);
  load_tile<6>(b + kTileSide * ldb, ldb);
  load_tile<7>(b + kTileSide * ldb + kTileSide, ldb);
  for (int64_t row = 0; row < rows; row += kTileSide) {
    float* sums = c + row * stride;
    begin_sum<0>(sums, stride, accumulate);
    load_tile<3>(a + row * lda, lda);
    multiply_add_tiles<0, 3, 4>();
    meanwhile();
    if (row > 0) store_tile<1>(sums - kTileSide * stride + kTileSide, stride);
    begin_sum<1>(sums + kTileSide, stride, accumulate);
    multiply_add_tiles<1, 3, 5>();
    meanwhile();
    load_tile<3>(a + row * lda + kTileSide, lda);
    multiply_add_tiles<0, 3, 6>();
    meanwhile();
    multiply_add_tiles<1, 3, 7>();
    store_tile<0>(sums, stride);
    meanwhile();
  }
  store_tile<1>(c + (rows - kTileSide) * stride + kTileSide, stride);
}

// `to` is not copied: read back in wider pieces than it was written in, the copy would have to wait
// for every store before it, those of tiles included.
template <bool kRowsAdjacent, typename Meanwhile>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const BFloat16Pair* a, int64_t lda,
              const BFloat16Pair* b, int64_t ldb, const Into<float>& to, SumsToStore& unstored,
              Meanwhile& meanwhile) {
  static_assert(!kRowsAdjacent, "a tile of A has its depth along the row");
  const auto by_vectors = multiply<false, BFloat16Pair, float>;
  if (to.next) to.next->ask<false>(std::numeric_limits<int64_t>::max());  // not spread here
  const int64_t tile_depth = depth / kTileSide * kTileSide;
  const int64_t tile_rows = tile_depth > 0 ? rows / kTileSide * kTileSide : 0;
  if (tile_rows < rows) {
    unstored.store_all();
    by_vectors(rows - tile_rows, vectors, depth, a + tile_rows * lda, lda, b, ldb,
               to.at(tile_rows, 0));
  }
  if (tile_rows == 0) return;
  bool accumulate = to.accumulate;
  if (tile_depth < depth || to.scale) {
    // First, so that the maxima are of the whole sums; over no depth at all it only scales.
    unstored.store_all();
    by_vectors(tile_rows, vectors, depth - tile_depth, a + tile_depth, lda, b + tile_depth * ldb,
               ldb, {to.c, to.stride, accumulate, to.scale});
    accumulate = true;
  }
  if (tile_depth == 2 * kTileSide && vectors == 2 && !to.top) {
    unstored.store_all();
    return multiply_by_four(tile_rows, a, lda, b, ldb, to.c, to.stride, accumulate, meanwhile);
  }
  for (int64_t row = 0; row < tile_rows; row += 2 * kTileSide) {
    for (int64_t vector = 0; vector < vectors; vector += 2) {
      const bool tall = row + 2 * kTileSide <= tile_rows, wide = vector + 2 <= vectors;
      const auto block = [&](auto tiles_down, auto tiles_across) {
        const int64_t column = vector * kTileSide;
        multiply_tiles<tiles_down, tiles_across>(
            tile_depth, a + row * lda, lda, b + column, ldb,
            Into<float>{to.c + row * to.stride + column, to.stride, accumulate, nullptr,
                        to.top ? to.top + column : nullptr},
            unstored, meanwhile);
      };
      constexpr std::integral_constant<int, 1> kOne;
      constexpr std::integral_constant<int, 2> kTwo;
      if (tall) {
        wide ? block(kTwo, kTwo) : block(kTwo, kOne);
      } else {
        wide ? block(kOne, kTwo) : block(kOne, kOne);
      }
    }
  }
}

template <bool kRowsAdjacent, typename Meanwhile>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const BFloat16Pair* a, int64_t lda,
              const BFloat16Pair* b, int64_t ldb, const Into<float>& to, Meanwhile& meanwhile) {
  SumsToStore unstored;
  multiply<kRowsAdjacent>(rows, vectors, depth, a, lda, b, ldb, to, unstored, meanwhile);
  unstored.store_all();
}

template <bool kRowsAdjacent>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const BFloat16Pair* a, int64_t lda,
              const BFloat16Pair* b, int64_t ldb, const Into<float>& to) {
  NothingMeanwhile nothing;
  multiply<kRowsAdjacent>(rows, vectors, depth, a, lda, b, ldb, to, nothing);
}
