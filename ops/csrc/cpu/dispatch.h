// Which instruction set's kernels are used on this machine.
#pragma once
#include <string>
#include <vector>

#include "args.h"

namespace mmvim {

// The one in use: the best the processor has, unless another was chosen.
const InstructionSet& instruction_set();

// Names of those this processor can run, the best first.
std::vector<std::string> instruction_sets();

// Choose one by name; false where it cannot run here. Meant for tests and measurements.
bool choose_instruction_set(const std::string& name);

// Where the processor multiplies bfloat16 numbers faster than float32; else null.
const HalfKernels* half_kernels();

template <class T> const Kernels<T>& kernels();
template <> inline const Kernels<float>& kernels() { return instruction_set().single; }
template <> inline const Kernels<double>& kernels() { return instruction_set().twice; }

}  // namespace mmvim
