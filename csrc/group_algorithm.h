// How GPU threads compute group_cpu.h's functions: the kernels' bodies, templates over a `Lane` like row_algorithm.h's.
//
// Sums are double (of rewards) or integers (of tokens), added lane by lane in a fixed order: repeatable, and equal to
// the CPU's up to the rounding of a double sum. Indices of active rows come out increasing: their places are counts of
// what comes before, by ballots in a warp, by sums over warps and over sequences.
#pragma once

#include "group_cuda.h"
#include "group_math.h"
#include "row_algorithm.h"

namespace grpo_fast {

constexpr int kGroupThreads = 1024;
constexpr int kTokenThreads = 256;

template <typename Real>
struct AdvantageTask {
  const Real* rewards;  // [N, K]
  int64_t num_completions, num_rewards;
  const double* weights;  // [K] or null
  Groups groups;
  AdvantageScale scale;
  RewardAggregation aggregation;
  Real* advantages;  // [N]

  GRPO_FAST_INLINE int64_t num_groups() const {
    return groups.offsets != nullptr ? groups.num_groups : num_completions / groups.group_size;
  }
  GRPO_FAST_INLINE int64_t offset(int64_t g) const {
    return groups.offsets != nullptr ? groups.offsets[g] : g * groups.group_size;
  }
  GRPO_FAST_INLINE int64_t member(int64_t i) const { return groups.order != nullptr ? groups.order[i] : i; }
};

// -- reductions -------------------------------------------------------------------------------------------------------

template <class Lane, class T, class Fold>
GRPO_FAST_INLINE T warp_folded(Lane& lane, T value, Fold fold) {
  GRPO_FAST_UNROLL
  for (int mask = 1; mask < kWarp; mask *= 2) value = fold(value, lane.shuffle_xor(value, mask));
  return value;
}

// A warp: its lanes take values lane by lane and all know the result.
template <class Lane>
struct WarpTeam {
  Lane& lane;
  GRPO_FAST_INLINE int index() const { return lane.thread() % kWarp; }
  GRPO_FAST_INLINE int size() const { return kWarp; }
  template <class Fold>
  GRPO_FAST_INLINE double folded(double value, double, Fold fold) {
    return warp_folded(lane, value, fold);
  }
};

// A block; `slots` [kWarp] is shared memory.
template <class Lane, class T>
struct BlockTeam {
  Lane& lane;
  T* slots;
  GRPO_FAST_INLINE int index() const { return lane.thread(); }
  GRPO_FAST_INLINE int size() const { return lane.threads(); }
  template <class Fold>
  GRPO_FAST_INLINE T folded(T value, T identity, Fold fold) {
    value = warp_folded(lane, value, fold);
    const int index = lane.thread() % kWarp;
    if (index == 0) slots[lane.thread() / kWarp] = value;
    lane.sync_block();
    value = warp_folded(lane, index < lane.threads() / kWarp ? slots[index] : identity, fold);
    lane.sync_block();  // the slots are free again
    return value;
  }
};

template <class T>
struct Sum {
  GRPO_FAST_INLINE T operator()(T a, T b) const { return a + b; }
};
struct Larger {
  GRPO_FAST_INLINE double operator()(double a, double b) const { return a > b ? a : b; }
};
struct Smaller {
  GRPO_FAST_INLINE double operator()(double a, double b) const { return a < b ? a : b; }
};

// -- advantages -------------------------------------------------------------------------------------------------------

// Of value(i) for begin <= i < end, in every member of the team.
template <typename Real, class Team, class Value>
GRPO_FAST_INLINE Moments<Real> team_moments(Team team, int64_t begin, int64_t end, Value value) {
  double sum = 0, count = 0, high = -HUGE_VAL, low = HUGE_VAL;
  for (int64_t i = begin + team.index(); i < end; i += team.size()) {
    const double here = value(i);
    if (std::isnan(here)) continue;
    sum += here, count += 1;
    high = Larger()(high, here), low = Smaller()(low, here);
  }
  sum = team.folded(sum, 0.0, Sum<double>()), count = team.folded(count, 0.0, Sum<double>());
  high = team.folded(high, -HUGE_VAL, Larger()), low = team.folded(low, HUGE_VAL, Smaller());
  const double mean = mean_of(sum, count, high, low);
  double squares = 0;
  for (int64_t i = begin + team.index(); i < end; i += team.size()) {
    const double here = value(i);
    if (!std::isnan(here)) squares += (here - mean) * (here - mean);
  }
  return moments_of<Real>(mean, team.folded(squares, 0.0, Sum<double>()), count);
}

// Calls `use(g)` in all lanes of a warp for its share of the groups.
template <typename Real, class Lane, class Use>
GRPO_FAST_INLINE void for_groups(const Lane& lane, const AdvantageTask<Real>& task, Use use) {
  const int64_t warps = lane.threads() / kWarp;
  for (int64_t g = lane.thread() / kWarp; g < task.num_groups(); g += warps) use(g);
}

// One block. `slots` [kWarp]: shared memory. Until its last step `advantages` holds the completions' totals.
template <typename Real, class Lane>
GRPO_FAST_INLINE void advantages_block(Lane& lane, const AdvantageTask<Real>& task, double* slots) {
  const int64_t num = task.num_completions, kinds = task.num_rewards;
  Real* totals = task.advantages;
  WarpTeam<Lane> warp{lane};
  BlockTeam<Lane, double> block{lane, slots};
  const auto total = [&](int64_t n) -> double { return totals[n]; };
  if (task.aggregation == RewardAggregation::kNormalizeThenSum) {
    for_groups(lane, task, [&](int64_t g) {
      const int64_t begin = task.offset(g), end = task.offset(g + 1);
      for (int64_t k = 0; k < kinds; ++k) {
        const auto reward = [&](int64_t i) -> double { return task.rewards[task.member(i) * kinds + k]; };
        const Moments<Real> m = team_moments<Real>(warp, begin, end, reward);
        const Real weight = task.weights == nullptr ? Real(1) : static_cast<Real>(task.weights[k]);
        for (int64_t i = begin + warp.index(); i < end; i += kWarp) {
          const int64_t n = task.member(i);
          const Real part = z_score(task.rewards[n * kinds + k], m) * weight, before = k == 0 ? Real(0) : totals[n];
          totals[n] = std::isnan(part) ? before : before + part;
        }
      }
      for (int64_t i = begin + warp.index(); i < end; i += kWarp) {
        const int64_t n = task.member(i);
        bool exists = false;
        for (int64_t k = 0; k < kinds; ++k) exists = exists || !std::isnan(task.rewards[n * kinds + k]);
        if (!exists) totals[n] = Real(NAN);
      }
    });
    lane.sync_block();
    const Moments<Real> all = team_moments<Real>(block, 0, num, total);
    for (int64_t n = lane.thread(); n < num; n += lane.threads()) totals[n] = finite(z_score(totals[n], all));
    return;
  }
  for (int64_t n = lane.thread(); n < num; n += lane.threads()) {
    totals[n] = weighted_sum(task.rewards + n * kinds, task.rewards + n * kinds, kinds, task.weights);
  }
  lane.sync_block();
  Moments<Real> all{};
  if (task.scale == AdvantageScale::kBatch) all = team_moments<Real>(block, 0, num, total);
  for_groups(lane, task, [&](int64_t g) {
    const int64_t begin = task.offset(g), end = task.offset(g + 1);
    const auto member = [&](int64_t i) -> double { return totals[task.member(i)]; };
    const Moments<Real> m = team_moments<Real>(warp, begin, end, member);  // its last shuffle follows every read
    for (int64_t i = begin + warp.index(); i < end; i += kWarp) {
      const int64_t n = task.member(i);
      totals[n] = finite(scaled_advantage(totals[n], m, all, task.scale));
    }
  });
}

// -- tokens -----------------------------------------------------------------------------------------------------------

struct TokenTask {
  TokenBatch<float> batch;
  TokenAggregation aggregation;
  Scalar normalizer;  // NaN: none
  bool every_row;
  TokenRows<float> rows;
  int64_t* num_active;  // [1]
  int64_t* counts;      // [2, S] unmasked tokens, active rows of each sequence

