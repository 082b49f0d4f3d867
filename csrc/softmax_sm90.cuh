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

// The same for one probability, as bits of a pair.
template <typename T>
constexpr uint32_t kMostPair = 0x5f805f80;  // 2^64
template <>
inline constexpr uint32_t kMostPair<__half> = 0x78007800;  // 2^15
template <typename T>
constexpr uint32_t kOnes = 0x3f803f80;
template <>
inline constexpr uint32_t kOnes<__half> = 0x3c003c00;

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

// 2^x for x <= 127 on the multiply-add units: a cubic on [-1/2, 1/2], relative error 7.5e-5 (bfloat16 rounds by 2e-3),
// scaled by adding to the exponent bits. Below -126 it gives 2^-126, which no sum notices; from 127 on infinity's
// exponent or close to it, which no range check overlooks.
__device__ __forceinline__ float exp2_polynomial(float x) {
    constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    x = fminf(fmaxf(x, -126.f), 127.4f);
    const float shifted = x + kRound;
    const float fraction = x - (shifted - kRound);
    float y = fmaf(0.05517132f, fraction, 0.24261054f);
    y = fmaf(y, fraction, 0.69326099f);
    y = fmaf(y, fraction, 0.99992811f);
    return __int_as_float(__float_as_int(y) + (__float_as_int(shifted) << 23));
}

// The largest of values BEGIN to END, none of them negative; NaN is larger than all numbers.
template <int BEGIN, int END, int N>
__device__ __forceinline__ float largest(const float (&values)[N]) {
    int found[2] = {0, 0};
#pragma unroll
    for (int i = BEGIN; i < END; i += 2)
        found[i / 2 % 2] = __vimax3_s32(found[i / 2 % 2], __float_as_int(values[i]), __float_as_int(values[i + 1]));
    return __int_as_float(max(found[0], found[1]));
}

// Whether no value of pairs BEGIN to END passes kMostPair; none is negative, so their bits compare as integers.
template <typename T, int BEGIN, int END, int N>
__device__ __forceinline__ bool pairs_in_range(const uint32_t (&pairs)[N]) {
    uint32_t found[2] = {kMostPair<T>, kMostPair<T>};
#pragma unroll
    for (int i = BEGIN; i < END; i += 2) found[i / 2 % 2] = __vimax3_u16x2(found[i / 2 % 2], pairs[i], pairs[i + 1]);
    return __vmaxu2(found[0], found[1]) == kMostPair<T>;
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Scores of columns from `valid` on become -inf.
template <int N>
__device__ __forceinline__ void mask_columns(float (&scores)[N], int valid) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i / 4 * 8 + column + i % 2 >= valid) scores[i] = -INFINITY;
}

struct Softmax {
    float scale_log2;
    float reference[2];  // subtracted from the scores, log2 units; 0 after that is a probability of 1
    float sum[2];        // of this thread's columns
    float added[2];      // the latest block's part of it

    __device__ __forceinline__ explicit Softmax(float scale) : scale_log2(scale), sum{0.f, 0.f} {}

    // References from the first block of keys; it has a valid column.
    template <int N>
    __device__ __forceinline__ void start(const float (&scores)[N]) {
        row_maxima(reference, scores);
    }

    // Scores BEGIN to END become probabilities; of every 16, EMULATED avoid the special function units.
    template <int EMULATED, int BEGIN, int END, int N>
    __device__ __forceinline__ void exponentials(float (&scores)[N]) {
#pragma unroll
        for (int i = BEGIN; i < END; ++i) {
            const float x = fmaf(scores[i], scale_log2, -reference[i / 2 % 2]);
            scores[i] = i % 16 * EMULATED % 16 < EMULATED ? exp2_polynomial(x) : exp2_unit(x);
        }
    }

    // Adds probabilities BEGIN to END of a block to the row sums' latest parts; BEGIN 0 starts them.
    template <int BEGIN, int END, int N>
    __device__ __forceinline__ void add(const float (&scores)[N]) {
        if (BEGIN == 0) added[0] = added[1] = 0.f;
#pragma unroll
        for (int i = BEGIN; i < END; ++i) added[i / 2 % 2] += scores[i];
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
