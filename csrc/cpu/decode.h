// Forward pass for a few query rows a key head, as in decoding: bound by the memory that keys and
// values come from, so each is read once, in order, for all the rows that share it (the grouped
// heads' too).
//
// The lanes are head dimensions here, since lanes of query rows would be empty. One work item is a
// part of the keys of one (batch, key head); the parts are merged in order (Dao et al.,
// Flash-Decoding, 2023). Dropout is left to forward.h. Tested against backends/reference.py in
// tests/test_contract.py.

constexpr int64_t kDecodeRows = 8;
constexpr int64_t kDecodeKeys = 512;  // fewer lie in a cache anyway

// Only where LSE is not wanted: a backward pass recomputes the scores from it in forward.h's order
// of summation, and is the more exact for it.
inline bool suits_decode(const Problem& p, const ForwardArguments& to) {
  return !to.lse && p.key_heads > 0 && p.dropout_p == 0 && p.key_length >= kDecodeKeys &&
         p.query_length * (p.query_heads / p.key_heads) <= kDecodeRows;
}

// The query rows that share a key head, head by head.
struct SharingRows {
  int64_t batch, key_head, first_head, rows_a_head, count;

  SharingRows(const Problem& p, int64_t index)
      : batch(index / p.key_heads),
        key_head(index % p.key_heads),
        first_head(key_head * (p.query_heads / p.key_heads)),
        rows_a_head(p.query_length),
        count(rows_a_head * (p.query_heads / p.key_heads)) {}
  int64_t head(int64_t r) const { return first_head + r / rows_a_head; }
  int64_t row(int64_t r) const { return r % rows_a_head; }
};

// What one part of the keys gave for such rows.
template <typename Real>
struct DecodeWorkspace {
  Real *queries, *scores, *output, *max, *sum;

  DecodeWorkspace(Arena& arena, const Problem& p) {
    queries = arena.take<Real>(kDecodeRows * (p.head_dim + 2 * kLanes<Real>));
    scores = arena.take<Real>(kDecodeRows * kKeys);
    output = arena.take<Real>(kDecodeRows * (p.value_dim + 2 * kLanes<Real>));
    max = arena.take<Real>(kDecodeRows);
    sum = arena.take<Real>(kDecodeRows);
  }
};

// Rows of keys or values that are read one after the other, and what is read after them.
template <typename T>
struct Stream {
  const T* rows;
  int64_t stride, count, width;
  const T* next_rows;
  int64_t next_stride;
  int64_t bytes = width * static_cast<int64_t>(sizeof(T)), ahead = 1 + kAheadBytes / (bytes + 1);

  static constexpr int64_t kAheadBytes = 4096;

  const T* row(int64_t index) const { return rows + std::min(index, count - 1) * stride; }
  // Asks for a row some KiB ahead, sooner than the hardware's prefetchers do.
  void prefetch(int64_t index) const {
    index += ahead;
    const T* from =
        index < count ? rows + index * stride : next_rows + (index - count) * next_stride;
    for (int64_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(from) + i, 0, 0);
    }
  }
};

// Values of a row that are loaded at once: a vector of them, or two of bfloat16, first the even
// ones, then the odd ones, since a shift and a mask bring them there.
template <typename T, typename Real>
constexpr int64_t kColumns = (std::is_same_v<T, BFloat16> ? 2 : 1) * kLanes<Real>;

inline void load_columns(const float* from, int64_t count, Vec<float>* x, Vec<float>*) {
  *x = load_some<float>(from, count);
}
inline void load_columns(const Float16* from, int64_t count, Vec<float>* x, Vec<float>*) {
  *x = load_some<float>(from, count);
}
inline void load_columns(const double* from, int64_t count, Vec<double>* x, Vec<double>*) {
  *x = load_some<double>(from, count);
}
inline void load_columns(const BFloat16* from, int64_t count, Vec<float>* even, Vec<float>* odd) {
  const Words pairs = reinterpret_cast<Words>(load_pairs(from, 0, count));
  *even = reinterpret_cast<Vec<float>>(pairs << 16);
  *odd = reinterpret_cast<Vec<float>>(pairs & 0xFFFF0000u);
}

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

// Keys or values that are worked on at once, so that what they share is loaded once.
template <int kRowCount>
constexpr int kAtOnce = kRowCount <= 4 ? 4 : 2;

