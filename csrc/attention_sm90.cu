// Attention forward for Hopper, head dim 64, 16-bit dtypes: csrc/notes/attention.md has the count and the measurements.
//
// A block of threads is one copying warp and kGroups computing warpgroups of 64 queries each; it is persistent over
// tiles of 64 * kGroups queries of one (segment, head). A ring of key and value blocks is filled by the copy engine.
// Inside a warpgroup the scores of the next block, be it the next tile's, are in flight while the probabilities of this
// one multiply the values; between warpgroups, named barriers pass the right to issue products around, so that one's
// softmax runs under the others' products. Scores live in the log2 domain.
#include "attention_sm90.h"

#include <limits>

#include "attention_sm90_group.cuh"
#include "attention_sm90_schedule.cuh"
#include "dependent_launch.cuh"
#include "tensor_map.h"

namespace any4d {
namespace {

using namespace forward;
using namespace hopper;

template <typename T, typename C>
__device__ void produce(Shared<T, C>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                        const CUtensorMap& v_map, const Work& work) {
    constexpr uint32_t kQBytes = kQueries * kHeadDim * sizeof(T);
    Ring<kQStages> turn;
    Ring<C::STAGES> ring;
    Schedule schedule(work);
    Piece piece;
    bool more = true;
    while (more) {
        more = schedule.next(piece);
        for (int c = 0; c < kGroups; ++c) barrier_wait(&shared.q_empty[turn.stage][c], turn.parity ^ 1);
        Task& task = shared.task[turn.stage];
        if (!more) {
            task.blocks = 0;
            for (int c = 0; c < kGroups; ++c) barrier_arrive(&shared.q_full[turn.stage][c]);
            return;
        }
        task = task_of<kQueries * kGroups>(piece, work);
        for (int c = 0; c < kGroups; ++c) {
            barrier_expect(&shared.q_full[turn.stage][c], kQBytes);
            load_5d(shared.q[turn.stage][c], &q_map, &shared.q_full[turn.stage][c], 0, task.row + c * kQueries,
                    task.head, task.member, task.group);
        }
        turn.advance();
        for (int j = 0; j < piece.count; ++j) {
            const int row = row_of_block(piece, j, work);
            uint64_t* const full = &shared.full[ring.stage];
            Slot<T>& slot = shared.slot[ring.stage];
            barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
            barrier_expect(full, sizeof(Slot<T>));
            load_5d(slot.k, &k_map, full, 0, row, task.head, task.member, task.group);
            load_5d(slot.v, &v_map, full, 0, row, task.head, task.member, task.group);
            ring.advance();
        }
    }
}

// Buffers pass through a warpgroup that has no query of this tile as through the others.
template <typename T, typename C>
__device__ void idle(Shared<T, C>& shared, Ring<C::STAGES>& ring, const Turn& turn, int blocks) {
#pragma unroll 1
    for (int j = 0; j < blocks; ++j) {
        barrier_wait(&shared.full[ring.stage], ring.parity);
        turn.take();
        turn.pass();
        // Never waits. With one wait in this loop, ptxas 13.0 takes the ring's position for a thread's, everywhere.
        barrier_wait(&shared.full[ring.stage], ring.parity);
        release(&shared.empty[ring.stage]);
        ring.advance();
    }
}

template <typename T, typename C>
__device__ void consume(Shared<T, C>& shared, const CUtensorMap& out_map, const Work& work, int member) {
    Warpgroup<T, C> group(shared, work, member);
    int blocks = group.fetch();
    while (blocks != 0) {
        if (blocks < 0) {
            release(&shared.q_empty[group.q_ring.stage][member]);
            group.q_ring.advance();
            idle(shared, group.ring, group.turn, -blocks);
            blocks = group.fetch();
            continue;
        }
        barrier_wait(&shared.full[group.ring.stage], group.ring.parity);
        group.turn.take();
        mma_fence();
        group.issue_first();
        group.turn.pass();
        mma_wait<0>();
        pin(group.scores);
        do {
            group.start();
            group.run(blocks);
            blocks = group.finish(blocks, out_map);
        } while (blocks > 0);
    }
    if (threadIdx.x % kWarpgroup == 0) bulk_wait<0>();
}
template <typename T, typename C>
__global__ void __launch_bounds__((kGroups + 1) * kWarpgroup, 1)
    attention_forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                             const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap out_map,
                             const __grid_constant__ Work work) {
    extern __shared__ uint8_t raw[];
    // Not by way of an integer: the compiler would forget that this is shared memory.
    auto& shared = *reinterpret_cast<Shared<T, C>*>(raw + (-smem_address(raw) & 1023));
    if (threadIdx.x == 0) {
        for (int i = 0; i < kQStages * kGroups; ++i) {
            barrier_init(&shared.q_full[i / kGroups][i % kGroups], 1);
            barrier_init(&shared.q_empty[i / kGroups][i % kGroups], 4);
        }
        for (int s = 0; s < C::STAGES; ++s) {
            barrier_init(&shared.full[s], 1);
            barrier_init(&shared.empty[s], 4 * kGroups);
        }
        fence_barrier_init();
    }
    __syncthreads();
    wait_for_previous_kernel();
    // 65,536 registers of a multiprocessor among the warpgroups, in steps of 8.
    constexpr int kProducerRegisters = 32;
    constexpr int kConsumerRegisters = 160;
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);  // known to be the warp's
    if (warpgroup == 0) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce(shared, q_map, k_map, v_map, work);
        if (threadIdx.x >= 32 && work.gaps) zero_gaps<T>(work);
    } else {
        take_registers<kConsumerRegisters>();
        consume<T, C>(shared, out_map, work, warpgroup - 1);
    }
}

