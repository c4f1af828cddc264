// The GPU's row kernels in the emulator, against plain double loops: row_algorithm.h and row_cluster.h as they are
// compiled for GPUs, at real vocabularies and at small ones where every tail, split and alignment occurs.

#include <array>
#include <functional>
#include <stdexcept>
#include <vector>

#include "emulated_rows.h"
#include "row_cases.h"

namespace {

using namespace testing;
using grpo_fast::ClusterSplit;
using grpo_fast::DxOut;

constexpr int kHopper = 232448;  // bytes of shared memory a block may have on sm_90 and sm_100
constexpr int kConsumer = 101376;
constexpr int kStreaming = 0;  // a device without clusters
#if defined(__SANITIZE_ADDRESS__)  // where switching fibers is slow
constexpr int64_t kVocabularies[] = {1, 7, 1000, 32000};
constexpr int64_t kSmall[] = {1, 7, 130, 1027};
#else
constexpr int64_t kVocabularies[] = {1, 7, 1000, 32000, 50257, 128256, 151669, 151936, 256000};
constexpr int64_t kSmall[] = {1, 3, 4, 7, 130, 1000, 1027, 2500};
#endif

// A chunk with room for results: dx apart from the logits or over them.
struct Run {
  Chunk chunk;
  DType dtype;
  bool over;
  std::vector<float> logprobs, entropy, lse;
  std::vector<uint8_t> live;
  int64_t apart_stride;
  std::vector<float> apart;  // dx [R, apart_stride], in `dtype`

  Run(const Chunk& with, DType out, bool over_logits)
      : chunk(with),
        dtype(out),
        over(over_logits),
        logprobs(size_t(with.num), kGuard),
        entropy(logprobs),
        lse(logprobs) {
    live.assign(size_t(with.num), 7);
    apart_stride = (with.width + 15) / 8 * 8;
    apart.assign(over ? 0 : size_t(with.num * apart_stride), kGuard);
  }

  RowTask task() {
    RowTask task = grpo_fast::row_task(chunk.rows());
    task.logprobs = logprobs.data(), task.entropy = entropy.data(), task.lse = lse.data(), task.live = live.data();
    return task;
  }

  void set_output(RowTask& task) {
    const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
    const int64_t offset = size == 4 ? 0 : grpo_fast::narrow_offset(chunk.width);
    DxOut out{apart.data(), apart_stride, dtype};
    if (over) out = {reinterpret_cast<char*>(chunk.logits.data()) + offset, chunk.stride() * 4 / size, dtype};
    grpo_fast::set_output(task, out);
    CHECK(task.overlaps == (over && size == 2), "V %d", int(chunk.width));
  }

  void statistics(int shared_limit, int clusters = 1, uint64_t seed = 1) {
    launch<Pass::kStatistics>(task(), DType::kFloat32, shared_limit, clusters, seed);
  }

  void gradient(const Run& known, bool bonus, uint64_t seed = 1) {
    RowTask given = task();
    set_output(given);
    given.given_lse = known.lse.data(), given.given_entropy = known.entropy.data();
    given.g = chunk.g.data(), given.e = bonus ? chunk.e.data() : nullptr;
    launch<Pass::kGradient>(given, dtype, kStreaming, 1, seed);
  }

  void objective(float bonus, float scale, int shared_limit, int clusters = 1, uint64_t seed = 1) {
    RowTask given = task();
    set_output(given);
    given.objective = clipped_with_kl(), given.tokens = chunk.tokens();
    given.entropy_gradient = {&bonus, 0.0f}, given.grad_scale = {nullptr, scale};
    launch<Pass::kObjective>(given, dtype, shared_limit, clusters, seed);
  }

