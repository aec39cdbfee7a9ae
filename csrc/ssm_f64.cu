#include "ssm.cuh"

namespace s5eqx {
S5EQX_INSTANTIATE_SSM(double)
}
