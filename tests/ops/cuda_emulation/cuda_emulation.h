// The part of CUDA that ops/csrc/cuda uses, on the CPU, for tests without a GPU.
//
// A launch runs one block after another. The threads of a block are fibers, which hand over to each
// other at barriers and shuffles only: nothing runs at the same time, so results are reproducible,
// and where a barrier is missing they depend on the order in which the fibers get their turn. So
// MMVIM_EMULATED_ORDER=reverse turns that order round, =warps lets each warp run as far as it can
// before the next one moves, and shared memory starts as NaN.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define MMVIM_SHARED(name) float4* name = reinterpret_cast<float4*>(emulated::block.shared)

struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulated {

struct Index {
  unsigned x;
};

struct Fiber {
  ucontext_t context;
  jmp_buf point;
  char* stack = nullptr;
  bool started, done;
  int waits;             // for: 0 nothing, 1 its warp, 2 the block
  uint64_t turn;         // that it waits for the end of
  float value;           // in a shuffle
};

constexpr size_t kStack = 256 * 1024;
constexpr int64_t kSharedBytes = 227 * 1024;    // what a block of an H100 may have

struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint64_t> warp_turns;
  std::vector<int> warp_arrived;
  uint64_t turn;
  int arrived, size;
  Fiber* current;
  ucontext_t scheduler;
  jmp_buf point;
  char* shared = nullptr;
  std::function<void()> body;
};

inline thread_local Block block;
inline thread_local Index thread_index, block_index, block_size;

// Switches cost a system call with ucontext alone, so that serves the first entry only; sanitizers
// need to be told of every switch.
inline void to_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake;
  Fiber* self = block.current;
  __sanitizer_start_switch_fiber(self->done ? nullptr : &fake, block.scheduler.uc_stack.ss_sp,
                                 block.scheduler.uc_stack.ss_size);
  swapcontext(&self->context, &block.scheduler);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  if (!_setjmp(block.current->point)) _longjmp(block.point, 1);
#endif
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  block.scheduler.uc_stack.ss_sp = const_cast<void*>(bottom);
  block.scheduler.uc_stack.ss_size = size;
#endif
  block.body();
  block.current->done = true;
  to_scheduler();
}

inline void resume(Fiber& fiber) {
  block.current = &fiber;
  thread_index.x = unsigned(&fiber - block.fibers.data());
#if defined(__SANITIZE_ADDRESS__)
  void* fake;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
  swapcontext(&block.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  if (_setjmp(block.point)) return;
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  setcontext(&fiber.context);
#endif
}

inline bool ready(const Fiber& fiber) {
  size_t warp = size_t(&fiber - block.fibers.data()) / 32;
  if (fiber.done) return false;
  if (fiber.waits == 1) return block.warp_turns[warp] != fiber.turn;
  return fiber.waits == 0 || block.turn != fiber.turn;
}

inline void wait(int what, int members, int& arrived, uint64_t& turn) {
  Fiber& self = *block.current;
  if (++arrived == members) {
    arrived = 0;
    turn++;
    return;
  }
  self.waits = what, self.turn = turn;
  to_scheduler();
  self.waits = 0;
}

inline void barrier() { wait(2, block.size, block.arrived, block.turn); }
inline void warp_barrier() {
  size_t warp = thread_index.x / 32;
  wait(1, std::min(32, block.size - int(warp) * 32), block.warp_arrived[warp],
       block.warp_turns[warp]);
}

inline void run_block(int threads, size_t shared_bytes) {
  const char* order = std::getenv("MMVIM_EMULATED_ORDER");
  const bool reversed = order != nullptr && !std::strcmp(order, "reverse");
  const bool by_warps = order != nullptr && !std::strcmp(order, "warps");
  block.size = threads, block.turn = 0, block.arrived = 0;
  if (int(block.fibers.size()) < threads) block.fibers.resize(threads);
  block.warp_turns.assign(size_t(threads + 31) / 32, 0);
  block.warp_arrived.assign(size_t(threads + 31) / 32, 0);
  std::vector<float4> shared((shared_bytes + 15) / 16 + 1);
  std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(float4));
  block.shared = reinterpret_cast<char*>(shared.data());
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = block.fibers[i];
    if (fiber.stack == nullptr)
      fiber.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    fiber.started = fiber.done = false, fiber.waits = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack, fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = threads; left > 0;) {
    bool moved = false;
    for (int k = 0; k < threads; k++) {
      Fiber& fiber = block.fibers[reversed ? threads - 1 - k : k];
      if (!ready(fiber)) continue;
      moved = true;
      resume(fiber);
      left -= fiber.done;
      if (by_warps && (k % 32 == 31 || k + 1 == threads)) k = k / 32 * 32 - 1;    // once more
    }
    if (!moved) {
      std::fputs("emulation: threads of a block wait at different barriers\n", stderr);
      std::abort();
    }
  }
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size

inline void __syncthreads() { emulated::barrier(); }
inline void __syncwarp() { emulated::warp_barrier(); }

// 16-bit floating point: what nvcc's headers offer, by bits.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
  int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float y = exponent == 31 ? (fraction ? NAN : INFINITY)
      : exponent == 0 ? std::ldexp(float(fraction), -24)
      : std::ldexp(float(fraction + 1024), exponent - 25);
  return x.bits & 0x8000 ? -y : y;
}
inline __half __float2half(float x) {
  uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  float y = std::fabs(x);
  if (y != y) return {0x7fff};
  if (y >= 65520.f) return {uint16_t(sign | 0x7c00)};
  int exponent = y < 0x1p-14f ? -14 : std::ilogb(y);
  int value = int(std::nearbyint(std::ldexp(y, 10 - exponent)));    // 1024 … 2048, or below
  return {uint16_t(sign | (value + (exponent + 14) * 1024))};
}

namespace mmvim {

using std::exp2;
using std::fabs;
inline float reciprocal(float x) { return 1 / x; }

inline float shuffle_xor(float x, int mask) {
  auto& self = *emulated::block.current;
  self.value = x;
  emulated::warp_barrier();
  float other = emulated::block.fibers[emulated::thread_index.x ^ unsigned(mask)].value;
  emulated::warp_barrier();      // before anybody gives the next value
  return other;
}

template <class... P, class... Q>
const char* launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, int64_t,
                   const Q&... arguments) {
  if (shared_bytes > emulated::kSharedBytes) return "too much shared memory";
  if (threads > 384) return "more threads than the launch bounds";
  emulated::block_size.x = unsigned(threads);
  emulated::block.body = [&] { kernel(arguments...); };
  for (int64_t i = 0; i < blocks; i++) {
    emulated::block_index.x = unsigned(i);
    emulated::run_block(threads, size_t(shared_bytes));
  }
  return nullptr;
}

inline const char* use_device(int64_t) { return nullptr; }

inline const char* device_limits(int64_t, int64_t* limits) {
  limits[0] = 2, limits[1] = emulated::kSharedBytes;
  return nullptr;
}

}  // namespace mmvim
