// 8-bit attention forward over short segments, in one kernel: csrc/notes/attention_fp8.md has the count.
//
// A block of threads is one rounding warpgroup, which turns keys and values of whole segments into e4m3 in shared memory,
// and three computing ones, which round their queries in registers. A segment's blocks stay until its last tile is done,
// and the next one's move into the slots that become free, so that nothing but the first segment is waited for.
#include <algorithm>

#include "attention_fp8_sm90_short.cuh"
#include "attention_fp8_sm90_short_round.cuh"
#include "attention_fp8_sm90_softmax.cuh"

namespace any4d::fp8::brief {
namespace {

// Where a tile of 64 queries is, and this thread's rows in it: worked out when wanted, since registers are few.
struct Tile {
    int pair;
    int row;  // of the segment; the other one is 8 below

    __device__ __forceinline__ Tile(const Work& work, int index) {
        if (Range(work).mirrored) index = work.pairs * work.tiles - 1 - index;
        pair = work.by_tiles.quotient(index);
        row = (index - pair * work.tiles) * kQueries + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
    }
};

// A thread's 16 channels 16 t to 16 t + 15 of two queries, t its place in the quad: they are its registers of A.
template <typename T>
struct Queries {
    Pack<T, 8> raw[2][2];  // [row][channel / 8]
    uint32_t a[8];
    float factor[2];  // of the scores, log2 units

    // Zeros where there is no row, and everywhere unless there is a tile: nothing of the last one is kept.
    __device__ __forceinline__ void load(const Work& work, int index, bool there) {
        const Tile tile(work, index);
        const Place place(work, tile.pair);
        const int row = tile.row;
        const T* from = static_cast<const T*>(work.q) + (place.first_row(work) + row) * work.row_stride +
                        place.head * work.head_stride + threadIdx.x % 4 * kChannels;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                raw[half][s] = Pack<T, 8>{};
                if (there && row + 8 * half < work.length) raw[half][s].load(from + 8 * half * work.row_stride + 8 * s);
            }
        }
    }

    __device__ __forceinline__ void round(float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t most = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) most = larger_magnitudes<T>(most, raw[half][i / 4].words[i % 4]);
            const Scale own = scale_of(quad_max(larger_of_pair<T>(most)));
            factor[half] = own.value * scale * 1.4426950409f;
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                const Pack<T, 8>& from = raw[half][word / 2];
                const int c = 4 * (word % 2);
                a[2 * word + half] = round_four(from.get(c) * own.inverse, from.get(c + 1) * own.inverse,
                                                from.get(c + 2) * own.inverse, from.get(c + 3) * own.inverse);
            }
        }
    }

    // What the subtracted mean key takes from the rows' scores, to `offset` of the tile's rows.
    __device__ __forceinline__ void offsets(float* offset, const float* mean, float scale) const {
        float found[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < kChannels; i += 4) {
            const float4 m = *reinterpret_cast<const float4*>(mean + threadIdx.x % 4 * kChannels + i);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Pack<T, 8>& own = raw[half][i / 8];
                found[half] = fmaf(own.get(i % 8), m.x, found[half]);
                found[half] = fmaf(own.get(i % 8 + 1), m.y, found[half]);
                found[half] = fmaf(own.get(i % 8 + 2), m.z, found[half]);
                found[half] = fmaf(own.get(i % 8 + 3), m.w, found[half]);
            }
        }
        const int local = threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
        found[0] = quad_sum(found[0]) * scale;
        found[1] = quad_sum(found[1]) * scale;
        if (threadIdx.x % 4 == 0) {
            offset[local] = found[0];
            offset[local + 8] = found[1];
        }
    }
};

// Of a quad's four lanes with four words each, lane t gets the words t of all.
__device__ __forceinline__ void transpose_quad(uint32_t* words) {
    const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
    const auto exchange = [](uint32_t& a, uint32_t& b, bool swapped, int distance) {
        const uint32_t received = __shfl_xor_sync(kAllLanes, swapped ? a : b, distance);
        (swapped ? a : b) = received;
    };
    exchange(words[0], words[2], upper, 2);
    exchange(words[1], words[3], upper, 2);
    exchange(words[0], words[1], odd, 1);
    exchange(words[2], words[3], odd, 1);
}

