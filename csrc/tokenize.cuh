// What both tokenize kernels share: the packed weight, the gather of pixels into shared memory, the end of a row.
//
// A patch is 42 runs of 14 neighbouring values. Planar images: run (channel, row), so k = (channel, row, column), the
// weight's own order. Interleaved images (channels last): a row's 42 values are three runs, k = (row, column,
// channel), and the weight is packed in that order. Four runs are 56 values, 7 vectors of 8 values after rounding to
// 16 bits: a `group`, the unit of the gather. The eleventh group is two runs and 4 zeros.
//
// Operands lie in shared memory as [vector of 8 values along k][row][8]: 8 rows of one vector are 128 contiguous
// bytes, a core matrix for wgmma (no swizzle) and for ldmatrix, read without bank conflicts; 32 lanes that each write
// one vector of neighbouring rows write 512 contiguous bytes.
#pragma once

#include "common.cuh"
#include "tokenize.h"

namespace any4d::patches {

constexpr int kSteps = kChunks / 2;  // of 16 values
constexpr int kRuns = 3 * kPatch;
constexpr int kGroupRuns = 4;
constexpr int kGroupChunks = 7;
constexpr int kGroups = (kRuns + kGroupRuns - 1) / kGroupRuns;
constexpr int kLastChunks = kChunks - (kGroups - 1) * kGroupChunks;

// How pixels are read: bytes in words, planar or interleaved, or values of any type (in words where `words`).
enum Access { kBytesPlanar, kBytesInterleaved, kValues };

struct Pixels {
    const void* data;
    DType dtype;
    bool words;
    int grid_w;
    int64_t stride_n, stride_c, stride_h, stride_w;
    float scale[3], shift[3];
};

// The products' side of a call, after the weight was packed.
struct Products {
    Pixels pixels;
    const char* weight;    // blocks of [kChunks][kColumns][8]
    const float* bias;     // [blocks * kColumns]
    const float* pos;      // [T, pos_pitch], pos_pitch at least blocks * kColumns
    void* out;             // [images, extra + T, C]
    DType out_dtype;
    int64_t images;
    int tokens, extra, channels, blocks, pos_pitch;
};

__device__ __forceinline__ const char* corner_of(const Pixels& p, int size, int64_t image, int token) {
    const int row = token / p.grid_w;
    const int column = token - row * p.grid_w;
    const int64_t offset = image * p.stride_n + row * (kPatch * p.stride_h) + column * (kPatch * p.stride_w);
    return static_cast<const char*>(p.data) + offset * size;
}

template <typename T>
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
    Pack<T, 2> pack;
    const float values[2] = {first, second};
    pack.set(values);
    return pack.words[0];
}

// One lane's group of one patch: `start` sends for the pixels, `finish` writes them, normalised and rounded to T.
template <typename T, Access ACCESS>
class Group {
  public:
    __device__ __forceinline__ void start(const Pixels& p, int64_t image, int token, int group) {
        group_ = group;
        corner_ = corner_of(p, size_of(p.dtype), image, token);
        if constexpr (ACCESS != kValues) {
            shifted_ = 0;
#pragma unroll
            for (int i = 0; i < kGroupRuns; ++i) {
                const int run = group * kGroupRuns + i;
                if (run < kRuns) {
                    const uintptr_t address = reinterpret_cast<uintptr_t>(corner_ + offset_of(p, run));
                    const uint32_t* words = reinterpret_cast<const uint32_t*>(address & ~uintptr_t{3});
                    shifted_ |= static_cast<uint32_t>(address >> 1 & 1) << i;
#pragma unroll
                    for (int j = 0; j < 4; ++j) words_[4 * i + j] = __ldg(words + j);
                }
            }
        }
    }

