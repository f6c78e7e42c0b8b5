// Work that is done by all threads together, one step after another, in one parallel region.
#pragma once

#include <atomic>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "parallel.h"

namespace mmvim {
namespace {

// A step is a number of tasks, and begins when those of the step before are done. Threads take the
// next task that is left, so that it does not matter how many there are or when they come.
class Steps {
 public:
  // `work` is called with the numbers of tasks, [0, tasks), in any order.
  void add(int64_t tasks, std::function<void(int64_t)> work) {
    if (tasks > 0) steps.emplace_back(tasks, std::move(work));
  }

  void run() {
    parallel_for(at::get_num_threads(), [&](int64_t, int64_t) {
      for (Step& step : steps) {
        for (int64_t i; (i = step.next.fetch_add(1, std::memory_order_relaxed)) < step.tasks;) {
          attempt(step, i);
          step.done.fetch_add(1, std::memory_order_release);
        }
        wait(step);
      }
    });
    if (error) std::rethrow_exception(error);
  }

 private:
  struct Step {
    Step(int64_t tasks, std::function<void(int64_t)> work) : tasks(tasks), work(std::move(work)) {}
    const int64_t tasks;
    const std::function<void(int64_t)> work;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  std::deque<Step> steps;
  std::mutex mutex;
  std::exception_ptr error;

  // A thread that left its task would keep the others waiting.
  void attempt(const Step& step, int64_t task) {
    try {
      step.work(task);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }

  // For what the other threads still have: a short time, unless they have lost their processors.
  static void wait(const Step& step) {
    for (int i = 0; step.done.load(std::memory_order_acquire) < step.tasks; i++) {
      if (i > 2000) std::this_thread::yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }
};

}  // namespace
}  // namespace mmvim
