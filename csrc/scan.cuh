// The scan on a GPU, in one pass over memory.
//
// Each thread holds K consecutive steps of its channels in registers. A tile's threads fold them to where they end from
// zero, pass that on through the warp and through shared memory, and once the state that enters the tile is known run
// the plain recurrence over the registers again. So the innermost arithmetic is the reference's own; only states
// travel, and between warps and tiles they travel in double precision, as do the powers of a. Squared in single
// precision a^256 would be wrong by 256 rounding errors, all in one direction.
//
// The state that enters a tile (`look_back`) is folded from what the tiles before have published, in one fixed order:
// the state after the last full super-group of 256 tiles, then up to 15 groups of 16 tiles, then up to 15 tiles. Tiles
// are taken from one counter, time first, so whoever waits, waits for a tile that is already running.
//
// The backward pass is the same scan in the other direction, of g, with the multipliers one step later:
// lambda[t] = g[t] + a[t+1] lambda[t+1]; and da[t] = lambda[t] x[t-1].
#pragma once

#include "gpu_scan.h"
#include "number.h"
#include "scan_tiles.h"

namespace s5eqx {

constexpr uint64_t kEmpty = ~uint64_t{0};

template <typename E>
struct Problem {
  int64_t length, states;
  int channel_tiles, chains, tiles, lanes, lane_bits;  // 1 << lane_bits lanes
  int64_t first_time, time_step;                       // step i of the scan is at time first_time + i time_step
  int64_t a_batch, a_time, reset_batch;
  bool conjugate;
  const E *a, *values, *x0;  // values: b, or g in the backward pass, where x0 belongs to `states_before`
  const uint8_t* reset;      // null: no resets
  E* result;                 // x, or lambda; null: only the last state is wanted
  E* last;                   // null: not wanted
  const E* states_before;    // backward: x
  E *da, *dx0;
  uint64_t *next_tile, *tile_slots, *group_slots, *super_slots, *tile_cuts, *group_cuts;  // null: a block a chain
  int64_t state_words, entry_words;
  Wide<E>* partials;
};

template <typename E, int V>
struct alignas(sizeof(E) * V) Vector {
  E at[V];
};

template <typename E, int V, bool kVarying>
struct Shared {
  static constexpr int kChannels = kLanes * V, kProducts = kVarying ? kChannels : 1;
  int next_tile;
  Wide<E> carry[kChannels], da[kChannels];  // of a chain that one block takes
  E row_power[kWarp * V];                   // [r][channel]: a^(K r), over r rows of threads
  Wide<E> warp_power[kChannels], tile_power[kChannels], group_power[kChannels];
  E total[kWarps][kChannels], product[kWarps][kProducts];  // of a warp: where it ends from zero, its multiplier
  bool cut[kWarps];                                        // whether a reset keeps the entering state from the end
  E enter[kWarps][kChannels], sum[kWarps][kChannels];
  Wide<E> seen[2][kFan][kChannels], seen_product[2][kFan][kProducts];  // the tiles and the groups before
  bool seen_cut[2][kFan];
};

__device__ inline void put(uint64_t* word, double x) {
  const uint64_t bits = bits_of(x);
  store_relaxed(word, bits == kEmpty ? uint64_t{0x7ff8000000000000} : bits);  // a NaN for a NaN
}
__device__ inline void publish(uint64_t* words, int, double x) { put(words, x); }
__device__ inline void publish(uint64_t* words, int channels, Complex<double> x) {
  put(words, x.re);
  put(words + channels, x.im);
}

__device__ inline uint64_t wait(const uint64_t* word) {
  uint64_t bits;
  while ((bits = load_relaxed(word)) == kEmpty) pause();
  return bits;
}
__device__ inline void receive(const uint64_t* words, int, double& x) { x = double_of(wait(words)); }
__device__ inline void receive(const uint64_t* words, int channels, Complex<double>& x) {
  uint64_t re, im;  // both are on their way before either is looked at
  do {
    re = load_relaxed(words);
    im = load_relaxed(words + channels);
    if (re != kEmpty && im != kEmpty) break;
    pause();
  } while (true);
  x = {double_of(re), double_of(im)};
}

// Many steps as one: x -> cut ? state : product x + state.
template <typename W>
struct Segment {
  W product, state;
  bool cut;