    // `target`: vector 0 of this lane's row; vectors are `pitch` bytes apart.
    __device__ __forceinline__ void finish(const Pixels& p, char* target, int pitch) const {
        uint32_t pairs[kGroupRuns][kPatch / 2];
#pragma unroll
        for (int i = 0; i < kGroupRuns; ++i) {
            const int run = group_ * kGroupRuns + i;
            uint32_t(&row)[kPatch / 2] = pairs[i];
            if (run >= kRuns) {
#pragma unroll
                for (int j = 0; j < kPatch / 2; ++j) row[j] = 0;
            } else if constexpr (ACCESS == kBytesPlanar) {
                from_bytes<false>(p, i, run, row);
            } else if constexpr (ACCESS == kBytesInterleaved) {
                from_bytes<true>(p, i, run, row);
            } else {
                from_values(p, run, row);
            }
        }
        char* to = target + group_ * kGroupChunks * pitch;
#pragma unroll
        for (int c = 0; c < kGroupChunks; ++c) {
            if (c < kLastChunks || group_ < kGroups - 1) {
                uint32_t words[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) words[j] = pairs[(4 * c + j) / (kPatch / 2)][(4 * c + j) % (kPatch / 2)];
                *reinterpret_cast<uint4*>(to + c * pitch) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }

  private:
    __device__ static __forceinline__ int size_of(DType dtype) {
        if constexpr (ACCESS != kValues) return 1;
        return dtype == DType::kFloat32 ? 4 : dtype == DType::kUInt8 ? 1 : 2;
    }

    // Elements from a patch's corner to the first value of a run.
    __device__ static __forceinline__ int64_t offset_of(const Pixels& p, int run) {
        if constexpr (ACCESS == kBytesInterleaved) {
            const int row = run / 3;
            return row * p.stride_h + (run - 3 * row) * kPatch;
        }
        const int channel = run / kPatch;
        return channel * p.stride_c + (run - channel * kPatch) * p.stride_h;
    }

    __device__ static __forceinline__ float of_channel(const float (&values)[3], int channel) {
        return channel == 0 ? values[0] : channel == 1 ? values[1] : values[2];
    }

    template <bool INTERLEAVED>
    __device__ __forceinline__ void from_bytes(const Pixels& p, int i, int run, uint32_t (&row)[kPatch / 2]) const {
        const uint32_t selector = shifted_ >> i & 1 ? 0x5432 : 0x3210;
        // Interleaved: 56 values a group, so that value 0 of a group belongs to channel 2 * group % 3.
        const int first = INTERLEAVED ? (2 * group_) % 3 : run / kPatch;
        float scale[3], shift[3];
#pragma unroll
        for (int c = 0; c < (INTERLEAVED ? 3 : 1); ++c) {
            const int channel = first + c >= 3 ? first + c - 3 : first + c;
            scale[c] = of_channel(p.scale, channel);
            shift[c] = of_channel(p.shift, channel);
        }
        float values[kPatch];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t next = j < 3 ? words_[4 * i + j + 1] : 0;
            const uint32_t bytes = __byte_perm(words_[4 * i + j], next, selector);
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                const int e = 4 * j + b;
                if (e < kPatch) {
                    const int c = INTERLEAVED ? (i * kPatch + e) % 3 : 0;
                    values[e] = fmaf(static_cast<float>(bytes >> (8 * b) & 0xff), scale[c], shift[c]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < kPatch / 2; ++j) row[j] = pair_of<T>(values[2 * j], values[2 * j + 1]);
    }

    __device__ __forceinline__ void from_values(const Pixels& p, int run, uint32_t (&row)[kPatch / 2]) const {
        const float scale = of_channel(p.scale, run / kPatch);
        const float shift = of_channel(p.shift, run / kPatch);
        const int64_t offset = offset_of(p, run);
        if (p.words && p.dtype == DType::kFloat32) {
            const float2* pairs = reinterpret_cast<const float2*>(corner_ + offset * 4);
#pragma unroll
            for (int j = 0; j < kPatch / 2; ++j) {
                const float2 pair = __ldg(pairs + j);
                row[j] = pair_of<T>(fmaf(pair.x, scale, shift), fmaf(pair.y, scale, shift));
            }
        } else if (p.words) {
            const uint32_t* pairs = reinterpret_cast<const uint32_t*>(corner_ + offset * 2);
            const bool half = p.dtype == DType::kFloat16;
#pragma unroll
            for (int j = 0; j < kPatch / 2; ++j) {
                Pack<__half, 2> a;
                Pack<__nv_bfloat16, 2> b;
                a.words[0] = b.words[0] = __ldg(pairs + j);
                const float first = half ? a.get(0) : b.get(0);
                const float second = half ? a.get(1) : b.get(1);
                row[j] = pair_of<T>(fmaf(first, scale, shift), fmaf(second, scale, shift));
            }
        } else {
#pragma unroll 1
            for (int j = 0; j < kPatch / 2; ++j) {
                const float first = one_value(p, offset + 2 * j * p.stride_w);
                const float second = one_value(p, offset + (2 * j + 1) * p.stride_w);
                const uint32_t pair = pair_of<T>(fmaf(first, scale, shift), fmaf(second, scale, shift));
                // A run-time index would move the registers to memory.
#pragma unroll
                for (int k = 0; k < kPatch / 2; ++k) row[k] = k == j ? pair : row[k];
            }
        }
    }

    __device__ __forceinline__ float one_value(const Pixels& p, int64_t offset) const {
        if (p.dtype == DType::kUInt8) return __ldg(reinterpret_cast<const uint8_t*>(corner_) + offset);
        return load_value(corner_, p.dtype, offset);
    }

    const char* corner_;
    int group_;
    uint32_t shifted_;    // bit i: run i starts in the middle of its first word
    uint32_t words_[16];  // four words a run, for bytes
};

// Two neighbouring products of 8 columns hold (first, second) and (third, fourth) in lane q of a quad, columns 2 q and
// 2 q + 1 of each. After lanes have exchanged, each has four neighbouring columns, column_of(lane) the first.
__device__ __forceinline__ float4 four_columns(float first, float second, float third, float fourth, int lane) {
    const bool odd = lane & 1;
    const float a = __shfl_xor_sync(kAllLanes, odd ? first : third, 1);
    const float b = __shfl_xor_sync(kAllLanes, odd ? second : fourth, 1);
    return odd ? make_float4(a, b, third, fourth) : make_float4(first, second, a, b);
}

__device__ __forceinline__ int column_of(int lane) { return 8 * (lane & 1) + 4 * (lane >> 1 & 1); }

// What sums start from: bias and position of two neighbouring channels. Both rows are padded to whole blocks of
// channels, so that nothing is masked and all loads of a tile can be under way at once; plain loads, because the
// packing kernel may write both while this one is being started.
__device__ __forceinline__ float2 first_sums(const float* bias, const float* pos, int column) {
    const float2 a = *reinterpret_cast<const float2*>(bias + column);
    const float2 b = *reinterpret_cast<const float2*>(pos + column);
    return make_float2(a.x + b.x, a.y + b.y);
}

__device__ __forceinline__ void store_four(void* out, DType dtype, int64_t offset, float4 v) {
    if (dtype == DType::kFloat32) {
        *reinterpret_cast<float4*>(static_cast<float*>(out) + offset) = v;
    } else {
        const bool half = dtype == DType::kFloat16;
        const uint2 words = half ? make_uint2(pair_of<__half>(v.x, v.y), pair_of<__half>(v.z, v.w))
                                 : make_uint2(pair_of<__nv_bfloat16>(v.x, v.y), pair_of<__nv_bfloat16>(v.z, v.w));
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out) + offset) = words;
    }
}

// Launches `kernel(args)` so that it may start before the packing kernel has ended, where the architecture can.
template <typename Args>
cudaError_t launch_after_packing(void (*kernel)(Args), dim3 grid, int threads, int shared, int cluster,
                                 const Args& args, cudaStream_t stream) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    }
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute list[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = list;
    if (attributes.binaryVersion >= 90) {
        list[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        list[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        list[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        list[config.numAttrs].val.clusterDim.x = cluster;
        list[config.numAttrs].val.clusterDim.y = list[config.numAttrs].val.clusterDim.z = 1;
        ++config.numAttrs;
    }
    return cudaLaunchKernelEx(&config, kernel, args);
}

// The products on sm_90 (tokenize_sm90.cu); `sm` multiprocessors.
cudaError_t launch_sm90(const Products& products, DType weight, Access access, int sm, cudaStream_t stream);

}  // namespace any4d::patches
