// A GPU's blocks, clusters and lanes on one CPU thread: every GPU thread is a fiber that runs the kernel's own body (a
// template over its `Lane`) until it must wait. What a GPU leaves open is drawn at random: which thread runs next, how
// far blocks and warps fall behind others, when a block starts, when a bulk copy happens. So a missing barrier shows as
// wrong numbers, a barrier that not everyone reaches as a deadlock, and what nobody wrote as NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "../row_cluster.h"
#include "../vector_math.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace testing {

using grpo_fast::DType;
using grpo_fast::kVector;
using grpo_fast::kWarp;
using grpo_fast::Partial;
using grpo_fast::Quad;

struct LaunchSize {
  int clusters, ranks, threads, shared_bytes;
};

// A mistake that on a GPU would be undefined behaviour.
[[noreturn]] inline void broken(const char* what) {
  std::fprintf(stderr, "emulated launch: %s\n", what);
  std::abort();
}

// One cluster and its fibers.
class Cluster {
 public:
  class Lane;

  Cluster(const LaunchSize& size, int index, uint64_t seed, std::function<void(Lane&)> body)
      : size_(size), index_(index), random_(seed), body_(std::move(body)), blocks_(size_t(size.ranks)) {
    for (Block& block : blocks_) {
      block.shared.resize(size_t(size.shared_bytes / 16 + 1), Quad{{NAN, NAN, NAN, NAN}});
      block.warps.resize(size_t(size.threads / kWarp));
    }
  }
  Cluster(const Cluster&) = delete;

  void run();

 private:
  static constexpr size_t kStack = 128 * 1024;

  struct Warp {
    alignas(16) unsigned char values[2][kWarp][16];
    int arrived = 0;
    int64_t generation = 0;
    int64_t held_until = 0;  // this pass of the scheduler
  };
  struct Block {
    std::vector<Quad> shared;
    std::vector<Warp> warps;
    int arrived = 0, started = 0, finished = 0;
    int64_t generation = 0;
    int64_t held_until = 0;
  };
  struct CopyBarrier {
    int64_t uses = 0;  // completed
    int64_t missing = 0;
    bool expected = false;
  };
  struct Copy {
    void* target;
    const void* source;
    size_t bytes;
    CopyBarrier* barrier;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    Cluster* cluster;
    int rank, thread;
    bool done = false;
    // Waits until *counter >= target, or until the copies of the use of this parity are there.
    const int64_t* counter = nullptr;
    int64_t target = 0;
    const CopyBarrier* copies = nullptr;
    int parity = 0;

    bool ready() const {
      if (counter != nullptr && *counter < target) return false;
      return copies == nullptr || copies->uses % 2 != parity;
    }
  };

  static void enter(unsigned low, unsigned high);
  void resume(Fiber& fiber);
  void pause(Fiber& fiber);
  void do_a_copy();
  void hold_some_back();

  void wait(Fiber& fiber, const int64_t* counter, int64_t target) {
    fiber.counter = counter, fiber.target = target;
    pause(fiber);
  }
  // Arrives at a barrier of `count` and waits for the rest.
  void meet(Fiber& fiber, int& arrived, int64_t& generation, int count) {
    const int64_t mine = generation + 1;
    if (++arrived == count) arrived = 0, ++generation;
    wait(fiber, &generation, mine);
  }

  LaunchSize size_;
  int index_;
  std::mt19937 random_;
  std::function<void(Lane&)> body_;
  std::vector<Block> blocks_;
  std::vector<Fiber> fibers_;
  std::map<const uint64_t*, CopyBarrier> barriers_;
  std::vector<Copy> copies_;
  int cluster_arrived_ = 0;
  int64_t cluster_generation_ = 0;
  int64_t pass_ = 0;
  ucontext_t scheduler_;
};

// The emulated thread, with CudaLane's functions.
class Cluster::Lane {
 public:
  Lane(Cluster& cluster, Fiber& fiber) : c_(cluster), f_(fiber), b_(cluster.blocks_[size_t(fiber.rank)]) {}

  int thread() const { return f_.thread; }
  int threads() const { return c_.size_.threads; }
  int rank() const { return f_.rank; }
  int64_t cluster() const { return c_.index_; }
  int64_t clusters() const { return c_.size_.clusters; }
  int64_t block() const { return c_.index_ * c_.size_.ranks + f_.rank; }
  int64_t blocks() const { return c_.size_.clusters * c_.size_.ranks; }

