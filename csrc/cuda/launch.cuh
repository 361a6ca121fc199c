// From a problem to a kernel: the instance that fits, its grid and its shared memory. The only
// place that launches.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.h"
#include "kernels.h"
#include "scores.cuh"

#ifndef ATTN_EXT_EMULATED
#include <cuda_runtime.h>
#endif

namespace attn_ext::cuda {

// Runs a kernel of kThreads threads a block; none at all for an empty grid.
template <typename... Parameters, typename... Arguments>
void launch(const Settings& settings, int64_t blocks, int shared_bytes,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("the problem needs " + std::to_string(blocks) +
                             " blocks, and a CUDA grid has at most 2**31 - 1: split the batch");
  }
#ifdef ATTN_EXT_EMULATED
  emulator::launch(emulator::Dim3{static_cast<unsigned>(blocks), 1, 1}, kThreads, shared_bytes,
                   kernel, arguments...);
  (void)settings;
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr int kAlwaysThere = 48 << 10;
  if (shared_bytes > kAlwaysThere) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "asking for shared memory");
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), pointers,
                         static_cast<size_t>(shared_bytes),
                         static_cast<cudaStream_t>(settings.stream)),
        "launching a kernel");
#endif
}

// Calls call(Element{}) with the type that the tensors' elements are multiplied as.
template <typename Call>
void with_element(const Problem& p, const Settings& settings, Call call) {
  const bool turing = settings.shared_limit <= 64 << 10;
  switch (p.dtype) {
    case DType::kFloat16:
      return turing ? call(TuringFloat16{}) : call(Float16{});
    case DType::kBFloat16:
      return call(BFloat16{});
    case DType::kFloat32:
      if (turing) return call(TuringFloat32{});
      return settings.allow_tf32 ? call(TF32{}) : call(float{});
    default:
      throw std::runtime_error("the CUDA kernels take float16, bfloat16 and float32");
  }
}

// The same without TF32, for kernels that are not worth another instance.
template <typename Call>
void with_exact_element(const Problem& p, Settings settings, Call call) {
  settings.allow_tf32 = false;
  with_element(p, settings, [&](auto element) {
    if constexpr (!std::is_same_v<decltype(element), TF32>) call(element);
  });
}

// Calls call(width) with the narrowest tile that holds the head dimensions, as a constant.
template <typename Call>
void with_width(const Problem& p, Call call) {
  const int64_t width = std::max(p.head_dim, p.value_dim);
  if (width <= 32) return call(std::integral_constant<int, 32>{});
  if (width <= 64) return call(std::integral_constant<int, 64>{});
  if (width <= 96) return call(std::integral_constant<int, 96>{});
  if (width <= 128) return call(std::integral_constant<int, 128>{});
  if (width <= 192) return call(std::integral_constant<int, 192>{});
  if (width <= kWidestTile) return call(std::integral_constant<int, kWidestTile>{});
  throw std::runtime_error("the CUDA kernels take head dimensions up to " +
                           std::to_string(kWidestTile));
}

// Whether a score is its product times a positive factor, or hidden by position, dropout or not;
// and whether all of these rows lie on 16 bytes, are a whole number of them, and less than 2^31
// bytes apart. Only halves have plain kernels.
template <typename Element, typename... Views>
bool is_plain(const Problem& p, const Views&... views) {
  const bool simple = p.scale > 0 && p.softcap == 0;
  const bool whole = (p.head_dim | p.value_dim) % (16 / static_cast<int>(sizeof(Element))) == 0;
  const auto suits = [](const View& view) {
    return rows_are_aligned<Element>(view) &&
           view.stride[2] <= std::numeric_limits<int32_t>::max() / 2;
  };
  return kIsHalf<Element> && simple && whole && !p.alibi_slopes && !p.mask && !p.key_mask &&
         (suits(views) && ...);
}

template <typename Element>
bool is_plain_backward(const Problem& p, const BackwardArguments& to) {
  return !to.dweights && p.dropout_p == 0 &&
         is_plain<Element>(p, p.query, p.key, p.value, to.dout, to.dquery, to.dkey, to.dvalue);
}

inline int64_t blocks_of(int64_t size, int step) { return (size + step - 1) / step; }

}  // namespace attn_ext::cuda
