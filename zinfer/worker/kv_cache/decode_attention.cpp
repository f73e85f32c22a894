// Decode attention on the host: one query token per row against a KV cache in host memory.
//
// Softmax(scale * Q K^T + bias) V, read K and V once per KV head, accumulate in float32.
// Memory bandwidth is the limit for one query head per KV head, arithmetic for eight.
//
// Layouts (row-major, all on the host):
//   q, out     float32 [batch, kv_heads, group, head_dim]; `group` query heads share one KV head
//   k, v       [batch, kv_heads, capacity, head_dim] float32, bfloat16 or float16;
//              8 bits: one unsigned code a value; 4 bits: two codes a byte, where byte j of a group
//              of g values holds value j (low half) and value j + g/2 (high half)
//   scales     float16 [batch, kv_heads, capacity, head_dim / g, 2]: scale and minimum of a group;
//              value = scale * code + minimum
//   bias       float32 [batch or 1, heads or 1, tokens], added to the scores; strides in values
//   sinks      float32 [heads]: a score per head that takes part in the sum and has no value

#include "blocks.h"
#include "blocks_avx512.h"

extern "C" {

struct Problem {
    const float* q;
    const void* k;
    const void* v;
    const uint16_t* k_scales;
    const uint16_t* v_scales;
    const float* bias;
    const float* sinks;
    float* out;
    int64_t batch, kv_heads, group, head_dim, value_dim, tokens, capacity;
    int64_t k_group, v_group;  // values that share a scale
    int64_t bias_batch_stride, bias_head_stride;
    int32_t k_kind, v_kind, threads;
    float softcap;  // 0: none
    float scale;    // of the products of queries and keys
};
}

