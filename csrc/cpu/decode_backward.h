// Backward pass for the few query rows a key head of decode.h: keys and values are read once, and
// their gradients written once, since all the rows that see them are at hand.
//
//     P  = exp(S - lse)               dP = dO V^T, or dW
//     dS = P (dP - delta)             delta = sum(dO * O) - dlse, a value a row; 0 for dW
//     dV = P^T dO                     dK = scale dS^T Q               dQ += scale dS K
// The lanes are head dimensions, as in decode.h, and one work item is again a part of the keys of
// one (batch, key head); only dQ is a sum over parts, made in their order. Tested against
// backends/reference.py in tests/test_contract.py.

template <typename Real>
struct DecodedGradientsWorkspace {
  Real *queries, *douts;
  // Of kKeys keys: scores, which become weights, and dP, which becomes dS.
  Real *weights, *gradients, *derivative;

  DecodedGradientsWorkspace(Arena& arena, const Problem& p) {
    queries = arena.take<Real>(kDecodeRows * (p.head_dim + 2 * kLanes<Real>));
    douts = arena.take<Real>(kDecodeRows * (p.value_dim + 2 * kLanes<Real>));
    weights = arena.take<Real>(kDecodeRows * kKeys);
    gradients = arena.take<Real>(kDecodeRows * kKeys);
    derivative = arena.take<Real>(p.softcap != 0 ? kDecodeRows * kKeys : 0);
  }
};

// What one part of the keys adds to: dQ without its scale, and minus the row sums of dS.
template <typename Real>
struct DecodedGradients {
  Real *dqueries, *row_sum;

  DecodedGradients(Arena& arena, const Problem& p) {
    dqueries = arena.take<Real>(kDecodeRows * (p.head_dim + 2 * kLanes<Real>));
    row_sum = arena.take<Real>(kDecodeRows);
  }
};

// Gradients of keys or values, out[key] = factor * sum over rows of weights[r][key] rows_r; without
// the pairs whose score in `visible` is -inf, if it is given: 0 * NaN is NaN.
template <typename T, typename Real>
void write_sums_of_rows(int64_t keys, int64_t count, int64_t width, const Real* weights,
                        const Real* rows, const Real* visible, Real factor, T* out,
                        int64_t out_stride) {
  constexpr int64_t kW = kLanes<Real>, kStep = kColumns<T, Real>;
  const int64_t stride = place_count<T, Real>(width);
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t d = 0; d < width; d += kStep) {
      Vec<Real> sum[2] = {};
      for (int64_t r = 0; r < count; ++r) {
        const int64_t index = r * kKeys + j;
        if (visible && visible[index] == -kInfinity<Real>) continue;
        const Vec<Real> weight = broadcast(weights[index]);
        const Real* row = rows + r * stride + d;
        sum[0] += weight * load(row);
        if (kStep > kW) sum[1] += weight * load(row + kW);
      }
      store_columns(sum[0], sum[1], factor, width - d, out + j * out_stride + d);
    }
  }
}

// Adds a row's dS, of the scores with their mask, to the mask's gradient.
template <typename Real>
void add_to_mask_gradient(const View& dmask, const SharingRows& rows, int64_t r, int64_t key,
                          int64_t keys, const Real* gradients) {
  const auto add = [&](auto* to) {
    for (int64_t j = 0; j < keys; ++j) to[j * dmask.stride[3]] += gradients[j];
  };
  const int64_t batch = rows.batch, head = rows.head(r), row = rows.row(r);
  if (dmask.dtype == DType::kFloat64) return add(at<double>(dmask, batch, head, row, key));
  add(at<float>(dmask, batch, head, row, key));
}

template <typename Real>
struct DecodedRowTerms {
  Real lse[kDecodeRows], lse_rest[kDecodeRows], delta[kDecodeRows] = {};
};