  double dx(int64_t t, int64_t v) const {
    if (over && dtype == DType::kFloat32) return chunk.at(t, v);
    const char* row = over ? reinterpret_cast<const char*>(&chunk.logits[size_t(t * chunk.stride())]) +
                                 grpo_fast::narrow_offset(chunk.width)
                           : reinterpret_cast<const char*>(apart.data()) +
                                 t * apart_stride * (dtype == DType::kFloat32 ? 4 : 2);
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(row)[v];
    uint16_t bits;
    std::memcpy(&bits, row + 2 * v, 2);
    return decoded(bits, dtype);
  }
};

// -- comparisons ------------------------------------------------------------------------------------------------------

void check_statistics(const Run& run, const Chunk& before, bool with_lse) {
  for (int64_t t = 0; t < before.num; ++t) {
    const Expected row = expected_row(before, t);
    const auto check = [&](const char* what, double got, double expected, double bound) {
      CHECK(std::abs(got - expected) <= bound, "%s, V %d, %s, row %d: %.9g, expected %.9g", what, int(before.width),
            before.head.name, int(t), got, expected);
    };
    check("logprob", run.logprobs[size_t(t)], row.logprob, 2 * row.resolution);
    check("entropy", run.entropy[size_t(t)], row.entropy, 1e-6 + 2 * row.resolution);
    if (with_lse) check("lse", run.lse[size_t(t)], row.lse, row.resolution);
  }
}

void check_gradient(const Run& run, const Chunk& before, int64_t t, double g, double e, double factor) {
  double size = 0, error = 0;
  const std::vector<double> expected = expected_gradient(before, t, g, e, &size);
  for (int64_t v = 0; v < before.width; ++v) error += std::pow(run.dx(t, v) - expected[size_t(v)], 2);
  const double bound = factor * gradient_bound(before, t, run.dtype);
  CHECK(std::sqrt(error) <= bound * size, "dtype %d, V %d, %s, over %d, row %d: error %g of %g", int(run.dtype),
        int(before.width), before.head.name, int(run.over), int(t), std::sqrt(error), size);
}

double slope_of(const Chunk& chunk, const Run& run, size_t t) {
  grpo_fast::Token<double> token;
  token.logprob = run.logprobs[t];  // whose own error is checked
  token.old_logprob = chunk.old_logprobs[t];
  token.ref_logprob = chunk.ref_logprobs[t];
  token.sampling_logprob = chunk.sampling_logprobs[t];
  token.advantage = chunk.advantages[t];
  token.has_old = token.has_sampling = true;
  return grpo_fast::token_term(clipped_with_kl(), token).slope * chunk.weights[t];
}

void check_objective(const Run& run, const Chunk& before, float bonus, float scale) {
  check_statistics(run, before, false);
  check_guards(run.chunk);
  for (int64_t t = 0; t < before.num; ++t) {
    CHECK(run.live[size_t(t)] == 1, "row %d: live %d", int(t), int(run.live[size_t(t)]));
    if (before.width == 1) continue;  // has no gradient but rounding
    check_gradient(run, before, t, slope_of(before, run, size_t(t)) * scale, bonus * scale, 2);
  }
  if (!run.over) CHECK(same_bits(run.chunk.logits, before.logits), "V %d: the logits changed", int(before.width));
}

bool same_results(const Run& a, const Run& b) {
  bool same = same_bits(a.logprobs, b.logprobs) && same_bits(a.entropy, b.entropy) && a.live == b.live;
  for (int64_t t = 0; t < a.chunk.num; ++t) {
    for (int64_t v = 0; v < a.chunk.width; ++v) same = same && a.dx(t, v) == b.dx(t, v);
  }
  return same;
}

// `policies`: a little off the true log-probabilities.
Chunk chunk_with_policies(int64_t num, int64_t width, const Head& head, uint64_t seed, int64_t gap) {
  Chunk chunk(num, width, head, seed, gap);
  std::vector<float> logprobs;
  for (int64_t t = 0; t < num; ++t) logprobs.push_back(float(expected_row(chunk, t).logprob));
  chunk.set_policies(logprobs, seed + 1);
  return chunk;
}

// -- tests ------------------------------------------------------------------------------------------------------------

TEST(gpu_rows_at_every_vocabulary) {
  int number = 0;
  for (const int64_t width : kVocabularies) {
    for (const int shared_limit : {kHopper, kStreaming}) {
      const Head& head = kHeads[++number % 5];
      // Three rows on one cluster: both stages, and the first of them twice. To the next multiple of 64 columns.
      const Chunk chunk = chunk_with_policies(3, width, head, uint64_t(number), 63 - (width - 1) % 64);
      Run run(chunk, number % 3 == 0 ? DType::kFloat16 : DType::kBFloat16, number % 4 < 3);
      run.objective(0.01f, 8.0f, shared_limit, 1, uint64_t(number));
      check_objective(run, chunk, 0.01f, 8.0f);
    }
  }
}

TEST(gpu_rows_of_every_kind) {
  uint64_t seed = 0;
  for (const int64_t width : kSmall) {
    for (const Head& head : kHeads) {
      for (const DType dtype : kDTypes) {
        // Clusters of 1, 2, 4 and 8, two stages and one; aligned and not.
        const int limits[] = {kStreaming, 8000, 2900, kHopper};
        const int shared_limit = limits[++seed % 4];
        const Chunk chunk = chunk_with_policies(4, width, head, seed, seed % 3 == 0 ? 63 - (width - 1) % 64 : seed % 7);
        const bool over = seed % 2 == 0;
        Run known(chunk, DType::kFloat32, true), fused(chunk, dtype, over), plain(chunk, dtype, over);
        known.statistics(shared_limit, 2, seed);
        CHECK(same_bits(known.chunk.logits, chunk.logits), "V %d: the logits changed", int(width));
        check_statistics(known, chunk, true);
        const float bonus = seed % 5 == 0 ? 0.01f : 0.0f;
        fused.objective(bonus, 4.0f, shared_limit, 1, seed);
        check_objective(fused, chunk, bonus, 4.0f);
        CHECK(same_bits(fused.logprobs, known.logprobs) && same_bits(fused.entropy, known.entropy),
              "V %d, %s: the passes disagree", int(width), head.name);
        plain.gradient(known, seed % 2 == 1, seed);
        check_guards(plain.chunk);
        for (int64_t t = 0; t < chunk.num && width > 1; ++t) {
          check_gradient(plain, chunk, t, chunk.g[size_t(t)], seed % 2 == 1 ? chunk.e[size_t(t)] : 0.0, 1.5);
        }
      }
    }
  }
}

TEST(gpu_rows_are_the_same_bits_anywhere) {
  for (const int shared_limit : {kStreaming, 2900, 8000, kHopper}) {
    for (const int64_t width : {int64_t(1000), int64_t(2503)}) {
      const Head& head = kHeads[shared_limit == kStreaming ? 3 : 0];
      std::vector<Run> runs;
      for (const int64_t gap : {63 - (width - 1) % 64, int64_t(0), int64_t(5)}) {
        for (const int clusters : {1, 2}) {
          Run run(chunk_with_policies(4, width, head, 3, gap), DType::kBFloat16, gap != 5);
          run.objective(0.01f, 1.0f, shared_limit, clusters, uint64_t(10 * gap + clusters));
          runs.push_back(run);
        }
      }
      for (const Run& run : runs) {
        CHECK(same_results(run, runs[0]), "V %d, gap %d, shared memory %d", int(width), int(run.chunk.gap),
              shared_limit);
      }
    }
  }
}

TEST(gpu_vocabulary_blocks_make_up_the_row) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Chunk chunk(3, 2500, kHeads[2], 77);
    Run whole(chunk, dtype, false), known(chunk, DType::kFloat32, true);
    known.statistics(kHopper);
    whole.gradient(known, true);
    for (const auto& [start, stop] : {std::pair<int64_t, int64_t>(0, 1100), {1100, 1101}, {1101, 2500}}) {
      Run part(chunk, dtype, false);
      RowTask task = part.task();
      part.set_output(task);
      task.rows.logits += start, task.rows.bias += start, task.rows.num_columns = stop - start;
      task.wide_reads = start % 4 == 0 && task.wide_reads;
      task.given_lse = known.lse.data(), task.given_entropy = known.entropy.data();
      task.g = chunk.g.data(), task.e = chunk.e.data(), task.vocab_start = start;
      launch<Pass::kGradient>(task, dtype, kStreaming, 1, 5);
      for (int64_t t = 0; t < chunk.num; ++t) {
        for (int64_t v = start; v < stop; ++v) {
          CHECK(part.dx(t, v - start) == whole.dx(t, v), "row %d, v %d: %g in blocks, %g whole", int(t), int(v),
                part.dx(t, v - start), whole.dx(t, v));
        }
      }
    }
  }
}