namespace {

// Scale, bias, softcap and the running softmax of one block: scores become weights.
void soften(State& s, const Problem& p, int64_t row, int64_t head, int64_t from, int n) {
    const int padded = (n + W - 1) / W * W;
    for (int g = 0; g < s.group; g++) {
        float* score = s.scores + g * BLOCK;
        for (int t = 0; t < padded; t += W) store(score + t, load<vf>(score + t) * p.scale);
        if (p.softcap > 0)
            for (int t = 0; t < n; t++) score[t] = p.softcap * std::tanh(score[t] / p.softcap);
        if (p.bias) {
            const float* bias =
                p.bias + row * p.bias_batch_stride + (head + g) * p.bias_head_stride + from;
            for (int t = 0; t < n; t++) score[t] = std::max(score[t] + bias[t], MASKED);
        }
        for (int t = n; t < padded; t++) score[t] = -INFINITY;
        vf most = all(s.most[g]);
        for (int t = 0; t < padded; t += W) {
            vf x = load<vf>(score + t);
            most = x > most ? x : most;
        }
        const float now = largest(most), kept = s.most[g] == now ? 1.f : std::exp(s.most[g] - now);
        vf total = {};
        for (int t = 0; t < padded; t += W) {
            vf x = load<vf>(score + t);
            vf weight = x > -INFINITY ? exp_of(x - now) : vf{};
            total += weight;
            store(score + t, weight);
        }
        s.total[g] = s.total[g] * kept + sum(total);
        s.most[g] = now;
        if (kept == 1.f) continue;
        for (int d = 0; d < s.value_dim; d += W) {
            float* acc = s.acc + (int64_t)g * s.value_dim + d;
            store(acc, load<vf>(acc) * kept);
        }
        const int parts = p.v_scales ? s.value_dim / p.v_group : 0;
        for (int part = 0; part < parts; part++) s.minima[g * parts + part] *= kept;
    }
}

// How one problem's blocks are computed on this processor.
struct Ways {
    ScoreBlock score;
    ValueBlock add;
    // Of an accumulator's number, given the values of a head and of a group. Null: in order.
    int64_t (*place)(int64_t at, int64_t dim, int64_t size) = nullptr;
};

#if defined(ZINFER_VNNI)
int64_t place8(int64_t at, int64_t dim, int64_t size) { return code_place(at, dim, size, false); }
int64_t place4(int64_t at, int64_t dim, int64_t size) { return code_place(at, dim, size, true); }
#endif
#if defined(ZINFER_BF16) && defined(ZINFER_VNNI)
int64_t place16(int64_t at, int64_t, int64_t) { return bf16_place(at); }
#endif

// Some tokens of one KV head of one row: [from, to) of item = row * kv_heads + head.
struct Unit {
    int64_t item, from, to;
};

// Attention over one unit. State is left in acc, most, total. The first keys of the unit that
// probably comes after it are fetched while its last values are worked on.
void attend(const Problem& p, const Ways& ways, Unit unit, Unit coming, State& s) {
    const auto [item, from, to] = unit;
    const int64_t row = item / p.kv_heads, head = item % p.kv_heads * p.group;
    const int64_t k_bytes = row_bytes(p.k_kind, p.head_dim),
                  v_bytes = row_bytes(p.v_kind, p.value_dim);
    const char* k = (const char*)p.k + item * p.capacity * k_bytes;
    const char* v = (const char*)p.v + item * p.capacity * v_bytes;
    const int64_t k_pairs = p.k_scales ? 2 * p.head_dim / p.k_group : 0,
                  v_pairs = p.v_scales ? 2 * p.value_dim / p.v_group : 0;
    const uint16_t* ks = p.k_scales ? p.k_scales + item * p.capacity * k_pairs : nullptr;
    const uint16_t* vs = p.v_scales ? p.v_scales + item * p.capacity * v_pairs : nullptr;
    // Floats that several heads share are 2 to 3 % faster in smaller blocks.
    const int64_t step = ks || vs || p.group == 1 ? BLOCK : BLOCK / 2;
    for (int64_t t = from; t < to; t += step) {
        const int n = (int)std::min<int64_t>(step, to - t);
        const bool last = t + n == to;
        const int64_t first = last ? (coming.item - item) * p.capacity + coming.from : t + n;
        const int64_t count = std::min(step, last ? coming.to - coming.from : to - first);
        const char* values = v + t * v_bytes;
        if (vs) fetch(vs + t * v_pairs, vs + (t + n) * v_pairs);
        if (ks) fetch(ks + first * k_pairs, ks + (first + count) * k_pairs);
        ways.score(s, k + t * k_bytes, ks ? ks + t * k_pairs : nullptr, (int)p.k_group, n,
                   Next{values, values + n * v_bytes});
        soften(s, p, row, head, t, n);
        ways.add(s, values, vs ? vs + t * v_pairs : nullptr, (int)p.v_group, v_bytes, n,
                 Next{k + first * k_bytes, k + (first + count) * k_bytes});
    }
}

// Memory of one thread's work.
struct Workspace {
    std::vector<char> memory;
    State state;
    Ways general, ways;
    float *q16_scale = nullptr, *q_sum = nullptr, *q8_scale = nullptr, *q_least = nullptr;
    int16_t* codes = nullptr;
    int8_t *q8 = nullptr, *q_spread = nullptr;
    bool alone = false;  // one query head of codes
    uint16_t* qb = nullptr;
    int16_t places[MAX_DIM];

