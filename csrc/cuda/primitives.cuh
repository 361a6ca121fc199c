// What the kernels need of the hardware, one wrapper an instruction: the only file with inline PTX.
//
// Every wrapper has a second body in plain C++, written from the PTX ISA's tables of fragments,
// which the tests run on the host (ATTN_EXT_EMULATED: the architecture times ten, 750 or 800; see
// tests/cuda_emulator). Addresses of shared memory are byte offsets from the start of the block's.
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix multiply-accumulate"):
//     C, 16x8 float: c[0], c[1] = C[g][2t], C[g][2t + 1];  c[2], c[3] the same in row g + 8
//     A, 16 rows: a[0], a[1], a[2], a[3] = rows g, g + 8, g, g + 8 of two 16-byte columns of chunks
//     B, 8 columns: b[0], b[1] = column g of two chunks
// where a lane holds the four bytes 4t to 4t + 3 of a chunk: two halves, or one float.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../attention.h"
#include "../philox.h"

#ifdef ATTN_EXT_EMULATED
#include "emulator.h"
#define ATTN_EXT_ARCHITECTURE ATTN_EXT_EMULATED
#elif defined(__CUDA_ARCH__)
#define ATTN_EXT_ARCHITECTURE __CUDA_ARCH__
#else
#define ATTN_EXT_ARCHITECTURE 0  // nvcc's pass for the host, which never calls these
#endif

namespace attn_ext::cuda {

#ifdef ATTN_EXT_EMULATED
using std::max;
using std::min;
#endif

struct Float16 {
  uint16_t bits;
};
// On 7.5, where a block has 64 KiB and nothing copies in the background: smaller tiles. Before 8.0
// tensor cores take halves alone; float32 is multiplied elsewhere there.
struct TuringFloat16 : Float16 {};
struct TuringFloat32 {
  float value;
};
struct BFloat16 {
  uint16_t bits;
};
// A float32 whose products may be rounded to TF32; float itself stays accurate to float32.
struct TF32 {
  float value;
};
template <typename Element>
constexpr bool kIsHalf = sizeof(Element) == 2;
template <typename Element>
constexpr bool kIsTuring =
    std::is_same_v<Element, TuringFloat16> || std::is_same_v<Element, TuringFloat32>;
template <typename Element>
constexpr bool kAvailable = kIsTuring<Element> == ATTN_EXT_ARCHITECTURE < 800;

__device__ __forceinline__ uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}
__device__ __forceinline__ float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// start + index * step bytes: one instruction, where the compiler may take seven.
__device__ __forceinline__ const char* address_of(const char* start, int index, int step) {
#if defined(__CUDA_ARCH__)
  const char* result;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(index), "r"(step), "l"(start));
  return result;
#else
  return start + static_cast<int64_t>(index) * step;
#endif
}

__device__ __forceinline__ const char* address_of(const char* start, int index, int64_t step) {
  return start + index * step;
}

// All 64 bits of a product: one instruction, where the compiler adds zeros to the upper half.
__device__ __forceinline__ uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t result;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(result) : "r"(a), "r"(b));
  return result;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// Bytes of a (0 to 3) and b (4 to 7); `selector` names four of them, the lowest first.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
#else
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  }
  return result;
#endif
}

// Of two float16s that are not negative: 0xFFFF where a >= b, else 0.
__device__ __forceinline__ uint32_t at_least(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  return (a >> 16 >= b >> 16 ? 0xFFFF0000 : 0) | ((a & 0xFFFF) >= (b & 0xFFFF) ? 0xFFFF : 0);
#endif
}

// A value that the compiler keeps rather than computes again, where registers are short.
template <typename T>
__device__ __forceinline__ T* kept(T* pointer) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(pointer));
#endif
  return pointer;
}

