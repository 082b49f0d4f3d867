// One computing warpgroup of attention's backward: 64 keys and values, the sums of their gradients, and their products.
#pragma once

#include "attention_backward_sm90.cuh"
#include "wgmma.cuh"

namespace any4d {

// Keys and values stay in registers for a whole tile, as A operands of transposed scores [keys, queries], so that
// probabilities and dS, rounded, are A operands too.
// HELD of the keys' four groups of 16 channels stay in registers; the others are read from shared memory every step.
template <typename T, int HELD>
struct KeyGroup {
    uint32_t k[4 * HELD], v[16];
    uint32_t p[16], ds[16];  // of the step whose products with queries and dO are next
    float scores[32], dp[32], dk[32], dv[32];

    template <int N>
    static __device__ __forceinline__ void load_operand(uint32_t (&operand)[N], const T* block) {
        const uint32_t address = operand_address(block, threadIdx.x / 32 % 4);
#pragma unroll
        for (int i = 0; i < N / 4; ++i) load_matrices(operand + 4 * i, address ^ 32 * i);
    }

    // The first step has none before it: it multiplies zeros by its own queries.
    __device__ __forceinline__ void start() {
#pragma unroll
        for (int i = 0; i < 16; ++i) p[i] = ds[i] = 0;
    }

    // scores = K Q^T as one group; then, as another, dp = V dO^T and what the step before adds to dV and dK.
    __device__ __forceinline__ void issue(const T* keys, const T* q, const T* grad_out, const T* q_before,
                                          const T* grad_out_before, bool add) {
        hopper::mma_fence();
        const uint64_t q_columns = hopper::operand(q), grad_columns = hopper::operand(grad_out);
        const uint64_t k_columns = hopper::operand(keys);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint64_t b = hopper::advance(q_columns, 32 * i);
            if (i < HELD)
                hopper::Mma<T, 64>::registers(scores, k + 4 * i, b, i > 0);
            else
                hopper::Mma<T, 64>::shared(scores, hopper::advance(k_columns, 32 * i), b, i > 0);
        }
        hopper::mma_commit();
#pragma unroll
        for (int i = 0; i < 4; ++i)
            hopper::Mma<T, 64>::registers(dp, v + 4 * i, hopper::advance(grad_columns, 32 * i), i > 0);
        issue_sums(q_before, grad_out_before, add);
    }

    __device__ __forceinline__ void issue_sums(const T* q, const T* grad_out, bool add) {
        const uint64_t q_rows = hopper::operand(q), grad_rows = hopper::operand(grad_out);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            hopper::Mma<T, 64>::template registers<true>(dv, p + 4 * i, hopper::advance(grad_rows, 2048 * i),
                                                         add || i > 0);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            hopper::Mma<T, 64>::template registers<true>(dk, ds + 4 * i, hopper::advance(q_rows, 2048 * i),
                                                         add || i > 0);
        hopper::mma_commit();
    }

    __device__ __forceinline__ void wait_scores() {
        hopper::mma_wait<1>();
        hopper::pin(scores);
    }

    __device__ __forceinline__ void wait_all() {
        hopper::mma_wait<0>();
        hopper::pin(dp);
        hopper::pin(dv);
        hopper::pin(dk);
        hopper::pin(p);
        hopper::pin(ds);
    }

    // Scores become probabilities.
    __device__ __forceinline__ void exponentials(const float* stats, float scale_log2) {
        const float2* lse = reinterpret_cast<const float2*>(stats) + threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 l = lse[4 * j];
            float* s = scores + 4 * j;
            s[0] = exp2_unit(fmaf(s[0], scale_log2, l.x));
            s[1] = exp2_unit(fmaf(s[1], scale_log2, l.y));
            s[2] = exp2_unit(fmaf(s[2], scale_log2, l.x));
            s[3] = exp2_unit(fmaf(s[3], scale_log2, l.y));
        }
        hopper::pin(scores);
    }

    // dS = P (dP - delta). Absent keys, whose probabilities mean nothing (and may be infinite), get zeros.
    __device__ __forceinline__ void round_operands(const float* stats, bool present, bool present8) {
        const float2* delta = reinterpret_cast<const float2*>(stats + kQueries) + threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 d = delta[4 * j];  // negative
            const float *s = scores + 4 * j, *g = dp + 4 * j;
            const uint32_t pair = round_pair<T>(s[0] * (g[0] + d.x), s[1] * (g[1] + d.y));
            const uint32_t pair8 = round_pair<T>(s[2] * (g[2] + d.x), s[3] * (g[3] + d.y));
            ds[2 * j] = present ? pair : 0;
            ds[2 * j + 1] = present8 ? pair8 : 0;
            p[2 * j] = round_pair<T>(s[0], s[1]);
            p[2 * j + 1] = round_pair<T>(s[2], s[3]);
        }
    }

    __device__ __forceinline__ void store_ds(T* block) const {
        const uint32_t address = operand_address(block, threadIdx.x / 32 % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) store_matrices(address ^ 32 * i, ds + 4 * i);
    }

    // 64 x 64 sums, rounded, into a swizzled block for the copy engine.
    static __device__ __forceinline__ void store_rounded(T* block, const float (&sums)[32], float factor) {
        const uint32_t address = operand_address(block, threadIdx.x / 32 % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t pairs[4];
#pragma unroll
            for (int c = 0; c < 4; ++c)
                pairs[c] = round_pair<T>(sums[8 * i + 2 * c] * factor, sums[8 * i + 2 * c + 1] * factor);
            store_matrices(address ^ 32 * i, pairs);
        }
    }

    static __device__ __forceinline__ void store_sums(float* block, const float (&sums)[32]) {
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            *reinterpret_cast<float4*>(block + block_offset(warp, j, lane)) =
                make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
    }
};

}  // namespace any4d
