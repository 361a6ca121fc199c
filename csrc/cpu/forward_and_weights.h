// Forward pass and attention weights in one pass over the keys, where forward.h and weights.h, one
// after the other, would multiply the scores and take their exponentials twice.
//
// One work item is a block of query rows, of all heads for the mean over heads, else of one. A
// head's weights, each tile's shifted by the maxima m that its rows had then, stay in a cache until
// the softmax is complete, with a maximum of m':
//     total += P exp2(m - m') / l
// Tested against backends/reference.py in tests/test_contract.py.

template <typename Real, typename Element>
struct ForwardAndWeightsWorkspace {
  ForwardWorkspace<Real, Element> forward;
  WeightsWorkspace<Real, Element> weights;
  Real* total;

  ForwardAndWeightsWorkspace(Arena& arena, const Problem& p, int64_t heads)
      : forward(arena, p, true), weights(arena, p, heads) {
    total = arena.take<Real>(p.key_length * kRows<Real>);
  }
};

// Whether all of a block's softmaxes are numbers, and so are the kept weights' shares of them.
template <typename Real, typename Element>
bool softmax_is_finite(const RowBlock& rows, const ForwardWorkspace<Real, Element>& w) {
  Vec<Real> sum{};
  for (int64_t lane = 0; lane < rows.vectors * kLanes<Real>; lane += kLanes<Real>) {
    const Vec<Real> max = load(w.max + lane);
    sum += (max == kInfinity<Real> ? max : load(w.sum + lane)) * Real(0);
  }
  return !any(sum != sum);
}

// total += one head's weights of keys of a tile, or total = these if it is the `first` head.
template <typename Real, typename Element>
void add_kept_tile(const RowBlock& rows, int64_t key, int64_t keys, bool first,
                   const ForwardWorkspace<Real, Element>& w, Real* total) {
  const Real* maxima = w.kept.maxima + key / kKeys * kRows<Real>;
  const Real* from = w.kept.weights + key * kRows<Real>;
  Vec<Real> share[kBlockVectors];
  for (int64_t v = 0; v < rows.vectors; ++v) {
    const int64_t lane = v * kLanes<Real>;
    const Vec<Real> sum = load(w.sum + lane);
    const RunningSoftmax<Real> softmax(load(maxima + lane), load(w.max + lane), sum);
    share[v] = softmax.scale / (sum == Real(0) ? broadcast(Real(1)) : sum);
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t v = 0; v < rows.vectors; ++v) {
      const int64_t index = j * kRows<Real> + v * kLanes<Real>;
      const Vec<Real> weight = load(from + index) * share[v];
      store<Real>(total + index, first ? weight : load(total + index) + weight);
    }
  }
}

// The same for all keys.
template <typename Real, typename Element>
void add_kept_weights(const Problem& p, const RowBlock& rows, const KeyRange& range, bool first,
                      const ForwardWorkspace<Real, Element>& w, Real* total) {
  for (int64_t key = 0; key < p.key_length; key += kKeys) {
    const int64_t keys = std::min(kKeys, p.key_length - key);
    Real* to = total + key * kRows<Real>;
    const bool seen = key >= range.first && key < range.end && w.kept.seen[key / kKeys];
    const int64_t seen_keys = seen ? std::min(keys, range.end - key) : 0;
    if (seen_keys > 0) add_kept_tile(rows, key, seen_keys, first, w, to);
    if (first) std::fill(to + seen_keys * kRows<Real>, to + keys * kRows<Real>, Real(0));
  }
}

template <typename T, typename Real, typename Element>
void forward_and_weights_block(const Problem& p, const ForwardArguments& to,
                               const WeightsArguments& weights_to, int64_t batch,
                               int64_t first_head, int64_t heads, int64_t block,
                               const typename PackedFor<T, Element>::Type& packed,
                               const ForwardAndWeightsWorkspace<Real, Element>& w) {
  bool finite = true;
  RowBlock rows = RowBlock::make<Real>(p, batch, first_head, block);
  const KeyRange range(p, rows);
  for (int64_t h = 0; h < heads; ++h) {
    rows = RowBlock::make<Real>(p, batch, first_head + h, block);
    Ahead after;
    after.add(upcoming_rows<T>(to.out, rows, p.value_dim));
    if (h + 1 < heads) {
      const RowBlock next = RowBlock::make<Real>(p, batch, first_head + h + 1, block);
      after.operand = first_keys<T>(p, next, range);
      after.add(upcoming_rows<T>(p.query, next, p.head_dim));
    }
    forward_part<T>(p, rows, range, bool(p.sinks), packed, after, w.forward);
    write_output<T>(p, to, rows, w.forward);
    finite = finite && softmax_is_finite(rows, w.forward);
    if (finite) add_kept_weights(p, rows, range, h == 0, w.forward, w.total);
  }
  // What is not a number is for the rows and keys that saw it alone to have.
  if (!finite) {
    const KeyRange all(0, p.key_length);
    return weights_block<T>(p, weights_to, batch, first_head, heads, block, all, w.weights);
  }
  write_weights<T>(weights_to, rows, first_head, heads, 0, p.key_length, w.total);
}

// Whether one pass is the faster way: where a block's weights stay in a cache (two blocks of
// all keys for each thread); where there are items for more than half of the threads,
// as two passes take half as long again but have an item for every head or part of the keys; and
// where heads that share keys don't share blocks.
template <typename Real>
bool suits_one_pass(const Problem& p, bool average, int threads) {
  constexpr int64_t kMostKeys = 8192;
  if (p.key_length > kMostKeys || p.query_heads == 0) return false;
  const int64_t blocks = RowBlock::blocks_a_head<Real>(p);
  const int64_t items = p.batch * (average ? 1 : p.query_heads) * blocks;
  return 2 * items > threads && with_shared_blocks<Real>(p, threads).query_heads == p.query_heads;
}

template <typename T, typename Real, typename Element>
void forward_and_weights(const Problem& p, const ForwardArguments& to,
                         const WeightsArguments& weights_to, int threads) {
  if (!suits_one_pass<Real>(p, weights_to.average, threads)) {
    forward<T, Real, Element>(p, to, threads);
    return weights<T, Real, Element>(p, weights_to, threads);
  }
  const int64_t blocks = RowBlock::blocks_a_head<Real>(p);
  const int64_t heads = weights_to.average ? p.query_heads : 1;
  const int64_t per_batch = p.query_heads / heads, groups = p.batch * per_batch;
  const int64_t items = groups * blocks;
  threads = static_cast<int>(std::clamp<int64_t>(items, 1, threads));
  const auto packed = pack_for_forward<T, Element>(p, blocks);
  using Workspace = ForwardAndWeightsWorkspace<Real, Element>;
  const PerThread<Workspace> workspaces(threads, p, heads);
  run_parallel(threads, [&] {
    const TileConfiguration tiles;
    const Workspace w = workspaces.make(omp_get_thread_num(), p, heads);
    packed.pack_all();
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t group = item % groups, block = blocks - 1 - item / groups;
      forward_and_weights_block<T>(p, to, weights_to, group / per_batch, group % per_batch * heads,
                                   heads, block, packed, w);
    }
  });
}
