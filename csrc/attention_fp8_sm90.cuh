// What the kernels of the 8-bit attention share: how e4m3 queries, keys and values lie in memory (checked in
// NumPy by tests/ops/test_attention_fp8.py). csrc/notes/attention_fp8.md has the reasons.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention_fp8_sm90.h"

namespace any4d::fp8 {

constexpr int kHeadDim = 64;
constexpr int kQueries = 64;  // rows of one warpgroup: one wgmma
constexpr int kKeys = 128;
constexpr int kRows = 128;  // of a block of the first pass: one block of keys, two of queries
constexpr uint32_t kOnes = 0x38383838;  // four times 1 in e4m3
constexpr int kSamples = 64;  // rows of a segment whose mean key is subtracted: row i * length / 64
constexpr int kLeastExponent = -44, kMostExponent = 44;  // of scales: quotients of two stay far inside float32
constexpr int kLongestShort = 1024;  // rows of a segment that one kernel rounds to shared memory and works off

// 128 keys and values as they lie in memory and in shared memory, where wgmma reads them.
//   k: 64 bytes a key in the 64-byte swizzle: chunk c of 16 bytes of key r lies at c ^ (r / 2 % 4). Byte
//      32 s + 16 h + 4 t + i holds channel 16 t + 8 s + 4 h + i: any order will do for a sum over channels, and
//      this one makes 8 neighbouring channels of a query one thread's.
//   v: 128 bytes a channel in the 128-byte swizzle: chunk c lies at c ^ (channel % 8). Byte 16 g + 4 t + i holds key
//      16 g + 2 t + i % 2 + 8 (i / 2), so that the scores a thread has in accumulators are the bytes it must have of A.
//   ones: a 65th channel, whose product with the probabilities is the sum of the row.
struct alignas(128) KeyBlock {
    uint8_t k[kKeys * kHeadDim];
    uint8_t v[kHeadDim * kKeys];
    uint32_t ones[kKeys / 4];
    float key_scale;      // powers of two: what the bytes are to be multiplied by
    float value_scale;
    float value_inverse;  // 1 / value_scale
    float unused;
};
constexpr uint32_t kBlockBytes = 2 * kKeys * kHeadDim + kKeys + 4 * sizeof(float);  // all of it but the padding
static_assert(sizeof(KeyBlock) == 16640 && kBlockBytes % 16 == 0);

// 64 queries, for each of wgmma's two steps of 32 channels and each thread the four registers of A.
struct QueryTile {
    uint4 a[2][128];
};

struct QueryRow {
    float factor;  // of the scores, log2 units: the query's power of two, times scale times log2(e)
    float offset;  // what the subtracted mean key took from the row's log-sum-exp
};

// Byte offsets in the workspace. `blocks` of 128 rows in each of `pairs` (segment, head).
struct Layout {
    int64_t blocks, queries, rows, rest;

    Layout(int64_t pairs, int64_t blocks_a_pair) {
        const int64_t count = pairs * blocks_a_pair;
        blocks = 0;
        queries = count * sizeof(KeyBlock);
        rows = queries + count * 2 * sizeof(QueryTile);
        rest = rows + count * kRows * sizeof(QueryRow);
    }
};

struct Quantize {
    const void* q;
    const void* k;
    const void* v;
    void* out;   // zeros go to rows of no segment, there
    float* lse;  // and there
    DType dtype;
    int64_t row_stride, head_stride, rows;
    SegmentLayout segments;
    int heads;
    int blocks;        // of 128 rows in a segment
    unsigned tiles;    // heads * blocks * segments
    unsigned zeroing;  // blocks of threads after those, for the rows of no segment
    float scale;
    KeyBlock* key_blocks;    // [pairs, blocks]
    QueryTile* query_tiles;  // [pairs, 2 blocks]
    QueryRow* query_rows;    // [pairs, 128 blocks]
    int* counters;           // set to zero for the pass that follows
    int counter_count;
};

#ifdef __CUDACC__
struct Scale {
    float value, inverse;
};

// The power of two that brings `most` to at most 448; NaN for what is beyond all bounds, infinity too.
__device__ __forceinline__ Scale scale_of(float most) {
    const int rounded_up = __float_as_int(most * (1.f / 448.f)) + 0x7fffff;
    const int exponent = most > 0.f ? max((rounded_up >> 23) - 127, kLeastExponent) : 0;
    if (exponent > kMostExponent) return {NAN, NAN};
    return {__int_as_float((exponent + 127) << 23), __int_as_float((127 - exponent) << 23)};
}

// Four values as e4m3, the first in the lowest byte.
__device__ __forceinline__ uint32_t round_four(float a, float b, float c, float d) {
    uint32_t word;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}\n"
        : "=r"(word)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return word;
}
#endif

cudaError_t quantize(const Quantize& call, cudaStream_t stream);

// Both passes in one kernel, for segments of at most kLongestShort rows; needs no workspace.
cudaError_t attention_short(const AttentionForward& call, cudaStream_t stream);

}  // namespace any4d::fp8