  template <class T>
  T* shared(int offset) const {
    if (offset % alignof(T) != 0 || offset > c_.size_.shared_bytes) broken("shared memory: offset");
    return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(b_.shared.data()) + offset);
  }

  void sync_block() const { c_.meet(f_, b_.arrived, b_.generation, threads()); }
  void sync_cluster() const {
    c_.meet(f_, c_.cluster_arrived_, c_.cluster_generation_, threads() * c_.size_.ranks);
  }

  template <class T>
  T shuffle_xor(const T& value, int mask) const {
    return from_lane(value, (thread() % kWarp) ^ mask);
  }
  Partial shuffle_sums(const Partial& p, int mask) const {
    const Partial other = shuffle_xor(p, mask);
    return {p.top, other.sum, other.moment};
  }
  uint32_t ballot(bool vote) const {
    const Warp& warp = b_.warps[size_t(thread() / kWarp)];
    const auto& values = warp.values[warp.generation % 2];
    (void)from_lane(vote, 0);
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarp; ++lane) votes |= uint32_t(values[lane][0]) << lane;
    return votes;
  }
  int count_bits(uint32_t bits) const { return __builtin_popcount(bits); }

  float read(const float* p) const { return drift(), *p; }
  Quad read_quad(const float* p, bool wide) const {
    if (wide && reinterpret_cast<uintptr_t>(p) % 16 != 0) broken("a 16-byte read that is not aligned");
    drift();
    Quad out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }

  template <DType kOut>
  void write(void* dx, int64_t index, float value) const {
    if (kOut == DType::kFloat32) {
      std::memcpy(static_cast<char*>(dx) + 4 * index, &value, 4);
    } else {
      const uint16_t bits = kOut == DType::kBFloat16 ? grpo_fast::to_bfloat16(value) : grpo_fast::to_float16(value);
      std::memcpy(static_cast<char*>(dx) + 2 * index, &bits, 2);
    }
  }
  template <DType kOut>
  void write_quad(void* dx, int64_t index, const Quad& q, bool wide) const {
    const int size = kOut == DType::kFloat32 ? 4 : 2;
    const auto start = reinterpret_cast<uintptr_t>(dx) + uintptr_t(size * index);
    if (wide && start % uintptr_t(size * kVector) != 0) broken("a wide write that is not aligned");
    drift();
    for (int i = 0; i < kVector; ++i) write<kOut>(dx, index + i, q.v[i]);
  }

  template <class T>
  T get(const T* p) const {
    return *p;
  }
  void put(Quad* p, const Quad& q) const { *p = q; }

  void send(int rank, Partial* p, const Partial& value) const {
    Block& there = c_.blocks_[size_t(rank)];
    if (there.started == 0) broken("a write to the shared memory of a block that has not started");
    if (there.finished != 0) broken("a write to the shared memory of a block that has left");
    const auto offset = reinterpret_cast<unsigned char*>(p) - reinterpret_cast<unsigned char*>(b_.shared.data());
    std::memcpy(reinterpret_cast<unsigned char*>(there.shared.data()) + offset, &value, sizeof value);
  }

  void init(uint64_t* barrier) const { c_.barriers_[barrier] = {}; }
  void publish_barriers() const {}
  void expect(uint64_t* barrier, int bytes) const {
    CopyBarrier& known = find(barrier);
    if (known.expected) broken("a copy barrier expects twice in one use");
    known.missing += bytes, known.expected = true;
  }
  void copy(Quad* target, const float* source, int bytes, uint64_t* barrier) const {
    const bool aligned = reinterpret_cast<uintptr_t>(source) % 16 == 0 && bytes % 16 == 0 && bytes > 0;
    if (!aligned) broken("a bulk copy that is not of aligned 16-byte pieces");
    std::fill_n(target, bytes / 16, Quad{{NAN, NAN, NAN, NAN}});  // what a reader that does not wait may find
    c_.copies_.push_back({target, source, size_t(bytes), &find(barrier)});
  }
  void wait(uint64_t* barrier, int parity) const {
    f_.copies = &find(barrier), f_.parity = parity;
    c_.pause(f_);
    f_.copies = nullptr;
  }

 private:
  CopyBarrier& find(uint64_t* barrier) const {
    const auto known = c_.barriers_.find(barrier);
    if (known == c_.barriers_.end()) broken("a copy barrier that is not initialised");
    return known->second;
  }
  // Now and then somebody else goes first.
  void drift() const {
    if (c_.random_() % 256 == 0) c_.wait(f_, nullptr, 0);
  }
  template <class T>
  T from_lane(const T& value, int lane) const {
    static_assert(sizeof(T) <= 16);
    Warp& warp = b_.warps[size_t(thread() / kWarp)];
    auto& values = warp.values[warp.generation % 2];
    std::memcpy(values[thread() % kWarp], &value, sizeof value);
    c_.meet(f_, warp.arrived, warp.generation, kWarp);
    T out;
    std::memcpy(static_cast<void*>(&out), values[lane], sizeof out);
    return out;
  }

  Cluster& c_;
  Fiber& f_;
  Block& b_;
};

