// Online softmax on wgmma accumulators: every thread holds parts of two rows, a quad of threads all of both.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace any4d {

// How far a row's scores may pass the reference of its exponents (log2 units, less 5 for the columns that one thread
// adds up) before the reference must grow. Probabilities keep their relative precision up to 2^64 in bfloat16 and
// 2^15 in float16, so the first block's maximum nearly always serves for the whole row: no maxima, no rescaling.
template <typename T>
constexpr float kMostMass = 18446744073709551616.f;  // 2^64
template <>
inline constexpr float kMostMass<__half> = 32768.f;

template <typename T>
__device__ __forceinline__ uint32_t round_pair(float low, float high);

template <>
__device__ __forceinline__ uint32_t round_pair<__nv_bfloat16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <>
__device__ __forceinline__ uint32_t round_pair<__half>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Values BEGIN to END.
template <typename T, int BEGIN, int END, int N>
__device__ __forceinline__ void round_pairs(uint32_t (&pairs)[N / 2], const float (&values)[N]) {
#pragma unroll
    for (int i = BEGIN / 2; i < END / 2; ++i) pairs[i] = round_pair<T>(values[2 * i], values[2 * i + 1]);
}

__device__ __forceinline__ float exp2_unit(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 2^x on the multiply-add units for x = 254 y - 126, y in [0, 1]: a cubic on [-1/2, 1/2], relative error 7.5e-5
// (bfloat16 rounds by 2e-3), scaled by adding to the exponent bits. Its ends are 2^-126, which no sum notices, and
// 2^128 less a little, which no range check overlooks.
__device__ __forceinline__ float exp2_polynomial(float y) {
    constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const float shifted = fmaf(y, 254.f, kRound - 126.f);
    const float fraction = fmaf(y, 254.f, (kRound - 126.f) - shifted);
    float z = fmaf(0.05517132f, fraction, 0.24261054f);
    z = fmaf(z, fraction, 0.69326099f);
    z = fmaf(z, fraction, 0.99992811f);
    return __int_as_float(__float_as_int(z) + (__float_as_int(shifted) << 23));
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Scores of columns from `valid` on, the same for the whole warp, become -inf.
template <int N>
__device__ __forceinline__ void mask_columns(float (&scores)[N], int valid) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int first = 0; first < N; first += 16) {
        if (valid >= 2 * first + 32) continue;
#pragma unroll
        for (int i = first; i < first + 16; ++i)
            if (i / 4 * 8 + column + i % 2 >= valid) scores[i] = -INFINITY;
    }
}

struct Softmax {
    static constexpr float kUnit = 1.f / 254.f;  // `exp2_polynomial`'s

    float scale_log2;
    float scale_unit;
    float reference[2];  // subtracted from the scores, log2 units; 0 after that is a probability of 1
    float sum[2];    // of this thread's columns
    float added[2];  // the latest block's part of it

    __device__ __forceinline__ Softmax(float scale_log2, float scale_unit)
        : scale_log2(scale_log2), scale_unit(scale_unit) {}

    // References from the first block of keys, which has a valid column; nothing is summed yet.
    template <int N>
    __device__ __forceinline__ void start(const float (&scores)[N]) {
        row_maxima(reference, scores);
        sum[0] = sum[1] = 0.f;
    }

    // Scores BEGIN to END become probabilities; of every 16, EMULATED avoid the special function units.
    template <int EMULATED, int BEGIN, int END, int N>
    __device__ __forceinline__ void exponentials(float (&scores)[N]) {
#pragma unroll
        for (int i = BEGIN; i < END; ++i) {
            const float from = reference[i / 2 % 2];
            if (i % 16 * EMULATED % 16 < EMULATED)  // clamped for free
                scores[i] = exp2_polynomial(__saturatef(fmaf(scores[i], scale_unit, kUnit * (126.f - from))));
            else
                scores[i] = exp2_unit(fmaf(scores[i], scale_log2, -from));
        }
    }

    // Adds probabilities BEGIN to END of a block to the row sums' latest parts; BEGIN 0 starts them.
    template <int BEGIN, int END, int N>
    __device__ __forceinline__ void add(const float (&scores)[N]) {
        if (BEGIN == 0) added[0] = added[1] = 0.f;
#pragma unroll
        for (int i = BEGIN; i < END; ++i) added[i / 2 % 2] += scores[i];
    }

    // Whether what `add` added is in range, infinities and all.
    template <typename T>
    __device__ __forceinline__ bool in_range() const {
        return added[0] + added[1] <= kMostMass<T>;
    }

    // References from a block of scores that passed the old ones too far; `factor` is what that makes of earlier sums.
    template <int N>
    __device__ __forceinline__ void grow(float (&factor)[2], const float (&scores)[N]) {
        float found[2];
        row_maxima(found, scores);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float grown = fmaxf(reference[half], found[half]);
            factor[half] = exp2_unit(reference[half] - grown);
            reference[half] = grown;
            sum[half] *= factor[half];
        }
    }

    __device__ __forceinline__ void accumulate() {
        sum[0] += added[0];
        sum[1] += added[1];
    }

    __device__ __forceinline__ void inverse(float (&found)[2]) {
        sum[0] = quad_sum(sum[0]);
        sum[1] = quad_sum(sum[1]);
        found[0] = 1.f / sum[0];
        found[1] = 1.f / sum[1];
    }

    // Natural logarithm, after `inverse`.
    __device__ __forceinline__ float log_sum(int half) const {
        return (reference[half] + log2f(sum[half])) * 0.69314718f;
    }

  private:
    template <int N>
    __device__ __forceinline__ void row_maxima(float (&found)[2], const float (&scores)[N]) const {
        found[0] = fmaxf(scores[0], scores[1]);
        found[1] = fmaxf(scores[2], scores[3]);
#pragma unroll
        for (int j = 1; j < N / 4; ++j) {
            found[0] = fmaxf(found[0], fmaxf(scores[4 * j], scores[4 * j + 1]));
            found[1] = fmaxf(found[1], fmaxf(scores[4 * j + 2], scores[4 * j + 3]));
        }
        found[0] = quad_max(found[0]) * scale_log2;
        found[1] = quad_max(found[1]) * scale_log2;
    }
};

}  // namespace any4d
