#include "kernels.h"

extern const mmvim::InstructionSet mmvim_portable;
const mmvim::InstructionSet mmvim_portable = {"portable", kernels<float>(), kernels<double>()};
