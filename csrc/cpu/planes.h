// Products of float16 by the tiles of AMX, which multiply bfloat16 alone: a number is the sum of
// two bfloat16, its planes.
//
// Together they hold the 11 bits of a float16 exactly, and 16 of a weight's 24. AMX multiplies the
// planes in turn and adds up in float32, three or four products for one, in about half the time
// that fused multiply-adds of float32 take (Henry, Tang and Heinecke, arXiv:1904.06376; with three
// planes float32 itself is as accurate as by those, but no faster).
//
// Finite numbers alone have planes: an infinite one's second plane is NaN. The forward pass alone
// has them so far.

// What round_both gave, as floats: its first or its second vector.
template <bool kSecond>
inline Vec<float> values_of(Words halves) {
  const __m256i bits = kSecond ? _mm512_extracti64x4_epi64((__m512i)halves, 1)
                               : _mm512_castsi512_si256((__m512i)halves);
  return (Vec<float>)((Words)_mm512_cvtepu16_epi32(bits) << 16);
}

// Two vectors of numbers, each plane as round_both has it.
struct TwoPlanes {
  Words plane[2] = {};

  TwoPlanes() = default;
  TwoPlanes(Vec<float> first, Vec<float> second) {
    plane[0] = round_both(first, second);
    plane[1] = round_both(first - values_of<false>(plane[0]), second - values_of<true>(plane[0]));
  }
  // The pairs of neighbours [first, first + lanes) of a row; 0 beyond `width` numbers.
  static TwoPlanes of_pairs(const Float16* row, int64_t first, int64_t width) {
    const int64_t place = 2 * first, next = place + kLanes<float>;
    return {load_some(row + place, width - place), load_some(row + next, width - next)};
  }
};

// A square of each plane, for transposition.
class PlaneSquares {
 public:
  void set(int64_t row, const TwoPlanes& planes) {
    for (int n = 0; n < 2; ++n) square_[n][row] = reinterpret_cast<Vec<float>>(planes.plane[n]);
  }
  // Transposes them and stores their rows, `stride` elements apart, `plane` from plane to plane.
  void store_transposed(PlanePair* to, int64_t stride, int64_t plane) {
    for (int n = 0; n < 2; ++n) {
      transpose<float>(square_[n]);
      float* row = reinterpret_cast<float*>(to + n * plane);
      for (int64_t i = 0; i < kLanes<float>; ++i) store<float>(row + i * stride, square_[n][i]);
    }
  }

 private:
  Vec<float> square_[2][kLanes<float>];
};

// Pairs along a head's dimensions, in whole tiles.
inline int64_t plane_depth(int64_t width) { return padded<float>((width + 1) / 2); }

// packed[plane][pair of dimensions][row]: a block's queries; 0 beyond the last row and dimension.
inline void pack_query_planes(const Problem& p, const RowBlock& rows, PlanePair* packed) {
  constexpr int64_t kW = kLanes<float>, kStride = kRows<float>;
  const int64_t depth = plane_depth(p.head_dim);
  for (int64_t first_row = 0; first_row < rows.vectors * kW; first_row += kW) {
    for (int64_t first = 0; first < depth; first += kW) {
      PlaneSquares squares;
      for (int64_t i = 0; i < kW; ++i) {
        if (const int64_t row = first_row + i; row < rows.count) {
          const Float16* from = row_at<const Float16>(p.query, rows, row);
          squares.set(i, TwoPlanes::of_pairs(from, first, p.head_dim));
        } else {
          squares.set(i, {});
        }
      }
      squares.store_transposed(packed + first * kStride + first_row, kStride, depth * kStride);
    }
  }
}