// A row's scores become weights, and its dP, which dW is loaded as, becomes dS.
template <typename T, typename Real>
void decoded_score_gradients(const Problem& p, const BackwardArguments& to, const SharingRows& rows,
                             int64_t r, int64_t key, int64_t keys, Real factor,
                             const DecodedRowTerms<Real>& terms,
                             const DecodedGradientsWorkspace<Real>& w, Real* row_sum) {
  constexpr int64_t kW = kLanes<Real>;
  Real *weights = w.weights + r * kKeys, *gradients = w.gradients + r * kKeys;
  if (to.dweights) {
    const T* dweights = at<const T>(to.dweights, rows.batch, rows.head(r), rows.row(r), key);
    for (int64_t j = 0; j < keys; ++j) {
      gradients[j] =
          static_cast<Real>(to.dweights_scale) * to_float(dweights[j * to.dweights.stride[3]]);
    }
  }
  const Vec<Real> lse = broadcast(terms.lse[r]), lse_rest = broadcast(terms.lse_rest[r]), none{};
  Vec<Real> total{};
  for (int64_t j = 0; j < keys; j += kW) {
    const Vec<Real> s = load(weights + j);
    const Vec<Real> weight = weight_of<Real>(s, factor, lse, lse_rest);
    const Vec<Real> product = weight * (load(gradients + j) - terms.delta[r]);
    const Vec<Real> gradient = s == -kInfinity<Real> ? none : product;
    store<Real>(weights + j, weight);
    store<Real>(gradients + j, gradient);
    total += gradient;
  }
  *row_sum -= across_lanes<Real>(total, [&](Vec<Real> a, Vec<Real> b) { return a + b; })[0];
  if (to.dmask) add_to_mask_gradient(to.dmask, rows, r, key, keys, gradients);
  if (p.softcap == 0) return;
  const Real* derivative = w.derivative + r * kKeys;
  for (int64_t j = 0; j < keys; j += kW) {
    store<Real>(gradients + j, load(gradients + j) * load(derivative + j));
  }
}

template <int kShared, typename T, typename Real>
void decode_backward_part(const Problem& p, const BackwardArguments& to, const SharingRows& rows,
                          const KeyRange& range, bool first_part,
                          const DecodedGradientsWorkspace<Real>& w,
                          const DecodedGradients<Real>& part) {
  const int64_t batch = rows.batch, key_head = rows.key_head, count = rows.count;
  const int64_t filled = filled_rows<kShared>(rows), width = place_count<T, Real>(p.head_dim);
  DecodedRowTerms<Real> terms;
  load_sharing_rows<T>(p.query, rows, p.head_dim, query_factor<Real>(p), filled, w.queries);
  bool finite = all_finite<Real>(w.queries, width, count, width);
  if (!to.dweights) {
    load_sharing_rows<T>(to.dout, rows, p.value_dim, Real(1), filled, w.douts);
    const int64_t value_width = place_count<T, Real>(p.value_dim);
    finite = finite && all_finite<Real>(w.douts, value_width, count, value_width);
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t head = rows.head(r), row = rows.row(r);
    split_lse(*at<const Real>(to.lse, batch, head, row), terms.lse + r, terms.lse_rest + r);
    if (to.dweights) continue;
    terms.delta[r] = row_term<T, Real>(p, to, batch, head, row);
    if (to.row_term && first_part) *at<Real>(to.row_term, batch, head, row) = terms.delta[r];
  }
  std::fill(part.dqueries, part.dqueries + filled * width, Real(0));
  std::fill(part.row_sum, part.row_sum + kDecodeRows, Real(0));
  std::fill(w.gradients, w.gradients + filled * kKeys, Real(0));
  alignas(kVectorBytes) Real visible[kDecodeRows * kKeys];
  for (int64_t key = range.first; key < range.end; key += kKeys) {
    const int64_t keys = range.tile(key);
    const auto write_key_gradients = [&](int64_t of_rows, const Real* only) {
      write_sums_of_rows(keys, of_rows, p.head_dim, w.gradients, w.queries, only,
                         static_cast<Real>(std::abs(p.scale)), at<T>(to.dkey, batch, key_head, key),
                         to.dkey.stride[2]);
      if (to.dweights) return;
      write_sums_of_rows(keys, of_rows, p.value_dim, w.weights, w.douts, only, Real(1),
                         at<T>(to.dvalue, batch, key_head, key), to.dvalue.stride[2]);
    };
    if (tile_is_hidden<Real>(p, rows, key, keys)) {
      write_key_gradients(0, nullptr);
      continue;
    }
    const T *k = at<const T>(p.key, batch, key_head, key),
            *v = at<const T>(p.value, batch, key_head, key);
    const int64_t k_stride = p.key.stride[2], v_stride = p.value.stride[2];
    const T* next = key + kKeys < range.end ? k + kKeys * k_stride : k;
    const Stream<T> key_rows{k, k_stride, keys, p.head_dim, v, v_stride};
    const Stream<T> value_rows{v, v_stride, keys, p.value_dim, next, k_stride};
    dot_products<kShared>(key_rows, count, w.queries, w.weights);
    if (!to.dweights) dot_products<kShared>(value_rows, count, w.douts, w.gradients);
    bool any_hidden = false;
    Real factor = 1;  // the same for every row
    for (int64_t r = 0; r < count; ++r) {
      factor = finish_scores(p, rows, r, key, keys, w.weights + r * kKeys, &any_hidden,
                             p.softcap != 0 ? w.derivative + r * kKeys : nullptr);
    }
    const bool careful = any_hidden && !(finite && all_finite<Real>(k, k_stride, keys, p.head_dim));
    if (careful) std::copy(w.weights, w.weights + count * kKeys, visible);
    for (int64_t r = 0; r < count; ++r) {
      decoded_score_gradients<T>(p, to, rows, r, key, keys, factor, terms, w, part.row_sum + r);
    }
    if (!careful) {
      add_values<kShared, false>(key_rows, ReadAhead<T>(), count, w.gradients, part.dqueries);
    }
    for (int64_t r = 0; careful && r < count; ++r) {
      add_visible_values(k, k_stride, keys, p.head_dim, visible + r * kKeys,
                         w.gradients + r * kKeys, part.dqueries + r * width);
    }
    write_key_gradients(count, careful ? visible : nullptr);
  }
}

