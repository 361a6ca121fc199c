// One tile of scores, 64 keys by one block of query rows: how it is packed, masked and dropped.
//
// Scores lie transposed, s[key][row]: the lanes of a vector are query rows, so that a softmax over
// keys needs no shuffle. They are kept in units of log2: s * log2(e), ready for exp2.

constexpr int64_t kKeys = 64;
template <typename Real>
constexpr int64_t kRows = 3 * kLanes<Real>;  // query rows in a block: 48, 24 or 12 floats

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;
template <typename Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

template <typename Real>
inline int64_t padded(int64_t n) {
  return (n + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
}

template <typename T>
inline T* at(const View& view, int64_t b, int64_t h, int64_t row, int64_t column = 0) {
  return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[1] +
         row * view.stride[2] + column * view.stride[3];
}

// The query rows [first, first + count) of one head.
struct RowBlock {
  int64_t batch, head, key_head, first;
  int64_t count;    // rows that exist
  int64_t vectors;  // vectors that hold them

  template <typename Real>
  static RowBlock make(const Problem& p, int64_t batch, int64_t head, int64_t block) {
    RowBlock rows;
    rows.batch = batch, rows.head = head, rows.key_head = head / (p.query_heads / p.key_heads);
    rows.first = block * kRows<Real>;
    rows.count = std::min(kRows<Real>, p.query_length - rows.first);
    rows.vectors = padded<Real>(rows.count) / kLanes<Real>;
    return rows;
  }
};

// Keys [first, end) that any of the rows may see by position; first is a multiple of kKeys.
struct KeyRange {
  int64_t first, end;

  KeyRange(const Problem& p, const RowBlock& rows) {
    const int64_t diagonal = rows.first + p.diagonal;
    first = std::max<int64_t>(0, diagonal - p.left) / kKeys * kKeys;
    end = std::clamp<int64_t>(diagonal + rows.count + p.right, 0, p.key_length);
  }
};

enum class TileKind { kSkip, kFull, kEdge };

// What the bool mask says of a tile: one look at each of its bytes.
inline TileKind look_at_mask(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys) {
  const View& mask = p.mask;
  const int64_t count = mask.stride[2] == 0 ? 1 : rows.count;
  uint8_t any = 0, all = 1;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* row = at<const uint8_t>(mask, rows.batch, rows.head, rows.first + i, key);
    if (mask.stride[3] == 1) {
      for (int64_t j = 0; j < keys; ++j) any |= row[j], all &= row[j];
    } else {
      for (int64_t j = 0; j < keys; ++j)
        any |= row[j * mask.stride[3]], all &= row[j * mask.stride[3]];
    }
  }
  return all ? TileKind::kFull : any ? TileKind::kEdge : TileKind::kSkip;
}

inline TileKind look_at_key_mask(const Problem& p, int64_t batch, int64_t key, int64_t keys) {
  const uint8_t* mask = at<const uint8_t>(p.key_mask, batch, 0, 0, key);
  bool any = false, all = true;
  for (int64_t j = 0; j < keys; ++j) {
    any |= mask[j * p.key_mask.stride[3]] != 0;
    all &= mask[j * p.key_mask.stride[3]] != 0;
  }
  return all ? TileKind::kFull : any ? TileKind::kEdge : TileKind::kSkip;
}

// Skip, Full or Edge, by position and masks; only an Edge tile tests an index or a mask again.
inline TileKind classify(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys) {
  const int64_t low = rows.first + p.diagonal, high = low + rows.count - 1;
  if (key > high + p.right || key + keys - 1 < low - p.left) return TileKind::kSkip;
  bool edge = key + keys - 1 > low + p.right || key < high - p.left;
  if (p.key_mask) {
    const TileKind kind = p.key_mask.dtype == DType::kBool
                              ? look_at_key_mask(p, rows.batch, key, keys)
                              : TileKind::kEdge;
    if (kind == TileKind::kSkip) return kind;
    edge |= kind == TileKind::kEdge;
  }
  if (p.mask) {
    const TileKind kind =
        p.mask.dtype == DType::kBool ? look_at_mask(p, rows, key, keys) : TileKind::kEdge;
    if (kind == TileKind::kSkip) return kind;
    edge |= kind == TileKind::kEdge;
  }
  return edge ? TileKind::kEdge : TileKind::kFull;
}

