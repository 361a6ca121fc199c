// Register-tiled matrix products on small blocks, C (+)= A B, accumulated in the compute type.
//
// An element is a float, a double or a pair of bfloat16 neighbours along the summed dimension;
// `depth` counts elements. B and C are row-major with rows padded to whole vectors. A is read one
// broadcast element at a time, so that keys and values are used where they lie in memory:
// kRowsAdjacent says whether A(m, k) is a[m + k * lda] (neighbouring rows, a transposed operand) or
// a[m * lda + k]. A register tile is MR rows by NR vectors; the accumulators fill the register
// file.

// How many rows a tile has by its vectors, as many accumulators as hide a multiply-add's latency of
// four or five cycles, two a cycle; and of how many vectors the next tiles are: as many as divide
// the rest evenly, so that a narrow one is rare.
#if ATTN_EXT_VECTOR_BYTES == 64  // 32 registers
constexpr int kTileRows[] = {0, 16, 8, 8, 6};
inline int64_t vectors_at_once(int64_t vectors) {
  return vectors % 4 == 0 ? 4 : std::min<int64_t>(vectors, 3);
}
#else
#ifdef __aarch64__  // 32 registers; four multiply-adds a cycle on some, so that 12 would be too few
constexpr int kTileRows[] = {0, 16, 8, 6};
#else               // 16 registers
constexpr int kTileRows[] = {0, 8, 6, 4};
#endif
inline int64_t vectors_at_once(int64_t vectors) {
  return vectors % 3 == 0 ? 3 : vectors % 2 == 0 ? 2 : std::min<int64_t>(vectors, 3);
}
#endif
#ifdef ATTN_EXT_AMX_PRODUCTS
constexpr bool kProductsFindMaxima = false;  // its sums would have to be read back
#else
constexpr bool kProductsFindMaxima = true;
#endif

// Where a product goes: C = A B, C += A B, or C = C scale + A B with one factor a column of C. If
// `top` is given it becomes the maximum of itself and each column of C. If `ahead` is given it is
// asked for meanwhile. `a_passes`: A is read once, and what else is in the first cache is worth
// more (AMX's products alone heed it).
template <typename Real>
struct Into {
  Real* c;
  int64_t stride;
  bool accumulate = false;
  const Real* scale = nullptr;
  Real* top = nullptr;
  Ahead* ahead = nullptr;
  bool a_passes = false;

  Into at(int64_t row, int64_t column) const {
    return {c + row * stride + column,    stride, accumulate, scale ? scale + column : nullptr,
            top ? top + column : nullptr, ahead,  a_passes};
  }
};

template <int MR, int NR, bool kRowsAdjacent, typename Element, typename Real>
inline __attribute__((always_inline)) void multiply_tile(const Element* a, int64_t lda,
                                                         const Element* b, int64_t ldb,
                                                         int64_t depth, const Into<Real>& into) {
  constexpr int kW = kLanes<Real>;
  Vec<Real> sum[MR][NR] = {};
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Packed<Element> row[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) row[n] = load_packed(b + k * ldb + n * kW);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Element x = kRowsAdjacent ? a[m + k * lda] : a[m * lda + k];
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) sum[m][n] = multiply_add(x, row[n], sum[m][n]);
    }
  };
  Upcoming::Share upcoming = into.ahead ? into.ahead->share(depth) : Upcoming::Share();
  int64_t k = 0;
  for (; k < upcoming.steps; ++k) {
    upcoming.ask();
    step(k);
  }
  for (; k < depth; ++k) step(k);

  Real* sums = into.c;
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    if (m > 0) sums += into.stride;
    asm("" : "+r"(sums));  // one pointer that moves, where GCC would keep one for each row
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      Real* to = sums + n * kW;
      if (into.scale) sum[m][n] += load(to) * load(into.scale + n * kW);
      if (into.accumulate) sum[m][n] += load(to);
      store<Real>(to, sum[m][n]);
    }
  }
  if (into.top) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      Vec<Real> top = load(into.top + n * kW);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) top = simd_max<Real>(sum[m][n], top);
      store<Real>(into.top + n * kW, top);
    }
  }
}

// All rows of one column of tiles: as many tiles of MR rows as fit, the rest by halves.
template <int MR, int NR, bool kRowsAdjacent, typename Element, typename Real>
void multiply_column(int64_t rows, const Element* a, int64_t lda, const Element* b, int64_t ldb,
                     int64_t depth, Into<Real> into) {
  const int64_t row_step = kRowsAdjacent ? 1 : lda;
  while (rows >= MR) {
    multiply_tile<MR, NR, kRowsAdjacent>(a, lda, b, ldb, depth, into);
    a += MR * row_step, into = into.at(MR, 0), rows -= MR;
  }
  if constexpr (MR > 1) {
    if (rows > 0) {
      multiply_column<(MR + 1) / 2, NR, kRowsAdjacent>(rows, a, lda, b, ldb, depth, into);
    }
  }
}

// Whether rows of A that are read side by side fall into the same set of the first cache, which has
// 8 to 12 places: so it is where they lie 4 KiB apart. (Tiles of AVX2 have no more than 8 rows.)
template <bool kRowsAdjacent, typename Element>
inline bool rows_share_cache_sets(int64_t lda) {
  return !kRowsAdjacent && lda != 0 && lda * static_cast<int64_t>(sizeof(Element)) % 4096 == 0;
}

// C (rows x vectors) (+)= A (rows x depth) B (depth x vectors). Long sums are made of parts, whose
// rounding errors don't grow with the whole.
template <bool kRowsAdjacent, typename Element, typename Real>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const Element* a, int64_t lda,
              const Element* b, int64_t ldb, Into<Real> into) {
  constexpr int kW = kLanes<Real>;
  constexpr int64_t kMostDepth = 128;
  while (depth > kMostDepth) {
    Into<Real> part = into;
    part.top = nullptr;
    multiply<kRowsAdjacent>(rows, vectors, kMostDepth, a, lda, b, ldb, part);
    a += kMostDepth * (kRowsAdjacent ? lda : 1), b += kMostDepth * ldb, depth -= kMostDepth;
    into.accumulate = true, into.scale = nullptr;
  }
  constexpr int kWidest = std::size(kTileRows) - 1, kTall = kTileRows[1];
  const auto one_vector = rows_share_cache_sets<kRowsAdjacent, Element>(lda)
                              ? multiply_column<std::min(kTall, 8), 1, kRowsAdjacent, Element, Real>
                              : multiply_column<kTall, 1, kRowsAdjacent, Element, Real>;
  while (vectors > 0) {
    const int64_t width = vectors_at_once(vectors);
    auto column = width == 1   ? one_vector
                  : width == 2 ? multiply_column<kTileRows[2], 2, kRowsAdjacent, Element, Real>
                  : width == 3
                      ? multiply_column<kTileRows[3], 3, kRowsAdjacent, Element, Real>
                      : multiply_column<kTileRows[kWidest], kWidest, kRowsAdjacent, Element, Real>;
    column(rows, a, lda, b, ldb, depth, into);
    b += width * kW, into = into.at(0, width * kW), vectors -= width;
  }
}
