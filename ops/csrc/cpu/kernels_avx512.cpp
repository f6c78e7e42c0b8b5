#include "kernels.h"

extern const mmvim::InstructionSet mmvim_avx512;
const mmvim::InstructionSet mmvim_avx512 = {"avx512", kernels<float>(), kernels<double>()};
