// Device helpers of the ops: 16-byte accesses, conversions, asynchronous copies, ordered sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "dependent_launch.cuh"
#include "dtype.h"

namespace any4d {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks an SM for __launch_bounds__. Shared memory limits residency to `few` where an SM has only 100 KB of it (sm_86,
// 89 and 120): there is no point in saving registers for more.
constexpr int resident_blocks(int many, int few) {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
    return many < few ? many : few;
#else
    return few < many ? many : few;
#endif
}

template <typename T>
__device__ __forceinline__ float to_float(T x) {
    if constexpr (std::is_same_v<T, __half>) {
        return __half2float(x);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __bfloat162float(x);
    } else {
        return x;
    }
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(x);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(x);
    } else {
        return x;
    }
}

// One element of a tensor whose dtype is known at run time only: for the few numbers of a row.
__device__ __forceinline__ float load_value(const void* data, DType dtype, int64_t index) {
    switch (dtype) {
        case DType::kBFloat16:
            return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
        case DType::kFloat16:
            return to_float(static_cast<const __half*>(data)[index]);
        default:
            return static_cast<const float*>(data)[index];
    }
}

__device__ __forceinline__ void store_value(void* data, DType dtype, int64_t index, float value) {
    switch (dtype) {
        case DType::kBFloat16:
            static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value);
            break;
        case DType::kFloat16:
            static_cast<__half*>(data)[index] = from_float<__half>(value);
            break;
        default:
            static_cast<float*>(data)[index] = value;
    }
}

// --- vector access ---

template <int BYTES>
struct Vector;
template <>
struct Vector<16> {
    using type = uint4;
};
template <>
struct Vector<8> {
    using type = uint2;
};
template <>
struct Vector<4> {
    using type = uint32_t;
};
template <>
struct Vector<2> {
    using type = uint16_t;
};

// The widest vector that divides `bytes`.
constexpr int widest(int bytes) { return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2; }

// N elements of T, N * sizeof(T) a multiple of 4, as 32-bit words.
template <typename T, int N>
struct alignas(widest(N * sizeof(T))) Pack {
    static_assert(N * sizeof(T) % 4 == 0, "a pack is made of 32-bit words");
    static constexpr int kWidth = widest(N * sizeof(T));
    using Part = typename Vector<kWidth>::type;

    uint32_t words[N * sizeof(T) / 4];

    __device__ __forceinline__ void load(const void* source) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(N * sizeof(T)) / kWidth; ++i) {
            reinterpret_cast<Part*>(words)[i] = static_cast<const Part*>(source)[i];
        }
    }

    __device__ __forceinline__ void store(void* target) const {
#pragma unroll
        for (int i = 0; i < static_cast<int>(N * sizeof(T)) / kWidth; ++i) {
            static_cast<Part*>(target)[i] = reinterpret_cast<const Part*>(words)[i];
        }
    }

    __device__ __forceinline__ float get(int i) const {
        if constexpr (std::is_same_v<T, float>) {
            return __uint_as_float(words[i]);
        } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        } else {
            const uint16_t bits = static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu);
            return __half2float(__ushort_as_half(bits));
        }
    }

    __device__ __forceinline__ void set(const float (&values)[N]) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(N * sizeof(T)) / 4; ++i) {
            if constexpr (std::is_same_v<T, float>) {
                words[i] = __float_as_uint(values[i]);
            } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
                const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
                words[i] = *reinterpret_cast<const uint32_t*>(&pair);
            } else {
                const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
                words[i] = *reinterpret_cast<const uint32_t*>(&pair);
            }
        }
    }
};

// --- asynchronous copies, global to shared memory, without a detour through registers ---

// WIDTH bytes, both addresses aligned to WIDTH; zeros, and no read, when not `inside`.
template <int WIDTH>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
    const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = inside ? WIDTH : 0;
    if constexpr (WIDTH == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(WIDTH), "r"(bytes)
                     : "memory");
    }
}

// This warp's asynchronous copies have arrived and all its lanes see them.
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
}

// --- sums in a fixed order ---

// One step of warp_sums16: a lane keeps HALF of its values, each added to the value of the lane it exchanges with.
template <int HALF>
__device__ __forceinline__ void exchange_halves(float (&values)[16], int lane) {
    const bool upper = lane & (2 * HALF);
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const float sent = upper ? values[i] : values[i + HALF];
        const float kept = upper ? values[i + HALF] : values[i];
        values[i] = kept + __shfl_xor_sync(kAllLanes, sent, 2 * HALF);
    }
}

// Sums 16 values over the warp: lane l returns the sum of values[l / 2]. Each step halves the values a lane holds and
// doubles the lanes that each stands for: 16 shuffles instead of 80.
__device__ __forceinline__ float warp_sums16(float (&values)[16], int lane) {
    exchange_halves<8>(values, lane);
    exchange_halves<4>(values, lane);
    exchange_halves<2>(values, lane);
    exchange_halves<1>(values, lane);
    return values[0] + __shfl_xor_sync(kAllLanes, values[0], 1);
}

constexpr int kSums = 16;            // columns of partial sums
constexpr int kFinishThreads = 256;  // of a block that adds a row's partial sums
constexpr int kFinishGroups = kFinishThreads / kSums;

// Adds `chunks` rows of 16 float32 partial sums in float64, in an order that depends on `chunks` alone. A block of
// kFinishThreads calls it; the sums are in totals[0..15] for all its threads afterwards.
__device__ __forceinline__ void block_sums16(const float* partials, int chunks, double (&totals)[kFinishThreads]) {
    const int column = threadIdx.x % kSums;
    double total = 0;
#pragma unroll 8
    for (int chunk = threadIdx.x / kSums; chunk < chunks; chunk += kFinishGroups) {
        total += __ldcg(partials + int64_t{chunk} * kSums + column);
    }
    totals[threadIdx.x] = total;
    __syncthreads();
#pragma unroll
    for (int groups = kFinishGroups / 2; groups > 0; groups /= 2) {
        if (threadIdx.x < groups * kSums) totals[threadIdx.x] += totals[threadIdx.x + groups * kSums];
        __syncthreads();
    }
}

// Dynamic shared memory of a kernel: above 48 KB it must be asked for; the rest of the L1 is of no use to these kernels.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, int bytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                   cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess || bytes <= 48 * 1024) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Calls f with a value of the element type that `dtype` names.
template <typename F>
cudaError_t with_float_type(DType dtype, F&& f) {
    switch (dtype) {
        case DType::kFloat32:
            return f(float{});
        case DType::kBFloat16:
            return f(__nv_bfloat16{});
        case DType::kFloat16:
            return f(__half{});
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace any4d
