// Attention forward for Hopper, head dim 64, 16-bit dtypes: csrc/notes/attention.md has the count and the measurements.
//
// A block of threads is one copying warp and GROUPS computing warpgroups of 64 queries each; it is persistent over tiles
// of 64 * GROUPS queries of one (segment, head). A ring of key and value blocks is filled by the copy engine. Inside a
// warpgroup the scores of the next block are in flight while the probabilities of this one multiply the values; between
// warpgroups, named barriers pass the right to issue products around, so that one's softmax runs under the others'
// products. Scores live in the log2 domain.
#include "attention_sm90.h"

#include <limits>

#include "attention_sm90_schedule.cuh"
#include "attention_sm90_split.cuh"
#include "softmax_sm90.cuh"
#include "tensor_map.h"
#include "warp_mma.cuh"
#include "wgmma.cuh"
#include "wgmma_ones.cuh"

namespace any4d {
namespace {

using namespace forward;
using namespace hopper;

constexpr int kQStages = 2;  // the next tile's queries arrive during this one's products
constexpr int kScheduleBarrier = 1;

// How the row sums of the probabilities are made.
enum class Sums { kAdd, kColumn, kWarp };

// A configuration: slots of the ring, how many of 16 exponentials avoid the special function units, how many of a
// thread's 64 probabilities are made before it waits for the product of the block before.
template <int STAGES_, int EMULATED_, int FIRST_, Sums SUMS_ = Sums::kAdd>
struct Config {
    static constexpr int GROUPS = 3, STAGES = STAGES_, EMULATED = EMULATED_, kFirst = FIRST_;
    static constexpr bool PINGPONG = true;
    static constexpr Sums SUMS = SUMS_;
    static constexpr int kColumns = kHeadDim + (SUMS == Sums::kColumn ? 8 : 0);  // of the product with the values
    // The block after the next is waited for before the block at hand is released.
    static_assert(STAGES >= 3);
};

// Keys and values of one block.
template <typename T>
struct Slot {
    T k[kKeys * kHeadDim];
    T v[kKeys * kHeadDim];
};

template <typename T, typename C>
struct alignas(1024) Shared {
    T q[kQStages][C::GROUPS][kQueries * kHeadDim];
    Slot<T> slot[C::STAGES];
    T ones[C::SUMS == Sums::kColumn ? 16 * 64 : 1];
    alignas(1024) T out[C::GROUPS][kQueries * kHeadDim];
    uint64_t full[C::STAGES];
    uint64_t empty[C::STAGES];
    uint64_t q_full[kQStages][C::GROUPS];
    uint64_t q_empty[kQStages][C::GROUPS];
    int done[C::GROUPS];
};

// Every warp says by itself that it is done with a buffer: a warp's wait covers only its own part of a product.
__device__ __forceinline__ void release(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

template <typename T, typename C>
__device__ void produce(Shared<T, C>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                        const CUtensorMap& v_map, const Work& work) {
    constexpr uint32_t kQBytes = kQueries * kHeadDim * sizeof(T);
    Ring<kQStages> turn;
    Ring<C::STAGES> ring;
    Schedule schedule(work);
    Piece piece;
    while (schedule.next(piece)) {
        const Place place = place_of<kQueries * C::GROUPS>(piece.tile, work);
#pragma unroll
        for (int c = 0; c < C::GROUPS; ++c) {
            barrier_wait(&shared.q_empty[turn.stage][c], turn.parity ^ 1);
            barrier_expect(&shared.q_full[turn.stage][c], kQBytes);
            load_5d(shared.q[turn.stage][c], &q_map, &shared.q_full[turn.stage][c], 0, place.first + c * kQueries,
                    place.head, place.member, place.group);
        }
        turn.advance();
        for (int j = 0; j < piece.count; ++j) {
            const int row = piece.row_of_block(j, work);
            uint64_t* const full = &shared.full[ring.stage];
            Slot<T>& slot = shared.slot[ring.stage];
            barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
            barrier_expect(full, sizeof(Slot<T>));
            load_5d(slot.k, &k_map, full, 0, row, place.head, place.member, place.group);
            load_5d(slot.v, &v_map, full, 0, row, place.head, place.member, place.group);
            ring.advance();
        }
    }
}

// The right to issue products, handed from warpgroup to warpgroup.
template <typename C>
struct Turn {
    int own, next;

    __device__ __forceinline__ explicit Turn(int member)
        : own(kScheduleBarrier + member), next(kScheduleBarrier + (member + 1) % C::GROUPS) {
        if (C::PINGPONG && member == C::GROUPS - 1) named_arrive(next, 2 * kWarpgroup);
    }
    __device__ __forceinline__ void take() const {
        if (C::PINGPONG) named_sync(own, 2 * kWarpgroup);
    }
    __device__ __forceinline__ void pass() const {
        if (C::PINGPONG) named_arrive(next, 2 * kWarpgroup);
    }
};

// A descriptor (hopper.cuh, `operand`) from its low half: address and panel in units of 16 bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t low) {
    uint64_t whole;
    asm("mov.b64 %0, {%1, %2};" : "=l"(whole) : "r"(low), "n"(0x40000040));
    return whole;
}

template <typename T>
__device__ __forceinline__ void issue_scores(float (&scores)[kKeys / 2], uint32_t q, uint32_t k) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i)
        Mma<T, kKeys>::shared(scores, descriptor(q + 2 * i), descriptor(k) + 2 * i, i > 0);
    mma_commit();
}

