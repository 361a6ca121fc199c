// Forward pass: out = softmax(scores) V and lse, by online softmax (Dao, arXiv:2307.08691,
// algorithm 1).
//
// One work item is a block of query rows, of one head or of several that have few rows each and
// share a key head; it walks over the keys kKeys at a time:
//     S = K Q^T                       lanes are query rows, K is read where it lies
//     m' = max(m, max S)
//     P = exp2(S - m'),  l = l exp2(m - m') + sum P
//     O^T = O^T exp2(m - m') + V^T P  rescaled as it is accumulated
// AMX's products can't rescale on their way, and what vectors have just written makes them wait: m
// stays as it is there until a score is kMaximumsLag above it (in units of log2: a weight of 256),
// which few tiles after the first one have.
// Tiles outside causality and the window are never visited; those that a mask forbids whole are
// skipped. A sink starts the softmax: m = sink, l = 1. Where there are fewer items than threads, an
// item's keys are split and the parts merged (Dao et al., Flash-Decoding, 2023). With bfloat16
// products P is rounded to bfloat16, l sums what it was before; V^T is packed once for all blocks,
// and of numbers in planes K too. Tested against backends/reference.py in tests/test_contract.py.

// The weights of all of a block's tiles, for forward_and_weights.h: of each key of those that were
// `seen`, shifted by what their rows' maxima were then.
template <typename Real>
struct KeptWeights {
  Real *weights = nullptr, *maxima = nullptr;
  bool* seen = nullptr;

  KeptWeights() = default;
  KeptWeights(Arena& arena, const Problem& p) {
    const int64_t tiles = (p.key_length + kKeys - 1) / kKeys;
    weights = arena.take<Real>(tiles * kKeys * kRows<Real>);
    maxima = arena.take<Real>(tiles * kRows<Real>);
    seen = arena.take<bool>(tiles);
  }
};

template <typename Real, typename Element>
struct ForwardWorkspace {
  Element *queries, *keys, *values, *weights;
  Real *scores, *output, *keep, *max, *sum, *scale, *top;
  uint8_t* hidden;
  KeptWeights<Real> kept;
  Real* maxima = nullptr;  // of the tile, if weights are kept

  ForwardWorkspace(Arena& arena, const Problem& p, bool keep_weights = false) {
    const int64_t tile = kKeys * kRows<Real>;
    if (keep_weights) kept = KeptWeights<Real>(arena, p);
    scores = keep_weights ? kept.weights : arena.take<Real>(tile);
    if constexpr (kInPlanes<Element>) {
      queries = arena.take<Element>(2 * padded<Real>(score_depth<Element>(p)) * kRows<Real>);
      keys = values = nullptr;
      weights = arena.take<Element>(2 * kWeightsPlane<Real>);
      output = arena.take<Real>(padded<Real>(p.value_dim) * kRows<Real>);
    } else {
      queries = arena.take<Element>(p.head_dim * kRows<Real>);
      keys = arena.take<Element>(kKeys * padded<Real>(p.head_dim));
      values = arena.take<Element>(kKeys * padded<Real>(p.value_dim));
      weights = reinterpret_cast<Element*>(scores);
      if (keep_weights && kDepth<Element> > 1) weights = arena.take<Element>(tile);
      output = arena.take<Real>(p.value_dim * kRows<Real>);
    }
    keep = arena.take<Real>(p.dropout_p > 0 ? tile : 0);
    max = arena.take<Real>(kRows<Real>);
    sum = arena.take<Real>(kRows<Real>);
    scale = arena.take<Real>(kRows<Real>);
    top = arena.take<Real>(kRows<Real>);
    hidden = arena.take<uint8_t>(tile);
  }

  // Before the tile that begins at `key`.
  void go_to(int64_t key, TileKind kind) {
    if (!kept.weights) return;
    const int64_t tile = key / kKeys;
    kept.seen[tile] = kind != TileKind::kSkip;
    maxima = kept.maxima + tile * kRows<Real>;
    scores = kept.weights + key * kRows<Real>;
    if (kDepth<Element> == 1) weights = reinterpret_cast<Element*>(scores);
  }
};

// The softmax of one vector of rows: where its scores are shifted to, what its output so far is to
// be multiplied with, and its sum.
template <typename Real>
struct RunningSoftmax {
  Vec<Real> shift, scale, total;

