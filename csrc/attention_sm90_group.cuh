// What a computing warpgroup of attention's forward for Hopper does with a tile (attention_sm90.cu has the whole).
#pragma once

#include "attention_sm90_schedule.cuh"
#include "attention_sm90_split.cuh"
#include "softmax_sm90.cuh"
#include "warp_mma.cuh"
#include "wgmma.cuh"

namespace any4d::forward {

constexpr int kGroups = 3;   // computing warpgroups
constexpr int kQStages = 2;  // the next tile's queries arrive during this one's products
constexpr int kScheduleBarrier = 1;

// A configuration: slots of the ring, how many of 16 exponentials avoid the special function units, and how many of a
// thread's 64 probabilities are made before it waits for the product of the block before.
template <int STAGES_, int EMULATED_, int FIRST_>
struct Config {
    static constexpr int STAGES = STAGES_, EMULATED = EMULATED_, FIRST = FIRST_;
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
    T q[kQStages][kGroups][kQueries * kHeadDim];
    Slot<T> slot[C::STAGES];
    T out[kGroups][kQueries * kHeadDim];
    uint64_t full[C::STAGES];
    uint64_t empty[C::STAGES];
    uint64_t q_full[kQStages][kGroups];
    uint64_t q_empty[kQStages][kGroups];
    Task task[kQStages];
    int done[kGroups];
};

// Every warp says by itself that it is done with a buffer: a warp's wait covers only its own part of a product.
__device__ __forceinline__ void release(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// The right to issue products, handed from warpgroup to warpgroup.
struct Turn {
    int own, next;

    __device__ __forceinline__ explicit Turn(int member)
        : own(kScheduleBarrier + member), next(kScheduleBarrier + (member + 1) % kGroups) {
        if (member == kGroups - 1) named_arrive(next, 2 * kWarpgroup);
    }
    __device__ __forceinline__ void take() const { named_sync(own, 2 * kWarpgroup); }
    __device__ __forceinline__ void pass() const { named_arrive(next, 2 * kWarpgroup); }
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
#pragma unroll 1  // rare, and registers are few
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

template <typename T>
__device__ __forceinline__ void issue_output(float (&acc)[kHeadDim / 2], const uint32_t (&p)[kKeys / 4], uint32_t v,
                                             bool add) {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
        Mma<T, kHeadDim>::template registers<true>(acc, p + 4 * i, descriptor(v) + 128 * i, add || i > 0);
    mma_commit();
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

// Waits for a barrier if `known` does not hold in all threads of the warp, and `step` is before `last`. The long way
// adds zero to `anchor`, which ptxas cannot see: so nothing that needs `anchor` moves above this.
__device__ __forceinline__ void barrier_wait_unless(bool known, uint64_t* barrier, uint32_t parity, int step, int last,
                                                    float (&anchor)[2]) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        ".reg .b32 zero, bits;\n"
        "setp.ne.u32 done, %4, 0;\n"
        "vote.sync.all.pred done, done, 0xffffffff;\n"
        "@done bra DONE;\n"
        "sub.s32 zero, %5, %6;\n"
        "max.s32 zero, zero, 0;\n"
        "mov.b32 bits, %0;\n"
        "add.s32 bits, bits, zero;\n"
        "mov.b32 %0, bits;\n"
        "mov.b32 bits, %1;\n"
        "add.s32 bits, bits, zero;\n"
        "mov.b32 %1, bits;\n"
        "setp.ge.s32 done, %5, %6;\n"
        "@done bra DONE;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%2], %3;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}\n"
        : "+f"(anchor[0]), "+f"(anchor[1])
        : "r"(smem_address(barrier)), "r"(parity), "r"(uint32_t(known)), "r"(step), "r"(last)
        : "memory");
}

// What a computing warpgroup goes through a tile with.
template <typename T, typename C>
struct Warpgroup {
    static constexpr uint32_t kSlot = sizeof(Slot<T>) / 16, kQStage = kGroups * kQueries * kHeadDim * sizeof(T) / 16;

    Shared<T, C>& shared;
    const Work& work;
    const Turn turn;
    const int member;
    Ring<kQStages> q_ring;
    Ring<C::STAGES> ring;  // of the keys and values whose probabilities are at hand
    // Low halves of descriptors. From all lanes for all: so the compiler knows that they are the warp's.
    const uint32_t queries, keys;
    float scores[kKeys / 2], acc[kHeadDim / 2];
    uint32_t p[kKeys / 4];
    Softmax softmax;

    __device__ __forceinline__ Warpgroup(Shared<T, C>& shared, const Work& work, int member)
        : shared(shared),
          work(work),
          turn(member),
          member(member),
          queries(__reduce_max_sync(0xffffffff, uint32_t(operand(shared.q[0][member])))),
          keys(uint32_t(operand(shared.slot[0].k))),
          softmax(work.scale_log2, work.scale_unit) {}

    __device__ __forceinline__ const Task& task() const { return shared.task[q_ring.stage]; }

    // Waits for the queries at `q_ring`; their tile's blocks of keys, negative if this warpgroup has no part in it.
    __device__ __forceinline__ int fetch() {
        barrier_wait(&shared.q_full[q_ring.stage][member], q_ring.parity);
        const int blocks = task().blocks;
        return __shfl_sync(0xffffffff, member * kQueries < task().rows ? blocks : -blocks, 0);
    }

    __device__ __forceinline__ void issue_first() {
        issue_scores<T>(scores, queries + q_ring.stage * kQStage, keys + ring.stage * kSlot);
    }

    // Probabilities of a tile's first block from its scores.
    __device__ __forceinline__ void start() {
        mask_columns(scores, __shfl_sync(0xffffffff, task().columns, 0));
        softmax.start(scores);
        softmax.template exponentials<0, 0, kKeys / 2>(scores);
        softmax.template add<0, kKeys / 2>(scores);
        softmax.accumulate();
        round_pairs<T, 0, kKeys / 2>(p, scores);
    }

    // The scores again, with references grown to fit, if probabilities left their range. No product is under way.
    __device__ __forceinline__ void repair() {
        float factor[2];
        warp_scores(scores, shared.q[q_ring.stage][member], shared.slot[ring.stage].k);
        softmax.grow(factor, scores);
        softmax.template exponentials<0, 0, kKeys / 2>(scores);
        softmax.template add<0, kKeys / 2>(scores);
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) acc[i] *= factor[i / 2 % 2];
        round_pairs<T, 0, kKeys / 2>(p, scores);
    }

    // All blocks but the first; the last one's values remain to be multiplied.
    __device__ __forceinline__ void run(int blocks) {
        const uint32_t values = keys + kSlot / 2, q = queries + q_ring.stage * kQStage;
        Ring<C::STAGES> next = ring;
        next.advance();
        if (blocks > 1) barrier_wait(&shared.full[next.stage], next.parity);
        for (int j = 1; j < blocks; ++j) {
            turn.take();
            pin(p);
            mma_fence();
            issue_scores<T>(scores, q, keys + next.stage * kSlot);
            issue_output<T>(acc, p, values + ring.stage * kSlot, j > 1);
            turn.pass();
            uint64_t* const read = &shared.empty[ring.stage];
            ring = next;
            next.advance();
            const bool known = barrier_test(&shared.full[next.stage], next.parity);
            mma_wait<1>();
            pin(scores);
            softmax.template exponentials<C::EMULATED, 0, C::FIRST>(scores);
            softmax.template add<0, C::FIRST>(scores);
            // The check depends on these exponentials, so they stay above the wait for the output, which they hide.
            barrier_wait_unless(known && softmax.template in_range<T>(), &shared.full[next.stage], next.parity, j,
                                blocks - 1, softmax.reference);
            mma_wait<0>();
            pin(acc);
            pin(p);
            release(read);
            softmax.template exponentials<C::EMULATED, C::FIRST, kKeys / 2>(scores);
            softmax.template add<C::FIRST, kKeys / 2>(scores);
            round_pairs<T, 0, kKeys / 2>(p, scores);
            if (!__all_sync(0xffffffff, softmax.template in_range<T>())) repair();
            softmax.accumulate();
        }
    }

    // Multiplies the last values, writes the tile, and meanwhile has the next tile's first scores made; its blocks.
    __device__ __forceinline__ int finish(int blocks, const CUtensorMap& out_map) {
        const int values = keys + kSlot / 2 + ring.stage * kSlot;
        uint64_t* const read = &shared.empty[ring.stage];
        const int stage = q_ring.stage;
        ring.advance();
        q_ring.advance();
        pin(p);
        mma_fence();
        issue_output<T>(acc, p, values, blocks > 1);
        const int next_blocks = fetch();
        if (next_blocks > 0) {
            barrier_wait(&shared.full[ring.stage], ring.parity);
            turn.take();
        }
        issue_first();  // of whatever lies there, for nobody, if this warpgroup has no part in the next tile
        if (next_blocks > 0) turn.pass();
        mma_wait<1>();
        pin(acc);
        release(read);
        const Task& task = shared.task[stage];
        if (blocks == work.blocks || merge<kGroups>(acc, softmax, &shared.done[member], task.tile, member, work))
            write_out<T>(shared.out[member], acc, softmax, out_map, task, member, work);
        __syncwarp();  // all lanes have read the task
        release(&shared.q_empty[stage][member]);
        mma_wait<0>();
        pin(scores);
        return next_blocks;
    }
};

}  // namespace any4d::forward
