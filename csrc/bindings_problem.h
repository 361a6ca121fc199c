// A Problem of Python's as the Problem of attention.h: what the modules of both devices do alike.
//
// Its attributes are read, and each tensor's address, strides and dtype through its own methods, so
// that torch's headers are not needed. Nothing is checked: Problem.build has done it, and only
// attn_ext.backends calls these modules.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <utility>

#include "attention.h"
#include "philox.h"

namespace attn_ext::bindings {

namespace py = pybind11;

// Farther than any pair of positions, and small enough for sums of such.
constexpr int64_t kFar = int64_t{1} << 40;

inline std::array<PyObject*, 5> dtypes;  // torch's, in the order of DType; held for good

inline void set_dtypes(const py::tuple& given) {
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

inline py::object get(py::handle object, const Name& name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

inline py::object call(py::handle object, const Name& name) {
  PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

inline int64_t as_int(PyObject* x) {
  const long long value = PyLong_AsLongLong(x);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
inline int64_t get_int(py::handle object, const Name& name) {
  return as_int(get(object, name).ptr());
}

// A position, no farther than kFar even where Python's int is wider than 64 bits.
inline int64_t near(int64_t position) { return std::clamp(position, -kFar, kFar); }
inline int64_t get_near(py::handle object, const Name& name) {
  int overflow = 0;
  const int64_t position = PyLong_AsLongLongAndOverflow(get(object, name).ptr(), &overflow);
  return overflow ? overflow * kFar : near(position);
}

inline double get_double(py::handle object, const Name& name) {
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

// Whether the storage that a tensor's address points into was not freed, which leaves the tensor's
// offset into it. Only an address that no offset reaches is known without asking.
inline bool has_memory(py::handle tensor, const void* address) {
  constexpr auto kBeyondOffsets = uintptr_t{1} << 40;
  static const Name kOffset("storage_offset"), kSize("element_size");
  const auto place = reinterpret_cast<uintptr_t>(address);
  if (place >= kBeyondOffsets) return true;
  const int64_t offset = as_int(call(tensor, kOffset).ptr()) * as_int(call(tensor, kSize).ptr());
  return place != static_cast<uintptr_t>(offset);
}

inline void* address_of(py::handle tensor) {
  static const Name kDataPtr("data_ptr"), kNumel("numel");
  void* address = PyLong_AsVoidPtr(call(tensor, kDataPtr).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!has_memory(tensor, address) && as_int(call(tensor, kNumel).ptr()) != 0) {
    throw py::value_error("every tensor must have memory, got one whose storage is empty");
  }
  return address;
}

// A tensor's address, and its strides at these places of (batch, head, row, column). Its dtype,
// which costs a look-up, is of interest for masks only: every other follows from the problem's.
inline View as_view(py::handle tensor, std::array<int, 4> places = {0, 1, 2, 3}) {
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
inline View as_heads(py::handle tensor) {
  static const Name kNdim("ndim");
  if (tensor.is_none()) return {};
  return get_int(tensor, kNdim) == 1 ? as_view(tensor, {1, 0, 0, 0}) : as_view(tensor);
}

inline DType as_dtype(py::handle dtype) {
  const auto found = std::find(dtypes.begin(), dtypes.end(), dtype.ptr());
  if (found == dtypes.end()) throw py::type_error("a tensor's dtype has no kernel");
  return static_cast<DType>(found - dtypes.begin());
}
inline DType dtype_of(py::handle tensor) {
  static const Name kDtype("dtype");
  return as_dtype(get(tensor, kDtype));
}

// A mask of a dtype of its own, (B, Hq, Lq, Lk); a dimension of size 1 broadcasts.
inline View as_mask(py::handle tensor) {
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
inline View as_padding(py::handle tensor) {
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
inline Problem as_problem(py::handle problem, py::handle dropout) {
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

  p.single.softcap = p.single.scale_over_softcap = 0;
  if (p.softcap != 0) {
    p.single.softcap = std::max(static_cast<float>(p.softcap), FLT_MIN);
    p.single.scale_over_softcap = static_cast<float>(p.scale / p.softcap);
  }
  p.dropout_p = 0, p.dropout_threshold = 0, p.offset = 0, p.single.dropout_factor = 0;
  if (!dropout.is_none()) {
    const auto [threshold, seed] = dropout.cast<std::pair<uint32_t, uint64_t>>();
    p.dropout_p = get_double(problem, kDropout), p.dropout_threshold = threshold;
    p.single.dropout_factor = static_cast<float>(1 / (1 - p.dropout_p));
    make_philox_keys(seed, p.philox_keys),
        p.offset = static_cast<uint32_t>(get_int(problem, kOffset));
  }
  return result;
}

// attention.h's arguments of a backward pass, and what must live as long.
struct Backward {
  Rows out, dout;
  attn_ext::BackwardArguments native;
};

inline Backward as_backward(const Problem& p, py::object out, py::handle lse, py::object dout,
                            py::handle dlse, py::handle dweights, double dweights_scale,
                            py::handle dquery, py::handle dkey, py::handle dvalue, py::handle dmask,
                            py::handle row_term) {
  const int64_t width = p.native.value_dim;
  Backward result{Rows(std::move(out), width), Rows(std::move(dout), width), {}};
  attn_ext::BackwardArguments& to = result.native;
  to.out = result.out.view, to.lse = as_view(lse), to.dout = result.dout.view;
  to.dlse = as_view(dlse), to.dweights = as_view(dweights), to.dweights_scale = dweights_scale;
  to.dweights_scale_single = static_cast<float>(dweights_scale);
  to.dquery = as_view(dquery), to.dkey = as_view(dkey), to.dvalue = as_view(dvalue);
  to.dmask = as_mask(dmask), to.row_term = as_view(row_term);
  return result;
}

}  // namespace attn_ext::bindings
