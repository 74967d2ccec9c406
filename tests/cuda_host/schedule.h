// How a block's threads run on the host: all at once on host threads, or one at a time in a chosen order on fibers.
#pragma once
#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "counters.h"

namespace host {

enum class Order { threads, forward, reverse, warps };

struct Settings {
  Order order = Order::forward;
  int64_t only_block_from_end = -1;  // run just this block, 0 the last (of x; all of y): for tensors of many gigabytes
};
inline Settings settings;
inline std::atomic<bool> trapped = false;  // a kernel called fail()

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Block {
  uint3 index{};
  dim3 dim, grid;
  std::unique_ptr<char, Free> shared;
  int threads() const { return static_cast<int>(dim.x * dim.y * dim.z); }
};
inline Block block;

// A barrier that `expected` threads meet; on fibers, that many have to have arrived before any goes on.
struct Meeting {
  explicit Meeting(int expected) : expected(expected), threads(expected) {}
  int expected, arrived = 0;
  uint64_t generation = 0;
  std::barrier<> threads;
};

struct Warp {
  struct Parts {
    uint32_t of[32][6];  // by lane
  };
  explicit Warp(int lanes) : meeting(lanes) {}
  Meeting meeting;
  uint64_t exchange[32];  // of shuffles
  Parts parts[2];         // of matrix instructions, mma.h
};

// 16 bytes under way to shared memory, mma.h.
struct Copy {
  void* to;
  uint4 data;
};
inline constexpr uint4 kUnderWay{~0u, ~0u, ~0u, ~0u};  // NaN in every format

struct Thread {
  uint3 index{};
  int linear = 0;
  AccessLog log;
  std::deque<std::vector<Copy>> copies;  // by group, the oldest first, the last still open
  uint64_t exchanges = 0;                // of matrix instructions
  // fibers only
  ucontext_t context;
  const Meeting* waiting = nullptr;
  uint64_t until = 0;
  bool finished = false;
};
inline thread_local Thread* current_thread = nullptr;
inline Thread& thread() { return *current_thread; }

inline std::unique_ptr<Meeting> block_meeting;
inline std::vector<std::unique_ptr<Warp>> warps;
inline ucontext_t scheduler;
inline const std::function<void()>* kernel_body = nullptr;

inline void count_access(Space space, Access access, const void* p, size_t size, const Site& site) {
  if (counting) thread().log.add(space, access, p, size, site);
}

inline int lane() { return thread().linear % 32; }
inline Warp& this_warp() { return *warps[thread().linear / 32]; }

inline void meet(Meeting& meeting) {
  if (settings.order == Order::threads) return meeting.threads.arrive_and_wait();
  Thread& me = thread();
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    me.waiting = &meeting;
    me.until = meeting.generation + 1;
  }
  swapcontext(&me.context, &scheduler);  // also the last to arrive: each runs only up to the barrier
}
inline void block_barrier() { meet(*block_meeting); }
inline void warp_barrier() { meet(this_warp().meeting); }

inline void run_kernel() {
  thread().copies.assign(1, {});
  (*kernel_body)();
}

inline void fiber_main() {
  run_kernel();
  thread().finished = true;
  swapcontext(&thread().context, &scheduler);
}

inline void run_on_fibers(std::vector<Thread>& threads) {
  constexpr size_t kStack = 1 << 16;
  static std::vector<std::unique_ptr<char[]>> stacks;  // kept: most of a launch's time would go into new ones
  while (stacks.size() < threads.size()) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStack));
  for (Thread& t : threads) {
    t.finished = false;
    t.waiting = nullptr;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks[t.linear].get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, fiber_main, 0);
  }
  const int count = static_cast<int>(threads.size());
  const auto pass = [&](int first, int end) {  // each thread that can go on does, once; whether there was one
    bool moved = false;
    for (int i = first; i < end; ++i) {
      Thread& t = threads[settings.order == Order::reverse ? count - 1 - i : i];
      if (t.finished || (t.waiting && t.waiting->generation < t.until)) continue;
      t.waiting = nullptr;
      moved = true;
      current_thread = &t;
      swapcontext(&scheduler, &t.context);
    }
    return moved;
  };
  for (bool moved = true; moved;) {
    moved = false;
    if (settings.order == Order::warps)
      for (int first = 0; first < count; first += 32)
        while (pass(first, std::min(first + 32, count))) moved = true;
    else
      moved = pass(0, count);
  }
  for (const Thread& t : threads)
    if (!t.finished)
      throw std::logic_error("deadlock: some threads of a block left the kernel, others wait at a barrier");
}

