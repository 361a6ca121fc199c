// What this machine can do at best: multiply-adds in registers, and reads of memory.
//
// These are the limits that `attn-ext bench` and bench/cpu.py hold the kernels against; peak.py
// compiles and loads this file. Every function runs on `threads` OpenMP threads and returns a rate:
// floating-point operations or bytes a second, or 0 where the processor lacks the instructions.
#include <omp.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// A result stored here is not optimised away, and what was loaded from here is not known before.
volatile float sink = 0;

// Seconds from when all threads start work(thread) until the last of them is done.
template <typename Work>
double seconds_of(int threads, const Work& work) {
  double start = 0, end = 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp barrier
#pragma omp master
    start = omp_get_wtime();
    work(omp_get_thread_num());
#pragma omp barrier
#pragma omp master
    end = omp_get_wtime();
  }
  return end - start;
}

// Operations a second of a loop with a given number of operations an iteration.
double rate_of(void (*loop)(int64_t), int64_t operations, int64_t iterations, int threads) {
  const double seconds = seconds_of(threads, [&](int) { loop(iterations); });
  return static_cast<double>(operations) * iterations * threads / seconds;
}

#if defined(__x86_64__)

// Accumulators that do not wait for each other: two instructions a cycle of four cycles each
// (vdpbf16ps: six) keep 8 (12) busy. 12 of vdpbf16ps still reach only 92 % on a Zen 5, so there are
// twice as many where registers allow. Two more hold the factors, and none is spilled.
constexpr int kManySums = 24;
constexpr int kFewSums = 12;

__attribute__((target("avx512f"))) void float32_avx512_loop(int64_t iterations) {
  __m512 sums[kManySums];
#pragma GCC unroll 24
  for (int i = 0; i < kManySums; ++i) sums[i] = _mm512_set1_ps(sink + i);
  const __m512 a = _mm512_set1_ps(sink + 0.5f), b = _mm512_set1_ps(sink + 0.25f);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kManySums; ++i) sums[i] = _mm512_fmadd_ps(a, b, sums[i]);
  }
#pragma GCC unroll 24
  for (int i = 1; i < kManySums; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  sink = 0 * _mm512_cvtss_f32(sums[0]);
}

__attribute__((target("avx2,fma"))) void float32_avx2_loop(int64_t iterations) {
  __m256 sums[kFewSums];
#pragma GCC unroll 12
  for (int i = 0; i < kFewSums; ++i) sums[i] = _mm256_set1_ps(sink + i);
  const __m256 a = _mm256_set1_ps(sink + 0.5f), b = _mm256_set1_ps(sink + 0.25f);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kFewSums; ++i) sums[i] = _mm256_fmadd_ps(a, b, sums[i]);
  }
#pragma GCC unroll 12
  for (int i = 1; i < kFewSums; ++i) sums[0] = _mm256_add_ps(sums[0], sums[i]);
  sink = 0 * _mm256_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f,avx512bf16"))) void bfloat16_avx512_loop(int64_t iterations) {
  __m512 sums[kManySums];
#pragma GCC unroll 24
  for (int i = 0; i < kManySums; ++i) sums[i] = _mm512_set1_ps(sink + i);
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(sink + 0.5f), _mm512_set1_ps(0.5f));
  const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(sink + 0.25f), _mm512_set1_ps(0.25f));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kManySums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
  }
#pragma GCC unroll 24
  for (int i = 1; i < kManySums; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  sink = 0 * _mm512_cvtss_f32(sums[0]);
}

// Two by two tiles of sums, none of which waits for itself: 52 cycles of latency, 16 for each.
constexpr int kTileSums = 4;
constexpr int kTileOperations = 2 * 16 * 16 * 32;

__attribute__((target("amx-tile,amx-bf16"))) void bfloat16_amx_loop(int64_t iterations) {
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
  };
  // In memory already: what GCC 12 has for ldtilecfg does not say that it reads.
  static const Shapes whole_tiles = {
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  _tile_loadconfig(&whole_tiles);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t n = 0; n < iterations; ++n) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

// Linux gives the registers to processes that ask for them.
bool tiles_are_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of <asm/prctl.h>, Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

// Sixteen bytes: what every processor has registers for. Two loads of them a cycle are several
// times what memory delivers.
typedef int32_t Vector __attribute__((vector_size(16)));
constexpr int kVectorsPerLine = 4;

// Equal parts of an array that are read side by side, each with a prefetcher of its own.
constexpr int kStreams = 4;

void read_streams(const Vector* part, int64_t vectors_per_stream) {
  Vector sums[kStreams] = {};
  for (int64_t n = 0; n < vectors_per_stream; n += kVectorsPerLine) {
#pragma GCC unroll 4
    for (int i = 0; i < kStreams; ++i) {
      const Vector* line = part + i * vectors_per_stream + n;
      sums[i] += (line[0] + line[1]) + (line[2] + line[3]);
    }
  }
  Vector sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  sink = 0 * static_cast<float>(sum[0] + sum[1] + sum[2] + sum[3]);
}

}  // namespace

extern "C" {

// float32 multiply-adds on 512-bit vectors.
double float32_avx512(int64_t iterations, int threads) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    return rate_of(float32_avx512_loop, kManySums * 2 * 16, iterations, threads);
  }
#endif
  return 0 * iterations * threads;
}

// float32 multiply-adds on 256-bit vectors.
double float32_avx2(int64_t iterations, int threads) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return rate_of(float32_avx2_loop, kFewSums * 2 * 8, iterations, threads);
  }
#endif
  return 0 * iterations * threads;
}

// bfloat16 products in pairs, added in float32 (vdpbf16ps), on 512-bit vectors.
double bfloat16_avx512(int64_t iterations, int threads) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) {
    return rate_of(bfloat16_avx512_loop, kManySums * 4 * 16, iterations, threads);
  }
#endif
  return 0 * iterations * threads;
}

// bfloat16 products by the tiles of AMX (tdpbf16ps), which take several times as long as vectors'.
double bfloat16_amx(int64_t iterations, int threads) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("amx-bf16") && tiles_are_granted()) {
    return rate_of(bfloat16_amx_loop, kTileSums * kTileOperations, iterations / 4, threads);
  }
#endif
  return 0 * iterations * threads;
}

// Every thread reads its own part of a buffer, which starts on a cache line. A buffer several times
// the size of the last cache shows what memory gives.
double memory_read(const void* buffer, int64_t bytes, int threads) {
  constexpr int64_t kLine = sizeof(Vector) * kVectorsPerLine;
  const int64_t vectors_per_stream = bytes / (kLine * kStreams * threads) * kVectorsPerLine;
  const int64_t vectors = vectors_per_stream * kStreams;
  const auto* first = static_cast<const Vector*>(buffer);
  const double seconds = seconds_of(
      threads, [&](int thread) { read_streams(first + thread * vectors, vectors_per_stream); });
  return static_cast<double>(sizeof(Vector)) * vectors * threads / seconds;
}

}  // extern "C"
