// Maps of the copy engine over packed rows: what it needs to find any block of rows of any (segment, head).
// Host code; the driver's encoder is looked up through the runtime, so nothing links against libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "dtype.h"

namespace any4d {

// Segments of one buffer of rows, as `Segments.as_list` has them: segment (g, i) starts at row
// start + g * group_stride + i * stride.
struct SegmentLayout {
    int64_t start, length, count, stride, groups, group_stride;

    int64_t total() const { return count * groups; }
};

namespace detail {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
        const bool usable = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
        return usable ? reinterpret_cast<EncodeTiled>(found) : nullptr;
    }();
    return function;
}

}  // namespace detail

// A map of coordinates (channel, row of the segment, head, segment of the group, group) over 16-bit rows at `base` with
// `head_dim` channels a head. Its box is 64 channels of `box_rows` rows (at most 256) of one head; what lies beyond a
// segment's length reads as zero and is not written. Addresses and byte strides must be multiples of 16, strides below
// 2^40. `swizzle128` exchanges 16-byte chunks: chunk c of row r lies at c ^ (r % 8), as wgmma reads operands.
inline cudaError_t make_segment_map(CUtensorMap* map, const void* base, DType dtype, int head_dim,
                                    int64_t row_stride_bytes, int64_t head_stride_bytes, int64_t heads,
                                    const SegmentLayout& segments, int box_rows, bool swizzle128 = true) {
    const detail::EncodeTiled encode = detail::encode_tiled();
    if (encode == nullptr) return cudaErrorNotSupported;
    if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) return cudaErrorInvalidValue;
    // A lone segment's stride means nothing, but the engine wants every stride to be one that could be.
    const int64_t count_stride = std::max(segments.stride, segments.length) * row_stride_bytes;
    const int64_t group_stride = std::max(segments.group_stride, segments.length) * row_stride_bytes;
    const cuuint64_t sizes[5] = {cuuint64_t(head_dim), cuuint64_t(segments.length), cuuint64_t(heads),
                                 cuuint64_t(segments.count), cuuint64_t(segments.groups)};
    const cuuint64_t strides[4] = {cuuint64_t(row_stride_bytes), cuuint64_t(head_stride_bytes),
                                   cuuint64_t(count_stride), cuuint64_t(group_stride)};
    const cuuint32_t box[5] = {64, cuuint32_t(box_rows), 1, 1, 1};
    const cuuint32_t every[5] = {1, 1, 1, 1, 1};
    char* first = static_cast<char*>(const_cast<void*>(base)) + segments.start * row_stride_bytes;
    const CUresult result = encode(
        map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5, first,
        sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace any4d
