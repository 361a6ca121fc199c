// Products of few rows with a weight, out (M, N) = input (M, K) weight (N, K)^T + bias (N), in
// float32.
//
// Both operands are contiguous along the summed dimension, so a vector holds 16 of its neighbours
// and nothing is packed: a tile of 4 rows by kLinearColumns<Real> columns keeps one accumulator for
// each output, and their lanes are summed at the end, all at once. A block of columns meets every
// row while it lies in the first cache, so that the weight, which is the larger one, is read once.
// Tested against float64 in tests/test_linear.py.

constexpr int kLinearRows = 4;
template <typename Real>
constexpr int kLinearColumns = kLanes<Real> / kLinearRows;

// Rows and columns beyond the last are computed as copies of it, and not stored.
template <typename Real>
void linear_tile(const LinearArguments& a, int64_t row, int64_t column) {
  constexpr int kW = kLanes<Real>, kR = kLinearRows, kC = kLinearColumns<Real>;
  const Real* x[kR];
  const Real* w[kC];
  for (int i = 0; i < kR; ++i) x[i] = a.input + std::min(row + i, a.rows - 1) * a.depth;
  for (int j = 0; j < kC; ++j) w[j] = a.weight + std::min(column + j, a.columns - 1) * a.depth;
  Vec<Real> sum[kR * kC] = {};
  for (int64_t k = 0; k < a.depth; k += kW) {
    Vec<Real> weights[kC];
#pragma GCC unroll 4
    for (int j = 0; j < kC; ++j) weights[j] = load(w[j] + k);
#pragma GCC unroll 4
    for (int i = 0; i < kR; ++i) {
      const Vec<Real> inputs = load(x[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) sum[i * kC + j] += inputs * weights[j];
    }
  }
  alignas(kVectorBytes) Real sums[kW];
  store<Real>(sums, sums_of_lanes<Real>(sum));
  const int64_t rows = std::min<int64_t>(kR, a.rows - row);
  const int64_t columns = std::min<int64_t>(kC, a.columns - column);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const Real bias = a.bias ? a.bias[column + j] : Real(0);
      a.out[(row + i) * a.columns + column + j] = sums[i * kC + j] + bias;
    }
  }
}

template <typename Real>
void linear(const LinearArguments& a, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t column = 0; column < a.columns; column += kLinearColumns<Real>) {
    for (int64_t row = 0; row < a.rows; row += kLinearRows) linear_tile<Real>(a, row, column);
  }
}
