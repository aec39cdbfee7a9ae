// Runs the GPU kernels of the state-space step on a host. Problems come in through stdin, results go out through
// stdout, as raw int64 and arrays:
//
//   in   scalar bytes, projection, B, L, D, P, rows of flags (0: no resets), shift (scalars off a 16-byte boundary),
//   runs; runs x
//        (blocks or 0, resident blocks, seed, order); u, a, w_in, w_out, skip, x0, flags, g, g_last
//   out  y, last, kept of the first run; for each further run, how many bytes it differs in; du, da, dw_in, dw_out,
//        dskip, dx0, from that `kept`, and the same
//
// until the input ends.
#include "on_host.h"
#include "ssm.cuh"

using namespace s5eqx;

namespace {

template <typename T>
void solve() {
  const Projection projection = static_cast<Projection>(read_int());
  const int64_t batch = read_int(), length = read_int(), width = read_int(), states = read_int();
  const int64_t flag_rows = read_int(), shift = read_int() * sizeof(T), count = read_int();
  const SsmShape shape{batch, length, width, states, kSsmChunk, flag_rows == 1 ? 0 : length};
  const std::vector<Run> runs = read_runs(count);
  if (!takes(width, states, sizeof(T))) host::fail("the kernels do not take this size");

  constexpr int64_t kBytes = sizeof(T);
  const int64_t rows = batch * length * width * kBytes, weights = width * 2 * states * kBytes;
  const int64_t state = batch * states * 2 * kBytes, multiplier = states * 2 * kBytes;
  const Array u(rows, shift), a(multiplier, shift), w_in(weights, shift), w_out(weights, shift),
      skip(width * kBytes, shift), x0(state, shift), flags(flag_rows * length, 0), g(rows, shift), g_last(state, shift),
      kept(state * shape.chunks(), shift);
  for (const Array* z : {&u, &a, &w_in, &w_out, &skip, &x0, &flags, &g, &g_last}) z->read();
  const auto at = [](const Array& z) { return reinterpret_cast<T*>(z.data()); };
  const SsmInputs<T> inputs{at(u),
                            at(a),
                            at(w_in),
                            at(w_out),
                            at(skip),
                            at(x0),
                            flag_rows ? reinterpret_cast<const uint8_t*>(flags.data()) : nullptr};
  const auto memory = [&](Pass pass) { return Array(ssm_workspace_bytes(shape, sizeof(T), pass, projection), 0); };

  const Array forward_memory = memory(Pass::kForward), backward_memory = memory(Pass::kBackward);
  run_all(runs, {rows, state, kept.bytes()}, shift, forward_memory,
          [&](int64_t blocks, const std::vector<Array>& results) {
            ssm_forward_on_gpu<T>(shape, inputs, {at(results[0]), at(results[1]), at(results[2])}, projection,
                                  forward_memory.data(), blocks, nullptr);
            std::memcpy(kept.data(), results[2].data(), kept.bytes());
          });
  run_all(runs, {rows, multiplier, weights, weights, width * kBytes, state}, shift, backward_memory,
          [&](int64_t blocks, const std::vector<Array>& r) {
            ssm_backward_on_gpu<T>(
                shape, inputs,
                {at(kept), at(g), at(g_last), at(r[0]), at(r[1]), at(r[2]), at(r[3]), at(r[4]), at(r[5])}, projection,
                backward_memory.data(), blocks, nullptr);
          });
}

// Of the least device that there are kernels for.
void check_shared_memory(int64_t scalar_bytes, bool tensor) {
  for (int64_t width = 1; takes(width, 1, scalar_bytes); ++width)
    for (int64_t states = 1; takes(width, states, scalar_bytes); ++states)
      if (ssm_tiling({1, 1 << 20, width, states, kSsmChunk, 0}, scalar_bytes, Pass::kBackward, tensor).shared_bytes >
          64 << 10)
        host::fail("a tile does not fit the shared memory");
}

}  // namespace

int main() {
  check_shared_memory(sizeof(float), false);
  check_shared_memory(sizeof(float), true);
  check_shared_memory(sizeof(double), false);
  for (;;) read_int() == sizeof(float) ? solve<float>() : solve<double>();
}
