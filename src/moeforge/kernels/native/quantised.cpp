// Experts with weights of 8 or 4 bits, for few tokens at a time: a row of weights is read once, widened to bf16 in
// registers and multiplied along K with each token. The format is described in quantised.py. A row's sum has one order
// whatever the number of tokens, so results never depend on who their neighbours are.
#include "activation.h"
#include "layer.h"
#include "numbers.h"

struct Quantised {
    const uint8_t* packed;
    const uint16_t* scales;  // float16
    int32_t bits, group, rows, blocks;  // rows of one expert, of so many blocks of 128 inputs

    size_t row_bytes() const { return size_t(blocks) * 16 * bits; }
    const uint8_t* row(size_t r) const { return packed + r * row_bytes(); }
    const uint16_t* scale(size_t r) const { return scales + r * blocks * (128 / group); }
};

namespace {

constexpr int BATCH = 4;   // tokens that share a widened block
constexpr int TOGETHER = 2;  // rows that share a token's values
constexpr int SHARE = 32;  // rows of a task
constexpr int AHEAD = 4096;  // bytes: the processor's own prefetching ends at each page

inline __m512 both(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
#endif
    return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(Bf16::narrow(low)), Bf16::narrow(high), 1));
}

// 128 inputs as four vectors of bf16, in order.
template <int bits>
inline void widen(const uint8_t* p, __m512 w[4]) {
    if (bits == 8) {
        for (int j = 0; j < 4; j++) {
            auto part = [&](int i) {
                return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 32 * j + i))));
            };
            w[j] = both(part(0), part(16));
        }
        return;
    }
    alignas(64) static const uint16_t values[32] = {  // -8 to 7 in bf16, twice: an index is taken modulo 32
        0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000,
        0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040,
        0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
    __m512i words = _mm512_loadu_si512(p), table = _mm512_load_si512(values);
    for (int j = 0; j < 4; j++)
        w[j] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * j), table));
}

// out[i * BATCH + m] = row r + i . x[m], for R rows and M tokens; groups of `parts` vectors share a scale.
template <int bits, int R, int M, int parts>
inline void dots(const Quantised& q, size_t r, const uint16_t* const* x, float* out) {
    __m512 sum[R][M];
    for (auto& row : sum)
        for (auto& s : row) s = _mm512_setzero_ps();
    for (int b = 0; b < q.blocks; b++)
        for (int i = 0; i < R; i++) {
            const uint8_t* packed = q.row(r + i) + b * 16 * bits;
            const uint16_t* scales = q.scale(r + i) + b * (4 / parts);
            for (int line = 0; line < bits / 4; line++)
                _mm_prefetch((const char*)packed + AHEAD + 64 * line, _MM_HINT_T0);
            __m512 w[4];
            widen<bits>(packed, w);
            for (int j = 0; j < 4; j += parts) {
                __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16(*scales++));
                for (int m = 0; m < M; m++) {
                    __m512 part = _mm512_setzero_ps();
                    for (int n = j; n < j + parts; n++)
                        part = Bf16::step(part, w[n], _mm512_loadu_ps((const float*)(x[m] + b * 128 + n * 32)));
                    sum[i][m] = _mm512_fmadd_ps(part, scale, sum[i][m]);
                }
            }
        }
    for (int i = 0; i < R; i++)
        for (int m = 0; m < M; m++) out[i * BATCH + m] = _mm512_reduce_add_ps(sum[i][m]);
}

template <int bits, int R, int M>
inline void by_group(const Quantised& q, size_t r, const uint16_t* const* x, float* out) {
    switch (q.group) {
        case 32: return dots<bits, R, M, 1>(q, r, x, out);
        case 64: return dots<bits, R, M, 2>(q, r, x, out);
        default: return dots<bits, R, M, 4>(q, r, x, out);
    }
}

template <int bits, int R>
inline void by_count(const Quantised& q, size_t r, const uint16_t* const* x, int count, float* out) {
    switch (count) {
        case 1: return by_group<bits, R, 1>(q, r, x, out);
        case 2: return by_group<bits, R, 2>(q, r, x, out);
        case 3: return by_group<bits, R, 3>(q, r, x, out);
        default: return by_group<bits, R, 4>(q, r, x, out);
    }
}

template <int R>
inline void by_bits(const Quantised& q, size_t r, const uint16_t* const* x, int count, float* out) {
    q.bits == 8 ? by_count<8, R>(q, r, x, count, out) : by_count<4, R>(q, r, x, count, out);
}