    explicit Workspace(const Problem& p) {
        const int64_t g = p.group, k_groups = p.k_scales ? p.head_dim / p.k_group : 0,
                      v_groups = p.v_scales ? p.value_dim / p.v_group : 0;
        general = ways = Ways{score_of(p.k_kind, p.head_dim), value_of(p.v_kind)};
#if defined(ZINFER_VNNI)
        if (p.k_kind == FLOAT32 && p.group > 1)
            ways.score = p.head_dim == 128 ? score_f32<128> : score_f32<0>;
        if (p.k_scales && code_keys_fit(p.head_dim, p.k_group))
            ways.score = p.k_kind == BITS4 ? score_vnni<true> : score_vnni<false>;
        alone = ways.score != general.score && p.k_scales && p.group == 1 &&
                alone_fits(p.k_group, p.k_kind == BITS4);
        if (alone) ways.score = alone_of(p.k_kind == BITS4, p.head_dim, p.k_group);
        if (p.v_scales && code_values_fit(p.value_dim, p.v_group, p.v_kind == BITS4)) {
            ways.add = code_values_of(p.v_kind == BITS4, p.value_dim, p.v_group);
            ways.place = p.v_kind == BITS4 ? place4 : place8;
        }
#endif
#if defined(ZINFER_BF16) && defined(ZINFER_VNNI)
        if (p.group > 1 && p.v_kind == BFLOAT16 && bf16_fits(p.value_dim)) {
            ways.add = values_bf16;
            ways.place = place16;
        }
#endif
        for (int64_t d = 0; ways.place && d < p.value_dim; d++)
            places[d] = (int16_t)ways.place(d, p.value_dim, p.v_group);
        char* at = nullptr;
        auto lay = [&](auto*& field, int64_t count) {
            field = (std::decay_t<decltype(field)>)at;
            at += (count * sizeof(*field) + 63) / 64 * 64;
        };
        auto lay_all = [&](char* base) {
            at = base;
            lay(state.scores, g * BLOCK + W);
            lay(state.acc, g * p.value_dim + W);
            lay(state.most, g);
            lay(state.total, g);
            lay(state.minima, g * v_groups);
            lay(q16_scale, g * k_groups);
            lay(q_sum, g * k_groups);
            lay(codes, k_groups ? g * p.head_dim + 32 : 0);
            lay(q8_scale, g + 16);
            lay(q_least, g * 16);
            lay(q8, k_groups ? g * 2 * p.head_dim : 0);
            lay(q_spread, alone ? (p.head_dim + 127) / 128 * 1024 : 0);
            lay(qb, g * p.head_dim);
        };
        lay_all(nullptr);
        memory.resize((size_t)(uintptr_t)at + 64);
        lay_all((char*)(((uintptr_t)memory.data() + 63) / 64 * 64));
        state.group = (int)p.group;
        state.dim = (int)p.head_dim;
        state.value_dim = (int)p.value_dim;
        state.q16 = codes;
        state.q16_scale = q16_scale;
        state.q_sum = q_sum;
        state.q8 = q8;
        state.q_spread = q_spread;
        state.q8_scale = q8_scale;
        state.q_least = q_least;
        state.qb = qb;
    }
    Workspace(const Workspace&) = delete;

    // Begin one KV head: its queries, as whole numbers too where keys are codes.
    void begin(const Problem& p, int64_t item) {
        const float* q = p.q + item * p.group * p.head_dim;
        state.q = q;
        for (int64_t g = 0; g < p.group; g++) {
            state.most[g] = -INFINITY;
            state.total[g] = 0;
        }
        std::fill_n(state.acc, p.group * p.value_dim, 0.f);
        if (p.v_scales) std::fill_n(state.minima, p.group * (p.value_dim / p.v_group), 0.f);
#if defined(ZINFER_BF16) && defined(ZINFER_VNNI)
        if (p.group > 1 && p.k_kind == BFLOAT16 && bf16_fits(p.head_dim)) {
            bool exact = true;
            for (int64_t g = 0; g < p.group; g++)
                exact &= bf16_query(q + g * p.head_dim, p.head_dim, qb + g * p.head_dim);
            const ScoreBlock fast = p.head_dim == 128 ? score_bf16<128> : score_bf16<0>;
            ways.score = exact ? fast : general.score;
        }
#endif
        if (!p.k_scales) return;
#if defined(ZINFER_VNNI)
        if (ways.score != general.score) {
            for (int64_t g = 0; g < p.group; g++)
                code_query(q + g * p.head_dim, p.head_dim, p.k_group,
                           p.k_kind == BITS4 ? 7.5f : 127.5f, q8 + g * 2 * p.head_dim,
                           q8_scale + g, q_least + g * 2 * MOST_PARTS);
            if (alone) spread_query(q8, p.head_dim, p.k_group, p.k_kind == BITS4, q_spread);
            return;
        }
#endif
        const int64_t groups = p.head_dim / p.k_group;
        for (int64_t part = 0; part < p.group * groups; part++) {
            const float* from = q + part * p.k_group;
            float most = 1e-30f, sum = 0;
            for (int64_t i = 0; i < p.k_group; i++) {
                most = std::max(most, std::fabs(from[i]));
                sum += from[i];
            }
            q16_scale[part] = most / 32767.f;
            q_sum[part] = sum;
            for (int64_t i = 0; i < p.k_group; i++)
                codes[part * p.k_group + i] = (int16_t)std::lrintf(from[i] * (32767.f / most));
        }
    }

