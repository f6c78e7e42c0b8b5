// The scan and the convolution as custom operators of ONNX Runtime, by the kernels of csrc/cpu. They
// are used where mmvim/deployment/onnx_custom.py exports a model, which says what they compute.
//
// Sequences are (batch, length, channels), float32 and contiguous, as ONNX Runtime's tensors are.
#include <array>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <thread>

#include "../cpu/dispatch.h"
#include "../cpu/work.h"
#include "runtime.h"

namespace mmvim::onnxruntime {
namespace {

constexpr char kDomain[] = "mmvim_ops";

// An input or output; data is null where an optional input is not given.
struct Tensor {
  float* data = nullptr;
  std::vector<int64_t> sizes;

  explicit operator bool() const { return data != nullptr; }
  int64_t size(int i) const { return sizes[i < 0 ? i + int(sizes.size()) : i]; }
  bool is(const std::vector<int64_t>& expected) const { return sizes == expected; }
};

void require(bool condition, const std::string& what) {
  if (!condition) throw std::invalid_argument(what);
}

// One call of an operator.
struct Call {
  const Runtime& runtime;
  Context* context;

  Tensor input(size_t index) const {
    const Value* value = runtime.input(context, index);
    if (!value) return {};
    return {runtime.data(value), runtime.sizes(value)};
  }
  Tensor output(size_t index, const std::vector<int64_t>& sizes) const {
    return {runtime.data(runtime.output(context, index, sizes)), sizes};
  }
  // Run all tasks; an error in one of them is thrown here.
  template <class F> void run(int64_t tasks, const F& task) const {
    std::exception_ptr error;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    auto guarded = [&](int64_t i) {
      try {
        task(i);
      } catch (...) {
        if (!failed.test_and_set()) error = std::current_exception();
      }
    };
    runtime.parallel(context, tasks, guarded);
    if (error) std::rethrow_exception(error);
  }
};

// A session does not tell how many threads it has: as many as there are, in tasks that any number of
// threads can share.
int64_t threads() {
  static const int64_t count = std::max<int64_t>(1, std::thread::hardware_concurrency());
  return count;
}

template <class T> Sequence<T> sequence(const Tensor& x, bool reverse) {
  if (!x) return {nullptr, 0, 0, 0};
  int64_t length = x.size(1), channels = x.size(2);
  Sequence<T> s{x.data, length * channels, 1, channels};
  return reverse ? from_the_end(s, length) : s;
}

// B or C: (channels, states), (batch, length, states) or (batch, groups, length, states).
Matrix<float> matrix(const Tensor& x, bool reverse) {
  if (x.sizes.size() == 2) return {x.data, 0, 0, x.size(1), 1, 0, false};
  int64_t length = x.size(-2), states = x.size(-1), groups = x.sizes.size() == 4 ? x.size(1) : 1;
  Matrix<float> m{x.data, groups * length * states, length * states, 0, 1, states, true};
  return reverse ? from_the_end(m, length) : m;
}

// The inputs of one direction, which begin with number `first`.
struct Direction {
  Tensor u, delta, A, B, C, D, bias;

  Direction(const Call& call, size_t first, std::array<size_t, 2> optional)
      : u(call.input(first)), delta(call.input(first + 1)), A(call.input(first + 2)),
        B(call.input(first + 3)), C(call.input(first + 4)), D(call.input(optional[0])),
        bias(call.input(optional[1])) {
    require(u.sizes.size() == 3, "u must be (batch, length, channels)");
    require(delta.is(u.sizes), "delta must have the shape of u");
    require(A.sizes.size() == 2 && A.size(0) == u.size(2), "A must be (channels, states)");
    require(!D || D.is({u.size(2)}), "D must be (channels)");
    require(!bias || bias.is({u.size(2)}), "delta_bias must be (channels)");
    require(fits(B) && fits(C) && u.size(2) % groups() == 0, "B and C do not fit to u and A");
  }
  int64_t groups() const {
    return std::max(B.sizes.size() == 4 ? B.size(1) : 1, C.sizes.size() == 4 ? C.size(1) : 1);
  }
  bool fits(const Tensor& m) const {
    int64_t batch = u.size(0), length = u.size(1), states = A.size(1);
    return m.is({u.size(2), states}) || (groups() == 1 && m.is({batch, length, states}))
        || (groups() > 0 && m.is({batch, groups(), length, states}));
  }

