// Forward pass for a few query rows a key head, as in decoding: bound by the memory that keys and
// values come from, so each is read once, in order, for all the rows that share it (the grouped
// heads' too).
//
// The lanes are head dimensions here, since lanes of query rows would be empty. One work item is a
// part of the keys of one (batch, key head); the parts are merged in order (Dao et al.,
// Flash-Decoding, 2023). Dropout is left to forward.h. Tested against backends/reference.py in
// tests/test_contract.py.

constexpr int64_t kDecodeRows = 8;

inline bool suits_decode(const Problem& p) {
  return p.key_heads > 0 && p.dropout_p == 0 &&
         p.query_length * (p.query_heads / p.key_heads) <= kDecodeRows;
}

// The rows of one key head: row r is query row r % query_length of the group's head r /
// query_length. What one part of the keys gave for them.
template <typename Real>
struct DecodeWorkspace {
  Real *queries, *scores, *output, *max, *sum;

  DecodeWorkspace(Arena& arena, const Problem& p) {
    queries = arena.take<Real>(kDecodeRows * padded<Real>(p.head_dim));
    scores = arena.take<Real>(kDecodeRows * kKeys);
    output = arena.take<Real>(kDecodeRows * padded<Real>(p.value_dim));
    max = arena.take<Real>(kDecodeRows);
    sum = arena.take<Real>(kDecodeRows);
  }
};

// scores[r][key] = q_r k: one vector of partial sums a key, summed by transposing a square of them.
template <int kRowCount, typename T, typename Real>
void dot_products(const T* keys, int64_t stride, int64_t count, int64_t width,
                  const DecodeWorkspace<Real>& w) {
  constexpr int64_t kW = kLanes<Real>;
  for (int64_t first = 0; first < count; first += kW) {
    Vec<Real> sums[kRowCount][kW];
    for (int64_t j = 0; j < kW; ++j) {
      const T* key = keys + std::min(first + j, count - 1) * stride;
      Vec<Real> sum[kRowCount] = {};
      for (int64_t d = 0; d < width; d += kW) {
        const Vec<Real> k = load_some<Real>(key + d, width - d);
#pragma GCC unroll 8
        for (int r = 0; r < kRowCount; ++r) {
          sum[r] += k * load(w.queries + r * padded<Real>(width) + d);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRowCount; ++r) sums[r][j] = sum[r];
    }
    for (int r = 0; r < kRowCount; ++r) {
      transpose<Real>(sums[r]);
      for (int64_t half = kW / 2; half > 0; half /= 2) {
        for (int64_t j = 0; j < half; ++j) sums[r][j] += sums[r][j + half];
      }
      store<Real>(w.scores + r * kKeys + first, sums[r][0]);
    }
  }
}

// output[r] += sum over keys of scores[r][key] v_key.
template <int kRowCount, typename T, typename Real>
void add_values(const T* values, int64_t stride, int64_t count, int64_t width,
                const DecodeWorkspace<Real>& w) {
  constexpr int64_t kAtOnce = 4;
  for (int64_t j = 0; j < count; j += kAtOnce) {  // the last ones' weights are 0
    const T* rows[kAtOnce];
    for (int64_t i = 0; i < kAtOnce; ++i) rows[i] = values + std::min(j + i, count - 1) * stride;
    for (int64_t d = 0; d < width; d += kLanes<Real>) {
      Vec<Real> v[kAtOnce];
      for (int64_t i = 0; i < kAtOnce; ++i) v[i] = load_some<Real>(rows[i] + d, width - d);
#pragma GCC unroll 8
      for (int r = 0; r < kRowCount; ++r) {
        Real* output = w.output + r * padded<Real>(width) + d;
        Vec<Real> sum = load(output);
        for (int64_t i = 0; i < kAtOnce; ++i) sum += w.scores[r * kKeys + j + i] * v[i];
        store<Real>(output, sum);
      }
    }
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
      output[d] += weights[j] * static_cast<Real>(to_float(values[j * stride + d]));
    }
  }
}