// packed[plane][key][pair of dimensions]: a tile's keys; 0 beyond the last key and dimension.
inline void pack_key_planes(const Float16* from, int64_t stride, int64_t keys, int64_t width,
                            PlanePair* packed) {
  const int64_t depth = plane_depth(width);
  auto* to = reinterpret_cast<BFloat16Pair*>(packed);
  for (int64_t j = 0; j < kKeys; ++j) {
    for (int64_t first = 0; first < depth; first += kLanes<float>) {
      TwoPlanes pairs;
      if (j < keys) pairs = TwoPlanes::of_pairs(from + j * stride, first, width);
      for (int n = 0; n < 2; ++n) {
        store_packed(to + (n * kKeys + j) * depth + first, pairs.plane[n]);
      }
    }
  }
}

// packed[plane][dimension][pair of keys]: a tile's values; 0 beyond the last key and dimension.
inline void pack_value_planes(const Float16* from, int64_t stride, int64_t keys, int64_t width,
                              PlanePair* packed) {
  constexpr int64_t kW = kLanes<float>, kPairs = kKeys / 2;
  const int64_t whole = padded<float>(width);
  for (int64_t first = 0; first < kPairs; first += kW) {
    for (int64_t d = 0; d < whole; d += kW) {
      PlaneSquares squares;
      for (int64_t i = 0; i < kW; ++i) {
        const int64_t key = 2 * (first + i);
        TwoPlanes pairs;
        if (key < keys) {
          const Float16* low = from + key * stride + d;
          const bool both = key + 1 < keys;
          pairs = {load_some(low, width - d),
                   both ? load_some(low + stride, width - d) : Vec<float>{}};
        }
        for (Words& plane : pairs.plane) plane = as_pairs(plane);
        squares.set(i, pairs);
      }
      squares.store_transposed(packed + d * kPairs + first, kPairs, whole * kPairs);
    }
  }
}

// An operand: one plane's rows, and how many elements after them the other's are.
struct Planes {
  const PlanePair* first;
  int64_t stride, plane;

  const BFloat16Pair* at(int index, int64_t offset) const {
    return reinterpret_cast<const BFloat16Pair*>(first + index * plane + offset);
  }
};

// Keys and values of every (batch, key head), tile by tile.
class PackedPlanes {
 public:
  explicit PackedPlanes(const Problem& p)
      : p_(p),
        tiles_((p.key_length + kKeys - 1) / kKeys),
        key_plane_(kKeys * plane_depth(p.head_dim)),
        value_plane_(padded<float>(p.value_dim) * (kKeys / 2)),
        memory_(allocate_lines<PlanePair>(p.batch * p.key_heads * tiles_ * tile_size())) {}

  // Called by all threads of a team.
  void pack_all() const {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p_.batch * p_.key_heads * tiles_; ++i) {
      const int64_t pair = i / tiles_, key = i % tiles_ * kKeys;
      const int64_t batch = pair / p_.key_heads, head = pair % p_.key_heads;
      const int64_t keys = std::min(kKeys, p_.key_length - key);
      PlanePair* to = memory_.get() + i * tile_size();
      pack_key_planes(at<const Float16>(p_.key, batch, head, key), p_.key.stride[2], keys,
                      p_.head_dim, to);
      pack_value_planes(at<const Float16>(p_.value, batch, head, key), p_.value.stride[2], keys,
                        p_.value_dim, to + 2 * key_plane_);
    }
  }

  bool read_once() const { return false; }

  Planes keys(const RowBlock& rows, int64_t key) const {
    return {tile(rows, key), plane_depth(p_.head_dim), key_plane_};
  }
  Planes values(const RowBlock& rows, int64_t key) const {
    return {tile(rows, key) + 2 * key_plane_, kKeys / 2, value_plane_};
  }

 private:
  int64_t tile_size() const { return 2 * (key_plane_ + value_plane_); }
  const PlanePair* tile(const RowBlock& rows, int64_t key) const {
    const int64_t pair = rows.batch * p_.key_heads + rows.key_head;
    return memory_.get() + (pair * tiles_ + key / kKeys) * tile_size();
  }

  const Problem& p_;
  int64_t tiles_, key_plane_, value_plane_;
  CacheLines<PlanePair> memory_;
};