  void scan(const Call& call, const Tensor& z, bool softplus, bool reverse, float scale,
            Finish finish, const Tensor& out) const {
    const Kernels<float>& kernels = mmvim::kernels<float>();
    ScanArgs<float> a{};
    a.batch = u.size(0), a.length = u.size(1), a.channels = u.size(2), a.states = A.size(1);
    a.groups = groups();
    int64_t blocks = (a.channels / a.groups + kernels.lanes - 1) / kernels.lanes;
    a.splits = splits(a.batch * a.groups, blocks, threads());
    a.u = sequence<const float>(u, reverse), a.delta = sequence<const float>(delta, reverse);
    a.z = sequence<const float>(z, reverse), a.out = sequence<float>(out, reverse);
    a.B = matrix(B, reverse), a.C = matrix(C, reverse);
    a.A = A.data, a.D = D.data, a.delta_bias = bias.data;
    a.softplus = softplus, a.scale = scale, a.finish = finish;
    int64_t bytes = kernels.scan_scratch(a, false);
    call.run(a.batch * a.groups * a.splits,
             [&](int64_t i) { kernels.scan_forward(a, i, i + 1, scratch(bytes)); });
  }
};

bool has_elements(const Tensor& u) { return u.size(0) > 0 && u.size(1) > 0 && u.size(2) > 0; }

void check_gate(const Tensor& z, const Tensor& u) {
  require(!z || z.is(u.sizes), "z must have the shape of u");
}

// u, delta, A, B, C, D?, z?, delta_bias? to y.
struct SelectiveScan {
  static constexpr char kName[] = "SelectiveScan";
  static constexpr size_t kInputs = 8;
  static constexpr bool optional(size_t i) { return i >= 5; }
  bool softplus, reverse;

  SelectiveScan(const Runtime& runtime, const KernelInfo* info)
      : softplus(runtime.integer(info, "delta_softplus") != 0),
        reverse(runtime.integer(info, "reverse") != 0) {}

  void compute(const Call& call) const {
    Direction d(call, 0, {5, 7});
    Tensor z = call.input(6), out = call.output(0, d.u.sizes);
    check_gate(z, d.u);
    if (has_elements(d.u)) d.scan(call, z, softplus, reverse, 1, Finish::kGate, out);
  }
};

// Both directions, u, delta, A, B, C, D?, delta_bias? of each, and z? to the gated sum.
struct BidirectionalScan {
  static constexpr char kName[] = "BidirectionalScan";
  static constexpr size_t kInputs = 15;
  static constexpr bool optional(size_t i) { return i == 14 || i % 7 >= 5; }
  bool softplus;
  float scale;

  BidirectionalScan(const Runtime& runtime, const KernelInfo* info)
      : softplus(runtime.integer(info, "delta_softplus") != 0),
        scale(runtime.number(info, "scale")) {}

  void compute(const Call& call) const {
    Direction first(call, 0, {5, 6}), second(call, 7, {12, 13});
    require(second.u.is(first.u.sizes), "both directions must have the same size");
    Tensor z = call.input(14), out = call.output(0, first.u.sizes);
    check_gate(z, first.u);
    if (!has_elements(first.u)) return;
    first.scan(call, z, softplus, false, scale, Finish::kKeep, out);
    second.scan(call, z, softplus, true, scale, Finish::kAddAndGate, out);
  }
};

// x, weight (channels, taps), bias? to y.
struct CausalConv1d {
  static constexpr char kName[] = "CausalConv1d";
  static constexpr size_t kInputs = 3;
  static constexpr bool optional(size_t i) { return i == 2; }
  bool silu, reverse;

  CausalConv1d(const Runtime& runtime, const KernelInfo* info)
      : silu(runtime.integer(info, "silu") != 0), reverse(runtime.integer(info, "reverse") != 0) {}

