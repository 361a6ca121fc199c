// Fibers, and what the sanitizers must be told of them. For emulator.cpp alone.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#error "compile emulator.cpp without -fsanitize: it looks for the sanitizers when it runs"
#endif

// The sanitizers' interface: null where the process runs without them.
extern "C" {
#define ATTN_EXT_WEAK __attribute__((weak))
ATTN_EXT_WEAK void __asan_poison_memory_region(const volatile void*, std::size_t);
ATTN_EXT_WEAK void __asan_unpoison_memory_region(const volatile void*, std::size_t);
ATTN_EXT_WEAK void __asan_loadN(const void*, std::size_t);
ATTN_EXT_WEAK void __asan_storeN(const void*, std::size_t);
ATTN_EXT_WEAK void __sanitizer_start_switch_fiber(void**, const void*, std::size_t);
ATTN_EXT_WEAK void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*);
ATTN_EXT_WEAK void* __tsan_get_current_fiber();
ATTN_EXT_WEAK void* __tsan_create_fiber(unsigned);
ATTN_EXT_WEAK void __tsan_destroy_fiber(void*);
ATTN_EXT_WEAK void __tsan_switch_to_fiber(void*, unsigned);
ATTN_EXT_WEAK void __tsan_set_fiber_name(void*, const char*);
ATTN_EXT_WEAK void __tsan_acquire(void*);
ATTN_EXT_WEAK void __tsan_release(void*);
#undef ATTN_EXT_WEAK
}

namespace attn_ext::emulator::internal {

constexpr std::size_t kPage = 4096, kStackBytes = 256 * 1024;
constexpr unsigned kTsanSync = 0, kTsanNoSync = 1;  // whether a switch orders memory

inline void poison(const void* start, std::size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(start, bytes);
}
inline void unpoison(const void* start, std::size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(start, bytes);
}

// An event that orders what comes before its releases before what comes after its acquires.
struct Event {
  char address;
  void acquire() {
    if (__tsan_acquire) __tsan_acquire(&address);
  }
  void release() {
    if (__tsan_release) __tsan_release(&address);
  }
};

inline char* map(std::size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

// A stack, and what each sanitizer knows it by.
struct Fiber {
  char* stack = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  void* tsan = nullptr;
  void* asan_fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  std::size_t stack_bytes = 0;

  Fiber() = default;
  // entry calls after_switch first, and never returns.
  Fiber(int index, void (*entry)() noexcept);
  Fiber(const Fiber&) = delete;
  ~Fiber();

  // Orders all that it did before what its caller does next.
  void join();
};

inline Fiber host;  // on the stack of launch's caller
inline Fiber *current = &host, *previous = &host;

#if defined(__x86_64__)
// System V ABI: callee-saved registers travel on the stack. A return, because most fibers wait at
// the same depth of calls, so that the processor predicts this return and those that follow.
extern "C" void attn_ext_emulator_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .p2align 4
  .type attn_ext_emulator_switch, @function
attn_ext_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size attn_ext_emulator_switch, . - attn_ext_emulator_switch
  .popsection
)");
#endif

inline void after_switch() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(current->asan_fake_stack, &previous->stack_bottom,
                                    &previous->stack_bytes);
}

inline void switch_to(Fiber* next) {
  previous = current;
  current = next;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(next->tsan, kTsanNoSync);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&previous->asan_fake_stack, next->stack_bottom,
                                   next->stack_bytes);
#if defined(__x86_64__)
  attn_ext_emulator_switch(&previous->stack_pointer, next->stack_pointer);
#else
  swapcontext(&previous->registers, &next->registers);
#endif
  after_switch();
}

inline Fiber::Fiber(int index, void (*entry)() noexcept) : stack_bytes(kStackBytes) {
  stack = map(kPage + kStackBytes);
  mprotect(stack, kPage, PROT_NONE);
  stack_bottom = stack + kPage;
  if (__tsan_create_fiber) tsan = __tsan_create_fiber(0);
  // Stacks that began at the same offset of a page would share a few cache sets.
  char* top = stack + kPage + kStackBytes - index % 61 * 64;
#if defined(__x86_64__)
  // Six registers, where to go, and a null return address, at which unwinding ends.
  void** frame = reinterpret_cast<void**>(top) - 8;
  frame[6] = reinterpret_cast<void*>(entry);
  stack_pointer = frame;
#else
  getcontext(&registers);
  registers.uc_stack.ss_sp = stack + kPage;
  registers.uc_stack.ss_size = top - (stack + kPage);
  makecontext(&registers, entry, 0);
#endif
}

inline void Fiber::join() {
  if (!tsan) return;
  void* const caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan, kTsanNoSync);
  __tsan_switch_to_fiber(caller, kTsanSync);
}

inline Fiber::~Fiber() {
  if (!stack) return;
  unpoison(stack + kPage, kStackBytes);
  munmap(stack, kPage + kStackBytes);
  if (tsan) __tsan_destroy_fiber(tsan);
}

}  // namespace attn_ext::emulator::internal
