// The tiles that the kernels work on, kKeys keys by one block of query rows, and how queries, keys
// and values are brought into the form that matmul.h multiplies.
//
// Everything lies transposed, [key][row] or [head_dim][row]: the lanes of a vector are query rows,
// so that a softmax over keys needs no shuffle.

// Rows and keys come in whole tiles of AMX, keys of bfloat16 products in pairs, what is missing
// being zeros and hidden keys. kPartKeys and kGroupBlocks: see backward.h; kMaximumsLag: forward.h.
#if defined(ATTN_EXT_AMX_PRODUCTS)
constexpr int64_t kKeys = 64, kBlockVectors = 2;  // pairs of AMX's tiles; their scores stay in L1
constexpr int64_t kVectorsAtOnce = 2, kKeysAtOnce = 32, kPartKeys = 32, kGroupBlocks = 8;
constexpr int kMaximumsLag = 8;
#else
constexpr int64_t kKeys = 128, kBlockVectors = 3;
constexpr int64_t kVectorsAtOnce = 1, kPartKeys = kKeys, kGroupBlocks = 1;
constexpr int kMaximumsLag = 0;
#ifdef ATTN_EXT_BFLOAT16_PRODUCTS
constexpr int64_t kKeysAtOnce = 2;
#else
constexpr int64_t kKeysAtOnce = 1;
#endif
#endif
template <typename Real>
constexpr int64_t kRows = kBlockVectors * kLanes<Real>;  // query rows in a block: 12 to 48 floats

// Elements of a tile's weights in either plane, see planes.h.
template <typename Real>
constexpr int64_t kWeightsPlane = kKeys / 2 * kRows<Real>;

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;
template <typename Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