// packed[d][row] = factor * rows' values, transposed; rows beyond the last are 0.
template <typename T, typename Real>
void pack_transposed(const View& view, const RowBlock& rows, int64_t width, Real factor,
                     Real* packed, Real* row_buffer) {
  constexpr int64_t kStride = kRows<Real>;
  for (int64_t i = 0; i < rows.count; ++i) {
    convert_row(at<const T>(view, rows.batch, rows.head, rows.first + i), row_buffer, width);
    for (int64_t d = 0; d < width; ++d) packed[d * kStride + i] = row_buffer[d] * factor;
  }
  for (int64_t d = 0; d < width; ++d) {
    for (int64_t i = rows.count; i < kStride; ++i) packed[d * kStride + i] = 0;
  }
}

// Rows as a row-major block in the compute type. Where they already are one, in place: `scratch` is
// used for a conversion, or to pad rows to whole vectors with zeros if `pad`.
template <typename T, typename Real>
const Real* as_block(const T* from, int64_t from_stride, int64_t count, int64_t width, bool pad,
                     Real* scratch, int64_t* stride) {
  if constexpr (std::is_same_v<T, Real>) {
    if (!pad || width % kLanes<Real> == 0) {
      *stride = from_stride;
      return from;
    }
  }
  *stride = padded<Real>(width);
  for (int64_t i = 0; i < count; ++i) {
    Real* to = scratch + i * *stride;
    convert_row(from + i * from_stride, to, width);
    for (int64_t d = width; d < *stride; ++d) to[d] = 0;
  }
  return scratch;
}

template <typename Real>
bool all_finite(const Real* block, int64_t stride, int64_t count, int64_t width) {
  Real probe = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Real* row = block + i * stride;
    Vec<Real> sum{};
    int64_t d = 0;
    for (; d + kLanes<Real> <= width; d += kLanes<Real>) sum += load(row + d) * Real(0);
    for (; d < width; ++d) probe += row[d] * Real(0);
    for (int lane = 0; lane < kLanes<Real>; ++lane) probe += sum[lane];
  }
  return probe == 0;
}

template <typename Real>
inline Real load_mask(const View& view, int64_t index) {
  switch (view.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(view.data)[index];
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(view.data)[index]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(view.data)[index]);
    default:
      return static_cast<Real>(static_cast<const double*>(view.data)[index]);
  }
}

// s + mask in log2 units, or -inf where the mask is false or -inf.
template <typename Real>
inline Real masked_score(Real score, const View& mask, int64_t index) {
  if (mask.dtype == DType::kBool) {
    return static_cast<const uint8_t*>(mask.data)[index] ? score : -kInfinity<Real>;
  }
  const Real addend = load_mask<Real>(mask, index);
  return addend == -kInfinity<Real> ? addend : score + addend * Real(kLog2E);
}

// Add or apply a mask to every row of s; a mask with row stride 0 is one value a key.
template <typename Real>
void apply_mask(const View& mask, const RowBlock& rows, int64_t key, int64_t keys, Real* s) {
  const int64_t base = rows.batch * mask.stride[0] + rows.head * mask.stride[1] +
                       rows.first * mask.stride[2] + key * mask.stride[3];
  if (mask.stride[2] == 0) {
    for (int64_t j = 0; j < keys; ++j) {
      const Real addend = masked_score(Real(0), mask, base + j * mask.stride[3]);
      Real* row = s + j * kRows<Real>;
      for (int64_t i = 0; i < kRows<Real>; i += kLanes<Real>) {
        const Vec<Real> hidden = broadcast(addend);
        store<Real>(row + i, addend == -kInfinity<Real> ? hidden : load(row + i) + addend);
      }
    }
    return;
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = base + i * mask.stride[2];
    for (int64_t j = 0; j < keys; ++j) {
      Real* score = s + j * kRows<Real> + i;
      *score = masked_score(*score, mask, row + j * mask.stride[3]);
    }
  }
}

