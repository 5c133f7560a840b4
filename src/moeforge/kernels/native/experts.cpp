// A layer of expert MLPs over routed edges, forward and backward: one call per pass, threads inside.
//
// Tokens are lanes. A pass is made of two kinds of loops over register tiles (numbers.h):
//   project: per expert and run of its tokens, gathers rows into panels and leaves activated panels behind;
//   combine: per range of output columns, all experts in order, so a token's sum has one order whatever runs beside it.
// Backward is the same pair with weights turned over in cache-sized pieces, plus the products over tokens.
// The pre-activation z is kept per block of tokens as [2H][tokens], the order in which backward reads it.
#include "activation.h"
#include "blocks.h"

namespace {

template <class N>
struct Pass {
    using Value = typename N::Value;
    const Layer& l;
    const Plan plan;
    const Value *x, *up, *down;
    const int D, H, width;
    const int half, padded;  // rows of a panel for z: gate and linear each start with a word of their own

    explicit Pass(const Layer& layer)
        : l(layer), plan(layer, N()), x((const Value*)l.x), up((const Value*)l.up), down((const Value*)l.down),
          D(l.d_model), H(l.d_expert), width(l.gated ? 2 * H : H),
          half(words_of(H, N::pair) * N::pair), padded(l.gated ? 2 * half : H) {}

    Pointwise kind() const { return Pointwise(l.pointwise); }
    const Value* matrix(const Value* all, int e) const { return all + size_t(e) * (all == up ? width : H) * D; }
    float* panel(float* all, const Block& b, int k) const { return all + b.before * words_of(k, N::pair); }

    // Panels of the rows of `source` that the blocks' edges name.
    float* gather(const Task& t, const Value* source) const {
        size_t per_lane = words_of(D, N::pair), base = plan.blocks[t.block].before;
        const Block& last = plan.blocks[t.end - 1];
        float* panels = scratch<0>((last.before + last.lanes - base) * per_lane);
        for (int i = t.block; i < t.end; i++) {
            const Block& b = plan.blocks[i];
            const int64_t* token = l.token + b.from;
            pack_rows<N>([&](int lane) { return source + token[lane] * D; }, b.count, b.lanes, D,
                         panels + (b.before - base) * per_lane);
        }
        return panels;
    }

    // One vector of lanes of z's row u: a block after the other, each [width][its tokens], as it is written and read.
    template <class P>
    P of_block(P z, const Block& b, int u, int v) const {
        return z + size_t(b.from) * width + size_t(u) * b.count + v * VECTOR;
    }

    // The same of rows that products over tokens will read: [rows][tokens of the expert].
    template <class P>
    P kept(P all, const Block& b, int rows, int u, int v) const {
        size_t from = plan.from(b.expert), many = l.ends[b.expert] - from;
        return all + from * rows + u * many + (b.from - from) + v * VECTOR;
    }

    void project(Value* z, float* hidden) const {
        auto tasks = plan.tasks(l, N(), true);
        on_threads(tasks.size(), l.threads, [&](int task) {
            const Task& t = tasks[task];
            const Task* soon = task + l.threads < int(tasks.size()) ? &tasks[task + l.threads] : nullptr;  // the thread's next
            const Value* then = soon ? matrix(up, plan.blocks[soon->block].expert) + size_t(soon->unit) * D : nullptr;
            const float* panels = gather(t, x);
            const Value* rows = matrix(up, plan.blocks[t.block].expert);
            alignas(64) float gate[GROUP * LANES], linear[GROUP * LANES];
            Unit<N> unit;
            for (int u = t.unit; u < t.last; u += GROUP) {
                int many = std::min(GROUP, t.last - u);
                for (int i = t.block; i < t.end; i++) {
                    const Block& b = plan.blocks[i];
                    const float* in = panels + (b.before - plan.blocks[t.block].before) * words_of(D, N::pair);
                    const Value *own = rows + size_t(u) * D, *next = u + many < t.last ? own + size_t(many) * D : then;
                    const Value* other = own + size_t(H) * D;
                    bool last = i + 1 == t.end;
                    const Value* first_next = l.gated ? other : next;
                    unit.product(own, D, many, in, b.lanes, D, gate, last ? first_next : nullptr);
                    if (l.gated) unit.product(other, D, many, in, b.lanes, D, linear, last ? next : nullptr);
                    if (z) keep(z, b, u, many, gate, linear);
                    activate_block(b, u, many, gate, linear, hidden);
                }
            }
        });
    }