template <typename Real>
inline int64_t padded(int64_t n) {
  return (n + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
}

// As many keys as products take at least for these.
inline int64_t whole_keys(int64_t keys) {
  return (keys + kKeysAtOnce - 1) / kKeysAtOnce * kKeysAtOnce;
}

template <typename T>
inline T* at(const View& view, int64_t b, int64_t h, int64_t row, int64_t column = 0) {
  return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[1] +
         row * view.stride[2] + column * view.stride[3];
}

// The query rows [first, first + count) of one head, or of `sharing` heads that have a key head in
// common, taking turns: first those heads' row 0, then their row 1. `head` is then the key head,
// and rows are found by head_of and row_of.
struct RowBlock {
  int64_t batch, head, key_head, first;
  int64_t count;    // rows that exist
  int64_t vectors;  // vectors that hold them
  int64_t sharing = 1;

  // How many blocks a head's rows make: as few as possible.
  template <typename Real>
  static int64_t blocks_a_head(const Problem& p) {
    return (p.query_length + kRows<Real> - 1) / kRows<Real>;
  }

  // How many times the vectors that products take at once a head's rows fill, the last time in
  // part.
  template <typename Real>
  static int64_t shares_a_head(const Problem& p) {
    constexpr int64_t kAtOnce = kVectorsAtOnce * kLanes<Real>;
    return (p.query_length + kAtOnce - 1) / kAtOnce;
  }

  // Vectors are shared out evenly, so that no block is left with a single one.
  template <typename Real>
  static RowBlock make(const Problem& p, int64_t batch, int64_t head, int64_t block,
                       int64_t sharing = 1) {
    const int64_t blocks = blocks_a_head<Real>(p);
    constexpr int64_t kAtOnce = kVectorsAtOnce * kLanes<Real>;
    const int64_t shares = shares_a_head<Real>(p);
    const int64_t begin = shares * block / blocks, end = shares * (block + 1) / blocks;
    RowBlock rows;
    rows.batch = batch, rows.head = head, rows.key_head = head / (p.query_heads / p.key_heads);
    rows.first = begin * kAtOnce;
    rows.count = std::min(end * kAtOnce, p.query_length) - rows.first;
    rows.vectors = (end - begin) * kVectorsAtOnce;
    rows.sharing = sharing;
    return rows;
  }

  // Of the block's row i: its head, its place among the head's rows, and the key index that stands
  // on its diagonal.
  int64_t head_of(int64_t i) const {
    return sharing == 1 ? head : head * sharing + (first + i) % sharing;
  }
  int64_t row_of(int64_t i) const { return sharing == 1 ? first + i : (first + i) / sharing; }
  int64_t diagonal(const Problem& p, int64_t i) const { return row_of(i) + p.diagonal; }
};

// The block's row i in a tensor that has the queries' heads and rows.
template <typename T>
inline T* row_at(const View& view, const RowBlock& rows, int64_t i, int64_t column = 0) {
  return at<T>(view, rows.batch, rows.head_of(i), rows.row_of(i), column);
}

// Whether every row of the block has the same entries of a mask.
inline bool same_for_all_rows(const View& mask, const RowBlock& rows) {
  return mask.stride[2] == 0 && (rows.sharing == 1 || mask.stride[1] == 0);
}

// Rows of a view that are read or written before long, see Upcoming; none where heads take turns,
// which is where rows are few.
template <typename T>
Upcoming upcoming_rows(const View& view, const RowBlock& rows, int64_t width, int64_t column = 0) {
  constexpr int64_t kSize = sizeof(T);
  if (rows.sharing > 1) return {};
  return {row_at<const T>(view, rows, 0, column), view.stride[2] * kSize, width * kSize,
          rows.count};
}

// Keys or values [first, first + count), or their gradients.
template <typename T>
Upcoming upcoming_keys(const View& view, const RowBlock& rows, int64_t first, int64_t count,
                       int64_t width) {
  constexpr int64_t kSize = sizeof(T);
  return {at<const T>(view, rows.batch, rows.key_head, first), view.stride[2] * kSize,
          width * kSize, count};
}

// Keys [first, end) that any of the rows may see by position, and some more: first is a multiple of
// kKeys, end as whole_keys says unless the keys end before.
struct KeyRange {
  int64_t first, end;

  KeyRange(const Problem& p, const RowBlock& rows) {
    const int64_t low = rows.diagonal(p, 0), high = rows.diagonal(p, rows.count - 1);
    first = std::max<int64_t>(0, low - p.left) / kKeys * kKeys;
    end = std::clamp<int64_t>(high + 1 + p.right, 0, p.key_length);
    end = std::min(whole_keys(end), p.key_length);
  }
  KeyRange(int64_t first, int64_t end) : first(first), end(end) {}

  // How many keys the tile that begins at `key` has.
  int64_t tile(int64_t key) const { return std::min(kKeys, end - key); }

  // One of `parts` parts of about the same number of tiles.
  KeyRange part(int64_t index, int64_t parts) const {
    const int64_t tiles = std::max<int64_t>(0, (end - first + kKeys - 1) / kKeys);
    return {first + tiles * index / parts * kKeys,
            std::min(end, first + tiles * (index + 1) / parts * kKeys)};
  }
};

// The keys of a range's first tile.
template <typename T>
Upcoming first_keys(const Problem& p, const RowBlock& rows, const KeyRange& range) {
  return upcoming_keys<T>(p.key, rows, range.first, range.tile(range.first), p.head_dim);
}

// Where products begin to ask for what surrounds a block: so many tiles before its end, lest keys
// drive it out again.
constexpr int64_t kTilesBeforeTheEnd = 4;

// What the products of a range's tiles ask for, one tile after another: the next one's keys, and at
// the end what comes after the range, its operand being the first keys there, in haste or not.
template <typename T>
class AheadOfTiles {
 public:
  AheadOfTiles(const Problem& p, const RowBlock& rows, const KeyRange& range, const Ahead& after)
      : p_(p), rows_(rows), range_(range), after_(after), around_(after) {}

  // Of the tile that begins at `key`.
  Ahead& at(int64_t key) {
    Ahead& ahead = range_.end - key > kTilesBeforeTheEnd * kKeys ? not_yet_ : around_;
    const KeyRange rest(key + kKeys, range_.end);
    ahead.operand = rest.first < rest.end
                        ? first_keys<T>(p_, rows_, rest).in_haste(after_.operand.in_haste())
                        : after_.operand;
    at_end_ = rest.first >= rest.end;
    return ahead;
  }

  // Once all tiles are done, of which there may have been too few to ask for all, the last ones
  // being skipped.
  void ask_rest() {
    if (!at_end_) around_.operand = after_.operand;
    around_.ask_rest();
  }

 private:
  const Problem& p_;
  const RowBlock& rows_;
  const KeyRange& range_;
  const Ahead& after_;
  Ahead around_, not_yet_;
  bool at_end_ = false;
};

// Pairs [first, first + lanes) of a row, 0 beyond `width` values; as the bits of floats, for they
// are only moved.
inline Vec<float> load_pairs(const BFloat16* row, int64_t first, int64_t width) {
  return reinterpret_cast<Vec<float>>(load_items<Words>(row + 2 * first, width - 2 * first));
}
// Pairs of two rows' values at one place, [first, first + lanes).
inline Vec<float> pair_rows(const BFloat16* low, const BFloat16* high, int64_t first,
                            int64_t width) {
  const Vec<float> zero{};
  const Words a = reinterpret_cast<Words>(load_some(low + first, width - first));
  const Words b = reinterpret_cast<Words>(high ? load_some(high + first, width - first) : zero);
  return reinterpret_cast<Vec<float>>(a >> 16 | b);
}

// packed[d][row] = factor * rows' values, transposed; lanes beyond the last row are 0. Pairs run
// along d, and take a factor of 1 alone.
template <typename T, typename Element, typename Real>
void pack_transposed(const View& view, const RowBlock& rows, int64_t width, Real factor,
                     Element* packed) {
  constexpr int64_t kW = kLanes<Real>;
  const int64_t elements = (width + kDepth<Element> - 1) / kDepth<Element>;
  for (int64_t first_row = 0; first_row < rows.vectors * kW; first_row += kW) {
    const int64_t count = std::min(kW, rows.count - first_row);
    const T* from[kW];
    for (int64_t i = 0; i < count; ++i) from[i] = row_at<const T>(view, rows, first_row + i);
    for (int64_t first = 0; first < elements; first += kW) {
      const auto row = [&](int64_t i, int64_t values) -> Vec<Real> {  // of which so many exist
        if constexpr (kDepth<Element> == 1) {
          return load_some(from[i] + first, values) * factor;
        } else {
          return load_pairs(from[i], first, first * kDepth<Element> + values);
        }
      };
      constexpr int64_t kWhole = kW * kDepth<Element>;
      const int64_t values = width - first * kDepth<Element>;
      Real* to = reinterpret_cast<Real*>(packed) + first * kRows<Real> + first_row;
      Vec<Real> block[kW];
      if (count == kW && values >= kWhole) {  // stays in registers, all counts being constant
#pragma GCC unroll 16
        for (int64_t i = 0; i < kW; ++i) block[i] = row(i, kWhole);
        transpose<Real>(block);
#pragma GCC unroll 16
        for (int64_t e = 0; e < kW; ++e) store<Real>(to + e * kRows<Real>, block[e]);
        continue;
      }
      for (int64_t i = 0; i < kW; ++i) block[i] = i < count ? row(i, values) : Vec<Real>{};
      transpose<Real>(block);
      for (int64_t e = 0; e < std::min(kW, elements - first); ++e) {
        store<Real>(to + e * kRows<Real>, block[e]);
      }
    }
  }
}

// The way back: calls write(row, d, vector, count) with columns [d, d + count) of each row of
// block[d][row].
template <typename Real, typename Write>
inline void for_each_row(const Real* block, int64_t width, const RowBlock& rows, Write write) {
  constexpr int64_t kW = kLanes<Real>;
  const int64_t count = rows.count;
  for (int64_t d = 0; d < width; d += kW) {
    const int64_t columns = std::min(kW, width - d);
    for (int64_t first_row = 0; first_row < count; first_row += kW) {
      const Real* from = block + d * kRows<Real> + first_row;
      Vec<Real> square[kW];
      if (columns == kW && count - first_row >= kW) {  // as in pack_transposed
#pragma GCC unroll 16
        for (int64_t i = 0; i < kW; ++i) square[i] = load(from + i * kRows<Real>);
        transpose<Real>(square);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kW; ++i) write(first_row + i, d, square[i], kW);
        continue;
      }
      for (int64_t i = 0; i < kW; ++i) {
        square[i] = i < columns ? load(from + i * kRows<Real>) : Vec<Real>{};
      }
      transpose<Real>(square);
      for (int64_t i = 0; i < std::min(kW, count - first_row); ++i) {
        write(first_row + i, d, square[i], columns);
      }
    }
  }
}