template <typename T>
__device__ __forceinline__ void write_out(const Total& total, const Softmax& softmax, const float* offset, int index,
                                          const Work& work) {
    const Tile tile(work, index);
    const Place place(work, tile.pair);
    const int t = threadIdx.x % 4;
    const int64_t row = place.first_row(work) + tile.row;
    uint4* const out = static_cast<uint4*>(work.out) + (row * work.heads + place.head) * (kHeadDim / 8) + t;
    float* const lse = work.lse + place.head * work.rows + row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = __shfl_sync(kAllLanes, total.sum[half], threadIdx.x % 32 / 4 * 4);
        const float factor = total.value_scale / sum;
        uint32_t words[8];
#pragma unroll
        for (int j = 0; j < 8; ++j)
            words[j] = round_pair<T>(total.acc[4 * j + 2 * half] * factor, total.acc[4 * j + 2 * half + 1] * factor);
        transpose_quad(words);
        transpose_quad(words + 4);
        if (tile.row + 8 * half >= work.length) continue;
        uint4* const own = out + int64_t(8 * half) * work.heads * (kHeadDim / 8);
        own[0] = {words[0], words[1], words[2], words[3]};
        own[4] = {words[4], words[5], words[6], words[7]};
        if (t == 0) lse[8 * half] = softmax.log_sum(half, sum) + offset[tile.row % kQueries + 8 * half];
    }
}

// All lanes give a slot back, since all have read its scales.
__device__ __forceinline__ void release(Shared& shared, const Ring<kSlots>& ring) {
    barrier_arrive(&shared.empty[ring.stage]);
}

// One tile against a pair's blocks of keys. When it is the warpgroup's last of the pair, slots are released. `load_next`
// runs under the last product.
template <typename T, int LINEAR, typename Load>
__device__ __forceinline__ void attend(Total& total, Softmax& softmax, float* offset, Queries<T>& queries,
                                       Shared& shared, Ring<kSlots>& ring, const Work& work, bool last,
                                       Load load_next) {
    float scores[kKeys / 2], part[kSums / 2], scale[2];
    uint32_t p[kKeys / 8];
    queries.round(work.scale);
    const Content* slot = &shared.slot[ring.stage].content;
    barrier_wait(&shared.full[ring.stage], ring.parity);
    mma_fence();
    issue_scores(scores, queries.a, slot->block.k);
    queries.offsets(offset, slot->mean, work.scale);
    for (int j = 1; j < work.blocks; ++j) {
        scale_scores(scale, queries.factor, slot->block.key_scale);
        mma_wait<0>();
        pin(scores);
        softmax.template probabilities<LINEAR>(p, scores, scale);
        pin(p);
        mma_fence();
        issue_output(part, p, slot->block.v);
        const Ring<kSlots> done = ring;
        const float2 value = {slot->block.value_scale, slot->block.value_inverse};
        ring.advance();
        slot = &shared.slot[ring.stage].content;
        barrier_wait(&shared.full[ring.stage], ring.parity);
        mma_wait<0>();
        pin(part);
        pin(p);
        total.add(part, softmax.factor, value.x, value.y);
        if (last) release(shared, done);
        mma_fence();
        issue_scores(scores, queries.a, slot->block.k);
    }
    scale_scores(scale, queries.factor, slot->block.key_scale);
    mma_wait<0>();
    pin(scores);
    pin(queries.a);
    const int valid = work.length - (work.blocks - 1) * kKeys;
    if (valid < kKeys) mask_columns(scores, valid);
    softmax.template probabilities<LINEAR>(p, scores, scale);
    pin(p);
    mma_fence();
    issue_output(part, p, slot->block.v);
    const float2 value = {slot->block.value_scale, slot->block.value_inverse};
    load_next();
    mma_wait<0>();
    pin(part);
    pin(p);
    if (last) release(shared, ring);
    ring.advance();
    total.add(part, softmax.factor, value.x, value.y);
}

// A pair without a tile of this warpgroup. Its slots must have been filled before they are given back: a barrier counts
// arrivals, not who arrives.
__device__ void pass(Shared& shared, Ring<kSlots>& ring, int blocks) {
    for (int j = 0; j < blocks; ++j) {
        barrier_wait(&shared.full[ring.stage], ring.parity);
        release(shared, ring);
        ring.advance();
    }
}