  RunningSoftmax() = default;
  // Moves from the maximum `before` to the one `after`.
  RunningSoftmax(Vec<Real> before, Vec<Real> after, Vec<Real> sum) {
    // A row that has seen nothing yet has -inf here; exp2(-inf - 0) is the 0 that it needs.
    shift = after == -kInfinity<Real> ? Vec<Real>{} : after;
    scale = exp2<Real>(before - shift);
    total = sum * scale;
  }
};

// `keys` scores of a vector of rows become weights, times `keep` if kKeep; all of them are at the
// vector's first key. The sum of the weights is added to `total`. If kInPlace, weights that are
// packed elsewhere take the scores' place, too.
template <bool kKeep, bool kInPlace, typename Real, typename Element>
inline __attribute__((always_inline)) void scores_to_weights(int64_t keys, Real factor,
                                                             Vec<Real> shift, Real* s,
                                                             const Real* keep, Element* weights,
                                                             Vec<Real>& total) {
  constexpr int64_t kStride = kRows<Real>;
  Vec<Real> sum = total;  // in a register, whatever `total` is
  const auto weight_of_key = [&](int64_t key) {
    const Vec<Real> x = load(s + key * kStride) * factor - shift;
    Vec<Real> weight = exp2_for<Element>(x);
    sum += weight;
    if (kKeep) weight *= load(keep + key * kStride);
    if (kInPlace && kDepth<Element> > 1) store<Real>(s + key * kStride, weight);
    return weight;
  };
  if constexpr (kDepth<Element> == 1) {
    for (int64_t j = 0; j < keys; ++j) store<Real>(weights + j * kStride, weight_of_key(j));
  } else if constexpr (kInPlanes<Element>) {
    for (int64_t j = 0; j < keys; j += 2) {
      const Vec<Real> low = weight_of_key(j);
      store_planes(weights + j / 2 * kStride, kWeightsPlane<Real>, low, weight_of_key(j + 1));
    }
  } else {
    for (int64_t j = 0; j < keys; j += 2) {
      const Vec<Real> low = weight_of_key(j);
      store_packed(weights + j * kStride, pairs_of_weights(low, weight_of_key(j + 1)));
    }
  }
  total = sum;
}

// Turns scores into weights, times w.keep if kKeep; moves the running maximum and sum, and leaves
// in w.scale what the output so far is to be multiplied with.
template <bool kKeep, bool kInPlace, typename Real, typename Element>
void update_softmax(const ForwardWorkspace<Real, Element>& w, const RowBlock& rows, int64_t keys,
                    Real factor) {
  for (int64_t lane = 0; lane < rows.vectors * kLanes<Real>; lane += kLanes<Real>) {
    const Vec<Real> before = load(w.max + lane);
    const Vec<Real> top = load(w.top + lane) * factor;
    const Vec<Real> after = top > before + Real(kMaximumsLag) ? top : before;
    RunningSoftmax<Real> softmax(before, after, load(w.sum + lane));
    scores_to_weights<kKeep, kInPlace>(keys, factor, softmax.shift, w.scores + lane, w.keep + lane,
                                       w.weights + lane, softmax.total);
    store<Real>(w.max + lane, after);
    store<Real>(w.sum + lane, softmax.total);
    store<Real>(w.scale + lane, softmax.scale);
    if (kInPlace) store<Real>(w.maxima + lane, after);
  }
}

// One tile's V^T P, without products of weights that are 0 because the pair is hidden: 0 * NaN is
// NaN.
template <typename T, typename Real, typename Element>
void accumulate_carefully(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys,
                          const ForwardWorkspace<Real, Element>& w) {
  for (int64_t j = 0; j < keys; ++j) {
    const T* value = at<const T>(p.value, rows.batch, rows.key_head, key + j);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t index = j * kRows<Real> + i;
      if (w.hidden[index]) continue;
      Real weight;
      if constexpr (kDepth<Element> == 1) {
        weight = w.weights[index];
      } else {
        const uint32_t pair = w.weights[j / 2 * 2 * kRows<Real> + i].bits;
        weight = to_float(BFloat16{static_cast<uint16_t>(j % 2 ? pair >> 16 : pair)});
      }
      for (int64_t d = 0; d < p.value_dim; ++d) {
        w.output[d * kRows<Real> + i] += static_cast<Real>(to_float(value[d])) * weight;
      }
    }
  }
}

// Whether keys and values, each of which a block reads once, would drive out of the first cache
// what it comes back to in every tile: queries, scores and output.
inline bool keys_pass(const Problem& p) { return p.head_dim + p.value_dim > 128; }

