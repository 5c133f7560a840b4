// Experts with weights of 8 bits or fewer, each in a format of its own, for few tokens at a time: a row of weights is
// read once and multiplied along K with each token, in bf16 (the weights widened in registers) or in int8 (the token
// quantised as well). The formats are described in formats.py and coded.py; fewer than 4 bits become 4 first, row by row, in a
// core's cache. A row's sum has one order whatever the number of tokens, so results never depend on who their
// neighbours are.
#include "activation.h"
#include "layer.h"
#include "narrow.h"
#include "numbers.h"
#include "quantised.h"
#include "rows.h"

namespace {

constexpr int TOGETHER = 4;  // rows that share a token's values
constexpr int CACHED = 64;   // tokens whose values stay in a core's cache while rows pass
constexpr int AHEAD = 8192;  // bytes: the processor's own prefetching ends at each page

// Rows of a task: few tasks, since memory is slow at the start of each, but enough for all threads.
inline int share(int rows, int threads) { return std::clamp(rows / (2 * threads) / VECTOR * VECTOR, 32, 256); }

inline __m512 both(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
#endif
    return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(Bf16::narrow(low)), Bf16::narrow(high), 1));
}

// A block of weights as four vectors of bf16.
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

// The same as two vectors of unsigned bytes, code + 128 or + 8.
template <int bits>
inline void unpack(const uint8_t* p, __m512i w[2]) {
    __m512i low = _mm512_loadu_si512(p), sign = _mm512_set1_epi8(-128), nibble = _mm512_set1_epi8(15);
    w[0] = bits == 8 ? _mm512_xor_si512(low, sign) : _mm512_and_si512(low, nibble);
    w[1] = bits == 8 ? _mm512_xor_si512(_mm512_loadu_si512(p + 64), sign)
                     : _mm512_and_si512(_mm512_srli_epi16(low, 4), nibble);
}

// The scales of the block's quarters, again and again; `parts` quarters share one.
template <int parts>
inline __m512 scales_of(const uint16_t* scales) {
    uint64_t s = 0;
    std::memcpy(&s, scales, 8 / parts);
    if (parts == 2) s = (s & 0xFFFF) * 0x10001 | (s >> 16) * 0x10001 << 32;
    return _mm512_cvtph_ps(parts == 4 ? _mm256_set1_epi16(s) : _mm256_set1_epi64x(s));
}

// A block of a row of weights as products want it, and each lane's scale.
template <class X>
struct Ready;

template <>
struct Ready<Halves> {
    __m512 values[4], scale;
};

template <>
struct Ready<Bytes> {
    __m512i values[2];
    __m512 scale;
};

template <int bits>
inline void make(const uint8_t* packed, __m512 scales, Ready<Halves>& to) {
    widen<bits>(packed, to.values);
    const __m512i lanes = _mm512_set4_epi64(0x300000003, 0x200000002, 0x100000001, 0);  // two lanes to a quarter
    to.scale = bits == 4 ? scales : _mm512_permutexvar_ps(lanes, scales);
}

template <int bits>
inline void make(const uint8_t* packed, __m512 scales, Ready<Bytes>& to) {
    unpack<bits>(packed, to.values);
    to.scale = scales;
}

inline __m512 add_product(__m512 sum, const Ready<Halves>& w, const Halves& x) {
    __m512 products = _mm512_setzero_ps();
    for (int j = 0; j < 4; j++)
        products = Bf16::step(products, w.values[j], _mm512_loadu_ps((const float*)(x.values + 32 * j)));
    return _mm512_fmadd_ps(products, w.scale, sum);
}

inline __m512 add_product(__m512 sum, const Ready<Bytes>& w, const Bytes& x) {
    __m512i products = _mm512_loadu_si512(x.offset);
    for (int j = 0; j < 2; j++) products = step(products, w.values[j], _mm512_loadu_si512(x.codes + 64 * j));
    __m512 scale = _mm512_mul_ps(w.scale, _mm512_broadcast_f32x4(_mm_loadu_ps(x.scales)));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sum);
}