template <typename T, int LINEAR>
__device__ void compute(Shared& shared, const Work& work, int member) {
    const Range range(work);
    Ring<kSlots> first;  // slot of the first block of pair `pair`
    int pair = work.by_tiles.quotient(range.begin);
    Queries<T> queries;
    int index = range.begin + member;
    queries.load(work, index, index < range.end);
    for (; index < range.end; index += kGroups) {
        const int own = work.by_tiles.quotient(index);
        for (; pair < own; ++pair) pass(shared, first, work.blocks);
        const bool last = index + kGroups >= min(range.end, (pair + 1) * work.tiles);
        Ring<kSlots> ring = first;
        Total total;
        Softmax softmax;
        attend<T, LINEAR>(total, softmax, shared.offset[member], queries, shared, ring, work, last,
                          [&] { queries.load(work, index + kGroups, index + kGroups < range.end); });
        if (last) {
            first = ring;
            ++pair;
        }
        write_out<T>(total, softmax, shared.offset[member], index, work);
    }
    for (const int end = work.by_tiles.quotient(range.end - 1); pair <= end; ++pair) pass(shared, first, work.blocks);
}

template <typename T, int LINEAR>
__global__ void __launch_bounds__((kGroups + 1) * kWarpgroup, 1)
    attention_fp8_short_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Work work) {
    extern __shared__ uint8_t raw[];
    // Not by way of an integer: the compiler would forget that this is shared memory.
    auto& shared = *reinterpret_cast<Shared*>(raw + (-smem_address(raw) & 1023));
    for (int i = threadIdx.x; i < kSlots * (kKeys / 4); i += blockDim.x)
        shared.slot[i / (kKeys / 4)].content.block.ones[i % (kKeys / 4)] = kOnes;
    fence_shared_for_async();
    if (threadIdx.x == 0) {
        for (int s = 0; s < kSlots; ++s) {
            barrier_init(&shared.full[s], kWarpgroup);
            barrier_init(&shared.empty[s], kGroups * kWarpgroup);
        }
        for (int s = 0; s < 2; ++s) barrier_init(&shared.loaded[s], 1);
        fence_barrier_init();
    }
    __syncthreads();
    wait_for_previous_kernel();
    // From one lane for all: known to be the warp's, not a thread's. Registers: 65,536 of a multiprocessor.
    const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
    if (warpgroup == 0) {
        give_registers<80>();
        round_all<T>(shared, maps, work);
    } else {
        take_registers<144>();
        compute<T, LINEAR>(shared, work, warpgroup - 1);
    }
}

template <typename T, int LINEAR>
cudaError_t launch(const Maps& maps, const Work& work, int grid, cudaStream_t stream) {
    return launch_dependent_sm90(attention_fp8_short_kernel<T, LINEAR>, grid, (kGroups + 1) * kWarpgroup, kSharedBytes,
                                 stream, maps, work);
}

// Without turns for the warpgroups: what is left of a variant is the share of linear runs.
template <typename T>
cudaError_t launch_variant(int variant, const Maps& maps, const Work& work, int grid, cudaStream_t stream) {
    switch (variant) {
        case 0: return launch<T, 8>(maps, work, grid, stream);
        case 1:
        case 3: return launch<T, 4>(maps, work, grid, stream);
        case 2: return launch<T, 0>(maps, work, grid, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace any4d::fp8::brief

namespace any4d::fp8 {

cudaError_t attention_short(const AttentionForward& call, cudaStream_t stream) {
    const SegmentLayout& segments = call.segments;
    brief::Maps maps;
    const auto map = [&](CUtensorMap* to, const void* base) {
        return make_segment_map(to, base, call.dtype, kHeadDim, call.row_stride * 2, call.head_stride * 2, call.heads,
                                segments, kKeys);
    };
    if (cudaError_t error = map(&maps.k, call.k)) return error;
    if (cudaError_t error = map(&maps.v, call.v)) return error;
    const int length = int(segments.length);
    const int tiles = (length + kQueries - 1) / kQueries, blocks = (length + kKeys - 1) / kKeys;
    int device = 0, multiprocessors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    const int total = int(tiles * call.heads * segments.total()), grid = std::min(total, multiprocessors);
    const brief::Work work{call.q,
                           call.k,
                           call.out,
                           call.lse,
                           call.row_stride,
                           call.head_stride,
                           call.rows,
                           segments,
                           call.heads,
                           length,
                           int(segments.count),
                           int(call.heads * segments.total()),
                           tiles,
                           blocks,
                           total / grid,
                           total % grid,
                           brief::Divisor(tiles),
                           brief::Divisor(call.heads),
                           brief::Divisor(int(segments.count)),
                           brief::Divisor(blocks),
                           call.scale,
                           segments.total() * segments.length < call.rows};
    return call.dtype == DType::kFloat16
               ? brief::launch_variant<__half>(call.variant, maps, work, grid, stream)
               : brief::launch_variant<__nv_bfloat16>(call.variant, maps, work, grid, stream);
}

}  // namespace any4d::fp8