// One tile: scores, softmax, product with the values. There is no output yet if it is the `first`
// one, and without care none is read.
template <typename T, typename Real, typename Element>
void forward_tile(const Problem& p, const RowBlock& rows, TileKind kind, int64_t key, int64_t keys,
                  bool first, bool careful, const typename PackedFor<T, Element>::Type& packed,
                  Ahead& ahead, const ForwardWorkspace<Real, Element>& w) {
  int64_t stride;
  Real factor;
  if constexpr (kInPlanes<Element>) {
    factor = scores_of_planes(p, rows, kind, key, keys, packed, w);
  } else {
    const Element* k = tile_as_block<T>(p.key, rows, key, keys, p.head_dim, w.keys, &stride);
    factor =
        compute_scores(p, rows, kind, key, keys, w.queries, k, stride, w.scores,
                       Ahead(packed.upcoming(rows, key, keys).in_haste(packed.read_once()), &ahead),
                       w.top, static_cast<Real*>(nullptr), keys_pass(p));
  }
  if (careful) record_hidden(w.scores, keys, w.hidden);
  const int64_t whole = whole_keys(keys);
  const bool dropout = p.dropout_p > 0;
  if (dropout) dropout_factors(p, rows, key, keys, w.keep);
  if (w.maxima) {
    constexpr bool kInPlace = !kInPlanes<Element>;  // of planes none are kept
    dropout ? update_softmax<true, kInPlace>(w, rows, whole, factor)
            : update_softmax<false, kInPlace>(w, rows, whole, factor);
  } else {
    dropout ? update_softmax<true, false>(w, rows, whole, factor)
            : update_softmax<false, false>(w, rows, whole, factor);
  }

  const Into<Real> output{w.output, kRows<Real>, false,       first && !careful ? nullptr : w.scale,
                          nullptr,  &ahead,      keys_pass(p)};
  if constexpr (kInPlanes<Element>) {
    add_output_of_planes(p, rows, key, whole, packed, w, output);
  } else if (careful) {
    constexpr bool kInPlace = kDepth<Element> == 1;
    // A product over nothing, which rescales the output.
    multiply<kInPlace>(p.value_dim, rows.vectors, 0, w.weights, 0, w.weights, 0, output);
    accumulate_carefully<T>(p, rows, key, keys, w);
  } else if constexpr (kDepth<Element> == 1) {
    const Element* v = tile_as_block<T>(p.value, rows, key, keys, p.value_dim, w.values, &stride);
    multiply<true>(p.value_dim, rows.vectors, keys, v, stride, w.weights, kRows<Real>, output);
  } else {
    const Element* v = packed.tile(rows, key, keys, w.values);
    multiply<false>(p.value_dim, rows.vectors, whole / 2, v, kKeys / 2, w.weights, 2 * kRows<Real>,
                    output);
  }
}

template <typename Real, typename Element>
void clear_output(const Problem& p, const ForwardWorkspace<Real, Element>& w) {
  std::fill(w.output, w.output + p.value_dim * kRows<Real>, Real(0));
}

// All tiles of a range, one after another; `careful` as in forward_tile, `after`: what is read or
// written after them. Returns whether any of them has hidden pairs.
template <typename T, typename Real, typename Element>
bool tile_by_tile(const Problem& p, const RowBlock& rows, const KeyRange& range, bool careful,
                  const typename PackedFor<T, Element>::Type& packed, const Ahead& after,
                  ForwardWorkspace<Real, Element> w) {
  AheadOfTiles<T> ahead(p, rows, range, after);
  bool any_edge = false, first = true;
  if (careful) clear_output(p, w);
  for (int64_t key = range.first; key < range.end; key += kKeys) {
    const int64_t keys = range.tile(key);
    const TileKind kind = classify<Real>(p, rows, key, keys);
    w.go_to(key, kind);
    if (kind == TileKind::kSkip) continue;
    any_edge |= kind == TileKind::kEdge;
    forward_tile<T>(p, rows, kind, key, keys, first, careful, packed, ahead.at(key), w);
    first = false;
  }
  ahead.ask_rest();
  if (first) clear_output(p, w);
  return any_edge;
}

