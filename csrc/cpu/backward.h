// Backward pass by recomputation (Dao, arXiv:2307.08691, algorithm 2), with query blocks outside.
//
// For a block of query rows and a tile of keys, everything transposed, [key][row]:
//     P  = exp2(S - lse)              dP = keep * (V dO^T + dW)
//     dS = P (dP - delta)             delta = sum(dO * O) - dlse, a value a row
//     dV += (keep P) dO               dK += scale dS Q               dQ += scale dS^T K
// A query block's dQ stays in cache; dK and dV gather in float over a whole (batch, key head), so
// that nothing is atomic and the result does not depend on timing. Threads take whole (batch, key
// head) pairs where these are many, else they share a pair: thread t takes query blocks t, t + n,
// ... (which balances causal work) into sums of its own, added up in order. Tested against
// backends/reference.py and by gradcheck in tests/test_contract.py.

template <typename Real, typename Element>
struct BackwardWorkspace {
  Element *queries, *queries_by_row, *douts, *douts_by_row, *keys, *values, *key_columns;
  Real *scores, *dscores, *slope, *keep, *lse, *row_term, *dqueries, *dkeys, *dvalues;
  // scores and dscores as operands: summed over rows (both), and over keys.
  Element *weights, *gradients, *gradients_by_key;
  uint8_t* hidden;

  BackwardWorkspace(Arena& arena, const Problem& p) {
    const int64_t tile = kKeys * kRows<Real>;
    const int64_t width = padded<Real>(p.head_dim), value_width = padded<Real>(p.value_dim);
    queries = arena.take<Element>(p.head_dim * kRows<Real>);
    queries_by_row = arena.take<Element>(kRows<Real> * width);
    douts = arena.take<Element>(p.value_dim * kRows<Real>);
    douts_by_row = arena.take<Element>(kRows<Real> * value_width);
    keys = arena.take<Element>(kKeys * width);
    values = arena.take<Element>(kKeys * value_width);
    scores = arena.take<Real>(tile);
    dscores = arena.take<Real>(tile);
    slope = arena.take<Real>(p.softcap != 0 ? tile : 0);
    keep = arena.take<Real>(p.dropout_p > 0 ? tile : 0);
    lse = arena.take<Real>(2 * kRows<Real>);
    row_term = arena.take<Real>(kRows<Real>);
    dqueries = arena.take<Real>(p.head_dim * kRows<Real>);
    hidden = arena.take<uint8_t>(tile);
    if constexpr (kDepth<Element> == 1) {
      weights = scores, gradients = gradients_by_key = dscores, key_columns = nullptr;
    } else {
      weights = arena.take<Element>(tile / kDepth<Element>);
      gradients = arena.take<Element>(tile / kDepth<Element>);
      gradients_by_key = arena.take<Element>(tile / kDepth<Element>);
      key_columns = arena.take<Element>(p.head_dim * (kKeys / kDepth<Element>));
    }
    dkeys = arena.take<Real>(p.key_length * width);
    dvalues = arena.take<Real>(p.key_length * value_width);
  }
};

// What a query block brings along: its rows in both layouts, LSE and row term.
template <typename T, typename Real, typename Element>
struct BackwardBlock {
  RowBlock rows;
  const Element *queries_by_row, *douts_by_row;
  int64_t query_stride, dout_stride;
  bool finite;