constexpr int kMostShared = 99 * 1024;  // of a block, on the targets that have the least of it from sm_80 on

inline void check_launch(const char* name, dim3 grid, dim3 dim, int shared_bytes) {
  const uint64_t threads = static_cast<uint64_t>(dim.x) * dim.y * dim.z;
  const bool fits = threads >= 1 && threads <= 1024 && dim.z <= 64 && grid.x >= 1 && grid.x <= 2147483647u &&
                    grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 && shared_bytes <= kMostShared;
  if (!fits)
    throw std::runtime_error(std::string(name) + ": no GPU launches a grid of " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " with blocks of " + std::to_string(threads) + " threads and " +
                             std::to_string(shared_bytes) + " bytes");
}

inline void fresh_block(dim3 grid, dim3 dim, int shared_bytes, uint3 index) {
  block.index = index;
  block.dim = dim;
  block.grid = grid;
  block.shared.reset(shared_bytes ? static_cast<char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16))
                                  : nullptr);
  for (int i = 0; i + 4 <= shared_bytes; i += 4) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::memcpy(block.shared.get() + i, &nan, 4);
  }
}

// Calls body once for each CUDA thread of each block.
inline void run(const char* name, dim3 grid, dim3 dim, int shared_bytes, const std::function<void()>& body) {
  kernel_body = &body;
  block.dim = dim;
  const int count = block.threads();
  std::vector<Thread> threads(count);
  for (int i = 0; i < count; ++i) {
    threads[i].linear = i;
    threads[i].index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
  }
  block_meeting = std::make_unique<Meeting>(count);
  warps.clear();
  for (int first = 0; first < count; first += 32) warps.push_back(std::make_unique<Warp>(std::min(32, count - first)));
  KernelCounters& counters = begin_counting(name, grid, dim, shared_bytes);

  std::vector<uint3> blocks;
  const unsigned first_x =
      settings.only_block_from_end < 0 ? 0 : grid.x - 1 - static_cast<unsigned>(settings.only_block_from_end);
  const unsigned end_x = settings.only_block_from_end < 0 ? grid.x : first_x + 1;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = first_x; x < end_x; ++x) blocks.push_back({x, y, z});

  const auto end_of_block = [&] { counters.add_block(threads, block.shared.get()); };
  if (settings.order != Order::threads) {
    for (const uint3 index : blocks) {
      fresh_block(grid, dim, shared_bytes, index);
      run_on_fibers(threads);
      end_of_block();
    }
    return;
  }
  std::vector<std::thread> host_threads;
  size_t next = 0;
  const auto begin_next = [&]() noexcept {  // by the last thread of a block to finish, while the others wait
    if (next > 0) end_of_block();
    if (next < blocks.size()) fresh_block(grid, dim, shared_bytes, blocks[next]);
    ++next;
  };
  std::barrier between_blocks(count, begin_next);
  for (int i = 0; i < count; ++i)
    host_threads.emplace_back([&, i] {
      current_thread = &threads[i];
      between_blocks.arrive_and_wait();
      for (size_t b = 0; b < blocks.size(); ++b) {
        run_kernel();
        between_blocks.arrive_and_wait();
      }
    });
  for (std::thread& t : host_threads) t.join();
}

}  // namespace host
