// Forward pass for a few query rows a key head, as in decoding: it takes as long as keys and values
// take to come from memory or a cache, so each is read once, in order, for all the rows that share
// it (the grouped heads' too).
//
// The lanes are head dimensions here, since lanes of query rows would be empty. One work item is a
// part of the keys of one (batch, key head); the parts are merged in order (Dao et al.,
// Flash-Decoding, 2023). Dropout is left to forward.h. Tested against backends/reference.py in
// tests/test_contract.py.

constexpr int64_t kDecodeRows = 8;
constexpr int kLinesARow = 8;  // that memory delivers during a row's softmax, which reads none

// Where it is the faster one: with keys beyond the first caches, or so few rows that the blocks of
// forward.h would be mostly empty. Of the problem alone, so that whatever recomputes
// weights from LSE sums scores in the order that LSE came from.
inline bool suits_decode(const Problem& p) {
  const int64_t lanes = p.dtype == DType::kFloat64 ? kLanes<double> : kLanes<float>;
  const int64_t least_keys = 2 * p.query_length > lanes ? 512 : p.query_length > 4 ? 64 : 0;
  return p.query_heads > 0 && p.key_heads > 0 && p.dropout_p == 0 && p.key_length >= least_keys &&
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

// Rows of a tensor with as many heads and rows as the queries, times `factor`, as they are
// multiplied with keys or values; and zeros until `filled` rows.
template <typename T, typename Real>
void load_sharing_rows(const View& view, const SharingRows& rows, int64_t width, Real factor,
                       int64_t filled, Real* to) {
  constexpr int64_t kW = kLanes<Real>, kStep = kColumns<T, Real>;
  const int64_t stride = place_count<T, Real>(width);
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* from = at<const T>(view, rows.batch, rows.head(r), rows.row(r));
    for (int64_t d = 0; d < width; d += kStep) {
      Vec<Real> x[2];
      load_columns(from + d, width - d, &x[0], &x[1]);
      for (int64_t i = 0; i < kStep / kW; ++i)
        store<Real>(to + r * stride + d + i * kW, x[i] * factor);
    }
  }
  std::fill(to + rows.count * stride, to + filled * stride, Real(0));
}

// How many rows products work with that share what they load among kShared.
template <int kShared>
inline int64_t filled_rows(const SharingRows& rows) {
  return (rows.count + kShared - 1) / kShared * kShared;
}

// What a thread works with: the rows' queries, and their scores of kKeys keys.
template <typename Real>
struct DecodeWorkspace {
  Real *queries, *scores;

  DecodeWorkspace(Arena& arena, const Problem& p) {
    queries = arena.take<Real>(kDecodeRows * (p.head_dim + 2 * kLanes<Real>));
    scores = arena.take<Real>(kDecodeRows * kKeys);
  }
};

// What one part of the keys gave for such rows.
template <typename Real>
struct DecodedPart {
  Real *output, *max, *sum;

  DecodedPart(Arena& arena, const Problem& p) {
    output = arena.take<Real>(kDecodeRows * (p.value_dim + 2 * kLanes<Real>));
    max = arena.take<Real>(kDecodeRows);
    sum = arena.take<Real>(kDecodeRows);
  }
};

