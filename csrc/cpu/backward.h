// Backward pass by recomputation (Dao, arXiv:2307.08691, algorithm 2), with queries outside.
//
// For a group of blocks of query rows and a tile of keys, everything transposed, [key][row]:
//     P  = exp2(S - lse)              dP = keep * (V dO^T + dW)
//     dS = P (dP - delta)             delta = sum(dO * O) - dlse, a value a row
//     dV += (keep P) dO               dK += scale dS Q               dQ += scale dS^T K
// P and dS are made in parts, of some keys by one block, whose scores stay in L1; the products of
// the second kind are of whole groups and tiles, so that their sums are rarely loaded and stored.
// A group's dQ stays in cache; dK and dV gather in float over a whole (batch, key head), so that
// nothing is atomic and the result does not depend on timing. Threads take whole (batch, key head)
// pairs where these are many, else they share the groups of a pair, each into sums of its own,
// added up in order. Tested against backends/reference.py and by gradcheck in
// tests/test_contract.py.

constexpr int64_t kParts = kKeys / kPartKeys;  // of a tile
template <typename Real>
constexpr int64_t kGroupRows = kGroupBlocks * kRows<Real>;

template <typename Real, typename Element>
struct BackwardWorkspace {
  // Of a group: by block, or over all of its rows.
  Element *queries[kGroupBlocks], *douts[kGroupBlocks], *queries_by_row, *douts_by_row;
  Real *lse[kGroupBlocks], *row_term[kGroupBlocks], *dqueries[kGroupBlocks];
  // Of a part.
  Real *scores, *dscores, *slope, *keep;
  uint8_t* hidden;
  // Of a tile, weights and dS as operands: summed over rows (both), and over keys.
  Element *weights, *gradients, *gradients_by_key[kGroupBlocks];
  Element *keys, *values, *key_columns;
  Real *dkeys, *dvalues;  // of a (batch, key head)

  BackwardWorkspace(Arena& arena, const Problem& p) {
    constexpr int64_t kPart = kPartKeys * kRows<Real>, kTile = kKeys * kGroupRows<Real>;
    const int64_t width = padded<Real>(p.head_dim), value_width = padded<Real>(p.value_dim);
    for (int64_t i = 0; i < kGroupBlocks; ++i) {
      queries[i] = arena.take<Element>(p.head_dim * kRows<Real>);
      douts[i] = arena.take<Element>(p.value_dim * kRows<Real>);
      lse[i] = arena.take<Real>(2 * kRows<Real>);
      row_term[i] = arena.take<Real>(kRows<Real>);
      dqueries[i] = arena.take<Real>(p.head_dim * kRows<Real>);
    }
    queries_by_row = arena.take<Element>(kGroupRows<Real> * width);
    douts_by_row = arena.take<Element>(kGroupRows<Real> * value_width);
    scores = arena.take<Real>(kPart);
    dscores = arena.take<Real>(kPart);
    slope = arena.take<Real>(p.softcap != 0 ? kPart : 0);
    keep = arena.take<Real>(p.dropout_p > 0 ? kPart : 0);
    hidden = arena.take<uint8_t>(kPart);
    keys = arena.take<Element>(kKeys * width);
    values = arena.take<Element>(kKeys * value_width);
    if constexpr (kDepth<Element> == 1) {
      static_assert(kTile == kPart * kDepth<Element>, "operands are where the scores were");
      weights = scores, gradients = gradients_by_key[0] = dscores, key_columns = nullptr;
    } else {
      weights = arena.take<Element>(kTile / kDepth<Element>);
      gradients = arena.take<Element>(kTile / kDepth<Element>);
      for (Element*& block : gradients_by_key) {
        block = arena.take<Element>(kTile / kGroupBlocks / kDepth<Element>);
      }
      key_columns = arena.take<Element>(p.head_dim * (kKeys / kDepth<Element>));
    }
    dkeys = arena.take<Real>(whole_keys(p.key_length) * width);
    dvalues = arena.take<Real>(whole_keys(p.key_length) * value_width);
  }
};

// Neighbouring blocks of one head's query rows.
struct RowGroup {
  RowBlock rows;  // all of them
  RowBlock blocks[kGroupBlocks];
  int64_t count;  // of blocks