template <>
struct PackedFor<Float16, PlanePair> {
  using Type = PackedPlanes;
};

// Which planes of A and B are multiplied, in an order that loads few tiles twice.
struct PlaneProduct {
  int a, b;
};
struct ScoreProducts {  // all of them: scores may be large
  static constexpr PlaneProduct kAll[] = {{1, 1}, {1, 0}, {0, 0}, {0, 1}};
};
struct OutputProducts {
  static constexpr PlaneProduct kAll[] = {{1, 0}, {0, 0}, {0, 1}};
};

// A block of C (kTall x 2 tiles) = A B or C += A B, registers as in multiply_tiles.
template <typename Products, int kTall>
void multiply_plane_tiles(int64_t depth, const Planes& a, int64_t row, const Planes& b,
                          const Into<float>& to, SumsToStore& unstored) {
  constexpr auto& kProducts = Products::kAll;
  constexpr auto kIndices = std::make_integer_sequence<int, std::size(kProducts)>{};
  constexpr auto kSums = std::make_integer_sequence<int, 2 * kTall>{};
  float* const c = to.c + row * to.stride;
  const auto place = [&](int sum) {
    return c + sum / 2 * kTileSide * to.stride + sum % 2 * kTileSide;
  };
  const auto step = [&](int64_t k, auto first_step) {
    for_each_index(kIndices, [&](auto index) {
      constexpr int kBefore = index > 0 ? index - 1 : 0;
      constexpr bool kNewA = index == 0 || kProducts[index].a != kProducts[kBefore].a;
      constexpr bool kNewB = index == 0 || kProducts[index].b != kProducts[kBefore].b;
      const BFloat16Pair* left = a.at(kProducts[index].a, row * a.stride + k);
      const BFloat16Pair* right = b.at(kProducts[index].b, k * b.stride);
      for_each_index(kSums, [&](auto sum) {
        constexpr int kRow = sum / 2, kColumn = sum % 2;
        if (first_step && index == 0) {
          unstored.template store<sum>();
          begin_sum<sum>(place(sum), to.stride, to.accumulate);
        }
        if (kNewA && kColumn == 0) {
          load_passing_tile<4 + kRow>(left + kRow * kTileSide * a.stride, a.stride);
        }
        if (kNewB && kRow == 0) load_tile<6 + kColumn>(right + kColumn * kTileSide, b.stride);
        multiply_add_tiles<sum, 4 + kRow, 6 + kColumn>();
      });
    });
  };
  if (kTall < 2) unstored.store_all();
  step(0, std::true_type{});
  for (int64_t k = kTileSide; k < depth; k += kTileSide) step(k, std::false_type{});
  if (kTall == 2) {
    unstored.set(c, to.stride);
  } else {
    for_each_index(kSums, [&](auto sum) { store_tile<sum>(place(sum), to.stride); });
  }
}

// C (rows x 2 vectors) = A B, C += A B or C = C scale + A B; rows and depth are whole tiles.
template <typename Products>
void multiply_planes(int64_t rows, int64_t depth, const Planes& a, const Planes& b,
                     const Into<float>& to) {
  static_assert(kBlockVectors == 2 && kVectorsAtOnce == 2, "B is two tiles wide");
  const Into<float> sum = into_scaled(rows, kBlockVectors, to);
  SumsToStore unstored;
  for (int64_t row = 0; row < rows; row += 2 * kTileSide) {
    const auto block = row + kTileSide < rows ? multiply_plane_tiles<Products, 2>
                                              : multiply_plane_tiles<Products, 1>;
    block(depth, a, row, b, sum, unstored);
    if (to.ahead) to.ahead->ask(kLinesAsked);
  }
}

