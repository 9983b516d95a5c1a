// One stage of a dense decoder: all layers of a step in one call.
//
// Why not a tensor library: between the products of a decoder layer stand a dozen small operations.
// Called one by one from Python they cost more than the arithmetic of a small batch, hold the
// interpreter's lock in turns, and read the cache at a fraction of memory speed. Here one call runs
// a team of threads through all layers.
//
// Nothing here checks its arguments: callers (native/stack.py) pass only checked steps.

#include "decoder.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "attention.h"
#include "team.h"
#include "tiles.h"
#include "vectors.h"

namespace bulkhead {
namespace {

// -- linears --------------------------------------------------------------------------------------

enum class Into { STORE, ADD, GATE, LOGITS };

// Rows to multiply, and where the products go.
template <class T> struct Product {
    const T *rows;           // row tiles, with room for a multiple of 32 rows
    int64_t count;
    Into into;
    T *output;               // STORE, ADD (added to): [count, outputs]; GATE: row tiles of half
    float *logits = nullptr; // LOGITS: [count, outputs]
    float multiplier = 1;    // ADD: of what is added
    bool gelu = false;       // GATE
};

// Scales of 16 columns whose first is `column`; 1 where the tiles need none, which changes no sum.
inline __m512 scales_of(const Linear &linear, int64_t column, __mmask16 mask) {
    return linear.scales ? _mm512_maskz_loadu_ps(mask, linear.scales + column)
                         : _mm512_set1_ps(1.0f);
}

inline __m512 biases_of(const Linear &linear, int64_t column, __mmask16 mask) {
    return linear.bias ? _mm512_maskz_loadu_ps(mask, linear.bias + column) : _mm512_setzero_ps();
}

// What a column's sums become: scaled where the weight is int8, with the bias.
struct Column {
    Column(const Linear &linear, int64_t column)
        : mask(first_lanes(linear.outputs - column)), scale(scales_of(linear, column, mask)),
          bias(biases_of(linear, column, mask)) {}
    __m512 of(const float *sums) const { return _mm512_fmadd_ps(load(sums), scale, bias); }

    static __mmask16 first_lanes(int64_t left) {
        return left >= LANES ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
    }

