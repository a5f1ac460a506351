#include "cpu/common/parallel.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

namespace d2net::cpu::detail {
namespace {

// Spins until `ready` is true, but not for long: about 50 us on x86. With sched_yield instead, the second thread got
// hardly any part of work that takes a fraction of a millisecond.
template <typename Ready>
void spin(Ready&& ready) {
  for (int i = 0; i < 2000 && !ready(); ++i) {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }
}

// One call of run_chunks. Workers hold it by shared_ptr, so one that wakes late finds no chunk left, not freed memory.
struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t chunks;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> finished{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // written by whoever sets `failed`, read after all chunks have finished
  std::mutex mutex;
  std::condition_variable done;

  void work() {
    for (int64_t chunk; (chunk = next.fetch_add(1)) < chunks;) {
      try {
        if (!failed.load()) body(context, chunk);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
      if (finished.fetch_add(1) + 1 == chunks) {
        std::lock_guard<std::mutex> lock(mutex);
        done.notify_one();
      }
    }
  }

  void wait() {
    // The last chunk usually ends soon: spin before sleeping.
    spin([&] { return finished.load() == chunks; });
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [&] { return finished.load() == chunks; });
  }
};

class Pool {
 public:
  // Offers `job` to up to `helpers` workers. False when the pool is serving another caller.
  bool offer(const std::shared_ptr<Job>& job, int helpers) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || job_) return false;
    try {
      for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
      // The system gives no more threads: the existing ones and the caller do the work.
    }
    job_ = job;
    wanted_ = helpers;
    posted_.fetch_add(1);
    const int asleep = std::min(asleep_, helpers);
    lock.unlock();
    // Waking a worker costs the caller microseconds, so no more are woken than are wanted.
    for (int i = 0; i < asleep; ++i) wake_.notify_one();
    return true;
  }

  void retract() {
    std::lock_guard<std::mutex> lock(mutex_);
    job_.reset();
    wanted_ = 0;
  }

 private:
  void serve() {
    int64_t seen = 0;  // jobs that were posted when this worker took its last
    for (;;) {
      // Operators are called one after another: spin for the next job before sleeping, as waking up takes longer than
      // many jobs.
      spin([&] { return posted_.load() != seen; });
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        wake_.wait(lock, [&] { return job_ && wanted_ > 0; });
        --asleep_;
        --wanted_;
        job = job_;
        seen = posted_.load();
      }
      job->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  std::atomic<int64_t> posted_{0};  // jobs so far
  int wanted_ = 0;
  int asleep_ = 0;
  int workers_ = 0;
};

std::atomic<Pool*> pool{nullptr};

// Never destroyed: its detached workers may outlive every static object.
Pool& the_pool() {
  Pool* current = pool.load();
  if (current != nullptr) return *current;
  static std::mutex making;
  std::lock_guard<std::mutex> lock(making);
  if (pool.load() == nullptr) {
#if !defined(_WIN32)
    // Threads do not survive a fork, and its mutex may have been held: the child starts with a new pool.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)registered;
#endif
    pool.store(new Pool);
  }
  return *pool.load();
}

}  // namespace

void run_chunks(int64_t chunks, int threads, void (*body)(void*, int64_t), void* context) {
  auto job = std::make_shared<Job>();
  job->body = body;
  job->context = context;
  job->chunks = chunks;
  const int helpers = int(std::min<int64_t>(threads, chunks)) - 1;
  Pool& mine = the_pool();
  // If the pool is busy (another Python thread, or a body that calls parallel_for), the caller does all the work.
  const bool offered = helpers > 0 && mine.offer(job, helpers);
  job->work();
  if (offered) {
    job->wait();
    mine.retract();
  }
  if (job->error) std::rethrow_exception(job->error);
}

}  // namespace d2net::cpu::detail
