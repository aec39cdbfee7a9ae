// How the state-space step is cut into tiles on a GPU, where a tile's arrays lie in shared memory, and what workspace
// the tiles talk through. It follows from the shape alone, hence so do the bits of the result.
//
// A tile is some steps of one batch row, with all its states. Consecutive tiles of a row make a run, which one block
// takes: in the forward pass of one tile, in the backward pass of as many as keep the runs few, since every run leaves
// a sum over its steps for each weight. With many rows a block takes whole rows and carries the state along; with few,
// runs look back at what the runs before them have published, as the tiles of a scan do.
#pragma once

#include "scan_tiles.h"
#include "ssm.h"

namespace s5eqx {

constexpr int kSlice = 16;     // inputs of a projection that are in shared memory at once
constexpr int kColumns = 4;    // outputs side by side of one thread, in every product
#if !defined(S5EQX_MOST_RUNS)  // the tests ask for fewer
#define S5EQX_MOST_RUNS 1024
#endif
constexpr int64_t kMostRuns = S5EQX_MOST_RUNS;  // that leave sums of their own
constexpr int64_t kManyRuns = kMostRuns / 4;    // that keep a GPU busy
constexpr int64_t kMostFeatures = 256;
constexpr int64_t kTileBytes = 32 << 10;  // of states

// How the dense products are made of float32: in its own arithmetic, or by tensor cores in TF32, of two terms a number,
// which is nearly as exact, or of one.
enum class Projection : int64_t { kPlain, kSplitTf32, kTf32 };

constexpr int rows_a_thread(int64_t scalar_bytes) { return static_cast<int>(32 / scalar_bytes); }
constexpr int steps_a_segment(int64_t scalar_bytes) { return static_cast<int>(64 / scalar_bytes); }

struct SsmTiling {
  int steps;                           // of a tile: 64, 128 or 256
  int pitch, pad;                      // scalars from one step's states to the next's; between rows of what is staged
  int row_groups;                      // threads one below the other in a projection, and
  int column_groups;                   // side by side
  int64_t tiles;                       // of a row
  int run;                             // tiles
  int64_t runs, groups, super_groups;  // of a row
  int64_t rows;                        // without look-back, those that a block takes
  int64_t slots;                       // sums left for each weight
  bool look_back;

  // The gradient of a weight matrix, (width, 2 states): a thread has kColumns^2 of its numbers, over every `splits`-th
  // step.
  int splits, features, cells;  // features and threads of one pass
  int passes, sum_steps;        // steps in shared memory at once
  int64_t slot_cells;           // numbers of one slot

  // Where the arrays begin in shared memory, in bytes; the last is its size.
  int at_staged, at_totals, at_powers, at_dskip, at_flags, shared_bytes;

  // The kernels count rows, runs and tiles in 32 bits.
  bool is_countable(int64_t batch) const {
    constexpr int64_t kMost = int64_t{1} << 30;
    return batch < kMost && tiles < kMost && (!look_back || batch * runs < kMost);
  }
};

// Sizes that fit the shared memory of every device that there are kernels for.
inline bool takes(int64_t width, int64_t states, int64_t scalar_bytes) {
  return width > 0 && width <= kMostFeatures && states > 0 && kSsmChunk * states * 2 * scalar_bytes <= kTileBytes;
}

inline SsmTiling ssm_tiling(const SsmShape& s, int64_t scalar_bytes, Pass pass, bool tensor = false) {
  SsmTiling t{};
  const auto over = [](int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); };
  const int scalar = static_cast<int>(scalar_bytes), width = static_cast<int>(s.width);
  const int scalars = 2 * static_cast<int>(s.states), vector = 16 / scalar;
  t.steps = kSsmChunk;
  while (2 * t.steps * scalars * scalar <= kTileBytes && 2 * t.steps * scalar <= 1024) t.steps *= 2;
  t.pitch = over(scalars, kColumns) * kColumns + vector;  // a step's states are not in the banks of the step before
  t.row_groups = t.steps / rows_a_thread(scalar);
  t.column_groups = kThreads / t.row_groups;
  t.tiles = (s.length + t.steps - 1) / t.steps;
  t.look_back = s.batch < kManyChains && t.tiles > 2;
  t.run = t.rows = 1;
  const auto find_runs = [&] { return t.runs = (t.tiles + t.run - 1) / t.run; };
  // The sums of so many steps are no larger than what these steps read. More of them only where the runs are few.
  const int64_t worthwhile = 4 * s.states;
  const auto too_many = [&](int64_t runs, int64_t length) {
    return pass == Pass::kBackward && runs > (length < worthwhile ? kManyRuns : kMostRuns);
  };
  while (too_many(s.batch * find_runs(), int64_t{t.run} * t.steps) && t.runs > 1) t.run *= 2;
  t.look_back &= t.runs > 1;
  while (!t.look_back && too_many(over(s.batch, t.rows), t.rows * s.length)) t.rows *= 2;
  t.groups = (t.runs + kFan - 1) / kFan;
  t.super_groups = (t.groups + kFan - 1) / kFan;
  t.slots = t.look_back ? s.batch * t.runs : (s.batch + t.rows - 1) / t.rows;