  __device__ W after(W x) const { return cut ? state : advance(product, x, state); }
  __device__ Segment then(const Segment& next) const {
    return {multiply(next.product, product), next.after(state), cut || next.cut};
  }
};

template <typename E, int V, bool kVarying, Pass kPass>
struct TileScan {
  static constexpr int K = steps_a_thread(kVarying, kPass);
  static constexpr bool kBackward = kPass == Pass::kBackward, kSums = kBackward && !kVarying;
  using W = Wide<E>;
  using Row = Vector<E, V>;

  const Problem<E>& p;
  Shared<E, V, kVarying>& sh;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int lane = thread & (p.lanes - 1), row = thread >> p.lane_bits;  // of the tile
  const int rows = kWarp >> p.lane_bits, warp_row = row & (rows - 1);    // of the warp
  const int channels = p.lanes * V;
  const int steps = (kThreads >> p.lane_bits) * K;
  const bool is_keeper = thread < channels;  // one thread a channel keeps what is between warps and tiles
  int64_t powers_of = -1;                    // where in `a` the powers in shared memory come from
  int chain = 0, batch = 0, first_channel = 0, tile = 0;

  __device__ TileScan(const Problem<E>& problem, Shared<E, V, kVarying>& shared) : p(problem), sh(shared) {}

  __device__ bool looks_back() const { return p.next_tile != nullptr; }
  __device__ bool takes_tiles() const { return looks_back() && thread == kThreads - 1; }
  __device__ int take_tile() const { return static_cast<int>(fetch_add(p.next_tile, 1) + 1); }  // it starts at -1

  __device__ void choose(int which_chain, int which_tile) {
    chain = which_chain;
    batch = chain / p.channel_tiles;
    first_channel = (chain - batch * p.channel_tiles) * channels;
    tile = which_tile;
  }

  __device__ int64_t time(int64_t step) const { return p.first_time + step * p.time_step; }
  __device__ bool flag(int64_t step) const { return p.reset[batch * p.reset_batch + time(step)] != 0; }

  __device__ W start() const {
    const int channel = first_channel + thread;
    return kBackward || channel >= p.states ? number<W>(0) : widen(p.x0[batch * p.states + channel]);
  }

  // The multipliers over a row of threads, a warp, a tile and a group, for a time-invariant a.
  __device__ void find_powers() {
    const int64_t from = batch * p.a_batch + first_channel;
    if (from == powers_of) return;
    powers_of = from;
    if (is_keeper) {
      const bool exists = first_channel + thread < p.states;
      W power = exists ? conjugate_if(p.conjugate, widen(p.a[from + thread])) : number<W>(0);
#pragma unroll 1
      for (int n = 1; n < K; n *= 2) power = multiply(power, power);
      W over_rows = number<W>(1);
#pragma unroll 1
      for (int r = 0; r < rows; ++r) {
        sh.row_power[r * channels + thread] = narrow<E>(over_rows);
        over_rows = multiply(over_rows, power);
      }
      sh.warp_power[thread] = power = over_rows;
#pragma unroll 1
      for (int n = 1; n < kWarps; n *= 2) power = multiply(power, power);
      sh.tile_power[thread] = power;
#pragma unroll 1
      for (int n = 1; n < kFan; n *= 2) power = multiply(power, power);
      sh.group_power[thread] = power;
    }
    __syncthreads();
  }

  __device__ Segment<W> of_warp(int w) const {
    const W product = kVarying ? widen(sh.product[w][thread]) : sh.warp_power[thread];
    return {product, widen(sh.total[w][thread]), sh.cut[w]};
  }
  __device__ Segment<W> seen(int level, int j) const {
    const W product = kVarying ? sh.seen_product[level][j][thread] : (level ? sh.group_power : sh.tile_power)[thread];
    return {product, sh.seen[level][j][thread], sh.seen_cut[level][j]};
  }

