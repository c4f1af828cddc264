// row_cpu.h against plain double loops: every instruction set this machine has, ragged columns, forbidden, lost and
// huge logits, narrow output over the logits.

#include <functional>
#include <vector>

#include "../row_cpu.h"
#include "row_cases.h"

namespace {

using namespace testing;
using grpo_fast::Launch;

// Around a vector, around the block of 1024 columns, and ragged beyond it.
constexpr int64_t kWidths[] = {1, 2, 15, 17, 1000, 1024, 1025, 2500, 4096};

// -- comparisons ------------------------------------------------------------------------------------------------------

struct Found {
  std::vector<float> logprobs, entropy, lse;

  Found(Chunk& chunk, Launch launch) : logprobs(size_t(chunk.num), kGuard), entropy(logprobs), lse(logprobs) {
    grpo_fast::row_statistics(chunk.rows(), logprobs.data(), entropy.data(), lse.data(), launch);
  }
};

void check_statistics(const Chunk& chunk, const Found& found, Isa isa) {
  for (int64_t t = 0; t < chunk.num; ++t) {
    const Expected row = expected_row(chunk, t);
    const auto check = [&](const char* what, double got, double expected, double bound) {
      CHECK(std::abs(got - expected) <= bound, "%s, V %d, %s, isa %d, row %d: %.9g, expected %.9g", what,
            int(chunk.width), chunk.head.name, int(isa), int(t), got, expected);
    };
    check("lse", found.lse[size_t(t)], row.lse, row.resolution);
    check("logprob", found.logprobs[size_t(t)], row.logprob, 2 * row.resolution);
    check("entropy", found.entropy[size_t(t)], row.entropy, 1e-6 + 2 * row.resolution);
  }
}

// Relative RMS error of row t's gradient from g and e.
double gradient_error(const Chunk& after, const Chunk& before, int64_t t, double g, double e, DType dtype) {
  double size = 0, error = 0;
  const std::vector<double> expected = expected_gradient(before, t, g, e, &size);
  for (int64_t v = 0; v < before.width; ++v) error += std::pow(stored(after, t, v, dtype) - expected[size_t(v)], 2);
  return std::sqrt(error) / size;
}

void for_each_chunk(const std::function<void(Chunk&, Isa)>& body) {
  uint64_t seed = 0;
  for (const Isa isa : isas()) {
    for (const int64_t width : kWidths) {
      for (const Head& head : kHeads) {
        Chunk chunk(3, width, head, ++seed);
        body(chunk, isa);
      }
    }
  }
}

TEST(statistics_match_double) {
  for_each_chunk([](Chunk& chunk, Isa isa) {
    const std::vector<float> before = chunk.logits;
    check_statistics(chunk, Found(chunk, {1, isa}), isa);
    CHECK(same_bits(chunk.logits, before), "V %d: the logits changed", int(chunk.width));
  });
}

TEST(gradient_matches_double) {
  for_each_chunk([](Chunk& chunk, Isa isa) {
    const Found found(chunk, {1, isa});
    for (const bool bonus : {false, true}) {
      Chunk wide = chunk;
      for (const DType dtype : kDTypes) {
        Chunk after = chunk;
        grpo_fast::row_gradient(after.rows(), found.lse.data(), found.entropy.data(), chunk.g.data(),
                                bonus ? chunk.e.data() : nullptr, 0, dtype, {1, isa});
        check_guards(after);
        if (dtype == DType::kFloat32) wide = after;
        for (int64_t t = 0; t < chunk.num; ++t) {
          // A vocabulary of one has no gradient but rounding; of narrow rows the rounding itself is checked.
          if (chunk.width > 1 && dtype == DType::kFloat32) {
            const double e = bonus ? chunk.e[size_t(t)] : 0.0;
            const double error = gradient_error(after, chunk, t, chunk.g[size_t(t)], e, dtype);
            CHECK(error <= gradient_bound(chunk, t, dtype), "V %d, %s, isa %d, row %d, bonus %d: error %g",
                  int(chunk.width), chunk.head.name, int(isa), int(t), int(bonus), error);
          }
          for (int64_t v = 0; v < chunk.width; ++v) {
            const double got = stored(after, t, v, dtype), expected = rounded(wide.at(t, v), dtype);
            CHECK(got == expected, "dtype %d, V %d, v %d: %.9g, float32 rounded %.9g", int(dtype), int(chunk.width),
                  int(v), got, expected);
          }
        }
      }
    }
  });
}

TEST(vocabulary_blocks_make_up_the_row) {
  for (const Isa isa : isas()) {
    Chunk whole(3, 2500, kHeads[2], 77), part = whole;
    const Found found(whole, {1, isa});
    const auto run = [&](const Rows& rows, int64_t start) {
      grpo_fast::row_gradient(rows, found.lse.data(), found.entropy.data(), whole.g.data(), whole.e.data(), start,
                              DType::kFloat32, {1, isa});
    };
    run(whole.rows(), 0);
    for (const auto& [start, stop] : {std::pair<int64_t, int64_t>(0, 1100), {1100, 1101}, {1101, 2500}}) {
      Rows rows = part.rows();
      rows.logits += start;
      rows.bias += start;
      rows.num_columns = stop - start;
      run(rows, start);
    }
    for (size_t i = 0; i < whole.logits.size(); ++i) {
      CHECK(std::abs(whole.logits[i] - part.logits[i]) <= 1e-6, "isa %d, %zu: %g whole, %g in blocks", int(isa), i,
            double(whole.logits[i]), double(part.logits[i]));
    }
  }
}

// -- the fused row ----------------------------------------------------------------------------------------------------

TEST(fused_row_matches_double) {
  for_each_chunk([](Chunk& chunk, Isa isa) {
    const grpo_fast::Objective objective = clipped_with_kl();
    const float bonus = chunk.width % 2 == 0 ? 0.01f : 0.0f, scale = 8.0f;
    const Found found(chunk, {1, isa});
    chunk.set_policies(found.logprobs, uint64_t(chunk.width));
    for (const DType dtype : kDTypes) {
      Chunk after = chunk;
      std::vector<float> logprobs(size_t(chunk.num)), entropy(size_t(chunk.num));
      std::vector<uint8_t> live(size_t(chunk.num), 7);
      grpo_fast::row_objective(after.rows(), objective, chunk.tokens(), bonus, scale, dtype, logprobs.data(),
                               entropy.data(), live.data(), {1, isa});
      check_guards(after);
      CHECK(same_bits(logprobs, found.logprobs) && same_bits(entropy, found.entropy), "V %d: other statistics",
            int(chunk.width));
      for (int64_t t = 0; t < chunk.num; ++t) {
        grpo_fast::Token<double> token;
        token.logprob = found.logprobs[size_t(t)];  // whose own error is checked above
        token.old_logprob = chunk.old_logprobs[size_t(t)];
        token.ref_logprob = chunk.ref_logprobs[size_t(t)];
        token.sampling_logprob = chunk.sampling_logprobs[size_t(t)];
        token.advantage = chunk.advantages[size_t(t)];
        token.has_old = token.has_sampling = true;
        const double g = grpo_fast::token_term(objective, token).slope * chunk.weights[size_t(t)];
        CHECK(live[size_t(t)] == 1, "row %d: live %d at g %g", int(t), int(live[size_t(t)]), g);
        if (chunk.width == 1) continue;
        const double error = gradient_error(after, chunk, t, g * scale, bonus * scale, dtype);
        CHECK(error <= 2 * gradient_bound(chunk, t, dtype), "dtype %d, V %d, %s, isa %d, row %d: error %g", int(dtype),
              int(chunk.width), chunk.head.name, int(isa), int(t), error);
      }
    }
  });
}

TEST(rows_without_gradient_are_zero_and_say_so) {
  for (const DType dtype : kDTypes) {
    Chunk chunk(3, 1100, kHeads[0], 5), before = chunk;
    chunk.advantages = {0.0f, 1.0f, 0.0f};
    chunk.set_policies({-7.0f, -8.0f, -9.0f}, 6);
    const grpo_fast::Objective objective = make_objective(grpo_fast::PolicyTerm::reinforce);
    std::vector<float> logprobs(3), entropy(3);
    std::vector<uint8_t> live(3, 7);
    grpo_fast::row_objective(chunk.rows(), objective, chunk.tokens(), 0.0f, 1.0f, dtype, logprobs.data(), entropy.data(),
                             live.data(), {1, grpo_fast::detected_isa()});
    CHECK(live[0] == 0 && live[1] == 1 && live[2] == 0, "live %d %d %d", live[0], live[1], live[2]);
    for (int64_t v = 0; v < chunk.width; ++v) {
      const double first = stored(chunk, 0, v, dtype), last = stored(chunk, 2, v, dtype);
      CHECK(first == 0 && last == 0, "dtype %d, v %d: %g, %g", int(dtype), int(v), first, last);
    }
    CHECK(gradient_error(chunk, before, 1, -0.25, 0, dtype) <= gradient_bound(before, 1, dtype), "dtype %d",
          int(dtype));
  }
}

// -- hard rows --------------------------------------------------------------------------------------------------------

void check_hard_row(const char* name, const std::function<void(Chunk&)>& spoil, double g = 1.0) {
  for (const Isa isa : isas()) {
    for (const int64_t width : {int64_t(40), int64_t(1025), int64_t(4096)}) {
      Chunk chunk(2, width, kHeads[0], 11);
      chunk.targets = {width / 2, width / 2};
      spoil(chunk);
      const Found found(chunk, {1, isa});
      check_statistics(chunk, found, isa);
      Chunk after = chunk;
      const std::vector<float> slopes(2, float(g)), bonus(2, 0.2f);
      grpo_fast::row_gradient(after.rows(), found.lse.data(), found.entropy.data(), slopes.data(), bonus.data(), 0,
                              DType::kFloat32, {1, isa});
      for (int64_t t = 0; t < 2; ++t) {
        const std::vector<double> expected = expected_gradient(chunk, t, g, 0.2);
        const double bound = 1e-6 + 2 * expected_row(chunk, t).resolution;
        for (int64_t v = 0; v < width; ++v) {
          CHECK(std::abs(after.at(t, v) - expected[size_t(v)]) <= bound,
                "%s, V %d, isa %d, row %d, v %d: %g, expected %g", name, int(width), int(isa), int(t), int(v),
                double(after.at(t, v)), expected[size_t(v)]);
        }
      }
    }
  }
}

TEST(forbidden_tokens_take_no_part) {
  check_hard_row("every third token", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; v += 3) chunk.at(0, v == chunk.width / 2 ? 0 : v) = -kInfinity;
  });
  check_hard_row("all before the target", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width / 2; ++v) chunk.at(0, v) = -kInfinity;
  });
  check_hard_row("all but the target", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; ++v) {
      if (v != chunk.width / 2) chunk.at(0, v) = -kInfinity;
    }
  });
}

