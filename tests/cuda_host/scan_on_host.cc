// Runs the GPU kernels on a host, for elements of one type: S5EQX_ELEMENT is its place in `Elements`. Problems come in
// through stdin, results go out through stdout, as raw int64 and arrays:
//
//   in   pass (0 forward, 1 backward), B, L, P, rows of a, steps of a, rows of flags (0: no resets), reverse,
//        conjugate, wants x, wants last, shift (elements off a 16-byte boundary), runs; runs x (blocks or 0, resident
//        blocks, seed, order); a, b, x0, flags; or a, x, x0, flags, g
//   out  x, last; or lambda, da, dx0, of the first run; then, for each further run, how many bytes it differs in
//
// until the input ends.
#include <tuple>

#include "on_host.h"
#include "scan.cuh"

using namespace s5eqx;

namespace {

template <typename E>
void solve(bool backward) {
  const int64_t batch = read_int(), length = read_int(), states = read_int(), a_rows = read_int(), a_steps = read_int();
  const int64_t flag_rows = read_int(), reverse = read_int(), conjugate = read_int(), wants_x = read_int(),
                wants_last = read_int();
  const int64_t element = sizeof(E), shift = read_int() * element, count = read_int();
  constexpr bool kComplex = sizeof(E) > sizeof(typename NumberOf<E>::Scalar);
  const int64_t width = states * (kComplex ? 2 : 1);
  ScanShape shape{batch,
                  length,
                  width,
                  kComplex,
                  reverse != 0,
                  a_rows == 1 ? 0 : a_steps * width,
                  a_steps == 1 ? 0 : width,
                  flag_rows == 1 ? 0 : length};
  const std::vector<Run> runs = read_runs(count);

  const int64_t full = batch * length * states * element, state = batch * states * element;
  Array a(a_rows * a_steps * states * element, shift), b(full, shift), x0(state, shift), flags(flag_rows * length, 0),
      g(full, shift);
  a.read();
  b.read();
  x0.read();
  flags.read();
  if (backward) g.read();
  const bool time_varying = a_steps > 1;
  const int64_t da_bytes = batch * (time_varying ? length : 1) * states * element;
  std::vector<int64_t> sizes = backward ? std::vector<int64_t>{full, da_bytes, state}
                                        : std::vector<int64_t>{wants_x ? full : 0, wants_last ? state : 0};
  Array memory(workspace_bytes(batch, length, states, sizeof(typename NumberOf<E>::Scalar), kComplex, time_varying,
                               backward ? Pass::kBackward : Pass::kForward),
               0);
  run_all(runs, sizes, shift, memory, [&](int64_t blocks, const std::vector<Array>& results) {
    const uint8_t* const reset = flag_rows ? reinterpret_cast<const uint8_t*>(flags.data()) : nullptr;
    const auto out = [&](size_t i) { return results[i].bytes() ? results[i].data() : nullptr; };
    if (backward)
      scan_backward_on_gpu<E>(shape,
                              {a.data(), b.data(), x0.data(), reset, g.data(), out(0), out(1), out(2), conjugate != 0},
                              memory.data(), blocks, nullptr);
    else
      scan_forward_on_gpu<E>(shape, {a.data(), b.data(), x0.data(), reset, out(0), out(1)}, memory.data(), blocks,
                             nullptr);
  });
}

}  // namespace

int main() {
  using Elements = std::tuple<float, double, Complex<float>, Complex<double>>;
  for (;;) solve<std::tuple_element_t<S5EQX_ELEMENT, Elements>>(read_int() != 0);
}