  __device__ void publish_entry(uint64_t* slots, uint64_t* cuts, int64_t which, const Segment<W>& s) const {
    uint64_t* const words = slots + which * p.entry_words + thread;
    publish(words, channels, s.state);
    if constexpr (kVarying) publish(words + p.state_words, channels, s.product);
    if (p.reset && thread == 0) store_relaxed(cuts + which, s.cut);
  }

  // All threads fetch `count` entries at once and wait for each.
  __device__ void fetch(int level, const uint64_t* slots, const uint64_t* cuts, int64_t first, int count) {
    for (int at = thread; at < count * channels; at += kThreads) {
      const int j = at / channels, channel = at % channels;
      const uint64_t* const words = slots + (first + j) * p.entry_words + channel;
      receive(words, channels, sh.seen[level][j][channel]);
      if constexpr (kVarying) receive(words + p.state_words, channels, sh.seen_product[level][j][channel]);
      if (channel == 0) sh.seen_cut[level][j] = p.reset && wait(cuts + first + j) != 0;
    }
  }

  // Finds the state that enters this tile, given where the tile itself ends from zero.
  __device__ void look_back(const Segment<W>& own) {
    const int super = tile / (kFan * kFan), group = tile / kFan;
    const int before = tile % kFan, groups_before = group % kFan;
    const int64_t groups = (p.tiles + kFan - 1) / kFan, first = chain * int64_t{p.tiles};
    if (is_keeper) publish_entry(p.tile_slots, p.tile_cuts, first + tile, own);
    const bool ends_group = before == kFan - 1;
    if (!ends_group && !needs_carry()) return;

    // A group's last tile publishes the group before it waits for others: else every group would wait for the one
    // before.
    const int64_t first_group = chain * groups + group - groups_before;
    fetch(0, p.tile_slots, p.tile_cuts, first + tile - before, before);
    if (!ends_group) fetch(1, p.group_slots, p.group_cuts, first_group, groups_before);
    __syncthreads();
    Segment<W> in_group{number<W>(1), number<W>(0), false};
    if (is_keeper) {
      for (int j = 0; j < before; ++j) in_group = in_group.then(seen(0, j));
      if (ends_group) publish_entry(p.group_slots, p.group_cuts, chain * groups + group, in_group.then(own));
    }
    if (!needs_carry()) return;
    if (ends_group) {
      fetch(1, p.group_slots, p.group_cuts, first_group, groups_before);
      __syncthreads();
    }
    if (!is_keeper) return;
    W state = start();
    if (super > 0) receive(super_slot(super - 1), channels, state);
    for (int j = 0; j < groups_before; ++j) state = seen(1, j).after(state);
    sh.carry[thread] = in_group.after(state);
  }

  __device__ uint64_t* super_slot(int super) const {
    const int64_t supers = (p.tiles + kFan * kFan - 1) / (kFan * kFan);
    return p.super_slots + (chain * supers + super) * p.state_words + thread;
  }
  __device__ bool ends_super_group() const { return tile % (kFan * kFan) == kFan * kFan - 1; }
  __device__ bool is_last() const { return tile + 1 == p.tiles; }
  // With the last state alone wanted, most tiles are done when they have published where they end.
  __device__ bool needs_carry() const { return p.result || is_last() || ends_super_group() || !looks_back(); }