TEST(huge_logits_keep_their_row) {
  check_hard_row("1e4 apart", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; ++v) chunk.at(0, v) *= 2500.0f;
  });
  check_hard_row("all near 1e4", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; ++v) chunk.at(0, v) += 1e4f;
  });
  check_hard_row("all near -1e4", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; ++v) chunk.at(0, v) -= 1e4f;
  });
  check_hard_row("rising by 1e5 from block to block", [](Chunk& chunk) {
    for (int64_t v = 0; v < chunk.width; ++v) chunk.at(0, v) += 1e5f * float(v / 1024);
  });
  check_hard_row("the largest float", [](Chunk& chunk) { chunk.at(0, chunk.width - 1) = 3e38f; }, 0.5);
}

TEST(lost_rows_are_nan_and_alone) {
  struct Loss {
    const char* name;
    std::function<void(Chunk&)> spoil;
  };
  const Loss losses[] = {
      {"NaN first", [](Chunk& c) { c.at(1, 0) = kNaN; }},
      {"NaN last", [](Chunk& c) { c.at(1, c.width - 1) = kNaN; }},
      {"NaN in the middle", [](Chunk& c) { c.at(1, c.width / 2 + 1) = kNaN; }},
      {"infinite", [](Chunk& c) { c.at(1, c.width - 2) = kInfinity; }},
      {"all forbidden",
       [](Chunk& c) {
         for (int64_t v = 0; v < c.width; ++v) c.at(1, v) = -kInfinity;
       }},
      {"NaN among forbidden",
       [](Chunk& c) {
         for (int64_t v = 0; v < c.width; ++v) c.at(1, v) = v == 3 ? kNaN : v < c.width - 2 ? -kInfinity : 1.0f;
       }},
  };
  for (const Isa isa : isas()) {
    for (const Loss& loss : losses) {
      for (const int64_t width : {int64_t(40), int64_t(2500)}) {
        Chunk sound(3, width, kHeads[0], 13), spoiled = sound;
        loss.spoil(spoiled);
        const Found expected(sound, {1, isa}), found(spoiled, {1, isa});
        CHECK(std::isnan(found.logprobs[1]) && !std::isfinite(found.entropy[1]),
              "%s, V %d, isa %d: logprob %g, entropy %g", loss.name, int(width), int(isa), double(found.logprobs[1]),
              double(found.entropy[1]));
        for (const size_t t : {size_t(0), size_t(2)}) {
          CHECK(found.logprobs[t] == expected.logprobs[t] && found.entropy[t] == expected.entropy[t],
                "%s: row %zu: %g, %g", loss.name, t, double(found.logprobs[t]), double(found.entropy[t]));
        }
      }
    }
  }
}