  BackwardBlock(const Problem& p, const BackwardArguments& to, const RowBlock& block,
                const BackwardWorkspace<Real, Element>& w)
      : rows(block) {
    pack_transposed<T>(p.query, rows, p.head_dim, query_factor<Real>(p), w.queries);
    queries_by_row = as_summed_rows<T>(p.query, rows, p.head_dim, w.queries_by_row, &query_stride);
    finite = all_finite<Real>(at<const T>(p.query, rows.batch, rows.head, rows.first),
                              p.query.stride[2], rows.count, p.head_dim);
    load_lse(to.lse, rows, w.lse);
    std::fill(w.row_term, w.row_term + kRows<Real>, Real(0));
    std::fill(w.dqueries, w.dqueries + p.head_dim * kRows<Real>, Real(0));
    if (to.dweights) return;

    pack_transposed<T>(to.dout, rows, p.value_dim, Real(1), w.douts);
    douts_by_row = as_summed_rows<T>(to.dout, rows, p.value_dim, w.douts_by_row, &dout_stride);
    finite = finite && all_finite<Real>(at<const T>(to.dout, rows.batch, rows.head, rows.first),
                                        to.dout.stride[2], rows.count, p.value_dim);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = rows.first + i;
      // In double: it is subtracted from every dP, which it nearly cancels where few keys are
      // visible.
      double delta = dot_in_double(at<const T>(to.out, rows.batch, rows.head, row),
                                   at<const T>(to.dout, rows.batch, rows.head, row), p.value_dim);
      if (to.dlse) delta -= *at<const Real>(to.dlse, rows.batch, rows.head, row);
      w.row_term[i] = static_cast<Real>(delta);
      if (to.row_term) *at<Real>(to.row_term, rows.batch, rows.head, row) = w.row_term[i];
    }
  }
};

// dscores += the gradient of the weights, read row by row.
template <typename T, typename Real>
void load_dweights(const BackwardArguments& to, const RowBlock& rows, int64_t key, int64_t keys,
                   Real* dscores) {
  const Real scale = static_cast<Real>(to.dweights_scale);
  std::fill(dscores, dscores + keys * kRows<Real>, Real(0));
  for (int64_t i = 0; i < rows.count; ++i) {
    const T* from = at<const T>(to.dweights, rows.batch, rows.head, rows.first + i, key);
    for (int64_t j = 0; j < keys; ++j) {
      dscores[j * kRows<Real> + i] = scale * to_float(from[j * to.dweights.stride[3]]);
    }
  }
}

// Scores become (dropped) weights, and dP becomes dS. Minus the row sums of dS go to row_sum if
// given.
template <typename Real, typename Element>
void score_gradients(const Problem& p, const RowBlock& rows, int64_t keys, Real factor,
                     const BackwardWorkspace<Real, Element>& w, Real* row_sum) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t v = 0; v < rows.vectors; ++v) {
      const int64_t lane = v * kLanes<Real>, index = j * kRows<Real> + lane;
      const Vec<Real> s = load(w.scores + index);
      const Vec<Real> weight = weight_of<Real>(s, factor, w.lse + lane);
      Vec<Real> gradient = load(w.dscores + index), dropped = weight;
      if (p.dropout_p > 0) {
        const Vec<Real> keep = load(w.keep + index);
        gradient *= keep;
        dropped *= keep;
      }
      const Vec<Real> hidden{};
      const Vec<Real> delta = row_sum ? hidden : load(w.row_term + lane);
      gradient = s == -kInfinity<Real> ? hidden : weight * (gradient - delta);
      store<Real>(w.scores + index, dropped);
      store<Real>(w.dscores + index, gradient);
      if (row_sum) store<Real>(row_sum + lane, load(row_sum + lane) - gradient);
    }
  }
}

template <typename Sum, typename Real>
void add_mask_gradient(const View& dmask, const RowBlock& rows, int64_t key, int64_t keys,
                       const Real* dscores) {
  for (int64_t i = 0; i < rows.count; ++i) {
    Sum* to = at<Sum>(dmask, rows.batch, rows.head, rows.first + i, key);
    for (int64_t j = 0; j < keys; ++j) to[j * dmask.stride[3]] += dscores[j * kRows<Real> + i];
  }
}

