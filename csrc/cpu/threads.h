// A team of threads works on tasks; one that has none of its own helps with parts of the others'. No torch in here.
//
// On a shared machine cores differ in speed from one second to the next, and one image makes few tasks: with whole tasks
// a thread, one of them waits. Who computes a part changes nothing in how: results are the same bits.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace cnnfast::cpu {

class Team;

// The thread that runs a task, as the task sees it.
class Worker {
 public:
  // part(k) for each k in [0, count), in any order, on this thread and on those that are idle. Returns when all are done,
  // or throws what a part on this thread threw; what one on another thread throws ends that thread's work().
  template <class F>
  void each_part(int64_t count, const F& part) const {
    share(count, [](const void* f, int64_t k) { (*static_cast<const F*>(f))(k); }, &part);
  }

 private:
  friend class Team;
  Worker(Team& team, int64_t seat) : team_(team), seat_(seat) {}
  void share(int64_t count, void (*run)(const void*, int64_t), const void* part) const;

  Team& team_;
  int64_t seat_;
};

class Team {
 public:
  Team(int64_t tasks, int64_t threads);

  int64_t size() const { return static_cast<int64_t>(seats_.size()); }

  // What the thread on this seat does: task(worker, i) for those of its share, in order, so that from one op to the next a
  // thread reads the rows that it has written itself, from its own L2; then tasks of the others' shares. Every seat is
  // worked once, on threads of their own or one after the other.
  template <class F>
  void work(int64_t seat, const F& task) {
    for (int64_t turn = 0; turn < size(); ++turn) {
      const int64_t whose = (seat + turn) % size(), last = first_task(whose + 1);
      for (int64_t i; (i = seats_[whose].next_task.fetch_add(1, std::memory_order_relaxed)) < last;) {
        const Finally finished{[this] { unfinished_.fetch_sub(1, std::memory_order_acq_rel); }};
        task(Worker(*this, seat), i);
      }
    }
  }

  // Then: parts of the tasks that other threads still have, until there are none.
  void help(int64_t seat);

 private:
  friend class Worker;

  template <class F>
  struct Finally {
    F f;
    ~Finally() { f(); }
  };
  template <class F>
  Finally(F) -> Finally<F>;

  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  // Parts that a worker lets others help with, in shares: a seat begins with the same one each time, for its L2's sake.
  struct Job {
    static constexpr int64_t kShares = 8;
    void (*run)(const void*, int64_t);
    const void* part;
    int64_t count, shares;
    Counter next[kShares];

    int64_t first_part(int64_t share) const { return share * count / shares; }
    void take_parts(int64_t first_share);
  };
  struct alignas(64) Seat {
    std::atomic<int64_t> next_task{0};
    alignas(64) std::atomic<Job*> job{nullptr};
    std::atomic<int64_t> helpers{0};  // that may be looking at *job
  };

  int64_t first_task(int64_t seat) const { return seat * tasks_ / size(); }
  int64_t shares() const { return std::min(size(), Job::kShares); }
  int64_t share_of(int64_t seat) const { return seat * shares() / size(); }
  bool help_at(Seat& seat, int64_t own);

  std::vector<Seat> seats_;
  int64_t tasks_;
  alignas(64) std::atomic<int64_t> unfinished_;
};

}  // namespace cnnfast::cpu
