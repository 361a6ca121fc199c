// Two products by the kernels' own tiles and fragments, (A B^T) V: small integers, so that every
// order of summation gives the same.
//
// Prints for each element type how many elements are wrong and how many wavefronts bank conflicts
// cost. Tested by tests/cuda/test_emulator.py, which also compiles it against csrc/cuda with a
// fault planted there.
#define ATTN_EXT_EMULATED 800

#include <cstdio>
#include <vector>

#include "cuda/tile.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kRows = 16 * kWarps, kKeys = 32;

struct Operands {
  const void *a, *b, *v;
  float* out;  // (kRows, width)
};

template <typename Element, int kWidth>
__global__ void multiply(const Operands given) {
  using A = Tile<Element, kRows, kWidth, 0>;
  using B = Tile<Element, kKeys, kWidth, A::kEnd>;
  using V = Tile<Element, kKeys, kWidth, B::kEnd>;
  const auto source = [](auto tile, const void* start, int rows) {
    return Source<decltype(tile), true>::make(static_cast<const Element*>(start), kWidth, rows,
                                              kWidth, true);
  };
  source(A{}, given.a, kRows).copy(0);
  source(B{}, given.b, kKeys).copy(0);
  source(V{}, given.v, kKeys).copy(0);
  commit_copies();
  wait_for_copies<0>();
  synchronize_block();

  const int first = 16 * warp_index();
  float s[1][kKeys / 8][4] = {}, out[1][kWidth / 8][4] = {};
  multiply_rows<B, kWidth / kDepth<Element>>(s, A::Lane::of_a(first), B::Lane::of_b(), Element{});
  multiply_accumulators<V>(out, s, V::Lane::by_row(), Element{});
  for (int n = 0; n < kWidth / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = first + lane_index() / 4 + i / 2 * 8;
      const int column = 8 * n + lane_index() % 4 * 2 + i % 2;
      given.out[row * kWidth + column] = out[0][n][i];
    }
  }
}

template <typename Element, int kWidth>
void check(const char* name) {
  const auto made = [](int rows, int seed) {
    std::vector<float> values(rows * kWidth);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i * seed % 7) - 3;
    return values;
  };
  const auto rounded = [](const std::vector<float>& values) {
    std::vector<Element> result(values.size());
    for (size_t i = 0; i < values.size(); ++i) from_float(values[i], &result[i]);
    return result;
  };
  const std::vector<float> a = made(kRows, 5), b = made(kKeys, 3), v = made(kKeys, 11);
  const std::vector<Element> a_rounded = rounded(a), b_rounded = rounded(b), v_rounded = rounded(v);
  std::vector<float> out(kRows * kWidth);
  emulator::bank_conflicts = {};
  constexpr int kSharedBytes = (kRows + 2 * kKeys) * kWidth * static_cast<int>(sizeof(Element));
  emulator::launch({1}, kThreads, kSharedBytes, multiply<Element, kWidth>,
                   Operands{a_rounded.data(), b_rounded.data(), v_rounded.data(), out.data()});

  int wrong = 0;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kWidth; ++column) {
      float sum = 0;
      for (int key = 0; key < kKeys; ++key) {
        float score = 0;
        for (int d = 0; d < kWidth; ++d) score += a[row * kWidth + d] * b[key * kWidth + d];
        Element weight;
        from_float(score, &weight);
        sum += to_float(weight) * v[key * kWidth + column];
      }
      wrong += out[row * kWidth + column] != sum;
    }
  }
  std::printf("%s %d: %s, %s\n", name, kWidth, wrong ? "wrong" : "right",
              emulator::bank_conflicts.extra_wavefronts ? "bank conflicts" : "no bank conflicts");
}

}  // namespace
}  // namespace attn_ext::cuda

int main() {
  using namespace attn_ext::cuda;
  check<Float16, 64>("float16");
  check<Float16, 32>("float16");
  check<BFloat16, 96>("bfloat16");
  check<TF32, 32>("TF32");
  check<float, 96>("float32");
}
