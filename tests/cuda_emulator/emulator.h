// Runs CUDA kernels on the host: g++ compiles the kernel sources unchanged, against this header.
//
// The threads of a block are fibers of one host thread, and blocks run one after another. A thread
// runs until it waits in sync_threads or in a warp operation; a warp goes on to the block's barrier
// before another warp runs, so that warps are as far apart as the kernel's barriers let them be.
// A warp operation (shuffle, ldmatrix, mma) is a rendezvous of 32 lanes whose last computes for
// all.
//
// What finds which mistake:
//   emulator itself    divergent barriers, lanes missing from a warp operation, wrong cp.async
//                      operands, copies that are never waited for: a std::runtime_error
//   0xFF bytes         (NaN) fill shared memory before a block and a cp.async destination until its
//                      wait, so that what is read too early spoils the result
//   order              a missing barrier gives another result in another order of lanes and warps
//   AddressSanitizer   red zones around shared memory; a cp.async destination is poisoned until its
//                      wait, and its operands are checked where the copy is issued
//   ThreadSanitizer    a race in shared memory, or between blocks in global memory: each CUDA
//   thread
//                      is one of its threads, and only sync_threads and warp operations order them.
//                      Run it under `setarch -R`
//
// Compile emulator.cpp without sanitizers (it looks for them when it runs) and kernels with
// -fno-strict-aliasing. NOTE: a warp operation orders memory like __syncwarp, which CUDA does not
// promise of a shuffle, and __syncthreads does not tell apart two barriers in different branches.
#pragma once

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#ifndef __global__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#endif
#ifndef __launch_bounds__  // CUDA's host headers define the others only
#define __grid_constant__
#define __launch_bounds__(...)
#endif

namespace attn_ext::emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// The order of blocks, of a block's warps and of a warp's lanes: one of these, or a positive seed
// that shuffles them. ATTN_EXT_EMULATOR_ORDER (forward, reverse or the seed) sets it at the start.
constexpr int kForward = 0, kReverse = -1;
extern int order;

// Wavefronts that ldmatrix needed beyond one for each 8 rows, and those 8-row phases themselves.
struct BankConflicts {
  std::uint64_t extra_wavefronts = 0, phases = 0;
};
extern BankConflicts bank_conflicts;

// Takes the 16-byte rows of an ldmatrix of 1, 2 or 4 matrices; for the last lane to call.
void count_bank_conflicts(const void* const (&row_address)[32], int matrices);

// The block's dynamic shared memory: as many bytes as the launch names, 128-byte aligned.
char* shared_memory();

void sync_threads();

// cp.async of 4, 8 or 16 bytes, of which those from valid_bytes on become 0 and are not read.
// Source and destination are touched in wait, by the thread that waits for its own copies.
void copy_async(void* shared, const void* global, int bytes, int valid_bytes);
void commit();
void wait(int pending);

namespace internal {

// Returns whether this lane is the last one to come. The others return when it has called release.
bool arrive(const void* operation, const char* name, const void* in, void* out);
const void* const* inputs();  // of each lane
void* const* outputs();
void release();

void run(Dim3 grid, int threads, int shared_bytes, void (*body)(void*), void* context);

}  // namespace internal

// One operation of all 32 lanes of a warp: compute(const In (&in)[32], Out (&out)[32]). Its type
// tells operations apart, so each wrapper passes a lambda of its own.
template <typename Out, typename In, typename Compute>
Out warp(const In& in, Compute compute) {
  static_assert(std::is_trivially_copyable_v<In> && std::is_trivially_copyable_v<Out>,
                "registers are plain values");
  static char operation;  // its address stands for the types
  Out result;
  if (internal::arrive(&operation, __PRETTY_FUNCTION__, &in, &result)) {
    In in_lanes[32];
    Out out_lanes[32];
    const void* const* inputs = internal::inputs();
    void* const* outputs = internal::outputs();
    for (int lane = 0; lane < 32; ++lane) in_lanes[lane] = *static_cast<const In*>(inputs[lane]);
    compute(std::as_const(in_lanes), out_lanes);
    for (int lane = 0; lane < 32; ++lane) *static_cast<Out*>(outputs[lane]) = out_lanes[lane];
    internal::release();
  }
  return result;
}

// Runs every block of the grid, and throws std::runtime_error at the emulator's first error.
template <typename... Parameters, typename... Arguments>
void launch(Dim3 grid, int threads, int shared_bytes, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  internal::run(
      grid, threads, shared_bytes,
      [](void* context) {
        const Call& same = *static_cast<Call*>(context);
        std::apply(same.kernel, same.parameters);
      },
      &call);
}

}  // namespace attn_ext::emulator

extern attn_ext::emulator::Dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { attn_ext::emulator::sync_threads(); }

inline void __syncwarp() {
  attn_ext::emulator::warp<char>(char(), [](const char (&)[32], char (&out)[32]) {
    for (char& value : out) value = 0;
  });
}