  GRPO_FAST_INLINE bool is_active(int64_t s, int64_t t) const {
    return carries_loss(batch, t) && (every_row || has_gradient(batch, s, t));
  }
};

// One block a sequence. `slots` [kWarp]: shared memory.
template <class Lane>
GRPO_FAST_INLINE void count_sequence(Lane& lane, const TokenTask& task, int64_t* slots) {
  const int64_t s = lane.block(), end = task.batch.cu_seqlens[s + 1];
  int64_t unmasked = 0, active = 0;
  for (int64_t t = task.batch.cu_seqlens[s] + lane.thread(); t < end; t += lane.threads()) {
    unmasked += carries_loss(task.batch, t);
    active += task.is_active(s, t);
  }
  BlockTeam<Lane, int64_t> block{lane, slots};
  unmasked = block.folded(unmasked, 0, Sum<int64_t>());
  active = block.folded(active, 0, Sum<int64_t>());
  if (lane.thread() == 0) task.counts[s] = unmasked, task.counts[task.batch.num_sequences + s] = active;
}

// One block a sequence, after all are counted. `slots` [kWarp] and `places` [2][kWarp]: shared memory.
template <class Lane>
GRPO_FAST_INLINE void write_sequence(Lane& lane, const TokenTask& task, int64_t* slots, int* places) {
  const TokenBatch<float>& batch = task.batch;
  const int64_t s = lane.block(), num = batch.num_sequences;
  int64_t unmasked = 0, before = 0;
  for (int64_t i = lane.thread(); i < num; i += lane.threads()) {
    unmasked += task.counts[i];
    before += i < s ? task.counts[num + i] : 0;
  }
  BlockTeam<Lane, int64_t> block{lane, slots};
  unmasked = block.folded(unmasked, 0, Sum<int64_t>());
  int64_t row = block.folded(before, 0, Sum<int64_t>());
  if (s == num - 1 && lane.thread() == 0) *task.num_active = row + task.counts[num + s];
  const float weight = token_weight(task.aggregation, task.normalizer.value(), unmasked, num, task.counts[s]);
  const int64_t begin = batch.cu_seqlens[s], end = batch.cu_seqlens[s + 1];
  const int warp = lane.thread() / kWarp, warps = lane.threads() / kWarp;
  for (int64_t tile = begin, turn = 0; tile < end; tile += lane.threads(), turn = 1 - turn) {
    const int64_t t = tile + lane.thread();
    const bool inside = t < end, carries = inside && carries_loss(batch, t), active = inside && task.is_active(s, t);
    if (inside) {
      task.rows.weights[t] = carries ? weight : 0.0f;
      task.rows.advantages[t] = carries ? batch.advantages[batch.advantages_per_token ? t : s] : 0.0f;
      task.rows.active[t] = active;
    }
    const uint32_t votes = lane.ballot(active);
    int* counts = places + turn * kWarp;  // the other half is still being read
    if (lane.thread() % kWarp == 0) counts[warp] = lane.count_bits(votes);
    lane.sync_block();
    int lower = 0, all = 0;
    for (int w = 0; w < warps; ++w) {
      lower += w < warp ? counts[w] : 0;
      all += counts[w];
    }
    const uint32_t lower_lanes = (1u << lane.thread() % kWarp) - 1;
    if (active) task.rows.rows[row + lower + lane.count_bits(votes & lower_lanes)] = t;
    row += all;
  }
}

}  // namespace grpo_fast
