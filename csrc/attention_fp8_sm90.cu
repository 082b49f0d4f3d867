// 8-bit attention forward for Hopper, head dim 64, of segments of more than 1,024 rows: csrc/notes/attention_fp8.md has
// the count and the measurements.
//
// A block of threads is one copying warp and GROUPS computing warpgroups of 64 queries each, persistent over tiles of
// 64 * GROUPS queries of one (segment, head), as in the 16-bit kernel. Inside a warpgroup one thing follows another
// (scores, probabilities, output): tensor cores are busy for half of the time only, and the other warpgroups are there
// to fill it. So the accumulators of the output of one block live where the scores were, and every block's output is
// added to the row's in float32: the tensor cores' own sums of e4m3 products keep about 14 bits.
#include <algorithm>

#include "attention_fp8_sm90.cuh"
#include "attention_fp8_sm90_schedule.cuh"
#include "attention_fp8_sm90_step.cuh"
#include "common.cuh"
#include "tensor_map.h"

namespace any4d {
namespace fp8 {
namespace {

using namespace hopper;

constexpr int kScheduleBarrier = 1;

template <int GROUPS, int STAGES>
struct alignas(1024) Shared {
    Stage<KeyBlock> stage[STAGES];
    uint16_t out[GROUPS][kQueries * kHeadDim];
    uint64_t full[STAGES];
    uint64_t empty[STAGES];
    int done[GROUPS];
};

template <int GROUPS, int STAGES>
__device__ void produce(Shared<GROUPS, STAGES>& shared, const Work& work) {
    Ring<STAGES> ring;
    Schedule schedule(work);
    Piece piece;
    while (schedule.next(piece)) {
        const int64_t pair = piece.tile / work.tiles;
        const KeyBlock* from = work.key_blocks + pair * work.blocks + piece.begin;
        for (int j = 0; j < piece.count; ++j) {
            barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
            barrier_expect(&shared.full[ring.stage], kBlockBytes);
            load_bulk(&shared.stage[ring.stage].content, from + j, kBlockBytes, &shared.full[ring.stage]);
            ring.advance();
        }
    }
}

// The right to issue products, handed from warpgroup to warpgroup.
template <int GROUPS, bool PINGPONG>
struct Turn {
    int own, next;

    __device__ __forceinline__ explicit Turn(int member)
        : own(kScheduleBarrier + member), next(kScheduleBarrier + (member + 1) % GROUPS) {
        if (PINGPONG && member == GROUPS - 1) named_arrive(next, 2 * kWarpgroup);
    }
    __device__ __forceinline__ void take() const {
        if (PINGPONG) named_sync(own, 2 * kWarpgroup);
    }
    // With probabilities at hand. Their sign bits, which are zero, are added to the barrier's number: or the compiler
    // moves the barrier up, and a warpgroup would wait for its turn with rounding left to do.
    __device__ __forceinline__ void take(const uint32_t (&p)[kKeys / 8]) const {
        uint32_t signs = p[7];
#pragma unroll
        for (int i = 8; i < kKeys / 8; ++i) signs |= p[i];
        if (PINGPONG) named_sync(own + int(signs >> 31), 2 * kWarpgroup);
    }
    __device__ __forceinline__ void pass() const {
        if (PINGPONG) named_arrive(next, 2 * kWarpgroup);
    }
};

// A tile's queries, as registers of A, and the factors of their scores.
struct Queries {
    uint32_t a[8];
    float factor[2];