  __device__ void scan() {
    const int channel = first_channel + lane * V;
    const int64_t step = int64_t{tile} * steps + row * K;
    const int64_t left = p.length - step;
    const int in_time = left < 0 ? 0 : left < K ? static_cast<int>(left) : K, count = channel < p.states ? in_time : 0;
    const int64_t stride = p.time_step * p.states, at = (batch * p.length + time(step)) * p.states + channel;

    Row v[K], x_before[kBackward ? K : 1], m[kVarying ? K : 1];
    uint32_t cuts = 0, drops = 0;  // bit k: step k starts anew; no gradient leaves it
    const Row zero{};
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = k < count ? load(p.values + at + k * stride) : zero;
    if constexpr (kVarying) {
      const int64_t a_at = batch * p.a_batch + (time(step) - (kBackward ? p.time_step : 0)) * p.a_time + channel;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const bool exists = k < count && (!kBackward || step + k > 0);
        m[k] = exists ? load(p.a + a_at + k * p.time_step * p.a_time) : zero;
        for (int u = 0; u < V; ++u) m[k].at[u] = conjugate_if(p.conjugate, m[k].at[u]);
      }
    } else {
      m[0] = count > 0 ? load(p.a + batch * p.a_batch + channel) : zero;
      for (int u = 0; u < V; ++u) m[0].at[u] = conjugate_if(p.conjugate, m[0].at[u]);
    }
    if constexpr (kBackward) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const bool in_x = step + k + 1 < p.length;
        const E* const from = in_x ? p.states_before + at + (k + 1) * stride : p.x0 + batch * p.states + channel;
        x_before[k] = k < count ? load(from) : zero;
      }
    }
    if (p.reset) {
#pragma unroll 1
      for (int k = 0; k < in_time; ++k) {
        if constexpr (kBackward) {
          drops |= static_cast<uint32_t>(flag(step + k)) << k;
          cuts |= static_cast<uint32_t>(step + k > 0 && flag(step + k - 1)) << k;
        } else {
          cuts |= static_cast<uint32_t>(flag(step + k)) << k;
        }
      }
    }
    if (kBackward && step == 0) cuts |= 1;  // nothing comes from after the end
    int next_tile = 0;                      // asked for here, its way there and back hides behind the loads
    if (takes_tiles()) next_tile = take_tile();
    const auto multiplier = [&](int k, int u) { return m[kVarying ? k : 0].at[u]; };

    if constexpr (!kVarying) find_powers();

    // Where these steps end from zero, and, row after row of the warp, where all rows up to this one end.
    Row end = zero, product = zero;
#pragma unroll
    for (int u = 0; u < V; ++u) {
      product.at[u] = number<E>(1);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const E next = multiply_add(multiplier(k, u), end.at[u], v[k].at[u]);
        end.at[u] = cuts >> k & 1 ? v[k].at[u] : next;
        if constexpr (kVarying) product.at[u] = multiply(multiplier(k, u), product.at[u]);
      }
    }
    const uint32_t cut_lanes = ballot(cuts != 0);
    const auto cut_rows = [&](int first, int last) {  // whether there is a cut in these rows of the warp
      const int from = first * p.lanes, to = (last + 1) * p.lanes;
      return (cut_lanes & (to < kWarp ? (1u << to) - 1 : ~0u)) >> from != 0;
    };
    for (int d = 1; d < rows; d *= 2) {
      const bool joins = warp_row >= d, cut = joins && cut_rows(warp_row - d + 1, warp_row);
#pragma unroll
      for (int u = 0; u < V; ++u) {
        const E before = shuffle_up_number(end.at[u], d * p.lanes);
        const E own = kVarying ? product.at[u] : sh.row_power[d * channels + lane * V + u];
        if (joins && !cut) end.at[u] = advance(own, before, end.at[u]);
        if constexpr (kVarying) {
          const E product_before = shuffle_up_number(product.at[u], d * p.lanes);
          if (joins) product.at[u] = multiply(own, product_before);
        }
      }
    }
    if (warp_row == rows - 1) {
#pragma unroll
      for (int u = 0; u < V; ++u) {
        sh.total[warp][lane * V + u] = end.at[u];
        if constexpr (kVarying) sh.product[warp][lane * V + u] = product.at[u];
      }
      sh.cut[warp] = cut_lanes != 0;
    }
    // Where the rows before this one end.
    const bool cut_before = warp_row > 0 && cut_rows(0, warp_row - 1);
