// Attention of some rows of one sequence over its cache blocks.
//
// A cache group is 16 positions of one head: keys are a tile whose columns are positions and whose
// inner dimension is the head's; values are tiles whose columns are the head's elements and whose
// inner dimension is the positions. Positions are taken 128 at a time with an online softmax
// (Milakov and Gimelshein, arXiv 1805.02867). Query heads that share a key head are rows of one
// product, so that every key and value is read once.

#pragma once

#include <algorithm>
#include <vector>

#include "decoder.h"
#include "tiles.h"

namespace bulkhead {

// Some rows of one sequence and the query heads that share one key head.
struct Attend {
    int32_t sequence, first, count, key_head; // rows [first, first + count) of the step
    int32_t position;                         // of the first row
};

template <class T> class Attention {
  public:
    explicit Attention(const Shape &shape)
        : shape_(shape), share_(int(shape.heads / shape.key_heads)),
          row_limit_(int(round_up(std::max(2 * ROWS, share_), 2 * TILE_ROWS))),
          amx_(shape.amx && shape.head_size % PER_LINE<T> == 0) {
        queries_.resize(row_limit_ * shape.head_size);
        weights_.resize(row_limit_ * SPAN);
        narrowed_.resize(row_limit_ * SPAN);
        outputs_.resize(row_limit_ * padded());
        sums_.resize(row_limit_ * WIDTH);
        most_.resize(row_limit_);
        total_.resize(row_limit_);
    }

    static int tokens_at_once(const Shape &shape) {
        const int rows = shape.amx ? 2 * TILE_ROWS : 2 * ROWS;
        return std::max(1, rows / int(shape.heads / shape.key_heads));
    }

    // `mixed` is [tokens, (heads + 2 key heads) * head size], `output` row tiles of
    // [tokens, heads * head size].
    // The first groups of `next` are brought near while the last of `part` are attended to.
    void operator()(const Layer &layer, const Step &step, const Attend &part, const Attend &next,
                    const T *mixed, T *output) {
        const int64_t size = shape_.head_size, width = (shape_.heads + 2 * shape_.key_heads) * size;
        const int rows = part.count * share_;
        for (int r = 0; r < rows; r++)
            std::memcpy(&queries_[r * size],
                        mixed + (part.first + r / share_) * width +
                            (part.key_head * share_ + r % share_) * size,
                        size * sizeof(T));
        std::fill(most_.begin(), most_.end(), MINUS_INFINITY);
        std::fill(total_.begin(), total_.end(), 0.0f);
        std::fill_n(outputs_.begin(), rows * padded(), 0.0f);

        const int last = part.position + part.count - 1;
        for (int group = first_group(layer, part); group <= last / LANES; group += GROUPS)
            pass(layer, step, part, next, rows, group, last / LANES + 1);

        const int64_t lines = lines_of(shape_.heads * size, sizeof(T));
        for (int r = 0; r < rows; r++) {
            __m512 factor = _mm512_set1_ps(1.0f / total_[r]);
            T *to = tiled_row(output, part.first + r / share_, lines);
            const int64_t head = part.key_head * share_ + r % share_;
            for (int64_t i = 0; i < size; i += LANES)
                store(element(to, head * size + i, TILED_STEP<T>),
                      _mm512_mul_ps(load(&outputs_[r * padded() + i]), factor));
        }
    }

  private:
    static constexpr int GROUPS = 8; // attended to in one pass
    static constexpr int SPAN = GROUPS * LANES;

    // Elements of an output row: whole pairs of tiles.
    int64_t padded() const { return round_up(shape_.head_size, WIDTH); }

    static int first_group(const Layer &layer, const Attend &part) {
        return layer.window ? std::max(0, part.position - layer.window + 1) / LANES : 0;
    }

    // Where the keys, and in the other tensor the values, of a group begin, in bytes.
    int64_t place(const Step &step, const Attend &part, int64_t group) const {
        const int64_t per_block = shape_.block_size / LANES;
        const int64_t block = step.blocks[step.tables[part.sequence] + group / per_block];
        const int64_t at = (block * per_block + group % per_block) * shape_.key_heads;
        return (at + part.key_head) * shape_.head_size * LANES * int64_t(sizeof(T));
    }

    // The groups from `group` on, at most as many as a pass has, of those before `end`.
    void pass(const Layer &layer, const Step &step, const Attend &part, const Attend &next, int rows,
              int group, int end) {
        const int groups = std::min(GROUPS, end - group);
        // Some more than are attended to now: they are brought near while the last are.
        const char *keys[GROUPS + 3], *values[GROUPS + 3];
        const int next_first = first_group(layer, next), next_last = next.position / LANES;
        for (int g = 0; g < groups + 3; g++) {
            const int64_t offset =
                group + g < end
                    ? place(step, part, group + g)
                    : place(step, next, std::min(next_first + group + g - end, next_last));
            keys[g] = (const char *)layer.keys + offset;
            values[g] = (const char *)layer.values + offset;
        }
        for (int g = 0; g < groups; g += 2)
            score(rows, &keys[g], {{keys[g + 2], keys[g + 3], values[g], values[g + 1]}, 4}, g,
                  std::min(2, groups - g));
        for (int r = 0; r < rows; r++) soften(layer, part.position + r / share_, r, group, groups);
        add_values(rows, values, groups);
    }

    // weights_[r][16 g ...] = queries . keys of groups g and g + 1.
    void score(int rows, const char *const *keys, Ahead ahead, int g, int groups) {
        const int64_t size = shape_.head_size;
        const int units = int(size / PER_UNIT<T>);
        const size_t kept = groups * LANES * sizeof(float);
        for (int r = 0; r < rows;) {
            int n = rows_at_once(rows - r);
            if (amx_ && rows > ROWS) {
                n = std::min(rows - r, 2 * TILE_ROWS);
                (n > TILE_ROWS ? amx_multiply<2> : amx_multiply<1>)(
                    plain_rows(&queries_[r * size], size),
                    plain_rows(&queries_[(r + TILE_ROWS) * size], size), keys[0], keys[1],
                    units / LINE_UNITS, sums_.data(), false, {});
            } else {
                kernel<T>(n)(plain_rows(&queries_[r * size], size), &keys[0], &keys[1], 1,
                             units, sums_.data(), false, ahead);
                ahead.count = 0;
            }
            for (int i = 0; i < n; i++)
                std::memcpy(&weights_[(r + i) * SPAN + g * LANES], &sums_[i * WIDTH], kept);
            r += n;
        }
    }

    // outputs_ += weights . values of the groups of this pass, 32 elements at a time.
    void add_values(int rows, const char *const *values, int groups) {
        const char *first[GROUPS], *second[GROUPS];
        const int64_t tile = LANES * LANES * sizeof(T), tiles = shape_.head_size / LANES;
        const bool amx = amx_ && rows > ROWS;
        if (amx) AmxTiles::cut(Cut::HALF);
        for (int64_t t = 0; t < tiles; t += 2) {
            for (int g = 0; g < groups; g++) {
                first[g] = values[g] + t * tile;
                second[g] = t + 1 < tiles ? first[g] + tile : first[g];
            }
            for (int r = 0; amx && r < rows; r += 2 * TILE_ROWS)
                (rows - r > TILE_ROWS ? amx_multiply_halves<2> : amx_multiply_halves<1>)(
                    (const char *)&narrowed_[r * SPAN], SPAN * sizeof(T), first, second, groups,
                    &outputs_[r * padded() + t * LANES], padded() * sizeof(float));
            if (amx) continue;
            for (int r = 0; r < rows;) {
                const int n = rows_at_once(rows - r);
                for (int i = 0; i < n; i++)
                    std::memcpy(&sums_[i * WIDTH], &outputs_[(r + i) * padded() + t * LANES],
                                WIDTH * sizeof(float));
                kernel<T>(n)(plain_rows(&narrowed_[r * SPAN], SPAN), first, second, groups,
                             LANES / PER_UNIT<T>, sums_.data(), true, {});
                for (int i = 0; i < n; i++)
                    std::memcpy(&outputs_[(r + i) * padded() + t * LANES], &sums_[i * WIDTH],
                                WIDTH * sizeof(float));
                r += n;
            }
        }
        if (amx) AmxTiles::cut(Cut::WHOLE);
    }

    // Turns the scores of one row into weights, and scales what was summed before.
    void soften(const Layer &layer, int position, int row, int group, int groups) {
        float *scores = &weights_[row * SPAN];
        const int from = layer.window ? position - layer.window + 1 : 0;
        const __m512 scale = _mm512_set1_ps(shape_.scale);
        const __m512i lanes =
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512 largest = _mm512_set1_ps(MINUS_INFINITY);
        for (int g = 0; g < groups; g++) {
            __m512 score = _mm512_mul_ps(load(scores + g * LANES), scale);
            if (shape_.soft_cap > 0) {
                __m512 cap = _mm512_set1_ps(shape_.soft_cap);
                score = _mm512_mul_ps(hyperbolic_tangent(_mm512_div_ps(score, cap)), cap);
            }
            const int begin = (group + g) * LANES;
            if (begin < from || begin + LANES - 1 > position) {
                __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(begin));
                __mmask16 visible = _mm512_cmple_epi32_mask(at, _mm512_set1_epi32(position)) &
                                    _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(from));
                score = _mm512_mask_blend_ps(visible, _mm512_set1_ps(MINUS_INFINITY), score);
            }
            largest = _mm512_max_ps(largest, score);
            store(scores + g * LANES, score);
        }
        const float most = std::max(most_[row], _mm512_reduce_max_ps(largest));
        T *narrowed = &narrowed_[row * SPAN];
        if (most == MINUS_INFINITY) { // sees nothing here: all of it lies before its window
            std::memset((void *)narrowed, 0, groups * LANES * sizeof(T));
            return;
        }
        const float before = most_[row] == MINUS_INFINITY ? 0.0f : std::exp(most_[row] - most);
        __m512 sum = _mm512_setzero_ps();
        for (int g = 0; g < groups; g++) {
            // What is hidden is minus infinity, and exponential() of that a number of no weight.
            __m512 weight =
                exponential(_mm512_sub_ps(load(scores + g * LANES), _mm512_set1_ps(most)));
            sum = _mm512_add_ps(sum, weight);
            store(narrowed + g * LANES, weight);
        }
        total_[row] = total_[row] * before + _mm512_reduce_add_ps(sum);
        most_[row] = most;
        if (before != 1.0f && before != 0.0f) {
            float *output = &outputs_[row * padded()];
            for (int64_t i = 0; i < padded(); i += LANES)
                store(output + i, _mm512_mul_ps(load(output + i), _mm512_set1_ps(before)));
        }
    }

    const Shape shape_;
    const int share_; // query heads of a key head
    const int row_limit_;
    const bool amx_;
    Buffer<T> queries_, narrowed_;
    Buffer<float> weights_, outputs_, sums_, most_, total_;
};

} // namespace bulkhead
