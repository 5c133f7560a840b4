// Tokens arranged for products with matrices in few bits: in bf16, or in int8 with scales.
#pragma once
#include <cmath>
#include <cstring>

#include "activation.h"
#include "layer.h"
#include "numbers.h"
#include "quantised.h"

// A block of a token, in the order in which weights come out of their registers: bf16, or int8 with scales.
struct Halves {
    uint16_t values[128];

    static int way(const Quantised& q) { return q.bits == 8; }
};

struct Bytes {
    int8_t codes[128];
    int32_t offset[16];  // less what weights held as code + 128 or + 8 add to the lane's sum
    float scales[4];     // of each 32 inputs

    static int way(const Quantised& q) { return (q.bits == 8) * 3 + q.group / 64; }
};

namespace {

constexpr int BATCH = 4;  // tokens that share a widened block

// sum plus, in each lane of 32 bits, the products of four bytes.
inline __m512i step(__m512i sum, __m512i is_unsigned, __m512i is_signed) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(sum, is_unsigned, is_signed);
#else
    __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(is_signed, 8), 8), odd = _mm512_srai_epi16(is_signed, 8);
    even = _mm512_madd_epi16(_mm512_and_si512(is_unsigned, _mm512_set1_epi16(255)), even);
    odd = _mm512_madd_epi16(_mm512_srli_epi16(is_unsigned, 8), odd);
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#endif
}

// Where each value of a Halves comes from. A shift of 4 bits leaves one byte of two: even ones come first.
struct Order {
    uint16_t from[128];
    explicit Order(int bits) {
        for (int i = 0; i < 128; i++) from[i] = input_of(bits == 8 ? i : 64 * (i / 32 % 2) + i % 32 * 2 + i / 64);
    }
};

void arrange(const Quantised& q, const uint16_t* x, Halves* row) {
    static const Order orders[2] = {Order(4), Order(8)};
    const uint16_t* from = orders[q.bits == 8].from;
    for (Halves* to = row; to < row + q.blocks; to++, x += 128) {
        __m512i in[4];
        for (int j = 0; j < 4; j++) in[j] = _mm512_loadu_si512(x + 32 * j);
        for (int j = 0; j < 4; j++) {
            __m512i at = _mm512_loadu_si512(from + 32 * j);
            __m512i low = _mm512_permutex2var_epi16(in[0], at, in[1]);
            __m512i high = _mm512_permutex2var_epi16(in[2], at, in[3]);
            __mmask32 second = _mm512_cmpge_epu16_mask(at, _mm512_set1_epi16(64));
            _mm512_storeu_si512(to->values + 32 * j, _mm512_mask_mov_epi16(low, second, high));
        }
    }
}

// One group: to nearest, ties to even. A value that is not a number makes the scale, and with it the row's sums, one.
inline float to_codes(const uint16_t* x, int group, int8_t* codes) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int k = 0; k < group; k += VECTOR) {
        __m512 v = Bf16::load(x + k, first(VECTOR));
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
    }
    float scale = nan ? NAN : _mm512_reduce_max_ps(most) / 127;
    for (int k = 0; k < group; k += VECTOR) {
        __m512 v = _mm512_maskz_div_ps(first(scale > 0 ? VECTOR : 0), Bf16::load(x + k, first(VECTOR)), splat(scale));
        v = _mm512_max_ps(_mm512_min_ps(v, splat(127)), splat(-127));  // a scale of few bits may be too small
        _mm_storeu_si128((__m128i*)(codes + k), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    return scale;
}

void arrange(const Quantised& q, const uint16_t* x, Bytes* row) {
    for (Bytes* to = row; to < row + q.blocks; to++, x += 128) {
        int8_t codes[128];
        for (int k = 0; k < 128; k += q.group)
            std::fill_n(to->scales + k / 32, q.group / 32, to_codes(x + k, q.group, codes + k));
        for (int i = 0; i < 128; i += 4) std::memcpy(to->codes + i, codes + input_of(i), 4);
        __m512i added = _mm512_setzero_si512(), code = _mm512_set1_epi8(q.bits == 8 ? -128 : 8);
        for (int j = 0; j < 2; j++) added = step(added, code, _mm512_loadu_si512(to->codes + 64 * j));
        _mm512_storeu_si512(to->offset, _mm512_sub_epi32(_mm512_setzero_si512(), added));
    }
}

// Tokens as the products with matrices in few bits want them: `count` rows of bf16, padded with zeros, arranged once for
// each way in which the matrices want them.
template <class X>
class Rows {
    static constexpr int WAYS = 6;
    std::unique_ptr<X[]> arranged[WAYS];
    size_t blocks;

  public:
    Rows(const Quantised* all, int matrices, const uint16_t* x, int64_t count, int threads) : blocks(all->blocks) {
        for (const Quantised* q = all; q < all + matrices; q++) {
            auto& to = arranged[X::way(*q)];
            if (to) continue;
            to.reset(new X[count * blocks]);
            on_threads((count + BATCH - 1) / BATCH, count > BATCH ? threads : 1, [&](int batch) {
                for (int64_t t = int64_t(batch) * BATCH; t < std::min(count, (int64_t(batch) + 1) * BATCH); t++)
                    arrange(*q, x + t * blocks * 128, to.get() + t * blocks);
            });
        }
    }
    const X* operator()(const Quantised& q, size_t row) const { return arranged[X::way(q)].get() + row * blocks; }
};

}  // namespace
