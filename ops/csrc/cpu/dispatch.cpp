#include "dispatch.h"

#include <atomic>

extern const mmvim::InstructionSet mmvim_portable;
#if defined(__x86_64__)
extern const mmvim::InstructionSet mmvim_avx2, mmvim_avx512;
extern const mmvim::HalfKernels mmvim_bf16;
#endif

namespace mmvim {
namespace {

std::vector<const InstructionSet*> usable() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
      && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&mmvim_avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&mmvim_avx2);
#endif
  sets.push_back(&mmvim_portable);
  return sets;
}

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> chosen{usable().front()};
  return chosen;
}

}  // namespace

const InstructionSet& instruction_set() { return *current().load(std::memory_order_relaxed); }

const HalfKernels* half_kernels() {
#if defined(__x86_64__)
  static const bool present = __builtin_cpu_supports("avx512bf16");
  if (present && &instruction_set() == &mmvim_avx512) return &mmvim_bf16;
#endif
  return nullptr;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : usable()) names.emplace_back(set->name);
  return names;
}

bool choose_instruction_set(const std::string& name) {
  for (const InstructionSet* set : usable())
    if (name == set->name) {
      current() = set;
      return true;
    }
  return false;
}

}  // namespace mmvim
