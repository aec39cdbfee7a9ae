// How a (B, L, P) scan is cut into tiles on a GPU, and what workspace the tiles talk through. It follows from the shape
// alone, hence so do the bits of the result.
//
// A tile is some channels by some steps: `lanes` threads side by side take `vector` channels each, and the rest of the
// block's threads stand one below the other in time, each with a few consecutive steps. A chain is all tiles of one
// batch row and one set of channels. With many chains a block takes a whole chain and carries the state along; with
// few, blocks take single tiles and look back at what the tiles before them have published.
#pragma once

#include <algorithm>
#include <cstdint>

#include "scan.h"

namespace s5eqx {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kLanes = 8;              // at most: 8 accesses of 16 bytes are one line
constexpr int kFan = 16;               // tiles to a group, and groups to a super-group
constexpr int64_t kManyChains = 1056;  // as many keep a large GPU busy to the end, one block a chain
constexpr int64_t kFewTiles = 4;       // as few are sooner done one after the other

enum class Pass { kForward, kBackward };

// Consecutive steps of one thread: what fits the registers with two or three operands.
constexpr int steps_a_thread(bool time_varying, Pass pass) { return time_varying && pass == Pass::kBackward ? 4 : 8; }

struct Tiling {
  int vector;             // channels a thread
  int lanes;              // threads side by side, a power of two
  int channels;           // of a tile
  int64_t channel_tiles;  // across the states
  int64_t chains;         // batch rows x channel tiles
  int64_t steps;          // of a tile
  int64_t tiles;          // of a chain
  bool look_back;

  // The kernels count chains, tiles and channels in 32 bits.
  bool is_countable(int64_t states) const {
    constexpr int64_t kMost = int64_t{1} << 30;
    return chains < kMost && states < kMost && tiles < kMost && (!look_back || chains * tiles < kMost);
  }
  int64_t groups() const { return (tiles + kFan - 1) / kFan; }
  int64_t super_groups() const { return (groups() + kFan - 1) / kFan; }
};

// `aligned`: every operand starts on 16 bytes. Where one does not, threads take single channels, in the same tiles of
// time, so that the bits stay.
inline Tiling tile(int64_t batch, int64_t length, int64_t states, int64_t element_bytes, bool time_varying, Pass pass,
                   bool aligned) {
  Tiling t{};
  const int64_t full = std::max<int64_t>(1, 16 / element_bytes), vector = states % full == 0 ? full : 1;
  t.lanes = 1;
  while (t.lanes < kLanes && t.lanes * vector < states) t.lanes *= 2;
  t.steps = kThreads / t.lanes * steps_a_thread(time_varying, pass);
  t.tiles = (length + t.steps - 1) / t.steps;
  const auto cut = [&](int64_t v) {
    t.vector = static_cast<int>(v);
    t.channels = t.lanes * t.vector;
    t.channel_tiles = (states + t.channels - 1) / t.channels;
    t.chains = batch * t.channel_tiles;
  };
  cut(vector);
  t.look_back = t.chains < kManyChains && t.tiles > kFewTiles;
  if (!aligned) cut(1);
  return t;
}

// The workspace, in words of 8 bytes. Everything before the partial sums is a slot that is empty while all its bits are
// set; words of one channel lie `channels` apart, so that neighbours read neighbours.
struct Workspace {
  int64_t state_words;  // a state in double precision: 1 word if real, 2 if complex
  int64_t entry_words;  // of a tile or a group: the state it ends in from zero and, time-varying, its multiplier
  int64_t tiles, groups, super_groups, tile_cuts, group_cuts, partials;  // where each begins
  int64_t words;

  int64_t slot_bytes() const { return 8 * partials; }
  int64_t bytes() const { return 8 * words; }
};

inline Workspace workspace(const Tiling& t, bool is_complex, bool time_varying, Pass pass) {
  Workspace w{};
  if (!t.look_back) return w;
  w.state_words = (is_complex ? 2 : 1) * t.channels;
  w.entry_words = w.state_words * (time_varying ? 2 : 1);
  w.tiles = 32;  // the first word is the counter of tiles taken
  w.groups = w.tiles + t.chains * t.tiles * w.entry_words;
  w.super_groups = w.groups + t.chains * t.groups() * w.entry_words;
  w.tile_cuts = w.super_groups + t.chains * t.super_groups() * w.state_words;
  w.group_cuts = w.tile_cuts + t.chains * t.tiles;
  w.partials = (w.group_cuts + t.chains * t.groups() + 31) / 32 * 32;
  const bool sums = pass == Pass::kBackward && !time_varying;
  w.words = w.partials + (sums ? t.chains * t.tiles * w.state_words : 0);
  return w;
}

// What the caller must provide, whatever the alignment of its operands turns out to be.
inline int64_t workspace_bytes(int64_t batch, int64_t length, int64_t states, int64_t scalar_bytes, bool is_complex,
                               bool time_varying, Pass pass) {
  int64_t bytes = 0;
  for (const bool aligned : {true, false}) {
    const Tiling t = tile(batch, length, states, scalar_bytes * (is_complex ? 2 : 1), time_varying, pass, aligned);
    bytes = std::max(bytes, workspace(t, is_complex, time_varying, pass).bytes());
  }
  return bytes;
}

}  // namespace s5eqx
