// How a kernel's work is shared among threads, and its scratch memory. No torch here.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

namespace mmvim {

// How many tasks share `blocks` blocks of channels, so that all threads have the same to do.
inline int64_t splits(int64_t rows, int64_t blocks, int64_t threads) {
  if (rows >= 4 * threads) return 1;
  return std::clamp<int64_t>(threads / std::gcd(threads, rows), 1, blocks);
}

// Scratch memory of this thread, kept between calls: fresh pages would cost more than the work on
// a small input.
inline char* scratch(int64_t bytes) {
  struct Free { void operator()(char* p) const { std::free(p); } };
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    bytes = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
    if (!memory)
      throw std::runtime_error("out of memory: " + std::to_string(bytes)
                               + " bytes of scratch memory");
    size = bytes;
  }
  return memory.get();
}

// What walks along time, from the last of `length` steps to the first.
template <class Steps> Steps from_the_end(Steps s, int64_t length) {
  s.data += (length - 1) * s.time;
  s.time = -s.time;
  return s;
}

}  // namespace mmvim
