// The attention weights themselves, from the LSE, in one pass: P = dropout(exp(S - lse)).
//
// For the mean over heads, one work item is a block of query rows of all heads: it sums the heads'
// tiles before it writes them, so (B, Hq, Lq, Lk) never exists. Else an item is a block of one
// head. Where there are fewer items than threads, an item's keys are split. Tested against
// backends/reference.py in tests/test_contract.py.

template <typename Real, typename Element>
struct WeightsWorkspace {
  Element *queries, *keys;
  Real *scores, *total, *keep, *lse;

  WeightsWorkspace(Arena& arena, const Problem& p, int64_t heads) {
    queries = arena.take<Element>(heads * p.head_dim * kRows<Real>);
    scores = arena.take<Real>(kKeys * kRows<Real>);
    total = arena.take<Real>(kKeys * kRows<Real>);
    keep = arena.take<Real>(p.dropout_p > 0 ? kKeys * kRows<Real> : 0);
    keys = arena.take<Element>(kKeys * padded<Real>(p.head_dim));
    lse = arena.take<Real>(heads * 2 * kRows<Real>);
  }
};

// LSE in log2 units, and what rounding took from a float32 one: the weights' error would be that of
// the rounding. +inf for a row that sees nothing, which makes its weights 0.
template <typename Real>
void split_lse(Real lse, Real* high, Real* rest) {
  *high = lse == -kInfinity<Real> ? kInfinity<Real> : static_cast<Real>(lse * kLog2E);
  const double low = std::fma(static_cast<double>(lse), kLog2E, -static_cast<double>(*high));
  *rest = sizeof(Real) == 4 && std::isfinite(*high) ? static_cast<Real>(low) : Real(0);
}

// Of a block, and kRows further the rests; +inf for a row that does not exist, too.
template <typename Real>
void load_lse(const View& lse, const RowBlock& rows, Real* to) {
  for (int64_t i = 0; i < kRows<Real>; ++i) {
    const Real x = i < rows.count ? *at<const Real>(lse, rows.batch, rows.head, rows.first + i)
                                  : -kInfinity<Real>;
    split_lse(x, to + i, to + kRows<Real> + i);
  }
}

// A weight, exactly 0 where hidden even if LSE is NaN.
template <typename Real>
inline Vec<Real> weight_of(Vec<Real> s, Real factor, Vec<Real> lse, Vec<Real> lse_rest) {
  const Vec<Real> x = s * factor - lse - lse_rest;
  return s == -kInfinity<Real> ? Vec<Real>{} : exp2_of_any<Real>(x);
}
// `lse` points into what load_lse made.
template <typename Real>
inline Vec<Real> weight_of(Vec<Real> s, Real factor, const Real* lse) {
  return weight_of<Real>(s, factor, load(lse), load(lse + kRows<Real>));
}

// total += the weights of one head's tile.
template <typename T, typename Real, typename Element>
void add_weights(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys,
                 const Element* queries, const Real* lse,
                 const WeightsWorkspace<Real, Element>& w) {
  const TileKind kind = classify<Real>(p, rows, key, keys);
  if (kind == TileKind::kSkip) return;
  int64_t stride;
  const Element* k = tile_as_block<T>(p.key, rows, key, keys, p.head_dim, w.keys, &stride);
  const Real factor = compute_scores(p, rows, kind, key, keys, queries, k, stride, w.scores);
  if (p.dropout_p > 0) dropout_factors(p, rows, key, keys, w.keep);
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t v = 0; v < rows.vectors; ++v) {
      const int64_t lane = v * kLanes<Real>, index = j * kRows<Real> + lane;
      Vec<Real> weight = weight_of<Real>(load(w.scores + index), factor, lse + lane);
      if (p.dropout_p > 0) weight *= load(w.keep + index);
      store<Real>(w.total + index, load(w.total + index) + weight);
    }
  }
}

// The mean of `heads` heads from `first_head` on, whose sum is total[key][row].
template <typename T, typename Real>
void write_weights(const WeightsArguments& to, const RowBlock& rows, int64_t first_head,
                   int64_t heads, int64_t key, int64_t keys, const Real* total) {
  const Real share = Real(1) / static_cast<Real>(heads);
  T* out = at<T>(to.weights, rows.batch, first_head, rows.first, key);
  for_each_row(total, keys, rows, [&](int64_t i, int64_t j, Vec<Real> x, int64_t count) {
    store_some(out + i * to.weights.stride[2] + j, x * share, count);
  });
}

template <typename T, typename Real, typename Element>
void weights_block(const Problem& p, const WeightsArguments& to, int64_t batch, int64_t first_head,
                   int64_t heads, int64_t block, const KeyRange& range,
                   const WeightsWorkspace<Real, Element>& w) {
  const int64_t packed = p.head_dim * kRows<Real>;
  RowBlock rows{};
  for (int64_t h = 0; h < heads; ++h) {
    rows = RowBlock::make<Real>(p, batch, first_head + h, block);
    pack_transposed<T>(p.query, rows, p.head_dim, query_factor<Real>(p), w.queries + h * packed);
    load_lse(to.lse, rows, w.lse + h * 2 * kRows<Real>);
  }
  for (int64_t key = range.first; key < range.end; key += kKeys) {
    const int64_t keys = range.tile(key);
    std::fill(w.total, w.total + keys * kRows<Real>, Real(0));
    for (int64_t h = 0; h < heads; ++h) {
      const RowBlock head = RowBlock::make<Real>(p, batch, first_head + h, block);
      add_weights<T>(p, head, key, keys, w.queries + h * packed, w.lse + h * 2 * kRows<Real>, w);
    }
    write_weights<T>(to, rows, first_head, heads, key, keys, w.total);
  }
}

template <typename T, typename Real, typename Element>
void weights(const Problem& p, const WeightsArguments& to, int threads) {
  const int64_t blocks = RowBlock::blocks_a_head<Real>(p);
  const int64_t heads = to.average ? p.query_heads : 1;
  const int64_t groups = p.query_heads == 0 ? 0 : p.batch * (p.query_heads / heads);
  const int64_t parts = key_parts(p, groups * blocks, threads, 1);
  const int64_t items = groups * blocks * parts;
  const KeyRange all(0, p.key_length);
  threads = static_cast<int>(std::clamp<int64_t>(items, 1, threads));
  const PerThread<WeightsWorkspace<Real, Element>> workspaces(threads, p, heads);
  run_parallel(threads, [&] {
    const TileConfiguration tiles;
    const WeightsWorkspace<Real, Element> workspace =
        workspaces.make(omp_get_thread_num(), p, heads);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t group = item / parts % groups, block = blocks - 1 - item / parts / groups;
      const int64_t per_batch = p.query_heads / heads;
      weights_block<T>(p, to, group / per_batch, group % per_batch * heads, heads, block,
                       all.part(item % parts, parts), workspace);
    }
  });
}