TEST(targets_outside_the_vocabulary_have_no_logprob) {
  for (const DType dtype : kDTypes) {
    for (const Isa isa : isas()) {
      Chunk chunk(3, 1100, kHeads[0], 23);
      const Found sound(chunk, {1, isa});
      chunk.targets = {-1, chunk.targets[1], 1100};
      chunk.set_policies(sound.logprobs, 24);
      std::vector<float> logprobs(3), entropy(3);
      std::vector<uint8_t> live(3);
      grpo_fast::row_objective(chunk.rows(), clipped_with_kl(), chunk.tokens(), 0.0f, 1.0f, dtype, logprobs.data(),
                               entropy.data(), live.data(), {1, isa});
      check_guards(chunk);
      CHECK(std::isnan(logprobs[0]) && std::isnan(logprobs[2]) && logprobs[1] == sound.logprobs[1], "%g, %g, %g",
            double(logprobs[0]), double(logprobs[1]), double(logprobs[2]));
      CHECK(same_bits(entropy, sound.entropy), "the entropy is the row's, whatever the target: %g", double(entropy[0]));
      CHECK(live[0] == 1 && live[2] == 1, "live %d, %d", int(live[0]), int(live[2]));
      for (int64_t v = 0; v < chunk.width; ++v) {
        CHECK(std::isnan(stored(chunk, 0, v, dtype)) && std::isfinite(stored(chunk, 1, v, dtype)), "v %d", int(v));
      }
    }
  }
}

TEST(threads_do_not_change_rows) {
  Chunk chunk(7, 2500, kHeads[3], 17);
  chunk.set_policies(Found(chunk, {1, grpo_fast::detected_isa()}).logprobs, 18);
  std::vector<std::vector<float>> results;
  for (const int threads : {1, 3}) {
    Chunk after = chunk;
    std::vector<float> logprobs(7), entropy(7);
    std::vector<uint8_t> live(7);
    grpo_fast::row_objective(after.rows(), clipped_with_kl(), chunk.tokens(), 0.01f, 1.0f, DType::kFloat32,
                             logprobs.data(), entropy.data(), live.data(), {threads, grpo_fast::detected_isa()});
    after.logits.insert(after.logits.end(), logprobs.begin(), logprobs.end());
    after.logits.insert(after.logits.end(), entropy.begin(), entropy.end());
    results.push_back(after.logits);
  }
  CHECK(same_bits(results[0], results[1]), "%zu numbers", results[0].size());
}

}  // namespace