// Rows from.. of the matrix against `count` tokens; put(row, token, value) takes each.
template <class Token, class Put>
void rows_against(const Quantised& q, size_t base, int from, int end, int count, Token token, Put put) {
    for (int r = from; r < end;) {
        int rows = end - r >= TOGETHER ? TOGETHER : 1;
        for (int m = 0; m < count; m += BATCH) {
            const uint16_t* x[BATCH];
            float out[TOGETHER * BATCH];
            int batch = std::min(BATCH, count - m);
            for (int i = 0; i < batch; i++) x[i] = token(m + i);
            rows == 1 ? by_bits<1>(q, base + r, x, batch, out) : by_bits<TOGETHER>(q, base + r, x, batch, out);
            for (int j = 0; j < rows; j++)
                for (int i = 0; i < batch; i++) put(r + j, m + i, out[j * BATCH + i]);
        }
        r += rows;
    }
}

inline uint16_t rounded(float v) { return _mm_extract_epi16(_mm256_castsi256_si128(Bf16::narrow(splat(v))), 0); }

// hidden [edges, blocks of down * 128] bf16: zero in its padding, filled here.
void project(const Layer& l, const Quantised& up, const uint16_t* x, uint16_t* hidden, int stride) {
    int shares = (l.d_expert + SHARE - 1) / SHARE, K = up.blocks * 128;
    on_threads(l.experts * shares, l.threads, [&](int task) {
        int e = task / shares, from = e ? l.ends[e - 1] : 0, count = l.ends[e] - from;
        if (!count) return;
        int begin = task % shares * SHARE, end = std::min(begin + SHARE, l.d_expert);
        size_t base = size_t(e) * up.rows;
        float *gate = scratch<0>(size_t(count) * SHARE), *linear = scratch<1>(size_t(count) * SHARE);
        auto token = [&](int m) { return x + l.token[from + m] * K; };
        auto into = [&](float* all) { return [=](int r, int m, float v) { all[m * SHARE + r % SHARE] = v; }; };
        rows_against(up, base, begin, end, count, token, into(gate));
        if (l.gated) rows_against(up, base + l.d_expert, begin, end, count, token, into(linear));
        for (int m = 0; m < count; m++)
            for (int r = 0; r < end - begin; r += VECTOR) {
                __m512 a = activate(_mm512_loadu_ps(gate + m * SHARE + r), Pointwise(l.pointwise)).value;
                if (l.gated) a = _mm512_mul_ps(a, _mm512_loadu_ps(linear + m * SHARE + r));
                Bf16::store(hidden + size_t(from + m) * stride + begin + r, first(end - begin - r), a);
            }
    });
}

void combine(const Layer& l, const Quantised& down, const uint16_t* hidden, int stride, uint16_t* y) {
    on_threads((l.d_model + SHARE - 1) / SHARE, l.threads, [&](int share) {
        int from = share * SHARE, end = std::min(from + SHARE, l.d_model);
        float* sums = scratch<0>(l.tokens * SHARE);
        std::fill_n(sums, l.tokens * SHARE, 0.f);
        for (int e = 0, edge = 0; e < l.experts; edge = l.ends[e++])
            rows_against(
                down, size_t(e) * down.rows, from, end, l.ends[e] - edge,
                [&](int m) { return hidden + size_t(edge + m) * stride; },
                [&](int r, int m, float v) { sums[l.token[edge + m] * SHARE + r - from] += l.weight[edge + m] * v; });
        for (int64_t t = 0; t < l.tokens; t++)
            for (int d = from; d < end; d++) y[t * l.d_model + d] = rounded(sums[t * SHARE + d - from]);
    });
}

}  // namespace

extern "C" {

// x [T, blocks * 128] bf16, padded with zeros; y [T, D] bf16. Returns a Status.
int moeforge_quantised(const Layer* l, uint16_t* y, uint16_t* hidden) {
    if (!l->sound()) return unsound;
    const auto &up = *(const Quantised*)l->up, &down = *(const Quantised*)l->down;
    int stride = down.blocks * 128;
    return status_of([&] {
        project(*l, up, (const uint16_t*)l->x, hidden, stride);
        combine(*l, down, hidden, stride, y);
    });
}

// y [T, rows] = x W^T for one matrix.
void moeforge_quantised_linear(const Quantised* q, const uint16_t* x, int64_t tokens, int32_t threads, uint16_t* y) {
    on_threads((q->rows + SHARE - 1) / SHARE, threads, [&](int share) {
        int from = share * SHARE;
        rows_against(
            *q, 0, from, std::min(from + SHARE, q->rows), tokens,
            [&](int m) { return x + size_t(m) * q->blocks * 128; },
            [&](int r, int m, float v) { y[size_t(m) * q->rows + r] = rounded(v); });
    });
}
}