    const __mmask16 mask;
    const __m512 scale, bias;
};

// Takes the sums of one pair of tiles to their place. Both halves of a row go together: they are one
// line, which other rows would drive out of the first-level cache in between.
template <class T>
void finish(const Linear &linear, const Product<T> &product, int64_t panel, int64_t row, int rows,
            const float *sums) {
    const int64_t column = panel * WIDTH, width = linear.outputs;
    const Column left(linear, column), right(linear, column + LANES);
    if (product.into == Into::LOGITS) {
        float *to = product.logits + row * width + column;
        for (int r = 0; r < rows; r++, to += width, sums += WIDTH) {
            _mm512_mask_storeu_ps(to, left.mask, left.of(sums));
            _mm512_mask_storeu_ps(to + LANES, right.mask, right.of(sums + LANES));
        }
        return;
    }
    // Every width inside a layer is a multiple of 16 (native/stack.py).
    T *to = product.output + row * width + column;
    const __m512 multiplier = _mm512_set1_ps(product.multiplier);
    for (int r = 0; r < rows; r++, to += width, sums += WIDTH) {
        __m512 a = left.of(sums), b = right.of(sums + LANES);
        if (product.into == Into::ADD) a = _mm512_fmadd_ps(a, multiplier, load(to));
        store(to, a);
        if (!right.mask) continue;
        if (product.into == Into::ADD) b = _mm512_fmadd_ps(b, multiplier, load(to + LANES));
        store(to + LANES, b);
    }
}

// The first tile of a pair holds gates, the second the values that they are multiplied with.
template <class T>
void finish_gates(const Linear &linear, const Product<T> &product, int64_t panel, int64_t row,
                  int rows, const float *sums) {
    constexpr __mmask16 ALL = 0xffff; // a pair of tiles is whole
    const int64_t column = panel * WIDTH;
    const __m512 gate_scale = scales_of(linear, column, ALL);
    const __m512 gate_bias = biases_of(linear, column, ALL);
    const __m512 up_scale = scales_of(linear, column + LANES, ALL);
    const __m512 up_bias = biases_of(linear, column + LANES, ALL);
    const int64_t lines = lines_of(linear.outputs / 2, sizeof(T));
    for (int r = 0; r < rows; r++) {
        const float *pair = sums + r * WIDTH;
        const __m512 gate = _mm512_fmadd_ps(load(pair), gate_scale, gate_bias);
        const __m512 up = _mm512_fmadd_ps(load(pair + LANES), up_scale, up_bias);
        T *to = tiled_row(product.output, row + r, lines);
        store(element(to, panel * LANES, TILED_STEP<T>),
              _mm512_mul_ps(product.gelu ? gelu_tanh(gate) : silu(gate), up));
    }
}

// What each thread needs for itself.
struct Scratch {
    // Lines of each of two int8 tiles that are widened at a time, and where to.
    static constexpr int WIDENED_LINES = 8;
    static constexpr int WIDENED_BYTES = WIDENED_LINES * LINE_UNITS * LINE;
    alignas(LINE) char widened[2][WIDENED_BYTES];
    Buffer<float> sums;
    float *room(int64_t rows) {
        const size_t floats = round_up(rows, 2 * TILE_ROWS) * WIDTH;
        if (sums.size() < floats) sums.resize(floats);
        return sums.data();
    }
};

// Rows whose lines stay in the second-level cache beside a panel.
inline int64_t rows_in_l2(int64_t lines) {
    constexpr int64_t BYTES = 1 << 20;
    return std::max<int64_t>(BYTES / (lines * LINE) / (2 * TILE_ROWS), 1) * 2 * TILE_ROWS;
}

// A panel of 32 columns times the rows [begin, end); the panel stays in the second-level cache, and
// panel `next` is brought there meanwhile.
template <class T>
void multiply_panel(const Linear &linear, const Product<T> &product, bool amx, int64_t panel,
                    int64_t begin, int64_t end, int64_t next, Scratch &scratch) {
    const int lines = int(lines_of(linear.inputs, sizeof(T)));
    const bool int8 = linear.scales;
    const size_t line_bytes = LINE_UNITS * (int8 ? NARROW_UNIT<T> : LINE); // of a tile
    const size_t tile_bytes = lines * line_bytes;
    float *all_sums = scratch.room(end - begin);
    const char *first = (const char *)linear.tiles + panel * 2 * tile_bytes;
    const char *second = first + tile_bytes;
    const int passes = int(divide_up(end - begin, amx ? 2 * TILE_ROWS : ROWS));
    // Few rows are bound by memory: one run over the panel. Many rows: runs that stay in L1.
    const int run = int8         ? Scratch::WIDENED_LINES
                    : passes > 1 ? (amx ? AMX_UNITS_IN_L1 : UNITS_IN_L1) / LINE_UNITS
                                 : lines;
    std::pair<int64_t, int> waiting; // first row and number of rows
    const auto finish_waiting = [&] {
        const auto [row, count] = waiting;
        const float *sums = all_sums + (row - begin) * WIDTH;
        if (product.into == Into::GATE)
            finish_gates(linear, product, panel, row, count, sums);
        else
            finish(linear, product, panel, row, count, sums);
    };
    for (int line = 0; line < lines; line += run) {
        const int length = std::min(run, lines - line);
        const char *l = first + line * line_bytes, *h = second + line * line_bytes;
        const char *wanted = (const char *)linear.tiles + next * 2 * tile_bytes + (l - first);
        if (int8) {
            const int8_t *const soon = (const int8_t *)wanted;
            widen<T>((const int8_t *)l, length, scratch.widened[0], soon);
            widen<T>((const int8_t *)h, length, scratch.widened[1], soon + tile_bytes);
            l = scratch.widened[0], h = scratch.widened[1];
        }
        const bool last = line + length == lines;
        waiting = {begin, 0};
        for (int64_t row = begin; row < end;) {
            float *sums = all_sums + (row - begin) * WIDTH;
            const auto rows_at = [&](int64_t r) {
                const T *start = tiled_row(product.rows, r, lines);
                return Rows{(const char *)start + line * ROW_TILE_BYTES, LINE, ROW_TILE_BYTES};
            };
            const Ahead ahead{{wanted, wanted + tile_bytes}, row == begin && !int8 ? 2 : 0};
            int count;
            if (amx) {
                count = int(std::min<int64_t>(end - row, 2 * TILE_ROWS));
                (count > TILE_ROWS ? amx_multiply<2> : amx_multiply<1>)(
                    rows_at(row), rows_at(row + TILE_ROWS), l, h, length, sums, line > 0,
                    ahead);
            } else {
                count = rows_at_once(int(std::min(end - row, TILE_ROWS - row % TILE_ROWS)));
                kernel<T>(count)(rows_at(row), &l, &h, 1, length * LINE_UNITS, sums, line > 0,
                                 ahead);
            }
            // A block's sums are taken to their place while the next block is in the tile registers.
            if (last) finish_waiting();
            waiting = {row, count};
            row += count;
        }
        if (last) finish_waiting();
    }
}

// Panels are shared out, all panels of some rows before the next rows. Two panels of gates fill the
// lines of their row tiles: one thread takes both, lest two write to one line.
template <class T>
void multiply_panels(const Linear &linear, const Product<T> &product, bool amx, Tickets &tickets,
                     size_t phase, Scratch &scratch) {
    const int64_t lines = lines_of(linear.inputs, sizeof(T));
    const int64_t panels = divide_up(linear.outputs, WIDTH), at_once = rows_in_l2(lines);
    const int64_t together = product.into == Into::GATE ? 2 : 1;
    const int64_t shares = divide_up(panels, together);
    const int64_t parts = shares * divide_up(product.count, at_once);
    for (int64_t part = tickets.take(phase); part < parts;) {
        const int64_t following = tickets.take(phase);
        const int64_t begin = part / shares * at_once;
        const int64_t end = std::min(product.count, begin + at_once);
        const int64_t first = part % shares * together;
        const int64_t last = std::min(panels, first + together) - 1;
        for (int64_t panel = first; panel <= last; panel++) {
            const int64_t next = panel < last ? panel + 1 : following % shares * together;
            multiply_panel(linear, product, amx, panel, begin, end, next, scratch);
        }
        part = following;
    }
}

// -- rows -----------------------------------------------------------------------------------------

// Root mean square norm (Zhang and Sennrich, arXiv 1910.07467) of a plain row into one with `step`.
template <class T>
void norm(const T *from, T *to, const float *weight, int64_t size, float epsilon,
          int64_t step = PLAIN_STEP<T>) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += LANES) {
        __m512 x = load(from + i);
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / float(size);
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
    for (int64_t i = 0; i < size; i += LANES)
        store(element(to, i, step),
              _mm512_mul_ps(_mm512_mul_ps(load(from + i), factor), load(weight + i)));
}

template <class T> void copy(const T *from, T *to, int64_t size, int64_t step) {
    for (int64_t i = 0; i < size; i += PER_LINE<T>)
        std::copy_n(from + i, std::min<int64_t>(PER_LINE<T>, size - i), element(to, i, step));
}

// The rotary embedding on the two halves of one head's first `size` elements (arXiv 2104.09864).
template <class T> void rotate(T *head, const float *cosine, const float *sine, int64_t size) {
    const int64_t half = size / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        __m512 a = load(head + i), b = load(head + half + i);
        __m512 c = load(cosine + i), s = load(sine + i);
        store(head + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        store(head + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
    for (; i < half; i++) {
        float a = number(head[i]), b = number(head[half + i]);
        head[i] = narrow<T>(a * cosine[i] - b * sine[i]);
        head[half + i] = narrow<T>(b * cosine[i] + a * sine[i]);
    }
}

// One column of a key tile: a unit is a unit of the head.
template <class T> void store_key(const T *key, T *group, int64_t size, int offset) {
    for (int64_t unit = 0; unit < size / PER_UNIT<T>; unit++)
        std::memcpy((char *)group + unit * LINE + offset * UNIT, (const char *)key + unit * UNIT,
                    UNIT);
}

// One position of value tiles: a row of their units in float32, every other element in bfloat16.
inline void store_value(const float *value, float *group, int64_t size, int offset) {
    for (int64_t i = 0; i < size; i += LANES)
        store(group + i * LANES + offset * LANES, load(value + i));
}

inline void store_value(const bfloat16 *value, bfloat16 *group, int64_t size, int offset) {
    const bool odd = offset % 2;
    const __mmask32 mask = odd ? 0xaaaaaaaa : 0x55555555;
    for (int64_t i = 0; i < size; i += LANES) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(value + i)));
        if (odd) wide = _mm512_slli_epi32(wide, 16);
        _mm512_mask_storeu_epi16(group + i * LANES + offset / 2 * 2 * LANES, mask, wide);
    }
}

