// See kernels/common/wgmma.cuh.
#pragma once

#include "tma.cuh"
#include "types.cuh"
#include "warpgroup.cuh"

constexpr int SWIZZLE_BYTES = 128;
constexpr int ATOM_BYTES = 8 * SWIZZLE_BYTES;
constexpr int TILE_MAJOR_STRIDE = 64 * SWIZZLE_BYTES;

inline uint64 operand_at(uint32 address) { return address >> 4; }
template <bool TILE_MAJOR> constexpr uint64 SLICE = (TILE_MAJOR ? 16 * SWIZZLE_BYTES : 16 * 2) >> 4;

inline void begin_products() {}
inline void publish_shared() {}
inline void commit_products() { machine::self->product_groups.push_back(machine::self->products); }
template <int pending> void wait_for_products() {
    const auto& groups = machine::self->product_groups;
    if (groups.size() <= pending) return;
    const unsigned long wanted = groups[groups.size() - 1 - pending];
    machine::Warpgroup& warpgroup = machine::block().warpgroups[machine::self->index / WARPGROUP];
    while (warpgroup.done < wanted) machine::wait_for_change(warpgroup.done);
}
template <int N> void keep_in_order(float (&)[N / 8][4]) {}

// 16 by COUNT elements of an operand, the contraction first.
template <class X, bool TILE_MAJOR, int COUNT>
void read_operand(const unsigned char* shared, uint64 operand, float (&out)[16][COUNT]) {
    const uint32 start = operand << 4;
    for (int k = 0; k < 16; ++k)
        for (int i = 0; i < COUNT; ++i) {
            const int line = TILE_MAJOR ? k : i, element_of_line = TILE_MAJOR ? i : k;
            const uint32 address = start + element_of_line / 64 * TILE_MAJOR_STRIDE + line / 8 * ATOM_BYTES +
                                   line % 8 * SWIZZLE_BYTES + element_of_line % 64 * 2;
            X element;
            memcpy(&element, shared + swizzled(address), sizeof element);
            out[k][i] = widen(element);
        }
}

template <class X, bool TILE_MAJOR_A, bool TILE_MAJOR_B, int N> struct Multiply {
    [[gnu::optimize("O3")]] static void run_all(const unsigned char* shared, machine::Product& product) {
        static float a[16][64], b[16][N], sums[64][N];
        read_operand<X, TILE_MAJOR_A>(shared, product.a, a);
        read_operand<X, TILE_MAJOR_B>(shared, product.b, b);
        for (int row = 0; row < 64; ++row)
            for (int column = 0; column < N; ++column) sums[row][column] = 0;
        for (int k = 0; k < 16; ++k)
            for (int row = 0; row < 64; ++row)
                for (int column = 0; column < N; ++column) sums[row][column] += a[k][row] * b[k][column];
        for (int thread = 0; thread < WARPGROUP; ++thread)
            for (int n = 0; n < N / 8; ++n)
                for (int i = 0; i < 4; ++i) {
                    float& sum = product.sums[thread][4 * n + i];
                    const int row = thread / 32 * 16 + i / 2 * 8 + thread % 32 / 4;
                    const int column = 8 * n + 2 * (thread % 4) + i % 2;
                    sum = (product.add ? sum : 0) + sums[row][column];
                }
    }

    static void run(float (&sums)[N / 8][4], uint64 a, uint64 b, int add) {
        machine::Thread& thread = *machine::self;
        machine::Warpgroup& warpgroup = machine::block().warpgroups[thread.index / WARPGROUP];
        const size_t at = thread.products++ - warpgroup.done;
        if (warpgroup.products.size() <= at) warpgroup.products.resize(at + 1);
        machine::Product& product = warpgroup.products[at];
        if (product.issued > 0 && std::tie(product.a, product.b, product.add) != std::tie(a, b, add))
            machine::stop("the threads of a warpgroup want different products");
        if (product.issued++ == 0) {
            product.a = a;
            product.b = b;
            product.add = add;
            product.run = [shared = machine::block().shared](machine::Product& all) { run_all(shared, all); };
        }
        product.sums[thread.index % WARPGROUP] = &sums[0][0];
    }
};