// Rows as a row-major block of elements along the row, copied to `scratch` and padded to whole
// vectors with zeros.
template <typename T, typename Element>
const Element* copied_block(const T* from, int64_t from_stride, int64_t count, int64_t width,
                            Element* scratch, int64_t* stride) {
  using Real = typename PackedOf<Element>::Real;
  constexpr int64_t kStep = kDepth<Element>;
  *stride = padded<Real>((width + kStep - 1) / kStep);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = from + i * from_stride;
    Real* to = reinterpret_cast<Real*>(scratch + i * *stride);
    for (int64_t e = 0; e < *stride; e += kLanes<Real>) {
      if constexpr (kStep == 1) {
        store<Real>(to + e, load_some(row + e, width - e));
      } else {
        store<Real>(to + e, load_pairs(row, e, width));
      }
    }
  }
  return scratch;
}

// The same, but in place where they are one already; padded only if `pad`.
template <typename T, typename Element>
const Element* as_block(const T* from, int64_t from_stride, int64_t count, int64_t width, bool pad,
                        Element* scratch, int64_t* stride) {
  using Real = typename PackedOf<Element>::Real;
  constexpr int64_t kStep = kDepth<Element>;
  constexpr bool kSameBits = std::is_same_v<T, Element> || kStep == 2;
  const int64_t whole = pad ? kStep * kLanes<Real> : kStep;
  if (kSameBits && width % whole == 0 && from_stride % kStep == 0) {
    *stride = from_stride / kStep;
    return reinterpret_cast<const Element*>(from);
  }
  return copied_block(from, from_stride, count, width, scratch, stride);
}

