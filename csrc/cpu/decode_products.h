// The two products of decoding, of a few query rows with keys and of their weights with values,
// read from memory at its speed: lanes are head dimensions, and rows that share a key or value
// share what is loaded of it.

// Rows of keys or values that are read one after the other, and what is read after them.
template <typename T>
struct Stream {
  const T* rows;
  int64_t stride, count, width;
  const T* next_rows;
  int64_t next_stride;

  const T* row(int64_t index) const { return rows + std::min(index, count - 1) * stride; }
};

// Asks for lines some KiB ahead of the rows that are worked on, sooner than the hardware's
// prefetchers do: a few at a time, and as they lie in memory. In another order, or by the dozen,
// memory delivers a fifth less. Straight into the first cache, as is best on Zen 5; but Zen 4 and
// Intel's processors wait for few lines at a time there, and memory delivers a tenth more, or twice
// as much, by way of the second one. What asks in an inner loop is inlined where the object is a
// local variable: its members, and sums beside it, would else be in memory.
template <typename T>
class ReadAhead {
 public:
  ReadAhead() = default;
  explicit ReadAhead(const Stream<T>& stream)
      : bytes_(stream.width * static_cast<int64_t>(sizeof(T))),
        next_(stream.next_rows),
        next_stride_(stream.next_stride) {
    const int64_t bytes_ahead = by_second_cache_ ? 8192 : 5120;
    const int64_t rows = std::min(kKeys, 1 + bytes_ahead / (bytes_ + 1));
    if (rows < stream.count) {
      enter(stream.rows + rows * stream.stride, stream.stride, stream.count - rows);
    } else {
      enter_next(rows - stream.count);
    }
  }