  // A thread's share of a weight matrix: a square, or a part of the 16 by 32 that are a warp's.
  const int height = tensor ? 16 : kColumns, threads = tensor ? kWarp : 1;
  const int across = over(scalars, tensor ? 32 : kColumns), down = over(width, height), squares = kThreads / threads;
  t.splits = across * down <= squares / 4 ? 4 : across * down <= squares / 2 ? 2 : 1;
  const int together = std::min({down, squares / t.splits / across, 1024 / scalar / height});
  t.features = together * height;
  t.cells = together * across * threads;
  t.passes = over(down, together);
  t.slot_cells = int64_t{t.passes} * kColumns * kColumns * t.splits * t.cells;

  const int columns = t.column_groups * kColumns;
  t.pad = tensor ? 8 : vector;                                         // a warp's accesses then fall in many banks
  int staged = kSlice * (t.steps + t.pad + columns + t.pad) * scalar;  // inputs and weights of a projection
  staged = std::max(staged, kThreads * kColumns * 2 * scalar);         // shares of the gradient of skip
  staged = std::max(staged, kFan * static_cast<int>(s.states) * 16);   // what the runs before have published
  t.sum_steps = t.steps;
  while (t.sum_steps * (t.features + t.pad) * scalar > staged && t.sum_steps > 1) t.sum_steps /= 2;

  const auto whole = [](int bytes) { return (bytes + 15) / 16 * 16; };
  t.at_staged = t.steps * t.pitch * scalar;
  t.at_totals = t.at_staged + whole(staged);
  t.at_powers = t.at_totals + whole(t.steps / steps_a_segment(scalar) * scalars * scalar);
  t.at_dskip = t.at_powers + 5 * scalars * 8;
  t.at_flags = t.at_dskip + (pass == Pass::kBackward ? whole(width * 8) : 0);
  t.shared_bytes = t.at_flags + whole(t.steps + 1 + 2 * kFan + 4);
  return t;
}

// In words of 8 bytes; as that of a scan, whose entries are states: every word before the sums is empty while all its
// bits are set.
struct SsmWorkspace {
  int64_t runs, groups, super_groups, run_cuts, group_cuts, sums;  // where each begins
  int64_t slot_scalars;                                            // of one run's sums
  int64_t bytes;
};

inline SsmWorkspace ssm_workspace(const SsmShape& s, const SsmTiling& t, int64_t scalar_bytes, Pass pass) {
  SsmWorkspace w{};
  const int64_t state_words = 2 * s.states;
  if (t.look_back) {
    w.runs = 32;  // the first word is the counter of runs taken
    w.groups = w.runs + s.batch * t.runs * state_words;
    w.super_groups = w.groups + s.batch * t.groups * state_words;
    w.run_cuts = w.super_groups + s.batch * t.super_groups * state_words;
    w.group_cuts = w.run_cuts + s.batch * t.runs;
    w.sums = (w.group_cuts + s.batch * t.groups + 31) / 32 * 32;
  }
  if (pass == Pass::kBackward) w.slot_scalars = 2 * t.slot_cells + s.width + 2 * s.states;
  w.bytes = 8 * w.sums + t.slots * w.slot_scalars * scalar_bytes;
  return w;
}

// What the caller must provide, whether or not the device turns out to have tensor cores.
inline int64_t ssm_workspace_bytes(const SsmShape& s, int64_t scalar_bytes, Pass pass, Projection projection) {
  const auto bytes = [&](bool tensor) {
    return ssm_workspace(s, ssm_tiling(s, scalar_bytes, pass, tensor), scalar_bytes, pass).bytes;
  };
  return std::max(bytes(false), projection == Projection::kPlain ? 0 : bytes(true));
}

}  // namespace s5eqx