// The part of a block's softmax and output that comes from keys [range.first, range.end).
template <typename T, typename Real, typename Element>
void forward_part(const Problem& p, const RowBlock& rows, const KeyRange& range, bool with_sinks,
                  const typename PackedFor<T, Element>::Type& packed, const Ahead& after,
                  const ForwardWorkspace<Real, Element>& w) {
  if constexpr (kInPlanes<Element>) {
    pack_query_planes(p, rows, w.queries);
  } else {
    pack_transposed<T>(p.query, rows, p.head_dim, query_factor<Real>(p), w.queries);
  }
  // Hidden pairs have a weight of 0. Should that have met a value that is not finite, the output
  // says so, and the block is done again with care.
  for (bool careful : {false, true}) {
    std::fill(w.max, w.max + kRows<Real>, -kInfinity<Real>);
    std::fill(w.sum, w.sum + kRows<Real>, Real(0));
    for (int64_t i = 0; with_sinks && i < rows.count; ++i) {
      w.max[i] = *at<const Real>(p.sinks, 0, rows.head_of(i), 0) * static_cast<Real>(kLog2E);
      w.sum[i] = w.max[i] == -kInfinity<Real> ? Real(0) : Real(1);
    }
    const bool any_edge = tile_by_tile<T>(p, rows, range, careful, packed, after, w);
    if (kInPlanes<Element>) return;  // of finite numbers alone
    if (!any_edge || all_finite<Real>(w.output, kRows<Real>, p.value_dim, rows.count)) return;
  }
}

template <typename T, typename Real, typename Element>
void write_output(const Problem& p, const ForwardArguments& to, const RowBlock& rows,
                  const ForwardWorkspace<Real, Element>& w) {
  alignas(kVectorBytes) Real inverse[kRows<Real>];
  T* out[kRows<Real>];
  for (int64_t lane = 0; lane < rows.vectors * kLanes<Real>; lane += kLanes<Real>) {
    const Vec<Real> sum = load(w.sum + lane);
    store<Real>(inverse + lane, Real(1) / (sum == Real(0) ? broadcast(Real(1)) : sum));
  }
  for (int64_t i = 0; i < rows.count; ++i) out[i] = row_at<T>(to.out, rows, i);
  for (int64_t i = 0; to.lse && i < rows.count; ++i) {
    const Real max = w.max[i];
    *row_at<Real>(to.lse, rows, i) =
        max == kInfinity<Real> ? max : static_cast<Real>(kLn2 * max + std::log(w.sum[i]));
  }
  for_each_row(w.output, p.value_dim, rows, [&](int64_t i, int64_t d, Vec<Real> x, int64_t count) {
    store_some(out[i] + d, x * inverse[i], count);
  });
}

// Adds another part's softmax and output to w's.
template <typename Real, typename Element>
void merge_parts(const Problem& p, const RowBlock& rows, const ForwardWorkspace<Real, Element>& w,
                 const ForwardWorkspace<Real, Element>& other) {
  for (int64_t lane = 0; lane < rows.vectors * kLanes<Real>; lane += kLanes<Real>) {
    const Vec<Real> a = load(w.max + lane), b = load(other.max + lane);
    const Vec<Real> top = simd_max<Real>(a, b);
    const Vec<Real> shift = top == -kInfinity<Real> ? Vec<Real>{} : top;
    const Vec<Real> scale_a = exp2<Real>(a - shift), scale_b = exp2<Real>(b - shift);
    store<Real>(w.max + lane, top);
    store<Real>(w.sum + lane, load(w.sum + lane) * scale_a + load(other.sum + lane) * scale_b);
    for (int64_t i = lane; i < p.value_dim * kRows<Real> + lane; i += kRows<Real>) {
      store<Real>(w.output + i, load(w.output + i) * scale_a + load(other.output + i) * scale_b);
    }
  }
}

// How many parts the keys of an item are split into, so that there are `wanted` of them; a part has
// at least so many tiles.
inline int64_t key_parts(const Problem& p, int64_t items, int64_t wanted, int64_t least_tiles = 4) {
  if (items == 0 || items >= wanted) return 1;
  const int64_t most = std::max<int64_t>(1, p.key_length / (least_tiles * kKeys));
  return std::min(most, (wanted + items - 1) / items);
}

inline int64_t bytes_of(DType dtype) {
  constexpr int64_t kBytes[] = {4, 2, 2, 8, 1};  // in the order of DType
  return kBytes[static_cast<int>(dtype)];
}

