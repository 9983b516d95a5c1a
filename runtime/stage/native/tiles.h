// Products of rows with matrices that are stored as tiles.
//
// A *tile* is 16 columns of a matrix, cut into units of four bytes along the inner dimension (two
// bfloat16 or one float32):
//
//     tile[unit][column] : 4 bytes          so one 64-byte load holds one unit of 16 columns
//
// Weights, keys and values are all stored so: linears, scores and weighted sums are one loop. With
// AVX-512 a kernel multiplies up to 14 rows by two tiles; 28 of 32 registers accumulate. With AMX
// (Intel SDM vol. 1, chapter 18) sixteen units of a tile are one tile register, 32 rows by two
// tiles a time, for bfloat16 only.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "team.h"
#include "vectors.h"

namespace bulkhead {

constexpr int UNIT = 4;         // bytes of a unit
constexpr int WIDTH = 2 * LANES; // columns of two tiles
constexpr int ROWS = 14;        // of the AVX-512 kernel
constexpr int AMX_ROWS = 16;    // of a tile register
constexpr int AMX_UNITS = 16;
// What a kernel call reads of the rows and of the tiles should stay in the first-level cache.
constexpr int UNITS_IN_L1 = 512;
constexpr int LINE = 64;

template <class T> constexpr int PER_UNIT = UNIT / sizeof(T);

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Rows of the next AVX-512 call, so that what is left is cut evenly: 15 is 8 and 7, not 14 and 1.
inline int rows_at_once(int left) { return int(divide_up(left, divide_up(left, ROWS))); }

// -- AVX-512 --------------------------------------------------------------------------------------

template <class T> __m512 multiply_add(__m512 sum, __m512i row, __m512i tile);
template <> inline __m512 multiply_add<float>(__m512 sum, __m512i row, __m512i tile) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(tile), sum);
}
template <> inline __m512 multiply_add<bfloat16>(__m512 sum, __m512i row, __m512i tile) {
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)tile);
}

// Lines to bring towards the core while computing.
struct Ahead {
    const char *from = nullptr;
    int lines = 0; // a unit
};

// sums[r][0..31] (+)= rows[r] . tiles, over `segments` runs of `units` units each.
// `rows` holds the runs of a row one after another; run s of the tiles begins at first[s], second[s].
template <class T, int R>
void multiply(const char *rows, size_t row_bytes, const char *const *first,
              const char *const *second, int segments, int units, float *sums, bool accumulate,
              Ahead ahead) {
    __m512 left[R], right[R];
    for (int r = 0; r < R; r++) {
        left[r] = accumulate ? load(sums + r * WIDTH) : _mm512_setzero_ps();
        right[r] = accumulate ? load(sums + r * WIDTH + LANES) : _mm512_setzero_ps();
    }
    for (int segment = 0; segment < segments; segment++) {
        const char *l = first[segment], *h = second[segment];
        for (int unit = 0; unit < units; unit++) {
            for (int line = 0; line < ahead.lines; line++)
                _mm_prefetch(ahead.from + line * LINE, _MM_HINT_T1);
            ahead.from += ahead.lines * LINE;
            __m512i a = _mm512_loadu_si512(l + unit * LINE), b = _mm512_loadu_si512(h + unit * LINE);
#pragma GCC unroll 14
            for (int r = 0; r < R; r++) {
                int32_t value;
                std::memcpy(&value, rows + r * row_bytes + unit * UNIT, UNIT);
                __m512i row = _mm512_set1_epi32(value);
                left[r] = multiply_add<T>(left[r], row, a);
                right[r] = multiply_add<T>(right[r], row, b);
            }
        }
        rows += units * UNIT;
    }
    for (int r = 0; r < R; r++) {
        store(sums + r * WIDTH, left[r]);
        store(sums + r * WIDTH + LANES, right[r]);
    }
}

using Multiply = void (*)(const char *, size_t, const char *const *, const char *const *, int, int,
                          float *, bool, Ahead);

template <class T> Multiply kernel(int rows) {
    static constexpr Multiply table[ROWS + 1] = {
        nullptr,          multiply<T, 1>,  multiply<T, 2>,  multiply<T, 3>,  multiply<T, 4>,
        multiply<T, 5>,   multiply<T, 6>,  multiply<T, 7>,  multiply<T, 8>,  multiply<T, 9>,
        multiply<T, 10>,  multiply<T, 11>, multiply<T, 12>, multiply<T, 13>, multiply<T, 14>};
    return table[rows];
}

