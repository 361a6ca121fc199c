// attn_ext._cuda: the CUDA kernels for Python. The GIL is released while they are launched.
//
// With ATTN_EXT_EMULATED, and another name, a module for tests: the same kernels on the host, for
// CPU tensors.
#include <pybind11/stl.h>

#include "bindings_problem.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

#ifdef ATTN_EXT_EMULATED
#include "emulator.h"
#endif
#ifndef ATTN_EXT_CUDA_MODULE
#define ATTN_EXT_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
namespace cuda = attn_ext::cuda;
using namespace attn_ext::bindings;

namespace {

// Where and how to run; `stream` is the address of a cudaStream_t.
cuda::Settings as_settings(int device, uintptr_t stream, bool allow_tf32) {
  return {reinterpret_cast<void*>(stream), allow_tf32, cuda::shared_bytes_limit(device)};
}

void forward(int device, uintptr_t stream, bool allow_tf32, py::handle problem, py::handle dropout,
             py::handle out, py::handle lse) {
  const Problem p = as_problem(problem, dropout);
  const attn_ext::ForwardArguments to{as_view(out), as_view(lse)};
  const py::gil_scoped_release release;
  const cuda::DeviceGuard guard(device);
  cuda::forward(p.native, to, as_settings(device, stream, allow_tf32));
}

void backward(int device, uintptr_t stream, bool allow_tf32, py::handle problem, py::handle dropout,
              py::object out, py::handle lse, py::object dout, py::handle dlse, py::handle dweights,
              double dweights_scale, py::handle dquery, py::handle dkey, py::handle dvalue,
              py::handle dmask, py::handle row_term) {
  const Problem p = as_problem(problem, dropout);
  const Backward to = as_backward(p, std::move(out), lse, std::move(dout), dlse, dweights,
                                  dweights_scale, dquery, dkey, dvalue, dmask, row_term);
  const py::gil_scoped_release release;
  const cuda::DeviceGuard guard(device);
  cuda::backward(p.native, to.native, as_settings(device, stream, allow_tf32));
}

void weights(int device, uintptr_t stream, bool allow_tf32, py::handle problem, py::handle dropout,
             py::handle lse, py::handle weights, bool average) {
  const Problem p = as_problem(problem, dropout);
  const attn_ext::WeightsArguments to{as_view(lse), as_view(weights), average};
  const py::gil_scoped_release release;
  const cuda::DeviceGuard guard(device);
  cuda::weights(p.native, to, as_settings(device, stream, allow_tf32));
}

int shared_bytes(py::handle dtype, int64_t head_dim, int64_t value_dim, bool allow_tf32,
                 int limit) {
  attn_ext::Problem problem{};
  problem.dtype = as_dtype(dtype);
  problem.head_dim = head_dim, problem.value_dim = value_dim;
  return cuda::shared_bytes(problem, {nullptr, allow_tf32, limit});
}

}  // namespace

PYBIND11_MODULE(ATTN_EXT_CUDA_MODULE, m) {
  m.doc() = "Tensor-core attention kernels for NVIDIA GPUs; called by attn_ext.backends.cuda.";
#ifdef ATTN_EXT_EMULATED
  m.attr("device_type") = "cpu";
  m.def(
      "take_bank_conflicts",
      [] {
        const auto found = std::exchange(attn_ext::emulator::bank_conflicts, {});
        return std::make_pair(found.extra_wavefronts, found.phases);
      },
      "Of ldmatrix since the last call: wavefronts beyond one for 8 rows, and how many such rows.");
#else
  m.attr("device_type") = "cuda";
#endif
  m.def("no_device_reason", &cuda::no_device_reason,
        "Why the CUDA runtime has no device; empty where it has one.");
  m.def("device_count", &cuda::device_count, "How many devices there are; 0 without a driver.");
  m.def("compute_capability", &cuda::compute_capability, py::arg("device"), "(major, minor).");
  m.def("shared_bytes_limit", &cuda::shared_bytes_limit, py::arg("device"),
        "Shared memory that a block may have on a device, in bytes.");
  m.def("shared_bytes", &shared_bytes, py::arg("dtype"), py::arg("head_dim"), py::arg("value_dim"),
        py::arg("allow_tf32"), py::arg("limit"),
        "Shared memory that the kernels need where a block may have `limit` bytes.");
  m.def("architectures", &cuda::architectures,
        "What the kernels were compiled for, in the terms of torch.cuda.get_arch_list.");
  m.def("set_dtypes", &set_dtypes, py::arg("dtypes"),
        "Torch's float32, bfloat16, float16, float64 and bool; before anything else.");
  m.def("forward", &forward, py::arg("device"), py::arg("stream"), py::arg("allow_tf32"),
        py::arg("problem"), py::arg("dropout"), py::arg("out"), py::arg("lse"),
        "Write out and lse.");
  m.def("backward", &backward, py::arg("device"), py::arg("stream"), py::arg("allow_tf32"),
        py::arg("problem"), py::arg("dropout"), py::arg("out"), py::arg("lse"), py::arg("dout"),
        py::arg("dlse"), py::arg("dweights"), py::arg("dweights_scale"), py::arg("dquery"),
        py::arg("dkey"), py::arg("dvalue"), py::arg("dmask"), py::arg("row_term"),
        "Write dquery, dkey, dvalue, dmask and row_term.");
  m.def("weights", &weights, py::arg("device"), py::arg("stream"), py::arg("allow_tf32"),
        py::arg("problem"), py::arg("dropout"), py::arg("lse"), py::arg("weights"),
        py::arg("average"), "Write the attention weights.");
}