// Scores and their gradients as bfloat16 operands, see BackwardWorkspace; keys up to the next even
// number, so that a last pair's second weight is 0.
template <typename Real, typename Element>
void pack_gradients(const RowBlock& rows, int64_t keys, const BackwardWorkspace<Real, Element>& w) {
  if constexpr (kDepth<Element> == 2) {
    constexpr int64_t kStride = kRows<Real>, kW = kLanes<Real>;
    for (int64_t j = 0; j < keys; j += 2) {
      for (int64_t lane = 0; lane < rows.vectors * kW; lane += kW) {
        const int64_t index = j * kStride + lane;
        const bool odd = j + 1 < keys;
        const auto second = [&](const Real* from) {
          return odd ? load(from + index + kStride) : Vec<Real>{};
        };
        const Words weights = round_both(load(w.scores + index), second(w.scores));
        const Words gradients = round_both(load(w.dscores + index), second(w.dscores));
        store_halves(w.weights + index / 2, w.weights + (index + kStride) / 2, weights);
        store_halves(w.gradients + index / 2, w.gradients + (index + kStride) / 2, gradients);
        store_packed(w.gradients_by_key + j / 2 * kStride + lane, as_pairs(gradients));
      }
    }
  }
}

// The three products of a tile, for each visible pair by itself: a hidden pair's weight is 0, but
// 0 * NaN is NaN. For tiles where a hidden query, key or output gradient is not finite.
template <typename T, typename Real, typename Element>
void accumulate_carefully(const Problem& p, const BackwardArguments& to, const RowBlock& rows,
                          int64_t key, int64_t keys, const BackwardWorkspace<Real, Element>& w) {
  const auto add = [](Real weight, const T* from, int64_t width, Real* sum, int64_t step) {
    for (int64_t d = 0; d < width; ++d) {
      sum[d * step] += weight * static_cast<Real>(to_float(from[d]));
    }
  };
  for (int64_t j = 0; j < keys; ++j) {
    const T* k = at<const T>(p.key, rows.batch, rows.key_head, key + j);
    Real* dkey = w.dkeys + (key + j) * padded<Real>(p.head_dim);
    Real* dvalue = w.dvalues + (key + j) * padded<Real>(p.value_dim);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t index = j * kRows<Real> + i, row = rows.first + i;
      if (w.hidden[index]) continue;
      if (!to.dweights) {
        add(w.scores[index], at<const T>(to.dout, rows.batch, rows.head, row), p.value_dim, dvalue,
            1);
      }
      add(w.dscores[index], at<const T>(p.query, rows.batch, rows.head, row), p.head_dim, dkey, 1);
      add(w.dscores[index], k, p.head_dim, w.dqueries + i, kRows<Real>);
    }
  }
}

template <typename T, typename Real, typename Element>
void backward_tile(const Problem& p, const BackwardArguments& to,
                   const BackwardBlock<T, Real, Element>& block, TileKind kind, int64_t key,
                   int64_t keys, const PackedColumns<T, Element>& packed,
                   const BackwardWorkspace<Real, Element>& w) {
  constexpr int64_t kStep = kDepth<Element>, kStride = kRows<Real>;
  const RowBlock& rows = block.rows;
  const T* from = at<const T>(p.key, rows.batch, rows.key_head, key);
  int64_t k_stride, v_stride;
  const Element* k = as_block<T>(from, p.key.stride[2], keys, p.head_dim, false, w.keys, &k_stride);
  const Real factor = compute_scores(p, rows, kind, key, keys, w.queries, k, k_stride, w.scores,
                                     static_cast<Real*>(nullptr), w.slope);
  const bool careful = kind == TileKind::kEdge &&
                       !(block.finite && all_finite<Real>(from, p.key.stride[2], keys, p.head_dim));
  if (careful) record_hidden(w.scores, keys, w.hidden);

  if (to.dweights) {
    load_dweights<T>(to, rows, key, keys, w.dscores);
  } else {
    const Element* v =
        as_block<T>(at<const T>(p.value, rows.batch, rows.key_head, key), p.value.stride[2], keys,
                    p.value_dim, false, w.values, &v_stride);
    multiply<false>(keys, rows.vectors, (p.value_dim + kStep - 1) / kStep, v, v_stride, w.douts,
                    kStride, Into<Real>{w.dscores, kStride});
  }
  if (p.dropout_p > 0) dropout_factors(p, rows, key, keys, w.keep);
  score_gradients(p, rows, keys, factor, w, to.dweights ? w.row_term : nullptr);
  if (to.dmask) {
    const bool wide = to.dmask.dtype == DType::kFloat64;
    (wide ? add_mask_gradient<double, Real> : add_mask_gradient<float, Real>)(to.dmask, rows, key,
                                                                              keys, w.dscores);
  }
  if (p.softcap != 0) {
    for (int64_t i = 0; i < keys * kStride; ++i) w.dscores[i] *= w.slope[i];
  }
  if (careful) return accumulate_carefully<T>(p, to, rows, key, keys, w);

  pack_gradients(rows, keys, w);
  const int64_t width = padded<Real>(p.head_dim), value_width = padded<Real>(p.value_dim);
  const int64_t row_elements = (rows.count + kStep - 1) / kStep;
  if (!to.dweights) {
    multiply<false>(keys, value_width / kLanes<Real>, row_elements, w.weights, kStride / kStep,
                    block.douts_by_row, block.dout_stride,
                    Into<Real>{w.dvalues + key * value_width, value_width, true});
  }
  multiply<false>(keys, width / kLanes<Real>, row_elements, w.gradients, kStride / kStep,
                  block.queries_by_row, block.query_stride,
                  Into<Real>{w.dkeys + key * width, width, true});
  const Into<Real> dqueries{w.dqueries, kStride, true};
  if constexpr (kStep == 1) {
    multiply<true>(p.head_dim, rows.vectors, keys, k, k_stride, w.gradients_by_key, kStride,
                   dqueries);
  } else {
    multiply<false>(p.head_dim, rows.vectors, (keys + 1) / 2,
                    packed.tile(rows, key, keys, w.key_columns), kKeys / 2, w.gradients_by_key,
                    kStride, dqueries);
  }
}

