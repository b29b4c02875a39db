// See kernels/common/mma.cuh.
#pragma once

#include "types.cuh"

inline uint32 shared_address(const void* p) {
    return static_cast<const unsigned char*>(p) - machine::block().shared;
}
inline float load_shared(uint32 address) {
    float out;
    memcpy(&out, machine::shared(address), sizeof out);
    return out;
}
inline void load_shared(float (&out)[2], uint32 address) { memcpy(out, machine::shared(address), sizeof out); }
inline void load_shared(uint32 (&out)[4], uint32 address) { memcpy(out, machine::shared(address), sizeof out); }

// Element (row, column) of each of the four matrices whose rows' addresses the lanes give.
inline uint16 element(const uint64_t* addresses, int matrix, int row, int column) {
    uint16 out;
    memcpy(&out, machine::shared(addresses[8 * matrix + row]) + 2 * column, sizeof out);
    return out;
}
inline void load_matrices(uint32 (&out)[4], uint32 address) {
    const uint64_t* rows = machine::exchange(address);
    const int row = machine::lane() / 4, column = machine::lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) out[i] = element(rows, i, row, column) | element(rows, i, row, column + 1) << 16;
}
inline void load_matrices_transposed(uint32 (&out)[4], uint32 address) {
    const uint64_t* rows = machine::exchange(address);
    const int row = machine::lane() / 4, column = machine::lane() % 4 * 2;
    for (int i = 0; i < 4; ++i) out[i] = element(rows, i, column, row) | element(rows, i, column + 1, row) << 16;
}

// The tensor cores cut off what does not fit.
inline float toward_zero(double x) {
    const float out = float(x);
    return std::isfinite(out) && fabs(double(out)) > fabs(x) ? nextafterf(out, 0.0f) : out;
}
template <class X>
inline void multiply_add(float (&acc)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    uint64_t left[4][32], right[2][32];
    for (int i = 0; i < 4; ++i) memcpy(left[i], machine::exchange(a[i]), sizeof left[i]);
    memcpy(right[0], machine::exchange(b0), sizeof right[0]);
    memcpy(right[1], machine::exchange(b1), sizeof right[1]);
    const auto number = [](const uint64_t* lanes, int line, int k) {
        return widen(X{uint16(lanes[line % 8 * 4 + k % 8 / 2] >> 16 * (k % 2))});
    };
    const int lane = machine::lane();
    double rows[2][16], columns[2][16];
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 16; ++k) {
            rows[i][k] = number(left[i + k / 8 * 2], lane / 4, k);
            columns[i][k] = number(right[k / 8], lane % 4 * 2 + i, k);
        }
    for (int i = 0; i < 4; ++i) {
        double sum = acc[i];
        for (int k = 0; k < 16; ++k) sum += rows[i / 2][k] * columns[i % 2][k];
        acc[i] = toward_zero(sum);
    }
}
