// Tiles of attention's forward that several blocks of threads share: their parts, summed; and what becomes of a sum.
#pragma once

#include "attention_sm90_schedule.cuh"
#include "hopper.cuh"
#include "softmax_sm90.cuh"

namespace any4d::forward {

using namespace hopper;

constexpr int kStoreBarrier = 5;  // named barriers, one a warpgroup

// Stores a part of a split tile. The warpgroup that stores the last one gets the whole back: true. Parts are summed in
// the order of their keys, whoever sums, so that results repeat bit for bit.
template <int GROUPS>
__device__ bool merge(float (&acc)[kHeadDim / 2], Softmax& softmax, int* done, int tile, int member, const Work& work) {
    const int split = tile - work.whole;
    const int barrier = kStoreBarrier + member;
    float* part = part_of<GROUPS>(work, blockIdx.x, split, member);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) part[i * kWarpgroup] = acc[i];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        part[(kHeadDim / 2 + half) * kWarpgroup] = softmax.sum[half];
        part[(kHeadDim / 2 + 2 + half) * kWarpgroup] = softmax.reference[half];
    }
    __threadfence();
    named_sync(barrier, kWarpgroup);
    if (threadIdx.x % kWarpgroup == 0) *done = atomicAdd(work.arrived + split * GROUPS + member, 1);
    named_sync(barrier, kWarpgroup);
    const int unit = split * work.blocks;
    const int begin = Schedule::owner(work, unit), end = Schedule::owner(work, unit + work.blocks - 1) + 1;
    if (*done != end - begin - 1) return false;
    __threadfence();

    for (int block = begin; block < end; ++block) {
        const float* other = part_of<GROUPS>(work, block, split, member) + (kHeadDim / 2 + 2) * kWarpgroup;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            softmax.reference[half] = fmaxf(softmax.reference[half], __ldcg(other + half * kWarpgroup));
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) acc[i] = 0.f;
    softmax.sum[0] = softmax.sum[1] = 0.f;
    for (int block = begin; block < end; ++block) {
        const float* other = part_of<GROUPS>(work, block, split, member);
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float reference = __ldcg(other + (kHeadDim / 2 + 2 + half) * kWarpgroup);
            factor[half] = exp2_unit(reference - softmax.reference[half]);
            softmax.sum[half] += factor[half] * __ldcg(other + (kHeadDim / 2 + half) * kWarpgroup);
        }
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) acc[i] += factor[i / 2 % 2] * __ldcg(other + i * kWarpgroup);
    }
    return true;
}

template <typename T>
__device__ void write_out(T* staging, const float (&acc)[kHeadDim / 2], Softmax& softmax, const CUtensorMap& map,
                          const Task& task, int member, const Work& work) {
    const int thread = threadIdx.x % kWarpgroup, barrier = kStoreBarrier + member;
    float inverse[2];
    softmax.inverse(inverse);
    if (thread == 0) bulk_wait_read<0>();  // the last tile's store has read the staging buffer
    named_sync(barrier, kWarpgroup);
    const int local = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = local + 8 * half;
            const uint32_t pair = round_pair<T>(acc[4 * j + 2 * half] * inverse[half],
                                                acc[4 * j + 2 * half + 1] * inverse[half]);
            // The copy engine's 128-byte swizzle: chunk j of 16 bytes lies at j ^ (row % 8).
            reinterpret_cast<uint32_t*>(staging)[at * (kHeadDim / 2) + ((j ^ (at % 8)) * 4) + thread % 4] = pair;
        }
    }
    fence_shared_for_async();
    named_sync(barrier, kWarpgroup);
    if (thread == 0) {
        store_5d(&map, staging, 0, task.row + member * kQueries, task.head, task.member, task.group);
        bulk_commit();
    }
    if (thread % 4 == 0) {
        const int row = member * kQueries + local;
        float* lse = work.lse + task.lse + row;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (row + 8 * half < task.rows) lse[8 * half] = softmax.log_sum(half);
    }
}

// Output and log-sum-exp of rows in no segment, by the warps of the copying warpgroup that do not copy.
template <typename T>
__device__ void zero_gaps(const Work& work) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 1;
    const SegmentLayout& segments = work.segments;
    const int bytes = work.heads * kHeadDim * int(sizeof(T));
    for (int64_t base = (int64_t(blockIdx.x) * 3 + warp) * 32; base < work.rows; base += int64_t(gridDim.x) * 3 * 32) {
        const int64_t at = base + lane - segments.start;
        const int64_t group = segments.groups > 1 ? min(at / segments.group_stride, segments.groups - 1) : 0;
        const int64_t inside = at - group * segments.group_stride * (segments.groups > 1);
        const int64_t member = segments.count > 1 ? min(inside / segments.stride, segments.count - 1) : 0;
        const bool covered = at >= 0 && inside - member * segments.stride * (segments.count > 1) < segments.length;
        unsigned open = __ballot_sync(0xffffffff, !covered && base + lane < work.rows);
        for (; open; open &= open - 1) {
            const int64_t row = base + __ffs(open) - 1;
            uint4* out = reinterpret_cast<uint4*>(static_cast<char*>(work.out) + row * bytes);
            for (int i = lane; i < bytes / 16; i += 32) out[i] = uint4{};
            for (int head = lane; head < work.heads; head += 32) work.lse[head * work.rows + row] = 0.f;
        }
    }
}

}  // namespace any4d::forward
