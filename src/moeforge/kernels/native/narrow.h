// Rows of less than 4 bits made ones of 4 on use: codes plus 8, 64 bytes to a block of 128 (formats.py, coded.py
// and vectors.py describe what they are made of). Codes of 3 and 2 bits are odd numbers, of which a level is half.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "quantised.h"

// 128 fields of two bits to nibbles: the first and third fields of all bytes, then the second and fourth.
inline __m512i spread(__m256i fields) {
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(fields), _mm256_srli_epi16(fields, 2), 1);
    return _mm512_and_si512(both, _mm512_set1_epi8(0x33));
}

inline __m512i nibbles_of_3(const uint8_t* p) {
    const __m512i quarters = _mm512_set_epi64(3ll * 0x1000100010001, 3ll * 0x1000100010001, 2ll * 0x1000100010001,
                                              2ll * 0x1000100010001, 0x1000100010001, 0x1000100010001, 0, 0);
    __m512i high = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(p + 32)));
    high = _mm512_and_si512(_mm512_srlv_epi16(high, quarters), _mm512_set1_epi8(0x11));
    __m512i level = _mm512_or_si512(spread(_mm256_loadu_si256((const __m256i*)p)), _mm512_slli_epi16(high, 2));
    return _mm512_add_epi8(_mm512_slli_epi16(level, 1), _mm512_set1_epi8(0x11));
}

inline __m512i nibbles_of_2(const uint8_t* p) {
    __m512i level = spread(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_add_epi8(_mm512_slli_epi16(level, 1), _mm512_set1_epi8(0x55));
}

inline __m512i nibbles_of_ternary(const uint8_t* p) {
    alignas(64) uint8_t levels[26 * 4 + 32];  // a store ends in six bytes that the next one covers
    __m512i rest = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8((1u << 26) - 1, p));
    for (int k = 0; k < 5; k++) {
        __m512i third = _mm512_mulhi_epu16(rest, _mm512_set1_epi16(21846));  // exact for a byte
        __m512i level = _mm512_sub_epi16(rest, _mm512_add_epi16(third, _mm512_slli_epi16(third, 1)));
        _mm256_storeu_si256((__m256i*)(levels + 26 * k), _mm512_cvtepi16_epi8(level));
        rest = third;
    }
    __m512i high = _mm512_slli_epi16(_mm512_loadu_si512(levels + 64), 4);
    return _mm512_add_epi8(_mm512_or_si512(_mm512_loadu_si512(levels), high), _mm512_set1_epi8(0x77));
}

inline __m512i nibbles_of_levels(const uint8_t* p) {  // 0 to 2 in two bits each
    return _mm512_add_epi8(spread(_mm256_loadu_si256((const __m256i*)p)), _mm512_set1_epi8(0x77));
}

// 32 numbers of vectors, whose entries have 16 bits: the first 16 vectors are the lower nibbles.
inline __m512i nibbles_of_vectors(const uint8_t* p, const void* entries) {
    auto bytes = [&](int from) {
        __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + from)));
        __m512i two = _mm512_i32gather_epi32(_mm512_srli_epi32(at, 1), entries, 4);  // it and the one beside it
        __m512i odd = _mm512_and_si512(_mm512_slli_epi32(at, 4), _mm512_set1_epi32(16));
        __m512i v = _mm512_and_si512(_mm512_srlv_epi32(two, odd), _mm512_set1_epi32(0xFFFF));
        v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 8)), _mm512_set1_epi32(0x00FF00FF));
        return _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 4)), _mm512_set1_epi32(0x0F0F0F0F));
    };
    return _mm512_or_si512(bytes(0), _mm512_slli_epi32(bytes(16), 4));
}

// The words of a row to fields of two bits, 32 bytes to a block; up to 8 bytes past them are written as well.
inline void decode(const Quantised& q, int row, uint8_t* fields) {
    auto* words = (const uint16_t*)q.packed;
    const uint64_t values = (uint64_t(1) << 56) - 1;
    size_t at = 0, end = size_t(q.blocks) * 256;  // in bits; a row of other words than its own must not end elsewhere
    uint64_t held = 0;                            // bits of a byte that is not yet full
    for (auto* word = words + (row ? q.ends[row - 1] : 0); word < words + q.ends[row] && at < end; word++) {
        uint64_t entry = q.entries[*word], next = held | (entry & values) << (at & 7);
        std::memcpy(fields + at / 8, &next, 8);
        size_t from = at & ~size_t(7);
        at += entry >> 56 << 2;
        held = next >> ((at & ~size_t(7)) - from);
    }
}

// Bytes of a row in the 4-bit form, with room for what decoding writes past it.
inline size_t widened(const Quantised& q) { return size_t(q.blocks) * 64 + 64; }

template <int bytes, class Make>
inline void blocks_of(const uint8_t* from, int blocks, Make make, uint8_t* to) {
    for (int b = 0; b < blocks; b++, from += bytes, to += 64) {
        _mm_prefetch((const char*)from + 4096, _MM_HINT_T0);
        _mm512_storeu_si512(to, make(from));
    }
}

inline void widen_row(const Quantised& q, int row, uint8_t* to) {
    auto at = [&](int bytes) { return q.packed + size_t(row) * q.blocks * bytes; };
    switch (q.bits) {
        case 3: return blocks_of<48>(at(48), q.blocks, nibbles_of_3, to);
        case 2: return blocks_of<32>(at(32), q.blocks, nibbles_of_2, to);
        case vectors:
            return blocks_of<32>(
                at(32), q.blocks, [&](const uint8_t* p) { return nibbles_of_vectors(p, q.entries); }, to);
        case ternary: return blocks_of<26>(at(26), q.blocks, nibbles_of_ternary, to);
        default: {
            uint8_t* fields = to + size_t(q.blocks) * 32;  // read before what they become is written there
            decode(q, row, fields);
            blocks_of<32>(fields, q.blocks, nibbles_of_levels, to);
        }
    }
}