    void keep(Value* z, const Block& b, int u, int many, const float* gate, const float* linear) const {
        for (int r = 0; r < many; r++)
            for (int v = 0; v < b.vectors(); v++) {
                __mmask16 mask = first(b.count - v * VECTOR);
                N::store(of_block(z, b, u + r, v), mask, _mm512_load_ps(gate + r * LANES + v * VECTOR));
                if (l.gated)
                    N::store(of_block(z, b, H + u + r, v), mask, _mm512_load_ps(linear + r * LANES + v * VECTOR));
            }
    }

    void activate_block(const Block& b, int u, int many, const float* gate, const float* linear, float* hidden) const {
        auto value = [&](int r, int v) {
            if (r >= many) return _mm512_setzero_ps();
            __m512 a = activate(_mm512_load_ps(gate + r * LANES + v * VECTOR), kind()).value;
            return l.gated ? _mm512_mul_ps(a, _mm512_load_ps(linear + r * LANES + v * VECTOR)) : a;
        };
        put(b, u, many, H, hidden, value);
    }

    // Rows u.. of a block's panel of k rows, from their values in float32.
    template <class F>
    void put(const Block& b, int u, int many, int k, float* all, F value) const {
        float* out = panel(all, b, k) + size_t(u / N::pair) * b.lanes;
        for (int r = 0; r < many; r += N::pair, out += b.lanes)
            for (int v = 0; v < b.vectors(); v++) {
                __m512i words = N::join(value(r, v), N::pair == 2 ? value(r + 1, v) : _mm512_setzero_ps());
                _mm512_mask_storeu_epi32(out + v * VECTOR, first(b.lanes - v * VECTOR), words);
            }
    }

    // y[t] = sum over t's edges, by ascending expert, of matrix * panel lane, times `weight` where given. Without
    // `turned` the matrix is [D][k] (down); with it [width][D] (up), of which columns are turned over first.
    template <bool turned>
    void combine(const Value* matrices, int k, float* panels, const float* weight, Value* y) const {
        int columns = std::max(GROUP, (D / ((l.tokens > FEW_TOKENS ? 4 : 1) * l.threads) + GROUP - 1) / GROUP * GROUP);
        on_threads((D + columns - 1) / columns, l.threads, [&](int range) {
            int from = range * columns, many = std::min(columns, D - from);
            float* sums = scratch<0>(l.tokens * columns);
            memset(sums, 0, l.tokens * columns * 4);
            alignas(64) float c[GROUP * LANES];
            size_t stride = turned ? (k + 1) / 2 * 2 : k;
            int part = std::clamp<size_t>(cache() / (stride * sizeof(Value)) / GROUP * GROUP, GROUP, columns);
            Value* turned_rows = (Value*)scratch<1>(turned ? part * stride : 0);
            Unit<N> unit;
            for (int e = 0; e < l.experts; e++) {
                if (plan.start[e] == plan.start[e + 1]) continue;
                const Value* own = matrix(matrices, e);
                auto row = [&](int i) -> const Value* {
                    int r = i < half ? i : i - half;
                    return r < H ? own + size_t(i < half ? r : H + r) * D : nullptr;
                };
                for (int low = 0; low < many; low += part) {  // rows that stay in a core's cache while blocks pass
                    int high = std::min(many, low + part);
                    for (int d = low; turned && d < high; d += GROUP)
                        turn<N>(row, k, from + d, std::min(GROUP, high - d), turned_rows + (d - low) * stride, stride);
                    const Value* rows = turned ? turned_rows : own + size_t(from + low) * k;
                    for (int i = plan.start[e]; i < plan.start[e + 1]; i++)
                        for (int d = low; d < high; d += GROUP) {
                            const Block& b = plan.blocks[i];
                            const Value *a = rows + (d - low) * stride, *ahead = a + GROUP * stride;
                            if (turned || i + 1 < plan.start[e + 1]) ahead = nullptr;
                            else if (d + GROUP >= many) ahead = after(matrices, e) + size_t(from) * k;
                            int group = std::min(GROUP, high - d);
                            unit.product(a, stride, group, panel(panels, b, k), b.lanes, k, c, ahead);
                            scatter(b, group, c, weight, sums + d, columns);
                        }
                }
            }
            for (int64_t t = 0; t < l.tokens; t++)
                for (int d = 0; d < many; d += VECTOR)
                    N::store(y + t * D + from + d, first(many - d), _mm512_loadu_ps(sums + t * columns + d));
        });
    }