// The same scores by the warp alone, from shared memory: for the rare block whose probabilities left their range, when
// `issue_scores`' result is gone.
template <typename T>
__device__ __forceinline__ void warp_scores(float (&scores)[kKeys / 2], const T* q, const T* k) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) scores[i] = 0.f;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
        uint32_t a[4];
        load_matrices(a, swizzled(q, 16 * warp + lane % 16, 2 * step + lane / 16));
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j) {
            uint32_t b[4];  // two tiles of 8 keys, each of 2 x 8 channels
            load_matrices(b, swizzled(k, 16 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
            WarpMma<T>::add(&scores[8 * j], a, b);
            WarpMma<T>::add(&scores[8 * j + 4], a, b + 2);
        }
    }
}

template <int N>
__device__ __forceinline__ void rescale(float (&acc)[N], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < N; ++i) acc[i] *= factor[i / 2 % 2];
}

template <typename T, typename C>
__device__ __forceinline__ void issue_output(float (&acc)[C::kColumns / 2], const uint32_t (&p)[kKeys / 4], uint32_t v,
                                             bool add) {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
        // The next 16 keys are 2048 bytes on, and the column of ones, a panel of the same operand, stays where it is.
        constexpr int64_t kStep = C::SUMS == Sums::kColumn ? 128 - (128 << 16) : 128;
        Mma<T, C::kColumns>::template registers<true>(acc, p + 4 * i, descriptor(v) + i * kStep, add || i > 0);
    }
    mma_commit();
}

// The descriptor's low half of the first slot's values, which the next slots' follow.
template <typename T, typename C>
__device__ __forceinline__ uint32_t first_values(const Shared<T, C>& shared) {
    const T* const v = shared.slot[0].v;
    if constexpr (C::SUMS == Sums::kColumn) return uint32_t(operand(v, smem_address(shared.ones) - smem_address(v)));
    return uint32_t(operand(v));
}