    // Put acc into the order of a value, and fold the minima of quantised values into it.
    void finish(const Problem& p) {
        if (ways.place) {
            float ordered[MAX_DIM];
            for (int64_t g = 0; g < p.group; g++) {
                float* acc = state.acc + g * p.value_dim;
                for (int64_t at = 0; at < p.value_dim; at++) ordered[places[at]] = acc[at];
                std::memcpy(acc, ordered, sizeof(float) * p.value_dim);
            }
        }
        if (!p.v_scales) return;
        const int64_t groups = p.value_dim / p.v_group;
        for (int64_t part = 0; part < p.group * groups; part++)
            for (int64_t d = 0; d < p.v_group; d++)
                state.acc[part * p.v_group + d] += state.minima[part];
    }
};

// Either half of attention alone, for one query head per item.
// Rows are [items][stride rows][dim]. Scores: out [items][tokens] = rows times q [items][dim].
template <bool SCORES>
void half_of(int32_t kind, const float* in, const char* rows, float* out, int64_t items,
             int64_t dim, int64_t tokens, int64_t stride, int32_t threads) {
    const int64_t bytes = row_bytes(kind, dim);
    const ScoreBlock score = score_of(kind, dim);
    const ValueBlock add = value_of(kind);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < items; item++) {
        alignas(64) float block[BLOCK];
        State s{};
        s.group = 1;
        s.dim = s.value_dim = (int)dim;
        s.scores = block;
        s.q = in + item * dim;
        s.acc = out + item * dim;
        if (!SCORES) std::fill_n(s.acc, dim, 0.f);
        const char* from = rows + item * stride * bytes;
        for (int64_t t = 0; t < tokens; t += BLOCK / 2) {
            const int n = (int)std::min<int64_t>(BLOCK / 2, tokens - t);
            const char* after = from + (t + n) * bytes;
            const Next next{after, after + std::min<int64_t>(BLOCK / 2, tokens - t - n) * bytes};
            if (SCORES) {
                score(s, from + t * bytes, nullptr, 0, n, next);
                std::memcpy(out + item * tokens + t, block, sizeof(float) * n);
            } else {
                std::memcpy(block, in + item * tokens + t, sizeof(float) * n);
                add(s, from + t * bytes, nullptr, 0, bytes, n, next);
            }
        }
    }
}

}  // namespace

// Scores (1) of one query per item against rows of floats, or the sum (0) of rows by weights.
extern "C" int32_t zinfer_attention_half(int32_t scores, int32_t kind, const float* in,
                                         const void* rows, float* out, int64_t items, int64_t dim,
                                         int64_t tokens, int64_t stride, int32_t threads) {
    if (dim % 16 || dim > MAX_DIM || kind > FLOAT16) return 1;
    (scores ? half_of<true> : half_of<false>)(kind, in, (const char*)rows, out, items, dim, tokens,
                                              stride, threads);
    return 0;
}

extern "C" int32_t zinfer_vector_bits() {
#if defined(__AVX512F__)
    return 512;
#elif defined(__AVX2__)
    return 256;
#elif defined(__ARM_NEON)
    return 128;
#else
    return 0;
#endif
}

