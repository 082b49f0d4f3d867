// Which blocks of threads compute which keys of which queries, and sums of what several of them made of one tile.
#pragma once

#include "attention_fp8_sm90.cuh"
#include "attention_fp8_sm90_softmax.cuh"
#include "attention_fp8_sm90_step.cuh"
#include "attention_tiling.cuh"
#include "hopper.cuh"

namespace any4d::fp8 {

using hopper::kWarpgroup;
using hopper::named_sync;
using namespace tiling;

constexpr int kStoreBarrier = 4;

struct Work {
    const KeyBlock* key_blocks;
    const QueryTile* query_tiles;
    const QueryRow* query_rows;
    float* lse;
    float* parts;  // of split tiles: [blocks of threads, 2, GROUPS, kPart, 128]
    int* arrived;  // parts of a split tile that are done: [split tiles, GROUPS]
    int64_t rows;
    SegmentLayout segments;
    int heads;
    int length;
    int count;
    int tiles;   // of queries in one (segment, head)
    int blocks;  // of keys in one (segment, head)
    int whole;   // tiles that one block of threads computes alone
    int split;   // tiles after them that are cut along their keys
};

using Schedule = tiling::ScheduleOf<Work>;

// Stores a part of a split tile. The warpgroup that stores the last one gets the whole back: true. Parts are summed in
// the order of their keys, whoever sums, so that results repeat bit for bit.
template <int GROUPS>
__device__ bool merge(Total& total, Softmax& softmax, int* done, int tile, int member, const Work& work) {
    const int split = tile - work.whole;
    const int barrier = kStoreBarrier + member;
    float* part = part_of<GROUPS>(work, blockIdx.x, split, member);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) part[i * kWarpgroup] = total.acc[i] * total.value_scale;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        part[(kHeadDim / 2 + half) * kWarpgroup] = total.sum[half];
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
            softmax.reference[half] = max_or_nan(softmax.reference[half], __ldcg(other + half * kWarpgroup));
    }
    total = Total();
    for (int block = begin; block < end; ++block) {
        const float* other = part_of<GROUPS>(work, block, split, member);
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float reference = __ldcg(other + (kHeadDim / 2 + 2 + half) * kWarpgroup);
            factor[half] = exp2_unit(reference - softmax.reference[half]);
            total.sum[half] += factor[half] * __ldcg(other + (kHeadDim / 2 + half) * kWarpgroup);
        }
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) total.acc[i] += factor[i / 2 % 2] * __ldcg(other + i * kWarpgroup);
    }
    return true;
}

}  // namespace any4d::fp8