// Buffers pass through a warpgroup that has no query of this tile as through the others.
template <typename T, typename C>
__device__ void idle(Shared<T, C>& shared, Ring<C::STAGES>& ring, const Turn<C>& turn, int blocks) {
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

// Whether a barrier's phase is over, without waiting.
__device__ __forceinline__ bool barrier_test(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{ .reg .pred done; mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(smem_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// Waits for a barrier if `known` does not hold in all threads of the warp, and `step` is before `last`.
__device__ __forceinline__ void barrier_wait_unless(bool known, uint64_t* barrier, uint32_t parity, int step, int last) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "setp.ne.u32 done, %2, 0;\n"
        "vote.sync.all.pred done, done, 0xffffffff;\n"
        "@done bra DONE;\n"
        "setp.ge.s32 done, %3, %4;\n"
        "@done bra DONE;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(smem_address(barrier)),
        "r"(parity), "r"(uint32_t(known)), "r"(step), "r"(last)
        : "memory");
}

// Starts the sums of a block of probabilities, and their check, with the first kFirst; false: out of range.
template <typename C, typename T>
__device__ __forceinline__ bool begin_sums(Softmax& softmax, const float (&scores)[kKeys / 2]) {
    if constexpr (C::SUMS != Sums::kAdd) return largest<0, C::kFirst>(scores) <= kMostMass<T>;
    softmax.add<0, C::kFirst>(scores);
    return softmax.added[0] + softmax.added[1] <= kMostMass<T>;
}

template <typename C, typename T>
__device__ __forceinline__ bool finish_sums(Softmax& softmax, const float (&scores)[kKeys / 2],
                                            const uint32_t (&p)[kKeys / 4]) {
    if constexpr (C::SUMS != Sums::kAdd) return pairs_in_range<T, C::kFirst / 2, kKeys / 4>(p);
    softmax.add<C::kFirst, kKeys / 2>(scores);
    return softmax.added[0] + softmax.added[1] <= kMostMass<T>;
}

// Adds a block, in range now, to the row sums.
template <typename C, typename T>
__device__ __forceinline__ void add_sums(Softmax& softmax, float (&row_sums)[4], const uint32_t (&p)[kKeys / 4]) {
    if constexpr (C::SUMS == Sums::kAdd) softmax.accumulate();
    if constexpr (C::SUMS == Sums::kWarp) {
        const uint32_t ones[2] = {kOnes<T>, kOnes<T>};
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) WarpMma<T>::add(row_sums, p + 4 * i, ones);
    }
}

template <typename T, typename C>
__device__ void consume(Shared<T, C>& shared, const CUtensorMap& out_map, const Work& work, int member) {
    const Turn<C> turn(member);
    Ring<kQStages> q_ring;
    Ring<C::STAGES> ring;  // of the keys and values whose probabilities are at hand
    Schedule schedule(work);
    constexpr uint32_t kSlot = sizeof(Slot<T>) / 16;
    constexpr uint32_t kValuesStep = C::SUMS == Sums::kColumn ? kSlot - (kSlot << 16) : kSlot;
    const uint32_t keys = uint32_t(operand(shared.slot[0].k)), values = first_values(shared);
    Piece piece;
    while (schedule.next(piece)) {
        const int row = piece.tile % work.tiles * (kQueries * C::GROUPS) + member * kQueries;
        // From one lane for all: so the compiler knows that the loop below is the warp's, and what it counts too.
        const int blocks = __shfl_sync(0xffffffff, piece.count, 0);
        uint64_t* q_empty = &shared.q_empty[q_ring.stage][member];
        const T* q = shared.q[q_ring.stage][member];
        const uint32_t queries = __reduce_max_sync(0xffffffff, uint32_t(operand(q)));
        barrier_wait(&shared.q_full[q_ring.stage][member], q_ring.parity);
        q_ring.advance();
        if (row >= work.length) {
            release(q_empty);
            idle(shared, ring, turn, blocks);
            continue;
        }
        float scores[kKeys / 2], acc[C::kColumns / 2], factor[2], row_sums[4] = {};
        uint32_t p[kKeys / 4];
        Softmax softmax(work.scale_log2);

        barrier_wait(&shared.full[ring.stage], ring.parity);
        turn.take();
        mma_fence();
        issue_scores<T>(scores, queries, keys + ring.stage * kSlot);
        turn.pass();
        mma_wait<0>();
        pin(scores);
        if (piece.begin == 0) mask_columns(scores, work.length - (work.blocks - 1) * kKeys);
        softmax.start(scores);
        softmax.exponentials<0, 0, kKeys / 2>(scores);
        softmax.add<0, kKeys / 2>(scores);
        round_pairs<T, 0, kKeys / 2>(p, scores);
        add_sums<C, T>(softmax, row_sums, p);

        Ring<C::STAGES> next = ring;
        next.advance();
        if (blocks > 1) barrier_wait(&shared.full[next.stage], next.parity);
        for (int j = 1; j < blocks; ++j) {
            turn.take();
            pin(p);
            mma_fence();
            issue_scores<T>(scores, queries, keys + next.stage * kSlot);
            issue_output<T, C>(acc, p, values + ring.stage * kValuesStep, j > 1);
            turn.pass();
            uint64_t* const read = &shared.empty[ring.stage];
            ring = next;
            next.advance();
            const bool known = barrier_test(&shared.full[next.stage], next.parity);
            mma_wait<1>();
            pin(scores);
            softmax.exponentials<C::EMULATED, 0, C::kFirst>(scores);
            int good = begin_sums<C, T>(softmax, scores);
            // The check depends on these exponentials, so they stay above the wait for the output, which they hide.
            barrier_wait_unless(known && good, &shared.full[next.stage], next.parity, j, blocks - 1);
            mma_wait<0>();
            pin(acc);
            pin(p);
            release(read);
            softmax.exponentials<C::EMULATED, C::kFirst, kKeys / 2>(scores);
            round_pairs<T, 0, kKeys / 2>(p, scores);
            good &= finish_sums<C, T>(softmax, scores, p);
            if (!__all_sync(0xffffffff, good)) {
                warp_scores(scores, q, shared.slot[ring.stage].k);
                softmax.grow(factor, scores);
                softmax.exponentials<0, 0, kKeys / 2>(scores);
                softmax.add<0, kKeys / 2>(scores);
                rescale(acc, factor);
                if (C::SUMS == Sums::kWarp) rescale(row_sums, factor);
                round_pairs<T, 0, kKeys / 2>(p, scores);
            }
            add_sums<C, T>(softmax, row_sums, p);
        }
        release(q_empty);
        pin(p);
        mma_fence();
        issue_output<T, C>(acc, p, values + ring.stage * kValuesStep, blocks > 1);
        mma_wait<0>();
        pin(acc);
        release(&shared.empty[ring.stage]);
        ring.advance();
        if constexpr (C::SUMS != Sums::kAdd) {
            // Every thread of a quad has the whole sum, which the quad will add up.
#pragma unroll
            for (int half = 0; half < 2; ++half)
                softmax.sum[half] = 0.25f * (C::SUMS == Sums::kWarp ? row_sums[2 * half] : acc[C::kColumns / 2 - 4 + 2 * half]);
        }
        if (blocks == work.blocks || merge<C::GROUPS>(acc, softmax, &shared.done[member], piece.tile, member, work)) {
            const Place place = place_of<kQueries * C::GROUPS>(piece.tile, work);
            write_out<T>(shared.out[member], acc, softmax, out_map, place, row, member, work);
        }
    }
    if (threadIdx.x % kWarpgroup == 0) bulk_wait<0>();
}

template <typename T, typename C>
__global__ void __launch_bounds__((C::GROUPS + 1) * kWarpgroup, 1)
    attention_forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                             const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap out_map,
                             const __grid_constant__ Work work) {
    extern __shared__ uint8_t raw[];
    // Not by way of an integer: the compiler would forget that this is shared memory.
    auto& shared = *reinterpret_cast<Shared<T, C>*>(raw + (-smem_address(raw) & 1023));
    if (threadIdx.x == 0) {
        for (int i = 0; i < kQStages * C::GROUPS; ++i) {
            barrier_init(&shared.q_full[i / C::GROUPS][i % C::GROUPS], 1);
            barrier_init(&shared.q_empty[i / C::GROUPS][i % C::GROUPS], 4);
        }
        for (int s = 0; s < C::STAGES; ++s) {
            barrier_init(&shared.full[s], 1);
            barrier_init(&shared.empty[s], 4 * C::GROUPS);
        }
        fence_barrier_init();
    }
    if constexpr (C::SUMS == Sums::kColumn) {
        for (int i = threadIdx.x; i < 16 * 64; i += blockDim.x) shared.ones[i] = T(1.f);
        fence_shared_for_async();
    }
    __syncthreads();
    // 65,536 registers of a multiprocessor among the warpgroups, in steps of 8.
    constexpr int kProducerRegisters = C::GROUPS == 3 ? 32 : 24;
    constexpr int kConsumerRegisters = C::GROUPS == 3 ? 160 : 240;
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);  // known to be the warp's, not a thread's
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

    const Plan plan = plan_of(call, C::GROUPS * kQueries);
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
        if (cudaError_t error = cudaMemsetAsync(work.arrived, 0, plan.split * C::GROUPS * sizeof(int), stream))
            return error;
    }
    // A factor of zero times a masked score of -inf would be NaN.
    work.scale_log2 = std::max(call.scale * 1.4426950409f, std::numeric_limits<float>::min());

    const auto kernel = attention_forward_kernel<T, C>;
    constexpr int kBytes = sizeof(Shared<T, C>) + 1024;
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))
        return error;
    kernel<<<plan.grid, (C::GROUPS + 1) * kWarpgroup, kBytes, stream>>>(q_map, k_map, v_map, out_map, work);
    return cudaGetLastError();
}