// The keys or values of a tile as as_block has them, as many as whole_keys says: zeros after the
// last.
template <typename T, typename Element>
const Element* tile_as_block(const View& view, const RowBlock& rows, int64_t key, int64_t keys,
                             int64_t width, Element* scratch, int64_t* stride) {
  const T* from = at<const T>(view, rows.batch, rows.key_head, key);
  const int64_t whole = whole_keys(keys);
  if (whole == keys) return as_block<T>(from, view.stride[2], keys, width, false, scratch, stride);
  copied_block(from, view.stride[2], keys, width, scratch, stride);
  std::fill(scratch + keys * *stride, scratch + whole * *stride, Element{});
  return scratch;
}

// packed[d][j] = the pair (row 2j, row 2j + 1) at d: the transposed operand of a product over keys.
inline void pack_pairs_by_column(const BFloat16* from, int64_t stride, int64_t count, int64_t width,
                                 BFloat16Pair* packed) {
  constexpr int64_t kW = kLanes<float>;
  for (int64_t first = 0; first < count; first += 2 * kW) {
    for (int64_t d = 0; d < width; d += kW) {
      Vec<float> block[kW];
      for (int64_t i = 0; i < kW; ++i) {
        const int64_t row = first + 2 * i;
        const BFloat16* low = from + row * stride;
        block[i] = row < count ? pair_rows(low, row + 1 < count ? low + stride : nullptr, d, width)
                               : Vec<float>{};
      }
      transpose<float>(block);
      float* to = reinterpret_cast<float*>(packed) + d * (kKeys / 2) + first / 2;
      for (int64_t i = 0; i < std::min(kW, width - d); ++i) {
        store<float>(to + i * (kKeys / 2), block[i]);
      }
    }
  }
}

// Rows of a block as they are multiplied from the right, summed over rows: in place or padded, or
// as pairs of neighbouring rows, zeros where the block's vectors have no row.
template <typename T, typename Element>
const Element* as_summed_rows(const View& view, const RowBlock& rows, int64_t width,
                              Element* scratch, int64_t* stride) {
  const T* from = at<const T>(view, rows.batch, rows.head, rows.first);
  if constexpr (kDepth<Element> == 1) {
    return as_block<T>(from, view.stride[2], rows.count, width, true, scratch, stride);
  } else {
    *stride = padded<float>(width);
    const int64_t pairs = (rows.count + 1) / 2, all_pairs = rows.vectors * kLanes<float> / 2;
    std::fill(scratch + pairs * *stride, scratch + all_pairs * *stride, Element{});
    for (int64_t i = 0; i < rows.count; i += 2) {
      const T* low = from + i * view.stride[2];
      const T* high = i + 1 < rows.count ? low + view.stride[2] : nullptr;
      float* to = reinterpret_cast<float*>(scratch + i / 2 * *stride);
      for (int64_t d = 0; d < *stride; d += kLanes<float>) {
        store<float>(to + d, d < width ? pair_rows(low, high, d, width) : Vec<float>{});
      }
    }
    return scratch;
  }
}