// Hide what lies beyond the window or the diagonal.
template <typename Real>
void apply_window(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys, Real* s) {
  const Vec<Real> lane = lane_index<Real>();
  const Vec<Real> hidden = broadcast(-kInfinity<Real>);
  for (int64_t j = 0; j < keys; ++j) {
    // Row i of the block sees the key if lowest <= i <= highest.
    const int64_t middle = key + j - p.diagonal - rows.first;
    const Real lowest = static_cast<Real>(std::clamp<int64_t>(middle - p.right, 0, kRows<Real>));
    const Real highest = static_cast<Real>(std::clamp<int64_t>(middle + p.left, -1, kRows<Real>));
    for (int64_t v = 0; v < rows.vectors; ++v) {
      Real* score = s + j * kRows<Real> + v * kLanes<Real>;
      const Vec<Real> row = lane + static_cast<Real>(v * kLanes<Real>);
      Vec<Real> x = load(score);
      x = row < lowest ? hidden : x;
      store<Real>(score, row > highest ? hidden : x);
    }
  }
}

// s = softcap * tanh(s / softcap), where s holds s / softcap; slope = the derivative, if wanted.
template <typename Real>
void apply_softcap(Real softcap, const RowBlock& rows, int64_t keys, Real* s, Real* slope) {
  const Real factor = softcap * static_cast<Real>(kLog2E);
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t v = 0; v < rows.vectors; ++v) {
      const int64_t index = j * kRows<Real> + v * kLanes<Real>;
      const Vec<Real> t = tanh<Real>(load(s + index));
      store<Real>(s + index, t * factor);
      if (slope) store<Real>(slope + index, Real(1) - t * t);
    }
  }
}

template <typename Real>
void apply_alibi(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys, Real* s) {
  const Real slope =
      *at<const Real>(p.alibi_slopes, rows.batch, rows.head, 0) * static_cast<Real>(kLog2E);
  const Vec<Real> lane = lane_index<Real>();
  for (int64_t j = 0; j < keys; ++j) {
    const Real offset = static_cast<Real>(rows.first + p.diagonal - key - j);
    for (int64_t v = 0; v < rows.vectors; ++v) {
      Real* score = s + j * kRows<Real> + v * kLanes<Real>;
      const Vec<Real> distance = lane + (offset + static_cast<Real>(v * kLanes<Real>));
      store<Real>(score, load(score) - slope * simd_max<Real>(distance, -distance));
    }
  }
}

// What query is multiplied with before the product with the keys, so that scores come out in log2
// units (or as s / softcap).
template <typename Real>
inline Real query_factor(const Problem& p) {
  return static_cast<Real>(p.softcap != 0 ? p.scale / p.softcap : p.scale * kLog2E);
}

// Scores of one tile: s[key][row] = log2(e) * (everything that the softmax sees), -inf where
// hidden.
template <typename Real>
void compute_scores(const Problem& p, const RowBlock& rows, TileKind kind, int64_t key,
                    int64_t keys, const Real* queries, const Real* k, int64_t k_stride, Real* s,
                    Real* slope) {
  multiply<false>(keys, rows.vectors, p.head_dim, k, k_stride, queries, kRows<Real>, s, kRows<Real>,
                  false);
  if (p.softcap != 0) apply_softcap(static_cast<Real>(p.softcap), rows, keys, s, slope);
  if (p.alibi_slopes) apply_alibi(p, rows, key, keys, s);
  if (kind != TileKind::kEdge) return;
  if (p.mask) apply_mask(p.mask, rows, key, keys, s);
  if (p.key_mask) apply_mask(p.key_mask, rows, key, keys, s);
  apply_window(p, rows, key, keys, s);
}

