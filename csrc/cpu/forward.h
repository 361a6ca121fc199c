// Forward pass: out = softmax(scores) V and lse, by online softmax (Dao, arXiv:2307.08691,
// algorithm 1).
//
// One work item is a block of query rows of one head; it walks over the keys 64 at a time:
//     S = K Q^T                       lanes are query rows, K is read where it lies
//     m' = max(m, max S)              rescale l and O by exp2(m - m') only where the maximum moved
//     P = exp2(S - m'),  l += sum P
//     O^T += V^T P
// Tiles outside causality and the window are never visited; those that a mask forbids whole are
// skipped. A sink starts the softmax: m = sink, l = 1. Tested against backends/reference.py in
// tests/test_contract.py.

template <typename Real>
struct ForwardWorkspace {
  Real *queries, *scores, *output, *keep, *keys, *values, *row;
  uint8_t* hidden;

  ForwardWorkspace(Arena& arena, const Problem& p) {
    const int64_t kept = p.dropout_p > 0 ? kKeys * kRows<Real> : 0;
    queries = arena.take<Real>(p.head_dim * kRows<Real>);
    scores = arena.take<Real>(kKeys * kRows<Real>);
    output = arena.take<Real>(p.value_dim * kRows<Real>);
    keep = arena.take<Real>(kept);
    keys = arena.take<Real>(kKeys * padded<Real>(p.head_dim));
    values = arena.take<Real>(kKeys * padded<Real>(p.value_dim));
    row = arena.take<Real>(padded<Real>(std::max(p.head_dim, p.value_dim)));
    hidden = arena.take<uint8_t>(kKeys * kRows<Real>);
  }
};

// The running maximum and sum of a block's rows.
template <typename Real>
struct SoftmaxState {
  alignas(kVectorBytes) Real max[kRows<Real>];
  alignas(kVectorBytes) Real sum[kRows<Real>];

  SoftmaxState(Real first_max, Real first_sum) {
    std::fill(max, max + kRows<Real>, first_max);
    std::fill(sum, sum + kRows<Real>, first_sum);
  }

  // Turns scores into weights, and rescales the output where a maximum moved.
  void update(const RowBlock& rows, int64_t keys, Real* s, Real* output, int64_t width) {
    constexpr int kW = kLanes<Real>;
    for (int64_t v = 0; v < rows.vectors; ++v) {
      Real* column = s + v * kW;
      const Vec<Real> before = load(max + v * kW);
      Vec<Real> top = before;
      for (int64_t j = 0; j < keys; ++j) top = simd_max<Real>(load(column + j * kRows<Real>), top);
      store<Real>(max + v * kW, top);
      // A row that has seen nothing yet has -inf here; exp2(-inf - 0) is the 0 that it needs.
      const Vec<Real> shift = top == -kInfinity<Real> ? Vec<Real>{} : top;
      Vec<Real> total{};
      for (int64_t j = 0; j < keys; ++j) {
        const Vec<Real> weight = exp2<Real>(load(column + j * kRows<Real>) - shift);
        store<Real>(column + j * kRows<Real>, weight);
        total += weight;
      }
      bool moved = false;
      const auto changed = before != top;
      for (int lane = 0; lane < kW; ++lane) moved |= changed[lane] != 0;
      if (!moved) {
        store<Real>(sum + v * kW, load(sum + v * kW) + total);
        continue;
      }
      const Vec<Real> scale = exp2<Real>(before - shift);
      store<Real>(sum + v * kW, load(sum + v * kW) * scale + total);
      for (int64_t d = 0; d < width; ++d) {
        Real* o = output + d * kRows<Real> + v * kW;
        store<Real>(o, load(o) * scale);
      }
    }
  }

  Real lse(int64_t i) const {
    if (std::isinf(max[i])) return max[i];
    return static_cast<Real>(kLn2) * max[i] + std::log(sum[i]);
  }
};

template <typename T, typename Real>
void forward_block(const Problem& p, const ForwardArguments& to, const RowBlock& rows,
                   const ForwardWorkspace<Real>& w) {
  const Real sink = p.sinks ? *at<const Real>(p.sinks, 0, rows.head, 0) : -kInfinity<Real>;
  SoftmaxState<Real> state(sink * static_cast<Real>(kLog2E), p.sinks ? Real(1) : Real(0));
  pack_transposed<T>(p.query, rows, p.head_dim, query_factor<Real>(p), w.queries, w.row);
  std::fill(w.output, w.output + p.value_dim * kRows<Real>, Real(0));

  const KeyRange range(p, rows);
  for (int64_t key = range.first; key < range.end; key += kKeys) {
    const int64_t keys = std::min(kKeys, range.end - key);
    const TileKind kind = classify(p, rows, key, keys);
    if (kind == TileKind::kSkip) continue;

    int64_t k_stride, v_stride;
    const Real* k = as_block<T>(at<const T>(p.key, rows.batch, rows.key_head, key), p.key.stride[2],
                                keys, p.head_dim, false, w.keys, &k_stride);
    compute_scores<Real>(p, rows, kind, key, keys, w.queries, k, k_stride, w.scores, nullptr);

    const Real* v = as_block<T>(at<const T>(p.value, rows.batch, rows.key_head, key),
                                p.value.stride[2], keys, p.value_dim, false, w.values, &v_stride);
    const bool careful = kind == TileKind::kEdge && !all_finite(v, v_stride, keys, p.value_dim);
    if (careful) record_hidden(w.scores, keys, w.hidden);

    state.update(rows, keys, w.scores, w.output, p.value_dim);
    if (p.dropout_p > 0) {
      dropout_factors(p, rows, key, keys, w.keep);
      for (int64_t i = 0; i < keys * kRows<Real>; ++i) w.scores[i] *= w.keep[i];
    }
    if (careful) {
      accumulate_visible_by_row(w.hidden, keys, rows, w.scores, v, v_stride, p.value_dim, w.output);
    } else {
      multiply<true>(p.value_dim, rows.vectors, keys, v, v_stride, w.scores, kRows<Real>, w.output,
                     kRows<Real>, true);
    }
  }

  for (int64_t i = 0; i < rows.count; ++i) {
    T* out = at<T>(to.out, rows.batch, rows.head, rows.first + i);
    const Real total = state.sum[i] == 0 ? Real(1) : state.sum[i];
    for (int64_t d = 0; d < p.value_dim; ++d)
      from_float(w.output[d * kRows<Real> + i] / total, out + d);
    *at<Real>(to.lse, rows.batch, rows.head, rows.first + i) = state.lse(i);
  }
}

template <typename T, typename Real>
void forward(const Problem& p, const ForwardArguments& to, int threads) {
  const int64_t blocks = (p.query_length + kRows<Real> - 1) / kRows<Real>;
  const int64_t heads = p.batch * p.query_heads, items = heads * blocks;
  threads = static_cast<int>(std::clamp<int64_t>(items, 1, threads));
  const PerThread<ForwardWorkspace<Real>> workspaces(threads, p);
#pragma omp parallel num_threads(threads)
  {
    const ForwardWorkspace<Real> workspace = workspaces.make(omp_get_thread_num(), p);
    // The last blocks first: under causality they are the long ones.
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t head = item % heads, block = blocks - 1 - item / heads;
      forward_block<T, Real>(
          p, to, RowBlock::make<Real>(p, head / p.query_heads, head % p.query_heads, block),
          workspace);
    }
  }
}
