#include "kernels.h"

extern const mmvim::InstructionSet mmvim_avx2;
const mmvim::InstructionSet mmvim_avx2 = {"avx2", kernels<float>(), kernels<double>()};
