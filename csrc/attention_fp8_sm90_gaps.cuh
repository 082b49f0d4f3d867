// Rows of no segment: what the 8-bit attention writes there.
#pragma once

#include "attention_fp8_sm90.cuh"
#include "common.cuh"

namespace any4d::fp8 {

// Zeros to the output and log-sum-exp of rows in no segment, of rows `first`, `first` + `step` and so on. Whole warps call
// it, the lanes with neighbouring rows. CALL has out, lse, rows, heads and segments.
template <typename Call>
__device__ void zero_gaps(const Call& call, int64_t first, int64_t step) {
    const int lane = threadIdx.x % kWarp;
    const SegmentLayout& s = call.segments;
    const int bytes = call.heads * kHeadDim * 2;
    for (int64_t row = first; row - lane < call.rows; row += step) {
        const int64_t at = row - s.start;
        const int64_t group = s.groups > 1 ? min(at / s.group_stride, s.groups - 1) : 0;
        const int64_t inside = at - group * s.group_stride;
        const int64_t member = s.count > 1 ? min(inside / s.stride, s.count - 1) : 0;
        const bool covered = at >= 0 && inside - member * s.stride < s.length;
        unsigned open = __ballot_sync(kAllLanes, !covered && row < call.rows);
        for (; open; open &= open - 1) {
            const int64_t found = row - lane + __ffs(open) - 1;
            uint4* out = reinterpret_cast<uint4*>(static_cast<char*>(call.out) + found * bytes);
            for (int i = lane; i < bytes / 16; i += kWarp) out[i] = uint4{};
            for (int head = lane; head < call.heads; head += kWarp) call.lse[head * call.rows + found] = 0.f;
        }
    }
}

}  // namespace any4d::fp8
