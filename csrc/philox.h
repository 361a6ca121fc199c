// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11), generic in the type of a 32-bit word, and what
// dropout makes of it. The same in Python, with the reasons: attn_ext/philox.py.
#pragma once

#include <cstdint>

#include "attention.h"

namespace attn_ext {

struct PhiloxConstants {
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u;
  static constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
  static constexpr uint32_t kKeyStep0 = 0x9E3779B9u;
  static constexpr uint32_t kKeyStep1 = 0xBB67AE85u;
  static constexpr int kRounds = 10;
};

// The two words that each round takes of the key.
using PhiloxKeys = uint32_t[2 * PhiloxConstants::kRounds];
inline void make_philox_keys(uint64_t seed, PhiloxKeys& keys) {
  for (uint32_t round = 0; round < PhiloxConstants::kRounds; ++round) {
    keys[2 * round] = static_cast<uint32_t>(seed) + round * PhiloxConstants::kKeyStep0;
    keys[2 * round + 1] = static_cast<uint32_t>(seed >> 32) + round * PhiloxConstants::kKeyStep1;
  }
}

#include "philox_rounds.h"

// Which random byte decides about a weight: of the call whose counter starts with these two words.
// A call serves rows r and r + 8, and of each columns c, c + 1, c + 8, c + 9, ... c + 25.
struct RandomByte {
  uint32_t column_word, row_word;
  uint32_t index;

  ATTN_EXT_HOST_DEVICE static RandomByte of(uint32_t row, uint32_t column) {
    return {column / 32 * 4 + column % 8 / 2, row / 16 * 8 + row % 8,
            row % 16 / 8 * 8 + column % 32 / 8 * 2 + column % 2};
  }
};
constexpr uint32_t kRandomRows = 16, kRandomColumns = 32;  // where the pattern starts again

// Whether a call's threshold is rounded up to the next byte; its first 8 bits are that byte.
ATTN_EXT_HOST_DEVICE inline bool rounds_up(const uint32_t (&words)[4], uint32_t threshold) {
  return (words[0] ^ words[1] ^ words[2] ^ words[3]) < threshold << 8;
}

}  // namespace attn_ext
