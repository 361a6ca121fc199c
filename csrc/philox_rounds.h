// The rounds of Philox. Included inside a namespace, and again for each instruction set of a CPU:
// compiled without its instructions, they would call those that multiply instead of containing
// them.

// counter[4] becomes the four random words. Word needs ^ with itself and with uint32_t;
// multiply(word, constant, &high, &low) gives the 64-bit product's halves.
template <typename Word, typename Multiply>
ATTN_EXT_HOST_DEVICE inline void philox(Word counter[4], const PhiloxKeys& keys,
                                        Multiply multiply) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < PhiloxConstants::kRounds; ++round) {
    Word high0, low0, high1, low1;
    multiply(counter[0], PhiloxConstants::kMultiplier0, &high0, &low0);
    multiply(counter[2], PhiloxConstants::kMultiplier1, &high1, &low1);
    counter[0] = high1 ^ counter[1] ^ keys[2 * round];
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ keys[2 * round + 1];
    counter[3] = low0;
  }
}