// One row's scores in log2 units, -inf where hidden. Returns whether any is.
template <typename Real>
bool finish_scores(const Problem& p, int64_t batch, int64_t head, int64_t row, int64_t key,
                   int64_t count, Real* s) {
  constexpr int64_t kW = kLanes<Real>;
  const double scale = p.softcap != 0 ? p.scale / p.softcap : p.scale * kLog2E;
  const Real factor = static_cast<Real>(scale), hidden = -kInfinity<Real>;
  const Real bound = static_cast<Real>(p.softcap * kLog2E);
  const Real slope = p.alibi_slopes ? *at<const Real>(p.alibi_slopes, batch, head, 0) : Real(0);
  const int64_t diagonal = row + p.diagonal - key;  // counted from `key`
  for (int64_t j = 0; j < count; j += kW) {
    Vec<Real> x = load(s + j) * factor;
    if (p.softcap != 0) x = tanh<Real>(x) * bound;
    if (p.alibi_slopes) {
      const Vec<Real> distance = lane_index<Real>() + static_cast<Real>(j - diagonal);
      x -= slope * static_cast<Real>(kLog2E) * simd_max<Real>(distance, -distance);
    }
    store<Real>(s + j, x);
  }
  for (const View* mask : {&p.mask, &p.key_mask}) {
    if (!*mask) continue;
    with_mask_type<Real>(mask->dtype, [&](auto type) {
      const auto* from = at<const decltype(type)>(*mask, batch, head, row, key);
      for (int64_t j = 0; j < count; j += kW) {
        const int64_t step = mask->stride[3];
        add_entry(Real(1), mask_entries<Real>(from + j * step, step, std::min(kW, count - j)),
                  s + j);
      }
    });
  }
  const int64_t first = std::clamp<int64_t>(diagonal - p.left, 0, count);
  const int64_t end = std::clamp<int64_t>(diagonal + p.right + 1, first, count);
  std::fill(s, s + first, hidden);
  std::fill(s + end, s + kKeys, hidden);
  return p.mask || p.key_mask || first > 0 || end < count;
}

// Scores become weights; the row's running maximum and sum move, and its output is rescaled.
template <typename Real>
void update_row(const Problem& p, int64_t r, int64_t count, const DecodeWorkspace<Real>& w) {
  Real* s = w.scores + r * kKeys;
  Vec<Real> top = broadcast(-kInfinity<Real>), total{};
  for (int64_t j = 0; j < count; j += kLanes<Real>) top = simd_max<Real>(load(s + j), top);
  const Real before = w.max[r];
  Real after = before;
  for (int64_t i = 0; i < kLanes<Real>; ++i) after = top[i] > after ? top[i] : after;
  const Real shift = after == -kInfinity<Real> ? Real(0) : after;
  for (int64_t j = 0; j < kKeys; j += kLanes<Real>) {
    const Vec<Real> weight = exp2<Real>(load(s + j) - shift);
    store<Real>(s + j, weight);
    total += weight;
  }
  const Real scale = std::exp2(before - shift);
  Real sum = w.sum[r] * scale;
  for (int64_t i = 0; i < kLanes<Real>; ++i) sum += total[i];
  w.max[r] = after, w.sum[r] = sum;
  if (scale == Real(1)) return;
  Real* output = w.output + r * padded<Real>(p.value_dim);
  for (int64_t d = 0; d < padded<Real>(p.value_dim); ++d) output[d] *= scale;
}

// The softmax and output of all rows of a key head over the keys of `range`.
template <int kRowCount, typename T, typename Real>
void decode_part(const Problem& p, int64_t batch, int64_t key_head, const KeyRange& range,
                 bool first_part, const DecodeWorkspace<Real>& w) {
  const int64_t group = p.query_heads / p.key_heads, count = group * p.query_length;
  const int64_t width = padded<Real>(p.head_dim), value_width = padded<Real>(p.value_dim);
  std::fill(w.queries, w.queries + kDecodeRows * width, Real(0));
  for (int64_t r = 0; r < count; ++r) {
    const T* query = at<const T>(p.query, batch, key_head * group + r / p.query_length,
                                 r % p.query_length);
    for (int64_t d = 0; d < p.head_dim; ++d) {
      w.queries[r * width + d] = static_cast<Real>(to_float(query[d]));
    }
  }
  alignas(kVectorBytes) Real visible[kDecodeRows * kKeys];
  // As in forward_part: a hidden weight of 0 that met NaN shows in the output.
  for (bool careful : {false, true}) {
    bool any_hidden = false;
    std::fill(w.output, w.output + kDecodeRows * value_width, Real(0));
    for (int64_t r = 0; r < kDecodeRows; ++r) {
      const bool sink = p.sinks && first_part && r < count;
      const int64_t head = key_head * group + r / p.query_length;
      w.max[r] = sink ? *at<const Real>(p.sinks, 0, head, 0) * static_cast<Real>(kLog2E)
                      : -kInfinity<Real>;
      w.sum[r] = sink && w.max[r] != -kInfinity<Real> ? Real(1) : Real(0);
    }
    for (int64_t key = range.first; key < range.end; key += kKeys) {
      const int64_t keys = std::min(kKeys, range.end - key);
      if (p.key_mask && p.key_mask.dtype == DType::kBool &&
          look_at_key_mask(p, batch, key, keys) == TileKind::kSkip) {
        continue;
      }
      const T* k = at<const T>(p.key, batch, key_head, key);
      dot_products<kRowCount>(k, p.key.stride[2], keys, p.head_dim, w);
      for (int64_t r = 0; r < count; ++r) {
        any_hidden |= finish_scores(p, batch, key_head * group + r / p.query_length,
                                    r % p.query_length, key, keys, w.scores + r * kKeys);
      }
      if (careful) std::copy(w.scores, w.scores + count * kKeys, visible);
      for (int64_t r = 0; r < count; ++r) update_row(p, r, keys, w);
      const T* v = at<const T>(p.value, batch, key_head, key);
      if (!careful) {
        add_values<kRowCount>(v, p.value.stride[2], keys, p.value_dim, w);
        continue;
      }
      for (int64_t r = 0; r < count; ++r) {
        add_visible_values(v, p.value.stride[2], keys, p.value_dim, visible + r * kKeys,
                           w.scores + r * kKeys, w.output + r * value_width);
      }
    }
    if (!any_hidden || all_finite<Real>(w.output, value_width, count, value_width)) return;
  }
}

