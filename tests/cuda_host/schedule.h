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
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "counters.h"

namespace host {

enum class Order { threads, forward, reverse, warps };

struct Settings {
  Order order = Order::forward;
  int multiprocessors = 132;         // of the GPU that kernels are launched for
  bool clusters = false;             // whether it has thread-block clusters: a test asks for those
  int64_t only_block_from_end = -1;  // run just this block, 0 the last (of x; all of y): for tensors of many gigabytes
};
inline Settings settings;
inline std::atomic<bool> trapped = false;  // a kernel called fail()

struct Free {
  void operator()(void* p) const { std::free(p); }
};

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

struct Block {
  explicit Block(int threads) : meeting(threads) {
    for (int first = 0; first < threads; first += 32)
      warps.push_back(std::make_unique<Warp>(std::min(32, threads - first)));
  }
  uint3 index{};
  std::unique_ptr<char, Free> shared;
  int shared_bytes = 0;
  std::atomic<int> running = 0;  // threads that have not left the kernel
  Meeting meeting;
  std::vector<std::unique_ptr<Warp>> warps;
};

// Blocks that run together: a cluster, of one block where a launch asks for no other.
struct Cluster {
  Cluster(int count, int threads) : meeting(count * threads) {
    for (int i = 0; i < count; ++i) blocks.push_back(std::make_unique<Block>(threads));
  }
  std::vector<std::unique_ptr<Block>> blocks;
  Meeting meeting;
};
inline std::unique_ptr<Cluster> cluster;
inline dim3 block_dim, grid_dim;

// 16 bytes under way to shared memory, mma.h.
struct Copy {
  void* to;
  uint4 data;
};
inline constexpr uint4 kUnderWay{~0u, ~0u, ~0u, ~0u};  // NaN in every format

struct Thread {
  uint3 index{};
  int linear = 0;  // in its block
  Block* block = nullptr;
  int rank = 0;  // of its block in the cluster
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
inline Block& block() { return *thread().block; }

inline ucontext_t scheduler;
inline const std::function<void()>* kernel_body = nullptr;

inline void count_access(Space space, Access access, const void* p, size_t size, const Site& site) {
  if (counting) thread().log.add(space, access, p, size, site);
}

inline int lane() { return thread().linear % 32; }
inline Warp& this_warp() { return *block().warps[thread().linear / 32]; }

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
inline void block_barrier() { meet(block().meeting); }
inline void cluster_barrier() { meet(cluster->meeting); }
inline void warp_barrier() { meet(this_warp().meeting); }

// NaN, in every format, is what a kernel finds where nothing was written, and what others of its cluster find after it.
inline void fill_shared(Block& block) {
  if (block.shared_bytes) std::memset(block.shared.get(), 0xff, block.shared_bytes);
}

inline void run_kernel() {
  thread().copies.assign(1, {});
  (*kernel_body)();
  if (--block().running == 0) fill_shared(block());
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
  for (size_t i = 0; i < threads.size(); ++i) {
    Thread& t = threads[i];
    t.finished = false;
    t.waiting = nullptr;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks[i].get();
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

constexpr int kMostShared = 99 * 1024;            // of a block, on the targets that have the least of it from sm_80 on
constexpr int kMostSharedOfCluster = 227 * 1024;  // sm_90's and sm_100's: clusters are for these
constexpr int kMostBlocksOfCluster = 8;           // that every such GPU takes

inline void check_launch(const char* name, dim3 grid, dim3 dim, int shared_bytes, int cluster_size = 1) {
  const int most_shared = cluster_size > 1 ? kMostSharedOfCluster : kMostShared;
  const uint64_t threads = static_cast<uint64_t>(dim.x) * dim.y * dim.z;
  const bool fits = threads >= 1 && threads <= 1024 && dim.z <= 64 && grid.x >= 1 && grid.x <= 2147483647u &&
                    grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 && shared_bytes <= most_shared &&
                    cluster_size >= 1 && cluster_size <= kMostBlocksOfCluster && grid.x % cluster_size == 0;
  if (!fits)
    throw std::runtime_error(std::string(name) + ": no GPU launches a grid of " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " with blocks of " + std::to_string(threads) + " threads and " +
                             std::to_string(shared_bytes) + " bytes, in clusters of " + std::to_string(cluster_size));
}

inline void fresh_cluster(int shared_bytes, uint3 first) {
  for (unsigned i = 0; i < cluster->blocks.size(); ++i) {
    Block& block = *cluster->blocks[i];
    block.index = {first.x + i, first.y, first.z};
    void* memory = nullptr;  // exactly as large as asked for, so that ASan sees its end
    if (shared_bytes && posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
    block.shared.reset(static_cast<char*>(memory));
    block.shared_bytes = shared_bytes;
    block.running = static_cast<int>(block_dim.x * block_dim.y * block_dim.z);
    fill_shared(block);
  }
}

// Calls body once for each CUDA thread of each block.
inline void run(const char* name, dim3 grid, dim3 dim, int shared_bytes, const std::function<void()>& body,
                int cluster_size = 1) {
  kernel_body = &body;
  block_dim = dim;
  grid_dim = grid;
  const int count = static_cast<int>(dim.x * dim.y * dim.z);
  cluster = std::make_unique<Cluster>(cluster_size, count);
  std::vector<Thread> threads(cluster_size * count);
  for (int i = 0; i < cluster_size * count; ++i) {
    Thread& t = threads[i];
    t.linear = i % count;
    t.rank = i / count;
    t.block = cluster->blocks[t.rank].get();
    t.index = {t.linear % dim.x, t.linear / dim.x % dim.y, t.linear / dim.x / dim.y};
  }
  KernelCounters& counters = begin_counting(name, grid, dim, shared_bytes);

  std::vector<uint3> firsts;  // of each cluster the first block
  const unsigned first_x = settings.only_block_from_end < 0
                               ? 0
                               : grid.x - cluster_size - static_cast<unsigned>(settings.only_block_from_end);
  const unsigned end_x = settings.only_block_from_end < 0 ? grid.x : first_x + cluster_size;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = first_x; x < end_x; x += cluster_size) firsts.push_back({x, y, z});

  const auto end_of_cluster = [&] {
    for (int rank = 0; rank < cluster_size; ++rank)
      counters.add_block(std::span(threads).subspan(rank * count, count), cluster->blocks[rank]->shared.get());
  };
  if (settings.order != Order::threads) {
    for (const uint3 first : firsts) {
      fresh_cluster(shared_bytes, first);
      run_on_fibers(threads);
      end_of_cluster();
    }
    return;
  }
  std::vector<std::thread> host_threads;
  size_t next = 0;
  const auto begin_next = [&]() noexcept {  // by the last thread of a cluster to finish, while the others wait
    if (next > 0) end_of_cluster();
    if (next < firsts.size()) fresh_cluster(shared_bytes, firsts[next]);
    ++next;
  };
  std::barrier between_clusters(cluster_size * count, begin_next);
  for (Thread& t : threads)
    host_threads.emplace_back([&] {
      current_thread = &t;
      between_clusters.arrive_and_wait();
      for (size_t i = 0; i < firsts.size(); ++i) {
        run_kernel();
        between_clusters.arrive_and_wait();
      }
    });
  for (std::thread& t : host_threads) t.join();
}

}  // namespace host
