// matmul.h's product for pairs of bfloat16, by the tiles of AMX.
//
// A block of C is two by two tiles, the four sums of which stay in registers while two tiles of A
// and two of B pass by: all eight registers, and each operand loaded is used twice. Rows and depths
// that don't fill a tile are left to vectors.
//
// A core can do vector work beside these products, but it does not pay to mix them: only one of its
// two units of multiply-adds works on vectors meanwhile, and what limits both is tiles on their way
// to and from memory (measured on Granite Rapids). A stored tile is 16 of about a hundred stores
// that a core remembers, and more than sixty of the 512 instructions that it looks ahead: stores
// have to hit L1 and must not wait for a product.

constexpr int64_t kLinesAsked = 24;  // of what is read before long, after each block

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

// Where the four sums of two by two tiles in registers 0 to 3 go, once the next block needs them.
class SumsToStore {
 public:
  ~SumsToStore() { store_all(); }

  void set(float* c, int64_t stride) { c_ = c, stride_ = stride; }
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
template <int kTall, int kWide>
void multiply_tiles(int64_t depth, const BFloat16Pair* a, int64_t lda, const BFloat16Pair* b,
                    int64_t ldb, float* c, int64_t stride, bool accumulate, SumsToStore& unstored) {
  constexpr auto kSums = std::make_integer_sequence<int, kTall * kWide>{};
  const auto place = [&](int sum) {
    return c + sum / kWide * kTileSide * stride + sum % kWide * kTileSide;
  };
  const auto step = [&](int64_t k, auto first) {
    for_each_index(kSums, [&](auto sum) {
      constexpr int kRow = sum / kWide, kColumn = sum % kWide;
      if (first) {
        unstored.template store<sum>();
        begin_sum<sum>(place(sum), stride, accumulate);
      }
      if (kColumn == 0) load_tile<4 + kRow>(a + kRow * kTileSide * lda + k, lda);
      if (kRow == 0) load_tile<6 + kColumn>(b + k * ldb + kColumn * kTileSide, ldb);
      multiply_add_tiles<sum, 4 + kRow, 6 + kColumn>();
    });
  };
  if (kTall * kWide < 4) unstored.store_all();
  step(0, std::true_type{});
  for (int64_t k = kTileSide; k < depth; k += kTileSide) step(k, std::false_type{});
  if (kTall * kWide == 4) {
    unstored.set(c, stride);
  } else {
    for_each_index(kSums, [&](auto sum) { store_tile<sum>(place(sum), stride); });
  }
}

// The same for a B of two by two tiles, which stay in registers 4 to 7 while every tile of A passes
// by once, in 3. Sums are in 0 and 1; the second is stored while the next row is multiplied.
inline void multiply_by_four(int64_t rows, const BFloat16Pair* a, int64_t lda,
                             const BFloat16Pair* b, int64_t ldb, const Into<float>& to) {
  load_tile<4>(b, ldb);
  load_tile<5>(b + kTileSide, ldb);
  load_tile<6>(b + kTileSide * ldb, ldb);
  load_tile<7>(b + kTileSide * ldb + kTileSide, ldb);
  for (int64_t row = 0; row < rows; row += kTileSide) {
    float* sums = to.c + row * to.stride;
    begin_sum<0>(sums, to.stride, to.accumulate);
    load_tile<3>(a + row * lda, lda);
    multiply_add_tiles<0, 3, 4>();
    if (row > 0) store_tile<1>(sums - kTileSide * to.stride + kTileSide, to.stride);
    begin_sum<1>(sums + kTileSide, to.stride, to.accumulate);
    multiply_add_tiles<1, 3, 5>();
    load_tile<3>(a + row * lda + kTileSide, lda);
    multiply_add_tiles<0, 3, 6>();
    multiply_add_tiles<1, 3, 7>();
    store_tile<0>(sums, to.stride);
    if (to.ahead) to.ahead->ask(kLinesAsked);
  }
  store_tile<1>(to.c + (rows - kTileSide) * to.stride + kTileSide, to.stride);
}

// C's columns times their factors, most of which are 1 in most tiles.
inline void scale_columns(int64_t rows, int64_t vectors, const Into<float>& to) {
  for (int64_t column = 0; column < vectors * kTileSide; column += kTileSide) {
    const Vec<float> factor = load(to.scale + column);
    if (!any(factor != 1.0f)) continue;
    for (int64_t row = 0; row < rows; ++row) {
      float* c = to.c + row * to.stride + column;
      store<float>(c, load(c) * factor);
    }
  }
}

template <bool kRowsAdjacent>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const BFloat16Pair* a, int64_t lda,
              const BFloat16Pair* b, int64_t ldb, const Into<float>& to) {
  static_assert(!kRowsAdjacent, "a tile of A has its depth along the row");
  const auto by_vectors = multiply<false, BFloat16Pair, float>;
  if (to.scale) scale_columns(rows, vectors, to);
  Into<float> sum{to.c, to.stride, to.accumulate || to.scale, nullptr, nullptr, to.ahead};
  const int64_t tile_depth = depth / kTileSide * kTileSide;
  const int64_t tile_rows = tile_depth > 0 ? rows / kTileSide * kTileSide : 0;
  if (tile_rows < rows) {
    by_vectors(rows - tile_rows, vectors, depth, a + tile_rows * lda, lda, b, ldb,
               sum.at(tile_rows, 0));
  }
  if (tile_rows > 0 && tile_depth < depth) {
    by_vectors(tile_rows, vectors, depth - tile_depth, a + tile_depth, lda, b + tile_depth * ldb,
               ldb, sum);
    sum.accumulate = true;
  }
  if (tile_rows > 0 && tile_depth == 2 * kTileSide && vectors == 2) {
    multiply_by_four(tile_rows, a, lda, b, ldb, sum);
  } else {
    SumsToStore unstored;
    for (int64_t row = 0; row < tile_rows; row += 2 * kTileSide) {
      for (int64_t vector = 0; vector < vectors; vector += 2) {
        const bool tall = row + 2 * kTileSide <= tile_rows, wide = vector + 2 <= vectors;
        const int64_t column = vector * kTileSide;
        const auto block = tall ? (wide ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                : (wide ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
        block(tile_depth, a + row * lda, lda, b + column, ldb, to.c + row * to.stride + column,
              to.stride, sum.accumulate, unstored);
        if (to.ahead) to.ahead->ask(kLinesAsked);
      }
    }
  }
}
