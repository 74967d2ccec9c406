#include "threads.h"

#include <thread>

namespace cnnfast::cpu {

namespace {

// Waits for what another thread is about to do: first without leaving the core, then letting others have it.
class Wait {
 public:
  void once() {
    if (++turns_ > kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

 private:
  static constexpr int kSpins = 200;  // some 10 us
  int turns_ = 0;
};

}  // namespace

void Worker::share(int64_t count, void (*run)(const void*, int64_t), const void* part) const {
  if (count <= 1 || team_.size() == 1) {
    for (int64_t k = 0; k < count; ++k) run(part, k);
    return;
  }
  Team::Job job{run, part, count, team_.shares(), {}};
  for (int64_t s = 0; s < job.shares; ++s) job.next[s].value.store(job.first_part(s), std::memory_order_relaxed);
  Team::Seat& seat = team_.seats_[static_cast<size_t>(seat_)];
  // The job may not end before those who look at it have left. A helper registers, then looks whether there is a job;
  // here it is withdrawn, then the helpers are counted: sequentially consistent, so that one of the two sees the other.
  const Team::Finally withdraw{[&] {
    seat.job.store(nullptr);
    for (Wait wait; seat.helpers.load() > 0;) wait.once();
  }};
  seat.job.store(&job);
  job.take_parts(team_.share_of(seat_));
}

Team::Team(int64_t tasks, int64_t threads)
    : seats_(static_cast<size_t>(std::max<int64_t>(threads, 1))), tasks_(tasks), unfinished_(tasks) {
  for (int64_t s = 0; s < size(); ++s) seats_[s].next_task.store(first_task(s), std::memory_order_relaxed);
}

void Team::Job::take_parts(int64_t first_share) {
  for (int64_t turn = 0; turn < shares; ++turn) {
    const int64_t share = (first_share + turn) % shares, last = first_part(share + 1);
    for (int64_t k; (k = next[share].value.fetch_add(1, std::memory_order_relaxed)) < last;) run(part, k);
  }
}

bool Team::help_at(Seat& seat, int64_t own) {
  if (!seat.job.load(std::memory_order_relaxed)) return false;
  const Finally leave{[&] { seat.helpers.fetch_sub(1); }};
  seat.helpers.fetch_add(1);
  Job* job = seat.job.load();
  if (!job) return false;
  job->take_parts(share_of(own));
  seat.job.store(nullptr);  // nothing is left of it: no other need look
  return true;
}

void Team::help(int64_t own) {
  for (Wait wait; unfinished_.load(std::memory_order_acquire) > 0; wait.once())
    for (int64_t turn = 1; turn < size(); ++turn)
      if (help_at(seats_[(own + turn) % size()], own)) wait = Wait();
}

}  // namespace cnnfast::cpu
