// The scores of one tile: computed, masked, and their weights dropped.
//
// compute_scores leaves s[key][row] so that `factor` times it is the score in units of log2,
// log2(e) times everything that the softmax sees, ready for exp2. The factor is positive, and is
// applied by whoever reads the scores, inside a multiply-add that it needs anyway.

template <typename Real, typename T>
bool all_finite(const T* rows, int64_t stride, int64_t count, int64_t width) {
  Vec<Real> sum{};  // of products with 0: NaN if anything was not finite
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += kLanes<Real>) {
      sum += load_some(rows + i * stride + d, width - d) * Real(0);
    }
  }
  return !any(sum != sum);
}

// Hide what lies beyond the window or the diagonal.
template <typename Real>
void apply_window(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys, Real* s) {
  alignas(kVectorBytes) Real places[kRows<Real>];  // of rows, after the block's first
  for (int64_t i = 0; i < kRows<Real>; ++i) {
    places[i] = static_cast<Real>(rows.row_of(i) - rows.row_of(0));
  }
  const Vec<Real> hidden = broadcast(-kInfinity<Real>);
  for (int64_t j = 0; j < keys; ++j) {
    // The rows in places lowest to highest see the key.
    const int64_t middle = key + j - rows.diagonal(p, 0);
    const Real lowest = static_cast<Real>(std::clamp<int64_t>(middle - p.right, 0, kRows<Real>));
    const Real highest = static_cast<Real>(std::clamp<int64_t>(middle + p.left, -1, kRows<Real>));
    for (int64_t v = 0; v < rows.vectors; ++v) {
      Real* score = s + j * kRows<Real> + v * kLanes<Real>;
      const Vec<Real> place = load(places + v * kLanes<Real>);
      Vec<Real> x = load(score);
      x = place < lowest ? hidden : x;
      store<Real>(score, place > highest ? hidden : x);
    }
  }
}

// s = softcap * tanh(factor * s) in log2 units; slope = the derivative of tanh, if wanted.
template <typename Real>
void apply_softcap(Real softcap, Real factor, const RowBlock& rows, int64_t keys, Real* s,
                   Real* slope) {
  const Real bound = softcap * static_cast<Real>(kLog2E);
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t v = 0; v < rows.vectors; ++v) {
      const int64_t index = j * kRows<Real> + v * kLanes<Real>;
      const Vec<Real> t = tanh<Real>(load(s + index) * factor);
      store<Real>(s + index, t * bound);
      if (slope) store<Real>(slope + index, Real(1) - t * t);
    }
  }
}

// s = factor * s - slope * distance from the diagonal, in log2 units.
template <typename Real>
void apply_alibi(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys, Real factor,
                 Real* s) {
  const Real slope =
      *at<const Real>(p.alibi_slopes, rows.batch, rows.head, 0) * static_cast<Real>(kLog2E);
  const Vec<Real> lane = lane_index<Real>();
  for (int64_t j = 0; j < keys; ++j) {
    const Real offset = static_cast<Real>(rows.first + p.diagonal - key - j);
    for (int64_t v = 0; v < rows.vectors; ++v) {
      Real* score = s + j * kRows<Real> + v * kLanes<Real>;
      const Vec<Real> distance = lane + (offset + static_cast<Real>(v * kLanes<Real>));
      store<Real>(score, load(score) * factor - slope * simd_max<Real>(distance, -distance));
    }
  }
}

// What queries are multiplied with when they are packed: the scale's sign, so that the factor on
// the scores is positive and maxima are maxima; 0 if the scale is 0.
template <typename Real>
inline Real query_factor(const Problem& p) {
  return p.scale > 0 ? Real(1) : p.scale < 0 ? Real(-1) : Real(0);
}

// |scale|, and the factor that takes scores to log2 units; positive, so that -inf stays -inf.
inline double absolute_scale(const Problem& p) { return p.scale == 0 ? 1 : std::abs(p.scale); }
template <typename Real>
inline Real log2_factor(const Problem& p) {
  return std::max(static_cast<Real>(absolute_scale(p) * kLog2E), std::numeric_limits<Real>::min());
}

// The largest of `keys` scores of a vector of rows, the first of which s points to.
template <typename Real>
Vec<Real> maximum_of_vector(int64_t keys, const Real* s) {
  Vec<Real> a = broadcast(-kInfinity<Real>), b = a, c = a, d = a;  // independent chains
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4) {
    const Real* first = s + j * kRows<Real>;
    a = simd_max<Real>(load(first), a);
    b = simd_max<Real>(load(first + kRows<Real>), b);
    c = simd_max<Real>(load(first + 2 * kRows<Real>), c);
    d = simd_max<Real>(load(first + 3 * kRows<Real>), d);
  }
  for (; j < keys; ++j) a = simd_max<Real>(load(s + j * kRows<Real>), a);
  return simd_max<Real>(simd_max<Real>(a, c), simd_max<Real>(b, d));
}

