#include "scan.cuh"

namespace s5eqx {
S5EQX_INSTANTIATE(Complex<double>)
}
