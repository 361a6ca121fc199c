// Backward pass for the few query rows a key head of decode.h: keys and values are read once, and
// their gradients written once, since all the rows that see them are at hand.
//
//     P  = exp2(S - lse)              dP = V dO^T, or dW
//     dS = P (dP - delta)             delta = sum(dO * O) - dlse, a value a row; 0 for dW
//     dV = P dO                       dK = scale dS Q                 dQ += scale dS^T K
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

// What one part of the keys adds to: dQ without its scale, and with dW the row sums of dS.
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

template <int kShared, typename T, typename Real>
void decode_backward_part(const Problem& p, const BackwardArguments& to, const SharingRows& rows,
                          const KeyRange& range, bool first_part,
                          const DecodedGradientsWorkspace<Real>& w,
                          const DecodedGradients<Real>& part) {
  constexpr int64_t kW = kLanes<Real>;
  const int64_t batch = rows.batch, key_head = rows.key_head, count = rows.count;
  const int64_t filled = filled_rows<kShared>(rows), width = place_count<T, Real>(p.head_dim);
  const KeyRange seen = decoded_keys(p);
  Real lse[kDecodeRows], lse_rest[kDecodeRows], delta[kDecodeRows] = {};
  load_sharing_rows<T>(p.query, rows, p.head_dim, query_factor<Real>(p), filled, w.queries);
  bool finite = all_finite<Real>(w.queries, width, count, width);
  if (!to.dweights) {
    load_sharing_rows<T>(to.dout, rows, p.value_dim, Real(1), filled, w.douts);
    const int64_t value_width = place_count<T, Real>(p.value_dim);
    finite = finite && all_finite<Real>(w.douts, value_width, count, value_width);
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t head = rows.head(r), row = rows.row(r);
    split_lse(*at<const Real>(to.lse, batch, head, row), lse + r, lse_rest + r);
    finite = finite && !std::isnan(lse[r]);
    if (to.dweights) continue;
    delta[r] = row_term<T, Real>(p, to, batch, head, row);
    if (to.row_term && first_part) *at<Real>(to.row_term, batch, head, row) = delta[r];
  }
  std::fill(part.dqueries, part.dqueries + filled * width, Real(0));
  std::fill(part.row_sum, part.row_sum + kDecodeRows, Real(0));
  std::fill(w.gradients, w.gradients + filled * kKeys, Real(0));
  alignas(kVectorBytes) Real visible[kDecodeRows * kKeys];
  for (int64_t key = range.first; key < range.end; key += kKeys) {
    const int64_t keys = range.tile(key);
    T *dkey = at<T>(to.dkey, batch, key_head, key), *dvalue = nullptr;
    if (!to.dweights) dvalue = at<T>(to.dvalue, batch, key_head, key);
    const int64_t dkey_stride = to.dkey.stride[2], dvalue_stride = to.dvalue.stride[2];
    if (key + keys <= seen.first || key >= seen.end || no_key_is_visible(p, batch, key, keys)) {
      write_sums_of_rows<T, Real>(keys, 0, p.head_dim, nullptr, nullptr, nullptr, Real(1), dkey,
                                  dkey_stride);
      if (dvalue) {
        write_sums_of_rows<T, Real>(keys, 0, p.value_dim, nullptr, nullptr, nullptr, Real(1),
                                    dvalue, dvalue_stride);
      }
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
      Real *weights = w.weights + r * kKeys, *gradients = w.gradients + r * kKeys;
      if (to.dweights) {
        const T* dweights = at<const T>(to.dweights, batch, rows.head(r), rows.row(r), key);
        for (int64_t j = 0; j < keys; ++j) {
          gradients[j] =
              static_cast<Real>(to.dweights_scale) * to_float(dweights[j * to.dweights.stride[3]]);
        }
      }
      Vec<Real> total{};
      for (int64_t j = 0; j < keys; j += kW) {
        const Vec<Real> s = load(weights + j), none{};
        const Vec<Real> weight =
            weight_of<Real>(s, factor, broadcast(lse[r]), broadcast(lse_rest[r]));
        const Vec<Real> product = weight * (load(gradients + j) - delta[r]);
        const Vec<Real> gradient = s == -kInfinity<Real> ? none : product;
        store<Real>(weights + j, weight);
        store<Real>(gradients + j, gradient);
        total += gradient;
      }
      part.row_sum[r] -=
          across_lanes<Real>(total, [&](Vec<Real> a, Vec<Real> b) { return a + b; })[0];
      if (to.dmask) add_to_mask_gradient(to.dmask, rows, r, key, keys, gradients);
      if (p.softcap == 0) continue;
      const Real* derivative = w.derivative + r * kKeys;
      for (int64_t j = 0; j < keys; j += kW) {
        store<Real>(gradients + j, load(gradients + j) * load(derivative + j));
      }
    }
    const Real* only = careful ? visible : nullptr;
    if (careful) {
      for (int64_t r = 0; r < count; ++r) {
        add_visible_values(k, k_stride, keys, p.head_dim, visible + r * kKeys,
                           w.gradients + r * kKeys, part.dqueries + r * width);
      }
    } else {
      add_values<kShared>(key_rows, static_cast<ReadAhead<T>*>(nullptr), count, w.gradients,
                          part.dqueries);
    }
    write_sums_of_rows(keys, count, p.head_dim, w.gradients, w.queries, only,
                       static_cast<Real>(std::abs(p.scale)), dkey, dkey_stride);
    if (dvalue) {
      write_sums_of_rows(keys, count, p.value_dim, w.weights, w.douts, only, Real(1), dvalue,
                         dvalue_stride);
    }
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
  // Of different heads, or of different keys: parts must not add to one entry at the same time.
  if (mask_is_shared(p, to) || (to.dmask && to.dmask.stride[3] == 0)) threads = 1;
  const int64_t heads = p.batch * p.key_heads, parts = decoded_parts(p, threads);
  const int64_t items = heads * parts;
  const KeyRange all(0, p.key_length);
  threads = static_cast<int>(std::clamp<int64_t>(items, 1, threads));
  const PerThread<DecodedGradientsWorkspace<Real>> workspaces(threads, p);
  const PerThread<DecodedGradients<Real>> decoded(static_cast<int>(parts > 1 ? items : threads), p);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    const auto w = workspaces.make(thread, p);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const SharingRows rows(p, item / parts);
      const auto part = decoded.make(parts > 1 ? static_cast<int>(item) : thread, p);
      with_shared<Real>(rows.count, [&](auto shared) {
        decode_backward_part<shared, T>(p, to, rows, all.part(item % parts, parts),
                                        item % parts == 0, w, part);
      });
      if (parts == 1) write_decoded_gradients<T, Real>(p, to, rows, {part});
    }
    if (parts > 1) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; ++head) {
        std::vector<DecodedGradients<Real>> own;
        for (int64_t part = 0; part < parts; ++part) {
          own.push_back(decoded.make(static_cast<int>(head * parts + part), p));
        }
        write_decoded_gradients<T>(p, to, SharingRows(p, head), own);
      }
    }
  }
}