TEST(gpu_rows_without_gradient_are_zero_and_say_so) {
  for (const int shared_limit : {kStreaming, 2900, kHopper}) {
    for (const bool over : {false, true}) {
      Chunk chunk = chunk_with_policies(3, 1102, kHeads[0], 5, 2);
      chunk.advantages = {0.0f, 1.0f, 0.0f};
      Run run(chunk, DType::kBFloat16, over);
      RowTask task = run.task();
      run.set_output(task);
      task.objective = testing::make_objective(grpo_fast::PolicyTerm::reinforce);
      task.tokens = chunk.tokens(), task.grad_scale = {nullptr, 1.0f};
      launch<Pass::kObjective>(task, run.dtype, shared_limit, 1, 3);
      CHECK(run.live[0] == 0 && run.live[1] == 1 && run.live[2] == 0, "live %d %d %d", run.live[0], run.live[1],
            run.live[2]);
      for (int64_t v = 0; v < chunk.width; ++v) CHECK(run.dx(0, v) == 0 && run.dx(2, v) == 0, "v %d", int(v));
      check_gradient(run, chunk, 1, -0.25, 0, 1);
    }
  }
}

TEST(gpu_targets_outside_the_vocabulary_have_no_logprob) {
  for (const int shared_limit : {kStreaming, 2900, kHopper}) {
    for (const bool over : {false, true}) {
      for (const int64_t width : {int64_t(43), int64_t(2502)}) {
        Chunk chunk = chunk_with_policies(3, width, kHeads[0], 5, 2);
        Run sound(chunk, DType::kFloat32, true);
        sound.statistics(shared_limit);
        chunk.targets = {-1, chunk.targets[1], width};
        Run run(chunk, DType::kBFloat16, over);
        run.objective(0.0f, 1.0f, shared_limit, 1, 3);
        check_guards(run.chunk);
        CHECK(std::isnan(run.logprobs[0]) && std::isnan(run.logprobs[2]) && run.logprobs[1] == sound.logprobs[1],
              "V %d: %g, %g, %g", int(width), double(run.logprobs[0]), double(run.logprobs[1]), double(run.logprobs[2]));
        CHECK(same_bits(run.entropy, sound.entropy), "V %d: the entropy is the row's", int(width));
        for (int64_t v = 0; v < width; ++v) {
          CHECK(std::isnan(run.dx(0, v)) && std::isfinite(run.dx(1, v)), "V %d, v %d", int(width), int(v));
        }
        for (size_t at = run.apart.size() / 2 + 1; at < run.apart.size(); ++at) {  // bf16 fills half of it
          CHECK(run.apart[at] == kGuard, "V %d: written %d numbers behind dx", int(width), int(at));
        }
      }
    }
  }
}

