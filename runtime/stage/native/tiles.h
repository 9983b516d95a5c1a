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
//
// The rows of a linear are stored in *row tiles* of 16 rows by one line of 64 bytes, because lines
// at a stride of a whole row compete for a few places in the first-level cache:
//
//     row_tiles[row / 16][line][row % 16] : 64 bytes
//
// so the inner dimension of every linear is filled up with zeros to whole lines.
//
// Weights may be stored as int8 with a scale for each column: tiles of the same order, a byte for
// each element. They are widened run by run into a buffer in the first-level cache and multiplied
// there; int8 numbers are exact in both element types. The scale multiplies the finished sum.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace bulkhead {

constexpr int UNIT = 4;         // bytes of a unit
constexpr int WIDTH = 2 * LANES; // columns of two tiles
constexpr int ROWS = 14;        // of the AVX-512 kernel
constexpr int TILE_ROWS = 16;   // of a row tile, and of a tile register
// What a kernel call reads of the rows and of the tiles should stay in the first-level cache.
constexpr int UNITS_IN_L1 = 512;
constexpr int AMX_UNITS_IN_L1 = 128;
constexpr int LINE = 64;
constexpr int LINE_UNITS = LINE / UNIT;

template <class T> constexpr int PER_UNIT = UNIT / sizeof(T);
template <class T> constexpr int PER_LINE = LINE / sizeof(T);

// Buffers begin with a line: rows of tile registers that cross lines are loaded at half the speed.
template <class T> struct LineAllocator {
    using value_type = T;
    T *allocate(size_t count) {
        return static_cast<T *>(::operator new(count * sizeof(T), std::align_val_t{LINE}));
    }
    void deallocate(T *buffer, size_t) { ::operator delete(buffer, std::align_val_t{LINE}); }
    bool operator==(const LineAllocator &) const = default;
};
template <class T> using Buffer = std::vector<T, LineAllocator<T>>;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Rows of the next AVX-512 call, so that what is left is cut evenly: 15 is 8 and 7, not 14 and 1.
inline int rows_at_once(int left) { return int(divide_up(left, divide_up(left, ROWS))); }

// Rows as kernels read them: line l of row r is at data + r * row_bytes + l * line_bytes.
struct Rows {
    const char *data;
    size_t row_bytes, line_bytes;
    const char *line(int l) const { return data + l * line_bytes; }
};

// Rows of a buffer that lie one after another, from `first` on.
template <class T> Rows plain_rows(const T *first, int64_t width) {
    return {(const char *)first, width * sizeof(T), LINE};
}

constexpr size_t ROW_TILE_BYTES = TILE_ROWS * LINE;

// Elements from one line of a row to the next.
template <class T> constexpr int64_t TILED_STEP = TILE_ROWS * PER_LINE<T>;
template <class T> constexpr int64_t PLAIN_STEP = PER_LINE<T>;

// Where row `row` begins among row tiles whose rows have `lines` lines.
template <class T> T *tiled_row(T *tiles, int64_t row, int64_t lines) {
    return tiles + row / TILE_ROWS * lines * TILED_STEP<T> + row % TILE_ROWS * PER_LINE<T>;
}

// Element `i` of a row that begins at `row`, a multiple of 16.
template <class T> T *element(T *row, int64_t i, int64_t step) {
    return row + i / PER_LINE<T> * step + i % PER_LINE<T>;
}

// -- AVX-512 --------------------------------------------------------------------------------------

template <class T> __m512 multiply_add(__m512 sum, __m512i row, __m512i tile);
template <> inline __m512 multiply_add<float>(__m512 sum, __m512i row, __m512i tile) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(tile), sum);
}
template <> inline __m512 multiply_add<bfloat16>(__m512 sum, __m512i row, __m512i tile) {
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)tile);
}

// What to bring towards the core while computing, a line of each stream a unit.
struct Ahead {
    const char *streams[4];
    int count;
};

