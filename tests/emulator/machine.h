// A GPU in one thread of a CPU, for kernels compiled as C++: every thread of a block is a fiber.
//
// The order in which warps run is random, and so is when an asynchronous copy, store or product happens: any time
// between its issue and the wait for it. Shared memory that a copy will write is filled with NaN when the copy is
// issued. A kernel that relies on more than what its barriers promise therefore gives other numbers under other
// seeds, or stops: when nothing more happens the state of all barriers is printed.
//
// The headers beside this one stand in for those of kernels/common/ that are made of PTX. What is not modelled:
// memory fences (all accesses are seen at once, in order), and how long anything takes.
#pragma once

#include <setjmp.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#define __CUDA_ARCH_FEAT_SM90_ALL
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __shared__ static  // of the one block that runs, where it is used
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::exp;
using std::fabs;
using std::fmax;
using std::log;
using std::log1p;
using std::max;
using std::min;
using std::tanh;

struct Index {
    unsigned x, y, z;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace machine {

constexpr unsigned CLUSTER = 2;  // blocks
constexpr unsigned WARP = 32, WARPGROUP_THREADS = 128;
constexpr size_t SHARED_BYTES = 227 * 1024, STACK_BYTES = 128 * 1024;

inline std::mt19937 random_numbers;
inline bool chance(unsigned percent) { return random_numbers() % 100 < percent; }

inline unsigned long progress = 0;  // counts whatever may let a waiting thread go on
[[noreturn]] void stop(const char* why);
void wait_for_change(const unsigned long& counter);

// --- what threads wait for ---

// An mbarrier: its phase ends when all arrivals and all bytes have come.
struct Barrier {
    int arrivals = 0, missing = 0;
    long bytes = 0;
    unsigned long phase = 0;

    void update() {
        if (missing < 0) stop("a barrier's phase has more arrivals than it waits for");
        if (missing == 0 && bytes == 0) {
            ++phase;
            missing = arrivals;
        }
        ++progress;
    }
};

// Where a number of threads meet.
struct Meeting {
    unsigned here = 0;
    unsigned long round = 0;

    void arrive(unsigned threads) {
        if (++here < threads) return;
        here = 0;
        ++round;
        ++progress;
    }
    void join(unsigned threads) {
        const unsigned long mine = round;
        arrive(threads);
        while (round == mine) wait_for_change(round);
    }
};

struct Warp {
    Meeting meeting;
    uint64_t values[2][WARP];  // of this exchange and the one before
    unsigned rest = 0;         // turns that it will not take
};

// A product of a warpgroup, once all its threads have issued it.
struct Product {
    uint64_t a = 0, b = 0;
    int add = 0;
    unsigned issued = 0;
    float* sums[WARPGROUP_THREADS];
    std::function<void(Product&)> run;
};
struct Warpgroup {
    std::deque<Product> products;
    unsigned long done = 0;

    void run_first() {
        if (products.empty() || products.front().issued < WARPGROUP_THREADS) return;
        products.front().run(products.front());
        products.pop_front();
        ++done;
        ++progress;
    }
};

struct Block {
    Index index{};
    unsigned char* shared = nullptr;
    std::map<uint32_t, Barrier> barriers;  // by address
    Meeting meetings[16];
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;

    Barrier& barrier(uint32_t address) {
        const auto found = barriers.find(address);
        if (found == barriers.end()) stop("there is no barrier at this address");
        return found->second;
    }
};

// --- threads ---

// cp.async, or the arrival at a barrier that follows all of a thread's earlier ones.
struct Copy {
    unsigned char* to;
    const void* from;  // null: zeros
    unsigned bytes;
    Barrier* arrival;
    unsigned long group;

    void run() const {
        if (arrival != nullptr) {
            --arrival->missing;
            arrival->update();
        } else if (from != nullptr) {
            memcpy(to, from, bytes);
        } else {
            memset(to, 0, bytes);
        }
        ++progress;
    }
};

// A box that the copy engine stores.
struct Store {
    std::function<void()> run;
    unsigned long group;
};

struct Thread {
    unsigned index;
    Block* block;
    bool started = false, ended = false;
    const unsigned long* watched = nullptr;  // while it is as it was seen, the thread has nothing to do
    unsigned long seen = 0;
    jmp_buf state;

    bool waits() const { return watched != nullptr && *watched == seen; }
    std::deque<Copy> copies;
    unsigned long copy_group = 0;
    std::vector<Store> stores;
    unsigned long store_group = 0;
    unsigned long products = 0;                   // issued
    std::vector<unsigned long> product_groups{};  // issued up to the end of each

    void run_first_copy() {
        const Copy copy = copies.front();
        copies.pop_front();
        copy.run();
    }
};

inline std::vector<Block> blocks;
inline std::vector<Meeting> clusters;
inline std::vector<Thread> threads;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of the threads
inline std::vector<std::function<void()>> loads;  // boxes on their way to shared memory
inline Thread* self;
inline jmp_buf scheduler;
inline std::function<void()> kernel;

inline Block& block() { return *self->block; }
inline Block& block_of_cluster(unsigned rank) { return blocks[blockIdx.x / CLUSTER * CLUSTER + rank]; }
inline Warp& warp() { return block().warps[self->index / WARP]; }
inline unsigned lane() { return self->index % WARP; }
inline unsigned char* shared(uint32_t address) { return block().shared + address; }

// Lets other threads go on.
inline void yield() {
    if (_setjmp(self->state) == 0) _longjmp(scheduler, 1);
}
// Lets them go on until the counter is another.
inline void wait_for_change(const unsigned long& counter) {
    self->watched = &counter;
    self->seen = counter;
    yield();
    self->watched = nullptr;
}

[[noreturn]] inline void stop(const char* why) {
    fprintf(stderr, "%s (block %u, thread %u)\n", why, blockIdx.x, threadIdx.x);
    for (const Block& b : blocks) {
        fprintf(stderr, "block %u, barriers (address: arrivals and bytes missing, phases ended):", b.index.x);
        for (const auto& [address, barrier] : b.barriers)
            fprintf(stderr, " %u: %d, %ld, %lu;", address, barrier.missing, barrier.bytes, barrier.phase);
        fprintf(stderr, " live threads by warp:");
        for (size_t w = 0; w < b.warps.size(); ++w)
            fprintf(stderr, " %ld", std::count_if(threads.begin(), threads.end(), [&](const Thread& t) {
                        return t.block == &b && t.index / WARP == w && !t.ended;
                    }));
        fprintf(stderr, "\n");
    }
    fflush(stderr);
    _exit(3);
}

// Every lane of the warp gives a value; all of them, for a moment.
inline const uint64_t* exchange(uint64_t value) {
    Warp& w = warp();
    uint64_t* values = w.values[w.meeting.round % 2];
    values[lane()] = value;
    w.meeting.join(WARP);
    return values;
}

// --- running ---

inline void begin_thread() {
    kernel();
    self->ended = true;
    ++progress;
    _longjmp(scheduler, 1);
}

// Lets a thread run until it waits.
inline void resume(Thread& thread) {
    self = &thread;
    threadIdx = {thread.index, 0, 0};
    blockIdx = thread.block->index;
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.state, 1);
    thread.started = true;
    auto& stack = stacks[&thread - threads.data()];
    if (!stack) stack.reset(new char[STACK_BYTES]);
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack.get();
    start.uc_stack.ss_size = STACK_BYTES;
    start.uc_link = nullptr;
    makecontext(&start, begin_thread, 0);
    setcontext(&start);
}

inline void run_some_asynchronous_work() {
    for (size_t i = 0; i < loads.size();) {
        if (!chance(20)) {
            ++i;
            continue;
        }
        const auto load = std::move(loads[i]);
        loads[i] = std::move(loads.back());
        loads.pop_back();
        load();
    }
    for (Thread& thread : threads) {
        if (!thread.copies.empty() && chance(10))
            for (unsigned n = 1 + random_numbers() % 12; n > 0 && !thread.copies.empty(); --n)
                thread.run_first_copy();
        if (!thread.stores.empty() && chance(5)) {
            const size_t at = random_numbers() % thread.stores.size();
            thread.stores[at].run();
            thread.stores.erase(thread.stores.begin() + at);
            ++progress;
        }
    }
    for (Block& b : blocks)
        for (Warpgroup& warpgroup : b.warpgroups)
            if (chance(20)) warpgroup.run_first();
}

// These blocks and their threads.
inline void lay_out(const Index* indices, unsigned count, unsigned block_threads) {
    blocks.clear();
    blocks.resize(count);
    clusters.assign(count / CLUSTER, {});
    threads.clear();
    threads.resize(count * block_threads);
    if (stacks.size() < threads.size()) stacks.resize(threads.size());
    loads.clear();
    static std::vector<unsigned char> memory;
    memory.assign(count * SHARED_BYTES + 1024, 0xff);
    unsigned char* aligned = memory.data() + (1024 - uintptr_t(memory.data()) % 1024);
    for (unsigned i = 0; i < count; ++i) {
        blocks[i].index = indices[i];
        blocks[i].shared = aligned + i * SHARED_BYTES;
        blocks[i].warps.resize(block_threads / WARP);
        blocks[i].warpgroups.resize(block_threads / WARPGROUP_THREADS);
    }
    for (unsigned i = 0; i < threads.size(); ++i) {
        threads[i].index = i % block_threads;
        threads[i].block = &blocks[i / block_threads];
    }
}

// Runs all threads to their ends.
inline void run_all() {
    constexpr unsigned PATIENCE = 20000;  // rounds in which nothing happens
    std::vector<unsigned> warps(threads.size() / WARP);
    for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
    size_t left = threads.size();
    unsigned long seen = progress;
    for (unsigned idle = 0; left > 0; idle = progress == seen ? idle + 1 : 0, seen = progress) {
        if (idle > PATIENCE) stop("nothing happens any more");
        if (chance(30)) std::shuffle(warps.begin(), warps.end(), random_numbers);
        for (const unsigned at : warps) {
            Thread* first = &threads[at * WARP];
            Warp& w = first->block->warps[first->index / WARP];
            if (w.rest > 0) {
                --w.rest;
                continue;
            }
            if (chance(3)) w.rest = chance(5) ? 400 : random_numbers() % 20;
            for (unsigned i = 0; i < WARP; ++i)
                if (!first[i].ended && !first[i].waits()) {
                    resume(first[i]);
                    left -= first[i].ended;
                }
        }
        run_some_asynchronous_work();
    }
    if (!loads.empty()) stop("a box is on its way to a block that has ended");
    for (Thread& thread : threads) {
        if (!thread.copies.empty()) stop("a thread ended before its copies");
        for (const Store& store : thread.stores) store.run();
    }
}

// Blocks in clusters all run at the same time, others one after the other, in any order.
inline void run_grid(Index grid, unsigned block_threads, bool clustered) {
    const char* seed = getenv("FFMOE_EMULATOR_SEED");
    random_numbers.seed(seed == nullptr ? 0 : atoi(seed));
    gridDim = grid;
    blockDim = {block_threads, 1, 1};
    std::vector<Index> indices;
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) indices.push_back({x, y, 0});
    if (!clustered) std::shuffle(indices.begin(), indices.end(), random_numbers);
    const unsigned together = clustered ? indices.size() : 1;
    for (unsigned first = 0; first < indices.size(); first += together) {
        lay_out(&indices[first], together, block_threads);
        run_all();
    }
}