// Statistics and fused dx of rows that something has been done to; others beside them are not touched by it.
void check_hard_row(const char* name, const std::function<void(Chunk&)>& spoil) {
  for (const int shared_limit : {kStreaming, 2900, kHopper}) {
    for (const int64_t width : {int64_t(43), int64_t(2500)}) {
      Chunk chunk(2, width, kHeads[0], 11, 4);
      chunk.targets = {width / 2, width / 2};
      spoil(chunk);
      Run known(chunk, DType::kFloat32, true), after(chunk, DType::kFloat32, false);
      known.statistics(shared_limit);
      check_statistics(known, chunk, true);
      chunk.g = after.chunk.g = {1.0f, 1.0f}, chunk.e = after.chunk.e = {0.2f, 0.2f};
      after.gradient(known, true);
      for (int64_t t = 0; t < 2; ++t) {
        const std::vector<double> expected = expected_gradient(chunk, t, 1.0, 0.2f);
        const double bound = 1e-6 + 4 * expected_row(chunk, t).resolution;
        for (int64_t v = 0; v < width; ++v) {
          CHECK(std::abs(after.dx(t, v) - expected[size_t(v)]) <= bound, "%s, V %d, row %d, v %d: %g, expected %g",
                name, int(width), int(t), int(v), after.dx(t, v), expected[size_t(v)]);
        }
      }
    }
  }
}

TEST(gpu_forbidden_and_huge_logits) {
  check_hard_row("every third token", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; v += 3) chunk.at(0, v == chunk.width / 2 ? 0 : v) = -kInfinity;
  });
  check_hard_row("all but the target", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; ++v) {
      if (v != chunk.width / 2) chunk.at(0, v) = -kInfinity;
    }
  });
  check_hard_row("1e4 apart", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; ++v) chunk.at(0, v) *= 2500.0f;
  });
  check_hard_row("all near -1e4", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; ++v) chunk.at(0, v) -= 1e4f;
  });
  check_hard_row("rising by 1e5", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; ++v) chunk.at(0, v) += 1e5f * float(v / 64);
  });
}

