// Which weights dropout keeps: one at a time, and those of a lane's places in a tile. ../philox.h
// has the pattern, which follows the fragments: rows and columns of C are a lane's own where rows
// are queries, and two lanes share a call where they are keys.
#pragma once

#include "scores.cuh"

namespace attn_ext::cuda {

__device__ __forceinline__ bool drops_weights(const Problem& p) {
  return p.single.dropout_factor != 0;
}

// A call of the generator, and what a byte must reach to keep its weight, twice: an instruction
// compares two float16s, of which such small numbers are subnormal ones, in the same order.
struct RandomBytes {
  uint32_t words[4], least;

  // For the weight of this row and key, and those that share its call.
  __device__ __forceinline__ static RandomBytes make(const Problem& p, const Head& head, int row,
                                                     int key) {
    const RandomByte place = place_of(p, row, key);
    return make(p, place.column_word, place.row_word, head_word(p, head));
  }
  // Of a counter.
  __device__ __forceinline__ static RandomBytes make(const Problem& p, uint32_t column_word,
                                                     uint32_t row_word, uint32_t head_word) {
    RandomBytes result{{column_word, row_word, head_word, p.offset}, 0};
    philox(result.words, p.philox_keys,
           [](uint32_t a, uint32_t constant, uint32_t* high, uint32_t* low) {
             const uint64_t product = multiply_wide(a, constant);
             *high = static_cast<uint32_t>(product >> 32), *low = static_cast<uint32_t>(product);
           });
    const uint32_t down = (p.dropout_threshold >> 24) * 0x10001;
    result.least = rounds_up(result.words, p.dropout_threshold) ? down + 0x10001 : down;
    return result;
  }
  __device__ __forceinline__ static uint32_t head_word(const Problem& p, const Head& head) {
    return static_cast<uint32_t>(head.batch * p.query_heads + head.head);
  }
  __device__ __forceinline__ static RandomByte place_of(const Problem& p, int row, int key) {
    return RandomByte::of(static_cast<uint32_t>(p.query_start + row),
                          static_cast<uint32_t>(p.key_start + key));
  }

  // 0xFFFF for each of two neighbouring bytes that keeps its weight.
  __device__ __forceinline__ uint32_t mask(int word, bool upper) const {
    return at_least(permute_bytes(words[word], 0, upper ? 0x4342 : 0x4140), least);
  }
  // A bit for each byte.
  __device__ __forceinline__ uint32_t bits() const {
    uint32_t result = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) result |= mask(i / 2, i % 2 != 0) & 0x00020001u << (2 * i);
    return (result | result >> 16) & 0xFFFF;
  }
};

// Whether calls serve tiles as they lie, not those of a neighbour in part.
__host__ __device__ __forceinline__ bool calls_are_aligned(const Problem& p) {
  return p.query_start % kRandomRows == 0 && p.key_start % kRandomColumns == 0;
}

// Whether a single weight is kept.
__device__ inline bool keeps_weight(const Problem& p, const Head& head, int row, int key) {
  const uint32_t bits = RandomBytes::make(p, head, row, key).bits();
  return bits >> RandomBytes::place_of(p, row, key).index & 1;
}

// A single weight's factor: 1 / (1 - dropout_p) or 0, and 1 without dropout.
__device__ inline float keep_factor(const Problem& p, const Head& head, int row, int key) {
  if (!drops_weights(p)) return 1;
  return keeps_weight(p, head, row, key) ? p.single.dropout_factor : 0;
}

// Dropout's factors of a lane's places, as a bit for each, 16 for a call: 1 / (1 - dropout_p) or 0,
// and 1 without dropout.
template <bool kTransposed, int kMTiles, int kNTiles>
struct KeepFactors {
  static constexpr int kCallTiles = kTransposed ? 2 : kNTiles < 4 ? kNTiles : 4;
  static constexpr int kCalls = (kTransposed ? 1 : kMTiles) * kNTiles / kCallTiles;
  static_assert(kCalls <= 4 && kMTiles <= 2 && kNTiles % kCallTiles == 0, "64 bits are enough");
  using Bits = std::conditional_t<kCalls <= 2, uint32_t, uint64_t>;
  Bits bits;
  float factor;

  // `index`: as for_each_place counts.
  __device__ __forceinline__ bool keeps(int index) const { return bits >> position(index) & 1; }
  __device__ __forceinline__ float operator[](int index) const {
    return keeps(index) ? factor : 0.0f;
  }
  __device__ __forceinline__ static int position(int index) {
    const int m = index / (4 * kNTiles), n = index / 4 % kNTiles, half = index / 2 % 2;
    return kTransposed ? n * 8 + m * 4 + half * 2 + index % 2
                       : (m * (kNTiles / kCallTiles) + n / kCallTiles) * 16 + half * 8 +
                             n % kCallTiles * 2 + index % 2;
  }

  __device__ __forceinline__ static KeepFactors make(const Problem& p, const Head& head,
                                                     Place<kTransposed> place) {
    if (!drops_weights(p)) return {static_cast<Bits>(~Bits{0}), 1.0f};
    KeepFactors result{0, p.single.dropout_factor};
    if (!calls_are_aligned(p)) {
      for_each_place<kTransposed, kMTiles, kNTiles>(place, [&](int row, int key, int index) {
        result.bits |= static_cast<Bits>(keeps_weight(p, head, row, key)) << position(index);
      });
      return result;
    }
#pragma unroll
    for (int call = 0; call < kCalls; ++call) {
      constexpr int kInRow = kTransposed ? kCalls : kNTiles / kCallTiles;
      const int m = call / kInRow, n = call % kInRow * kCallTiles;
      const int row = place.row(m, n, 0), key = place.key(m, n, 0);
      uint32_t own;
      if constexpr (kTransposed) {  // of two rows, the one that this lane makes for two keys
        const int parity = lane_index() / 4 % 2;
        const uint32_t made = RandomBytes::make(p, head, row + parity, key).bits();
        const uint32_t given = shuffle_xor(made, 4);
        // Of each row the bytes for this lane's key; that of the lane's own row in its place.
        own = (made >> parity & 0x5555) << parity | (given >> parity & 0x5555) << (1 - parity);
      } else {
        own = RandomBytes::make(p, head, row, key).bits();
      }
      // Half of a call's columns are another tile's.
      constexpr bool kHalf = kTransposed ? kMTiles == 1 : kCallTiles == 2;
      if (kHalf) own = own >> key % kRandomColumns / 16 * 4 & 0x0F0F;
      result.bits |= static_cast<Bits>(own) << (16 * call);
    }
    return result;
  }
};

}  // namespace attn_ext::cuda
