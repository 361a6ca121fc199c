// The kernels of every instruction set: one list that selection, `attn-ext info` and tests read.
#pragma once

#include <vector>

#include "../attention.h"

namespace attn_ext {

struct Kernels {
  const char* name;     // as ATTN_EXT_CPU_CAPABILITY spells it
  bool (*available)();  // whether this machine runs it
  void (*forward)(const Problem&, const ForwardArguments&, int threads);
  void (*backward)(const Problem&, const BackwardArguments&, int threads);
  void (*weights)(const Problem&, const WeightsArguments&, int threads);
  void (*forward_and_weights)(const Problem&, const ForwardArguments&, const WeightsArguments&,
                              int threads);
  void (*linear)(const LinearArguments&, int threads);
};

#if defined(__x86_64__)
extern const Kernels kAmxKernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
#endif
extern const Kernels kPortableKernels;

// Whether the processor is Intel's, some of whose instructions have other costs than AMD's.
inline bool is_intel() {
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel") != 0;
  return intel;
#else
  return false;
#endif
}

// Whether memory delivers more to a core that asks for it into its second cache than into its first
// one: measured on Zen 4 (of family 25 the one with AVX-512) and Emerald Rapids; on Zen 5 less.
inline bool reads_by_second_cache() {
#if defined(__x86_64__)
  static const bool zen_4 = __builtin_cpu_is("amdfam19h") && __builtin_cpu_supports("avx512f");
  return zen_4 || is_intel();
#else
  return false;
#endif
}

// Best first; an emulated one last, so that it runs only where it is asked for. On Intel's
// processors AVX-512 comes before products of bfloat16 pairs (vdpbf16ps), with which Emerald
// Rapids took 1.3 to 1.7 times as long.
inline const std::vector<const Kernels*>& all_kernels() {
#if defined(__x86_64__)
  static const std::vector<const Kernels*> all = {
#ifndef ATTN_EXT_EMULATE_AMX
      &kAmxKernels,
#endif
      is_intel() ? &kAvx512Kernels : &kAvx512Bf16Kernels,
      is_intel() ? &kAvx512Bf16Kernels : &kAvx512Kernels,
      &kAvx2Kernels,
      &kPortableKernels,
#ifdef ATTN_EXT_EMULATE_AMX
      &kAmxKernels,
#endif
  };
#else
  static const std::vector<const Kernels*> all = {&kPortableKernels};
#endif
  return all;
}

}  // namespace attn_ext