// Merges the parts of one key head, in their order, and writes its rows.
template <typename T, typename Real>
void write_decoded(const Problem& p, const ForwardArguments& to, int64_t batch, int64_t key_head,
                   const DecodeWorkspace<Real>* parts, int64_t count) {
  const int64_t group = p.query_heads / p.key_heads, width = padded<Real>(p.value_dim);
  for (int64_t r = 0; r < group * p.query_length; ++r) {
    const int64_t head = key_head * group + r / p.query_length, row = r % p.query_length;
    Real max = -kInfinity<Real>, sum = 0;
    for (int64_t i = 0; i < count; ++i) max = std::max(max, parts[i].max[r]);
    const Real shift = max == -kInfinity<Real> ? Real(0) : max;
    for (int64_t i = 0; i < count; ++i) sum += parts[i].sum[r] * std::exp2(parts[i].max[r] - shift);
    const Real inverse = Real(1) / (sum == 0 ? Real(1) : sum);
    T* out = at<T>(to.out, batch, head, row);
    for (int64_t d = 0; d < p.value_dim; d += kLanes<Real>) {
      Vec<Real> x{};
      for (int64_t i = 0; i < count; ++i) {
        x += load(parts[i].output + r * width + d) * std::exp2(parts[i].max[r] - shift);
      }
      store_some<Real>(out + d, x * inverse, p.value_dim - d);
    }
    *at<Real>(to.lse, batch, head, row) =
        std::isinf(max) ? max : static_cast<Real>(kLn2) * max + std::log(sum);
  }
}

template <typename T, typename Real>
void decode(const Problem& p, const ForwardArguments& to, int threads) {
  // Four items a thread even out what the machine does to them; a part has at least 4 tiles.
  const int64_t heads = p.batch * p.key_heads, wanted = 4 * threads;
  const int64_t most = std::max<int64_t>(1, p.key_length / (4 * kKeys));
  const int64_t parts =
      threads == 1 || heads >= wanted ? 1 : std::min(most, (wanted + heads - 1) / heads);
  const int64_t rows = p.query_length * (p.query_heads / p.key_heads);
  const auto run = rows <= 1   ? decode_part<1, T, Real>
                   : rows <= 2 ? decode_part<2, T, Real>
                   : rows <= 4 ? decode_part<4, T, Real>
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
      const int64_t head = item / parts, part = item % parts;
      const int64_t batch = head / p.key_heads, key_head = head % p.key_heads;
      const auto w = workspaces.make(parts > 1 ? static_cast<int>(item) : omp_get_thread_num(), p);
      run(p, batch, key_head, range.part(part, parts), part == 0, w);
      if (parts == 1) write_decoded<T>(p, to, batch, key_head, &w, 1);
    }
    if (parts > 1) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; ++head) {
        std::vector<DecodeWorkspace<Real>> own;
        for (int64_t part = 0; part < parts; ++part) {
          own.push_back(workspaces.make(static_cast<int>(head * parts + part), p));
        }
        write_decoded<T>(p, to, head / p.key_heads, head % p.key_heads, own.data(), parts);
      }
    }
  }
}