template <typename T, typename Real, typename Element>
void backward_block(const Problem& p, const BackwardArguments& to, const RowBlock& rows,
                    const PackedColumns<T, Element>& packed,
                    const BackwardWorkspace<Real, Element>& w) {
  const BackwardBlock<T, Real, Element> block(p, to, rows, w);
  const KeyRange range(p, rows);
  for (int64_t key = range.first; key < range.end; key += kKeys) {
    const int64_t keys = std::min(kKeys, range.end - key);
    const TileKind kind = classify(p, rows, key, keys);
    if (kind != TileKind::kSkip) backward_tile<T>(p, to, block, kind, key, keys, packed, w);
  }
  T* dquery = at<T>(to.dquery, rows.batch, rows.head, rows.first);
  const int64_t stride = to.dquery.stride[2];
  const Real scale = static_cast<Real>(p.scale);
  for_each_row(w.dqueries, p.head_dim, rows, [=](int64_t i, int64_t d, Vec<Real> x, int64_t count) {
    store_some<Real>(dquery + i * stride + d, x * scale, count);
  });
  if (!to.dweights) return;
  for (int64_t i = 0; i < rows.count; ++i) {
    *at<Real>(to.row_term, rows.batch, rows.head, rows.first + i) = w.row_term[i];
  }
}

// Whether different heads or batches add to one mask gradient, so that they must not run at the
// same time.
inline bool mask_is_shared(const Problem& p, const BackwardArguments& to) {
  return to.dmask && ((to.dmask.stride[0] == 0 && p.batch > 1) ||
                      (to.dmask.stride[1] == 0 && p.query_heads > 1));
}

// One thread's part of a pair: of every `step` query blocks of the heads that share a key head,
// one; or, under a shared mask gradient, one of every `step` row blocks with all of its heads.
template <typename T, typename Real, typename Element>
void backward_pair(const Problem& p, const BackwardArguments& to, int64_t pair, int64_t first,
                   int64_t step, const PackedColumns<T, Element>& packed,
                   const BackwardWorkspace<Real, Element>& w) {
  const int64_t group = p.query_heads / p.key_heads, batch = pair / p.key_heads;
  const int64_t blocks = RowBlock::blocks_a_head<Real>(p);
  const int64_t heads_at_once = mask_is_shared(p, to) ? group : 1;
  std::fill(w.dkeys, w.dkeys + p.key_length * padded<Real>(p.head_dim), Real(0));
  std::fill(w.dvalues, w.dvalues + p.key_length * padded<Real>(p.value_dim), Real(0));
  for (int64_t item = first; item < group / heads_at_once * blocks; item += step) {
    const int64_t first_head = pair % p.key_heads * group + item / blocks;
    for (int64_t head = first_head; head < first_head + heads_at_once; ++head) {
      backward_block<T>(p, to, RowBlock::make<Real>(p, batch, head, item % blocks), packed, w);
    }
  }
}