// Memory in whole cache lines, which loads of whole vectors and tiles don't straddle.
struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <typename Item>
using CacheLines = std::unique_ptr<Item[], Free>;
template <typename Item>
CacheLines<Item> allocate_lines(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(Item) + 63) / 64 * 64;
  CacheLines<Item> memory(static_cast<Item*>(std::aligned_alloc(64, bytes)));
  if (!memory && bytes > 0) throw std::bad_alloc();
  return memory;
}

// Keys or values of every (batch, key head) as pack_pairs_by_column packs them, tile by tile, for
// all query blocks that share them. Where one block alone reads them, it packs its own.
template <typename T, typename Element>
class PackedColumns {
 public:
  PackedColumns(const Problem& p, const View& view, int64_t width, int64_t blocks_a_head)
      : view_(view),
        width_(width),
        heads_(p.key_heads),
        length_(p.key_length),
        read_once_(blocks_a_head * p.query_heads == p.key_heads) {
    if (kDepth<Element> == 1 || read_once_) return;
    tiles_ = (length_ + kKeys - 1) / kKeys;
    count_ = p.batch * heads_ * tiles_;
    memory_ = allocate_lines<Element>(count_ * tile_size());
  }

  // Called by all threads of a team.
  void pack_all() const {
    if (!memory_) return;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t head = i / tiles_, key = i % tiles_ * kKeys;
      pack(head / heads_, head % heads_, key, std::min(kKeys, length_ - key),
           memory_.get() + i * tile_size());
    }
  }

  const Element* tile(const RowBlock& rows, int64_t key, int64_t keys, Element* scratch) const {
    if (memory_) {
      const int64_t head = rows.batch * heads_ + rows.key_head;
      return memory_.get() + (head * tiles_ + key / kKeys) * tile_size();
    }
    pack(rows.batch, rows.key_head, key, keys, scratch);
    return scratch;
  }

  // Whether one block alone reads each head's keys and values.
  bool read_once() const { return read_once_; }

  // What tile() will read.
  Upcoming upcoming(const RowBlock& rows, int64_t key, int64_t keys) const {
    if (!memory_) return upcoming_keys<T>(view_, rows, key, keys, width_);
    const int64_t bytes = tile_size() * static_cast<int64_t>(sizeof(Element));
    return {tile(rows, key, keys, nullptr), bytes, bytes, 1};
  }

 private:
  int64_t tile_size() const { return width_ * (kKeys / kDepth<Element>); }
  void pack(int64_t batch, int64_t head, int64_t key, int64_t keys, Element* to) const {
    if constexpr (kDepth<Element> == 2) {
      pack_pairs_by_column(at<const T>(view_, batch, head, key), view_.stride[2], keys, width_, to);
    }
  }

  View view_;
  int64_t width_, heads_, length_, tiles_ = 0, count_ = 0;
  bool read_once_;
  CacheLines<Element> memory_;
};

// What a forward pass packs of keys and values: values alone, unless they have planes (planes.h).
template <typename T, typename Element>
struct PackedFor {
  using Type = PackedColumns<T, Element>;
};

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
    memory_ = allocate_lines<char>(static_cast<int64_t>(bytes_) * threads + 64);
  }
  template <typename... Sizes>
  Workspace make(int thread, const Sizes&... sizes) const {
    Arena arena(memory_.get() + bytes_ * thread);
    return Workspace(arena, sizes...);
  }

 private:
  size_t bytes_ = 0;
  CacheLines<char> memory_;
};

// Runs body() on each of `threads` threads. One alone needs no team, which takes a call to the
// kernel and some memory.
template <typename Body>
void run_parallel(int threads, const Body& body) {
  if (threads == 1 && !omp_in_parallel()) return body();
#pragma omp parallel num_threads(threads)
  body();
}
