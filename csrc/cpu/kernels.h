// The kernels of every instruction set: one list that selection, `attn-ext info` and tests read.
#pragma once

#include "../attention.h"

namespace attn_ext {

struct Kernels {
  const char* name;     // as ATTN_EXT_CPU_CAPABILITY spells it
  bool (*available)();  // whether this machine runs it
  void (*forward)(const Problem&, const ForwardArguments&, int threads);
  void (*backward)(const Problem&, const BackwardArguments&, int threads);
  void (*weights)(const Problem&, const WeightsArguments&, int threads);
  void (*linear)(const LinearArguments&, int threads);
};

#if defined(__x86_64__)
extern const Kernels kAmxKernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
#endif
extern const Kernels kPortableKernels;

// Best first; an emulated one last, so that it runs only where it is asked for.
inline const Kernels* const kAllKernels[] = {
#if defined(__x86_64__)
#ifndef ATTN_EXT_EMULATE_AMX
    &kAmxKernels,
#endif
    &kAvx512Bf16Kernels, &kAvx512Kernels, &kAvx2Kernels,
#endif
    &kPortableKernels,
#if defined(__x86_64__) && defined(ATTN_EXT_EMULATE_AMX)
    &kAmxKernels,
#endif
};

}  // namespace attn_ext