  void compute(const Call& call) const {
    Tensor x = call.input(0), weight = call.input(1), bias = call.input(2);
    require(x.sizes.size() == 3, "x must be (batch, length, channels)");
    require(weight.sizes.size() == 2 && weight.size(0) == x.size(2) && weight.size(1) >= 1
                && weight.size(1) <= kMostTaps,
            "weight must be (channels, taps), with at most " + std::to_string(kMostTaps) + " taps");
    require(!bias || bias.is({x.size(2)}), "bias must be (channels)");
    Tensor out = call.output(0, x.sizes);
    if (!has_elements(x)) return;
    const Kernels<float>& kernels = mmvim::kernels<float>();
    ConvArgs<float> a{};
    a.batch = x.size(0), a.length = x.size(1), a.channels = x.size(2), a.width = weight.size(1);
    a.splits = splits(a.batch, (a.channels + kernels.lanes - 1) / kernels.lanes, threads());
    a.x = sequence<const float>(x, reverse), a.out = sequence<float>(out, reverse);
    a.weight = weight.data, a.bias = bias.data, a.silu = silu;
    call.run(a.batch * a.splits, [&](int64_t i) { kernels.conv_forward(a, i, i + 1); });
  }
};

// What a function returns to the runtime: null, or what it threw.
template <class F> Status* status_of(const Runtime& runtime, const F& f) {
  try {
    f();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return runtime.error((std::string(kDomain) + ": " + error.what()).c_str());
  }
}

// A node's operator.
template <class Op> struct Kernel {
  Runtime runtime;
  Op op;
};

template <class Op> struct Definition : Operator {
  Definition() {
    name = [](const Operator*) { return Op::kName; };
    provider = [](const Operator*) { return "CPUExecutionProvider"; };
    inputs = [](const Operator*) { return Op::kInputs; };
    outputs = [](const Operator*) { return size_t(1); };
    input_type = output_type = [](const Operator*, size_t) { return kFloat; };
    input_kind = [](const Operator*, size_t i) { return Op::optional(i) ? kOptional : kRequired; };
    output_kind = [](const Operator*, size_t) { return kRequired; };
    input_memory = [](const Operator*, size_t) { return 0; };  // the device's default
    create_or_fail = [](const Operator*, Table table, const KernelInfo* info, void** kernel) {
      Runtime runtime(table);
      return status_of(runtime, [&] { *kernel = new Kernel<Op>{runtime, Op(runtime, info)}; });
    };
    compute_or_fail = [](void* kernel, Context* context) {
      auto& self = *static_cast<Kernel<Op>*>(kernel);
      return status_of(self.runtime, [&] { self.op.compute(Call{self.runtime, context}); });
    };
    destroy = [](void* kernel) { delete static_cast<Kernel<Op>*>(kernel); };
  }
};

// Lives as long as the library: sessions point to it.
Domain* domain(const Runtime& runtime) {
  static const Definition<SelectiveScan> scan;
  static const Definition<BidirectionalScan> bidirectional;
  static const Definition<CausalConv1d> conv1d;
  static Domain* const all = [&] {
    const char* wanted = std::getenv("MMVIM_OPS_ISA");
    require(!wanted || !*wanted || choose_instruction_set(wanted),
            "this processor has no instruction set MMVIM_OPS_ISA=" + std::string(wanted ? wanted : ""));
    Domain* domain = runtime.new_domain(kDomain);
    for (const Operator* op : {static_cast<const Operator*>(&scan),
                               static_cast<const Operator*>(&bidirectional),
                               static_cast<const Operator*>(&conv1d)})
      runtime.add(domain, op);
    return domain;
  }();
  return all;
}

}  // namespace
}  // namespace mmvim::onnxruntime

// What ONNX Runtime looks for in a library of operators.
extern "C" __attribute__((visibility("default"))) mmvim::onnxruntime::Status* RegisterCustomOps(
    mmvim::onnxruntime::Options* options, const mmvim::onnxruntime::Entry* entry) {
  using namespace mmvim::onnxruntime;
  Table table = entry->table(kVersion);
  if (!table) table = entry->table(1);
  Runtime runtime(table);
  return status_of(runtime, [&] {
    require(entry->table(kVersion) != nullptr,
            "ONNX Runtime 1.17 or later is needed, this is " + std::string(entry->version()));
    runtime.add(options, domain(runtime));
  });
}
