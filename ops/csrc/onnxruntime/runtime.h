// The part of ONNX Runtime's C interface that custom operators need, declared as the operators use
// it: its Python package brings no headers. The interface is a table of functions that only grows,
// so the numbers below hold for every version from 1.17 on, which brought the last of them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace mmvim::onnxruntime {

constexpr uint32_t kVersion = 17;

// Only ever pointed to.
struct Status;
struct Options;      // of a session
struct Domain;       // a set of operators
struct Value;        // a tensor
struct Shape;
struct KernelInfo;   // of a node: its attributes
struct Context;      // of a call

using Table = const void* const*;

struct Entry {
  Table (*table)(uint32_t version);
  const char* (*version)();
};

constexpr int kFloat = 1;                            // element type
constexpr int kRequired = 0, kOptional = 1;          // kinds of inputs
constexpr int kInvalidArgument = 2;                  // error code

// An operator: functions that ONNX Runtime calls.
struct Operator {
  uint32_t version = kVersion;
  void* (*create)(const Operator*, Table, const KernelInfo*) = nullptr;
  const char* (*name)(const Operator*) = nullptr;
  const char* (*provider)(const Operator*) = nullptr;
  int (*input_type)(const Operator*, size_t) = nullptr;
  size_t (*inputs)(const Operator*) = nullptr;
  int (*output_type)(const Operator*, size_t) = nullptr;
  size_t (*outputs)(const Operator*) = nullptr;
  void (*compute)(void*, Context*) = nullptr;
  void (*destroy)(void*) = nullptr;
  int (*input_kind)(const Operator*, size_t) = nullptr;
  int (*output_kind)(const Operator*, size_t) = nullptr;
  int (*input_memory)(const Operator*, size_t) = nullptr;
  int (*variadic[4])(const Operator*) = {};
  Status* (*create_or_fail)(const Operator*, Table, const KernelInfo*, void**) = nullptr;
  Status* (*compute_or_fail)(void*, Context*) = nullptr;
  Status* (*infer_shapes)(const Operator*, void*) = nullptr;
  int (*first_version)(const Operator*) = nullptr;
  int (*last_version)(const Operator*) = nullptr;
};

// A failed call of the runtime, whose status is handed back to it.
struct Failure {
  Status* status;
};

// The functions, which throw a Failure where they return one.
class Runtime {
  Table table;

  template <class Function> Function* at(int index) const {
    return reinterpret_cast<Function*>(const_cast<void*>(table[index]));
  }
  template <class... X> void check(int index, X... arguments) const {
    if (Status* status = at<Status*(X...)>(index)(arguments...)) throw Failure{status};
  }

public:
  explicit Runtime(Table table) : table(table) {}

  Status* error(const char* message) const {
    return at<Status*(int, const char*)>(0)(kInvalidArgument, message);
  }

  Domain* new_domain(const char* name) const {
    Domain* domain;
    check<const char*, Domain**>(26, name, &domain);
    return domain;
  }
  void add(Domain* domain, const Operator* op) const {
    check<Domain*, const Operator*>(27, domain, op);
  }
  void add(Options* options, Domain* domain) const {
    check<Options*, Domain*>(28, options, domain);
  }

  float number(const KernelInfo* info, const char* name) const {
    float value;
    check<const KernelInfo*, const char*, float*>(85, info, name, &value);
    return value;
  }
  int64_t integer(const KernelInfo* info, const char* name) const {
    int64_t value;
    check<const KernelInfo*, const char*, int64_t*>(86, info, name, &value);
    return value;
  }

  // Null where an optional input is not given.
  const Value* input(const Context* context, size_t index) const {
    size_t count;
    check<const Context*, size_t*>(88, context, &count);
    if (index >= count) return nullptr;
    const Value* value;
    check<const Context*, size_t, const Value**>(90, context, index, &value);
    return value;
  }
  Value* output(Context* context, size_t index, const std::vector<int64_t>& sizes) const {
    Value* value;
    check<Context*, size_t, const int64_t*, size_t, Value**>(91, context, index, sizes.data(),
                                                             sizes.size(), &value);
    return value;
  }
  float* data(const Value* value) const {
    void* data;
    check<Value*, void**>(51, const_cast<Value*>(value), &data);
    return static_cast<float*>(data);
  }
  std::vector<int64_t> sizes(const Value* value) const {
    Shape* shape;
    check<const Value*, Shape**>(65, value, &shape);
    size_t count;
    check<const Shape*, size_t*>(61, shape, &count);
    std::vector<int64_t> sizes(count);
    check<const Shape*, int64_t*, size_t>(62, shape, sizes.data(), count);
    at<void(Shape*)>(99)(shape);
    return sizes;
  }

  // Call f(i) for all i below `count`, on the session's threads.
  template <class F> void parallel(const Context* context, int64_t count, F& f) const {
    auto call = [](void* function, size_t i) { (*static_cast<F*>(function))(int64_t(i)); };
    check<const Context*, void (*)(void*, size_t), size_t, size_t, void*>(
        274, context, call, size_t(count), 0, &f);
  }
};

}  // namespace mmvim::onnxruntime