// A value that loops don't compute things of in advance, for the same reason.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// --- Conversions, to nearest, ties to even

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(TF32 x) { return x.value; }
__device__ __forceinline__ float to_float(TuringFloat32 x) { return x.value; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return float_of(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) {
#if defined(ATTN_EXT_EMULATED)
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
#elif defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return 0;
#endif
}

__device__ __forceinline__ void from_float(float x, float* to) { *to = x; }
__device__ __forceinline__ void from_float(float x, TF32* to) { to->value = x; }
__device__ __forceinline__ void from_float(float x, TuringFloat32* to) { to->value = x; }
__device__ __forceinline__ void from_float(float x, Float16* to) {
#if defined(ATTN_EXT_EMULATED)
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&to->bits, &half, 2);
#elif defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#endif
}
__device__ __forceinline__ void from_float(float x, BFloat16* to) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to->bits = x != x ? 0x7FC0 : static_cast<uint16_t>(rounded);
}

// Two floats rounded to halves, the first in the low half.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t result;
  if constexpr (std::is_base_of_v<Float16, Element>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
#else
  Element first, second;
  from_float(low, &first), from_float(high, &second);
  return static_cast<uint32_t>(second.bits) << 16 | first.bits;
#endif
}

// The nearest TF32, ten bits after the point; ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
#else
  const uint32_t bits = bits_of(x);
  return x - x == 0 ? (bits + 0x1000) & ~0x1FFFu : bits;
#endif
}

// 2^x, within two units in the last place; results below the normal numbers are 0.
__device__ __forceinline__ float exp2(float x) {
#if defined(ATTN_EXT_EMULATED)
  return x < -126 ? 0 : std::exp2(x);
#elif defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 0;
#endif
}

// --- Threads of a warp and of a block

// threadIdx.x once more, for what is not worth a register until it is used.
__device__ __forceinline__ uint32_t thread_here() { return opaque(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }

__device__ __forceinline__ void synchronize_block() {
#if defined(ATTN_EXT_EMULATED)
  emulator::sync_threads();
#elif defined(__CUDA_ARCH__)
  __syncthreads();
#endif
}

// What lanes of the warp wrote before, all of them see after.
__device__ __forceinline__ void synchronize_warp() {
#if defined(ATTN_EXT_EMULATED) || defined(__CUDA_ARCH__)
  __syncwarp();
#endif
}

// The word of the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t x, int mask) {
#if defined(ATTN_EXT_EMULATED)
  return emulator::warp<uint32_t>(x, [mask](const uint32_t (&in)[32], uint32_t (&out)[32]) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[lane ^ mask];
  });
#elif defined(__CUDA_ARCH__)
  uint32_t result;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=r"(result)
               : "r"(x), "r"(mask));
  return result;
#else
  return x;
#endif
}
__device__ __forceinline__ float shuffle_xor(float x, int mask) {
  return float_of(shuffle_xor(bits_of(x), mask));
}

// The word of another lane, of any number.
__device__ __forceinline__ uint32_t shuffle(uint32_t x, int lane) {
#if defined(ATTN_EXT_EMULATED)
  struct Given {
    uint32_t x;
    int lane;
  };
  return emulator::warp<uint32_t>(Given{x, lane}, [](const Given(&in)[32], uint32_t (&out)[32]) {
    for (int i = 0; i < 32; ++i) out[i] = in[in[i].lane].x;
  });
#elif defined(__CUDA_ARCH__)
  uint32_t result;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=r"(result)
               : "r"(x), "r"(lane));
  return result;
#else
  return x;
#endif
}

// The bits of the lanes that say yes.
__device__ __forceinline__ uint32_t ballot(bool yes) {
#if defined(ATTN_EXT_EMULATED)
  return emulator::warp<uint32_t>(yes, [](const bool (&in)[32], uint32_t (&out)[32]) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<uint32_t>(in[lane]) << lane;
    for (uint32_t& result : out) result = votes;
  });
#elif defined(__CUDA_ARCH__)
  return __ballot_sync(0xFFFFFFFFu, yes);
#else
  return yes;
#endif
}

__device__ __forceinline__ int count_leading_zeros(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __clz(static_cast<int>(x));
#else
  return x == 0 ? 32 : __builtin_clz(x);
#endif
}

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
// Over the four lanes that hold a row of C.
__device__ __forceinline__ float sum_over_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// --- Shared memory

#if defined(__CUDACC__)
extern __shared__ __align__(128) char dynamic_shared_memory[];
#endif