// Calls add(vectors, at) with kCount rows from `first` on, vector by vector in the order of
// place().
template <int kCount, typename Real, typename T, typename Add>
inline __attribute__((always_inline)) void for_each_column(const Stream<T>& stream, int64_t first,
                                                           Add add) {
  constexpr int64_t kW = kLanes<Real>, kStep = kColumns<T, Real>;
  const T* rows[kCount];
  for (int i = 0; i < kCount; ++i) {
    rows[i] = stream.row(first + i);
    stream.prefetch(first + i);
  }
  const int64_t whole = stream.width / kStep * kStep;
  Vec<Real> x[2][kCount];
  for (int64_t d = 0; d < whole; d += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) load_columns(rows[i] + d, kStep, &x[0][i], &x[1][i]);
    add(x[0], d);
    if (kStep > kW) add(x[1], d + kW);
  }
  if (whole == stream.width) return;
  for (int i = 0; i < kCount; ++i) {
    load_columns(rows[i] + whole, stream.width - whole, &x[0][i], &x[1][i]);
  }
  add(x[0], whole);
  if (kStep > kW) add(x[1], whole + kW);
}

// scores[r][key] = q_r k.
template <int kRowCount, typename T, typename Real>
void dot_products(const Stream<T>& keys, const DecodeWorkspace<Real>& w) {
  constexpr int kCount = kAtOnce<kRowCount>;
  constexpr int64_t kW = std::max<int64_t>(kLanes<Real>, kCount);
  const int64_t stride = place_count<T, Real>(keys.width);
  for (int64_t first = 0; first < keys.count; first += kW) {
    Vec<Real> sums[kRowCount][kW];
    for (int64_t j = 0; j < kW; j += kCount) {
      Vec<Real> sum[kRowCount][kCount] = {};
      for_each_column<kCount, Real>(keys, first + j, [&](const Vec<Real>* k, int64_t d) {
#pragma GCC unroll 8
        for (int r = 0; r < kRowCount; ++r) {
          const Vec<Real> query = load(w.queries + r * stride + d);
#pragma GCC unroll 4
          for (int i = 0; i < kCount; ++i) sum[r][i] += query * k[i];
        }
      });
#pragma GCC unroll 8
      for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) sums[r][j + i] = sum[r][i];
      }
    }
    for (int r = 0; r < kRowCount; ++r) {
      for (int64_t j = 0; j < kW; j += kLanes<Real>) {
        store<Real>(w.scores + r * kKeys + first + j, sums_of_lanes<Real>(sums[r] + j));
      }
    }
  }
}

// output[r] += sum over keys of scores[r][key] v_key; scores are 0 beyond the last key.
template <int kRowCount, typename T, typename Real>
void add_values(const Stream<T>& values, const DecodeWorkspace<Real>& w) {
  constexpr int kCount = kAtOnce<kRowCount>;
  const int64_t stride = place_count<T, Real>(values.width);
  for (int64_t j = 0; j < values.count; j += kCount) {
    Vec<Real> weights[kRowCount][kCount];
#pragma GCC unroll 8
    for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) weights[r][i] = broadcast(w.scores[r * kKeys + j + i]);
    }
    for_each_column<kCount, Real>(values, j, [&](const Vec<Real>* v, int64_t d) {
#pragma GCC unroll 8
      for (int r = 0; r < kRowCount; ++r) {
        Vec<Real> sum = load(w.output + r * stride + d);
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) sum += weights[r][i] * v[i];
        store<Real>(w.output + r * stride + d, sum);
      }
    });
  }
}

// The same, pair by pair without the hidden ones, whose scores are -inf in `visible`: 0 * NaN is
// NaN.
template <typename T, typename Real>
void add_visible_values(const T* values, int64_t stride, int64_t count, int64_t width,
                        const Real* visible, const Real* weights, Real* output) {
  for (int64_t j = 0; j < count; ++j) {
    if (visible[j] == -kInfinity<Real>) continue;
    for (int64_t d = 0; d < width; ++d) {
      output[place<T, Real>(d)] += weights[j] * static_cast<Real>(to_float(values[j * stride + d]));
    }
  }
}

