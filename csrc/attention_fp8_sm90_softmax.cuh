// Scores in accumulators to e4m3 probabilities in the registers of the next product's A, with a running maximum.
#pragma once

#include "attention_fp8_sm90.cuh"
#include "softmax_sm90.cuh"

namespace any4d::fp8 {

// The largest probability of a row is 2^8: e4m3 goes up to 448, and down to 2^-9, 17 octaves below.
constexpr float kLargest = 8.f;

// Score to the byte of 2^x without the special function units. e4m3 has its exponent (bias 7) above 3 bits of mantissa,
// so 8 (x + 7) rounded to an integer is the byte of (1 + f) 2^n, for x = n + f: between 1 and 1.062 times 2^x. The shift
// makes that 0.962 .. 1.021, with a mean of 1; e4m3's own rounding is 1 +- 0.0625.
constexpr float kShift = 0.0562f;
constexpr float kWhole = 1024.f;  // float16 from here to 2048 are whole numbers, whose low byte is what exceeds 1024

// NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
}

struct Softmax {
    float reference[2];  // running maximum of the row, log2 units
    float factor[2];     // what the latest block's growth makes of earlier sums

    __device__ __forceinline__ Softmax() : reference{-INFINITY, -INFINITY} {}

    // `scale`: of this block's scores, log2 units, by row; positive. LINEAR of every 8 runs of 16 columns take the way
    // without special functions.
    template <int LINEAR>
    __device__ __forceinline__ void probabilities(uint32_t (&p)[16], const float (&scores)[64],
                                                  const float (&scale)[2]) {
        float bias[2], linear_scale[2], linear_bias[2];
        grow(scores, scale);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bias[half] = kLargest - reference[half];
            linear_scale[half] = scale[half] * 8.f;
            linear_bias[half] = fmaf(bias[half], 8.f, (7.f - kShift) * 8.f + kWhole);
        }
#pragma unroll
        for (int run = 0; run < 8; ++run) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* s = scores + 8 * run + 2 * half;
                uint32_t& word = p[2 * run + half];
                word = run * LINEAR % 8 < LINEAR ? linear(s, linear_scale[half], linear_bias[half])
                                                 : exact(s, scale[half], bias[half]);
            }
        }
    }

    // Natural logarithm of a row's sum of 2^(score), from the sum of probabilities.
    __device__ __forceinline__ float log_sum(int half, float sum) const {
        return (reference[half] - kLargest + log2f(sum)) * 0.69314718f;
    }

  private:
    __device__ __forceinline__ static uint32_t exact(const float* s, float scale, float bias) {
        return round_four(exp2_unit(fmaf(s[0], scale, bias)), exp2_unit(fmaf(s[1], scale, bias)),
                          exp2_unit(fmaf(s[4], scale, bias)), exp2_unit(fmaf(s[5], scale, bias)));
    }

    // Bytes of two scores, as the low bytes of two float16. What is below e4m3's range, and NaN, becomes zero.
    __device__ __forceinline__ static uint32_t two_bytes(float a, float b, float scale, float bias) {
        const uint32_t pair = round_pair<__half>(fmaf(a, scale, bias), fmaf(b, scale, bias));
        const __half2 whole = __hmax2(reinterpret_cast<const __half2&>(pair), __float2half2_rn(kWhole));
        return reinterpret_cast<const uint32_t&>(whole);
    }

    __device__ __forceinline__ static uint32_t linear(const float* s, float scale, float bias) {
        return __byte_perm(two_bytes(s[0], s[1], scale, bias), two_bytes(s[4], s[5], scale, bias), 0x6420);
    }

    // Raises the reference to the maximum of a block. Maxima of three are taken as of integers, in one instruction: that
    // is right whenever one of the scores is positive (NaN counts as the greatest), and whenever none is and the reference
    // is not negative, because then it stays.
    __device__ __forceinline__ void grow(const float (&scores)[64], const float (&scale)[2]) {
        float found[2];
        bool known = true;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int most[2] = {__float_as_int(scores[2 * half]), __float_as_int(scores[2 * half + 1])};
#pragma unroll
            for (int j = 1; j < 16; ++j)
                most[j % 2] = __vimax3_s32(most[j % 2], __float_as_int(scores[4 * j + 2 * half]),
                                           __float_as_int(scores[4 * j + 2 * half + 1]));
            int all = max(most[0], most[1]);
            all = max(all, __shfl_xor_sync(0xffffffff, all, 1));
            all = max(all, __shfl_xor_sync(0xffffffff, all, 2));
            found[half] = __int_as_float(all);
            known = known && (all >= 0 || reference[half] >= 0.f);
        }
        if (!__all_sync(0xffffffff, known)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                found[half] = max_or_nan(scores[2 * half], scores[2 * half + 1]);
#pragma unroll
                for (int j = 1; j < 16; ++j) {
                    found[half] = max_or_nan(found[half], scores[4 * j + 2 * half]);
                    found[half] = max_or_nan(found[half], scores[4 * j + 2 * half + 1]);
                }
                found[half] = max_or_nan(found[half], __shfl_xor_sync(0xffffffff, found[half], 1));
                found[half] = max_or_nan(found[half], __shfl_xor_sync(0xffffffff, found[half], 2));
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float grown = max_or_nan(reference[half], found[half] * scale[half]);
            factor[half] = exp2_unit(reference[half] - grown);
            reference[half] = grown;
        }
    }
};

}  // namespace any4d::fp8