  template <int kLines>
  inline __attribute__((always_inline)) void ask() {
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i) {
      by_second_cache_ ? __builtin_prefetch(line_, 0, 2) : __builtin_prefetch(line_, 0, 0);
      line_ += kLine;
      if (line_ < end_) continue;
      line_ += gap_, end_ += stride_;
      if (--left_ == 0) enter_next(0);
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  void enter(const T* row, int64_t stride, int64_t rows) {
    line_ = reinterpret_cast<const char*>(row), end_ = line_ + bytes_;
    stride_ = stride * static_cast<int64_t>(sizeof(T));
    gap_ = stride_ - (bytes_ + kLine - 1) / kLine * kLine, left_ = rows;
  }
  void enter_next(int64_t row) {
    enter(next_ + row * next_stride_, next_stride_, std::numeric_limits<int64_t>::max());
  }

  bool by_second_cache_ = reads_by_second_cache();
  const char *line_ = nullptr, *end_ = nullptr;  // what is asked for next, and where its row ends
  int64_t bytes_ = 0, stride_ = 0, gap_ = 0;     // of a row, from row to row and from end to row
  int64_t left_ = 0;                             // rows before the next ones
  const T* next_ = nullptr;
  int64_t next_stride_ = 0;
};

// Values of a row that are loaded at once: a vector of them, or two of bfloat16, first the even
// ones, then the odd ones, since a shift and a mask bring them there.
template <typename T, typename Real>
constexpr int64_t kColumns = (std::is_same_v<T, BFloat16> ? 2 : 1) * kLanes<Real>;

inline void load_columns(const float* from, int64_t count, Vec<float>* x, Vec<float>*) {
  *x = load_some(from, count);
}
inline void load_columns(const Float16* from, int64_t count, Vec<float>* x, Vec<float>*) {
  *x = load_some(from, count);
}
inline void load_columns(const double* from, int64_t count, Vec<double>* x, Vec<double>*) {
  *x = load_some(from, count);
}
inline void load_columns(const BFloat16* from, int64_t count, Vec<float>* even, Vec<float>* odd) {
  const Words pairs = reinterpret_cast<Words>(load_pairs(from, 0, count));
  *even = reinterpret_cast<Vec<float>>(pairs << 16);
  *odd = reinterpret_cast<Vec<float>>(pairs & 0xFFFF0000u);
}

// Lines that such loads from kRows rows take.
template <typename T, typename Real, int kRows>
constexpr int kLinesOf = std::max<int>(1, kRows* kColumns<T, Real> * sizeof(T) / 64);

// Where the value at d lies in rows that are made of such vectors, and how long these are.
template <typename T, typename Real>
inline int64_t place(int64_t d) {
  if (!std::is_same_v<T, BFloat16>) return d;
  constexpr int64_t kStep = kColumns<T, Real>;
  return d / kStep * kStep + d % 2 * kLanes<Real> + d % kStep / 2;
}
template <typename T, typename Real>
inline int64_t place_count(int64_t width) {
  constexpr int64_t kStep = kColumns<T, Real>;
  return (width + kStep - 1) / kStep * kStep;
}

// Stores columns of a row that load_columns would load so, times `factor`.
template <typename T, typename Real>
inline void store_columns(Vec<Real> x, Vec<Real> odd, Real factor, int64_t count, T* to) {
  constexpr int kW = kLanes<Real>;
  constexpr auto kLaneNumbers = std::make_integer_sequence<int, kW>{};
  x = x * factor;
  if constexpr (kColumns<T, Real> > kW) {
    odd = odd * factor;
    store_some(to + kW, interleave<Vec<Real>, kW, true>(x, odd, kLaneNumbers), count - kW);
    x = interleave<Vec<Real>, kW, false>(x, odd, kLaneNumbers);
  }
  store_some(to, x, count);
}
template <typename T, typename Real>
inline void store_row(const Real* row, Real factor, int64_t width, T* to) {
  constexpr int64_t kStep = kColumns<T, Real>;
  for (int64_t d = 0; d < width; d += kStep) {
    store_columns(load(row + d), load(row + d + kStep - kLanes<Real>), factor, width - d, to + d);
  }
}

// Rows that share what is loaded of a key or value; others take another turn, while it is in L1.
template <typename Real>
constexpr int kMostShared = std::min<int>(4, kLanes<Real>);

// Runs `call` with the number of rows, of so many, that share it.
template <typename Real, typename Call>
inline void with_shared(int64_t rows, Call call) {
  if (rows <= 1) return call(std::integral_constant<int, 1>{});
  if (rows <= 2) return call(std::integral_constant<int, 2>{});
  call(std::integral_constant<int, kMostShared<Real>>{});
}

// Whether with_shared gives this number where it is that of all rows; the others' later turns ask
// for nothing ahead.
template <int kShared, typename Real>
constexpr bool kOneTurn = kShared < kMostShared<Real>;

// sums[r * row_step + key] = q_r * k, lane by lane, for kCount keys.
template <int kShared, int kCount, bool kAsks, typename T, typename Real>
inline __attribute__((always_inline)) void multiply_keys(const Stream<T>& keys, int64_t first,
                                                         const Real* queries, int64_t stride,
                                                         int row_step, ReadAhead<T>& ahead,
                                                         Vec<Real>* sums) {
  constexpr int64_t kW = kLanes<Real>, kStep = kColumns<T, Real>;
  const T* rows[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) rows[i] = keys.row(first + i);
  Vec<Real> sum[kShared][kCount] = {};
  const auto add = [&](const Vec<Real>* k, int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < kShared; ++r) {
      const Vec<Real> query = load(queries + r * stride + d);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) sum[r][i] += query * k[i];
    }
  };
  const auto add_columns = [&](int64_t d, int64_t count) __attribute__((always_inline)) {
    Vec<Real> k[2][kCount];
    if (kAsks) ahead.template ask<kLinesOf<T, Real, kCount>>();
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) load_columns(rows[i] + d, count, &k[0][i], &k[1][i]);
    add(k[0], d);
    if (kStep > kW) add(k[1], d + kW);
  };
  const int64_t whole = keys.width / kStep * kStep;
  for (int64_t d = 0; d < whole; d += kStep) add_columns(d, kStep);
  if (whole < keys.width) add_columns(whole, keys.width - whole);
#pragma GCC unroll 4
  for (int r = 0; r < kShared; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sums[r * row_step + i] = sum[r][i];
  }
}

