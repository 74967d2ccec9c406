// Drives csrc/cpu/threads.cpp without torch, for a sanitizer to watch. Usage: threads SCENARIO THREADS.
// Prints "ok", or one line that says what differed.
#include "cpu/threads.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>

using cnnfast::cpu::Team;
using cnnfast::cpu::Worker;
using Task = std::function<void(const Worker&, int64_t)>;

namespace {

void fail(const std::string& what) {
  std::puts(what.c_str());
  std::exit(1);
}

// All seats, each on a thread of its own; how many of them threw.
int run(int64_t tasks, int64_t threads, const Task& task) {
  Team team(tasks, threads);
  std::atomic<int> threw{0};
  std::vector<std::thread> pool;
  for (int64_t seat = 0; seat < threads; ++seat)
    pool.emplace_back([&, seat] {
      try {
        team.work(seat, task);
        team.help(seat);
      } catch (const std::runtime_error&) {
        ++threw;
      }
    });
  for (auto& thread : pool) thread.join();
  return threw;
}

// Two stages a task, the second of which reads all of the first: each part once, and nothing read before it is written.
void check_stages(int64_t threads, bool one_after_the_other) {
  for (int64_t tasks : {1, 2, 3, 7})
    for (int64_t parts : {0, 1, 2, 5, 40}) {
      std::vector<std::vector<int64_t>> first(tasks), second(tasks);
      const Task task = [&](const Worker& worker, int64_t i) {
        std::vector<int64_t> stage(parts, 0);  // of this task alone, and gone after it
        worker.each_part(parts, [&](int64_t k) { stage[k] += k + 1; });
        first[i] = stage;
        std::vector<int64_t> sums(parts, 0);
        worker.each_part(parts, [&](int64_t k) { sums[k] += std::accumulate(stage.begin(), stage.end(), k); });
        second[i] = sums;
      };
      if (one_after_the_other) {
        Team team(tasks, threads);
        for (int64_t seat = 0; seat < threads; ++seat) {
          team.work(seat, task);
          team.help(seat);
        }
      } else if (run(tasks, threads, task) != 0) {
        fail("a task threw");
      }
      for (int64_t i = 0; i < tasks; ++i) {
        if (static_cast<int64_t>(first[i].size()) != parts) fail("task " + std::to_string(i) + " did not run");
        for (int64_t k = 0; k < parts; ++k) {
          if (first[i][k] != k + 1) fail("a part of the first stage ran " + std::to_string(first[i][k]) + " times");
          if (second[i][k] != parts * (parts + 1) / 2 + k) fail("a part of the second stage read too early");
        }
      }
    }
}

// A part that throws, on whichever thread, ends the work of one thread and leaves none waiting.
void check_throw(int64_t threads) {
  for (int64_t bad = 0; bad < 20; ++bad) {
    const int threw = run(3, threads, [&](const Worker& worker, int64_t i) {
      worker.each_part(20, [&](int64_t k) {
        if (i == 1 && k == bad) throw std::runtime_error("part");
      });
    });
    if (threw != 1) fail(std::to_string(threw) + " threads threw");
  }
}

// One task, whose owner is slow in some stages and whose helpers are in the others: they do most of the parts of the
// former, and are waited for in the latter.
void check_help(int64_t threads) {
  constexpr int64_t kParts = 12;
  int by_owner = 0, by_others = 0;
  run(1, threads, [&](const Worker& worker, int64_t) {
    const auto owner = std::this_thread::get_id();
    for (int stage = 0; stage < 40; ++stage) {
      std::vector<int64_t> done(kParts, 0);
      worker.each_part(kParts, [&](int64_t k) {
        const bool own = std::this_thread::get_id() == owner;
        if (own == (stage % 2 == 0)) std::this_thread::sleep_for(std::chrono::microseconds(300));
        done[k] += own ? 1 : 2;
      });
      for (int64_t parts : done) {
        if (parts != 1 && parts != 2) fail("a part is missing");
        if (stage % 2 == 0) ++(parts == 1 ? by_owner : by_others);
      }
    }
  });
  if (by_others < by_owner) fail("nobody helped");
}

}  // namespace

int main(int, char** argv) {
  const std::string scenario = argv[1];
  const int64_t threads = std::atoi(argv[2]);
  for (int round = 0; round < 3; ++round) {
    if (scenario == "stages") check_stages(threads, false);
    if (scenario == "one thread") check_stages(threads, true);
    if (scenario == "throw") check_throw(threads);
    if (scenario == "help") check_help(threads);
  }
  std::puts("ok");
}