#pragma unroll
    for (int u = 0; u < V; ++u) {
      end.at[u] = shuffle_up_number(end.at[u], p.lanes);
      if (warp_row == 0) end.at[u] = number<E>(0);
      if constexpr (kVarying) product.at[u] = shuffle_up_number(product.at[u], p.lanes);
    }
    __syncthreads();
    if (takes_tiles()) sh.next_tile = next_tile;  // all have read the last one

    if (looks_back()) {
      Segment<W> own{number<W>(1), number<W>(0), false};
      if (is_keeper)
#pragma unroll 1
        for (int w = 0; w < kWarps; ++w) own = own.then(of_warp(w));
      look_back(own);
      if (!needs_carry()) return;
    }
    if (is_keeper) {
      W carry = looks_back() || tile > 0 ? sh.carry[thread] : start();
#pragma unroll 1
      for (int w = 0; w < kWarps; ++w) {
        sh.enter[w][thread] = narrow<E>(carry);
        carry = of_warp(w).after(carry);
      }
      if (looks_back() && ends_super_group()) publish(super_slot(tile / (kFan * kFan)), channels, carry);
      sh.carry[thread] = carry;
    }
    __syncthreads();
    if (!p.result && !is_last()) return;

    // The recurrence itself.
    Row x, sum = zero;
#pragma unroll
    for (int u = 0; u < V; ++u) {
      const E enter = sh.enter[warp][lane * V + u];
      const E through = kVarying ? product.at[u] : sh.row_power[warp_row * channels + lane * V + u];
      x.at[u] = warp_row == 0 ? enter : cut_before ? end.at[u] : advance(through, enter, end.at[u]);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      Row da = zero;
#pragma unroll
      for (int u = 0; u < V; ++u) {
        const E next = multiply_add(multiplier(k, u), x.at[u], v[k].at[u]);
        x.at[u] = cuts >> k & 1 ? v[k].at[u] : next;
        if constexpr (kBackward) {
          const E before = conjugate_if(p.conjugate, x_before[k].at[u]);
          if (k < count && !(drops >> k & 1)) {
            if constexpr (kSums)
              sum.at[u] = multiply_add(before, x.at[u], sum.at[u]);
            else
              da.at[u] = multiply(before, x.at[u]);
          }
        }
      }
      if (k >= count) continue;
      if (p.result) store(p.result + at + k * stride, x);
      if constexpr (kBackward && kVarying) store(p.da + at + k * stride, da);
      end = x;
    }
    if (count > 0 && step + count == p.length) {
      if (p.last) store(p.last + batch * p.states + channel, end);
      if constexpr (kBackward) store_first(channel, time(p.length - 1), drops >> (count - 1) & 1, end);
    }
    if constexpr (kSums) add_up(sum);
  }

  // The cotangent of x0: a at the first time of the recurrence, times lambda there.
  __device__ void store_first(int channel, int64_t t, bool dropped, const Row& lambda) {
    const Row a = load(p.a + batch * p.a_batch + t * p.a_time + channel);
    Row dx0{};
#pragma unroll
    for (int u = 0; u < V; ++u)
      if (!dropped) dx0.at[u] = multiply(conjugate_if(p.conjugate, a.at[u]), lambda.at[u]);
    store(p.dx0 + batch * p.states + channel, dx0);
  }

  // The cotangent of a time-invariant a, over the tile: through the warp, then warp after warp in double.
  __device__ void add_up(Row sum) {
#pragma unroll
    for (int u = 0; u < V; ++u) {
      for (int d = rows / 2; d > 0; d /= 2) {
        const E below = shuffle_down_number(sum.at[u], d * p.lanes);
        sum.at[u] = add(sum.at[u], below);
      }
      if (warp_row == 0) sh.sum[warp][lane * V + u] = sum.at[u];
    }
    __syncthreads();
    if (!is_keeper) return;
    W total = number<W>(0);
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) total = add(total, widen(sh.sum[w][thread]));
    if (looks_back()) {
      p.partials[(chain * int64_t{p.tiles} + tile) * channels + thread] = total;
      return;
    }
    if (tile > 0) total = add(sh.da[thread], total);
    sh.da[thread] = total;
    if (is_last() && first_channel + thread < p.states)
      p.da[batch * p.states + first_channel + thread] = narrow<E>(total);
  }

  __device__ static Row load(const E* from) { return *reinterpret_cast<const Row*>(from); }
  __device__ static void store(E* to, const Row& x) { *reinterpret_cast<Row*>(to) = x; }
};