// Row `row` of one pair's dkey and dvalue: the sum of the threads' parts, in their order.
template <typename T, typename Real, typename Element>
void write_key_gradients(const Problem& p, const BackwardArguments& to, int64_t pair, int64_t row,
                         BackwardWorkspace<Real, Element>* parts, int count) {
  const int64_t batch = pair / p.key_heads, head = pair % p.key_heads;
  const auto write = [&](const View& view, int64_t width, Real scale, auto member) {
    T* out = at<T>(view, batch, head, row);
    for (int64_t d = 0; d < width; d += kLanes<Real>) {
      Vec<Real> sum{};
      for (int t = 0; t < count; ++t) {
        sum += load(parts[t].*member + row * padded<Real>(width) + d);
      }
      store_some<Real>(out + d, sum * scale, width - d);
    }
  };
  using Workspace = BackwardWorkspace<Real, Element>;
  write(to.dkey, p.head_dim, static_cast<Real>(p.scale), &Workspace::dkeys);
  if (!to.dweights) write(to.dvalue, p.value_dim, Real(1), &Workspace::dvalues);
}

// How many threads may share a pair: as many as have query blocks, within 48 MiB of partial sums,
// and one where a mask gradient without a row dimension would make them write to one place.
template <typename Real>
int sharing_threads(const Problem& p, const BackwardArguments& to, int threads) {
  if (to.dmask && to.dmask.stride[2] == 0) return 1;
  const int64_t blocks = RowBlock::blocks_a_head<Real>(p);
  const int64_t bytes = p.key_length * (padded<Real>(p.head_dim) + padded<Real>(p.value_dim)) *
                        static_cast<int64_t>(sizeof(Real));
  const int64_t most = std::max<int64_t>(1, (int64_t{48} << 20) / std::max<int64_t>(1, bytes));
  return static_cast<int>(
      std::clamp<int64_t>(std::min(most, blocks * (p.query_heads / p.key_heads)), 1, threads));
}

template <typename T, typename Real, typename Element>
void backward(const Problem& p, const BackwardArguments& to, int threads) {
  const int64_t pairs = p.batch * p.key_heads;
  if (pairs == 0) return;
  const bool by_pair = !mask_is_shared(p, to) && (pairs % threads == 0 || pairs >= 4 * threads);
  if (!by_pair) threads = sharing_threads<Real>(p, to, threads);
  threads = std::max(1, threads);
  const PerThread<BackwardWorkspace<Real, Element>> workspaces(threads, p);
  std::vector<BackwardWorkspace<Real, Element>> parts;
  for (int t = 0; t < threads; ++t) parts.push_back(workspaces.make(t, p));
  const int64_t blocks = RowBlock::blocks_a_head<Real>(p);
  const PackedColumns<T, Element> packed(p, p.key, p.head_dim, blocks);
  if (by_pair) {
#pragma omp parallel num_threads(threads)
    {
      const TileConfiguration tiles;
      packed.pack_all();
      BackwardWorkspace<Real, Element>* own = &parts[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
      for (int64_t pair = 0; pair < pairs; ++pair) {
        backward_pair(p, to, pair, 0, 1, packed, *own);
        for (int64_t row = 0; row < p.key_length; ++row) {
          write_key_gradients<T>(p, to, pair, row, own, 1);
        }
      }
    }
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const TileConfiguration tiles;
    packed.pack_all();
    for (int64_t pair = 0; pair < pairs; ++pair) {
      // The team can be smaller than asked for; parts are numbered by the loop, not by the thread.
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) {
        backward_pair(p, to, pair, part, threads, packed, parts[part]);
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < p.key_length; ++row) {
        write_key_gradients<T>(p, to, pair, row, parts.data(), threads);
      }
    }
  }
}