// top[row] = the largest score of each row.
template <typename Real>
void find_maxima(const RowBlock& rows, int64_t keys, const Real* s, Real* top) {
  for (int64_t lane = 0; lane < rows.vectors * kLanes<Real>; lane += kLanes<Real>) {
    store<Real>(top + lane, maximum_of_vector<Real>(keys, s + lane));
  }
}

// What a tile's products lack to be scores in s[key][row], -inf where hidden. Returns the factor
// that takes them to log2 units. `top`, if wanted: each row's largest product, which becomes its
// largest score; `slope`: the softcap's derivative.
template <typename Real>
Real finish_scores(const Problem& p, const RowBlock& rows, TileKind kind, int64_t key, int64_t keys,
                   Real* s, Real* top = nullptr, Real* slope = nullptr) {
  const double scale = absolute_scale(p);
  Real factor = log2_factor<Real>(p);
  if (p.softcap != 0) {
    apply_softcap(static_cast<Real>(p.softcap), static_cast<Real>(scale / p.softcap), rows, keys, s,
                  slope);
    factor = 1;
  }
  if (p.alibi_slopes) {
    apply_alibi(p, rows, key, keys, factor, s);
    factor = 1;
  }
  if (kind != TileKind::kEdge) {
    if (top && (p.softcap != 0 || p.alibi_slopes)) find_maxima(rows, keys, s, top);
    return factor;
  }
  alignas(kVectorBytes) Real masked_top[kRows<Real>];
  bool found = false;
  for (const View* mask : {&p.mask, &p.key_mask}) {
    if (!*mask) continue;
    apply_mask(*mask, rows, key, keys, factor, s, masked_top);
    factor = 1, found = true;
  }
  if (beyond_window(p, rows, key, keys)) {
    apply_window(p, rows, key, keys, s);
    found = false;
  }
  if (!top) return factor;
  if (found) {
    std::copy_n(masked_top, kRows<Real>, top);
  } else {
    find_maxima(rows, keys, s, top);
  }
  return factor;
}

// Elements along head_dim.
template <typename Element>
int64_t score_depth(const Problem& p) {
  return (p.head_dim + kDepth<Element> - 1) / kDepth<Element>;
}

// Scores of one tile, as finish_scores leaves them, and hidden ones up to whole_keys; `top`: each
// row's largest score, if wanted; `multiply_into`: makes the products, of whole_keys.
template <typename Real, typename Multiply>
Real scores_of_products(const Problem& p, const RowBlock& rows, TileKind kind, int64_t key,
                        int64_t keys, Real* s, Ahead ahead, Real* top, Real* slope,
                        Multiply multiply_into) {
  if (top) std::fill(top, top + kRows<Real>, -kInfinity<Real>);
  ahead.add(next_entries<Real>(p, rows, key + keys, keys));
  const int64_t whole = whole_keys(keys);
  // Products of what is missing are 0, which may be more than any score.
  Real* top_of_products = kProductsFindMaxima && whole == keys ? top : nullptr;
  multiply_into(whole, Into<Real>{s, kRows<Real>, false, nullptr, top_of_products, &ahead});
  const Real factor = finish_scores(p, rows, kind, key, keys, s, top_of_products, slope);
  if (top != top_of_products) find_maxima(rows, keys, s, top);
  std::fill(s + keys * kRows<Real>, s + whole * kRows<Real>, -kInfinity<Real>);
  return factor;
}

// The same, of a tile's keys k; `operand`: what is multiplied after this; `keys_pass`: see
// forward.h.
template <typename Element, typename Real>
Real compute_scores(const Problem& p, const RowBlock& rows, TileKind kind, int64_t key,
                    int64_t keys, const Element* queries, const Element* k, int64_t k_stride,
                    Real* s, const Ahead& ahead = {}, Real* top = nullptr, Real* slope = nullptr,
                    bool keys_pass = false) {
  return scores_of_products(p, rows, kind, key, keys, s, ahead, top, slope,
                            [&](int64_t whole, Into<Real> into) {
                              into.a_passes = keys_pass;
                              multiply<false>(whole, rows.vectors, score_depth<Element>(p), k,
                                              k_stride, queries, kRows<Real>, into);
                            });
}

