// attn_ext._cpu: the CPU kernels for Python.
//
// A Problem of Python's becomes the Problem of attention.h here: its attributes are read, and each
// tensor's address, strides and dtype through its own methods, so that torch's headers are not
// needed. Nothing is checked: Problem.build has done it, and nobody else calls this module. The GIL
// is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <utility>

#include "attention.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using attn_ext::View;

namespace {

// Farther than any pair of positions, and small enough for sums of such.
constexpr int64_t kFar = int64_t{1} << 40;
// Less work than this does not pay for waking another thread.
constexpr double kFlopsPerThread = 2e6;

std::array<PyObject*, 5> dtypes;  // torch's, in the order of DType; held for good

void set_dtypes(const py::tuple& given) {
  for (size_t i = 0; i < dtypes.size(); ++i) dtypes[i] = py::object(given[i]).release().ptr();
}

// A string that is made once, for looking attributes up.
class Name {
 public:
  explicit Name(const char* text) : object_(PyUnicode_InternFromString(text)) {}
  operator PyObject*() const { return object_; }

 private:
  PyObject* object_;
};

py::object get(py::handle object, const Name& name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object call(py::handle object, const Name& name) {
  PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

int64_t as_int(PyObject* x) {
  const long long value = PyLong_AsLongLong(x);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
int64_t get_int(py::handle object, const Name& name) { return as_int(get(object, name).ptr()); }

// A position, no farther than kFar even where Python's int is wider than 64 bits.
int64_t near(int64_t position) { return std::clamp(position, -kFar, kFar); }
int64_t get_near(py::handle object, const Name& name) {
  int overflow = 0;
  const int64_t position = PyLong_AsLongLongAndOverflow(get(object, name).ptr(), &overflow);
  return overflow ? overflow * kFar : near(position);
}

double get_double(py::handle object, const Name& name) {
  const double value = PyFloat_AsDouble(get(object, name).ptr());
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The items of a shape or of strides; at most 4.
struct Sizes {
  int64_t items[4] = {0, 0, 0, 0};
  Py_ssize_t count;

  explicit Sizes(const py::object& tuple) : count(PyTuple_GET_SIZE(tuple.ptr())) {
    for (Py_ssize_t i = 0; i < count; ++i) items[i] = as_int(PyTuple_GET_ITEM(tuple.ptr(), i));
  }
};

void* address_of(py::handle tensor) {
  static const Name kDataPtr("data_ptr");
  void* address = PyLong_AsVoidPtr(call(tensor, kDataPtr).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return address;
}

// A tensor's address, and its strides at these places of (batch, head, row, column). Its dtype,
// which costs a look-up, is of interest for masks only: every other follows from the problem's.
View as_view(py::handle tensor, std::array<int, 4> places = {0, 1, 2, 3}) {
  static const Name kStride("stride");
  View view;
  if (tensor.is_none()) return view;
  view.data = address_of(tensor);
  const Sizes strides(call(tensor, kStride));
  for (Py_ssize_t i = 0; i < strides.count; ++i) {
    view.stride[places[static_cast<size_t>(i)]] = strides.items[i];
  }
  return view;
}
// (Hq,) or (B, Hq).
View as_heads(py::handle tensor) {
  static const Name kNdim("ndim");
  if (tensor.is_none()) return {};
  return get_int(tensor, kNdim) == 1 ? as_view(tensor, {1, 0, 0, 0}) : as_view(tensor);
}

attn_ext::DType dtype_of(py::handle tensor) {
  static const Name kDtype("dtype");
  const py::object dtype = get(tensor, kDtype);
  const auto found = std::find(dtypes.begin(), dtypes.end(), dtype.ptr());
  if (found == dtypes.end()) throw py::type_error("a tensor's dtype has no kernel");
  return static_cast<attn_ext::DType>(found - dtypes.begin());
}

// A mask of a dtype of its own, (B, Hq, Lq, Lk); a dimension of size 1 broadcasts.
View as_mask(py::handle tensor) {
  static const Name kShape("shape");
  View view = as_view(tensor);
  if (tensor.is_none()) return view;
  const Sizes shape(get(tensor, kShape));
  for (int i = 0; i < 4; ++i) {
    if (shape.items[i] == 1) view.stride[i] = 0;
  }
  view.dtype = dtype_of(tensor);
  return view;
}
// (B, Lk).
View as_padding(py::handle tensor) {
  View view = as_view(tensor, {0, 3, 0, 0});
  if (!tensor.is_none()) view.dtype = dtype_of(tensor);
  return view;
}

// A tensor whose last dimension the kernels read as contiguous, copied where it is not. `columns`
// is that dimension's size.
struct Rows {
  py::object tensor;
  View view;

  Rows(py::object given, int64_t columns) : tensor(std::move(given)), view(as_view(tensor)) {
    static const Name kIsNeg("is_neg"), kResolveNeg("resolve_neg"), kContiguous("contiguous");
    if (tensor.is_none()) return;
    const bool negative = call(tensor, kIsNeg).ptr() == Py_True;
    if (!negative && (view.stride[3] == 1 || columns <= 1)) return;
    tensor = call(call(tensor, kResolveNeg), kContiguous);
    view = as_view(tensor);
  }
};

// attention.h's problem, and what must live as long as its addresses are read.
struct Problem {
  attn_ext::Problem native;
  py::object kept[3];
};

// `dropout`: None, or the pair (threshold, seed).
Problem as_problem(py::handle problem, py::handle dropout) {
  static const Name kQuery("query"), kKey("key"), kValue("value"), kMask("attn_mask"),
      kPadding("key_padding_mask"), kAlibi("alibi_slopes"), kSinks("sinks"), kShape("shape"),
      kScale("scale"), kSoftcap("softcap"), kCausal("causal"), kWindow("window"),
      kDiagonal("diagonal"), kQueryStart("q_start"), kKeyStart("k_start"), kDropout("dropout_p"),
      kOffset("offset");
  Problem result;
  attn_ext::Problem& p = result.native;
  py::object query = get(problem, kQuery), value = get(problem, kValue);
  const Sizes queries(get(query, kShape)), values(get(value, kShape));
  p.batch = queries.items[0], p.query_heads = queries.items[1], p.key_heads = values.items[1];
  p.query_length = queries.items[2], p.key_length = values.items[2];
  p.head_dim = queries.items[3], p.value_dim = values.items[3];
  p.dtype = dtype_of(query);
  Rows q(std::move(query), p.head_dim), k(get(problem, kKey), p.head_dim);
  Rows v(std::move(value), p.value_dim);
  p.query = q.view, p.key = k.view, p.value = v.view;
  result.kept[0] = std::move(q.tensor), result.kept[1] = std::move(k.tensor);
  result.kept[2] = std::move(v.tensor);
  p.mask = as_mask(get(problem, kMask)), p.key_mask = as_padding(get(problem, kPadding));
  p.alibi_slopes = as_heads(get(problem, kAlibi)), p.sinks = as_heads(get(problem, kSinks));
  p.scale = get_double(problem, kScale), p.softcap = get_double(problem, kSoftcap);

  p.query_start = get_int(problem, kQueryStart), p.key_start = get_int(problem, kKeyStart);
  const bool causal = !get(problem, kCausal).is_none();
  p.diagonal = causal ? get_near(problem, kDiagonal) : near(p.query_start - p.key_start);
  const Sizes window(get(problem, kWindow));
  const auto reach = [](int64_t side) { return side < 0 ? 2 * kFar : std::min(side, 2 * kFar); };
  p.left = reach(window.items[0]), p.right = causal ? 0 : reach(window.items[1]);

  p.dropout_p = 0, p.dropout_threshold = 0, p.seed = 0, p.offset = 0;
  if (!dropout.is_none()) {
    const auto [threshold, seed] = dropout.cast<std::pair<uint32_t, uint64_t>>();
    p.dropout_p = get_double(problem, kDropout), p.dropout_threshold = threshold;
    p.seed = seed, p.offset = static_cast<uint32_t>(get_int(problem, kOffset));
  }
  return result;
}

int threads_for(int available, double flops) {
  if (flops >= available * kFlopsPerThread) return available;
  return std::max(1, static_cast<int>(flops / kFlopsPerThread));
}
int threads_for(int available, const attn_ext::Problem& p) {
  const double pairs = static_cast<double>(p.batch) * static_cast<double>(p.query_heads) *
                       static_cast<double>(p.query_length) * static_cast<double>(p.key_length);
  return threads_for(available, 2 * pairs * static_cast<double>(p.head_dim + p.value_dim));
}

const attn_ext::Kernels& kernels(int index) { return *attn_ext::kAllKernels[index]; }

void forward(int index, int threads, py::handle problem, py::handle dropout, py::handle out,
             py::handle lse, bool for_weights) {
  const Problem p = as_problem(problem, dropout);
  const attn_ext::ForwardArguments to{as_view(out), as_view(lse), for_weights};
  const py::gil_scoped_release release;
  kernels(index).forward(p.native, to, threads_for(threads, p.native));
}

void backward(int index, int threads, py::handle problem, py::handle dropout, py::object out,
              py::handle lse, py::object dout, py::handle dlse, py::handle dweights,
              double dweights_scale, py::handle dquery, py::handle dkey, py::handle dvalue,
              py::handle dmask, py::handle row_term) {
  const Problem p = as_problem(problem, dropout);
  const Rows outs(std::move(out), p.native.value_dim), douts(std::move(dout), p.native.value_dim);
  attn_ext::BackwardArguments to;
  to.out = outs.view, to.lse = as_view(lse), to.dout = douts.view, to.dlse = as_view(dlse);
  to.dweights = as_view(dweights), to.dweights_scale = dweights_scale;
  to.dquery = as_view(dquery), to.dkey = as_view(dkey), to.dvalue = as_view(dvalue);
  to.dmask = as_mask(dmask), to.row_term = as_view(row_term);
  const py::gil_scoped_release release;
  kernels(index).backward(p.native, to, threads_for(threads, p.native));
}

void weights(int index, int threads, py::handle problem, py::handle dropout, py::handle lse,
             py::handle weights, bool average) {
  const Problem p = as_problem(problem, dropout);
  const attn_ext::WeightsArguments to{as_view(lse), as_view(weights), average};
  const py::gil_scoped_release release;
  kernels(index).weights(p.native, to, threads_for(threads, p.native));
}

void linear(int index, int threads, int64_t rows, py::handle input, py::handle weight,
            py::handle bias, py::handle out) {
  static const Name kShape("shape");
  const Sizes shape(get(weight, kShape));
  const auto floats = [](py::handle tensor) { return static_cast<float*>(address_of(tensor)); };
  attn_ext::LinearArguments arguments;
  arguments.rows = rows, arguments.columns = shape.items[0], arguments.depth = shape.items[1];
  arguments.input = floats(input), arguments.weight = floats(weight);
  arguments.bias = bias.is_none() ? nullptr : floats(bias), arguments.out = floats(out);
  const double products = static_cast<double>(rows) * static_cast<double>(arguments.columns) *
                          static_cast<double>(arguments.depth);
  const double flops = 2 * products;
  const py::gil_scoped_release release;
  // Nothing is packed for each thread, so that half as much work pays for one as in attention.
  kernels(index).linear(arguments, threads_for(threads, 2 * flops));
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
  m.def("set_dtypes", &set_dtypes, py::arg("dtypes"),
        "Torch's float32, bfloat16, float16, float64 and bool; before anything else.");
  m.def("threads_for", py::overload_cast<int, double>(&threads_for), py::arg("available"),
        py::arg("flops"), "How many threads some work gets.");
  m.def("forward", &forward, py::arg("capability"), py::arg("threads"), py::arg("problem"),
        py::arg("dropout"), py::arg("out"), py::arg("lse"), py::arg("for_weights"),
        "Write out and lse.");
  m.def("backward", &backward, py::arg("capability"), py::arg("threads"), py::arg("problem"),
        py::arg("dropout"), py::arg("out"), py::arg("lse"), py::arg("dout"), py::arg("dlse"),
        py::arg("dweights"), py::arg("dweights_scale"), py::arg("dquery"), py::arg("dkey"),
        py::arg("dvalue"), py::arg("dmask"), py::arg("row_term"),
        "Write dquery, dkey, dvalue, dmask and row_term.");
  m.def("weights", &weights, py::arg("capability"), py::arg("threads"), py::arg("problem"),
        py::arg("dropout"), py::arg("lse"), py::arg("weights"), py::arg("average"),
        "Write the attention weights.");
  m.def("linear", &linear, py::arg("capability"), py::arg("threads"), py::arg("rows"),
        py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("out"),
        "Write input @ weight^T + bias.");
}