constexpr int blocks_a_multiprocessor(bool time_varying, Pass pass) {
  return time_varying || pass == Pass::kBackward ? 2 : 3;
}

template <typename E, int V, bool kVarying, Pass kPass>
__global__ void __launch_bounds__(kThreads, blocks_a_multiprocessor(kVarying, kPass)) scan_kernel(Problem<E> p) {
  using Memory = Shared<E, V, kVarying>;
  S5EQX_SHARED(Memory, sh);
  TileScan<E, V, kVarying, kPass> work(p, sh);
  int chain = static_cast<int>(blockIdx.x), tile = 0;
  if (work.looks_back()) {
    if (work.takes_tiles()) sh.next_tile = work.take_tile();
    __syncthreads();
  }
  for (;;) {
    if (work.looks_back()) {
      tile = sh.next_tile / p.chains;
      chain = sh.next_tile - tile * p.chains;
      if (tile >= p.tiles) return;
    } else if (chain >= p.chains) {
      return;
    }
    work.choose(chain, tile);
    work.scan();
    __syncthreads();
    if (!work.looks_back() && ++tile == p.tiles) {
      tile = 0;
      chain += static_cast<int>(gridDim.x);
    }
  }
}

// The tiles' shares of the cotangent of a, added up in an order that follows from the number of tiles alone: a block a
// batch row and state.
template <typename E>
struct Sums {
  const Wide<E>* partials;
  E* da;
  int tiles, states, channel_tiles, channels;
};

template <typename E>
__global__ void __launch_bounds__(kThreads) sum_kernel(Sums<E> p) {
  struct Memory {
    Wide<E> sum[kThreads];
  };
  S5EQX_SHARED(Memory, sh);
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int batch = block / p.states, state = block - batch * p.states;
  const int channel_tile = state / p.channels, channel = state - channel_tile * p.channels;
  const Wide<E>* const from =
      p.partials + (batch * p.channel_tiles + channel_tile) * int64_t{p.tiles} * p.channels + channel;
  Wide<E> sum = number<Wide<E>>(0);
#pragma unroll 4
  for (int tile = thread; tile < p.tiles; tile += kThreads) sum = add(sum, from[int64_t{tile} * p.channels]);
  sh.sum[thread] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) sh.sum[thread] = add(sh.sum[thread], sh.sum[thread + half]);
    __syncthreads();
  }
  if (thread == 0) p.da[block] = narrow<E>(sh.sum[0]);
}