// One row's scores, -inf where hidden; `any_hidden` tells whether any is. Returns the factor that
// takes them to log2 units, as compute_scores does.
template <typename Real>
Real finish_scores(const Problem& p, const SharingRows& rows, int64_t r, int64_t key, int64_t count,
                   Real* s, bool* any_hidden) {
  constexpr int64_t kW = kLanes<Real>;
  const int64_t batch = rows.batch, head = rows.head(r), row = rows.row(r);
  const int64_t diagonal = row + p.diagonal - key;  // counted from `key`
  Real factor = log2_factor<Real>(p);
  if (p.softcap != 0) {
    const Real slope = static_cast<Real>(absolute_scale(p) / p.softcap);
    const Real bound = static_cast<Real>(p.softcap * kLog2E);
    for (int64_t j = 0; j < count; j += kW) {
      store<Real>(s + j, tanh<Real>(load(s + j) * slope) * bound);
    }
    factor = 1;
  }
  if (p.alibi_slopes) {
    const Real slope = *at<const Real>(p.alibi_slopes, batch, head, 0) * static_cast<Real>(kLog2E);
    for (int64_t j = 0; j < count; j += kW) {
      const Vec<Real> distance = lane_index<Real>() + static_cast<Real>(j - diagonal);
      store<Real>(s + j, load(s + j) * factor - slope * simd_max<Real>(distance, -distance));
    }
    factor = 1;
  }
  for (const View* mask : {&p.mask, &p.key_mask}) {
    if (!*mask) continue;
    with_mask_type<Real>(mask->dtype, [&](auto type) {
      const auto* from = at<const decltype(type)>(*mask, batch, head, row, key);
      for (int64_t j = 0; j < count; j += kW) {
        const int64_t step = mask->stride[3];
        add_entry(factor, mask_entries<Real>(from + j * step, step, std::min(kW, count - j)),
                  s + j);
      }
    });
    factor = 1;
  }
  const int64_t first = std::clamp<int64_t>(diagonal - p.left, 0, count);
  const int64_t end = std::clamp<int64_t>(diagonal + p.right + 1, first, count);
  std::fill(s, s + first, -kInfinity<Real>);
  std::fill(s + end, s + kKeys, -kInfinity<Real>);
  *any_hidden |= p.mask || p.key_mask || first > 0 || end < count;
  return factor;
}

// Scores become weights; the row's running maximum and sum move, and its output is rescaled.
template <typename Real>
void update_row(int64_t r, int64_t count, int64_t width, Real factor,
                const DecodeWorkspace<Real>& w) {
  Real* s = w.scores + r * kKeys;
  Vec<Real> top = broadcast(-kInfinity<Real>), total{};
  for (int64_t j = 0; j < count; j += kLanes<Real>) top = simd_max<Real>(load(s + j), top);
  const Real before = w.max[r];
  Real after = before;
  for (int64_t i = 0; i < kLanes<Real>; ++i) after = std::max(after, top[i] * factor);
  const Real shift = after == -kInfinity<Real> ? Real(0) : after;
  for (int64_t j = 0; j < kKeys; j += kLanes<Real>) {
    const Vec<Real> weight = exp2<Real>(load(s + j) * factor - shift);
    store<Real>(s + j, weight);
    total += weight;
  }
  const Real scale = std::exp2(before - shift);
  Real sum = w.sum[r] * scale;
  for (int64_t i = 0; i < kLanes<Real>; ++i) sum += total[i];
  w.max[r] = after, w.sum[r] = sum;
  if (scale == Real(1)) return;
  for (int64_t i = 0; i < width; ++i) w.output[r * width + i] *= scale;
}

// The softmax and output of all rows of a key head over the keys of `range`.
template <int kRowCount, typename T, typename Real>
void decode_part(const Problem& p, const SharingRows& rows, const KeyRange& range, bool first_part,
                 const DecodeWorkspace<Real>& w) {
  const int64_t batch = rows.batch, key_head = rows.key_head, count = rows.count;
  const int64_t width = place_count<T, Real>(p.head_dim);
  const int64_t value_width = place_count<T, Real>(p.value_dim);
  std::fill(w.queries, w.queries + kDecodeRows * width, Real(0));
  for (int64_t r = 0; r < count; ++r) {
    const T* query = at<const T>(p.query, batch, rows.head(r), rows.row(r));
    for (int64_t d = 0; d < p.head_dim; ++d) {
      w.queries[r * width + place<T, Real>(d)] =
          query_factor<Real>(p) * static_cast<Real>(to_float(query[d]));
    }
  }
  alignas(kVectorBytes) Real visible[kDecodeRows * kKeys];
  // As in forward_part: a hidden weight of 0 that met NaN shows in the output.
  for (bool careful : {false, true}) {
    bool any_hidden = false;
    std::fill(w.output, w.output + kDecodeRows * value_width, Real(0));
    for (int64_t r = 0; r < kDecodeRows; ++r) {
      const bool sink = p.sinks && first_part && r < count;
      w.max[r] = sink ? *at<const Real>(p.sinks, 0, rows.head(r), 0) * static_cast<Real>(kLog2E)
                      : -kInfinity<Real>;
      w.sum[r] = sink && w.max[r] != -kInfinity<Real> ? Real(1) : Real(0);
    }
    for (int64_t key = range.first; key < range.end; key += kKeys) {
      const int64_t keys = std::min(kKeys, range.end - key);
      if (p.key_mask && p.key_mask.dtype == DType::kBool &&
          look_at_key_mask(p, batch, key, keys) == TileKind::kSkip) {
        continue;
      }
      const T *k = at<const T>(p.key, batch, key_head, key),
              *v = at<const T>(p.value, batch, key_head, key);
      const int64_t k_stride = p.key.stride[2], v_stride = p.value.stride[2];
      dot_products<kRowCount>(Stream<T>{k, k_stride, keys, p.head_dim, v, v_stride}, w);
      Real factor = 1;  // the same for every row
      for (int64_t r = 0; r < count; ++r) {
        factor = finish_scores(p, rows, r, key, keys, w.scores + r * kKeys, &any_hidden);
      }
      if (careful) std::copy(w.scores, w.scores + count * kKeys, visible);
      for (int64_t r = 0; r < count; ++r) update_row(r, keys, value_width, factor, w);
      if (!careful) {
        const T* next = key + kKeys < range.end ? k + kKeys * k_stride : k;
        add_values<kRowCount>(Stream<T>{v, v_stride, keys, p.value_dim, next, k_stride}, w);
        continue;
      }
      for (int64_t r = 0; r < count; ++r) {
        add_visible_values(v, v_stride, keys, p.value_dim, visible + r * kKeys,
                           w.scores + r * kKeys, w.output + r * value_width);
      }
    }
    if (!any_hidden || all_finite<Real>(w.output, value_width, count, value_width)) return;
  }
}