// keep[key][row] = 1 / (1 - dropout_p) where the weight is kept, else 0.
template <typename Real>
void dropout_factors(const Problem& p, const RowBlock& rows, int64_t key, int64_t keys,
                     Real* keep) {
  constexpr int64_t kCount = (kRows<Real> + kWordLanes - 1) / kWordLanes;
  const Real factor = static_cast<Real>(1.0 / (1.0 - p.dropout_p));
  const uint32_t head = static_cast<uint32_t>(rows.batch * p.query_heads + rows.head);
  const uint32_t first_row = static_cast<uint32_t>(p.query_start + rows.first);
  Words lane;
  for (int i = 0; i < kWordLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  alignas(kVectorBytes) uint32_t words[4][kCount * kWordLanes];
  for (int64_t j = 0; j < keys;) {
    const uint32_t column = static_cast<uint32_t>(p.key_start + key + j);
    for (int64_t v = 0; v < kCount; ++v) {
      Words counter[4] = {Words{} + (column >> 2),
                          lane + (first_row + static_cast<uint32_t>(v * kWordLanes)),
                          Words{} + head, Words{} + p.offset};
      philox(counter, p.seed, multiply_words);
      for (int w = 0; w < 4; ++w) std::memcpy(words[w] + v * kWordLanes, &counter[w], kVectorBytes);
    }
    for (uint32_t w = column & 3; w < 4 && j < keys; ++w, ++j) {
      Real* row = keep + j * kRows<Real>;
      for (int64_t i = 0; i < kRows<Real>; ++i) {
        row[i] = words[w][i] >= p.dropout_threshold ? factor : Real(0);
      }
    }
  }
}

// hidden[key][row]: which pairs the masks forbid, for the careful products below.
template <typename Real>
void record_hidden(const Real* s, int64_t keys, uint8_t* hidden) {
  for (int64_t i = 0; i < keys * kRows<Real>; ++i) hidden[i] = s[i] == -kInfinity<Real>;
}

// c[n][row] += sum over visible keys of values[key][n] * p[key][row]. A hidden pair's weight is 0,
// but 0 * NaN is NaN: this is for tiles where a hidden value is not finite.
template <typename Real>
void accumulate_visible_by_row(const uint8_t* hidden, int64_t keys, const RowBlock& rows,
                               const Real* p, const Real* values, int64_t stride, int64_t width,
                               Real* c) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < rows.count; ++i) {
      if (hidden[j * kRows<Real> + i]) continue;
      const Real weight = p[j * kRows<Real> + i];
      for (int64_t n = 0; n < width; ++n) c[n * kRows<Real> + i] += values[j * stride + n] * weight;
    }
  }
}

// The same for c[key][n] += p[key][row] * values[row][n], and, if kOverKeys, c[row][n] +=
// p[key][row] * values[key][n].
template <bool kOverKeys, typename Real>
void accumulate_visible(const uint8_t* hidden, int64_t keys, const RowBlock& rows, const Real* p,
                        const Real* values, int64_t stride, int64_t width, Real* c, int64_t ldc) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = 0; i < rows.count; ++i) {
      if (hidden[j * kRows<Real> + i]) continue;
      const Real weight = p[j * kRows<Real> + i];
      const Real* from = values + (kOverKeys ? j : i) * stride;
      Real* to = c + (kOverKeys ? i : j) * ldc;
      for (int64_t n = 0; n < width; ++n) to[n] += weight * from[n];
    }
  }
}

// Hands out pieces of one block of memory. Over null it only counts, so that the same code sizes
// it.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <typename Item>
  Item* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(Item) + 63) / 64 * 64;
    return reinterpret_cast<Item*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// A workspace for each thread, allocated before the parallel region so that a failure can be
// thrown.
template <typename Workspace>
class PerThread {
 public:
  template <typename... Sizes>
  PerThread(int threads, const Sizes&... sizes) {
    Arena counter(nullptr);
    Workspace measured(counter, sizes...);
    bytes_ = counter.used();
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, bytes_ * threads + 64)));
    if (!memory_) throw std::bad_alloc();
  }
  template <typename... Sizes>
  Workspace make(int thread, const Sizes&... sizes) const {
    Arena arena(memory_.get() + bytes_ * thread);
    return Workspace(arena, sizes...);
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  size_t bytes_ = 0;
  std::unique_ptr<char, Free> memory_;
};
