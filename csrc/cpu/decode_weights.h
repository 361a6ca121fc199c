// The weights of the few query rows a key head of decode.h, from their LSE: P = exp(S - lse).
//
// One work item is a part of the keys of one (batch, key head), or for the mean over heads of a
// batch: it sums the heads' weights of a tile before it writes them. Tested against
// backends/reference.py in tests/test_contract.py.

template <typename Real>
struct DecodedWeightsWorkspace {
  Real *queries, *scores, *total, *lse, *lse_rest;

  DecodedWeightsWorkspace(Arena& arena, const Problem& p, int64_t key_heads) {
    queries = arena.take<Real>(key_heads * kDecodeRows * (p.head_dim + 2 * kLanes<Real>));
    scores = arena.take<Real>(kDecodeRows * kKeys);
    total = arena.take<Real>(kDecodeRows * kKeys);
    lse = arena.take<Real>(key_heads * kDecodeRows);
    lse_rest = arena.take<Real>(key_heads * kDecodeRows);
  }
};

// The weights of `key_heads` neighbouring key heads: their mean, or those of the only one's rows.
template <int kShared, typename T, typename Real>
void decode_weights_part(const Problem& p, const WeightsArguments& to, int64_t first_pair,
                         int64_t key_heads, const KeyRange& range,
                         const DecodedWeightsWorkspace<Real>& w) {
  constexpr int64_t kW = kLanes<Real>;
  const int64_t stride = kDecodeRows * place_count<T, Real>(p.head_dim);
  for (int64_t h = 0; h < key_heads; ++h) {
    const SharingRows rows(p, first_pair + h);
    load_sharing_rows<T>(p.query, rows, p.head_dim, query_factor<Real>(p),
                         filled_rows<kShared>(rows), w.queries + h * stride);
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t index = h * kDecodeRows + r;
      split_lse(*at<const Real>(to.lse, rows.batch, rows.head(r), rows.row(r)), w.lse + index,
                w.lse_rest + index);
    }
  }
  const Real share = to.average ? Real(1) / static_cast<Real>(p.query_heads) : Real(1);
  for (int64_t key = range.first; key < range.end; key += kKeys) {
    const int64_t keys = range.tile(key);
    std::fill(w.total, w.total + kDecodeRows * kKeys, Real(0));
    for (int64_t h = 0; h < key_heads; ++h) {
      const SharingRows rows(p, first_pair + h);
      if (tile_is_hidden<Real>(p, rows, key, keys)) continue;
      const T* k = at<const T>(p.key, rows.batch, rows.key_head, key);
      const int64_t k_stride = p.key.stride[2];
      dot_products<kShared>(Stream<T>{k, k_stride, keys, p.head_dim, k, k_stride}, rows.count,
                            w.queries + h * stride, w.scores);
      for (int64_t r = 0; r < rows.count; ++r) {
        Real *s = w.scores + r * kKeys, *total = w.total + (to.average ? rows.row(r) : r) * kKeys;
        const int64_t index = h * kDecodeRows + r;
        bool any_hidden = false;
        const Real factor = finish_scores(p, rows, r, key, keys, s, &any_hidden);
        for (int64_t j = 0; j < keys; j += kW) {
          const Vec<Real> weight = weight_of<Real>(load(s + j), factor, broadcast(w.lse[index]),
                                                   broadcast(w.lse_rest[index]));
          store<Real>(total + j, load(total + j) + weight);
        }
      }
    }
    const SharingRows rows(p, first_pair);
    for (int64_t r = 0; r < (to.average ? p.query_length : rows.count); ++r) {
      T* out = at<T>(to.weights, rows.batch, to.average ? 0 : rows.head(r), rows.row(r), key);
      for (int64_t j = 0; j < keys; j += kW) {
        store_some(out + j, load(w.total + r * kKeys + j) * share, keys - j);
      }
    }
  }
}

template <typename T, typename Real>
void decode_weights(const Problem& p, const WeightsArguments& to, int threads) {
  const int64_t key_heads = to.average ? p.key_heads : 1;
  const int64_t groups = p.batch * p.key_heads / key_heads;
  const int64_t parts = key_parts(p, groups, threads), items = groups * parts;
  const KeyRange all(0, p.key_length);
  threads = static_cast<int>(std::clamp<int64_t>(items, 1, threads));
  const PerThread<DecodedWeightsWorkspace<Real>> workspaces(threads, p, key_heads);
  run_parallel(threads, [&] {
    const auto w = workspaces.make(omp_get_thread_num(), p, key_heads);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t pair = item / parts * key_heads;
      with_shared<Real>(SharingRows(p, pair).count, [&](auto shared) {
        decode_weights_part<shared, T>(p, to, pair, key_heads, all.part(item % parts, parts), w);
      });
    }
  });
}