    // The matrix of the next expert that has tokens.
    const Value* after(const Value* all, int e) const {
        while (++e < l.experts && plan.start[e] == plan.start[e + 1]) continue;
        return matrix(all, e);
    }

    void scatter(const Block& b, int rows, const float* c, const float* weight, float* sums, int stride) const {
        for (int v = 0; v < b.vectors(); v++)
            for (int r = 0; r < rows; r += 16) {
                __m512i block[16];
                load_rows(c + r * LANES + v * VECTOR, rows - r, block);
                transpose(block);
                for (int i = 0; i < std::min(VECTOR, b.count - v * VECTOR); i++) {
                    int edge = b.from + v * VECTOR + i;
                    float* sum = sums + l.token[edge] * stride + r;
                    __m512 add = _mm512_castsi512_ps(block[i]), w = splat(weight ? weight[edge] : 1);
                    __mmask16 mask = first(rows - r);
                    _mm512_mask_storeu_ps(sum, mask, _mm512_fmadd_ps(add, w, _mm512_maskz_loadu_ps(mask, sum)));
                }
            }
    }

    // From dy and z: the gradients of combine weights, and, for the products to come, z's gradient as rows over tokens
    // (dz) and as panels (turned), and the weighted activations as rows over tokens (wa).
    void project_back(const Value* dy, const Value* z, float* dweight, Value* dz, Value* wa, float* panels) const {
        auto tasks = plan.tasks(l, N(), false);
        size_t stride = (D + 1) / 2 * 2;
        on_threads(tasks.size(), l.threads, [&](int task) {
            const Task& t = tasks[task];
            const float* in = gather(t, dy);
            const Value* own = matrix(down, plan.blocks[t.block].expert);
            Value* rows = (Value*)scratch<1>(GROUP * stride);
            alignas(64) float da[GROUP * LANES];
            Unit<N> unit;
            for (int i = t.block; i < t.end; i++)
                std::fill_n(dweight + plan.blocks[i].from, plan.blocks[i].count, 0.f);
            for (int u = 0; u < H; u += GROUP) {
                int many = std::min(GROUP, H - u);
                turn<N>([&](int d) { return own + size_t(d) * H; }, D, u, many, rows, stride);
                for (int i = t.block; i < t.end; i++) {
                    const Block& b = plan.blocks[i];
                    size_t lanes = b.before - plan.blocks[t.block].before;
                    const float* panel = in + lanes * words_of(D, N::pair);
                    unit.product(rows, stride, many, panel, b.lanes, D, da, nullptr);
                    activate_back(b, u, many, da, z, dweight, dz, wa, panels);
                }
            }
        });
    }

