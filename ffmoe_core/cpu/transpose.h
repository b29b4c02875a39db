/* A copy of a block, transposed. */
#ifndef FFMOE_TRANSPOSE_H
#define FFMOE_TRANSPOSE_H

#include "simd.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FFMOE_HAS_SHUFFLE
#endif
#endif

#ifdef FFMOE_HAS_SHUFFLE
/* Two rounds of interleaving, in vectors that every processor has. */
#define FFMOE_DEFINE_TRANSPOSE_4X4(REAL, SUFFIX)                                                             \
    typedef REAL ffmoe_four_##SUFFIX __attribute__((vector_size(4 * sizeof(REAL)), aligned(sizeof(REAL))));  \
    FFMOE_INLINE void ffmoe_transpose_4x4_##SUFFIX(const REAL* from, int64_t ld, REAL* to, int64_t ld_to) {  \
        typedef ffmoe_four_##SUFFIX four;                                                                    \
        const four a = *(const four*)from, b = *(const four*)(from + ld);                                    \
        const four c = *(const four*)(from + 2 * ld), d = *(const four*)(from + 3 * ld);                     \
        const four ac0 = __builtin_shufflevector(a, c, 0, 4, 1, 5);                                          \
        const four ac1 = __builtin_shufflevector(a, c, 2, 6, 3, 7);                                          \
        const four bd0 = __builtin_shufflevector(b, d, 0, 4, 1, 5);                                          \
        const four bd1 = __builtin_shufflevector(b, d, 2, 6, 3, 7);                                          \
        *(four*)to = __builtin_shufflevector(ac0, bd0, 0, 4, 1, 5);                                          \
        *(four*)(to + ld_to) = __builtin_shufflevector(ac0, bd0, 2, 6, 3, 7);                                \
        *(four*)(to + 2 * ld_to) = __builtin_shufflevector(ac1, bd1, 0, 4, 1, 5);                            \
        *(four*)(to + 3 * ld_to) = __builtin_shufflevector(ac1, bd1, 2, 6, 3, 7);                            \
    }
#else
#define FFMOE_DEFINE_TRANSPOSE_4X4(REAL, SUFFIX)                                                             \
    FFMOE_INLINE void ffmoe_transpose_4x4_##SUFFIX(const REAL* from, int64_t ld, REAL* to, int64_t ld_to) {  \
        for (int64_t i = 0; i < 4; i++)                                                                      \
            for (int64_t j = 0; j < 4; j++) to[j * ld_to + i] = from[i * ld + j];                            \
    }
#endif

/* to[j][i] = from[i][j]. A strip of 16 rows at a time: read along rows, written in whole cache lines. */
#define FFMOE_DEFINE_TRANSPOSE(REAL, SUFFIX)                                                                 \
    FFMOE_DEFINE_TRANSPOSE_4X4(REAL, SUFFIX)                                                                 \
    FFMOE_INLINE void ffmoe_transpose_##SUFFIX(int64_t rows, int64_t columns, const REAL* from, int64_t ld,  \
                                               REAL* to, int64_t ld_to) {                                    \
        for (int64_t i0 = 0; i0 < rows; i0 += 16) {                                                          \
            const int64_t i1 = i0 + 16 < rows ? i0 + 16 : rows;                                              \
            int64_t i, j = 0;                                                                                \
            for (; j + 4 <= columns; j += 4) {                                                               \
                for (i = i0; i + 4 <= i1; i += 4)                                                            \
                    ffmoe_transpose_4x4_##SUFFIX(from + i * ld + j, ld, to + j * ld_to + i, ld_to);          \
                for (; i < i1; i++)                                                                          \
                    for (int64_t s = 0; s < 4; s++) to[(j + s) * ld_to + i] = from[i * ld + j + s];          \
            }                                                                                                \
            for (; j < columns; j++)                                                                         \
                for (i = i0; i < i1; i++) to[j * ld_to + i] = from[i * ld + j];                              \
        }                                                                                                    \
    }

FFMOE_DEFINE_TRANSPOSE(float, f32)
FFMOE_DEFINE_TRANSPOSE(double, f64)

#endif