template <class... P, size_t... I>
std::function<void()> call(void (*entry)(P...), void** parameters, std::index_sequence<I...>) {
    return [=] { entry(*static_cast<std::remove_const_t<P>*>(parameters[I])...); };
}
template <class... P>
void launch(void (*entry)(P...), Index grid, unsigned block_threads, bool clustered, void** parameters) {
    kernel = call(entry, parameters, std::index_sequence_for<P...>());
    run_grid(grid, block_threads, clustered);
}

template <class T> uint64_t bits_of(T value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T> T value_of(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace machine

// --- what CUDA's C++ has built in ---

inline void __syncthreads() { machine::block().meetings[0].join(blockDim.x); }
inline void __syncwarp() { machine::exchange(0); }
template <class T> T __shfl_xor_sync(unsigned, T value, unsigned distance) {
    return machine::value_of<T>(machine::exchange(machine::bits_of(value))[machine::lane() ^ distance]);
}
template <class T> T __shfl_up_sync(unsigned, T value, unsigned distance) {
    const uint64_t* values = machine::exchange(machine::bits_of(value));
    return machine::value_of<T>(values[machine::lane() - (machine::lane() >= distance ? distance : 0)]);
}
template <class T> T __shfl_down_sync(unsigned, T value, unsigned distance) {
    const uint64_t* values = machine::exchange(machine::bits_of(value));
    return machine::value_of<T>(values[machine::lane() + (machine::lane() + distance < machine::WARP ? distance : 0)]);
}
template <class T> T __shfl_sync(unsigned, T value, unsigned lane) {
    return machine::value_of<T>(machine::exchange(machine::bits_of(value))[lane % machine::WARP]);
}
// The value of all lanes' that `combine` makes of them.
template <class T, class Combine> T reduced(T value, Combine combine) {
    const uint64_t* values = machine::exchange(machine::bits_of(value));
    T all = machine::value_of<T>(values[0]);
    for (unsigned i = 1; i < machine::WARP; ++i) all = combine(all, machine::value_of<T>(values[i]));
    return all;
}
inline int __reduce_add_sync(unsigned, int value) { return reduced(value, std::plus<int>()); }
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    return reduced(value, [](unsigned a, unsigned b) { return max(a, b); });
}
inline int __reduce_min_sync(unsigned, int value) {
    return reduced(value, [](int a, int b) { return min(a, b); });
}
// The lanes whose value `agrees`.
template <class T, class Agrees> unsigned lanes_that(T value, Agrees agrees) {
    const uint64_t* values = machine::exchange(machine::bits_of(value));
    unsigned lanes = 0;
    for (unsigned i = 0; i < machine::WARP; ++i) lanes |= unsigned(agrees(machine::value_of<T>(values[i]))) << i;
    return lanes;
}
inline unsigned __ballot_sync(unsigned, bool value) {
    return lanes_that(value, [](bool other) { return other; });
}
inline bool __any_sync(unsigned lanes, bool value) { return __ballot_sync(lanes, value) != 0; }
inline unsigned __match_any_sync(unsigned, int value) {
    return lanes_that(value, [&](int other) { return other == value; });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }

template <class T> T atomicAdd(T* at, T value) {
    ++machine::progress;
    return std::exchange(*at, *at + value);
}
// Time passes, for whoever looks.
inline long long clock64() {
    static long long now = 0;
    machine::yield();
    return now += 300;
}
inline float __uint_as_float(unsigned bits) { return machine::value_of<float>(bits); }
inline unsigned __float_as_uint(float value) { return unsigned(machine::bits_of(value)); }
inline float __int_as_float(int bits) { return machine::value_of<float>(unsigned(bits)); }
inline double __longlong_as_double(long long bits) { return machine::value_of<double>(uint64_t(bits)); }
inline long long __double_as_longlong(double value) { return (long long)(machine::bits_of(value)); }
inline float __fdividef(float a, float b) { return a / b; }
