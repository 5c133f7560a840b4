// The two number types, each as the few operations that differ, and the block product that everything else is made of.
//
// A row operand lies as it is in memory, its K values contiguous: expert weights [out, in] need no packing. The other
// operand is a panel [K / pair][lanes]: one 32-bit word per lane holds `pair` neighbouring values of K (two of bf16).
// Every lane is computed alone, its K products in order, so a result never depends on who its neighbours are.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

constexpr int VECTOR = 16;            // lanes of a vector
constexpr int LANES = 3 * VECTOR;     // lanes of a whole block
constexpr int ROWS = 8;               // rows of a register tile: 8 x 3 accumulators, 3 loads and 8 broadcasts per step
constexpr int GROUP = 32;             // rows between two epilogues; as columns turned over, a cache line of bf16

inline __mmask16 first(int n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1; }

struct Float {
    using Value = float;
    static constexpr int pair = 1;

    static __m512 step(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
    static __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
    static void store(float* p, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(p, mask, v); }
    static __m512 tail(const float*) { return _mm512_setzero_ps(); }  // a row has no half words

    // Up to 16 words of a row from value k on.
    static __m512i words(const float* row, int k, int end) {
        return _mm512_maskz_loadu_epi32(first(end - k), row + k);
    }
    // One word per column: the values of `pair` rows.
    static __m512i column_words(const float* a, const float*, __mmask16 mask) {
        return _mm512_maskz_loadu_epi32(mask, a);
    }
    static __m512i join(__m512 v, __m512) { return _mm512_castps_si512(v); }
};

struct Bf16 {
    using Value = uint16_t;
    static constexpr int pair = 2;

    static __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

#ifdef __AVX512BF16__
    static __m512 step(__m512 sum, __m512 a, __m512 b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
    }
    static __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
    static __m512 step(__m512 sum, __m512 a, __m512 b) {
        auto low = [](__m512 v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16)); };
        auto high = [](__m512 v) {
            return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0xFFFF0000)));
        };
        return _mm512_fmadd_ps(low(a), low(b), _mm512_fmadd_ps(high(a), high(b), sum));
    }
    static __m256i narrow(__m512 v) {  // to nearest, ties to even; NaN stays one
        __m512i bits = _mm512_castps_si512(v);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        near = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x00400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16));
    }
#endif

    static __m512 load(const uint16_t* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }
    static void store(uint16_t* p, __mmask16 mask, __m512 v) { _mm256_mask_storeu_epi16(p, mask, narrow(v)); }
    static __m512 tail(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(*p)); }

    static __m512i words(const uint16_t* row, int k, int end) {
        int left = std::min(end - k, 32);
        return _mm512_maskz_loadu_epi16(left == 32 ? 0xFFFFFFFFu : (1u << left) - 1, row + k);
    }
    static __m512i column_words(const uint16_t* a, const uint16_t* b, __mmask16 mask) {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
        if (!b) return low;
        __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    static __m512i join(__m512 low, __m512 high) {
        __m512i words = _mm512_cvtepu16_epi32(narrow(low));
        return _mm512_or_si512(words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(high)), 16));
    }
};

inline int words_of(int k, int pair) { return (k + pair - 1) / pair; }

// Zeros past the caches: memory is written without being read first.
inline void clear(void* at, size_t bytes) {
    char *p = (char*)at, *end = p + bytes;
    char* aligned = std::min(end, p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64);
    memset(p, 0, aligned - p);
    for (p = aligned; p + 64 <= end; p += 64) _mm512_stream_si512((__m512i*)p, _mm512_setzero_si512());
    memset(p, 0, end - p);
    _mm_sfence();
}