  // Of the `groups` groups of a head, which share its blocks evenly.
  template <typename Real>
  static RowGroup make(const Problem& p, int64_t batch, int64_t head, int64_t group,
                       int64_t groups) {
    const int64_t blocks = RowBlock::blocks_a_head<Real>(p);
    const int64_t first = blocks * group / groups;
    RowGroup made;
    made.count = blocks * (group + 1) / groups - first;
    for (int64_t i = 0; i < made.count; ++i) {
      made.blocks[i] = RowBlock::make<Real>(p, batch, head, first + i);
    }
    made.rows = made.blocks[0];
    for (int64_t i = 1; i < made.count; ++i) {
      made.rows.count += made.blocks[i].count, made.rows.vectors += made.blocks[i].vectors;
    }
    return made;
  }
};

// A row's delta. Summed in double: it is subtracted from every dP, which it nearly cancels where
// few keys are visible.
template <typename T, typename Real>
Real row_term(const Problem& p, const BackwardArguments& to, int64_t batch, int64_t head,
              int64_t row) {
  double sum = dot_in_double(at<const T>(to.out, batch, head, row),
                             at<const T>(to.dout, batch, head, row), p.value_dim);
  if (to.dlse) sum -= *at<const Real>(to.dlse, batch, head, row);
  return static_cast<Real>(sum);
}

// What a group brings along: its rows in both layouts, LSE and row terms.
template <typename T, typename Real, typename Element>
struct BackwardGroup {
  RowGroup group;
  const Element *queries_by_row, *douts_by_row;
  int64_t query_stride, dout_stride;
  std::optional<bool> known_finite;  // what is_finite found

  BackwardGroup(const Problem& p, const BackwardArguments& to, const RowGroup& row_group,
                const BackwardWorkspace<Real, Element>& w)
      : group(row_group) {
    const RowBlock& rows = group.rows;
    queries_by_row = as_summed_rows<T>(p.query, rows, p.head_dim, w.queries_by_row, &query_stride);
    if (!to.dweights) {
      douts_by_row = as_summed_rows<T>(to.dout, rows, p.value_dim, w.douts_by_row, &dout_stride);
    }
    for (int64_t i = 0; i < group.count; ++i) {
      const RowBlock& block = group.blocks[i];
      pack_transposed<T>(p.query, block, p.head_dim, query_factor<Real>(p), w.queries[i]);
      load_lse(to.lse, block, w.lse[i]);
      std::fill(w.row_term[i], w.row_term[i] + kRows<Real>, Real(0));
      std::fill(w.dqueries[i], w.dqueries[i] + p.head_dim * kRows<Real>, Real(0));
      if (to.dweights) continue;
      pack_transposed<T>(to.dout, block, p.value_dim, Real(1), w.douts[i]);
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t row = block.first + j;
        w.row_term[i][j] = row_term<T, Real>(p, to, block.batch, block.head, row);
        if (to.row_term) *at<Real>(to.row_term, block.batch, block.head, row) = w.row_term[i][j];
      }
    }
  }

  // Whether queries, dO and LSE are finite, so that a hidden pair's product with its weight of 0 is
  // 0. Only tiles with hidden pairs ask, which small problems often have none of.
  bool is_finite(const Problem& p, const BackwardArguments& to,
                 const BackwardWorkspace<Real, Element>& w) {
    if (known_finite) return *known_finite;
    const RowBlock& rows = group.rows;
    const auto all_rows_finite = [&](const View& view, int64_t width) {
      return all_finite<Real>(at<const T>(view, rows.batch, rows.head, rows.first), view.stride[2],
                              rows.count, width);
    };
    bool finite = all_rows_finite(p.query, p.head_dim) &&
                  (to.dweights || all_rows_finite(to.dout, p.value_dim));
    for (int64_t i = 0; i < group.count; ++i) {
      const Real* lse = w.lse[i];
      finite &= std::none_of(lse, lse + group.blocks[i].count, [](Real x) { return x != x; });
    }
    known_finite = finite;
    return finite;
  }
};