__device__ __forceinline__ char* shared_pointer(uint32_t offset) {
#if defined(ATTN_EXT_EMULATED)
  return emulator::shared_memory() + offset;
#elif defined(__CUDACC__)
  return dynamic_shared_memory + offset;
#endif
}
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ uint32_t shared_address(uint32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory)) + offset;
}
#endif

// Sixteen bytes from global to shared memory, of which the first `valid` are read and the others
// become 0. In the background from sm_80 on, until a wait_for_copies.
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from, int valid) {
#if defined(ATTN_EXT_EMULATED) && ATTN_EXT_EMULATED >= 800
  emulator::copy_async(shared_pointer(to), from, 16, valid);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
#else
  struct alignas(16) Chunk {
    uint32_t words[4];
  };
  Chunk chunk{};
  if (valid == 16) {
    chunk = *static_cast<const Chunk*>(from);
  } else {
    for (int i = 0; i < valid / 2; ++i) {
      const uint32_t half = static_cast<const uint16_t*>(from)[i];
      chunk.words[i / 2] |= half << (i % 2 * 16);
    }
  }
  *reinterpret_cast<Chunk*>(shared_pointer(to)) = chunk;
#endif
}
__device__ __forceinline__ void commit_copies() {
#if defined(ATTN_EXT_EMULATED) && ATTN_EXT_EMULATED >= 800
  emulator::commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most `kPending` of the groups committed are still under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if defined(ATTN_EXT_EMULATED) && ATTN_EXT_EMULATED >= 800
  emulator::wait(kPending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four matrices of eight rows of 16 bytes. Lane i gives the offset of row i % 8 of matrix i / 8. Of
// each matrix it gets the four bytes at 4t of row g; transposed, halves 2t and 2t + 1 of column g.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row) {
#if defined(ATTN_EXT_EMULATED)
  struct Words {
    uint32_t words[4];
  };
  const char* address = shared_pointer(row);
  const Words mine =
      emulator::warp<Words>(address, [](const char* const(&rows)[32], Words(&out)[32]) {
        emulator::count_bank_conflicts(reinterpret_cast<const void* const(&)[32]>(rows), 4);
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 4; ++i) {
            uint16_t halves[2];
            for (int j = 0; j < 2; ++j) {
              const int r = kTransposed ? 2 * t + j : g, column = kTransposed ? g : 2 * t + j;
              std::memcpy(&halves[j], rows[8 * i + r] + 2 * column, 2);
            }
            out[lane].words[i] = static_cast<uint32_t>(halves[1]) << 16 | halves[0];
          }
        }
      });
  for (int i = 0; i < 4; ++i) to[i] = mine.words[i];
#elif defined(__CUDA_ARCH__)
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
#endif
}

// --- Matrix products: C += A B, over two chunks of 16 bytes

struct Sums {
  float c[4];
};

#if defined(ATTN_EXT_EMULATED)
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

