// What Python describes to the native decoder; native/library.py mirrors these structures.

#pragma once

#include <cstdint>

extern "C" {

struct Linear {
    const void *tiles;       // see pack in tiles.h
    const float *scales;     // [outputs] of int8 tiles, null where tiles are of the stage's type
    const float *bias;       // [outputs] or null
    int64_t inputs, outputs;
};

struct Layer {
    Linear query_key_value, attention_output, gate_up, down;
    // Weights of norms, null where the layer has none in this place.
    const float *before_attention, *query_norm, *key_norm, *after_attention, *before_mlp, *after_mlp;
    void *keys, *values;     // [blocks, groups of a block, key heads, head size * 16]
    int32_t window;          // positions that a row sees, its own included; 0 for all
    int32_t rotary_size;     // elements of a head that are rotated, 0 for none
    const float *cosines, *sines; // [rows, rotary_size / 2]
};

struct Shape {
    int64_t hidden, heads, key_heads, head_size, intermediate, block_size;
    int32_t bfloat;          // 1: bfloat16, 0: float32
    int32_t amx;             // 1: multiply with AMX where it helps
    int32_t wide_head_norm;  // 1: query and key norms span all heads, 0: each head
    int32_t gelu;            // activation of the MLP: 1 gelu_tanh, 0 silu
    float epsilon, scale, soft_cap, residual_multiplier; // soft cap 0 for none
};

struct Step {
    int64_t sequences, tokens;
    const int32_t *starts, *counts; // [sequences]
    const int32_t *tables;          // [sequences]: where a sequence's blocks begin in `blocks`
    const int32_t *blocks;
    const int32_t *rotary_offsets;  // [sequences]: of a position's row in the rotation tables
};
}
