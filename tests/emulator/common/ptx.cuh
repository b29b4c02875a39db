// See kernels/common/ptx.cuh.
#pragma once

inline unsigned short bfloat16_bits(float x) {
    const unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned short float16_bits(float x) { return machine::bits_of(_Float16(x)); }
inline float float_of_float16(unsigned short bits) { return machine::value_of<_Float16>(bits); }
inline unsigned bfloat16_pair(float low, float high) { return bfloat16_bits(low) | bfloat16_bits(high) << 16; }
inline unsigned float16_pair(float low, float high) { return float16_bits(low) | float16_bits(high) << 16; }

inline float approximate_exp2(float x) { return exp2f(x); }
inline float approximate_reciprocal(float x) { return 1.0f / x; }

template <class X> inline const X* advanced(const X* from, int count, int pitch) {
    return reinterpret_cast<const X*>(reinterpret_cast<const char*>(from) + int64_t(count) * pitch);
}
inline void check_aligned(const void* at) {
    if (uintptr_t(at) % 16 != 0) machine::stop("16 bytes at a place that is not aligned");
}
inline void load_piece(const void* from, unsigned& a, unsigned& b, unsigned& c, unsigned& d) {
    check_aligned(from);
    unsigned words[4];
    memcpy(words, from, sizeof words);
    a = words[0], b = words[1], c = words[2], d = words[3];
}
inline void store_streaming(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {
    check_aligned(to);
    const unsigned words[4] = {a, b, c, d};
    memcpy(to, words, sizeof words);
}