    __device__ __forceinline__ void load(const Work& work, int64_t pair, int row) {
        if (row >= work.length) return;
        const int thread = threadIdx.x % kWarpgroup;
        const QueryTile& tile = work.query_tiles[pair * work.blocks * 2 + row / kQueries];
        *reinterpret_cast<uint4*>(a) = __ldg(&tile.a[0][thread]);
        *reinterpret_cast<uint4*>(a + 4) = __ldg(&tile.a[1][thread]);
        const QueryRow* rows = work.query_rows + pair * work.blocks * kRows + row + thread / 32 * 16 + thread % 32 / 4;
        factor[0] = __ldg(&rows[0].factor);
        factor[1] = __ldg(&rows[8].factor);
    }
};

// Buffers pass through a warpgroup that has no query of this tile as through the others.
template <int GROUPS, int STAGES, bool PINGPONG>
__device__ void idle(Shared<GROUPS, STAGES>& shared, Ring<STAGES>& ring, const Turn<GROUPS, PINGPONG>& turn,
                     int blocks) {
    turn.take();
    for (int j = 0; j < blocks; ++j) {
        barrier_wait(&shared.full[ring.stage], ring.parity);
        turn.pass();
        turn.take();
        barrier_arrive(&shared.empty[ring.stage]);
        ring.advance();
    }
    turn.pass();
}

template <typename T>
__device__ void write_out(uint16_t* staging, const Total& total, const Softmax& softmax, const CUtensorMap& map,
                          int64_t pair, int row, int member, const Work& work) {
    const int thread = threadIdx.x % kWarpgroup, barrier = kStoreBarrier + member;
    const int segment = int(pair / work.heads), head = int(pair % work.heads);
    float sum[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] = __shfl_sync(0xffffffff, total.sum[half], threadIdx.x % 32 / 4 * 4);
        factor[half] = total.value_scale / sum[half];
    }
    if (thread == 0) bulk_wait_read<0>();  // the last tile's store has read the staging buffer
    named_sync(barrier, kWarpgroup);
    const int local = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = local + 8 * half;
            const uint32_t pair_of_values = round_pair<T>(total.acc[4 * j + 2 * half] * factor[half],
                                                          total.acc[4 * j + 2 * half + 1] * factor[half]);
            // The copy engine's 128-byte swizzle: chunk j of 16 bytes lies at j ^ (row % 8).
            reinterpret_cast<uint32_t*>(staging)[at * (kHeadDim / 2) + ((j ^ (at % 8)) * 4) + thread % 4] =
                pair_of_values;
        }
    }
    fence_shared_for_async();
    named_sync(barrier, kWarpgroup);
    if (thread == 0) {
        store_5d(&map, staging, 0, row, head, segment % work.count, segment / work.count);
        bulk_commit();
    }
    if (thread % 4 == 0) {
        const QueryRow* rows = work.query_rows + pair * work.blocks * kRows + row + local;
        float* lse = work.lse + head * work.rows + work.segments.start +
                     segment / work.count * work.segments.group_stride + segment % work.count * work.segments.stride +
                     row + local;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (row + local + 8 * half < work.length)
                lse[8 * half] = softmax.log_sum(half, sum[half]) + __ldg(&rows[8 * half].offset);
    }
}

