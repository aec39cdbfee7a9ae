// The state-space step on random problems, with 1 to 16 threads: the same bits, and nothing for a sanitizer to report.
// Every array is one of its own, so that a sanitizer sees what runs over its ends.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "ssm.h"

using namespace s5eqx;

namespace {

template <typename T>
std::vector<std::vector<T>> run(const SsmShape& s, bool resets, int64_t helpers) {
  std::mt19937 random(0);
  const auto draw = [&](int64_t n, double size = 1) {
    std::vector<T> values(n);
    for (T& v : values) v = static_cast<T>(size * (random() / 4294967296.0 - 0.5));
    return values;
  };
  const int64_t inputs = s.batch * s.length * s.width, weights = 2 * s.states * s.width,
                states = 2 * s.batch * s.states;
  const std::vector<T> u = draw(inputs), a = draw(2 * s.states, 1.4), w_in = draw(weights), w_out = draw(weights),
                       skip = draw(s.width), x0 = draw(states), g = draw(inputs), g_last = draw(states);
  std::vector<uint8_t> flags(resets ? s.batch * s.length : 0);
  for (uint8_t& f : flags) f = random() % 50 == 0;

  std::vector<std::thread> threads;
  const Parallel parallel{helpers, [&](int64_t n, const std::function<void()>& task) {
                            for (; n > 0; --n) threads.emplace_back(task);
                            std::this_thread::sleep_for(std::chrono::microseconds(200));  // the others begin
                          }};
  std::vector<std::vector<T>> out;
  for (const int64_t n : {inputs, states, s.chunks() * states, inputs, 2 * s.states, weights, weights, s.width, states})
    out.emplace_back(n);
  const SsmInputs<T> in{
      u.data(), a.data(), w_in.data(), w_out.data(), skip.data(), x0.data(), resets ? flags.data() : nullptr};
  ssm_forward<T>(s, in, {out[0].data(), out[1].data(), out[2].data()}, parallel);
  ssm_backward<T>(s, in,
                  {out[2].data(), g.data(), g_last.data(), out[3].data(), out[4].data(), out[5].data(), out[6].data(),
                   out[7].data(), out[8].data()},
                  parallel);
  for (std::thread& t : threads) t.join();
  return out;
}

template <typename T>
bool same_bits(const SsmShape& s, bool resets) {
  const auto expected = run<T>(s, resets, 0);
  for (const int64_t helpers : {1, 3, 15}) {
    const auto given = run<T>(s, resets, helpers);
    for (size_t i = 0; i < given.size(); ++i)
      if (!given[i].empty() && std::memcmp(given[i].data(), expected[i].data(), given[i].size() * sizeof(T)) != 0) {
        std::printf("array %zu differs with %ld helpers: B %ld, L %ld, D %ld, P %ld\n", i, static_cast<long>(helpers),
                    static_cast<long>(s.batch), static_cast<long>(s.length), static_cast<long>(s.width),
                    static_cast<long>(s.states));
        return false;
      }
  }
  return true;
}

}  // namespace

int main() {
  const int64_t sizes[][4] = {{1, 3, 2, 2},      {2, 70, 5, 3},     {1, 300, 64, 16},  {1, 3000, 19, 13},
                              {3, 2200, 19, 13}, {9, 1100, 19, 13}, {70, 130, 19, 13}, {1, 67, 256, 5},
                              {1, 1400, 67, 67}, {1, 129, 3, 0},    {1, 129, 0, 3},    {0, 5, 3, 2},
                              {2, 0, 3, 2}};
  bool right = true;
  for (const auto& n : sizes)
    for (const int64_t chunk : {kSsmChunk, int64_t{1}})
      for (const bool resets : {false, true}) {
        const SsmShape s{n[0], n[1], n[2], n[3], chunk, resets ? n[1] : 0};
        right = same_bits<float>(s, resets) && right;
        right = same_bits<double>(s, resets) && right;
      }
  return right ? 0 : 1;
}
