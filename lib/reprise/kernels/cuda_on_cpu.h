// Enough of CUDA C++ for g++ to run a kernel on the CPU: for tests and for lessons, not for speed.
//
// Blocks are shared out among OpenMP threads. The CUDA threads of one block run on one of them: one after the other,
// or, where the kernel has barriers or shuffles (NEEDS_FIBERS), as fibers that stop at a barrier until all are there.
// What this cannot show is listed in README.md: races within a block, divergence, the memory model.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

using std::ceil; using std::exp; using std::fabs; using std::floor; using std::fmax; using std::fmin; using std::isnan;
using std::log; using std::max; using std::min; using std::pow; using std::sqrt; using std::tanh;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __constant__ static const
// One block at a time runs on an OpenMP thread, so a thread's own memory is the block's shared memory.
#define __shared__ static thread_local
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(cuda_on_cpu::dynamic_shared)

struct dim3 { unsigned x, y, z; };
static thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
static constexpr int warpSize = 32;

// Half precision is for storage: to compute, a kernel converts to float.
struct __half {
    uint16_t bits;
    __half() = default;
    __half(float value) {
        uint32_t u; std::memcpy(&u, &value, 4);
        const uint32_t sign = (u >> 16) & 0x8000, size = u & 0x7fffffff;
        if (size > 0x7f800000) bits = 0x7e00 | sign;                          // NaN
        else if (size >= 0x477ff000) bits = 0x7c00 | sign;                    // rounds to infinity
        else if (size < 0x38800000) bits = sign | (uint16_t)std::lrint(std::fabs(value) * 0x1p24f);  // subnormal
        else bits = sign | (uint16_t)((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13);  // to nearest, ties to even
    }
    operator float() const {
        const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 0x3ff;
        if (exponent == 0) return (sign ? -1.0f : 1.0f) * fraction * 0x1p-24f;
        const uint32_t u = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13;
        float value; std::memcpy(&value, &u, 4);
        return value;
    }
};
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float value) {
        uint32_t u; std::memcpy(&u, &value, 4);
        bits = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
    operator float() const {
        const uint32_t u = (uint32_t)bits << 16;
        float value; std::memcpy(&value, &u, 4);
        return value;
    }
};

