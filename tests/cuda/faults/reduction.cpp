// A block-wide sum with everything the emulator offers, right unless its argument plants a fault.
//
//   reduction NAME...     of a fault, or "none": each is launched after the other
//
// Block b sums its row of the input, (kBlocks, kCount) floats: tiles of kThreads * 4 floats arrive
// by cp.async in one buffer while the other is summed; every thread reads what another one has
// copied; shuffles and shared memory then add up the threads. Tested by
// tests/cuda/test_emulator.py.
//
// Exit status, of the last launch: 0 right, 1 wrong sums, 2 an error of the emulator.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../../cuda_emulator/emulator.h"

namespace emulator = attn_ext::emulator;

namespace {

constexpr int kBlocks = 6, kThreads = 128, kWarps = kThreads / 32, kTile = kThreads * 4;
constexpr int kCount = 3 * kTile + 150;  // the last tile and its last copy are partly outside
constexpr int kStride = kCount + 2;      // of aligned rows, with NaN between them
constexpr int kSharedBytes = (2 * kTile + kWarps) * sizeof(float);

enum Fault {
  kNone,
  kMissingBarrierBeforeRead,
  kMissingBarrierAfterRead,
  kMissingBarrierBeforePartialSums,
  kMissingWait,
  kMissingCommit,
  kNeverWaited,
  kCopyIntoCopy,
  kPastShared,
  kPastSharedByCopy,
  kPastGlobal,
  kPastGlobalByCopy,
  kDivergentBarrier,
  kMissingLane,
  kDifferentOperations,
  kRacingBlocks,
  kOddThreads,
  kTooMuchSharedMemory,
};
constexpr const char* kNames[] = {
    "none",
    "missing_barrier_before_read",
    "missing_barrier_after_read",
    "missing_barrier_before_partial_sums",
    "missing_wait",
    "missing_commit",
    "never_waited",
    "copy_into_copy",
    "past_shared",
    "past_shared_by_copy",
    "past_global",
    "past_global_by_copy",
    "divergent_barrier",
    "missing_lane",
    "different_operations",
    "racing_blocks",
    "odd_threads",
    "too_much_shared_memory",
};

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  struct Operands {
    float value;
    int mask;
  };
  return emulator::warp<float>(Operands{value, mask},
                               [](const Operands(&in)[32], float (&out)[32]) {
                                 for (int lane = 0; lane < 32; ++lane)
                                   out[lane] = in[lane ^ in[lane].mask].value;
                               });
}

__device__ __forceinline__ float broadcast(float value) {
  return emulator::warp<float>(value, [](const float (&in)[32], float (&out)[32]) {
    for (float& lane : out) lane = in[0];
  });
}

__device__ int block_number() { return blockIdx.y * gridDim.x + blockIdx.x; }

__device__ void copy_tile(float* buffer, const float* row, int tile, Fault fault) {
  const int first = tile * kTile + threadIdx.x * 4;
  const int left = kCount - first;
  int valid = left >= 4 ? 16 : left > 0 ? left * 4 : 0;
  if (fault == kPastGlobalByCopy && left == 2) valid = 12;
  if (fault == kPastSharedByCopy && tile == 1) buffer += kWarps + 4;
  emulator::copy_async(buffer + threadIdx.x * 4, row + first, 16, valid);
  if (fault != kMissingCommit) emulator::commit();
}

__global__ void __launch_bounds__(kThreads)
    reduction(const float* __restrict__ input, float* __restrict__ sums, Fault fault) {
  float* const buffers = reinterpret_cast<float*>(emulator::shared_memory());
  float* const partial_sums = buffers + 2 * kTile;
  const float* row = input + block_number() * kStride;
  const int thread = threadIdx.x, lane = thread % 32;
  const int tiles = (kCount + kTile - 1) / kTile;

  float sum = 0;
  copy_tile(buffers, row, 0, fault);
  for (int tile = 0; tile < tiles; ++tile) {
    float* const buffer = buffers + tile % 2 * kTile;
    const bool more = tile + 1 < tiles;
    if (more) copy_tile(buffers + (tile + 1) % 2 * kTile, row, tile + 1, fault);
    if (fault == kCopyIntoCopy && tile == 1) copy_tile(buffer, row, tile, fault);
    if (fault != kMissingWait && (fault != kNeverWaited || more)) emulator::wait(more);
    if (fault != kMissingBarrierBeforeRead) __syncthreads();
    for (int i = 0; i < 4; ++i) sum += buffer[(kThreads - 1 - thread) * 4 + i];
    if (fault != kMissingBarrierAfterRead) __syncthreads();
  }
  if (fault == kMissingWait) emulator::wait(0);
  if (fault == kPastShared && thread == kThreads - 1) sum += partial_sums[kWarps];
  if (fault == kPastGlobal && thread == 0) sum += row[kCount];

  for (int mask = 16; mask > 0; mask /= 2)
    if (fault != kMissingLane || lane != 5) sum += shuffle_xor(sum, mask);
  if (fault == kDifferentOperations) sum = lane < 16 ? shuffle_xor(sum, 0) : broadcast(sum);
  if (lane == 0) partial_sums[thread / 32] = sum;
  if (fault == kDivergentBarrier ? thread < kThreads - 32
                                 : fault != kMissingBarrierBeforePartialSums)
    __syncthreads();
  if (thread != kThreads - 32) return;
  float total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += partial_sums[warp];
  sums[block_number()] = total;
  if (fault == kRacingBlocks) sums[kBlocks] += total;
}

int run(Fault fault) {
  std::vector<float> input((kBlocks - 1) * kStride + kCount, NAN);
  std::vector<float> sums(kBlocks + 1), expected(kBlocks);
  for (int index = 0; index < kBlocks * kCount; ++index) {
    const float value = index * 7 % 23 - 9;
    input[index / kCount * kStride + index % kCount] = value;
    expected[index / kCount] += value;
  }
  const int threads = fault == kOddThreads ? kThreads + 1 : kThreads;
  const int shared_bytes = fault == kTooMuchSharedMemory ? 1 << 20 : kSharedBytes;
  try {
    emulator::launch({3, kBlocks / 3}, threads, shared_bytes, reduction, input.data(), sums.data(),
                     fault);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
    return 2;
  }
  for (int index = 0; index < kBlocks; ++index) {
    if (sums[index] == expected[index]) continue;
    std::printf("block %d: %g, expected %g\n", index, sums[index], expected[index]);
    return 1;
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  int status = 0;
  for (int argument = 1; argument < count; ++argument) {
    int fault = 0;
    while (std::strcmp(arguments[argument], kNames[fault])) ++fault;
    status = run(static_cast<Fault>(fault));
  }
  return status;
}