// On the host.

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <typename E, Pass kPass>
Status launch_scan(const ScanShape& s, Problem<E> p, bool aligned, void* memory, int64_t blocks, Stream stream) {
  const bool time_varying = s.a_time != 0;
  const Tiling t = tile(s.batch, s.length, p.states, sizeof(E), time_varying, kPass, aligned);
  p.channel_tiles = static_cast<int>(t.channel_tiles);
  p.chains = static_cast<int>(t.chains);
  p.tiles = static_cast<int>(t.tiles);
  p.lanes = t.lanes;
  while (1 << p.lane_bits < t.lanes) ++p.lane_bits;
  const Workspace w = workspace(t, s.is_complex, time_varying, kPass);
  int64_t at_most = t.chains;
  if (t.look_back) {
    uint64_t* const words = static_cast<uint64_t*>(memory);
    p.next_tile = words;
    p.tile_slots = words + w.tiles;
    p.group_slots = words + w.groups;
    p.super_slots = words + w.super_groups;
    p.tile_cuts = words + w.tile_cuts;
    p.group_cuts = words + w.group_cuts;
    p.state_words = w.state_words;
    p.entry_words = w.entry_words;
    p.partials = reinterpret_cast<Wide<E>*>(words + w.partials);
    const Status status = fill_ones(memory, w.slot_bytes(), stream);
    if (status != Status{}) return status;
    at_most *= t.tiles;
  }
  if (blocks == 0) blocks = int64_t{multiprocessors()} * blocks_a_multiprocessor(time_varying, kPass);
  blocks = std::min(blocks, at_most);
  constexpr int kWide = sizeof(E) >= 16 ? 1 : 16 / sizeof(E);
  const auto run = [&](auto* kernel) { return launch(kernel, blocks, kThreads, stream, p); };
  Status status;
  if (t.vector == 1)
    status = time_varying ? run(scan_kernel<E, 1, true, kPass>) : run(scan_kernel<E, 1, false, kPass>);
  else
    status = time_varying ? run(scan_kernel<E, kWide, true, kPass>) : run(scan_kernel<E, kWide, false, kPass>);
  if (status != Status{} || !t.look_back || kPass == Pass::kForward || time_varying) return status;
  return launch(sum_kernel<E>, t.chains / t.channel_tiles * p.states, kThreads, stream,
                Sums<E>{p.partials, p.da, p.tiles, static_cast<int>(p.states), p.channel_tiles, t.channels});
}

template <typename E>
Problem<E> problem(const ScanShape& s, bool descending) {
  Problem<E> p{};
  const int64_t scalars = s.is_complex ? 2 : 1;
  p.length = s.length;
  p.states = s.width / scalars;
  p.first_time = descending ? s.length - 1 : 0;
  p.time_step = descending ? -1 : 1;
  p.a_batch = s.a_batch / scalars;
  p.a_time = s.a_time / scalars;
  p.reset_batch = s.reset_batch;
  return p;
}

template <typename E>
const E* as(const void* p) {
  return static_cast<const E*>(p);
}

template <typename E>
Status scan_forward_on_gpu(const ScanShape& s, const ForwardArrays<void>& k, void* memory, int64_t blocks,
                           Stream stream) {
  Problem<E> p = problem<E>(s, s.reverse);
  p.a = as<E>(k.a);
  p.values = as<E>(k.b);
  p.x0 = as<E>(k.x0);
  p.reset = k.reset;
  p.result = static_cast<E*>(k.x);
  p.last = static_cast<E*>(k.last);
  bool aligned = true;
  for (const void* q : {k.a, k.b, k.x0, static_cast<const void*>(k.x), static_cast<const void*>(k.last)})
    aligned &= is_aligned(q, 16);
  return launch_scan<E, Pass::kForward>(s, p, aligned, memory, blocks, stream);
}

template <typename E>
Status scan_backward_on_gpu(const ScanShape& s, const BackwardArrays<void>& k, void* memory, int64_t blocks,
                            Stream stream) {
  Problem<E> p = problem<E>(s, !s.reverse);
  p.conjugate = k.conjugate;
  p.a = as<E>(k.a);
  p.values = as<E>(k.g);
  p.x0 = as<E>(k.x0);
  p.reset = k.reset;
  p.result = static_cast<E*>(k.lambda);
  p.states_before = as<E>(k.x);
  p.da = static_cast<E*>(k.da);
  p.dx0 = static_cast<E*>(k.dx0);
  bool aligned = true;
  for (const void* q : {k.a, k.x, k.x0, k.g, static_cast<const void*>(k.lambda), static_cast<const void*>(k.da),
                        static_cast<const void*>(k.dx0)})
    aligned &= is_aligned(q, 16);
  return launch_scan<E, Pass::kBackward>(s, p, aligned, memory, blocks, stream);
}

#define S5EQX_INSTANTIATE(E)                                                                                    \
  template Status scan_forward_on_gpu<E>(const ScanShape&, const ForwardArrays<void>&, void*, int64_t, Stream); \
  template Status scan_backward_on_gpu<E>(const ScanShape&, const BackwardArrays<void>&, void*, int64_t, Stream);

}  // namespace s5eqx