    void activate_back(const Block& b, int u, int many, const float* da, const Value* z, float* dweight, Value* dz,
                       Value* wa, float* panels) const {
        alignas(64) float dgate[GROUP * LANES], dlinear[GROUP * LANES];
        for (int v = 0; v < b.vectors(); v++) {
            __mmask16 mask = first(b.count - v * VECTOR);
            float* weights = dweight + b.from + v * VECTOR;
            __m512 w = _mm512_maskz_loadu_ps(mask, l.weight + b.from + v * VECTOR);
            __m512 dw = _mm512_maskz_loadu_ps(mask, weights);
            for (int r = 0; r < many; r++) {
                int at = r * LANES + v * VECTOR;
                Point p = activate(N::load(of_block(z, b, u + r, v), mask), kind());
                __m512 linear = l.gated ? N::load(of_block(z, b, H + u + r, v), mask) : splat(1);
                __m512 a = _mm512_mul_ps(p.value, linear), grad = _mm512_load_ps(da + at);
                dw = _mm512_fmadd_ps(grad, a, dw);
                N::store(kept(wa, b, H, u + r, v), mask, _mm512_mul_ps(a, w));
                grad = _mm512_mul_ps(grad, w);
                __m512 towards = _mm512_mul_ps(_mm512_mul_ps(grad, linear), p.slope);
                _mm512_store_ps(dgate + at, towards);
                N::store(kept(dz, b, width, u + r, v), mask, towards);
                if (!l.gated) continue;
                _mm512_store_ps(dlinear + at, _mm512_mul_ps(grad, p.value));
                N::store(kept(dz, b, width, H + u + r, v), mask, _mm512_mul_ps(grad, p.value));
            }
            _mm512_mask_storeu_ps(weights, mask, dw);
        }
        auto from = [&](const float* c) {
            return [=](int r, int v) {
                return r < many ? _mm512_load_ps(c + r * LANES + v * VECTOR) : _mm512_setzero_ps();
            };
        };
        put(b, u, many, padded, panels, from(dgate));
        if (l.gated) put(b, half + u, many, padded, panels, from(dlinear));
    }

    // dup[e] = dz x, ddown[e] = (wa dy) turned, over the tokens of each expert: a task is an expert and a range of
    // columns, as wide as its panels fit the cache, so that whole rows are written where tokens are few.
    void weights(const Value* dy, const Value* dz, const Value* wa, Value* dup, Value* ddown) const {
        struct Range {
            int expert, from, many;
        };
        std::vector<Range> ranges;
        for (int e = 0; e < l.experts; e++) {
            size_t panel = size_t(words_of(std::max(1, plan.tokens(e)), N::pair)) * Unit<N>::block() * 4;
            int wide = std::max<int>(1, cache() / 2 / panel) * Unit<N>::block();
            for (int from = 0; from < D; from += wide) ranges.push_back({e, from, std::min(wide, D - from)});
        }
        on_threads(ranges.size(), l.threads, [&](int range) {
            const Range& r = ranges[range];
            Value *up_rows = dup + size_t(r.expert) * width * D, *down_rows = ddown + size_t(r.expert) * D * H;
            if (plan.start[r.expert] == plan.start[r.expert + 1]) {  // nobody came: one range, all columns
                clear(up_rows, size_t(width) * D * sizeof(Value));
                clear(down_rows, size_t(D) * H * sizeof(Value));
                return;
            }
            size_t base = plan.from(r.expert);
            over_tokens<false>(r.expert, x, dz + base * width, width, r.from, r.many, up_rows);
            over_tokens<true>(r.expert, dy, wa + base * H, H, r.from, r.many, down_rows);
        });
    }

