// attn_ext._cpu: the CPU kernels for Python. The GIL is released while a kernel runs.
#include "bindings_multihead.h"
#include "bindings_plain.h"
#include "bindings_problem.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace attn_ext::bindings;

namespace {

// Less work than this does not pay for waking another thread.
constexpr double kFlopsPerThread = 2e6;
// Query rows that share a key head: fewer take as long, with lanes left empty or loads awaited.
constexpr int64_t kLeastRows = 8;

int threads_for(int available, double flops) {
  if (flops >= available * kFlopsPerThread) return available;
  return std::max(1, static_cast<int>(flops / kFlopsPerThread));
}
int threads_for(int available, const attn_ext::Problem& p) {
  const int64_t rows = std::max(p.query_heads * p.query_length, p.key_heads * kLeastRows);
  const double pairs =
      static_cast<double>(p.batch) * static_cast<double>(rows) * static_cast<double>(p.key_length);
  return threads_for(available, 2 * pairs * static_cast<double>(p.head_dim + p.value_dim));
}
// Nothing is packed for each thread, so that half as much work pays for one as in attention.
int threads_for(int available, const attn_ext::LinearArguments& a) {
  const double products =
      static_cast<double>(a.rows) * static_cast<double>(a.columns) * static_cast<double>(a.depth);
  return threads_for(available, 2 * 2 * products);
}

const attn_ext::Kernels& kernels(int index) { return *attn_ext::all_kernels()[index]; }

void forward(int index, int threads, py::handle problem, py::handle dropout, py::handle out,
             py::handle lse) {
  const Problem p = as_problem(problem, dropout);
  const attn_ext::ForwardArguments to{as_view(out), as_view(lse)};
  const py::gil_scoped_release release;
  kernels(index).forward(p.native, to, threads_for(threads, p.native));
}

py::object plain_forward(int index, int threads, py::handle query, py::handle key, py::handle value,
                         py::handle attn_mask, py::handle key_padding_mask, py::handle scale,
                         int causal, bool grouped, bool with_lse) {
  const auto p = plain_problem({query, key, value, attn_mask, key_padding_mask, scale,
                                static_cast<Causal>(causal), grouped});
  if (!p) return py::none();
  py::object out = empty_for(query, *p), lse = py::none();
  if (with_lse) lse = lse_for(*p);
  const attn_ext::ForwardArguments to{as_plain_view(out), as_plain_view(lse)};
  {
    const py::gil_scoped_release release;
    kernels(index).forward(*p, to, threads_for(threads, *p));
  }
  return with_lse ? py::make_tuple(std::move(out), std::move(lse)) : std::move(out);
}

py::object plain_backward(int index, int threads, py::handle query, py::handle key,
                          py::handle value, py::handle attn_mask, py::handle key_padding_mask,
                          py::handle scale, int causal, py::handle out, py::handle lse,
                          py::handle dout) {
  const auto p = plain_problem(
      {query, key, value, attn_mask, key_padding_mask, scale, static_cast<Causal>(causal), true});
  if (!p) return py::none();
  const auto given_out = read_output(out, *p), given_dout = read_output(dout, *p);
  const auto given_lse = read_lse(lse, *p);
  if (!given_out || !given_dout || !given_lse) return py::none();
  py::object dquery = gradient_for(query, p->query, p->query_heads, p->query_length, p->head_dim);
  py::object dkey = gradient_for(key, p->key, p->key_heads, p->key_length, p->head_dim);
  py::object dvalue = gradient_for(value, p->value, p->key_heads, p->key_length, p->value_dim);
  attn_ext::BackwardArguments to{};
  to.out = *given_out, to.lse = *given_lse, to.dout = *given_dout;
  to.dquery = as_plain_view(dquery), to.dkey = as_plain_view(dkey);
  to.dvalue = as_plain_view(dvalue);
  {
    const py::gil_scoped_release release;
    kernels(index).backward(*p, to, threads_for(threads, *p));
  }
  return py::make_tuple(std::move(dquery), std::move(dkey), std::move(dvalue));
}

py::object plain_forward_and_weights(int index, int threads, py::handle query, py::handle key,
                                     py::handle value, py::handle attn_mask,
                                     py::handle key_padding_mask, int causal, bool average) {
  const auto p = plain_problem({query, key, value, attn_mask, key_padding_mask, py::none(),
                                static_cast<Causal>(causal), true});
  if (!p || p->query_heads == 0) return py::none();
  py::object out = empty_for(query, *p), lse = lse_for(*p);
  PlainWeights weights(query, *p, average);
  const attn_ext::ForwardArguments to{as_plain_view(out), as_plain_view(lse)};
  {
    const py::gil_scoped_release release;
    const attn_ext::WeightsArguments weights_to{to.lse, weights.view, average};
    kernels(index).forward_and_weights(*p, to, weights_to, threads_for(threads, *p));
  }
  return py::make_tuple(std::move(out), std::move(weights.tensor), std::move(lse));
}

py::object plain_self_attention(int index, int threads, py::handle tokens, py::handle in_weight,
                                py::handle in_bias, py::handle out_weight, py::handle out_bias,
                                int64_t heads, bool batch_first, bool with_weights, bool average) {
  const auto read = read_self_attention(tokens, in_weight, in_bias, out_weight, out_bias, heads);
  if (!read) return py::none();
  py::object out = empty_like(tokens);
  const SelfAttention module(*read, as_plain_view(out), batch_first);
  const attn_ext::Problem& p = module.problem;
  std::optional<PlainWeights> weights;
  if (with_weights) weights.emplace(tokens, p, average);
  {
    const py::gil_scoped_release release;
    kernels(index).linear(module.in, threads_for(threads, module.in));
    if (weights) {
      const attn_ext::WeightsArguments to{module.attention.lse, weights->view, average};
      kernels(index).forward_and_weights(p, module.attention, to, threads_for(threads, p));
    } else {
      kernels(index).forward(p, module.attention, threads_for(threads, p));
    }
    kernels(index).linear(module.out, threads_for(threads, module.out));
  }
  if (!weights) return py::make_tuple(std::move(out), py::none());
  if (!read->batched) weights->tensor = weights->tensor.attr("squeeze")(0);
  return py::make_tuple(std::move(out), std::move(weights->tensor));
}

void backward(int index, int threads, py::handle problem, py::handle dropout, py::object out,
              py::handle lse, py::object dout, py::handle dlse, py::handle dweights,
              double dweights_scale, py::handle dquery, py::handle dkey, py::handle dvalue,
              py::handle dmask, py::handle row_term) {
  const Problem p = as_problem(problem, dropout);
  const Backward to = as_backward(p, std::move(out), lse, std::move(dout), dlse, dweights,
                                  dweights_scale, dquery, dkey, dvalue, dmask, row_term);
  const py::gil_scoped_release release;
  kernels(index).backward(p.native, to.native, threads_for(threads, p.native));
}

void weights(int index, int threads, py::handle problem, py::handle dropout, py::handle lse,
             py::handle weights, bool average) {
  const Problem p = as_problem(problem, dropout);
  const attn_ext::WeightsArguments to{as_view(lse), as_view(weights), average};
  const py::gil_scoped_release release;
  kernels(index).weights(p.native, to, threads_for(threads, p.native));
}

void forward_and_weights(int index, int threads, py::handle problem, py::handle dropout,
                         py::handle out, py::handle lse, py::handle weights, bool average) {
  const Problem p = as_problem(problem, dropout);
  const attn_ext::ForwardArguments to{as_view(out), as_view(lse)};
  const attn_ext::WeightsArguments weights_to{to.lse, as_view(weights), average};
  const py::gil_scoped_release release;
  kernels(index).forward_and_weights(p.native, to, weights_to, threads_for(threads, p.native));
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
  const py::gil_scoped_release release;
  kernels(index).linear(arguments, threads_for(threads, arguments));
}

py::dict capabilities() {
  py::dict found;
  for (const attn_ext::Kernels* entry : attn_ext::all_kernels())
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
        py::arg("dropout"), py::arg("out"), py::arg("lse"), "Write out and lse.");
  m.def("set_plain", &set_plain, py::arg("exchange_api"), py::arg("empty_like"),
        py::arg("empty_in_layout_of"), "Prepare plain_forward; whether it can be used.");
  m.def("plain_forward", &plain_forward, py::arg("capability"), py::arg("threads"),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("attn_mask"),
        py::arg("key_padding_mask"), py::arg("scale"), py::arg("causal"), py::arg("grouped"),
        py::arg("with_lse"),
        "The output, or (out, lse); None, and nothing done, for tensors that need more than the "
        "kernel. `causal`: 0 for not, 1 for upper left, 2 for lower right.");
  m.def(
      "plain_backward", &plain_backward, py::arg("capability"), py::arg("threads"),
      py::arg("query"), py::arg("key"), py::arg("value"), py::arg("attn_mask"),
      py::arg("key_padding_mask"), py::arg("scale"), py::arg("causal"), py::arg("out"),
      py::arg("lse"), py::arg("dout"),
      "The gradients of query, key and value for what plain_forward gave; None, and nothing done, "
      "for tensors that need more than the kernel.");
  m.def("plain_forward_and_weights", &plain_forward_and_weights, py::arg("capability"),
        py::arg("threads"), py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("attn_mask"), py::arg("key_padding_mask"), py::arg("causal"), py::arg("average"),
        "As plain_forward with the default scale: (out, weights, lse), or None.");
  m.def("plain_self_attention", &plain_self_attention, py::arg("capability"), py::arg("threads"),
        py::arg("tokens"), py::arg("in_weight"), py::arg("in_bias"), py::arg("out_weight"),
        py::arg("out_bias"), py::arg("heads"), py::arg("batch_first"), py::arg("with_weights"),
        py::arg("average"),
        "Multi-head self-attention with its projections: (out, weights or None); None, and nothing "
        "done, for tensors that need more than the kernels.");
  m.def("backward", &backward, py::arg("capability"), py::arg("threads"), py::arg("problem"),
        py::arg("dropout"), py::arg("out"), py::arg("lse"), py::arg("dout"), py::arg("dlse"),
        py::arg("dweights"), py::arg("dweights_scale"), py::arg("dquery"), py::arg("dkey"),
        py::arg("dvalue"), py::arg("dmask"), py::arg("row_term"),
        "Write dquery, dkey, dvalue, dmask and row_term.");
  m.def("weights", &weights, py::arg("capability"), py::arg("threads"), py::arg("problem"),
        py::arg("dropout"), py::arg("lse"), py::arg("weights"), py::arg("average"),
        "Write the attention weights.");
  m.def("forward_and_weights", &forward_and_weights, py::arg("capability"), py::arg("threads"),
        py::arg("problem"), py::arg("dropout"), py::arg("out"), py::arg("lse"), py::arg("weights"),
        py::arg("average"), "Write out, lse and the attention weights.");
  m.def("linear", &linear, py::arg("capability"), py::arg("threads"), py::arg("rows"),
        py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("out"),
        "Write input @ weight^T + bias.");
}