// C[R][V vectors] = A[R][K] * panel. `a` has a stride of `lda` values, `c` of LANES.
template <class N, int R, int V>
inline void tile(const typename N::Value* a, size_t lda, const float* panel, int k, float* c) {
    __m512 sum[R][V];
    for (auto& row : sum)
        for (auto& v : row) v = _mm512_setzero_ps();
    auto add = [&](auto word) {
        __m512 b[V];
        for (int v = 0; v < V; v++) b[v] = _mm512_loadu_ps(panel + v * VECTOR);
        for (int r = 0; r < R; r++) {
            __m512 value = word(a + r * lda);
            for (int v = 0; v < V; v++) sum[r][v] = N::step(sum[r][v], value, b[v]);
        }
        a += N::pair;
        panel += V * VECTOR;
    };
    for (int s = k / N::pair; s; s--)
        add([](const typename N::Value* p) {
            float word;
            memcpy(&word, p, 4);
            return _mm512_set1_ps(word);
        });
    if (k % N::pair) add(N::tail);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) _mm512_storeu_ps(c + r * LANES + v * VECTOR, sum[r][v]);
}

template <class N, int V>
inline void rows_by(const typename N::Value* a, size_t lda, int rows, const float* panel, int k, float* c) {
    for (; rows >= 8; rows -= 8, a += 8 * lda, c += 8 * LANES) tile<N, 8, V>(a, lda, panel, k, c);
    if (rows & 4) tile<N, 4, V>(a, lda, panel, k, c), a += 4 * lda, c += 4 * LANES;
    if (rows & 2) tile<N, 2, V>(a, lda, panel, k, c), a += 2 * lda, c += 2 * LANES;
    if (rows & 1) tile<N, 1, V>(a, lda, panel, k, c);
}

inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Up to 16 rows of sums, the last one again where there are fewer.
inline void load_rows(const float* c, int rows, __m512i block[16]) {
    for (int r = 0; r < 16; r++) block[r] = _mm512_loadu_si512(c + std::min(r, rows - 1) * LANES);
}

// The same values, bit for bit, where lanes are few and reading A is what takes time: up to 16 rows are turned over
// in registers, so that a row is a lane and each token's words are broadcast; as many bytes from `ahead` on are fetched.
template <class N, int LANES_USED>
inline void stream(const typename N::Value* a, size_t lda, int rows, const float* panel, int k, float* c,
                   const void* ahead) {
    const char* next = (const char*)ahead;
    __m512 sum[LANES_USED];
    for (auto& v : sum) v = _mm512_setzero_ps();
    for (int from = 0; from < k; from += 16 * N::pair, next += 16 * 64) {
        __m512i block[16];
        for (int r = 0; r < 16; r++) {
            block[r] = N::words(a + std::min(r, rows - 1) * lda, from, k);
            _mm_prefetch(next + 64 * r, _MM_HINT_T0);
        }
        transpose(block);
        for (int w = 0; w < std::min(16, words_of(k - from, N::pair)); w++, panel += LANES_USED)
            for (int i = 0; i < LANES_USED; i++)
                sum[i] = N::step(sum[i], _mm512_castsi512_ps(block[w]), _mm512_set1_ps(panel[i]));
    }
    __m512i turned[16];
    for (int i = 0; i < 16; i++) turned[i] = i < LANES_USED ? _mm512_castps_si512(sum[i]) : _mm512_setzero_si512();
    transpose(turned);
    for (int r = 0; r < rows; r++) _mm512_storeu_si512(c + r * LANES, turned[r]);
}

template <class N, int LANES_USED>
inline void streams(const typename N::Value* a, size_t lda, int rows, const float* panel, int k, float* c,
                    const void* ahead) {
    for (int r = 0; r < rows; r += 16) {
        const auto* own = a + r * lda;
        const void* next = r + 16 < rows ? own + 16 * lda : ahead;
        stream<N, LANES_USED>(own, lda, std::min(16, rows - r), panel, k, c + r * LANES, next);
    }
}