    // rows [rows][M] times the gathered rows' columns [M][many] -> out [rows][D], or, turned, [D][rows].
    template <bool turned>
    void over_tokens(int e, const Value* source, const Value* rows, int height, int from, int many, Value* out) const {
        int tokens = plan.tokens(e);
        const int64_t* token = l.token + plan.from(e);
        const int block = Unit<N>::block();
        size_t panel_words = size_t(words_of(tokens, N::pair)) * block;
        float* panels = scratch<0>(panel_words * ((many + block - 1) / block));
        auto wide = [&](int c) { return std::min(block, many - c); };
        auto vectors = [&](int c) { return (wide(c) + VECTOR - 1) / VECTOR; };
        for (int c = 0; c < many; c += block)
            pack_columns<N>([&](int i) { return source + token[i] * D; }, tokens, from + c, wide(c), vectors(c),
                            panels + c / block * panel_words);
        alignas(64) float sums[GROUP * LANES];
        Unit<N> unit;
        for (int u = 0; u < height; u += GROUP) {
            int group = std::min(GROUP, height - u);
            for (int c = 0; c < many; c += block) {
                unit.product(rows + size_t(u) * tokens, tokens, group, panels + c / block * panel_words,
                             vectors(c) * VECTOR, tokens, sums, nullptr);
                for (int v = 0; v < vectors(c); v++)
                    for (int r = 0; r < group; r += 16)
                        store<turned>(sums + r * LANES + v * VECTOR, std::min(16, group - r),
                                      std::min(VECTOR, wide(c) - v * VECTOR), u + r, from + c + v * VECTOR, height,
                                      out);
            }
        }
    }

    // A vector's lanes of a group of rows u.. and columns d.. into out [rows][D], or, turned, [D][height].
    template <bool turned>
    void store(const float* sums, int group, int across, int u, int d, int height, Value* out) const {
        __m512i block[16];
        load_rows(sums, group, block);
        if (turned) transpose(block);
        for (int r = 0; r < (turned ? across : group); r++) {
            Value* at = turned ? out + size_t(d + r) * height + u : out + size_t(u + r) * D + d;
            N::store(at, first(turned ? group : across), _mm512_castsi512_ps(block[r]));
        }
    }

    void forward(void* y, void* z, float* hidden) const {
        project((Value*)z, hidden);
        combine<false>(down, H, hidden, l.weight, (Value*)y);
    }

    void backward(const Value* dy, const Value* z, Value* dx, float* dweight, Value* dup, Value* ddown, Value* dz,
                  Value* wa, float* panels) const {
        project_back(dy, z, dweight, dz, wa, panels);
        weights(dy, dz, wa, dup, ddown);
        combine<true>(up, padded, panels, nullptr, dx);
    }
};

template <class F>
void with_type(int bf16, F f) {
    if (bf16) f(Bf16{});
    else f(Float{});
}

}  // namespace

extern "C" {

// 32-bit words of the panels of `rows` values per edge, or minus the status that says why there are none.
int64_t moeforge_panel_words(const Layer* l, int rows, int bf16) {
    if (!l->sound()) return -unsound;
    int64_t words = 0;
    int status = status_of([&] { 
        with_type(bf16, [&](auto n) { words = Plan(*l, n).lanes * words_of(rows, decltype(n)::pair); });
    });
    return status ? -status : words;
}

// y [T, D]; z [N * width] (see the top) unless null; hidden: panels of d_expert rows. Both passes return a Status.
int moeforge_forward(const Layer* l, int bf16, void* y, void* z, float* hidden) {
    if (!l->sound()) return unsound;
    return status_of([&] { with_type(bf16, [&](auto n) { Pass<decltype(n)>(*l).forward(y, z, hidden); }); });
}

// Gradients of x, combine weight, up and down; work space: dz [N * width], wa [N * H], panels of width + 2 rows.
int moeforge_backward(const Layer* l, int bf16, const void* dy, const void* z, void* dx, float* dweight, void* dup,
                       void* ddown, void* dz, void* wa, float* panels) {
    if (!l->sound()) return unsound;
    return status_of([&] {
        with_type(bf16, [&](auto n) {
            using V = typename decltype(n)::Value;
            Pass<decltype(n)>(*l).backward((const V*)dy, (const V*)z, (V*)dx, dweight, (V*)dup, (V*)ddown, (V*)dz,
                                           (V*)wa, panels);
        });
    });
}
}
