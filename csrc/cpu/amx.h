// The tile registers of AMX: eight of 16 rows of 64 bytes, and the product of two of them.
//
// The only file with tile instructions. A tile of 16 x 16 elements of 4 bytes holds floats of C, or
// pairs of bfloat16 of A or B, each in the layout that matmul.h has them in. Every thread
// configures its registers before it multiplies, and releases them, which spares the kernel saving
// them. Built with ATTN_EXT_EMULATE_AMX, plain C++ stands in for the instructions, so that all code
// around them runs on processors without AMX: for tests alone, it is slow.

#ifndef ATTN_EXT_AMX_PRODUCTS

struct [[maybe_unused]] TileConfiguration {};

#else

constexpr int kTileSide = 16;

#ifdef ATTN_EXT_EMULATE_AMX

struct EmulatedTiles {
  bool configured = false;
  uint32_t words[8][kTileSide][kTileSide];

  // As on a processor, no instruction works without a configuration.
  auto& tile(int index) {
    if (!configured) std::abort();
    return words[index];
  }
};
thread_local EmulatedTiles emulated_tiles;

class TileConfiguration {
 public:
  TileConfiguration() {
    std::memset(emulated_tiles.words, 0xFF, sizeof(emulated_tiles.words));  // NaN, until written
    emulated_tiles.configured = true;
  }
  ~TileConfiguration() { emulated_tiles.configured = false; }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;
};

template <int kTile>
void zero_tile() {
  auto& tile = emulated_tiles.tile(kTile);
  std::memset(tile, 0, sizeof(tile));
}
template <int kTile, typename Item>
void load_tile(const Item* from, int64_t stride) {
  auto& tile = emulated_tiles.tile(kTile);
  for (int m = 0; m < kTileSide; ++m) std::memcpy(tile[m], from + m * stride, sizeof(tile[m]));
}
template <int kTile, typename Item>
void load_passing_tile(const Item* from, int64_t stride) {
  load_tile<kTile>(from, stride);
}
template <int kTile>
void store_tile(float* to, int64_t stride) {
  const auto& tile = emulated_tiles.tile(kTile);
  for (int m = 0; m < kTileSide; ++m) std::memcpy(to + m * stride, tile[m], sizeof(tile[m]));
}

// What tdpbf16ps makes of numbers below the smallest normal one, in operands and results.
inline float flush(float x) {
  return std::abs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}
inline float low_half(uint32_t pair) {
  return flush(to_float(BFloat16{static_cast<uint16_t>(pair)}));
}
inline float high_half(uint32_t pair) {
  return flush(to_float(BFloat16{static_cast<uint16_t>(pair >> 16)}));
}

// sum += left right, rounded where Intel documents it: the low and the high halves' products are
// summed by fused multiply-adds, each from 0 and in the order of the depth, then added to each
// other and to the sum.
template <int kSum, int kLeft, int kRight>
void multiply_add_tiles() {
  auto& sum = emulated_tiles.tile(kSum);
  const auto &left = emulated_tiles.tile(kLeft), &right = emulated_tiles.tile(kRight);
  for (int m = 0; m < kTileSide; ++m) {
    float low[kTileSide] = {}, high[kTileSide] = {}, before[kTileSide];
    for (int k = 0; k < kTileSide; ++k) {
      const uint32_t a = left[m][k];
      for (int n = 0; n < kTileSide; ++n) {
        low[n] = flush(std::fma(low_half(a), low_half(right[k][n]), low[n]));
        high[n] = flush(std::fma(high_half(a), high_half(right[k][n]), high[n]));
      }
    }
    std::memcpy(before, sum[m], sizeof(before));
    for (int n = 0; n < kTileSide; ++n) {
      const float after = flush(flush(before[n]) + flush(low[n] + high[n]));
      std::memcpy(&sum[m][n], &after, sizeof(after));
    }
  }
}

#else

class TileConfiguration {
 public:
  TileConfiguration() { _tile_loadconfig(&kWholeTiles); }
  ~TileConfiguration() { _tile_release(); }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Shapes) == 64, "as ldtilecfg reads it");
  static constexpr Shapes kWholeTiles = {
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
};

// By inline assembly, since GCC's macros take a tile's number as a literal only, and those of GCC
// 12 do not say that loading a tile reads memory.
template <int kTile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile, typename Item>
inline void load_tile(const Item* from, int64_t stride) {
  static_assert(sizeof(Item) == 4, "a tile has 16 elements of 4 bytes a row");
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride * 4), "i"(kTile) : "memory");
}
// The same of what is not read again soon: it stays out of the first cache.
template <int kTile, typename Item>
inline void load_passing_tile(const Item* from, int64_t stride) {
  static_assert(sizeof(Item) == 4, "a tile has 16 elements of 4 bytes a row");
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride * 4), "i"(kTile)
               : "memory");
}
template <int kTile>
inline void store_tile(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * 4), "i"(kTile) : "memory");
}
// sum += left right, of bfloat16 pairs.
template <int kSum, int kLeft, int kRight>
inline void multiply_add_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

#endif
#endif