// The random bytes of a block's rows for eight of 32 columns, and what they must reach; philox.h
// has the pattern.
template <typename Real>
struct RandomRows {
  static constexpr int64_t kOctet = 8, kMost = kRows<Real> + 2 * (kRandomRows + kWordLanes);
  alignas(kVectorBytes) uint32_t words[2][kMost], least[kMost];  // of each row, from `aligned` on

  // Of `count` rows from the absolute row `aligned` on, which kRandomRows divides.
  void make(const Problem& p, uint32_t head, uint32_t aligned, int64_t count,
            uint32_t column_word) {
    constexpr int64_t kCalls = kWordLanes / 2;  // at once: up to an octet
    using Bits = typename IntegersOf<uint32_t, kCalls>::Type;
    WideWords lane;
    for (int i = 0; i < kCalls; ++i) lane[i] = static_cast<uint64_t>(i);
    const int64_t calls = (count + kRandomRows - 1) / kRandomRows * kOctet;
    const uint64_t last_word = ~uint32_t{0} / 2;  // rows start again after 2^32
    for (int64_t call = 0; call < calls; call += kCalls) {
      const uint64_t first = aligned / 2 + static_cast<uint64_t>(call);
      WideWords random[4] = {WideWords{} + column_word, (lane + first) & last_word,
                             WideWords{} + head, WideWords{} + p.offset};
      philox(random, p.philox_keys,
             [](WideWords a, uint32_t constant, WideWords* high, WideWords* low) {
               *low = multiply_words(a, constant), *high = *low >> 32;
             });
      Bits bits[4];
      for (int i = 0; i < 4; ++i) bits[i] = __builtin_convertvector(random[i], Bits);
      const Bits mixed = bits[0] ^ bits[1] ^ bits[2] ^ bits[3];
      const Bits up = reinterpret_cast<Bits>(mixed < Bits{} + (p.dropout_threshold << 8));
      const Bits bound = (p.dropout_threshold >> 24) - up;  // true is -1
      const int64_t row = call / kOctet * kRandomRows + call % kOctet;
      for (int64_t octet = 0; octet < 2; ++octet) {
        const auto copy = [&](const Bits& from, uint32_t* to) {
          std::memcpy(to + row + kOctet * octet, &from, sizeof(from));
        };
        copy(bits[2 * octet], words[0]);
        copy(bits[2 * octet + 1], words[1]);
        copy(bound, least);
      }
    }
  }
};

// keep[key][row] = 1 / (1 - dropout_p) where the weight is kept, else 0, and 0 up to whole_keys.
template <typename Real>
void dropout_factors(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys,
                     Real* keep) {
  const Real factor = static_cast<Real>(1.0 / (1.0 - p.dropout_p));
  const uint32_t head = static_cast<uint32_t>(rows.batch * p.query_heads + rows.head);
  const uint32_t first_row = static_cast<uint32_t>(p.query_start + rows.first);
  const uint32_t first_column = static_cast<uint32_t>(p.key_start + key);
  const int64_t above = first_row % kRandomRows, before = first_column % kRandomColumns;
  const int64_t count = rows.vectors * kLanes<Real>;
  std::fill(keep + keys * kRows<Real>, keep + whole_keys(keys) * kRows<Real>, Real(0));
  RandomRows<Real> random;
  for (int64_t start = -before; start < keys; start += kRandomColumns) {
    for (int64_t pair = 0; pair < 8; pair += 2) {
      const uint32_t column = first_column + static_cast<uint32_t>(start + pair);
      random.make(p, head, first_row - above, above + count,
                  RandomByte::of(first_row, column).column_word);
      for (int64_t lane = 0; lane < count; lane += kLanes<Real>) {
        const Bytes32<Real> least = load_items<Bytes32<Real>>(random.least + above + lane);
#pragma GCC unroll 8
        for (int64_t i = 0; i < 8; ++i) {
          const int64_t j = start + pair + i / 2 * 8 + i % 2;
          if (j < 0 || j >= keys) continue;
          const Bytes32<Real> word = load_items<Bytes32<Real>>(random.words[i / 4] + above + lane);
          store<Real>(keep + j * kRows<Real> + lane,
                      where_not_below<Real>(word >> (i % 4 * 8) & 255, least, factor));
        }
      }
    }
  }
}

// hidden[key][row]: which pairs the masks forbid, for the products that leave these out.
template <typename Real>
void record_hidden(const Real* s, int64_t keys, uint8_t* hidden) {
  for (int64_t i = 0; i < keys * kRows<Real>; ++i) hidden[i] = s[i] == -kInfinity<Real>;
}