// -- a stage --------------------------------------------------------------------------------------

class Stage {
  public:
    virtual ~Stage() = default;
    virtual void rotate_by(int64_t layer, const float *cosines, const float *sines) = 0;
    virtual void forward(Team &team, const Step &step, void *hidden) = 0;
};

template <class T> class TypedStage final : public Stage {
  public:
    TypedStage(const Shape &shape, const Layer *layers, int64_t count)
        : shape_(shape), layers_(layers, layers + count) {}

    void rotate_by(int64_t layer, const float *cosines, const float *sines) override {
        layers_[layer].cosines = cosines;
        layers_[layer].sines = sines;
    }

    void forward(Team &team, const Step &step, void *rows) override {
        T *hidden = (T *)rows;
        prepare(team, step);
        const std::vector<Attend> parts = attend_parts(step);
        Tickets tickets(layers_.size() * PHASES);
        team.run([&](int me) {
            AmxTiles registers(shape_.amx);
            Work work{team, step, tickets, scratch_[me], 0};
            for (const Layer &layer : layers_) run(layer, parts, *attention_[me], hidden, work);
        });
    }

  private:
    static constexpr size_t PHASES = 10; // of a layer

    struct Place {
        int32_t sequence, position;
    };

    // One thread's way through the phases; all threads take the same way.
    struct Work {
        Team &team;
        const Step &step;
        Tickets &tickets;
        Scratch &scratch;
        size_t phase;

        template <class Part> void share(int64_t count, Part part) {
            for (int64_t i; (i = tickets.take(phase)) < count;) part(i);
            phase++;
        }
    };

    void prepare(const Team &team, const Step &step) {
        const int64_t rows = round_up(step.tokens, 2 * TILE_ROWS);
        const int64_t heads = shape_.heads + 2 * shape_.key_heads;
        for (auto [buffer, width] : {std::pair{&normed_, shape_.hidden},
                                     {&mixed_, heads * shape_.head_size},
                                     {&attended_, shape_.heads * shape_.head_size},
                                     {&active_, shape_.intermediate},
                                     {&added_, shape_.hidden}}) {
            const size_t elements = rows * round_up(width, PER_LINE<T>);
            // What fills rows up to whole lines must be zeros, and nothing else is ever there.
            if (buffer->size() < elements) buffer->resize(elements);
        }
        while (int(attention_.size()) < team.size())
            attention_.push_back(std::make_unique<Attention<T>>(shape_));
        scratch_.resize(team.size());
        places_.clear();
        for (int32_t s = 0; s < step.sequences; s++)
            for (int32_t i = 0; i < step.counts[s]; i++)
                places_.push_back({s, step.starts[s] + i});
    }

    // Longest first: with parts of unlike length the last to be taken should be short.
    std::vector<Attend> attend_parts(const Step &step) const {
        const int at_once = Attention<T>::tokens_at_once(shape_);
        std::vector<Attend> parts;
        int32_t row = 0;
        for (int32_t s = 0; s < step.sequences; row += step.counts[s++])
            for (int32_t first = 0; first < step.counts[s]; first += at_once)
                for (int32_t head = 0; head < shape_.key_heads; head++)
                    parts.push_back({s, row + first, std::min(at_once, step.counts[s] - first), head,
                                     step.starts[s] + first});
        std::stable_sort(parts.begin(), parts.end(), [](const Attend &a, const Attend &b) {
            return int64_t(a.count) * (a.position + a.count) >
                   int64_t(b.count) * (b.position + b.count);
        });
        return parts;
    }

    void run(const Layer &layer, const std::vector<Attend> &parts, Attention<T> &attention,
             T *hidden, Work &work) {
        const int64_t tokens = work.step.tokens;
        const T *rows = normed(layer.before_attention, hidden, work);
        multiply(layer.query_key_value, {rows, tokens, Into::STORE, mixed_.data()}, work);
        // Positions of a group lie in the same lines of the cache: one thread writes them.
        const int64_t run = std::clamp<int64_t>(tokens / (8 * work.team.size()), 1, LANES);
        work.share(divide_up(tokens, run), [&](int64_t part) {
            for (int64_t t = part * run; t < std::min(tokens, (part + 1) * run); t++)
                place(layer, work.step, t);
        });
        work.team.barrier();
        const int64_t count = parts.size();
        for (int64_t part = work.tickets.take(work.phase); part < count;) {
            const int64_t next = work.tickets.take(work.phase);
            attention(layer, work.step, parts[part], parts[std::min(next, count - 1)],
                      mixed_.data(), attended_.data());
            part = next;
        }
        work.phase++;
        work.team.barrier();
        add(layer.attention_output, attended_.data(), layer.after_attention, hidden, work);
        rows = normed(layer.before_mlp, hidden, work);
        Product<T> gates{rows, tokens, Into::GATE, active_.data()};
        gates.gelu = shape_.gelu;
        multiply(layer.gate_up, gates, work);
        add(layer.down, active_.data(), layer.after_mlp, hidden, work);
    }

    void multiply(const Linear &linear, const Product<T> &product, Work &work) {
        multiply_panels(linear, product, shape_.amx && sizeof(T) == 2, work.tickets, work.phase++,
                        work.scratch);
        work.team.barrier();
    }

    // The row tiles of the hidden states, normed where the layer says so.
    const T *normed(const float *weight, const T *hidden, Work &work) {
        const int64_t size = shape_.hidden, lines = lines_of(size, sizeof(T));
        work.share(work.step.tokens, [&](int64_t t) {
            const T *from = hidden + t * size;
            T *to = tiled_row(normed_.data(), t, lines);
            if (weight)
                norm(from, to, weight, size, shape_.epsilon, TILED_STEP<T>);
            else
                copy(from, to, size, TILED_STEP<T>);
        });
        work.team.barrier();
        return normed_.data();
    }

    // hidden += multiplier * norm(linear(rows)), without the norm where there is none.
    void add(const Linear &linear, const T *rows, const float *after, T *hidden, Work &work) {
        const int64_t size = shape_.hidden;
        Product<T> product{rows, work.step.tokens, Into::ADD, hidden};
        product.multiplier = shape_.residual_multiplier;
        if (after) {
            product.into = Into::STORE;
            product.output = added_.data();
        }
        multiply(linear, product, work);
        if (!after) return;
        const __m512 multiplier = _mm512_set1_ps(shape_.residual_multiplier);
        work.share(work.step.tokens, [&](int64_t t) {
            T *from = added_.data() + t * size, *to = hidden + t * size;
            norm(from, from, after, size, shape_.epsilon);
            for (int64_t i = 0; i < size; i += LANES)
                store(to + i, _mm512_fmadd_ps(load(from + i), multiplier, load(to + i)));
        });
        work.team.barrier();
    }

    // Norms and rotates one row's queries and keys, and writes keys and values to the cache.
    void place(const Layer &layer, const Step &step, int64_t row) {
        const int64_t size = shape_.head_size, heads = shape_.heads, key_heads = shape_.key_heads;
        T *query = mixed_.data() + row * (heads + 2 * key_heads) * size;
        T *key = query + heads * size, *value = key + key_heads * size;
        if (layer.query_norm && shape_.wide_head_norm) {
            norm(query, query, layer.query_norm, heads * size, shape_.epsilon);
            norm(key, key, layer.key_norm, key_heads * size, shape_.epsilon);
        } else if (layer.query_norm) {
            for (int64_t h = 0; h < heads; h++)
                norm(query + h * size, query + h * size, layer.query_norm, size, shape_.epsilon);
            for (int64_t h = 0; h < key_heads; h++)
                norm(key + h * size, key + h * size, layer.key_norm, size, shape_.epsilon);
        }
        const Place at = places_[row];
        const int64_t turn = step.rotary_offsets[at.sequence] + int64_t(at.position);
        const int64_t pair = turn * layer.rotary_size / 2;
        if (layer.rotary_size)
            for (int64_t h = 0; h < heads + key_heads; h++)
                rotate(query + h * size, layer.cosines + pair, layer.sines + pair,
                       layer.rotary_size);

        const int64_t block = step.blocks[step.tables[at.sequence] + at.position / shape_.block_size];
        const int64_t group =
            block * (shape_.block_size / LANES) + at.position % shape_.block_size / LANES;
        for (int64_t h = 0; h < key_heads; h++) {
            const int64_t offset = (group * key_heads + h) * size * LANES;
            store_key(key + h * size, (T *)layer.keys + offset, size, at.position % LANES);
            store_value(value + h * size, (T *)layer.values + offset, size, at.position % LANES);
        }
    }

    const Shape shape_;
    std::vector<Layer> layers_;
    std::vector<Scratch> scratch_;
    std::vector<std::unique_ptr<Attention<T>>> attention_;
    Buffer<T> normed_, mixed_, attended_, active_, added_;
    std::vector<Place> places_;
};