// output += sum over keys of weights[key] v_key, without the hidden ones, whose scores are -inf in
// `visible`: 0 * NaN is NaN.
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
// takes them to log2 units, as compute_scores does. `derivative`: the softcap's, if wanted.
template <typename Real>
Real finish_scores(const Problem& p, const SharingRows& rows, int64_t r, int64_t key, int64_t count,
                   Real* s, bool* any_hidden, Real* derivative = nullptr) {
  constexpr int64_t kW = kLanes<Real>;
  const int64_t batch = rows.batch, head = rows.head(r), row = rows.row(r);
  const int64_t diagonal = row + p.diagonal - key;  // counted from `key`
  Real factor = log2_factor<Real>(p);
  if (p.softcap != 0) {
    const Real slope = static_cast<Real>(absolute_scale(p) / p.softcap);
    const Real bound = static_cast<Real>(p.softcap * kLog2E);
    for (int64_t j = 0; j < count; j += kW) {
      const Vec<Real> t = tanh<Real>(load(s + j) * slope);
      store<Real>(s + j, t * bound);
      if (derivative) store<Real>(derivative + j, Real(1) - t * t);
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
  std::fill(s + end, s + padded<Real>(count), -kInfinity<Real>);
  *any_hidden |= p.mask || p.key_mask || first > 0 || end < count;
  return factor;
}

// Of all lanes, in every lane.
template <typename Real, typename Operation>
inline Vec<Real> across_lanes(Vec<Real> x, Operation operation) {
  constexpr int kW = kLanes<Real>;
  constexpr auto kLaneNumbers = std::make_integer_sequence<int, kW>{};
#pragma GCC unroll 4
  for (int n = 1; n < kW; n *= 2) {
    x = operation(interleave<Vec<Real>, kW, false>(x, x, kLaneNumbers),
                  interleave<Vec<Real>, kW, true>(x, x, kLaneNumbers));
  }
  return x;
}

// Scores become weights; the row's running maximum and sum move, and its output is rescaled.
template <typename Real>
void update_row(int64_t r, int64_t count, int64_t width, Real factor, Real* s,
                const DecodedPart<Real>& part) {
  constexpr int64_t kW = kLanes<Real>;
  const auto larger = [&](Vec<Real> a, Vec<Real> b) { return simd_max<Real>(a, b); };
  Vec<Real> top = broadcast(-kInfinity<Real>), total{};
  for (int64_t j = 0; j < count; j += kW) top = larger(load(s + j), top);
  const Vec<Real> before = broadcast(part.max[r]);
  const Vec<Real> after = larger(across_lanes<Real>(top, larger) * factor, before);
  const Vec<Real> shift = after == -kInfinity<Real> ? Vec<Real>{} : after;
  for (int64_t j = 0; j < count; j += kW) {
    const Vec<Real> weight = exp2<Real>(load(s + j) * factor - shift);
    store<Real>(s + j, weight);
    total += weight;
  }
  total = across_lanes<Real>(total, [&](Vec<Real> a, Vec<Real> b) { return a + b; });
  const Vec<Real> scale = exp2<Real>(before - shift);
  part.max[r] = after[0], part.sum[r] = part.sum[r] * scale[0] + total[0];
  if (scale[0] == Real(1)) return;
  for (Real* x = part.output + r * width; x < part.output + (r + 1) * width; x += kW) {
    store<Real>(x, load(x) * scale);
  }
}

// The keys that any row sees, by position.
inline KeyRange decoded_keys(const Problem& p) {
  RowBlock all{};
  all.count = p.query_length;
  return KeyRange(p, all);
}

// Whether masks hide a tile's keys from every row.
template <typename Real>
bool masks_hide(const Problem& p, const SharingRows& rows, int64_t key, int64_t keys) {
  RowBlock of_head{};
  of_head.batch = rows.batch, of_head.count = rows.rows_a_head;
  for (const View* mask : {&p.key_mask, &p.mask}) {
    if (!*mask) continue;
    const int64_t heads = mask->stride[1] == 0 ? 1 : p.query_heads / p.key_heads;
    bool hides = true;
    for (int64_t h = 0; h < heads && hides; ++h) {
      of_head.head = rows.first_head + h;
      hides = look_at_mask<Real>(*mask, of_head, key, keys) == TileKind::kSkip;
    }
    if (hides) return true;
  }
  return false;
}

// The same, or their position does.
template <typename Real>
bool tile_is_hidden(const Problem& p, const SharingRows& rows, int64_t key, int64_t keys) {
  const KeyRange seen = decoded_keys(p);
  return key + keys <= seen.first || key >= seen.end || masks_hide<Real>(p, rows, key, keys);
}

// The softmax and output of all rows of a key head over the keys of `range`; `after` is read next.
template <int kShared, typename T, typename Real>
void decode_part(const Problem& p, const SharingRows& rows, const KeyRange& range, bool first_part,
                 const T* after, const DecodeWorkspace<Real>& w, const DecodedPart<Real>& part) {
  const int64_t batch = rows.batch, key_head = rows.key_head, count = rows.count;
  const int64_t filled = filled_rows<kShared>(rows);
  const int64_t value_width = place_count<T, Real>(p.value_dim);
  load_sharing_rows<T>(p.query, rows, p.head_dim, query_factor<Real>(p), filled, w.queries);
  alignas(kVectorBytes) Real visible[kDecodeRows * kKeys];
  // As in forward_part: a hidden weight of 0 that met NaN shows in the output.
  for (bool careful : {false, true}) {
    bool any_hidden = false;
    std::fill(part.output, part.output + filled * value_width, Real(0));
    for (int64_t r = 0; r < count; ++r) {
      const bool sink = p.sinks && first_part;
      part.max[r] = sink ? *at<const Real>(p.sinks, 0, rows.head(r), 0) * static_cast<Real>(kLog2E)
                         : -kInfinity<Real>;
      part.sum[r] = sink && part.max[r] != -kInfinity<Real> ? Real(1) : Real(0);
    }
    for (int64_t key = range.first; key < range.end; key += kKeys) {
      const int64_t keys = std::min(kKeys, range.end - key);
      if (masks_hide<Real>(p, rows, key, keys)) continue;
      const T *k = at<const T>(p.key, batch, key_head, key),
              *v = at<const T>(p.value, batch, key_head, key);
      const int64_t k_stride = p.key.stride[2], v_stride = p.value.stride[2];
      dot_products<kShared>(Stream<T>{k, k_stride, keys, p.head_dim, v, v_stride}, count, w.queries,
                            w.scores);
      Real factor = 1;  // the same for every row
      for (int64_t r = 0; r < count; ++r) {
        factor = finish_scores(p, rows, r, key, keys, w.scores + r * kKeys, &any_hidden);
      }
      if (careful) std::copy(w.scores, w.scores + count * kKeys, visible);
      const T* next = key + kKeys < range.end ? k + kKeys * k_stride : after;
      const Stream<T> values{v, v_stride, keys, p.value_dim, next, k_stride};
      ReadAhead<T> ahead(values);
      for (int64_t r = 0; r < count; ++r) {
        update_row(r, keys, value_width, factor, w.scores + r * kKeys, part);
        ahead.template ask<kLinesARow>();
      }
      if (!careful) {
        add_values<kShared, true>(values, ahead, count, w.scores, part.output);
        continue;
      }
      for (int64_t r = 0; r < count; ++r) {
        add_visible_values(v, v_stride, keys, p.value_dim, visible + r * kKeys,
                           w.scores + r * kKeys, part.output + r * value_width);
      }
    }
    if (!any_hidden || all_finite<Real>(part.output, value_width, count, value_width)) return;
  }
}

// Merges the parts of one key head, in their order, and writes its rows.
template <typename T, typename Real>
void write_decoded(const Problem& p, const ForwardArguments& to, const SharingRows& rows,
                   const std::vector<DecodedPart<Real>>& parts) {
  constexpr int64_t kW = kLanes<Real>;
  const int64_t width = place_count<T, Real>(p.value_dim);
  for (int64_t r = 0; r < rows.count; ++r) {
    Real max = -kInfinity<Real>, sum = 0;
    for (const auto& part : parts) max = std::max(max, part.max[r]);
    const Real shift = max == -kInfinity<Real> ? Real(0) : max;
    Real* merged = parts[0].output + r * width;
    for (const auto& part : parts) {
      const Vec<Real> scale = exp2<Real>(broadcast(part.max[r] - shift));
      sum += part.sum[r] * scale[0];
      const Real* output = part.output + r * width;
      for (int64_t d = 0; d < width; d += kW) {
        const Vec<Real> x = load(output + d) * scale;
        store<Real>(merged + d, output == merged ? x : load(merged + d) + x);
      }
    }
    if (to.lse) {
      *at<Real>(to.lse, rows.batch, rows.head(r), rows.row(r)) =
          max == kInfinity<Real> ? max : static_cast<Real>(kLn2 * max + std::log(sum));
    }
    const Real inverse = Real(1) / (sum == 0 ? Real(1) : sum);
    T* out = at<T>(to.out, rows.batch, rows.head(r), rows.row(r));
    store_row(merged, inverse, p.value_dim, out);
  }
}

// Splits the keys of each (batch, key head) into `parts`: run(rows, part, next, workspace, result)
// does one of them, `next` being the number of the one after it among all, and write(rows, results)
// merges those of one key head.
template <typename Workspace, typename Result, typename Run, typename Write>
void decode_in_parts(const Problem& p, int64_t parts, int threads, Run run, Write write) {
  const int64_t heads = p.batch * p.key_heads, items = heads * parts;
  threads = static_cast<int>(std::clamp<int64_t>(items, 1, threads));
  const PerThread<Workspace> workspaces(threads, p);
  const PerThread<Result> results(static_cast<int>(parts > 1 ? items : threads), p);
  run_parallel(threads, [&] {
    const int thread = omp_get_thread_num();
    const Workspace w = workspaces.make(thread, p);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const SharingRows rows(p, item / parts);
      const Result result = results.make(parts > 1 ? static_cast<int>(item) : thread, p);
      run(rows, item % parts, std::min(item + 1, items - 1), w, result);
      if (parts == 1) write(rows, std::vector<Result>{result});
    }
    if (parts > 1) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; ++head) {
        std::vector<Result> own;
        for (int64_t part = 0; part < parts; ++part) {
          own.push_back(results.make(static_cast<int>(head * parts + part), p));
        }
        write(SharingRows(p, head), own);
      }
    }
  });
}

// Several parts a thread even out what the machine does to them.
inline int64_t decoded_parts(const Problem& p, int threads) {
  constexpr int kPartsPerThread = 4;
  return key_parts(p, p.batch * p.key_heads, threads == 1 ? 1 : kPartsPerThread * threads);
}

template <typename T, typename Real>
void decode(const Problem& p, const ForwardArguments& to, int threads) {
  const int64_t parts = decoded_parts(p, threads);
  const KeyRange seen = decoded_keys(p);
  decode_in_parts<DecodeWorkspace<Real>, DecodedPart<Real>>(
      p, parts, threads,
      [&](const SharingRows& rows, int64_t part, int64_t next, const auto& w, const auto& result) {
        const int64_t head = next / parts, first = seen.part(next % parts, parts).first;
        const T* after = at<const T>(p.key, head / p.key_heads, head % p.key_heads,
                                     first < p.key_length ? first : 0);
        with_shared<Real>(rows.count, [&](auto shared) {
          decode_part<shared, T>(p, rows, seen.part(part, parts), part == 0, after, w, result);
        });
      },
      [&](const SharingRows& rows, const auto& results) {
        write_decoded<T, Real>(p, to, rows, results);
      });
}