// How many heads take turns block by block, so that their part of a mask that they share comes from
// memory once for all of them.
inline int64_t heads_in_turns(const Problem& p) {
  constexpr int64_t kHeads = 4, kCachedBytes = int64_t{8} << 20;
  if (!p.mask || p.mask.stride[1] != 0 || p.mask.stride[3] == 0) return 1;
  if (p.query_heads % kHeads != 0) return 1;
  const int64_t rows = p.mask.stride[2] == 0 ? 1 : p.query_length;
  const int64_t bytes = rows * p.key_length * bytes_of(p.mask.dtype);
  return bytes > kCachedBytes ? kHeads : 1;
}

// The problem whose heads are the key heads, the query heads of each taking turns in its blocks, so
// that they fill vectors and read keys and values once. The problem as it is where that saves no
// vectors or leaves threads idle, and with dropout or ALiBi, which know one head a block.
template <typename Real>
Problem with_shared_blocks(const Problem& p, int threads) {
  const int64_t sharing = p.query_heads / std::max<int64_t>(p.key_heads, 1);
  if (sharing <= 1 || p.alibi_slopes || p.dropout_p > 0) return p;
  Problem shared = p;
  shared.query_heads = p.key_heads, shared.query_length *= sharing;
  const int64_t a_head = RowBlock::shares_a_head<Real>(p), alone = sharing * a_head;
  const int64_t together = RowBlock::shares_a_head<Real>(shared);
  const int64_t items = p.batch * p.key_heads * RowBlock::blocks_a_head<Real>(shared);
  const bool fewer = 4 * together <= 3 * alone || a_head <= 1;
  const bool busy = items >= threads || 2 * together <= alone;
  return fewer && busy ? shared : p;
}

template <typename T, typename Element>
typename PackedFor<T, Element>::Type pack_for_forward(const Problem& p, int64_t blocks) {
  if constexpr (kInPlanes<Element>) {
    return typename PackedFor<T, Element>::Type(p);
  } else {
    return PackedColumns<T, Element>(p, p.value, p.value_dim, blocks);
  }
}

template <typename T, typename Real, typename Element>
void forward(const Problem& given, const ForwardArguments& to, int threads) {
  const Problem p = with_shared_blocks<Real>(given, threads);
  const int64_t sharing = given.query_heads / std::max<int64_t>(p.query_heads, 1);
  const int64_t blocks = RowBlock::blocks_a_head<Real>(p);
  const int64_t items = p.batch * p.query_heads * blocks, parts = key_parts(p, items, threads);
  // A head's last blocks first: causality makes them long.
  const int64_t heads_at_once = heads_in_turns(p);
  const auto rows_of = [&](int64_t item) {
    const int64_t turns = blocks * heads_at_once, turn = item % turns;
    const int64_t head = item / turns * heads_at_once + turn % heads_at_once;
    const int64_t block = blocks - 1 - turn / heads_at_once;
    return RowBlock::make<Real>(p, head / p.query_heads, head % p.query_heads, block, sharing);
  };
  threads = static_cast<int>(std::clamp<int64_t>(items * parts, 1, threads));
  const auto packed = pack_for_forward<T, Element>(p, blocks);
  using Workspace = ForwardWorkspace<Real, Element>;
  const PerThread<Workspace> workspaces(parts > 1 ? static_cast<int>(items * parts) : threads, p);
  run_parallel(threads, [&] {
    const TileConfiguration tiles;
    packed.pack_all();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < items * parts; ++i) {
      const int64_t part = i % parts;
      const RowBlock rows = rows_of(i / parts);
      const bool with_sinks = p.sinks && part == 0;
      const Workspace w =
          workspaces.make(parts > 1 ? static_cast<int>(i) : omp_get_thread_num(), p);
      Ahead after;
      after.add(upcoming_rows<T>(to.out, rows, p.value_dim));
      if (const int64_t later = i + threads; later < items * parts) {
        const RowBlock next = rows_of(later / parts);
        after.operand = first_keys<T>(p, next, KeyRange(p, next).part(later % parts, parts));
        after.add(upcoming_rows<T>(p.query, next, p.head_dim));
      }
      after.operand = after.operand.in_haste(packed.read_once());
      forward_part<T>(p, rows, KeyRange(p, rows).part(part, parts), with_sinks, packed, after, w);
      if (parts == 1) write_output<T>(p, to, rows, w);
    }
    if (parts > 1) {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < items; ++item) {
        const RowBlock rows = rows_of(item);
        const Workspace w = workspaces.make(static_cast<int>(item * parts), p);
        for (int64_t part = 1; part < parts; ++part) {
          merge_parts(p, rows, w, workspaces.make(static_cast<int>(item * parts + part), p));
        }
        write_output<T>(p, to, rows, w);
      }
    }
  });
}