// The weights of two keys; the first plane is rounded towards 0, which the second makes up for.
inline void store_planes(PlanePair* packed, int64_t plane, Vec<float> first, Vec<float> second) {
  auto* to = reinterpret_cast<BFloat16Pair*>(packed);
  store_packed(to, pairs_of_high_halves(first, second));
  store_packed(to + plane, pairs_of_weights(first - without_low_half(first),
                                            second - without_low_half(second)));
}

// What forward.h does with planes alone; w is its workspace.
template <typename Workspace>
float scores_of_planes(const Problem& p, const RowBlock& rows, TileKind kind, int64_t key,
                       int64_t keys, const PackedPlanes& packed, const Workspace& w) {
  const int64_t depth = plane_depth(p.head_dim);
  const Planes queries{w.queries, kRows<float>, depth * kRows<float>};
  return scores_of_products(
      p, rows, kind, key, keys, w.scores, Ahead(), w.top, static_cast<float*>(nullptr),
      [&](int64_t whole, const Into<float>& into) {
        multiply_planes<ScoreProducts>(whole, depth, packed.keys(rows, key), queries, into);
      });
}

template <typename Workspace>
void add_output_of_planes(const Problem& p, const RowBlock& rows, int64_t key, int64_t whole,
                          const PackedPlanes& packed, const Workspace& w,
                          const Into<float>& output) {
  const Planes weights{w.weights, kRows<float>, kWeightsPlane<float>};
  multiply_planes<OutputProducts>(padded<float>(p.value_dim), whole / 2, packed.values(rows, key),
                                  weights, output);
}

// Whether float16's planes are worth their packing, of all keys and values: where many rows see
// each of them. malloc gives blocks above 32 MiB back, and the system clears their pages again for
// every call. Not where LSE is asked for: weights and gradients, computed from it in float32, sum
// scores in another order.
inline bool suits_planes(const Problem& p, const ForwardArguments& to) {
  constexpr int64_t kKept = int64_t{32} << 20, kMost = int64_t{512} << 20;
  constexpr int64_t kBytes = 2 * sizeof(BFloat16);  // of a number
  if (p.dtype != DType::kFloat16 || to.lse || p.scale <= 0 || p.head_dim < 24) return false;
  if (p.key_heads == 0 || p.key_length < 32) return false;
  // What is there once would be packed many times.
  for (const View* view : {&p.key, &p.value}) {
    if (view->stride[0] == 0 && p.batch > 1) return false;
    if (view->stride[1] == 0 && p.key_heads > 1) return false;
  }
  int64_t visible = 0;  // pairs of a head, by position
  for (int64_t block = 0; block < RowBlock::blocks_a_head<float>(p); ++block) {
    const RowBlock rows = RowBlock::make<float>(p, 0, 0, block);
    const KeyRange range(p, rows);
    visible += rows.count * std::max<int64_t>(0, range.end - range.first);
  }
  const int64_t bytes = p.batch * p.key_heads * p.key_length * (p.head_dim + p.value_dim) * kBytes;
  const int64_t least_rows = bytes > kKept ? 512 : 256;
  return bytes <= kMost && visible * (p.query_heads / p.key_heads) >= least_rows * p.key_length;
}

// Whether all of query, key and value has planes.
inline bool all_finite_halves(const Problem& p, int threads) {
  bool finite = true;
#pragma omp parallel num_threads(threads) reduction(&& : finite)
  for (const View* view : {&p.query, &p.key, &p.value}) {
    const bool query = view == &p.query;
    const int64_t heads = query ? p.query_heads : p.key_heads;
    const int64_t rows = query ? p.query_length : p.key_length;
    const int64_t width = view == &p.value ? p.value_dim : p.head_dim;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < p.batch * heads; ++i) {
      finite = finite && all_finite<float>(at<const Float16>(*view, i / heads, i % heads, 0),
                                           view->stride[2], rows, width);
    }
  }
  return finite;
}