// C[rows][lanes] = A[rows][K] * panel[K / pair][lanes], for up to GROUP rows.
template <class N>
void vector_product(const typename N::Value* a, size_t lda, int rows, const float* panel, int lanes, int k, float* c,
                    const void* ahead) {
    switch (lanes) {
        case 1: return streams<N, 1>(a, lda, rows, panel, k, c, ahead);
        case 2: return streams<N, 2>(a, lda, rows, panel, k, c, ahead);
        case 4: return streams<N, 4>(a, lda, rows, panel, k, c, ahead);
        case 8: return streams<N, 8>(a, lda, rows, panel, k, c, ahead);
        case 12: return streams<N, 12>(a, lda, rows, panel, k, c, ahead);
        case VECTOR: return rows_by<N, 1>(a, lda, rows, panel, k, c);
        case 2 * VECTOR: return rows_by<N, 2>(a, lda, rows, panel, k, c);
        default: return rows_by<N, 3>(a, lda, rows, panel, k, c);
    }
}

// What computes block products in one task; tiles.h has the one of bf16. `ahead` is what will be read next.
template <class N>
struct Unit {
    static int block() { return LANES; }  // lanes of a whole block
    static int lanes_for(int count) {     // of a panel for so many tokens; few ones are a shape of their own
        for (int few : {1, 2, 4, 8, 12})
            if (count <= few) return few;
        return (count + VECTOR - 1) / VECTOR * VECTOR;
    }
    void product(const typename N::Value* a, size_t lda, int rows, const float* panel, int lanes, int k, float* c,
                 const void* ahead) {
        vector_product<N>(a, lda, rows, panel, lanes, k, c, ahead);
    }
};

// Panel with a lane per row: `row(i)` for i < count; lanes past them are zero.
template <class N, class Row>
void pack_rows(Row row, int count, int lanes, int k, float* panel) {
    for (int v = 0; v * VECTOR < lanes; v++)
        for (int w = 0; w < words_of(k, N::pair); w += 16) {
            __m512i block[16];
            for (int i = 0; i < 16; i++) {
                int lane = v * VECTOR + i;
                block[i] = lane < count ? N::words(row(lane), w * N::pair, k) : _mm512_setzero_si512();
            }
            transpose(block);
            for (int i = 0; i < std::min(16, words_of(k, N::pair) - w); i++)
                _mm512_mask_storeu_epi32(panel + (w + i) * lanes + v * VECTOR, first(lanes - v * VECTOR), block[i]);
        }
}

// Panel with a lane per column: columns [from, from + count) of the k rows `row(i)`.
template <class N, class Row>
void pack_columns(Row row, int k, int from, int count, int vectors, float* panel) {
    for (int i = 0; i < k; i += N::pair)
        for (int v = 0; v < vectors; v++, panel += VECTOR) {
            int at = from + v * VECTOR;
            auto second = N::pair == 2 && i + 1 < k ? row(i + 1) + at : nullptr;
            _mm512_storeu_si512(panel, N::column_words(row(i) + at, second, first(count - v * VECTOR)));
        }
}

// out[count][stride]: columns [from, from + count) of the k rows `row(i)`, each made a row of k values. A row may be
// null where it is the second of its pair: zeros.
template <class N, class Row>
void turn(Row row, int k, int from, int count, typename N::Value* out, size_t stride) {
    for (int c = 0; c < count; c += 16)
        for (int i = 0; i < k; i += 16 * N::pair) {
            __m512i block[16];
            for (int j = 0; j < 16; j++) {
                int at = i + j * N::pair;
                auto second = N::pair == 2 && at + 1 < k ? row(at + 1) : nullptr;
                if (second) second += from + c;
                if (at < k && c == 0) {
                    _mm_prefetch((const char*)(row(at) + from + count), _MM_HINT_T1);
                    if (second) _mm_prefetch((const char*)(second + count), _MM_HINT_T1);
                }
                block[j] = at < k ? N::column_words(row(at) + from + c, second, first(count - c))
                                  : _mm512_setzero_si512();
            }
            transpose(block);
            __mmask16 mask = first(words_of(k - i, N::pair));  // the stride is a multiple of `pair`
            for (int j = 0; j < std::min(16, count - c); j++)
                _mm512_mask_storeu_epi32(out + (c + j) * stride + i, mask, block[j]);
        }
}
