// Threads of the OpenMP runtime that torch has loaded.
#pragma once
#include <ATen/Parallel.h>

#include <atomic>
#include <exception>

// Clang's own OpenMP needs LLVM's runtime, which would not share its threads with torch's libgomp,
// and each would take the other's functions for its own. So libgomp is called as GCC calls it;
// build_cpp.py sets MMVIM_GOMP where that is to be done.
#if defined(MMVIM_GOMP)
extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}
#endif

namespace mmvim {

// Call f(begin, end) on parts of [0, count), one for each thread.
template <class Function> void parallel_for(int64_t count, const Function& f) {
#if defined(MMVIM_GOMP)
  if (count > 1 && at::get_num_threads() > 1 && !at::in_parallel_region()) {
    struct Work {
      const int64_t count;
      const Function& f;
      std::atomic_flag failed = ATOMIC_FLAG_INIT;
      std::exception_ptr error;
    } work{count, f};
    GOMP_parallel([](void* data) {
      Work& work = *static_cast<Work*>(data);
      int64_t threads = omp_get_num_threads(), part = (work.count + threads - 1) / threads;
      int64_t begin = omp_get_thread_num() * part, end = begin + part;
      if (begin >= work.count) return;
      try {
        work.f(begin, end < work.count ? end : work.count);
      } catch (...) {
        if (!work.failed.test_and_set()) work.error = std::current_exception();
      }
    }, &work, 0, 0);
    if (work.error) std::rethrow_exception(work.error);
    return;
  }
#endif
  at::parallel_for(0, count, 1, f);     // in one thread where the compiler has no OpenMP
}

}  // namespace mmvim
