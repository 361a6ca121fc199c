// The shortest way from tensors to a kernel, for a call that asks for little more: what a small
// call costs is mostly Python, which would look at every tensor through its methods.
//
// Tensors are read through DLPack's C exchange API (DLPack 1.3; torch 2.10 and newer have it),
// whose structures are an interface between binaries and are spelled out here as its specification
// (dmlc.github.io/dlpack) has them, so that no header of torch or DLPack is needed.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "bindings_problem.h"

namespace attn_ext::bindings {

namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;                            // of its device types
constexpr uint8_t kFloat = 2, kBfloat = 4, kBool = 6;  // of its type codes

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  DataType type;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major_version, minor_version;
  ExchangeApi* previous;
  // A new contiguous tensor like `prototype`, and an owned one as a tensor of Python's.
  int (*allocate)(Tensor* prototype, void** owned, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  void* from_python;
  int (*to_python)(void* owned, void** object);
  int (*view)(void* object, Tensor* view);  // what a tensor is, for as long as it lives
  void* current_stream;
};

}  // namespace dlpack

// What `set_plain` was given, held for good.
inline struct {
  PyObject* empty_like = nullptr;
  PyObject* empty_in_layout_of = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
} plain;

// `exchange_api`: torch.Tensor's capsule, or None. Returns whether it is what is known here.
inline bool set_plain(py::object exchange_api, py::object empty_like,
                      py::object empty_in_layout_of) {
  constexpr const char* kName = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(exchange_api.ptr(), kName)) return false;
  const auto* api =
      static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange_api.ptr(), kName));
  if (api->major_version != dlpack::kMajorVersion) return false;
  if (!api->view || !api->allocate || !api->to_python) return false;
  plain.empty_like = empty_like.release().ptr();
  plain.empty_in_layout_of = empty_in_layout_of.release().ptr();
  plain.api = api;
  return true;
}

inline std::optional<DType> as_dtype(dlpack::DataType type) {
  const auto is = [type](uint8_t code, uint8_t bits) {
    return type.code == code && type.bits == bits;
  };
  if (is(dlpack::kFloat, 32)) return DType::kFloat32;
  if (is(dlpack::kBfloat, 16)) return DType::kBFloat16;
  if (is(dlpack::kFloat, 16)) return DType::kFloat16;
  if (is(dlpack::kFloat, 64)) return DType::kFloat64;
  if (is(dlpack::kBool, 8)) return DType::kBool;
  return std::nullopt;
}

