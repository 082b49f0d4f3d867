// Rows of up to 1024 channels, one warp a row: lane l holds channels 128 i + 4 l .. + 3.
#pragma once

#include "common.cuh"
#include "fuse_tokens.h"

namespace any4d::fuse {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kVector = 4;  // channels of one access: 16 bytes of float32, 8 of 16-bit types
constexpr int kStepChannels = kVector * kWarp;
constexpr int kMaxSteps = 8;

// Steps of 128 channels; FULL: they are all the row's, so that nothing is masked.
template <int STEPS, bool FULL>
struct Shape {
    static constexpr int kSteps = STEPS;
    static constexpr bool kFull = FULL;

    __device__ static __forceinline__ bool inside(int step, int lane, int channels) {
        return FULL || step * kStepChannels + lane * kVector < channels;
    }
};

template <typename S>
struct Row {
    float values[S::kSteps][kVector];
};

// Maps are read once: they need not push weights and vectors out of the L1.
template <typename T>
__device__ __forceinline__ void load_once(Pack<T, kVector>& pack, const T* source) {
    if constexpr (sizeof(T) == 4) {
        const uint4 words = __ldcs(reinterpret_cast<const uint4*>(source));
        pack.words[0] = words.x;
        pack.words[1] = words.y;
        pack.words[2] = words.z;
        pack.words[3] = words.w;
    } else {
        const uint2 words = __ldcs(reinterpret_cast<const uint2*>(source));
        pack.words[0] = words.x;
        pack.words[1] = words.y;
    }
}

template <typename T, typename S>
__device__ __forceinline__ void add_typed(Row<S>& row, const T* source, int channels, int lane) {
    Pack<T, kVector> packs[S::kSteps];
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
        const int channel = i * kStepChannels + lane * kVector;
        if (S::inside(i, lane, channels)) {
            load_once(packs[i], source + channel);
        } else {
#pragma unroll
            for (uint32_t& word : packs[i].words) word = 0;
        }
    }
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) row.values[i][j] += packs[i].get(j);
    }
}

// row += the C channels at element `offset`.
template <typename S>
__device__ __forceinline__ void add_row(Row<S>& row, const void* data, DType dtype, int64_t offset, int channels,
                                        int lane) {
    if (dtype == DType::kFloat32) {
        add_typed(row, static_cast<const float*>(data) + offset, channels, lane);
    } else if (dtype == DType::kBFloat16) {
        add_typed(row, static_cast<const __nv_bfloat16*>(data) + offset, channels, lane);
    } else {
        add_typed(row, static_cast<const __half*>(data) + offset, channels, lane);
    }
}

template <typename T, typename S>
__device__ __forceinline__ void store_typed(const Row<S>& row, T* target, int channels, int lane) {
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
        const int channel = i * kStepChannels + lane * kVector;
        if (S::inside(i, lane, channels)) {
            Pack<T, kVector> pack;
            pack.set(row.values[i]);
            pack.store(target + channel);
        }
    }
}

template <typename S>
__device__ __forceinline__ void store_row(const Row<S>& row, const Target& target, int64_t offset, int channels,
                                          int lane) {
    if (target.dtype == DType::kFloat32) {
        store_typed(row, static_cast<float*>(target.data) + offset, channels, lane);
    } else if (target.dtype == DType::kBFloat16) {
        store_typed(row, static_cast<__nv_bfloat16*>(target.data) + offset, channels, lane);
    } else {
        store_typed(row, static_cast<__half*>(target.data) + offset, channels, lane);
    }
}

template <typename S>
__device__ __forceinline__ float sum_of(const Row<S>& row) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) total += row.values[i][j];
    }
    return total;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
}

// Both sums over the warp, the same in every lane.
__device__ __forceinline__ float2 warp_sum(float2 value) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        value.x += __shfl_xor_sync(kAllLanes, value.x, distance);
        value.y += __shfl_xor_sync(kAllLanes, value.y, distance);
    }
    return value;
}

__device__ __forceinline__ bool given(const uint8_t* mask, int64_t n) { return mask == nullptr || mask[n] != 0; }

// A [C] table as float32 in shared memory; all threads of the block. Lanes read whole steps, so channels past the end
// are filled too, with zeros: what a kernel before left there would else be added to the row.
template <typename S>
__device__ __forceinline__ void stage(float* shared, const Modality& table, int channels) {
    for (int c = threadIdx.x; c < S::kSteps * kStepChannels; c += kThreads) {
        shared[c] = S::kFull || c < channels ? load_value(table.data, table.dtype, c) : 0.0f;
    }
}

// The sum of a view's given vectors, likewise.
template <typename S>
__device__ __forceinline__ void stage_vectors(float* shared, const Modality (&vectors)[kMaxVectors], int count,
                                              int64_t n, int channels) {
    for (int c = threadIdx.x; c < S::kSteps * kStepChannels; c += kThreads) {
        float total = 0.0f;
        if (S::kFull || c < channels) {
            for (int i = 0; i < count; ++i) {
                if (given(vectors[i].mask, n)) {
                    total += load_value(vectors[i].data, vectors[i].dtype, n * channels + c);
                }
            }
        }
        shared[c] = total;
    }
}

__device__ __forceinline__ float4 four_of(const float* shared, int i, int lane) {
    return reinterpret_cast<const float4*>(shared)[i * kWarp + lane];
}

// Calls f with the shape of a row: its own for the model's widths, else one for all.
template <typename F>
cudaError_t with_shape(int channels, F&& f) {
    switch (channels) {
        case 768:
            return f(Shape<6, true>{});
        case 1024:
            return f(Shape<8, true>{});
        default:
            return channels < kMaxSteps * kStepChannels ? f(Shape<kMaxSteps, false>{}) : cudaErrorInvalidValue;
    }
}

}  // namespace any4d::fuse
