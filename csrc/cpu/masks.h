// Masks: which tiles they hide or leave as they are, and what they do to the scores of the others.
//
// A mask is read where it lies, along the keys; scores lie [key][row], so that entries which differ
// from row to row are transposed on their way. Tested against backends/reference.py in
// tests/test_contract.py.

// `count` entries of a mask along the keys, in log2 units; -inf where it forbids, by -inf or by
// about the lowest float. Lanes beyond hold anything.
template <typename Real, typename T>
inline Vec<Real> mask_entries(const T* from, int64_t stride, int64_t count) {
  T neighbours[kLanes<Real>];
  if (stride != 1) {
    for (int64_t j = 0; j < count; ++j) neighbours[j] = from[j * stride];
    from = neighbours;
  }
  if constexpr (std::is_same_v<T, uint8_t>) {
    const Vec<Real> seen{}, hidden = broadcast(-kInfinity<Real>);
    return widen<Real>(load_items<Bytes<Real>>(from, count)) != 0 ? seen : hidden;
  } else {
    const Vec<Real> entries = load_some(from, count) * Real(kLog2E);
    if constexpr (sizeof(Real) == 4) return entries;  // below the lowest float is -inf
    return entries < Real(std::numeric_limits<float>::lowest()) ? broadcast(-kInfinity<Real>)
                                                                : entries;
  }
}

// A forbidden pair's score is -inf whatever it was: by selection, since NaN - inf is NaN. Returns
// the scores.
template <typename Real>
inline Vec<Real> add_entry(Real factor, Vec<Real> entry, Real* score) {
  const Vec<Real> sum = load(score) * factor + entry;
  const Vec<Real> masked = entry == -kInfinity<Real> ? entry : sum;
  store<Real>(score, masked);
  return masked;
}

// The same for a square of a bool mask, keys from `key` on of each row, which is transposed while
// its entries are bytes. `top` becomes the larger one of itself and the scores.
template <typename Real>
void hide_square(const uint8_t* const* mask, int64_t key, Real factor, Real* s, Vec<Real>& top) {
  constexpr int64_t kW = kLanes<Real>;
  const Vec<Real> hidden = broadcast(-kInfinity<Real>);
  Bytes<Real> square[kW];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kW; ++i) square[i] = load_items<Bytes<Real>>(mask[i] + key);
  transpose_square<kW>(square);
#pragma GCC unroll 16
  for (int64_t j = 0; j < kW; ++j) {
    Real* score = s + j * kRows<Real>;
    const Vec<Real> masked = widen<Real>(square[j]) != 0 ? load(score) * factor : hidden;
    store<Real>(score, masked);
    top = simd_max<Real>(masked, top);
  }
}

