// The CUDA runtime behind device.h.
#include "device.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace attn_ext::cuda {
namespace {

// What setup_cuda.py has nvcc make machine code for, as 75, 80; and what PTX was kept of, or 0.
constexpr int kCompiled[] = {ATTN_EXT_CUDA_CODE};
constexpr int kPtx = ATTN_EXT_CUDA_PTX;

std::string version(int number, int factor) {
  return std::to_string(number / factor) + "." + std::to_string(number % factor / 10);
}

std::string driver_problem() {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "no NVIDIA driver is installed";
  return "the NVIDIA driver supports CUDA " + version(driver, 1000) +
         ", and attn_ext._cuda was built with " + version(CUDART_VERSION, 1000) +
         ": a newer driver or an older toolkit would do";
}

std::string missing_architecture() {
  int device = 0;
  cudaGetDevice(&device);
  const auto [major, minor] = compute_capability(device);
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  std::string names;
  for (const std::string& name : architectures()) names += (names.empty() ? "" : ", ") + name;
  return "device " + std::to_string(device) + " has compute capability " + capability +
         ", and attn_ext._cuda is compiled for " + names +
         ": build it with TORCH_CUDA_ARCH_LIST=" + capability;
}

std::string sentence(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return driver_problem();
    case cudaErrorNoDevice:
      return "the NVIDIA driver finds no CUDA device";
    case cudaErrorInvalidDevice:
      return "there are " + std::to_string(device_count()) + " CUDA devices";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return missing_architecture();
    default:
      return cudaGetErrorString(error);
  }
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "asking for a device's attributes");
  return value;
}

}  // namespace

std::string no_device_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // or torch would find it
  return error == cudaSuccess ? "" : sentence(error);
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return error == cudaSuccess ? count : 0;
}

std::pair<int, int> compute_capability(int device) {
  return {attribute(cudaDevAttrComputeCapabilityMajor, device),
          attribute(cudaDevAttrComputeCapabilityMinor, device)};
}

int shared_bytes_limit(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  for (const int compiled : kCompiled) names.push_back("sm_" + std::to_string(compiled));
  if (kPtx != 0) names.push_back("compute_" + std::to_string(kPtx));
  return names;
}

DeviceGuard::DeviceGuard(int device) : before_(device), device_(device) {
  check(cudaGetDevice(&before_), "asking for the current device");
  if (before_ != device_) check(cudaSetDevice(device_), "choosing a device");
}

DeviceGuard::~DeviceGuard() {
  if (before_ != device_) cudaSetDevice(before_);
}

void check(int error, const char* action) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(action) + ": " + sentence(static_cast<cudaError_t>(error)));
}

}  // namespace attn_ext::cuda