// sums[r][0..31] (+)= rows[r] . tiles, over `segments` runs of `units` units each.
// `rows` holds the runs of a row one after another, each within lines of its own unless the units
// fill whole lines; run s of the tiles begins at first[s], second[s].
template <class T, int R>
void multiply(Rows rows, const char *const *first, const char *const *second, int segments,
              int units, float *sums, bool accumulate, Ahead ahead) {
    __m512 left[R], right[R];
    for (int r = 0; r < R; r++) {
        left[r] = accumulate ? load(sums + r * WIDTH) : _mm512_setzero_ps();
        right[r] = accumulate ? load(sums + r * WIDTH + LANES) : _mm512_setzero_ps();
    }
    for (int segment = 0; segment < segments; segment++) {
        const char *l = first[segment], *h = second[segment];
        for (int done = 0; done < units;) {
            const int at = (segment * units + done) % LINE_UNITS;
            const int count = std::min(units - done, LINE_UNITS - at);
            const char *line = rows.line((segment * units + done) / LINE_UNITS) + at * UNIT;
            for (int unit = 0; unit < count; unit++, l += LINE, h += LINE) {
                for (int i = 0; i < ahead.count; i++) {
                    _mm_prefetch(ahead.streams[i], _MM_HINT_T0);
                    ahead.streams[i] += LINE;
                }
                __m512i a = _mm512_loadu_si512(l), b = _mm512_loadu_si512(h);
#pragma GCC unroll 14
                for (int r = 0; r < R; r++) {
                    int32_t value;
                    std::memcpy(&value, line + r * rows.row_bytes + unit * UNIT, UNIT);
                    __m512i row = _mm512_set1_epi32(value);
                    left[r] = multiply_add<T>(left[r], row, a);
                    right[r] = multiply_add<T>(right[r], row, b);
                }
            }
            done += count;
        }
    }
    for (int r = 0; r < R; r++) {
        store(sums + r * WIDTH, left[r]);
        store(sums + r * WIDTH + LANES, right[r]);
    }
}

using Multiply = void (*)(Rows, const char *const *, const char *const *, int, int, float *, bool,
                          Ahead);

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

// How this thread's tile registers are cut. Registers 0 to 3 hold sums, 4 and 5 rows, 6 and 7
// tiles, all 16 rows of 64 bytes; HALF takes rows of 32 bytes by tiles of 8 units.
enum class Cut { WHOLE, HALF };

class AmxTiles {
  public:
    explicit AmxTiles(bool wanted) : wanted_(wanted) {
        if (wanted) cut(Cut::WHOLE);
    }
    ~AmxTiles() {
        if (wanted_) _tile_release();
    }
    AmxTiles(const AmxTiles &) = delete;
    AmxTiles &operator=(const AmxTiles &) = delete;

    // Forgets what the registers hold.
    static void cut(Cut how) {
        static const Configuration whole{LINE, TILE_ROWS}, half{LINE / 2, TILE_ROWS / 2};
        _tile_loadconfig(how == Cut::WHOLE ? &whole : &half);
    }

  private:
    struct alignas(64) Configuration {
        Configuration(int of_rows, int of_tiles) {
            for (int tile = 0; tile < 8; tile++) {
                row_bytes[tile] = tile == 4 || tile == 5 ? of_rows : LINE;
                rows[tile] = tile == 6 || tile == 7 ? of_tiles : TILE_ROWS;
            }
        }
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };

    const bool wanted_;
};