template <class T>
void project(Team &team, const Linear &linear, bool amx, const T *rows, int64_t count,
             float *logits) {
    const int64_t lines = lines_of(linear.inputs, sizeof(T));
    Buffer<T> tiled(round_up(count, 2 * TILE_ROWS) * lines * PER_LINE<T>);
    for (int64_t row = 0; row < count; row++)
        copy(rows + row * linear.inputs, tiled_row(tiled.data(), row, lines), linear.inputs,
             TILED_STEP<T>);
    Product<T> product{tiled.data(), count, Into::LOGITS, nullptr};
    product.logits = logits;
    Tickets tickets(1);
    team.run([&](int) {
        AmxTiles registers(amx && sizeof(T) == 2);
        Scratch scratch;
        multiply_panels(linear, product, amx && sizeof(T) == 2, tickets, 0, scratch);
    });
}

} // namespace
} // namespace bulkhead

// -- the interface --------------------------------------------------------------------------------

extern "C" {

using namespace bulkhead;

// Whether this process may use the tile registers; the processor must have AMX.
int bulkhead_amx() { return amx_permitted(); }

// Changes with anything that native/library.py must know.
int bulkhead_abi() { return 4; }

// Asks for huge pages (Linux, admin-guide/mm/transhuge.rst) for memory not yet touched: a step reads
// all weights and cache once, a page of 4 KiB at a time would be a walk through page tables each.
void bulkhead_huge_pages(void *memory, int64_t bytes) {
    constexpr uintptr_t PAGE = 4096;
    const uintptr_t begin = round_up(uintptr_t(memory), PAGE);
    const uintptr_t end = (uintptr_t(memory) + bytes) / PAGE * PAGE;
    // A kernel without them computes the same.
    if (begin < end) (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
}

// Tiles of a weight [outputs, inputs]; see pack.
void bulkhead_pack(void *team, int bfloat, const void *weight, int64_t outputs, int64_t inputs,
                   void *tiles) {
    Team &members = *static_cast<Team *>(team);
    if (bfloat)
        pack<bfloat16>(members, (const bfloat16 *)weight, outputs, inputs, (bfloat16 *)tiles);
    else
        pack<float>(members, (const float *)weight, outputs, inputs, (float *)tiles);
}

// As `bulkhead_pack`, of int8 for a stage of that type.
void bulkhead_pack_int8(void *team, int bfloat, const int8_t *weight, int64_t outputs,
                        int64_t inputs, int8_t *tiles) {
    Team &members = *static_cast<Team *>(team);
    if (bfloat)
        pack<bfloat16>(members, weight, outputs, inputs, tiles);
    else
        pack<float>(members, weight, outputs, inputs, tiles);
}

// rows [count, inputs] = rows `ids` of the matrix that was packed: an embedding that shares the head's tiles.
void bulkhead_unpack(int bfloat, const void *tiles, int64_t inputs, const int64_t *ids,
                     int64_t count, void *rows) {
    for (int64_t i = 0; i < count; i++)
        if (bfloat)
            unpack((const bfloat16 *)tiles, inputs, ids[i], (bfloat16 *)rows + i * inputs);
        else
            unpack((const float *)tiles, inputs, ids[i], (float *)rows + i * inputs);
}

void *bulkhead_team_new(int size) { return new Team(size); }

void bulkhead_team_free(void *team) { delete static_cast<Team *>(team); }

// logits [count, outputs] = rows [count, inputs] times the packed weight.
void bulkhead_project(void *team, int bfloat, int amx, const Linear *linear, const void *rows,
                      int64_t count, float *logits) {
    if (bfloat)
        project(*static_cast<Team *>(team), *linear, amx, (const bfloat16 *)rows, count, logits);
    else
        project(*static_cast<Team *>(team), *linear, false, (const float *)rows, count, logits);
}

void *bulkhead_stage_new(const Shape *shape, const Layer *layers, int64_t count) {
    if (shape->bfloat) return static_cast<Stage *>(new TypedStage<bfloat16>(*shape, layers, count));
    return static_cast<Stage *>(new TypedStage<float>(*shape, layers, count));
}

void bulkhead_stage_free(void *stage) { delete static_cast<Stage *>(stage); }

// Replaces a layer's rotation tables by longer ones.
void bulkhead_stage_rotate(void *stage, int64_t layer, const float *cosines, const float *sines) {
    static_cast<Stage *>(stage)->rotate_by(layer, cosines, sines);
}

// Adds the layers' work to `hidden` [tokens, hidden] in place.
void bulkhead_stage_forward(void *stage, void *team, const Step *step, void *hidden) {
    static_cast<Stage *>(stage)->forward(*static_cast<Team *>(team), *step, hidden);
}
}