// scores[r][key] = q_r k, for as many keys at a time as give, with their rows, a vector of scores.
template <int kShared, typename T, typename Real>
void dot_products(const Stream<T>& keys, int64_t rows, const Real* queries, Real* scores) {
  // More keys side by side would share a query's load among more, but the hardware's prefetchers
  // follow them less well.
  constexpr int kBlock = kLanes<Real> / kShared, kCount = std::min(kShared, kBlock);
  const int64_t stride = place_count<T, Real>(keys.width);
  ReadAhead<T> ahead(keys);
  for (int64_t first = 0; first < keys.count; first += kBlock) {
    const auto multiply = [&](int64_t r, auto asks) __attribute__((always_inline)) {
      Vec<Real> sums[kLanes<Real>];
#pragma GCC unroll 16
      for (int j = 0; j < kBlock; j += kCount) {
        multiply_keys<kShared, kCount, asks>(keys, first + j, queries + r * stride, stride, kBlock,
                                             ahead, sums + j);
      }
      Real lanes[kLanes<Real>];
      store<Real>(lanes, sums_of_lanes<Real>(sums));
#pragma GCC unroll 4
      for (int i = 0; i < kShared; ++i) {
        std::memcpy(scores + (r + i) * kKeys + first, lanes + i * kBlock, kBlock * sizeof(Real));
      }
    };
    for (int64_t r = 0; r < rows; r += kShared) {
      kOneTurn<kShared, Real> || r == 0 ? multiply(r, std::true_type{})
                                        : multiply(r, std::false_type{});
    }
  }
}

// output[r] += sum over values [first, end) of weights[r][j] v_j, for kVectors vectors from column
// d on, which stay in registers.
template <int kShared, int kVectors, bool kWhole, bool kAsks, typename T, typename Real>
inline __attribute__((always_inline)) void add_columns(const Stream<T>& values, int64_t first,
                                                       int64_t end, int64_t d, ReadAhead<T>& ahead,
                                                       const Real* weights, Real* output) {
  constexpr int64_t kW = kLanes<Real>, kStep = kColumns<T, Real>, kPlaces = kStep / kW;
  const int64_t stride = place_count<T, Real>(values.width);
  Vec<Real> sum[kShared][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kShared; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) sum[r][n] = load(output + r * stride + d + n * kW);
  }
  for (int64_t j = first; j < end; ++j) {
    const T* row = values.rows + j * values.stride;
    if (kAsks) ahead.template ask<kLinesOf<T, Real, kVectors / kPlaces>>();
    Vec<Real> v[kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; n += kPlaces) {
      const int64_t from = d + n * kW;
      load_columns(row + from, kWhole ? kStep : values.width - from, v + n, v + n + kPlaces - 1);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kShared; ++r) {
      const Vec<Real> weight = broadcast(weights[r * kKeys + j]);
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) sum[r][n] += weight * v[n];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kShared; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) store<Real>(output + r * stride + d + n * kW, sum[r][n]);
  }
}

// The same for the columns from d on: as many times kVectors of them as there are, the rest by
// halves.
template <int kShared, int kVectors, bool kAsks, typename T, typename Real>
inline __attribute__((always_inline)) void add_columns_from(int64_t d, const Stream<T>& values,
                                                            int64_t first, int64_t end,
                                                            ReadAhead<T>& ahead,
                                                            const Real* weights, Real* output) {
  constexpr int64_t kWidth = kVectors * kLanes<Real>;
  for (; d + kWidth <= values.width; d += kWidth) {
    add_columns<kShared, kVectors, true, kAsks>(values, first, end, d, ahead, weights, output);
  }
  if constexpr (kWidth > kColumns<T, Real>) {
    add_columns_from<kShared, kVectors / 2, kAsks>(d, values, first, end, ahead, weights, output);
  } else if (d < values.width) {
    add_columns<kShared, kVectors, false, kAsks>(values, first, end, d, ahead, weights, output);
  }
}

// output[r] += sum over keys of weights[r][key] v_key; kAsks: whether by `ahead`.
template <int kShared, bool kAsks, typename T, typename Real>
void add_values(const Stream<T>& values, ReadAhead<T> ahead, int64_t rows, const Real* weights,
                Real* output) {
  constexpr int kSums = kVectorBytes == 64 ? 16 : 8;  // half of the registers
  constexpr int kPlaces = kColumns<T, Real> / kLanes<Real>;
  constexpr int kVectors = std::clamp(kSums / kShared, kPlaces, 8);
  constexpr int64_t kAtOnce = 16;  // values of few columns at a time, while they are in L1
  const int64_t stride = place_count<T, Real>(values.width);
  for (int64_t first = 0; first < values.count; first += kAtOnce) {
    const int64_t end = std::min(first + kAtOnce, values.count);
    const auto add = [&](int64_t r, auto asks) __attribute__((always_inline)) {
      add_columns_from<kShared, kVectors, asks>(0, values, first, end, ahead, weights + r * kKeys,
                                                output + r * stride);
    };
    for (int64_t r = 0; r < rows; r += kShared) {
      kOneTurn<kShared, Real> || r == 0 ? add(r, std::bool_constant<kAsks>{})
                                        : add(r, std::false_type{});
    }
  }
}