// Adds the parts of one key head, in their order, and writes its rows.
template <typename T, typename Real>
void write_decoded_gradients(const Problem& p, const BackwardArguments& to, const SharingRows& rows,
                             const std::vector<DecodedGradients<Real>>& parts) {
  const int64_t width = place_count<T, Real>(p.head_dim);
  for (int64_t r = 0; r < rows.count; ++r) {
    Real *sums = parts[0].dqueries + r * width, row_sum = parts[0].row_sum[r];
    for (size_t i = 1; i < parts.size(); ++i) {
      const Real* others = parts[i].dqueries + r * width;
      for (int64_t d = 0; d < width; d += kLanes<Real>) {
        store<Real>(sums + d, load(sums + d) + load(others + d));
      }
      row_sum += parts[i].row_sum[r];
    }
    const int64_t head = rows.head(r), row = rows.row(r);
    store_row(sums, static_cast<Real>(p.scale), p.head_dim,
              at<T>(to.dquery, rows.batch, head, row));
    if (to.dweights) *at<Real>(to.row_term, rows.batch, head, row) = row_sum;
  }
}

template <typename T, typename Real>
void decode_backward(const Problem& p, const BackwardArguments& to, int threads) {
  if (mask_is_shared(p, to)) threads = 1;
  // Of a mask that keys share, parts would add to one entry at the same time.
  const int64_t parts = to.dmask && to.dmask.stride[3] == 0 ? 1 : decoded_parts(p, threads);
  const KeyRange all(0, p.key_length);
  decode_in_parts<DecodedGradientsWorkspace<Real>, DecodedGradients<Real>>(
      p, parts, threads,
      [&](const SharingRows& rows, int64_t part, int64_t, const auto& w, const auto& result) {
        with_shared<Real>(rows.count, [&](auto shared) {
          decode_backward_part<shared, T>(p, to, rows, all.part(part, parts), part == 0, w, result);
        });
      },
      [&](const SharingRows& rows, const auto& results) {
        write_decoded_gradients<T, Real>(p, to, rows, results);
      });
}