// Blocks do run at the same time, so an atomic has to be one here, too.
template <class T, class V> static inline T atomicAdd(T* address, V value) {
    T old;
    #pragma omp atomic capture
    { old = *address; *address += (T)value; }
    return old;
}
static inline int atomicCAS(int* address, int expected, int value) {
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
static inline int atomicMax(int* address, int value) {
    int old = *address;
    while (old < value && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}
template <class T> static inline T __ldg(const T* address) { return *address; }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

namespace cuda_on_cpu {
static thread_local char* dynamic_shared = nullptr;
static thread_local int current = 0;  // which thread of the block is running
static void become(int thread) {
    current = thread;
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
}

#ifdef NEEDS_FIBERS
#include <ucontext.h>
constexpr size_t STACK = 256 << 10;
enum State { READY, AT_WARP_BARRIER, AT_BLOCK_BARRIER, DONE };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    uint64_t offered;  // what a shuffle shows to the other lanes
};
static thread_local std::vector<Fiber> fibers;
static thread_local ucontext_t scheduler;
static thread_local void (*run_body)(void*);
static thread_local void* body_data;

static void wait_at(State barrier) {
    Fiber& me = fibers[current];
    me.state = barrier;
    swapcontext(&me.context, &scheduler);
}
static void fiber_main() {
    run_body(body_data);
    fibers[current].state = DONE;  // and on to uc_link, the scheduler
}
static bool all(int begin, int end, State state) {
    return std::all_of(fibers.begin() + begin, fibers.begin() + end,
                       [=](const Fiber& f) { return f.state == state || f.state == DONE; });
}
static bool release(int begin, int end, State barrier) {
    bool any = false;
    if (all(begin, end, barrier))
        for (int i = begin; i < end; ++i)
            if (fibers[i].state == barrier) { fibers[i].state = READY; any = true; }
    return any;
}
// Runs every thread of a block to its end; false if some wait at a barrier that the others will never reach.
template <class Body> static bool run_block(Body& body) {
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    if ((int)fibers.size() < threads) fibers.resize(threads);
    run_body = [](void* data) { (*static_cast<Body*>(data))(); };
    body_data = &body;
    for (int i = 0; i < (int)fibers.size(); ++i) {
        Fiber& f = fibers[i];
        f.state = i < threads ? READY : DONE;
        if (i >= threads) continue;
        if (!f.stack) f.stack.reset(new char[STACK]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = &scheduler;
        makecontext(&f.context, fiber_main, 0);
    }
    // Forwards and backwards in turns: a kernel that lacks a barrier does not get away with a lucky order.
    for (bool backwards = false;; backwards = !backwards) {
        for (int i = 0; i < threads; ++i) {
            const int thread = backwards ? threads - 1 - i : i;
            if (fibers[thread].state != READY) continue;
            become(thread);
            swapcontext(&scheduler, &fibers[thread].context);
        }
        if (all(0, threads, DONE)) return true;
        bool any = false;
        for (int warp = 0; warp < threads; warp += warpSize)
            any |= release(warp, std::min(warp + warpSize, threads), AT_WARP_BARRIER);
        if (!any && !release(0, threads, AT_BLOCK_BARRIER)) return false;
    }
}
#else
template <class Body> static bool run_block(Body& body) {
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    for (int i = 0; i < threads; ++i) { become(i); body(); }
    return true;
}
#endif

enum { FINE = 0, STUCK = -1 };  // or the number, from 1, of an argument of the wrong size

template <class... A, size_t... I>
static int run(void (*kernel)(A...), void** arguments, const size_t* sizes, const unsigned* shape, size_t shared_bytes,
               int cpu_threads, std::index_sequence<I...>) {
    const size_t wanted[] = {sizeof(A)..., 0};
    for (size_t i = 0; i < sizeof...(A); ++i)
        if (sizes[i] != wanted[i]) return (int)i + 1;
    const long long blocks = (long long)shape[0] * shape[1] * shape[2];
    int result = FINE;
    #pragma omp parallel for schedule(static) num_threads(cpu_threads)
    for (long long b = 0; b < blocks; ++b) {
        gridDim = {shape[0], shape[1], shape[2]};
        blockDim = {shape[3], shape[4], shape[5]};
        blockIdx = {(unsigned)(b % shape[0]), (unsigned)(b / shape[0] % shape[1]), (unsigned)(b / shape[0] / shape[1])};
        std::unique_ptr<char[]> shared(new char[shared_bytes]);
        dynamic_shared = shared.get();
        auto body = [&] { kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...); };
        if (!run_block(body)) {
            #pragma omp atomic write
            result = STUCK;
        }
    }
    return result;
}
template <class... A> static int run(void (*kernel)(A...), void** arguments, const size_t* sizes, const unsigned* shape,
                                     size_t shared_bytes, int cpu_threads) {
    return run(kernel, arguments, sizes, shape, shared_bytes, cpu_threads, std::index_sequence_for<A...>{});
}
}  // namespace cuda_on_cpu

#ifdef NEEDS_FIBERS
static inline void __syncthreads() { cuda_on_cpu::wait_at(cuda_on_cpu::AT_BLOCK_BARRIER); }
static inline void __syncwarp(unsigned = 0xffffffffu) { cuda_on_cpu::wait_at(cuda_on_cpu::AT_WARP_BARRIER); }
// All lanes of the warp that still run must take part; a lane outside the warp answers with one's own value.
template <class T> static T shuffle_from(int lane, T value) {
    using namespace cuda_on_cpu;
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle exchanges 8 bytes at most");
    const int me = current, source = me / warpSize * warpSize + lane;
    const bool inside = lane >= 0 && lane < warpSize && source < (int)(blockDim.x * blockDim.y * blockDim.z);
    std::memcpy(&fibers[me].offered, &value, sizeof(T));
    __syncwarp();
    if (inside) std::memcpy(&value, &fibers[source].offered, sizeof(T));
    __syncwarp();
    return value;
}
template <class T> static T __shfl_sync(unsigned, T v, int lane) { return shuffle_from(lane, v); }
template <class T> static T __shfl_down_sync(unsigned, T v, int by) { return shuffle_from(cuda_on_cpu::current % 32 + by, v); }
template <class T> static T __shfl_up_sync(unsigned, T v, int by) { return shuffle_from(cuda_on_cpu::current % 32 - by, v); }
template <class T> static T __shfl_xor_sync(unsigned, T v, int mask) { return shuffle_from(cuda_on_cpu::current % 32 ^ mask, v); }
#endif
