// Runs the GPU kernels on a host. Problems come in through stdin, results go out through stdout, as raw int64 and
// arrays:
//
//   in   pass (0 forward, 1 backward), element (0 f32, 1 f64, 2 c64, 3 c128), B, L, P, rows of a, steps of a,
//        rows of flags (0: no resets), reverse, conjugate, wants x, wants last, shift (elements off a 16-byte
//        boundary), runs; runs x (blocks or 0, resident blocks, seed, order); a, b, x0, flags; or a, x, x0, flags, g
//   out  x, last; or lambda, da, dx0, of the first run; then, for each further run, how many bytes it differs in
//
// until the input ends.
#include <cmath>
#include <limits>

#include "scan.cuh"

using namespace s5eqx;

namespace {

int64_t read_int() {
  int64_t n;
  if (std::fread(&n, sizeof n, 1, stdin) != 1) std::exit(0);
  return n;
}

// An array of its own, so that a sanitizer sees what runs over its ends.
class Array {
 public:
  Array(int64_t bytes, int64_t shift) : bytes_(bytes), shift_(shift), memory_(new char[bytes + shift + 16]) {}
  // Flush with the end of the allocation but for the padding that alignment costs.
  char* data() const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (16 - at % 16) % 16 + shift_;
  }
  int64_t bytes() const { return bytes_; }
  void read() {
    if (bytes_ && std::fread(data(), bytes_, 1, stdin) != 1) host::fail("the input ends in the middle of an array");
  }
  void poison() { std::memset(data(), 0xff, bytes_); }

 private:
  int64_t bytes_, shift_;
  std::unique_ptr<char[]> memory_;
};

template <typename E>
void solve(bool backward) {
  const int64_t batch = read_int(), length = read_int(), states = read_int(), a_rows = read_int(), a_steps = read_int();
  const int64_t flag_rows = read_int(), reverse = read_int(), conjugate = read_int(), wants_x = read_int(),
                wants_last = read_int();
  const int64_t element = sizeof(E), shift = read_int() * element, runs = read_int();
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
  std::vector<int64_t> plans(4 * runs);
  for (int64_t& n : plans) n = read_int();

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
  std::vector<Array> first;
  std::vector<int64_t> differing;
  for (int64_t run = 0; run < runs; ++run) {
    host::schedule.resident = static_cast<int>(plans[4 * run + 1]);
    host::schedule.seed = static_cast<unsigned>(plans[4 * run + 2]);
    host::schedule.order = static_cast<host::Schedule::Order>(plans[4 * run + 3]);
    std::vector<Array> results;
    for (const int64_t n : sizes) results.emplace_back(n, shift);
    for (Array& r : results) r.poison();
    memory.poison();
    const uint8_t* const reset = flag_rows ? reinterpret_cast<const uint8_t*>(flags.data()) : nullptr;
    const auto out = [&](size_t i) { return results[i].bytes() ? results[i].data() : nullptr; };
    if (backward)
      scan_backward_on_gpu<E>(shape,
                              {a.data(), b.data(), x0.data(), reset, g.data(), out(0), out(1), out(2), conjugate != 0},
                              memory.data(), plans[4 * run], nullptr);
    else
      scan_forward_on_gpu<E>(shape, {a.data(), b.data(), x0.data(), reset, out(0), out(1)}, memory.data(),
                             plans[4 * run], nullptr);
    if (run == 0) {
      for (const Array& r : results) std::fwrite(r.data(), 1, r.bytes(), stdout);
      first = std::move(results);
      continue;
    }
    int64_t bytes = 0;
    for (size_t i = 0; i < results.size(); ++i)
      for (int64_t j = 0; j < results[i].bytes(); ++j) bytes += results[i].data()[j] != first[i].data()[j];
    differing.push_back(bytes);
  }
  std::fwrite(differing.data(), sizeof(int64_t), differing.size(), stdout);
  std::fflush(stdout);
}

}  // namespace

int main() {
  for (;;) {
    const bool backward = read_int() != 0;
    switch (read_int()) {
      case 0:
        solve<float>(backward);
        break;
      case 1:
        solve<double>(backward);
        break;
      case 2:
        solve<Complex<float>>(backward);
        break;
      case 3:
        solve<Complex<double>>(backward);
        break;
      default:
        host::fail("no such element");
    }
  }
}