TEST(gpu_lost_rows_are_nan_and_alone) {
  const std::function<void(Chunk&)> losses[] = {
      [](Chunk& c) { c.at(1, 0) = kNaN; },
      [](Chunk& c) { c.at(1, c.width - 1) = kNaN; },
      [](Chunk& c) { c.at(1, c.width - 2) = kInfinity; },
      [](Chunk& c) {
        for (int64_t v = 0; v < c.width; ++v) c.at(1, v) = -kInfinity;
      },
      [](Chunk& c) {
        for (int64_t v = 0; v < c.width; ++v) c.at(1, v) = v == 3 ? kNaN : v < c.width - 2 ? -kInfinity : 1.0f;
      },
  };
  for (const int shared_limit : {kStreaming, 2900, kHopper}) {
    for (const auto& spoil : losses) {
      for (const int64_t width : {int64_t(43), int64_t(2500)}) {
        const Chunk sound(3, width, kHeads[0], 13);
        Run expected(sound, DType::kFloat32, true), found = expected;
        spoil(found.chunk);
        expected.statistics(shared_limit), found.statistics(shared_limit);
        CHECK(std::isnan(found.logprobs[1]) && !std::isfinite(found.entropy[1]), "V %d: logprob %g, entropy %g",
              int(width), double(found.logprobs[1]), double(found.entropy[1]));
        for (const size_t t : {size_t(0), size_t(2)}) {
          CHECK(found.logprobs[t] == expected.logprobs[t] && found.entropy[t] == expected.entropy[t], "row %zu", t);
        }
      }
    }
  }
}

TEST(gpu_splits_hold_their_rows) {
  for (const int shared_limit : {kHopper, kConsumer, 8000, 2900}) {
    for (int64_t width = 1; width < 1000000; width += 1 + width / 7) {
      const ClusterSplit split = grpo_fast::split_row(width, shared_limit);
      if (split.ranks == 0) continue;
      CHECK(split.shared_bytes <= shared_limit && int64_t(split.ranks) * split.part_vectors >= width / kVector,
            "V %d in %d bytes", int(width), split.shared_bytes);
      CHECK(split.threads % kWarp == 0 && split.threads <= grpo_fast::kClusterThreads, "%d threads", split.threads);
      CHECK(split.chunks * grpo_fast::kUnroll * split.threads >= split.part_vectors, "V %d: chunks", int(width));
    }
  }
  const auto has = [](int64_t width, int ranks, int stages, int blocks) {
    const ClusterSplit split = grpo_fast::split_row(width, kHopper);
    const int resident = (kHopper + 1024) / (split.shared_bytes + 1024);
    CHECK(split.ranks == ranks && split.stages == stages && resident >= blocks,
          "V %d: %d blocks, %d stages, %d resident", int(width), split.ranks, split.stages, resident);
  };
  has(1000, 1, 2, 2), has(32000, 4, 2, 2), has(50257, 4, 2, 2), has(114000, 8, 2, 2);
  has(128256, 8, 1, 2), has(151936, 8, 1, 2), has(256000, 8, 1, 1);
  CHECK(grpo_fast::split_row(500000, kHopper).ranks == 0, "%s", "no cluster holds it");
}

TEST(gpu_tasks_refuse_what_kernels_cannot_serve) {
  Chunk chunk(2, 100, kHeads[0], 1, 28);
  Rows rows = chunk.rows();
  RowTask task = grpo_fast::row_task(rows);
  rows.num_columns = 0;
  CHECK_THROWS(grpo_fast::row_task(rows), std::invalid_argument, "num_columns: expected 1 to");
  rows.num_columns = 200;
  CHECK_THROWS(grpo_fast::row_task(rows), std::invalid_argument, "rows: expected a number >= 0, at least");
  const DxOut low{chunk.logits.data(), 256, DType::kBFloat16}, tight{chunk.logits.data(), 50, DType::kFloat32};
  CHECK_THROWS(grpo_fast::set_output(task, low), std::invalid_argument, "dx: expected memory apart from the logits");
  CHECK_THROWS(grpo_fast::set_output(task, tight), std::invalid_argument, "dx: expected rows of 2 or 4 byte numbers");
}

}  // namespace
