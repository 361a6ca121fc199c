// Products of few rows with a weight, out (M, N) = input (M, K) weight (N, K)^T + bias (N), in
// float32. The weight, which is the larger one, is read once and packed nowhere.
//
// Where rows fill vectors, their lanes are rows: the input is transposed once, each number of the
// weight multiplies a vector of it, and blocks of the output are transposed back (matmul.h). Fewer
// rows take vectors along the summed dimension, along which both operands are contiguous: a tile
// of kLinearRows rows by kLinearColumns<Real> columns has one accumulator for each output, whose
// lanes are summed at the end, all at once.
// Tested against float64 in tests/test_linear.py.

// Columns that are computed at a time where lanes are rows.
template <typename Real>
constexpr int64_t kLinearBlock = kLanes<Real>;
// A sum there is one of sums of so many products, lest its rounding errors exceed those of a sum in
// many lanes.
constexpr int64_t kLinearDepth = 64;

// packed[k][row], rows beyond the last being zeros.
template <typename Real>
CacheLines<Real> transposed_input(const LinearArguments& a, int64_t lanes) {
  constexpr int64_t kW = kLanes<Real>;
  CacheLines<Real> packed = allocate_lines<Real>(a.depth * lanes);
  for (int64_t row = 0; row < lanes; row += kW) {
    for (int64_t k = 0; k < a.depth; k += kW) {
      Vec<Real> block[kW] = {};
      for (int64_t i = 0; i < std::min(kW, a.rows - row); ++i) {
        block[i] = load(a.input + (row + i) * a.depth + k);
      }
      transpose<Real>(block);
      for (int64_t i = 0; i < kW; ++i) store<Real>(packed.get() + (k + i) * lanes + row, block[i]);
    }
  }
  return packed;
}

// sums[column][row] as rows of the output; what is there beyond the last column goes nowhere.
template <typename Real>
void store_linear(const LinearArguments& a, const Real* sums, int64_t lanes, int64_t column) {
  constexpr int64_t kW = kLanes<Real>;
  const int64_t columns = std::min(kLinearBlock<Real>, a.columns - column);
  const Vec<Real> bias = a.bias ? load_some(a.bias + column, columns) : Vec<Real>{};
  for (int64_t row = 0; row < a.rows; row += kW) {
    Vec<Real> block[kW];
#pragma GCC unroll 16
    for (int64_t j = 0; j < kW; ++j) block[j] = load(sums + j * lanes + row);
    transpose<Real>(block);
    for (int64_t i = 0; i < std::min(kW, a.rows - row); ++i) {
      store_some(a.out + (row + i) * a.columns + column, block[i] + bias, columns);
    }
  }
}

// One block of columns, from `input` transposed, by way of `sums`.
template <typename Real>
void linear_block(const LinearArguments& a, const Real* input, int64_t lanes, int64_t column,
                  Real* sums) {
  const int64_t columns = std::min(kLinearBlock<Real>, a.columns - column);
  const Real* weight = a.weight + column * a.depth;
  // The next block's, one row after the other.
  const int64_t next = std::min(kLinearBlock<Real>, a.columns - column - columns) * a.depth;
  const int64_t bytes = next * static_cast<int64_t>(sizeof(Real));
  Ahead ahead(Upcoming(weight + columns * a.depth, bytes, bytes, 1).in_haste(true));
  Into<Real> into{sums, lanes};
  into.ahead = &ahead;
  for (int64_t k = 0; k < a.depth; k += kLinearDepth) {
    into.accumulate = k > 0;
    multiply<false>(columns, lanes / kLanes<Real>, std::min(kLinearDepth, a.depth - k), weight + k,
                    a.depth, input + k * lanes, lanes, into);
  }
  store_linear<Real>(a, sums, lanes, column);
}

template <typename Real>
void linear_by_rows(const LinearArguments& a, int threads) {
  const int64_t lanes = padded<Real>(a.rows), block = kLinearBlock<Real> * lanes;
  const CacheLines<Real> input = transposed_input<Real>(a, lanes);
  const CacheLines<Real> sums = allocate_lines<Real>(threads * block);
  run_parallel(threads, [&] {
    Real* own_sums = sums.get() + omp_get_thread_num() * block;
#pragma omp for schedule(static)
    for (int64_t column = 0; column < a.columns; column += kLinearBlock<Real>) {
      linear_block<Real>(a, input.get(), lanes, column, own_sums);
    }
  });
}

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
  const bool fill_lanes = 2 * a.rows > kLanes<Real>;  // or half of them, which takes as long
  if (fill_lanes) return linear_by_rows<Real>(a, threads);
  run_parallel(threads, [&] {
#pragma omp for schedule(static)
    for (int64_t column = 0; column < a.columns; column += kLinearColumns<Real>) {
      for (int64_t row = 0; row < a.rows; row += kLinearRows) linear_tile<Real>(a, row, column);
    }
  });
}