// s = factor * s + mask for every row. `top` becomes each row's largest score.
template <typename T, typename Real>
void apply_mask_of(const View& mask, const RowBlock& rows, int64_t key, int64_t keys, Real factor,
                   Real* s, Real* top) {
  constexpr int64_t kW = kLanes<Real>;
  const int64_t column = mask.stride[3];
  const bool same = same_for_all_rows(mask, rows);
  const T* from[kRows<Real>];
  for (int64_t i = 0; i < (same ? 1 : rows.count); ++i)
    from[i] = row_at<const T>(mask, rows, i, key);
  Vec<Real> tops[kBlockVectors];
  for (Vec<Real>& lanes : tops) lanes = broadcast(-kInfinity<Real>);
  for (int64_t j0 = 0; j0 < keys; j0 += kW) {
    const int64_t count = std::min(kW, keys - j0);
    Real* block = s + j0 * kRows<Real>;
    if (same) {
      const Vec<Real> entries = mask_entries<Real>(from[0] + j0 * column, column, count);
      for (int64_t j = 0; j < count; ++j) {
        const Vec<Real> entry = broadcast<Real>(entries[j]);
        for (int64_t v = 0; v < rows.vectors; ++v) {
          tops[v] =
              simd_max<Real>(add_entry(factor, entry, block + j * kRows<Real> + v * kW), tops[v]);
        }
      }
      continue;
    }
    for (int64_t first = 0; first < rows.count; first += kW) {
      const int64_t row_count = std::min(kW, rows.count - first);
      const T* const* row = from + first;
      const bool whole = row_count == kW && count == kW && column == 1;
      Vec<Real>& lanes = tops[first / kW];
      if constexpr (std::is_same_v<T, uint8_t>) {
        if (whole) {
          hide_square(row, j0, factor, block + first, lanes);
          continue;
        }
      }
      Vec<Real> square[kW];
      if (whole) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kW; ++i) square[i] = mask_entries<Real>(row[i] + j0, 1, kW);
        transpose<Real>(square);
#pragma GCC unroll 16
        for (int64_t j = 0; j < kW; ++j) {
          lanes =
              simd_max<Real>(add_entry(factor, square[j], block + j * kRows<Real> + first), lanes);
        }
        continue;
      }
      for (int64_t i = 0; i < kW; ++i) {
        square[i] =
            i < row_count ? mask_entries<Real>(row[i] + j0 * column, column, count) : Vec<Real>{};
      }
      transpose<Real>(square);
      for (int64_t j = 0; j < count; ++j) {
        lanes =
            simd_max<Real>(add_entry(factor, square[j], block + j * kRows<Real> + first), lanes);
      }
    }
  }
  for (int64_t v = 0; v < kBlockVectors; ++v) store<Real>(top + v * kW, tops[v]);
}

// Runs `call` with a value of the type of a mask's entries; bytes are bools.
template <typename Real, typename Call>
void with_mask_type(DType dtype, Call call) {
  if (dtype == DType::kBool) return call(uint8_t{});
  if constexpr (std::is_same_v<Real, float>) {
    if (dtype == DType::kBFloat16) return call(BFloat16{});
    if (dtype == DType::kFloat16) return call(Float16{});
  }
  call(Real{});  // no other float goes with a float64
}

template <typename Real>
void apply_mask(const View& mask, const RowBlock& rows, int64_t key, int64_t keys, Real factor,
                Real* s, Real* top) {
  with_mask_type<Real>(mask.dtype, [&](auto type) {
    apply_mask_of<decltype(type)>(mask, rows, key, keys, factor, s, top);
  });
}

// A mask's entries for the next `keys` keys, as its rows are too far apart for the processor to
// guess.
template <typename Real>
Upcoming next_entries(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys) {
  const int64_t width = std::min(keys, p.key_length - key);
  if (!p.mask || p.mask.stride[2] == 0 || p.mask.stride[3] != 1 || width <= 0) return {};
  Upcoming next;
  with_mask_type<Real>(p.mask.dtype, [&](auto type) {
    next = upcoming_rows<decltype(type)>(p.mask, rows, width, key);
  });
  return next;
}

enum class TileKind { kSkip, kFull, kEdge };

// What a bool mask says of a tile: one look at each of its bytes, which are 0 or 1.
inline TileKind look_at_bools(const View& mask, const RowBlock& rows, int64_t key, int64_t keys) {
  const int64_t count = same_for_all_rows(mask, rows) ? 1 : rows.count, column = mask.stride[3];
  Words any_of_many{}, all_of_many = Words{} + 0x01010101u;
  constexpr uint64_t kOnes = 0x0101010101010101u;
  uint64_t any_of_some = 0, all_of_some = kOnes;
  uint8_t any = 0, all = 1;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* row = row_at<const uint8_t>(mask, rows, i, key);
    int64_t j = 0;
    for (; column == 1 && j + kVectorBytes <= keys; j += kVectorBytes) {
      Words many;
      std::memcpy(&many, row + j, sizeof(many));
      any_of_many |= many, all_of_many &= many;
    }
    for (; column == 1 && j + 8 <= keys; j += 8) {
      uint64_t some;
      std::memcpy(&some, row + j, sizeof(some));
      any_of_some |= some, all_of_some &= some;
    }
    for (; j < keys; ++j) any |= row[j * column], all &= row[j * column];
  }
  for (int lane = 0; lane < kWordLanes; ++lane) {
    any |= any_of_many[lane] != 0, all &= all_of_many[lane] == 0x01010101u;
  }
  any |= any_of_some != 0, all &= all_of_some == kOnes;
  return all ? TileKind::kFull : any ? TileKind::kEdge : TileKind::kSkip;
}