inline void Cluster::enter(unsigned low, unsigned high) {
  Fiber& fiber = *reinterpret_cast<Fiber*>(uintptr_t(low) | uintptr_t(high) << 32);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  ++fiber.cluster->blocks_[size_t(fiber.rank)].started;
  {
    Lane lane(*fiber.cluster, fiber);
    fiber.cluster->body_(lane);
  }
  fiber.done = true;
  ++fiber.cluster->blocks_[size_t(fiber.rank)].finished;
  fiber.cluster->pause(fiber);
}

inline void Cluster::resume(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
  swapcontext(&scheduler_, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  swapcontext(&scheduler_, &fiber.context);
#endif
}

inline void Cluster::pause(Fiber& fiber) {
  if (fiber.ready() && !fiber.done && random_() % 2 == 0) return;
#if defined(__SANITIZE_ADDRESS__)
  static thread_local const void* bottom = nullptr;
  static thread_local size_t size = 0;
  if (bottom == nullptr) {
    pthread_attr_t attributes;
    void* lowest;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &size);
    pthread_attr_destroy(&attributes);
    bottom = lowest;
  }
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fake, bottom, size);
  swapcontext(&fiber.context, &scheduler_);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  swapcontext(&fiber.context, &scheduler_);
#endif
}

inline void Cluster::do_a_copy() {
  std::swap(copies_[random_() % copies_.size()], copies_.back());
  const Copy copy = copies_.back();
  copies_.pop_back();
  std::memcpy(copy.target, copy.source, copy.bytes);
  copy.barrier->missing -= int64_t(copy.bytes);
  if (copy.barrier->missing == 0 && copy.barrier->expected) copy.barrier->expected = false, ++copy.barrier->uses;
}

inline void Cluster::hold_some_back() {
  if (random_() % 8 == 0) blocks_[random_() % blocks_.size()].held_until = pass_ + int64_t(random_() % 64);
  if (random_() % 4 == 0) {
    std::vector<Warp>& warps = blocks_[random_() % blocks_.size()].warps;
    warps[random_() % warps.size()].held_until = pass_ + int64_t(random_() % 16);
  }
}

inline void Cluster::run() {
  const int count = size_.ranks * size_.threads;
  fibers_ = std::vector<Fiber>(size_t(count));
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers_[size_t(i)];
    fiber.cluster = this, fiber.rank = i / size_.threads, fiber.thread = i % size_.threads;
    fiber.stack.reset(new unsigned char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(&fiber);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Cluster::enter), 2, unsigned(address),
                unsigned(address >> 32));
  }
  uint64_t prime = 0;
  for (const int above : {67, 131, 257, 521, 1031, 2053, 4099}) {
    if (prime == 0 && above > count) prime = uint64_t(above);
  }
  for (Block& block : blocks_) block.held_until = int64_t(random_() % 32);
  for (int left = count; left > 0; ++pass_) {
    if (!copies_.empty() && random_() % 4 == 0) do_a_copy();
    hold_some_back();
    bool moved = false, held = false;
    // Through all fibers, in an order of its own.
    const uint64_t start = random_(), stride = 1 + random_() % (prime - 1);
    for (uint64_t i = 0; i < prime; ++i) {
      const uint64_t next = (start + i * stride) % prime;
      if (next >= uint64_t(count) || fibers_[next].done || !fibers_[next].ready()) continue;
      const Block& block = blocks_[size_t(fibers_[next].rank)];
      if (std::max(block.held_until, block.warps[size_t(fibers_[next].thread / kWarp)].held_until) > pass_) {
        held = true;
        continue;
      }
      resume(fibers_[next]);
      moved = true;
      left -= fibers_[next].done;
    }
    if (!moved && !held && left > 0) {
      if (copies_.empty()) broken("deadlock: every thread that is left waits");
      do_a_copy();
    }
  }
  if (!copies_.empty()) broken("a block has left before its copies came");
}

// Runs `body(lane)` in every thread of every cluster, one cluster after the other.
inline void emulate(const LaunchSize& size, uint64_t seed, const std::function<void(Cluster::Lane&)>& body) {
  if (size.threads % kWarp != 0 || size.threads * size.ranks > 4096) broken("threads: no such launch");
  for (int index = 0; index < size.clusters; ++index) {
    Cluster(size, index, seed + uint64_t(index), body).run();
  }
}

}  // namespace testing
