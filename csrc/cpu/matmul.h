// Register-tiled matrix products on small blocks, C (+)= A B, all in the compute type.
//
// B and C are row-major with rows padded to whole vectors. A is read one broadcast scalar at a
// time, so that keys and values are used where they lie in memory: kRowsAdjacent says whether A(m,
// k) is a[m + k * lda] (neighbouring rows, a transposed operand) or a[m * lda + k]. A register tile
// is MR rows by NR vectors; the accumulators fill the register file.

#if ATTN_EXT_VECTOR_BYTES == 64
constexpr int kTileRows[5] = {0, 12, 12, 8, 6};  // by NR; 32 registers
#else
constexpr int kTileRows[5] = {0, 8, 4, 4, 2};  // 16 registers
#endif

template <int MR, int NR, bool kRowsAdjacent, typename Real>
inline __attribute__((always_inline)) void multiply_tile(const Real* a, int64_t lda, const Real* b,
                                                         int64_t ldb, Real* c, int64_t ldc,
                                                         int64_t depth, bool accumulate) {
  constexpr int kW = kLanes<Real>;
  Vec<Real> sum[MR][NR] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<Real> row[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) row[n] = load(b + k * ldb + n * kW);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Real x = kRowsAdjacent ? a[m + k * lda] : a[m * lda + k];
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) sum[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      Real* to = c + m * ldc + n * kW;
      store<Real>(to, accumulate ? load(to) + sum[m][n] : sum[m][n]);
    }
  }
}

// All rows of one column of tiles: as many tiles of MR rows as fit, the rest by halves.
template <int MR, int NR, bool kRowsAdjacent, typename Real>
void multiply_column(int64_t rows, const Real* a, int64_t lda, const Real* b, int64_t ldb, Real* c,
                     int64_t ldc, int64_t depth, bool accumulate) {
  const int64_t row_step = kRowsAdjacent ? 1 : lda;
  while (rows >= MR) {
    multiply_tile<MR, NR, kRowsAdjacent>(a, lda, b, ldb, c, ldc, depth, accumulate);
    a += MR * row_step, c += MR * ldc, rows -= MR;
  }
  if constexpr (MR > 1) {
    if (rows > 0) {
      multiply_column<(MR + 1) / 2, NR, kRowsAdjacent>(rows, a, lda, b, ldb, c, ldc, depth,
                                                       accumulate);
    }
  }
}

// C (rows x vectors) (+)= A (rows x depth) B (depth x vectors).
template <bool kRowsAdjacent, typename Real>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const Real* a, int64_t lda,
              const Real* b, int64_t ldb, Real* c, int64_t ldc, bool accumulate) {
  constexpr int kW = kLanes<Real>;
  while (vectors > 0) {
    // Columns of 4 vectors where they divide evenly, else 3, so that a narrow rest is rare.
    const int64_t width = vectors % 4 == 0 ? 4 : vectors == 5 || vectors >= 3 ? 3 : vectors;
    auto column = width == 4   ? multiply_column<kTileRows[4], 4, kRowsAdjacent, Real>
                  : width == 3 ? multiply_column<kTileRows[3], 3, kRowsAdjacent, Real>
                  : width == 2 ? multiply_column<kTileRows[2], 2, kRowsAdjacent, Real>
                               : multiply_column<kTileRows[1], 1, kRowsAdjacent, Real>;
    column(rows, a, lda, b, ldb, c, ldc, depth, accumulate);
    b += width * kW, c += width * kW, vectors -= width;
  }
}