// The sums of four vectors, each in the same order.
inline __m128 sums_of(const __m512* v) {
    auto pair = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    __m512 a = pair(v[0], v[2]), b = pair(v[1], v[3]), quads = pair(a, b);
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// TOGETHER rows, each a block at a time made ready for its products.
template <int bits, int parts, class X>
struct Packed {
    const uint8_t* packed[TOGETHER];
    const uint16_t* scales[TOGETHER];

    Packed(const Quantised& q, const int* rows) {
        for (int i = 0; i < TOGETHER; i++) {
            packed[i] = q.packed + size_t(rows[i]) * q.blocks * (16 * bits);
            scales[i] = q.scales + size_t(rows[i]) * q.blocks * (4 / parts);
        }
        if (q.bits >= 4) return;
        const size_t size = widened(q) + q.blocks * 2;
        auto* made = (uint8_t*)scratch<3>((TOGETHER * size + 3) / 4);
        for (int i = 0; i < TOGETHER; i++, made += size) {
            packed[i] = made;
            widen_row(q, rows[i], made);
            if (q.bits != coded) continue;
            auto* scale = (uint16_t*)(made + widened(q));  // the row's one, for every block
            std::fill_n(scale, q.blocks, q.scales[rows[i]]);
            scales[i] = scale;
        }
    }
    Ready<X> operator()(int b, int i) const {
        const uint8_t* block = packed[i] + b * 16 * bits;
        for (int line = 0; line < bits / 4; line++) _mm_prefetch((const char*)block + AHEAD + 64 * line, _MM_HINT_T0);
        Ready<X> to;
        make<bits>(block, scales_of<parts>(scales[i] + b * (4 / parts)), to);
        return to;
    }
};

// out[m] = the rows . x[m], for M tokens; weights(b, i) is block b of row i.
template <int M, class Weights, class X>
void dots(int blocks, Weights weights, const X* const* x, __m128* out) {
    __m512 sum[M][TOGETHER];
    for (auto& token : sum)
        for (auto& s : token) s = _mm512_setzero_ps();
    for (int b = 0; b < blocks; b++)
        for (int i = 0; i < TOGETHER; i += 2) {  // two rows to each load of a token's values
            const Ready<X>&one = weights(b, i), &two = weights(b, i + 1);
            for (int m = 0; m < M; m++) {
                sum[m][i] = add_product(sum[m][i], one, x[m][b]);
                sum[m][i + 1] = add_product(sum[m][i + 1], two, x[m][b]);
            }
        }
    for (int m = 0; m < M; m++) out[m] = sums_of(sum[m]);
}

template <class Weights, class X>
void by_count(int blocks, Weights weights, const X* const* x, int count, __m128* out) {
    switch (count) {
        case 1: return dots<1>(blocks, weights, x, out);
        case 2: return dots<2>(blocks, weights, x, out);
        case 3: return dots<3>(blocks, weights, x, out);
        default: return dots<4>(blocks, weights, x, out);
    }
}

// Rows from.. of the matrix against `count` tokens; put(row, token, values) takes each token's next TOGETHER, of which
// those past the end mean nothing. For many tokens the rows are made ready once, for as many as stay in a core's cache.
template <int bits, int parts, class Token, class Put>
void rows_of(const Quantised& q, int from, int end, int count, Token token, Put put) {
    using X = std::decay_t<decltype(*token(0))>;
    auto* kept = (Ready<X>*)scratch<2>(count > BATCH ? size_t(q.blocks) * TOGETHER * sizeof(Ready<X>) / 4 : 0);
    auto again = [=](int b, int i) -> const Ready<X>& { return kept[b * TOGETHER + i]; };
    for (int low = 0; low < count; low += CACHED)
        for (int r = from; r < end; r += TOGETHER) {
            int rows[TOGETHER];
            for (int i = 0; i < TOGETHER; i++) rows[i] = std::min(r + i, end - 1);
            const Packed<bits, parts, X> packed(q, rows);
            int high = std::min(count, low + CACHED);
            for (int at = 0; high - low > BATCH && at < q.blocks * TOGETHER; at++)
                kept[at] = packed(at / TOGETHER, at % TOGETHER);
            for (int m = low; m < high; m += BATCH) {
                const X* x[BATCH];
                __m128 out[BATCH];
                int batch = std::min(BATCH, high - m);
                for (int i = 0; i < batch; i++) x[i] = token(m + i);
                if (high - low > BATCH)
                    by_count(q.blocks, again, x, batch, out);
                else
                    by_count(q.blocks, packed, x, batch, out);
                for (int i = 0; i < batch; i++) put(r, m + i, out[i]);
            }
        }
}

template <int bits, class Token, class Put>
void by_group(const Quantised& q, int from, int end, int count, Token token, Put put) {
    switch (q.group) {
        case 32: return rows_of<bits, 1>(q, from, end, count, token, put);
        case 64: return rows_of<bits, 2>(q, from, end, count, token, put);
        default: return rows_of<bits, 4>(q, from, end, count, token, put);
    }
}

template <class Token, class Put>
void rows_against(const Quantised& q, int from, int end, int count, Token token, Put put) {
    (q.bits == 8 ? by_group<8, Token, Put> : by_group<4, Token, Put>)(q, from, end, count, token, put);
}

// hidden [edges, stride] bf16: zero in its padding, filled here.
template <class X>
void project(const Layer& l, const Quantised* up, const Rows<X>& x, uint16_t* hidden, size_t stride) {
    const int rows = share(l.d_expert, l.threads), shares = (l.d_expert + rows - 1) / rows;
    on_threads(l.experts * shares, l.threads, [&](int task) {
        int e = task / shares, from = e ? l.ends[e - 1] : 0, count = l.ends[e] - from;
        if (!count) return;
        int begin = task % shares * rows, end = std::min(begin + rows, l.d_expert);
        const Quantised& own = up[e];
        float *gate = scratch<0>(size_t(count) * rows), *linear = scratch<1>(size_t(count) * rows);
        auto token = [&](int m) { return x(own, l.token[from + m]); };
        auto into = [&](float* all, int zero) {
            return [=](int r, int m, __m128 v) { _mm_storeu_ps(all + m * rows + r - zero, v); };
        };
        rows_against(own, begin, end, count, token, into(gate, begin));
        int after = l.d_expert;
        if (l.gated) rows_against(own, after + begin, after + end, count, token, into(linear, after + begin));
        for (int m = 0; m < count; m++)
            for (int r = 0; r < end - begin; r += VECTOR) {
                __m512 a = activate(_mm512_loadu_ps(gate + m * rows + r), Pointwise(l.pointwise)).value;
                if (l.gated) a = _mm512_mul_ps(a, _mm512_loadu_ps(linear + m * rows + r));
                Bf16::store(hidden + (from + m) * stride + begin + r, first(end - begin - r), a);
            }
    });
}

template <class X>
void combine(const Layer& l, const Quantised* down, const Rows<X>& hidden, uint16_t* y) {
    const int fit = (256 << 10) / 4 / std::max<int64_t>(l.tokens, 1) / VECTOR * VECTOR;  // sums stay in a core's cache
    const int rows = std::min(share(l.d_model, l.threads), std::max(fit, 2 * VECTOR));
    on_threads((l.d_model + rows - 1) / rows, l.threads, [&](int task) {
        int from = task * rows, end = std::min(from + rows, l.d_model);
        float* sums = scratch<0>(l.tokens * rows);
        std::fill_n(sums, l.tokens * rows, 0.f);
        for (int e = 0, edge = 0; e < l.experts; edge = l.ends[e++])
            rows_against(
                down[e], from, end, l.ends[e] - edge, [&](int m) { return hidden(down[e], edge + m); },
                [&](int r, int m, __m128 v) {
                    float* sum = sums + l.token[edge + m] * rows + r - from;
                    _mm_storeu_ps(sum, _mm_fmadd_ps(_mm_set1_ps(l.weight[edge + m]), v, _mm_loadu_ps(sum)));
                });
        for (int64_t t = 0; t < l.tokens; t++)
            for (int d = from; d < end; d += VECTOR)
                Bf16::store(y + t * l.d_model + d, first(end - d), _mm512_loadu_ps(sums + t * rows + d - from));
    });
}

template <class X>
void layer(const Layer& l, uint16_t* y) {
    const auto *up = (const Quantised*)l.up, *down = (const Quantised*)l.down;  // of each expert
    const size_t stride = size_t(down->blocks) * 128;
    std::vector<uint16_t> hidden(l.edges * stride);
    project<X>(l, up, {up, l.experts, (const uint16_t*)l.x, l.tokens, l.threads}, hidden.data(), stride);
    combine<X>(l, down, {down, l.experts, hidden.data(), l.edges, l.threads}, y);
}

template <class X>
void linear(const Quantised& q, const uint16_t* x_TK, int64_t tokens, int threads, uint16_t* y) {
    const Rows<X> x(&q, 1, x_TK, tokens, threads);
    const int rows = share(q.rows, threads);
    on_threads((q.rows + rows - 1) / rows, threads, [&](int task) {
        rows_against(
            q, task * rows, std::min((task + 1) * rows, q.rows), tokens, [&](int m) { return x(q, m); },
            [&](int r, int m, __m128 v) {
                __mmask16 mask = first(std::min(TOGETHER, q.rows - r));
                Bf16::store(y + size_t(m) * q.rows + r, mask, _mm512_castps128_ps512(v));
            });
    });
}

}  // namespace

extern "C" {

// x [T, blocks * 128] bf16, padded with zeros; y [T, D] bf16; as_bytes: x and hidden go to int8. Returns a Status.
int moeforge_quantised(const Layer* l, int as_bytes, uint16_t* y) {
    if (!l->sound()) return unsound;
    return status_of([&] { (as_bytes ? layer<Bytes> : layer<Halves>)(*l, y); });
}

// y [T, rows] = x W^T for one matrix. Returns a Status.
int moeforge_quantised_linear(const Quantised* q, const uint16_t* x, int64_t tokens, int as_bytes, int threads,
                              uint16_t* y) {
    return status_of([&] { (as_bytes ? linear<Bytes> : linear<Halves>)(*q, x, tokens, threads, y); });
}
}
