// One step of a computing warpgroup of the 8-bit attention: products of 64 queries with a block of keys and values, and
// their way into the rows' sums.
#pragma once

#include "attention_fp8_sm90.cuh"
#include "attention_fp8_sm90_mma.cuh"
#include "dependent_launch.cuh"
#include "hopper.cuh"

namespace any4d::fp8 {

using namespace hopper;

constexpr int kSums = kHeadDim + 8;  // columns of a block's output: channels, the row's sum, seven without a meaning

// A block of keys and values in shared memory; CONTENT begins with its KeyBlock. The ones are the first of 8 more channels
// of the values; the other 7 are whatever lies behind: they make columns of the output that nobody reads.
template <typename Content>
struct alignas(1024) Stage {
    Content content;
    static_assert(sizeof(Content) <= sizeof(KeyBlock::k) + sizeof(KeyBlock::v) + 8 * kKeys);
};

__device__ __forceinline__ void issue_scores(float (&scores)[kKeys / 2], const uint32_t (&q)[8], const uint8_t* k) {
    const uint64_t b = operand_64_bytes(k);
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) mma_e4m3(scores, q + 4 * i, advance(b, 32 * i), i > 0);
    mma_commit();
}

__device__ __forceinline__ void issue_output(float (&part)[kSums / 2], const uint32_t (&p)[kKeys / 8],
                                             const uint8_t* v) {
    const uint64_t b = operand(v);
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) mma_e4m3(part, p + 4 * i, advance(b, 32 * i), i > 0);
    mma_commit();
}

// Factors of the scores with a block of keys, by row. Never zero: times a masked score of -inf that would be NaN.
__device__ __forceinline__ void scale_scores(float (&found)[2], const float (&factor)[2], float key_scale) {
    found[0] = fmaxf(factor[0] * key_scale, 1e-37f);
    found[1] = fmaxf(factor[1] * key_scale, 1e-37f);
}

// A row's output and sum so far, and a block's to add to them.
struct Total {
    float acc[kHeadDim / 2];
    float sum[2];  // of all columns, in the first lane of a quad; in the others nothing that means anything
    float value_scale;  // that `acc` has yet to be multiplied by

    __device__ __forceinline__ Total() : acc{}, sum{}, value_scale(1.f) {}

    __device__ __forceinline__ void add(const float (&part)[kSums / 2], const float (&factor)[2], float scale,
                                        float inverse) {
        const float change = value_scale * inverse;
        const float grown[2] = {factor[0] * change, factor[1] * change};
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) acc[i] = fmaf(acc[i], grown[i / 2 % 2], part[i]);
        sum[0] = fmaf(sum[0], factor[0], part[kHeadDim / 2]);
        sum[1] = fmaf(sum[1], factor[1], part[kHeadDim / 2 + 2]);
        value_scale = scale;
    }
};

}  // namespace any4d::fp8