// Returns 0, or 1 where a size is not supported.
extern "C" int32_t zinfer_decode_attention(const Problem* problem) {
    const Problem& p = *problem;
    if (p.head_dim % 16 || p.value_dim % 16 || p.head_dim > MAX_DIM || p.value_dim > MAX_DIM ||
        p.tokens < 1)
        return 1;
    for (int keys = 0; keys < 2; keys++) {
        const int32_t kind = keys ? p.k_kind : p.v_kind;
        const int64_t size = keys ? p.k_group : p.v_group, dim = keys ? p.head_dim : p.value_dim;
        if (kind == BITS8 && (size % 16 || dim % size)) return 1;
        if (kind == BITS4 && (size % 32 || dim % size)) return 1;
    }
    const int64_t items = p.batch * p.kv_heads;
    const int64_t wanted = (4 * p.threads + items - 1) / items, longest = (p.tokens + 255) / 256;
    const int64_t splits =
        items >= 4 * p.threads ? 1 : std::max<int64_t>(1, std::min(wanted, longest));
    const int64_t each = (p.tokens + splits - 1) / splits, heads = p.kv_heads * p.group;
    std::vector<float> partial(splits > 1 ? items * splits * p.group * (p.value_dim + 2) : 0);

    // `most` and `total` with the sink's score, and the values divided by the sum.
    auto write = [&](int64_t item, int64_t g, const float* acc, float most, float total) {
        float* out = p.out + (item * p.group + g) * p.value_dim;
        float scale = 1.f;
        if (p.sinks) {
            const float sink = p.sinks[(item * p.group + g) % heads], now = std::max(most, sink);
            scale = std::exp(most - now);
            total = total * scale + std::exp(sink - now);
        }
        for (int64_t d = 0; d < p.value_dim; d++) out[d] = acc[d] * scale / total;
    };

    auto unit_at = [&](int64_t unit) {
        const int64_t from = std::min(p.tokens, unit % splits * each);
        const int64_t to = unit < items * splits ? std::min(p.tokens, from + each) : from;
        return Unit{unit / splits, from, to};
    };

#pragma omp parallel num_threads(p.threads)
    {
        Workspace work(p);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < items * splits; unit++) {
            const Unit now = unit_at(unit);
            const int64_t item = now.item;
            work.begin(p, item);
            if (now.from < now.to)
                attend(p, work.ways, now, unit_at(unit + p.threads), work.state);
            work.finish(p);
            for (int64_t g = 0; g < p.group; g++) {
                const float* acc = work.state.acc + g * p.value_dim;
                if (splits == 1) {
                    write(item, g, acc, work.state.most[g], work.state.total[g]);
                    continue;
                }
                float* to_here = partial.data() + (unit * p.group + g) * (p.value_dim + 2);
                to_here[0] = work.state.most[g];
                to_here[1] = work.state.total[g];
                std::memcpy(to_here + 2, acc, sizeof(float) * p.value_dim);
            }
        }
    }
    if (splits == 1) return 0;
    std::vector<float> acc(p.value_dim);
    for (int64_t item = 0; item < items; item++)
        for (int64_t g = 0; g < p.group; g++) {
            auto part = [&](int64_t split) {
                return partial.data() + ((item * splits + split) * p.group + g) * (p.value_dim + 2);
            };
            float most = -INFINITY, total = 0;
            for (int64_t split = 0; split < splits; split++) most = std::max(most, part(split)[0]);
            std::fill(acc.begin(), acc.end(), 0.f);
            for (int64_t split = 0; split < splits; split++) {
                const float scale = std::exp(part(split)[0] - most);
                total += part(split)[1] * scale;
                for (int64_t d = 0; d < p.value_dim; d++) acc[d] += part(split)[2 + d] * scale;
            }
            write(item, g, acc.data(), most, total);
        }
    return 0;
}
