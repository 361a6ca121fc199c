// matmul.h's product for pairs of bfloat16, by the tiles of AMX.
//
// A block of C is two by two tiles, the four sums of which stay in registers while two tiles of A
// and two of B pass by: all eight registers, and each operand loaded is used twice. What does not
// fill tiles is copied, with zeros after it: the end of the depth in products over a head's
// dimensions, whose rows are whole tiles of keys, or the last rows in products over whole tiles.
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

// A and B of a product over whole tiles.
struct TileOperands {
  const BFloat16Pair *a, *b;
  int64_t lda, ldb, depth;
  bool a_passes = false;  // see Into

  TileOperands at(int64_t row, int64_t column) const {
    return depth == 0 ? *this : TileOperands{a + row * lda, b + column, lda, ldb, depth, a_passes};
  }
};

template <int kTile>
inline __attribute__((always_inline)) void load_left(const BFloat16Pair* a, int64_t stride,
                                                     bool passes) {
  if (passes) {
    load_passing_tile<kTile>(a, stride);
  } else {
    load_tile<kTile>(a, stride);
  }
}

// C (tall x wide tiles) = A B or C += A B, over `most` and then `rest`. The sums are in registers 0
// to 3, A's tiles in 4 and 5, B's in 6 and 7. Sums of two by two tiles are left to `unstored`.
template <int kTall, int kWide>
void multiply_tiles(const TileOperands& most, const TileOperands& rest, float* c, int64_t stride,
                    bool accumulate, SumsToStore& unstored) {
  constexpr auto kSums = std::make_integer_sequence<int, kTall * kWide>{};
  const auto place = [&](int sum) {
    return c + sum / kWide * kTileSide * stride + sum % kWide * kTileSide;
  };
  const auto step = [&](const TileOperands& from, int64_t k, auto first) {
    for_each_index(kSums, [&](auto sum) {
      constexpr int kRow = sum / kWide, kColumn = sum % kWide;
      if (first) {
        unstored.template store<sum>();
        begin_sum<sum>(place(sum), stride, accumulate);
      }
      if (kColumn == 0) {
        load_left<4 + kRow>(from.a + kRow * kTileSide * from.lda + k, from.lda, from.a_passes);
      }
      if (kRow == 0) load_tile<6 + kColumn>(from.b + k * from.ldb + kColumn * kTileSide, from.ldb);
      multiply_add_tiles<sum, 4 + kRow, 6 + kColumn>();
    });
  };
  if (kTall * kWide < 4) unstored.store_all();
  const bool only_rest = most.depth == 0;
  step(only_rest ? rest : most, 0, std::true_type{});
  for (int64_t k = kTileSide; k < most.depth; k += kTileSide) step(most, k, std::false_type{});
  if (rest.depth > 0 && !only_rest) step(rest, 0, std::false_type{});
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
    load_left<3>(a + row * lda, lda, to.a_passes);
    multiply_add_tiles<0, 3, 4>();
    if (row > 0) store_tile<1>(sums - kTileSide * to.stride + kTileSide, to.stride);
    begin_sum<1>(sums + kTileSide, to.stride, to.accumulate);
    multiply_add_tiles<1, 3, 5>();
    load_left<3>(a + row * lda + kTileSide, lda, to.a_passes);
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

// Scales C if it is to be, and says where the sums go after that.
inline Into<float> into_scaled(int64_t rows, int64_t vectors, const Into<float>& to) {
  Into<float> sum = to;
  if (to.scale) {
    scale_columns(rows, vectors, to);
    sum.accumulate = true, sum.scale = nullptr;
  }
  return sum;
}

// All of C, of whole tiles.
inline void multiply_all_tiles(int64_t rows, int64_t vectors, const TileOperands& most,
                               const TileOperands& rest, const Into<float>& to) {
  SumsToStore unstored;
  for (int64_t row = 0; row < rows; row += 2 * kTileSide) {
    for (int64_t vector = 0; vector < vectors; vector += 2) {
      const bool tall = row + 2 * kTileSide <= rows, wide = vector + 2 <= vectors;
      const int64_t column = vector * kTileSide;
      const auto block = tall ? (wide ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                              : (wide ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
      block(most.at(row, column), rest.at(row, column), to.c + row * to.stride + column, to.stride,
            to.accumulate, unstored);
      if (to.ahead) to.ahead->ask(kLinesAsked);
    }
  }
}

// Copies `rows` rows of `count` pairs, both filled up to whole tiles with zeros.
inline void copy_filled(int64_t rows, int64_t count, const BFloat16Pair* from, int64_t stride,
                        BFloat16Pair* to) {
  const int64_t to_stride = padded<float>(count);
  for (int64_t row = 0; row < padded<float>(rows); ++row) {
    for (int64_t k = 0; k < to_stride; k += kTileSide) {
      const int64_t left = row < rows ? count - k : 0;
      store_packed(to + row * to_stride + k,
                   load_items<Words>(left > 0 ? from + row * stride + k : from, left));
    }
  }
}

template <bool kRowsAdjacent>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const BFloat16Pair* a, int64_t lda,
              const BFloat16Pair* b, int64_t ldb, const Into<float>& to) {
  static_assert(!kRowsAdjacent, "a tile of A has its depth along the row");
  constexpr int64_t kColumns = kBlockVectors * kTileSide, kMostDepth = kKeys / 2;
  const Into<float> sum = into_scaled(rows, vectors, to);
  if (depth == 0) {
    for (int64_t row = 0; row < rows && !sum.accumulate; ++row) {
      std::fill_n(to.c + row * to.stride, vectors * kTileSide, 0.0f);
    }
    return;
  }
  const int64_t tile_depth = depth / kTileSide * kTileSide, more = depth - tile_depth;
  const int64_t tile_rows = rows / kTileSide * kTileSide, more_rows = rows - tile_rows;
  const TileOperands most{a, b, lda, ldb, tile_depth, to.a_passes};
  if (more > 0) {
    alignas(kVectorBytes) BFloat16Pair a_rest[kKeys * kTileSide], b_rest[kTileSide * kColumns];
    const int64_t columns = vectors * kTileSide;
    copy_filled(rows, more, a + tile_depth, lda, a_rest);
    copy_filled(more, columns, b + tile_depth * ldb, ldb, b_rest);
    return multiply_all_tiles(rows, vectors, most, {a_rest, b_rest, kTileSide, columns, kTileSide},
                              sum);
  }
  if (depth == 2 * kTileSide && vectors == 2 && tile_rows > 0) {
    multiply_by_four(tile_rows, a, lda, b, ldb, sum);
  } else {
    multiply_all_tiles(tile_rows, vectors, most, {}, sum);
  }
  if (more_rows > 0) {
    alignas(kVectorBytes) BFloat16Pair a_rest[kTileSide * kMostDepth];
    alignas(kVectorBytes) float c_rest[kTileSide * kColumns];
    copy_filled(more_rows, depth, a + tile_rows * lda, lda, a_rest);
    multiply_all_tiles(kTileSide, vectors, {a_rest, b, depth, ldb, depth}, {},
                       Into<float>{c_rest, kColumns});
    for (int64_t row = 0; row < more_rows; ++row) {
      for (int64_t column = 0; column < vectors * kTileSide; column += kTileSide) {
        float* c = to.c + (tile_rows + row) * to.stride + column;
        const Vec<float> more_sum = load(c_rest + row * kColumns + column);
        store<float>(c, sum.accumulate ? load(c) + more_sum : more_sum);
      }
    }
  }
}