// -- AMX ------------------------------------------------------------------------------------------

// Asks the kernel for the tile registers, once a process (Linux, arch/x86/xstate.rst).
inline bool amx_permitted() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool permitted =
        syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return permitted;
}

// Tile registers of this thread, all 16 rows of 64 bytes, while it lives. Registers 0 to 3 hold
// sums, 4 and 5 rows, 6 and 7 tiles.
class AmxTiles {
  public:
    explicit AmxTiles(bool wanted) : wanted_(wanted) {
        if (!wanted) return;
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } configuration;
        for (int tile = 0; tile < 8; tile++) {
            configuration.row_bytes[tile] = LINE;
            configuration.rows[tile] = AMX_ROWS;
        }
        _tile_loadconfig(&configuration);
    }
    ~AmxTiles() {
        if (wanted_) _tile_release();
    }
    AmxTiles(const AmxTiles &) = delete;
    AmxTiles &operator=(const AmxTiles &) = delete;

  private:
    const bool wanted_;
};

// As `multiply`, 16 rows (R = 1) or 32 (R = 2), one segment of `units` units, a multiple of 16. All
// these rows are read and written, wanted or not. Brings 2 KiB ahead for every 2 KiB of tiles.
template <int R>
void amx_multiply(const char *rows, size_t row_bytes, const char *first, const char *second,
                  int units, float *sums, bool accumulate, const char *ahead) {
    constexpr int SUMS_BYTES = WIDTH * sizeof(float);
    float *low = sums + AMX_ROWS * WIDTH;
    const char *low_rows = rows + AMX_ROWS * row_bytes;
    if (accumulate) {
        _tile_loadd(0, sums, SUMS_BYTES);
        _tile_loadd(1, sums + LANES, SUMS_BYTES);
        if constexpr (R == 2) {
            _tile_loadd(2, low, SUMS_BYTES);
            _tile_loadd(3, low + LANES, SUMS_BYTES);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (R == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (int unit = 0; unit < units; unit += AMX_UNITS) {
        if (ahead) {
            for (int line = 0; line < 2 * AMX_UNITS; line++)
                _mm_prefetch(ahead + line * LINE, _MM_HINT_T1);
            ahead += 2 * AMX_UNITS * LINE;
        }
        _tile_loadd(6, first + unit * LINE, LINE);
        _tile_loadd(4, rows + unit * UNIT, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, second + unit * LINE, LINE);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2) {
            _tile_loadd(5, low_rows + unit * UNIT, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, SUMS_BYTES);
    _tile_stored(1, sums + LANES, SUMS_BYTES);
    if constexpr (R == 2) {
        _tile_stored(2, low, SUMS_BYTES);
        _tile_stored(3, low + LANES, SUMS_BYTES);
    }
}

// -- storing as tiles -----------------------------------------------------------------------------

// Tiles of a weight [outputs, inputs]; `tiles` holds `outputs` rounded up to 32, what is beyond
// them zeros.
template <class T>
void pack(Team &team, const T *weight, int64_t outputs, int64_t inputs, T *tiles) {
    const int64_t units = inputs / PER_UNIT<T>;
    Tickets tickets(1);
    team.run([&](int) {
        for (int64_t tile; (tile = tickets.take(0)) < round_up(outputs, WIDTH) / LANES;) {
            char *to = (char *)tiles + tile * units * LINE;
            const int columns = int(std::clamp<int64_t>(outputs - tile * LANES, 0, LANES));
            const char *from = (const char *)(weight + tile * LANES * inputs);
            for (int64_t unit = 0; unit < units; unit++, to += LINE, from += UNIT) {
                for (int column = 0; column < columns; column++)
                    std::memcpy(to + column * UNIT, from + column * units * UNIT, UNIT);
                std::memset(to + columns * UNIT, 0, (LANES - columns) * UNIT);
            }
        }
    });
}

// One column of the tiles: row `index` of the matrix that was packed.
template <class T> void unpack(const T *tiles, int64_t inputs, int64_t index, T *row) {
    const int64_t units = inputs / PER_UNIT<T>;
    const T *from =
        tiles + index / LANES * units * LANES * PER_UNIT<T> + index % LANES * PER_UNIT<T>;
    for (int64_t unit = 0; unit < units; unit++, from += LANES * PER_UNIT<T>)
        for (int i = 0; i < PER_UNIT<T>; i++) row[unit * PER_UNIT<T> + i] = from[i];
}

} // namespace bulkhead