template <typename T>
cudaError_t launch_variant(const AttentionForward& call, cudaStream_t stream) {
    switch (call.variant) {
        case 0: return launch<T, Config<4, 0, 32>>(call, stream);
        case 1: return launch<T, Config<4, 1, 32>>(call, stream);
        case 2: return launch<T, Config<4, 2, 32>>(call, stream);
        case 3: return launch<T, Config<4, 3, 32>>(call, stream);
        case 4: return launch<T, Config<4, 1, 40>>(call, stream);
        case 5: return launch<T, Config<4, 0, 40>>(call, stream);
        case 6: return launch<T, Config<4, 2, 40>>(call, stream);
        case 7: return launch<T, Config<3, 0, 32>>(call, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

int attention_forward_variants() {
    return 8;
}

int64_t attention_forward_workspace(const AttentionForward& call) {
    const Plan plan = plan_of(call, 3 * kQueries);
    return plan.split == 0 ? 0 : kArrivedBytes + int64_t(plan.grid) * 2 * 3 * kPart * kWarpgroup * sizeof(float);
}

cudaError_t attention_forward(const AttentionForward& call, cudaStream_t stream) {
    if (call.segments.length * call.heads * call.segments.total() > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
    return call.dtype == DType::kFloat16 ? launch_variant<__half>(call, stream)
                                         : launch_variant<__nv_bfloat16>(call, stream);
}

}  // namespace any4d