template <typename T, int GROUPS, int STAGES, bool PINGPONG, int LINEAR>
__device__ void consume(Shared<GROUPS, STAGES>& shared, const CUtensorMap& out_map, const Work& work, int member) {
    const Turn<GROUPS, PINGPONG> turn(member);
    Ring<STAGES> ring;
    Schedule schedule(work);
    Piece piece;
    Queries queries;
    const auto first_row = [&](const Piece& of) {
        return of.tile % work.tiles * (kQueries * GROUPS) + member * kQueries;
    };
    bool more = schedule.next(piece);
    if (more) queries.load(work, piece.tile / work.tiles, first_row(piece));
    while (more) {
        const Piece own = piece;
        const int row = first_row(own);
        // From one lane for all: so the compiler knows that the loop below is the warp's, and what it counts too.
        const int blocks = __shfl_sync(0xffffffff, own.count, 0);
        const int valid = own.begin + own.count == work.blocks ? work.length - (work.blocks - 1) * kKeys : kKeys;
        if (row >= work.length) {
            idle(shared, ring, turn, blocks);
            more = schedule.next(piece);
            if (more) queries.load(work, piece.tile / work.tiles, first_row(piece));
            continue;
        }
        float scores[kKeys / 2], part[kSums / 2], scale[2];
        uint32_t p[kKeys / 8];
        Total total;
        Softmax softmax;

        const KeyBlock* block = &shared.stage[ring.stage].content;
        barrier_wait(&shared.full[ring.stage], ring.parity);
        turn.take();
        mma_fence();
        issue_scores(scores, queries.a, block->k);
        turn.pass();
        for (int j = 1; j < blocks; ++j) {
            scale_scores(scale, queries.factor, block->key_scale);
            mma_wait<0>();
            pin(scores);
            softmax.probabilities<LINEAR>(p, scores, scale);
            pin(p);
            turn.take(p);
            mma_fence();
            issue_output(part, p, block->v);
            uint64_t* const done = &shared.empty[ring.stage];
            const KeyBlock* const last = block;
            ring.advance();
            block = &shared.stage[ring.stage].content;
            barrier_wait(&shared.full[ring.stage], ring.parity);
            mma_wait<0>();
            pin(part);
            pin(p);
            mma_fence();
            issue_scores(scores, queries.a, block->k);
            turn.pass();
            // Read only here, so that the sum, which depends on it, is not moved between the products.
            const float2 value = {last->value_scale, last->value_inverse};
            barrier_arrive(done);
            total.add(part, softmax.factor, value.x, value.y);
        }
        scale_scores(scale, queries.factor, block->key_scale);
        mma_wait<0>();
        pin(scores);
        pin(queries.a);
        if (valid < kKeys) mask_columns(scores, valid);
        more = schedule.next(piece);
        if (more) queries.load(work, piece.tile / work.tiles, first_row(piece));
        softmax.probabilities<LINEAR>(p, scores, scale);
        pin(p);
        turn.take(p);
        mma_fence();
        issue_output(part, p, block->v);
        mma_wait<0>();
        pin(part);
        pin(p);
        turn.pass();
        const float2 value = {block->value_scale, block->value_inverse};
        barrier_arrive(&shared.empty[ring.stage]);
        ring.advance();
        total.add(part, softmax.factor, value.x, value.y);
        if (blocks == work.blocks || merge<GROUPS>(total, softmax, &shared.done[member], own.tile, member, work))
            write_out<T>(shared.out[member], total, softmax, out_map, own.tile / work.tiles, row, member, work);
    }
    if (threadIdx.x % kWarpgroup == 0) bulk_wait<0>();
}

template <typename T, int GROUPS, int STAGES, bool PINGPONG, int LINEAR>
__global__ void __launch_bounds__((GROUPS + 1) * kWarpgroup, 1)
    attention_fp8_kernel(const __grid_constant__ CUtensorMap out_map, const __grid_constant__ Work work) {
    extern __shared__ uint8_t raw[];
    // Not by way of an integer: the compiler would forget that this is shared memory.
    auto& shared = *reinterpret_cast<Shared<GROUPS, STAGES>*>(raw + (-smem_address(raw) & 1023));
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(&shared.full[s], 1);
            // Every lane arrives by itself, because all lanes read a block's scales: racecheck does not follow one
            // through the warp's barrier to another's arrival.
            barrier_init(&shared.empty[s], GROUPS * kWarpgroup);
        }
        fence_barrier_init();
    }
    __syncthreads();
    wait_for_previous_kernel();
    // 65,536 registers of a multiprocessor among the warpgroups, in steps of 8.
    constexpr int kProducerRegisters = GROUPS == 3 ? 32 : 24;
    constexpr int kConsumerRegisters = GROUPS == 3 ? 160 : 240;
    // From one lane for all: known to be the warp's, not a thread's.
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);
    if (warpgroup == 0) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce(shared, work);
    } else {
        take_registers<kConsumerRegisters>();
        consume<T, GROUPS, STAGES, PINGPONG, LINEAR>(shared, out_map, work, warpgroup - 1);
    }
}

constexpr int kGroups = 3;

template <typename T, int GROUPS, int STAGES, bool PINGPONG, int LINEAR>
cudaError_t launch(const AttentionForward& call, const Plan& plan, const Work& work, cudaStream_t stream) {
    CUtensorMap out_map;
    const int64_t head = kHeadDim * sizeof(T);
    if (cudaError_t error = make_segment_map(&out_map, call.out, call.dtype, kHeadDim, call.heads * head, head,
                                             call.heads, call.segments, kQueries))
        return error;
    return launch_dependent_sm90(attention_fp8_kernel<T, GROUPS, STAGES, PINGPONG, LINEAR>, plan.grid,
                                 (GROUPS + 1) * kWarpgroup, sizeof(Shared<GROUPS, STAGES>) + 1024, stream, out_map,
                                 work);
}