// Some keys of a tile for one block of a group.
struct Part {
  int64_t block, key, keys;
  int64_t key_in_tile, row_in_group;
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

// Scores become (dropped) weights, and dP becomes dS, in place. Minus the row sums of dS go to
// row_sum if given.
template <typename Real, typename Element>
void score_gradients(const Problem& p, const RowBlock& rows, const Part& part, Real factor,
                     const BackwardWorkspace<Real, Element>& w, Real* row_sum) {
  const Real *lse = w.lse[part.block], *row_term = w.row_term[part.block];
  for (int64_t j = 0; j < whole_keys(part.keys); ++j) {
    for (int64_t v = 0; v < rows.vectors; ++v) {
      const int64_t lane = v * kLanes<Real>, index = j * kRows<Real> + lane;
      const Vec<Real> s = load(w.scores + index);
      const Vec<Real> weight = weight_of<Real>(s, factor, lse + lane);
      Vec<Real> gradient = load(w.dscores + index), dropped = weight;
      if (p.dropout_p > 0) {
        const Vec<Real> keep = load(w.keep + index);
        gradient *= keep;
        dropped *= keep;
      }
      const Vec<Real> hidden{};
      const Vec<Real> delta = row_sum ? hidden : load(row_term + lane);
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
  const int64_t column = dmask.stride[3];
  if (dmask.stride[2] == 0) {  // an entry for all rows: a block's sum first, for accuracy
    Sum* to = at<Sum>(dmask, rows.batch, rows.head, 0, key);
    for (int64_t j = 0; j < keys; ++j) {
      const Real* gradients = dscores + j * kRows<Real>;
      to[j * column] += std::accumulate(gradients, gradients + rows.count, Sum(0));
    }
    return;
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    Sum* to = at<Sum>(dmask, rows.batch, rows.head, rows.first + i, key);
    for (int64_t j = 0; j < keys; ++j) to[j * column] += dscores[j * kRows<Real> + i];
  }
}

// A part's place among the operands of its tile.
template <typename Real, typename Element>
struct OperandsOfPart {
  static constexpr int64_t kStride = kGroupRows<Real> / kDepth<Element>;  // from key to key
  Element *weights, *gradients, *gradients_by_key;

  OperandsOfPart(const BackwardWorkspace<Real, Element>& w, const Part& part) {
    const int64_t offset = part.key_in_tile * kStride + part.row_in_group / kDepth<Element>;
    weights = w.weights + offset, gradients = w.gradients + offset;
    gradients_by_key =
        w.gradients_by_key[part.block] + part.key_in_tile / kDepth<Element> * kRows<Real>;
  }

  void clear(const RowBlock& rows, int64_t keys) const {
    const int64_t row_elements = rows.vectors * kLanes<Real> / kDepth<Element>;
    for (int64_t j = 0; j < keys; ++j) {
      std::fill_n(weights + j * kStride, row_elements, Element{});
      std::fill_n(gradients + j * kStride, row_elements, Element{});
    }
    std::fill_n(gradients_by_key, keys / kDepth<Element> * kRows<Real>, Element{});
  }
};

template <typename Real>
struct WeightAndGradient {
  Vec<Real> weight{}, gradient{};
};

// One or two vectors of rows, from `lane` on, as bfloat16 operands: values(index, vector) gives the
// weights and gradients at an index of the scores.
template <int kVectors, typename Real, typename Element, typename Values>
inline __attribute__((always_inline)) void write_operands(const OperandsOfPart<Real, Element>& to,
                                                          int64_t keys, int64_t lane,
                                                          Values values) {
  constexpr int64_t kStride = OperandsOfPart<Real, Element>::kStride, kW = kLanes<Real>;
  for (int64_t j = 0; j < keys; j += 2) {
    WeightAndGradient<Real> first[2], second[2];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t index = j * kRows<Real> + lane + v * kW;
      first[v] = values(index, v);
      second[v] = values(index + kRows<Real>, v);
    }
    Element *weights = to.weights + j * kStride + lane / 2, *next_weights = weights + kStride;
    Element *gradients = to.gradients + j * kStride + lane / 2,
            *next_gradients = gradients + kStride;
    Element* by_key = to.gradients_by_key + j / 2 * kRows<Real> + lane;
    if (kVectors == 2) {
      store_packed(weights, round_both(first[0].weight, first[1].weight));
      store_packed(next_weights, round_both(second[0].weight, second[1].weight));
      const Words low = round_both(first[0].gradient, first[1].gradient);
      const Words high = round_both(second[0].gradient, second[1].gradient);
      store_packed(gradients, low);
      store_packed(next_gradients, high);
      store_packed(by_key, pairs_of_two<false>(low, high));
      store_packed(by_key + kW, pairs_of_two<true>(low, high));
    } else {
      store_halves(weights, next_weights, round_both(first[0].weight, second[0].weight));
      const Words both = round_both(first[0].gradient, second[0].gradient);
      store_halves(gradients, next_gradients, both);
      store_packed(by_key, as_pairs(both));
    }
  }
}

// Weights and gradients as score_gradients left them, as operands.
template <typename Real, typename Element>
void pack_gradients(const RowBlock& rows, const Part& part,
                    const BackwardWorkspace<Real, Element>& w) {
  const OperandsOfPart<Real, Element> to(w, part);
  for (int64_t v = 0; v < rows.vectors; ++v) {
    write_operands<1>(to, whole_keys(part.keys), v * kLanes<Real>, [&](int64_t index, int) {
      return WeightAndGradient<Real>{load(w.scores + index), load(w.dscores + index)};
    });
  }
}

// Scores and dP as operands, at once: what score_gradients and pack_gradients make where nothing
// else needs to see the gradients. LSE's low part is left out, since weights are rounded to
// bfloat16.
template <bool kKeep, typename Real, typename Element>
void gradients_as_operands(const RowBlock& rows, const Part& part, Real factor,
                           const BackwardWorkspace<Real, Element>& w) {
  constexpr int64_t kW = kLanes<Real>;
  const OperandsOfPart<Real, Element> to(w, part);
  const auto write = [&](auto vectors, int64_t lane) {
    const Real *lse = w.lse[part.block] + lane, *row_term = w.row_term[part.block] + lane;
    const Vec<Real> shift[2] = {load(lse), vectors == 2 ? load(lse + kW) : Vec<Real>{}};
    const Vec<Real> delta[2] = {load(row_term), vectors == 2 ? load(row_term + kW) : Vec<Real>{}};
    const Real *s = w.scores, *dscores = w.dscores, *keep = w.keep;
    write_operands<vectors>(
        to, whole_keys(part.keys), lane, [&](int64_t index, int v) __attribute__((always_inline)) {
          const RoughExp2<Element> weight(load(s + index) * factor - shift[v]);
          const Vec<Real> dweight = load(dscores + index);
          const Vec<Real> kept = kKeep ? load(keep + index) : broadcast(Real(1));
          return WeightAndGradient<Real>{weight.power * kept,
                                         weight.times(dweight * kept - delta[v])};
        });
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 2> kTwo;
  int64_t v = 0;
  for (; v + 2 <= rows.vectors; v += 2) write(kTwo, v * kW);
  if (v < rows.vectors) write(kOne, v * kW);
}

// The three products of a part, for each visible pair by itself: a hidden pair's weight is 0, but
// 0 * NaN is NaN. For tiles where a hidden query, key or output gradient is not finite.
template <typename T, typename Real, typename Element>
void accumulate_carefully(const Problem& p, const BackwardArguments& to, const RowBlock& rows,
                          const Part& part, const BackwardWorkspace<Real, Element>& w) {
  const auto add = [](Real weight, const T* from, int64_t width, Real* sum, int64_t step) {
    for (int64_t d = 0; d < width; ++d) {
      sum[d * step] += weight * static_cast<Real>(to_float(from[d]));
    }
  };
  for (int64_t j = 0; j < part.keys; ++j) {
    const int64_t key = part.key + j;
    const T* k = at<const T>(p.key, rows.batch, rows.key_head, key);
    Real* dkey = w.dkeys + key * padded<Real>(p.head_dim);
    Real* dvalue = w.dvalues + key * padded<Real>(p.value_dim);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t index = j * kRows<Real> + i, row = rows.first + i;
      if (w.hidden[index]) continue;
      if (!to.dweights) {
        add(w.scores[index], at<const T>(to.dout, rows.batch, rows.head, row), p.value_dim, dvalue,
            1);
      }
      add(w.dscores[index], at<const T>(p.query, rows.batch, rows.head, row), p.head_dim, dkey, 1);
      add(w.dscores[index], k, p.head_dim, w.dqueries[part.block] + i, kRows<Real>);
    }
  }
}

// A tile's keys and values as they are multiplied from the left.
template <typename Element>
struct BackwardTile {
  const Element *keys, *values;
  int64_t key_stride, value_stride;
  bool careful;  // see accumulate_carefully
};

// Products that sum over rows in pairs or tiles include some that do not exist: their operands have
// to be 0, whatever keys and values they were multiplied with.
template <typename Real>
void hide_missing_rows(const RowBlock& rows, int64_t keys, Real* s) {
  const int64_t end = rows.vectors * kLanes<Real>;
  if (rows.count == end) return;
  for (int64_t j = 0; j < keys; ++j) {
    std::fill(s + j * kRows<Real> + rows.count, s + j * kRows<Real> + end, -kInfinity<Real>);
  }
}

// A tile's rows of a (batch, key head)'s sums, which are added to; in cache if they are all.
template <typename Real>
Upcoming upcoming_sums(const Problem& p, const Real* sums, int64_t key, int64_t keys,
                       int64_t width) {
  const int64_t bytes = width * static_cast<int64_t>(sizeof(Real));
  return p.key_length <= kKeys ? Upcoming() : Upcoming(sums + key * width, bytes, bytes, keys);
}

// Weights and dS of a part, as operands, or with care all that becomes of them.
template <typename T, typename Real, typename Element>
void backward_part(const Problem& p, const BackwardArguments& to, const RowBlock& rows,
                   TileKind kind, const Part& part, const BackwardTile<Element>& tile, Ahead& ahead,
                   const BackwardWorkspace<Real, Element>& w) {
  constexpr int64_t kStep = kDepth<Element>, kStride = kRows<Real>;
  const Real factor = compute_scores(
      p, rows, kind, part.key, part.keys, w.queries[part.block],
      tile.keys + part.key_in_tile * tile.key_stride, tile.key_stride, w.scores,
      Ahead(to.dweights ? Upcoming()
                        : upcoming_keys<T>(p.value, rows, part.key, part.keys, p.value_dim),
            &ahead),
      static_cast<Real*>(nullptr), w.slope);
  if (tile.careful) record_hidden(w.scores, part.keys, w.hidden);
  if (kStep > 1) hide_missing_rows(rows, whole_keys(part.keys), w.scores);
  if (to.dweights) {
    load_dweights<T>(to, rows, part.key, part.keys, w.dscores);
  } else {
    const int64_t width = padded<Real>(p.value_dim);
    ahead.operand = upcoming_sums(p, w.dvalues, part.key, part.keys, width);
    multiply<false>(whole_keys(part.keys), rows.vectors, (p.value_dim + kStep - 1) / kStep,
                    tile.values + part.key_in_tile * tile.value_stride, tile.value_stride,
                    w.douts[part.block], kStride,
                    Into<Real>{w.dscores, kStride, false, nullptr, nullptr, &ahead});
  }
  if (p.dropout_p > 0) dropout_factors(p, rows, part.key, part.keys, w.keep);
  if constexpr (kStep == 2) {
    if (!to.dweights && !to.dmask && p.softcap == 0 && !tile.careful) {
      return p.dropout_p > 0 ? gradients_as_operands<true>(rows, part, factor, w)
                             : gradients_as_operands<false>(rows, part, factor, w);
    }
  }
  score_gradients(p, rows, part, factor, w, to.dweights ? w.row_term[part.block] : nullptr);
  if (to.dmask) {
    const bool wide = to.dmask.dtype == DType::kFloat64;
    (wide ? add_mask_gradient<double, Real>
          : add_mask_gradient<float, Real>)(to.dmask, rows, part.key, part.keys, w.dscores);
  }
  if (p.softcap != 0) {
    for (int64_t i = 0; i < part.keys * kStride; ++i) w.dscores[i] *= w.slope[i];
  }
  if (tile.careful) return accumulate_carefully<T>(p, to, rows, part, w);
  if constexpr (kStep == 2) pack_gradients(rows, part, w);
}

// Which parts of a tile are visible, and what the first and the last of them enclose.
template <typename Real>
struct VisibleParts {
  TileKind kind[kGroupBlocks][kParts];
  int64_t first_block = kGroupBlocks, end_block = 0, first_key = kKeys, end_key = 0;
  bool any_hidden = false;  // pair among these

  VisibleParts(const Problem& p, const RowGroup& group, int64_t key, int64_t keys) {
    for (int64_t block = 0; block < group.count; ++block) {
      for (int64_t first = 0; first < keys; first += kPartKeys) {
        const int64_t end = std::min(first + kPartKeys, keys);
        TileKind& found = kind[block][first / kPartKeys];
        found = classify<Real>(p, group.blocks[block], key + first, end - first);
        if (found == TileKind::kSkip) continue;
        first_block = std::min(first_block, block), end_block = block + 1;
        first_key = std::min(first_key, first), end_key = std::max(end_key, end);
      }
    }
    for (int64_t block = first_block; block < end_block; ++block) {
      for (int64_t first = first_key; first < end_key; first += kPartKeys) {
        any_hidden |= kind[block][first / kPartKeys] != TileKind::kFull;
      }
    }
  }
  bool none() const { return end_block == 0; }
};

// Products ask for what is ahead, its operand being the next tile's keys.
template <typename T, typename Real, typename Element>
void backward_tile(const Problem& p, const BackwardArguments& to,
                   BackwardGroup<T, Real, Element>& operands, int64_t key, int64_t keys,
                   const PackedColumns<T, Element>& packed, Ahead& ahead,
                   const BackwardWorkspace<Real, Element>& w) {
  constexpr int64_t kStep = kDepth<Element>, kStride = kGroupRows<Real> / kStep;
  const RowGroup& group = operands.group;
  const RowBlock& all = group.rows;
  const VisibleParts<Real> visible(p, group, key, keys);
  if (visible.none()) return;
  const Upcoming next_keys = ahead.operand;

  const T* from = at<const T>(p.key, all.batch, all.key_head, key);
  BackwardTile<Element> tile{};
  tile.keys = tile_as_block<T>(p.key, all, key, keys, p.head_dim, w.keys, &tile.key_stride);
  if (!to.dweights) {
    tile.values =
        tile_as_block<T>(p.value, all, key, keys, p.value_dim, w.values, &tile.value_stride);
  }
  tile.careful = visible.any_hidden && !(operands.is_finite(p, to, w) &&
                                         all_finite<Real>(from, p.key.stride[2], keys, p.head_dim));
  for (int64_t block = visible.first_block; block < visible.end_block; ++block) {
    const RowBlock& rows = group.blocks[block];
    for (int64_t first = visible.first_key; first < visible.end_key; first += kPartKeys) {
      const Part part{block, key + first, std::min(kPartKeys, visible.end_key - first), first,
                      rows.first - all.first};
      const TileKind kind = visible.kind[block][first / kPartKeys];
      if (kind != TileKind::kSkip) {
        backward_part<T>(p, to, rows, kind, part, tile, ahead, w);
      } else if (!tile.careful) {
        OperandsOfPart<Real, Element>(w, part).clear(rows, whole_keys(part.keys));
      }
    }
  }
  if (tile.careful) return;

  const int64_t first_key = visible.first_key, count = whole_keys(visible.end_key) - first_key;
  const int64_t first_row = group.blocks[visible.first_block].first - all.first;
  const RowBlock& last = group.blocks[visible.end_block - 1];
  const int64_t last_rows = kVectorsAtOnce > 1 ? last.vectors * kLanes<Real> : last.count;
  const int64_t row_elements = (last.first + last_rows - all.first - first_row + kStep - 1) / kStep;
  const auto over_rows = [&](const Element* weights, const Element* by_row, int64_t stride,
                             int64_t width, Real* sums, const Upcoming& operand) {
    width = padded<Real>(width);
    ahead.operand = operand;
    multiply<false>(
        count, width / kLanes<Real>, row_elements,
        weights + first_key * kStride + first_row / kStep, kStride,
        by_row + first_row / kStep * stride, stride,
        Into<Real>{sums + (key + first_key) * width, width, true, nullptr, nullptr, &ahead});
  };
  const int64_t key_width = padded<Real>(p.head_dim);
  if (!to.dweights) {
    over_rows(w.weights, operands.douts_by_row, operands.dout_stride, p.value_dim, w.dvalues,
              upcoming_sums(p, w.dkeys, key, keys, key_width));
  }
  over_rows(w.gradients, operands.queries_by_row, operands.query_stride, p.head_dim, w.dkeys,
            kStep == 2 ? packed.upcoming(all, key, keys) : Upcoming());
  ahead.operand = next_keys;
  const Element* columns = nullptr;
  if constexpr (kStep == 2) columns = packed.tile(all, key, keys, w.key_columns);
  for (int64_t block = visible.first_block; block < visible.end_block; ++block) {
    const Into<Real> dqueries{w.dqueries[block], kRows<Real>, true, nullptr, nullptr, &ahead};
    const int64_t vectors = group.blocks[block].vectors;
    const Element* by_key = w.gradients_by_key[block] + first_key / kStep * kRows<Real>;
    if constexpr (kStep == 1) {
      multiply<true>(p.head_dim, vectors, count, tile.keys + first_key * tile.key_stride,
                     tile.key_stride, by_key, kRows<Real>, dqueries);
    } else {
      multiply<false>(p.head_dim, vectors, count / 2, columns + first_key / 2, kKeys / 2, by_key,
                      kRows<Real>, dqueries);
    }
  }
}

template <typename T, typename Real, typename Element>
void backward_group(const Problem& p, const BackwardArguments& to, const RowGroup& group,
                    const PackedColumns<T, Element>& packed, const Ahead& after,
                    const BackwardWorkspace<Real, Element>& w) {
  BackwardGroup<T, Real, Element> operands(p, to, group, w);
  const KeyRange range(p, group.rows);
  AheadOfTiles<T> ahead(p, group.rows, range, after);
  for (int64_t key = range.first; key < range.end; key += kKeys) {
    backward_tile<T>(p, to, operands, key, range.tile(key), packed, ahead.at(key), w);
  }
  ahead.ask_rest();
  const Real scale = static_cast<Real>(p.scale);
  for (int64_t block = 0; block < group.count; ++block) {
    const RowBlock& rows = group.blocks[block];
    T* dquery = at<T>(to.dquery, rows.batch, rows.head, rows.first);
    const int64_t stride = to.dquery.stride[2];
    for_each_row(w.dqueries[block], p.head_dim, rows,
                 [=](int64_t i, int64_t d, Vec<Real> x, int64_t count) {
                   store_some(dquery + i * stride + d, x * scale, count);
                 });
    if (!to.dweights) continue;
    for (int64_t i = 0; i < rows.count; ++i) {
      *at<Real>(to.row_term, rows.batch, rows.head, rows.first + i) = w.row_term[block][i];
    }
  }
}

// Whether different heads or batches add to one mask gradient, so that they must not run at the
// same time.
inline bool mask_is_shared(const Problem& p, const BackwardArguments& to) {
  return to.dmask && ((to.dmask.stride[0] == 0 && p.batch > 1) ||
                      (to.dmask.stride[1] == 0 && p.query_heads > 1));
}

// What is written or read after a group's products; next: the group after it, or null.
template <typename T, typename Real>
Ahead after_group(const Problem& p, const BackwardArguments& to, const RowBlock& rows,
                  const RowBlock* next, bool writes_key_gradients) {
  Ahead after;
  after.add(upcoming_rows<T>(to.dquery, rows, p.head_dim));
  if (writes_key_gradients) {
    const int64_t keys = std::min(p.key_length, kTilesBeforeTheEnd * kKeys);
    after.add(upcoming_keys<T>(to.dkey, rows, 0, keys, p.head_dim));
    if (!to.dweights) after.add(upcoming_keys<T>(to.dvalue, rows, 0, keys, p.value_dim));
  }
  if (!next) return after;
  after.operand = first_keys<T>(p, *next, KeyRange(p, *next));
  after.add(upcoming_rows<T>(p.query, *next, p.head_dim));
  if (to.dweights) return after;
  after.add(upcoming_rows<T>(to.dout, *next, p.value_dim));
  after.add(upcoming_rows<T>(to.out, *next, p.value_dim));
  return after;
}

// One of `threads` threads' part of a pair: the groups of the heads that share a key head, in turns
// that change direction each time, since causal work grows from one to the next; or, under a shared
// mask gradient, groups with all of these heads. Pair `next_pair` comes after this one, if it
// exists.
template <typename T, typename Real, typename Element>
void backward_pair(const Problem& p, const BackwardArguments& to, int64_t pair, int64_t next_pair,
                   int64_t groups, int64_t thread, int64_t threads,
                   const PackedColumns<T, Element>& packed,
                   const BackwardWorkspace<Real, Element>& w) {
  const int64_t heads = p.query_heads / p.key_heads;
  const int64_t heads_at_once = mask_is_shared(p, to) ? heads : 1;
  const int64_t items = heads / heads_at_once * groups;
  std::fill(w.dkeys, w.dkeys + p.key_length * padded<Real>(p.head_dim), Real(0));
  std::fill(w.dvalues, w.dvalues + p.key_length * padded<Real>(p.value_dim), Real(0));
  const auto item_of = [&](int64_t turn) {
    return turn * threads + (turn % 2 ? threads - 1 - thread : thread);
  };
  const auto group_of = [&](int64_t of_pair, int64_t item, int64_t head) {
    const int64_t first_head = of_pair % p.key_heads * heads + item / groups;
    return RowGroup::make<Real>(p, of_pair / p.key_heads, first_head + head, item % groups, groups);
  };
  for (int64_t turn = 0; turn * threads < items; ++turn) {
    const int64_t item = item_of(turn), next_item = item_of(turn + 1);
    if (item >= items) continue;
    for (int64_t head = 0; head < heads_at_once; ++head) {
      const RowGroup group = group_of(pair, item, head);
      const bool last_head = head + 1 == heads_at_once, last = last_head && next_item >= items;
      const bool none = last && next_pair >= p.batch * p.key_heads;
      const RowGroup next = none        ? group
                            : last      ? group_of(next_pair, item_of(0), 0)
                            : last_head ? group_of(pair, next_item, 0)
                                        : group_of(pair, item, head + 1);
      const Ahead after = after_group<T, Real>(p, to, group.rows, none ? nullptr : &next.rows,
                                               last && threads == 1);
      backward_group<T>(p, to, group, packed, after, w);
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
      store_some(out + d, sum * scale, width - d);
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
  const int64_t heads = mask_is_shared(p, to) ? 1 : p.query_heads / p.key_heads;
  int64_t groups = (blocks + kGroupBlocks - 1) / kGroupBlocks;
  if (!by_pair) groups = std::max(groups, std::min(blocks, (threads + heads - 1) / heads));
  const PackedColumns<T, Element> packed(p, p.key, p.head_dim, groups);
  if (by_pair) {
    run_parallel(threads, [&] {
      const TileConfiguration tiles;
      packed.pack_all();
      BackwardWorkspace<Real, Element>* own = &parts[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
      for (int64_t pair = 0; pair < pairs; ++pair) {
        backward_pair(p, to, pair, pair + omp_get_num_threads(), groups, 0, 1, packed, *own);
        for (int64_t row = 0; row < p.key_length; ++row) {
          write_key_gradients<T>(p, to, pair, row, own, 1);
        }
      }
    });
    return;
  }
  run_parallel(threads, [&] {
    const TileConfiguration tiles;
    packed.pack_all();
    for (int64_t pair = 0; pair < pairs; ++pair) {
      // The team can be smaller than asked for; parts are numbered by the loop, not by the thread.
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) {
        backward_pair(p, to, pair, pair + 1, groups, part, threads, packed, parts[part]);
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < p.key_length; ++row) {
        write_key_gradients<T>(p, to, pair, row, parts.data(), threads);
      }
    }
  });
}