// As `multiply`, 16 rows (R = 1) or 32 (R = 2) whose second half begins at `low`, one segment of
// `lines` lines. All these rows are read and written, wanted or not. Of the streams it takes two.
template <int R>
void amx_multiply(Rows rows, Rows low, const char *first, const char *second, int lines,
                  float *sums, bool accumulate, Ahead ahead) {
    constexpr int SUMS_BYTES = WIDTH * sizeof(float);
    float *low_sums = sums + TILE_ROWS * WIDTH;
    if (accumulate) {
        _tile_loadd(0, sums, SUMS_BYTES);
        _tile_loadd(1, sums + LANES, SUMS_BYTES);
        if constexpr (R == 2) {
            _tile_loadd(2, low_sums, SUMS_BYTES);
            _tile_loadd(3, low_sums + LANES, SUMS_BYTES);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (R == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (int l = 0; l < lines; l++) {
        if (ahead.count)
            for (int i = l * LINE_UNITS; i < (l + 1) * LINE_UNITS; i++) {
                _mm_prefetch(ahead.streams[0] + i * LINE, _MM_HINT_T1);
                _mm_prefetch(ahead.streams[1] + i * LINE, _MM_HINT_T1);
            }
        _tile_loadd(6, first + l * LINE_UNITS * LINE, LINE);
        _tile_loadd(4, rows.line(l), rows.row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, second + l * LINE_UNITS * LINE, LINE);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2) {
            _tile_loadd(5, low.line(l), low.row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, SUMS_BYTES);
    _tile_stored(1, sums + LANES, SUMS_BYTES);
    if constexpr (R == 2) {
        _tile_stored(2, low_sums, SUMS_BYTES);
        _tile_stored(3, low_sums + LANES, SUMS_BYTES);
    }
}

// sums [R * 16][32], accumulated, += rows . tiles over `segments` runs of 8 units each, with the
// registers cut in HALF; `rows` holds the runs of a row one after another.
template <int R>
void amx_multiply_halves(const char *rows, size_t row_bytes, const char *const *first,
                         const char *const *second, int segments, float *sums, size_t sums_bytes) {
    const size_t next = TILE_ROWS * sums_bytes / sizeof(float);
    _tile_loadd(0, sums, sums_bytes);
    _tile_loadd(1, sums + LANES, sums_bytes);
    if constexpr (R == 2) {
        _tile_loadd(2, sums + next, sums_bytes);
        _tile_loadd(3, sums + next + LANES, sums_bytes);
    }
    for (int segment = 0; segment < segments; segment++, rows += LINE / 2) {
        _tile_loadd(6, first[segment], LINE);
        _tile_loadd(4, rows, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, second[segment], LINE);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2) {
            _tile_loadd(5, rows + TILE_ROWS * row_bytes, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, sums_bytes);
    _tile_stored(1, sums + LANES, sums_bytes);
    if constexpr (R == 2) {
        _tile_stored(2, sums + next, sums_bytes);
        _tile_stored(3, sums + next + LANES, sums_bytes);
    }
}

// -- int8 tiles -----------------------------------------------------------------------------------

template <class T> constexpr int NARROW_UNIT = LANES * PER_UNIT<T>; // bytes of a unit of 16 columns

inline __m512 widened(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

// Widens `lines` lines of a tile, 16 units each, to `to`; `ahead` is as long and is brought to the
// second-level cache meanwhile.
template <class T> void widen(const int8_t *from, int lines, char *to, const int8_t *ahead) {
    constexpr int STEP = LINE / NARROW_UNIT<T>; // units of a line of int8
    for (int unit = 0; unit < lines * LINE_UNITS; unit += STEP, ahead += LINE) {
        _mm_prefetch((const char *)ahead, _MM_HINT_T1);
        for (int i = 0; i < STEP; i++, from += NARROW_UNIT<T>, to += LINE) {
            if constexpr (sizeof(T) == 2) {
                const __m512bh both = _mm512_cvtne2ps_pbh(widened(from + LANES), widened(from));
                _mm512_store_si512(to, (__m512i)both);
            } else {
                _mm512_store_ps(to, widened(from));
            }
        }
    }
}

// -- storing as tiles -----------------------------------------------------------------------------

inline int64_t lines_of(int64_t elements, size_t size) { return divide_up(elements * size, LINE); }

// Tiles of a weight [outputs, inputs], both filled up with zeros: outputs to 32, inputs to lines of
// T. S is what an element is stored as: T itself or int8_t.
template <class T, class S>
void pack(Team &team, const S *weight, int64_t outputs, int64_t inputs, S *tiles) {
    constexpr int bytes = PER_UNIT<T> * sizeof(S); // of a unit
    const int64_t units = inputs / PER_UNIT<T>;
    const int64_t padded = lines_of(inputs, sizeof(T)) * LINE_UNITS;
    Tickets tickets(1);
    team.run([&](int) {
        for (int64_t tile; (tile = tickets.take(0)) < round_up(outputs, WIDTH) / LANES;) {
            char *to = (char *)tiles + tile * padded * LANES * bytes;
            const int columns = int(std::clamp<int64_t>(outputs - tile * LANES, 0, LANES));
            const char *from = (const char *)(weight + tile * LANES * inputs);
            for (int64_t unit = 0; unit < units; unit++, to += LANES * bytes, from += bytes) {
                for (int column = 0; column < columns; column++)
                    std::memcpy(to + column * bytes, from + column * units * bytes, bytes);
                std::memset(to + columns * bytes, 0, (LANES - columns) * bytes);
            }
            std::memset(to, 0, (padded - units) * LANES * bytes);
        }
    });
}

// One column of the tiles: row `index` of the matrix that was packed.
template <class T> void unpack(const T *tiles, int64_t inputs, int64_t index, T *row) {
    const int64_t padded = lines_of(inputs, sizeof(T)) * LINE_UNITS;
    const char *from = (const char *)tiles + index / LANES * padded * LINE + index % LANES * UNIT;
    for (int64_t unit = 0; unit < inputs / PER_UNIT<T>; unit++, from += LINE)
        std::memcpy((char *)row + unit * UNIT, from, UNIT);
}

} // namespace bulkhead