// Fragments of a warp, and the product that they mean.
struct Fragments {
  float c[4];
  uint32_t a[4], b[2];
};
template <typename Element, typename Value>
inline void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                               Value value) {
  constexpr int kPerWord = kIsHalf<Element> ? 2 : 1, kDepth = 8 * kPerWord;
  using Pair = double __attribute__((vector_size(16)));  // of neighbouring columns
  const Fragments mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Sums sums = emulator::warp<Sums>(mine, [value](const Fragments(&in)[32], Sums(&out)[32]) {
    Pair right[kDepth][4];
    for (int k = 0; k < kDepth; ++k) {
      const int t = k / kPerWord % 4, chunk = k / (4 * kPerWord), part = k % kPerWord;
      for (int i = 0; i < 4; ++i) {
        const Fragments* const lanes = in + 8 * i + t;  // of columns 2i and 2i + 1
        right[k][i] = Pair{value(lanes[0].b[chunk], part), value(lanes[4].b[chunk], part)};
      }
    }
    for (int row = 0; row < 16; ++row) {
      const int first_lane = row % 8 * 4, half = row / 8;
      Pair sum[4];
      for (int i = 0; i < 4; ++i) {
        const float* from = in[first_lane + i].c + 2 * half;
        sum[i] = Pair{from[0], from[1]};
      }
      for (int k = 0; k < kDepth; ++k) {
        const int t = k / kPerWord % 4, chunk = k / (4 * kPerWord), part = k % kPerWord;
        const double left = value(in[first_lane + t].a[2 * chunk + half], part);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[i] += left * right[k][i];
      }
      for (int i = 0; i < 4; ++i) {
        float* to = out[first_lane + i].c + 2 * half;
        to[0] = static_cast<float>(sum[i][0]), to[1] = static_cast<float>(sum[i][1]);
      }
    }
  });
  for (int i = 0; i < 4; ++i) c[i] = sums.c[i];
}
#endif

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, Float16) {
#if defined(ATTN_EXT_EMULATED)
  multiply_fragments<Float16>(c, a, b0, b1, [](uint32_t word, int part) {
    return to_float(Float16{static_cast<uint16_t>(word >> 16 * part)});
  });
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(__CUDA_ARCH__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// From sm_80 on.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, BFloat16) {
#if defined(ATTN_EXT_EMULATED)
  multiply_fragments<BFloat16>(c, a, b0, b1, [](uint32_t word, int part) {
    return to_float(BFloat16{static_cast<uint16_t>(word >> 16 * part)});
  });
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(__CUDA_ARCH__)
  __trap();
#endif
}

// Operands that are TF32 already.
__device__ __forceinline__ void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
#if defined(ATTN_EXT_EMULATED)
  multiply_fragments<float>(c, a, b0, b1, [](uint32_t word, int) { return float_of(word); });
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The same of float32 where there are no tensor cores for it: every lane fetches the rows of A and
// the columns of B that its sums need. Not inlined: it is as long as many products.
__device__ inline __attribute__((noinline)) Sums multiply_add_by_lanes(Sums sums, uint4 a,
                                                                       uint2 b) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const int from = 4 * g + k % 4;
    const float low = float_of(shuffle(k < 4 ? a.x : a.z, from));
    const float high = float_of(shuffle(k < 4 ? a.y : a.w, from));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float right = float_of(shuffle(k < 4 ? b.x : b.y, 4 * (2 * t + j) + k % 4));
      sums.c[j] = fmaf(low, right, sums.c[j]);
      sums.c[2 + j] = fmaf(high, right, sums.c[2 + j]);
    }
  }
  return sums;
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, TuringFloat32) {
  const Sums sums = multiply_add_by_lanes(Sums{{c[0], c[1], c[2], c[3]}},
                                          uint4{a[0], a[1], a[2], a[3]}, uint2{b0, b1});
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = sums.c[i];
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, TF32) {
  const uint32_t left[4] = {to_tf32(float_of(a[0])), to_tf32(float_of(a[1])),
                            to_tf32(float_of(a[2])), to_tf32(float_of(a[3]))};
  multiply_add_tf32(c, left, to_tf32(float_of(b0)), to_tf32(float_of(b1)));
}

// Accurate to float32: each operand is the sum of two TF32, and the product of the two small parts
// is left out ("3xTF32"; Ootomo and Yokota, 2022, arXiv:2203.03341). Of what is not finite it may
// make NaN where the exact sum is inf; what needs that computes it again.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, float) {
  struct Parts {
    uint32_t large, small;
  };
  const auto split = [](uint32_t bits) -> Parts {
    const float x = float_of(bits);
    const uint32_t large = to_tf32(x);
    return {large, to_tf32(x - float_of(large))};
  };
  // No loop: arrays that one fills would be stored to memory as well.
  const Parts a0 = split(a[0]), a1 = split(a[1]), a2 = split(a[2]), a3 = split(a[3]);
  const Parts first = split(b0), second = split(b1);
  const uint32_t large[4] = {a0.large, a1.large, a2.large, a3.large};
  const uint32_t small[4] = {a0.small, a1.small, a2.small, a3.small};
  multiply_add_tf32(c, small, first.large, second.large);
  multiply_add_tf32(c, large, first.small, second.small);
  multiply_add_tf32(c, large, first.large, second.large);
}

}  // namespace attn_ext::cuda