inline void* address_of(const dlpack::Tensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

// Reads a tensor, if it is a dense one in CPU memory.
inline bool read_dense(py::handle tensor, dlpack::Tensor& read) {
  static const Name kIsNeg("is_neg");
  if (plain.api->view(tensor.ptr(), &read) != 0) {  // sparse, nested, batched or on no real device
    PyErr_Clear();
    return false;
  }
  return read.device_type == dlpack::kCpu && has_memory(tensor, address_of(read)) &&
         call(tensor, kIsNeg).ptr() == Py_False;
}

// The same, if it has four dimensions and the last is contiguous.
inline bool read_plain(py::handle tensor, dlpack::Tensor& read) {
  return read_dense(tensor, read) && read.dimensions == 4 &&
         (read.strides[3] == 1 || read.shape[3] <= 1);
}

inline View as_view(const dlpack::Tensor& tensor) {
  View view;
  view.data = address_of(tensor);
  std::copy_n(tensor.strides, tensor.dimensions, view.stride);
  return view;
}

// Of a tensor that was made for a plain call, or None.
inline View as_plain_view(py::handle made) {
  dlpack::Tensor tensor;
  if (made.is_none()) return {};
  if (plain.api->view(made.ptr(), &tensor) != 0) throw py::error_already_set();
  return as_view(tensor);
}

enum class Causal { kNone = 0, kUpperLeft = 1, kLowerRight = 2 };

// Reads a mask of a problem, if it is bool or of a dtype that can be added to its scores.
inline bool read_mask(py::handle tensor, const attn_ext::Problem& p, dlpack::Tensor& read,
                      View& mask) {
  if (!read_dense(tensor, read)) return false;
  const std::optional<DType> dtype = as_dtype(read.type);
  const bool widened = dtype == DType::kFloat32 && p.dtype != DType::kFloat64;
  if (dtype != DType::kBool && dtype != p.dtype && !widened) return false;
  mask.data = address_of(read), mask.dtype = *dtype;
  return true;
}

// (B, Hq, Lq, Lk), of which any size may be 1 and the first ones missing. Whether it fits.
inline bool read_attn_mask(py::handle tensor, attn_ext::Problem& p) {
  const int64_t sizes[] = {p.batch, p.query_heads, p.query_length, p.key_length};
  dlpack::Tensor read;
  if (!read_mask(tensor, p, read, p.mask) || read.dimensions > 4) return false;
  for (int i = 0, place = 4 - read.dimensions; place < 4; ++i, ++place) {
    if (read.shape[i] == 1) continue;  // broadcasts
    if (read.shape[i] != sizes[place]) return false;
    p.mask.stride[place] = read.strides[i];
  }
  return true;
}

// (B, Lk). Whether it fits.
inline bool read_padding(py::handle tensor, attn_ext::Problem& p) {
  dlpack::Tensor read;
  if (!read_mask(tensor, p, read, p.key_mask) || read.dimensions != 2) return false;
  p.key_mask.stride[0] = read.strides[0], p.key_mask.stride[3] = read.strides[1];
  return read.shape[0] == p.batch && read.shape[1] == p.key_length;
}

// What a plain call is made of. `scale` is a float, or None for the default; `grouped`, whether a
// key head may serve several query heads; masks may be None.
struct PlainCall {
  py::handle query, key, value, attn_mask, key_padding_mask, scale;
  Causal causal;
  bool grouped;
};

// The problem of plain tensors that fit each other; nothing otherwise.
inline std::optional<attn_ext::Problem> plain_problem(const PlainCall& given) {
  constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();  // MAX_LENGTH of problem.py
  dlpack::Tensor q, k, v;
  if (!read_plain(given.query, q) || !read_plain(given.key, k) || !read_plain(given.value, v)) {
    return std::nullopt;
  }
  const std::optional<DType> dtype = as_dtype(q.type);
  if (!dtype || dtype == DType::kBool) return std::nullopt;
  if (as_dtype(k.type) != dtype || as_dtype(v.type) != dtype) return std::nullopt;
  attn_ext::Problem p{};
  p.dtype = *dtype;
  p.batch = q.shape[0], p.query_heads = q.shape[1], p.query_length = q.shape[2];
  p.key_heads = k.shape[1], p.key_length = k.shape[2];
  p.head_dim = q.shape[3], p.value_dim = v.shape[3];
  const bool heads_fit = p.key_heads == p.query_heads ||
                         (given.grouped && p.key_heads > 0 && p.query_heads % p.key_heads == 0);
  const bool fit = k.shape[0] == p.batch && std::equal(k.shape, k.shape + 3, v.shape) &&
                   k.shape[3] == p.head_dim && p.head_dim > 0 && heads_fit &&
                   p.query_length <= kMaxLength && p.key_length <= kMaxLength &&
                   p.batch * p.query_heads <= kMaxLength;
  if (!fit) return std::nullopt;
  if (!given.attn_mask.is_none() && !read_attn_mask(given.attn_mask, p)) return std::nullopt;
  const py::handle padding = given.key_padding_mask;
  if (!padding.is_none() && !read_padding(padding, p)) return std::nullopt;
  p.scale = 1 / std::sqrt(static_cast<double>(p.head_dim));
  if (!given.scale.is_none()) {
    if (!PyFloat_CheckExact(given.scale.ptr())) return std::nullopt;
    p.scale = PyFloat_AS_DOUBLE(given.scale.ptr());
    if (!std::isfinite(p.scale)) return std::nullopt;
  }
  p.query = as_view(q), p.key = as_view(k), p.value = as_view(v);
  p.diagonal = given.causal == Causal::kLowerRight ? p.key_length - p.query_length : 0;
  p.left = 2 * kFar, p.right = given.causal == Causal::kNone ? 2 * kFar : 0;
  return p;
}

inline bool is_contiguous(const View& view, int64_t heads, int64_t rows, int64_t columns) {
  return view.stride[2] == columns && view.stride[1] == rows * columns &&
         view.stride[0] == heads * rows * columns;
}

inline py::object empty_like(py::handle tensor) {
  PyObject* made = PyObject_CallOneArg(plain.empty_like, tensor.ptr());
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// A new tensor in the layout of another, which is (B, heads, rows, columns), with `wanted` columns.
inline py::object empty_in_layout_of(py::handle tensor, const View& view, int64_t heads,
                                     int64_t rows, int64_t columns, int64_t wanted) {
  if (wanted == columns && is_contiguous(view, heads, rows, columns)) return empty_like(tensor);
  const py::int_ argument(wanted);
  PyObject* arguments[] = {tensor.ptr(), argument.ptr()};
  PyObject* made = PyObject_Vectorcall(plain.empty_in_layout_of, arguments, 2, nullptr);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// The output of a plain problem, in query's layout.
inline py::object empty_for(py::handle query, const attn_ext::Problem& p) {
  return empty_in_layout_of(query, p.query, p.query_heads, p.query_length, p.head_dim, p.value_dim);
}

// The gradient of a plain tensor of these sizes, in its layout.
inline py::object gradient_for(py::handle tensor, const View& view, int64_t heads, int64_t rows,
                               int64_t columns) {
  return empty_in_layout_of(tensor, view, heads, rows, columns, columns);
}

template <int kDimensions>
inline bool has_sizes(const dlpack::Tensor& read, const int64_t (&sizes)[kDimensions]) {
  return read.dimensions == kDimensions && std::equal(sizes, sizes + kDimensions, read.shape);
}

// Reads a tensor of a plain problem's output's shape and dtype, which its gradient has too; nothing
// if it is not.
inline std::optional<View> read_output(py::handle tensor, const attn_ext::Problem& p) {
  dlpack::Tensor read;
  const bool fits = read_plain(tensor, read) && as_dtype(read.type) == p.dtype &&
                    has_sizes(read, {p.batch, p.query_heads, p.query_length, p.value_dim});
  return fits ? std::optional(as_view(read)) : std::nullopt;
}

// Reads a tensor of LSE's shape and dtype; nothing if it is not.
inline std::optional<View> read_lse(py::handle tensor, const attn_ext::Problem& p) {
  const DType dtype = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  dlpack::Tensor read;
  const bool fits = read_dense(tensor, read) && as_dtype(read.type) == dtype &&
                    has_sizes(read, {p.batch, p.query_heads, p.query_length});
  return fits ? std::optional(as_view(read)) : std::nullopt;
}

// LSE of a plain problem: DLPack's allocation takes half the time of Python's.
inline py::object lse_for(const attn_ext::Problem& p) {
  const uint8_t bits = p.dtype == DType::kFloat64 ? 64 : 32;
  int64_t shape[] = {p.batch, p.query_heads, p.query_length};
  dlpack::Tensor prototype{};
  prototype.device_type = dlpack::kCpu, prototype.type = {dlpack::kFloat, bits, 1};
  prototype.dimensions = 3, prototype.shape = shape;
  void *owned, *lse;
  const auto raise = [](void*, const char*, const char* message) {
    PyErr_SetString(PyExc_MemoryError, message);
  };
  if (plain.api->allocate(&prototype, &owned, nullptr, raise) != 0 ||
      plain.api->to_python(owned, &lse) != 0) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(lse));
}

// The weights of a plain problem, (B, Hq, Lq, Lk) or averaged over heads (B, Lq, Lk).
struct PlainWeights {
  py::object tensor;
  View view;

  PlainWeights(py::handle query, const attn_ext::Problem& p, bool average) {
    static const Name kNewEmpty("new_empty");
    py::tuple shape = py::make_tuple(p.batch, p.query_heads, p.query_length, p.key_length);
    if (average) shape = py::make_tuple(p.batch, p.query_length, p.key_length);
    PyObject* made = PyObject_CallMethodOneArg(query.ptr(), kNewEmpty, shape.ptr());
    if (!made) throw py::error_already_set();
    tensor = py::reinterpret_steal<py::object>(made);
    view = as_plain_view(tensor);
    if (average) view = {view.data, {view.stride[0], 0, view.stride[1], view.stride[2]}};
  }
};

}  // namespace attn_ext::bindings
