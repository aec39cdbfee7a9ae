// What the programs that run the GPU kernels on a host have in common: arrays of their own from stdin, and the same
// problem under several schedules.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "device.h"

namespace s5eqx {

inline int64_t read_int() {
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
  void read() const {
    if (bytes_ && std::fread(data(), bytes_, 1, stdin) != 1) host::fail("the input ends in the middle of an array");
  }
  void poison() const { std::memset(data(), 0xff, bytes_); }

 private:
  int64_t bytes_, shift_;
  std::unique_ptr<char[]> memory_;
};

struct Run {
  int64_t blocks;
  host::Schedule schedule;
};

inline std::vector<Run> read_runs(int64_t count) {
  std::vector<Run> runs(count);
  for (Run& r : runs) {
    r.blocks = read_int();
    r.schedule.resident = static_cast<int>(read_int());
    r.schedule.seed = static_cast<unsigned>(read_int());
    r.schedule.order = static_cast<host::Schedule::Order>(read_int());
  }
  return runs;
}

// Writes the results of the first run, then how many bytes of each further run differ from them.
template <typename Solve>
void run_all(const std::vector<Run>& runs, const std::vector<int64_t>& sizes, int64_t shift, const Array& memory,
             Solve solve) {
  std::vector<Array> first;
  std::vector<int64_t> differing;
  for (const Run& run : runs) {
    host::schedule = run.schedule;
    std::vector<Array> results;
    for (const int64_t n : sizes) results.emplace_back(n, shift);
    for (const Array& r : results) r.poison();
    memory.poison();
    solve(run.blocks, results);
    if (first.empty()) {
      for (const Array& r : results) std::fwrite(r.data(), 1, r.bytes(), stdout);
      first = std::move(results);
      continue;
    }
    int64_t bytes = 0;
    for (size_t i = 0; i < results.size(); ++i)
      for (int64_t j = 0; j < results[i].bytes(); ++j) bytes += results[i].data()[j] != first[i].data()[j];
    differing.push_back(bytes);
  }
  for (const int64_t n : differing) std::fwrite(&n, sizeof n, 1, stdout);
  std::fflush(stdout);
}

}  // namespace s5eqx