template <typename T, typename C>
cudaError_t launch(const AttentionForward& call, cudaStream_t stream) {
    CUtensorMap q_map, k_map, v_map, out_map;
    const SegmentLayout& segments = call.segments;
    const int64_t row = call.row_stride * sizeof(T), head = call.head_stride * sizeof(T);
    const int64_t out_head = kHeadDim * sizeof(T), out_row = call.heads * out_head;
    const auto map = [&](CUtensorMap* to, const void* base, int64_t row_bytes, int64_t head_bytes, int box) {
        return make_segment_map(to, base, call.dtype, kHeadDim, row_bytes, head_bytes, call.heads, segments, box);
    };
    if (cudaError_t error = map(&q_map, call.q, row, head, kQueries)) return error;
    if (cudaError_t error = map(&k_map, call.k, row, head, kKeys)) return error;
    if (cudaError_t error = map(&v_map, call.v, row, head, kKeys)) return error;
    if (cudaError_t error = map(&out_map, call.out, out_row, out_head, kQueries)) return error;

    const Plan plan = plan_of(segments, call.heads, kGroups * kQueries, kKeys);
    Work work{call.out, call.lse, nullptr, nullptr, call.rows, segments, call.heads};
    work.length = int(segments.length);
    work.count = int(segments.count);
    work.tiles = plan.tiles;
    work.blocks = plan.blocks;
    work.whole = plan.whole;
    work.split = plan.split;
    work.gaps = segments.total() * segments.length < call.rows;
    if (plan.split > 0) {
        if (call.workspace == nullptr) return cudaErrorInvalidValue;
        work.arrived = static_cast<int*>(call.workspace);
        work.parts = reinterpret_cast<float*>(static_cast<char*>(call.workspace) + kArrivedBytes);
        if (cudaError_t error = cudaMemsetAsync(work.arrived, 0, plan.split * kGroups * sizeof(int), stream))
            return error;
    }
    // A factor of zero times a masked score of -inf would be NaN.
    work.scale_log2 = std::max(call.scale * 1.4426950409f, std::numeric_limits<float>::min());
    work.scale_unit = work.scale_log2 * Softmax::kUnit;

    return launch_dependent_sm90(attention_forward_kernel<T, C>, plan.grid, (kGroups + 1) * kWarpgroup,
                                 sizeof(Shared<T, C>) + 1024, stream, q_map, k_map, v_map, out_map, work);
}

template <typename T>
cudaError_t launch_variant(const AttentionForward& call, cudaStream_t stream) {
    switch (call.variant) {
        case 0: return launch<T, Config<4, 0, 40>>(call, stream);  // fastest, or within 2 % of it, at every size
        case 1: return launch<T, Config<4, 0, 32>>(call, stream);
        case 2: return launch<T, Config<4, 1, 32>>(call, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

int attention_forward_variants() {
    return 3;
}

int64_t attention_forward_workspace(const AttentionForward& call) {
    const Plan plan = plan_of(call.segments, call.heads, kGroups * kQueries, kKeys);
    return plan.split == 0 ? 0 : kArrivedBytes + int64_t(plan.grid) * 2 * kGroups * kPart * kWarpgroup * sizeof(float);
}

cudaError_t attention_forward(const AttentionForward& call, cudaStream_t stream) {
    if (call.segments.length * call.heads * call.segments.total() > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
    return call.dtype == DType::kFloat16 ? launch_variant<__half>(call, stream)
                                         : launch_variant<__nv_bfloat16>(call, stream);
}

}  // namespace any4d