// Merges the parts of one key head, in their order, and writes its rows.
template <typename T, typename Real>
void write_decoded(const Problem& p, const ForwardArguments& to, const SharingRows& rows,
                   const DecodeWorkspace<Real>* parts, int64_t count) {
  const int64_t width = place_count<T, Real>(p.value_dim);
  for (int64_t r = 0; r < rows.count; ++r) {
    Real max = -kInfinity<Real>, sum = 0;
    for (int64_t i = 0; i < count; ++i) max = std::max(max, parts[i].max[r]);
    const Real shift = max == -kInfinity<Real> ? Real(0) : max;
    Real* merged = parts[0].output + r * width;
    for (int64_t i = 0; i < count; ++i) {
      const Real scale = std::exp2(parts[i].max[r] - shift), *output = parts[i].output + r * width;
      sum += parts[i].sum[r] * scale;
      for (int64_t d = 0; d < width; ++d) merged[d] = (i ? merged[d] : 0) + output[d] * scale;
    }
    const Real inverse = Real(1) / (sum == 0 ? Real(1) : sum);
    T* out = at<T>(to.out, rows.batch, rows.head(r), rows.row(r));
    for (int64_t d = 0; d < p.value_dim; ++d) {
      from_float(merged[place<T, Real>(d)] * inverse, out + d);
    }
  }
}

template <typename T, typename Real>
void decode(const Problem& p, const ForwardArguments& to, int threads) {
  // Four items a thread even out what the machine does to them.
  const int64_t heads = p.batch * p.key_heads;
  const int64_t parts = key_parts(p, heads, threads == 1 ? 1 : 4 * threads);
  const int64_t count = p.query_length * (p.query_heads / p.key_heads);
  const auto run = count <= 1   ? decode_part<1, T, Real>
                   : count <= 2 ? decode_part<2, T, Real>
                   : count <= 4 ? decode_part<4, T, Real>
                                : decode_part<8, T, Real>;
  RowBlock all{};
  all.count = p.query_length;
  const KeyRange range(p, all);
  threads = static_cast<int>(std::clamp<int64_t>(heads * parts, 1, threads));
  const PerThread<DecodeWorkspace<Real>> workspaces(
      static_cast<int>(parts > 1 ? heads * parts : threads), p);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < heads * parts; ++item) {
      const int64_t part = item % parts;
      const SharingRows rows(p, item / parts);
      const auto w = workspaces.make(parts > 1 ? static_cast<int>(item) : omp_get_thread_num(), p);
      run(p, rows, range.part(part, parts), part == 0, w);
      if (parts == 1) write_decoded<T>(p, to, rows, &w, 1);
    }
    if (parts > 1) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; ++head) {
        std::vector<DecodeWorkspace<Real>> own;
        for (int64_t part = 0; part < parts; ++part) {
          own.push_back(workspaces.make(static_cast<int>(head * parts + part), p));
        }
        write_decoded<T>(p, to, SharingRows(p, head), own.data(), parts);
      }
    }
  }
}