// What a mask of floats says of it: as many looks as it takes to see that it does something else
// than to hide all pairs or to add 0 to all.
template <typename Real, typename T>
TileKind look_at_floats(const View& mask, const RowBlock& rows, int64_t key, int64_t keys) {
  using IntVec = typename VecOf<Real>::IntType;
  constexpr int64_t kW = kLanes<Real>;
  const int64_t count = same_for_all_rows(mask, rows) ? 1 : rows.count, column = mask.stride[3];
  const IntVec hidden = reinterpret_cast<IntVec>(broadcast(-kInfinity<Real>));
  bool full = true, skip = true;
  for (int64_t i = 0; i < count && (full || skip); ++i) {
    const T* row = row_at<const T>(mask, rows, i, key);
    IntVec from_zero{}, from_hidden{};  // the bits in which any entry differs
    const auto compare = [&](Vec<Real> entries) {
      const IntVec bits = reinterpret_cast<IntVec>(entries);
      from_zero |= bits, from_hidden |= bits ^ hidden;
    };
    int64_t j = 0;
    for (; column == 1 && j + kW <= keys; j += kW) compare(mask_entries<Real>(row + j, 1, kW));
    for (; j < keys; j += kW) {
      const Vec<Real> count = broadcast(static_cast<Real>(keys - j));
      const Vec<Real> entries =
          mask_entries<Real>(row + j * column, column, std::min(kW, keys - j));
      compare(lane_index<Real>() < count ? entries : broadcast(entries[0]));
    }
    full = full && !any((from_zero << 1) != 0);  // -0 is 0
    skip = skip && !any(from_hidden != 0);
  }
  return full ? TileKind::kFull : skip ? TileKind::kSkip : TileKind::kEdge;
}

template <typename Real>
TileKind look_at_mask(const View& mask, const RowBlock& rows, int64_t key, int64_t keys) {
  TileKind kind = TileKind::kEdge;
  with_mask_type<Real>(mask.dtype, [&](auto type) {
    if constexpr (std::is_same_v<decltype(type), uint8_t>) {
      kind = look_at_bools(mask, rows, key, keys);
    } else {
      kind = look_at_floats<Real, decltype(type)>(mask, rows, key, keys);
    }
  });
  return kind;
}

// Whether any of a tile lies beyond the window or the diagonal.
inline bool beyond_window(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys) {
  const int64_t low = rows.diagonal(p, 0), high = rows.diagonal(p, rows.count - 1);
  return key + keys - 1 > low + p.right || key < high - p.left;
}

// Skip, Full or Edge, by position and masks; only an Edge tile tests an index or a mask again.
template <typename Real>
TileKind classify(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys) {
  const int64_t low = rows.diagonal(p, 0), high = rows.diagonal(p, rows.count - 1);
  if (key > high + p.right || key + keys - 1 < low - p.left) return TileKind::kSkip;
  bool edge = beyond_window(p, rows, key, keys);
  for (const View* mask : {&p.key_mask, &p.mask}) {
    if (!*mask) continue;
    const TileKind kind = look_at_mask<Real>(*mask, rows, key, keys);
    if (kind == TileKind::kSkip) return kind;
    edge |= kind == TileKind::kEdge;
  }
  return edge ? TileKind::kEdge : TileKind::kFull;
}
