// attn_ext._cpu: the CPU kernels for Python, which passes addresses, strides and settings.
//
// A tensor comes as (data_ptr, strides of 4 dimensions, DType), or None. Nothing is checked here:
// the package's Problem.build has done it, and nobody else calls this module. The GIL is released
// while a kernel runs.
#include <pybind11/pybind11.h>

#include "attention.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using attn_ext::View;

namespace {

int64_t as_int(PyObject* x) {
  const long long value = PyLong_AsLongLong(x);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

uint64_t as_unsigned(PyObject* x) {
  const unsigned long long value = PyLong_AsUnsignedLongLong(x);
  if (PyErr_Occurred()) throw py::error_already_set();
  return value;
}

double as_double(PyObject* x) {
  const double value = PyFloat_AsDouble(x);
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

void require_tuple(PyObject* x, Py_ssize_t size, const char* what) {
  if (!PyTuple_Check(x) || PyTuple_GET_SIZE(x) != size) {
    throw py::type_error(std::string(what) + " must be a tuple of " + std::to_string(size));
  }
}

View as_view(PyObject* x) {
  View view;
  if (x == Py_None) return view;
  require_tuple(x, 3, "a tensor");
  view.data = reinterpret_cast<void*>(as_unsigned(PyTuple_GET_ITEM(x, 0)));
  PyObject* strides = PyTuple_GET_ITEM(x, 1);
  require_tuple(strides, 4, "strides");
  for (int i = 0; i < 4; ++i) view.stride[i] = as_int(PyTuple_GET_ITEM(strides, i));
  view.dtype = static_cast<attn_ext::DType>(as_int(PyTuple_GET_ITEM(x, 2)));
  return view;
}
View as_view(const py::object& x) { return as_view(x.ptr()); }

attn_ext::Problem as_problem(const py::tuple& tuple) {
  require_tuple(tuple.ptr(), 26, "a problem");
  Py_ssize_t next = 0;
  const auto item = [&] { return PyTuple_GET_ITEM(tuple.ptr(), next++); };
  attn_ext::Problem p;
  p.dtype = static_cast<attn_ext::DType>(as_int(item()));
  for (int64_t* size : {&p.batch, &p.query_heads, &p.key_heads, &p.query_length, &p.key_length,
                        &p.head_dim, &p.value_dim}) {
    *size = as_int(item());
  }
  for (View* view : {&p.query, &p.key, &p.value, &p.mask, &p.key_mask, &p.alibi_slopes, &p.sinks}) {
    *view = as_view(item());
  }
  p.scale = as_double(item());
  p.softcap = as_double(item());
  for (int64_t* position : {&p.diagonal, &p.left, &p.right, &p.query_start, &p.key_start}) {
    *position = as_int(item());
  }
  p.dropout_p = as_double(item());
  p.dropout_threshold = static_cast<uint32_t>(as_unsigned(item()));
  p.offset = static_cast<uint32_t>(as_unsigned(item()));
  p.seed = as_unsigned(item());
  return p;
}

const attn_ext::Kernels& kernels(int index) { return *attn_ext::kAllKernels[index]; }

void forward(int index, int threads, const py::tuple& problem, const py::object& out,
             const py::object& lse) {
  const attn_ext::Problem p = as_problem(problem);
  const attn_ext::ForwardArguments to{as_view(out), as_view(lse)};
  py::gil_scoped_release release;
  kernels(index).forward(p, to, threads);
}

void backward(int index, int threads, const py::tuple& problem, const py::object& out,
              const py::object& lse, const py::object& dout, const py::object& dlse,
              const py::object& dweights, double dweights_scale, const py::object& dquery,
              const py::object& dkey, const py::object& dvalue, const py::object& dmask,
              const py::object& row_term) {
  const attn_ext::Problem p = as_problem(problem);
  attn_ext::BackwardArguments to;
  to.out = as_view(out), to.lse = as_view(lse), to.dout = as_view(dout), to.dlse = as_view(dlse);
  to.dweights = as_view(dweights), to.dweights_scale = dweights_scale;
  to.dquery = as_view(dquery), to.dkey = as_view(dkey), to.dvalue = as_view(dvalue);
  to.dmask = as_view(dmask), to.row_term = as_view(row_term);
  py::gil_scoped_release release;
  kernels(index).backward(p, to, threads);
}

void weights(int index, int threads, const py::tuple& problem, const py::object& lse,
             const py::object& weights, bool average) {
  const attn_ext::Problem p = as_problem(problem);
  const attn_ext::WeightsArguments to{as_view(lse), as_view(weights), average};
  py::gil_scoped_release release;
  kernels(index).weights(p, to, threads);
}

py::dict capabilities() {
  py::dict found;
  for (const attn_ext::Kernels* entry : attn_ext::kAllKernels)
    found[entry->name] = entry->available();
  return found;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "SIMD attention kernels for CPUs; called by attn_ext.backends.cpu.";
  m.def("capabilities", &capabilities,
        "Instruction sets that were compiled, best first, and whether this machine has each.");
  m.def("forward", &forward, py::arg("capability"), py::arg("threads"), py::arg("problem"),
        py::arg("out"), py::arg("lse"), "Write out and lse.");
  m.def("backward", &backward, py::arg("capability"), py::arg("threads"), py::arg("problem"),
        py::arg("out"), py::arg("lse"), py::arg("dout"), py::arg("dlse"), py::arg("dweights"),
        py::arg("dweights_scale"), py::arg("dquery"), py::arg("dkey"), py::arg("dvalue"),
        py::arg("dmask"), py::arg("row_term"), "Write dquery, dkey, dvalue, dmask and row_term.");
  m.def("weights", &weights, py::arg("capability"), py::arg("threads"), py::arg("problem"),
        py::arg("lse"), py::arg("weights"), py::arg("average"), "Write the attention weights.");
}
