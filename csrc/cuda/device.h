// What the module and the launches ask of the CUDA runtime, whose headers only .cu files include.
//
// Every failure is a std::runtime_error that says in a sentence what is wrong. On a machine without
// a driver all of this can be called. Under the emulator of tests/cuda_emulator the host stands in
// for a device of the emulated architecture.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace attn_ext::cuda {

// Why there is no device; empty where there is one.
std::string no_device_reason();
int device_count();
std::pair<int, int> compute_capability(int device);
// Dynamic shared memory that a block may ask for, in bytes.
int shared_bytes_limit(int device);

// What the kernels were compiled for, as torch.cuda.get_arch_list() says it: "sm_80" is machine
// code for 8.0 and what is above it within 8, "compute_80" PTX for 8.0 and everything above it.
std::vector<std::string> architectures();

// Makes a device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_, device_;
};

// `error`, a cudaError_t, is what came of `action`, as in "launching forward".
void check(int error, const char* action);

#ifdef ATTN_EXT_EMULATED
inline std::string no_device_reason() { return ""; }
inline int device_count() { return 1; }
inline std::pair<int, int> compute_capability(int) {
  return {ATTN_EXT_EMULATED / 100, ATTN_EXT_EMULATED / 10 % 10};
}
inline int shared_bytes_limit(int) { return (ATTN_EXT_EMULATED >= 800 ? 163 : 64) * 1024; }
inline std::vector<std::string> architectures() {
  return {"sm_" + std::to_string(ATTN_EXT_EMULATED / 10)};
}
inline DeviceGuard::DeviceGuard(int device) : before_(device), device_(device) {}
inline DeviceGuard::~DeviceGuard() {}
inline void check(int, const char*) {}
#endif

}  // namespace attn_ext::cuda