template <typename T>
cudaError_t launch_variant(const AttentionForward& call, const Plan& plan, const Work& work, cudaStream_t stream) {
    switch (call.variant) {
        case 0: return launch<T, kGroups, 6, false, 8>(call, plan, work, stream);
        case 1: return launch<T, kGroups, 6, false, 4>(call, plan, work, stream);
        case 2: return launch<T, kGroups, 6, true, 0>(call, plan, work, stream);
        case 3: return launch<T, kGroups, 6, true, 4>(call, plan, work, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace fp8

int attention_fp8_variants() {
    return 4;
}

int64_t attention_fp8_workspace(const AttentionForward& call) {
    if (call.segments.length <= fp8::kLongestShort) return 0;
    const tiling::Plan plan = fp8::plan_of(call.segments, call.heads, fp8::kGroups * fp8::kQueries, fp8::kKeys);
    const fp8::Layout layout(call.heads * call.segments.total(), plan.blocks);
    const int64_t parts = int64_t(plan.grid) * 2 * fp8::kGroups * tiling::kPart * hopper::kWarpgroup * sizeof(float);
    return layout.rest + (plan.split == 0 ? 0 : tiling::kArrivedBytes + parts);
}

cudaError_t attention_fp8(const AttentionForward& call, cudaStream_t stream) {
    const SegmentLayout& segments = call.segments;
    if (segments.length * call.heads * segments.total() > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
    if (segments.length <= fp8::kLongestShort) return fp8::attention_short(call, stream);
    const tiling::Plan plan = fp8::plan_of(call.segments, call.heads, fp8::kGroups * fp8::kQueries, fp8::kKeys);
    const fp8::Layout layout(call.heads * segments.total(), plan.blocks);
    char* workspace = static_cast<char*>(call.workspace);
    const auto key_blocks = reinterpret_cast<fp8::KeyBlock*>(workspace + layout.blocks);
    const auto query_tiles = reinterpret_cast<fp8::QueryTile*>(workspace + layout.queries);
    const auto query_rows = reinterpret_cast<fp8::QueryRow*>(workspace + layout.rows);
    int* const arrived = reinterpret_cast<int*>(workspace + layout.rest);

    fp8::Quantize first{call.q, call.k, call.v, call.out, call.lse, call.dtype};
    first.row_stride = call.row_stride;
    first.head_stride = call.head_stride;
    first.rows = call.rows;
    first.segments = segments;
    first.heads = call.heads;
    first.blocks = plan.blocks;
    first.tiles = unsigned(plan.blocks * call.heads * segments.total());
    first.zeroing = segments.total() * segments.length < call.rows
                        ? unsigned(std::min<int64_t>((call.rows + 255) / 256, 1024)) : 0;
    first.scale = call.scale;
    first.key_blocks = key_blocks;
    first.query_tiles = query_tiles;
    first.query_rows = query_rows;
    first.counters = arrived;
    first.counter_count = plan.split * fp8::kGroups;
    if (cudaError_t error = fp8::quantize(first, stream)) return error;

    fp8::Work work{key_blocks, query_tiles, query_rows, call.lse};
    work.arrived = arrived;
    work.parts = reinterpret_cast<float*>(workspace + layout.rest + tiling::kArrivedBytes);
    work.rows = call.rows;
    work.segments = segments;
    work.heads = call.heads;
    work.length = int(segments.length);
    work.count = int(segments.count);
    work.tiles = plan.tiles;
    work.blocks = plan.blocks;
    work.whole = plan.whole;
    work.split = plan.split;
    return call.dtype == DType::kFloat16 ? fp8::launch_variant<__half>(call, plan, work, stream)
                                         : fp8::launch_variant<__nv_bfloat16>(call, plan, work, stream);
}

}  // namespace any4d
