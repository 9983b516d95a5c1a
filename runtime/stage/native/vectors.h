// Sixteen floats at a time, from and to the two element types that a stage computes in.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace bulkhead {

constexpr int LANES = 16;
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

struct bfloat16 {
    uint16_t bits;
};

inline __m512 load(const float *from) { return _mm512_loadu_ps(from); }

inline __m512 load(const bfloat16 *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store(float *to, __m512 value) { _mm512_storeu_ps(to, value); }

inline void store(bfloat16 *to, __m512 value) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(value));
}

inline float number(float value) { return value; }

inline float number(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <class T> inline T narrow(float value);
template <> inline float narrow<float>(float value) { return value; }
template <> inline bfloat16 narrow<bfloat16>(float value) {
    return {uint16_t(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0))};
}

// e^x to about one unit in the last place of float32, exactly 0 below -110: 2^n times a polynomial
// on [-ln2/2, ln2/2] (Cephes, expf.c).
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-110.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// 1 / x, from an estimate of 14 bits by one step of Newton's method: a division takes four times as
// long.
inline __m512 reciprocal(__m512 x) {
    __m512 estimate = _mm512_rcp14_ps(x);
    __m512 rest = _mm512_fnmadd_ps(x, estimate, _mm512_set1_ps(1.0f));
    return _mm512_fmadd_ps(estimate, rest, estimate);
}

inline __m512 hyperbolic_tangent(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f), bound = _mm512_set1_ps(20.0f);
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), bound)), bound);
    __m512 e = exponential(_mm512_add_ps(x, x));
    return _mm512_mul_ps(_mm512_sub_ps(e, one), reciprocal(_mm512_add_ps(e, one)));
}

inline __m512 silu(__m512 x) {
    __m512 decay = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
    // Far below zero the decay overflows: its reciprocal is 0, and so is the product.
    decay = _mm512_min_ps(decay, _mm512_set1_ps(1e30f));
    return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(_mm512_set1_ps(1.0f), decay)));
}

// The tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415).
inline __m512 gelu_tanh(__m512 x) {
    __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
    __m512 bend = hyperbolic_tangent(_mm512_mul_ps(inner, _mm512_set1_ps(0.7978845608f)));
    return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)),
                         _mm512_add_ps(_mm512_set1_ps(1.0f), bend));
}

} // namespace bulkhead
