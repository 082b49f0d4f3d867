// Warpgroup matrix products of 64 rows (PTX ISA, wgmma.mma_async): accumulators in registers, B in shared memory, A in
// shared memory or registers. Asynchronous: fence before, commit and wait after (hopper.cuh).
#pragma once

#include "hopper.cuh"

namespace any4d::hopper {

// Product D[64, N] (+)= A[64, 16] B[16, N] of 16-bit operands. TRANSPOSED: the operand lies in shared memory with its
// rows (A) or columns (B) contiguous rather than the 16 summed-over values.
//
// Thread t of the warpgroup holds D[row, 8 j + column] in d[4 j + 0 .. 3] for j < N / 8, where
//   d[4 j], d[4 j + 1]: row = 16 (t / 32) + (t % 32) / 4,     column = 2 (t % 4), + 1
//   d[4 j + 2], d[4 j + 3]: row + 8, the same columns.
// A of registers, for columns 16 i: a[0], a[1] = rows row, row + 8 of columns 2 (t % 4), + 1; a[2], a[3] = 8 columns on.
// So accumulators rounded in pairs, d[8 i .. 8 i + 7], are the A operand of the next product.
template <typename T, int N>
struct Mma;

#define ANY4D_8(d, i)                                                                                              \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),    \
        "+f"(d[i + 7])
#define ANY4D_LIST(...) __VA_ARGS__
#define ANY4D_32(d, i) ANY4D_8(d, i), ANY4D_8(d, i + 8), ANY4D_8(d, i + 16), ANY4D_8(d, i + 24)

// The accumulators come first among the operands, so the numbers of the others depend on N.
#define ANY4D_MMA(T, TYPE, N, ACCUMULATORS, OUTPUTS, S0, S1, S2, S3, S4, R0, R1, R2, R3, R4, R5, R6)                \
    template <>                                                                                                    \
    struct Mma<T, N> {                                                                                             \
        template <bool TRANSPOSED_A = false, bool TRANSPOSED_B = false>                                            \
        static __device__ __forceinline__ void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {       \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " S2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N         \
                         "k16.f32." TYPE "." TYPE " {" ACCUMULATORS "}, " S0 ", " S1 ", p, 1, 1, " S3 ", " S4        \
                         ";\n}\n"                                                                                  \
                         : OUTPUTS                                                                                 \
                         : "l"(a), "l"(b), "r"(int(add)), "n"(int(TRANSPOSED_A)), "n"(int(TRANSPOSED_B)));         \
        }                                                                                                          \
        template <bool TRANSPOSED_B = false>                                                                       \
        static __device__ __forceinline__ void registers(float (&d)[N / 2], const uint32_t* a, uint64_t b,         \
                                                         bool add) {                                               \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N         \
                         "k16.f32." TYPE "." TYPE " {" ACCUMULATORS "}, {" R0 ", " R1 ", " R2 ", " R3 "}, " R4       \
                         ", p, 1, 1, " R6 ";\n}\n"                                                                  \
                         : OUTPUTS                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)),                      \
                           "n"(int(TRANSPOSED_B)));                                                                \
        }                                                                                                          \
    };

#define ANY4D_ACCUMULATORS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

ANY4D_MMA(__nv_bfloat16, "bf16", 64, ANY4D_ACCUMULATORS_32, ANY4D_LIST(ANY4D_32(d, 0)),
          "%32", "%33", "%34", "%35", "%36",
          "%32", "%33", "%34", "%35", "%36", "%37", "%38")
ANY4D_MMA(__half, "f16", 64, ANY4D_ACCUMULATORS_32, ANY4D_LIST(ANY4D_32(d, 0)),
          "%32", "%33", "%34", "%35", "%36",
          "%32", "%33", "%34", "%35", "%36", "%37", "%38")

#undef ANY4D_ACCUMULATORS_32

#define ANY4D_ACCUMULATORS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

ANY4D_MMA(__nv_bfloat16, "bf16", 128, ANY4D_ACCUMULATORS_64, ANY4D_LIST(ANY4D_32(d, 0), ANY4D_32(d, 32)),
          "%64", "%65", "%66", "%67", "%68",
          "%64", "%65", "%66", "%67", "%68", "%69", "%70")
ANY4D_MMA(__half, "f16", 128, ANY4D_ACCUMULATORS_64, ANY4D_LIST(ANY4D_32(d, 0), ANY4D_32(d, 32)),
          "%64", "%65", "%66", "%67", "%68",
          "%64", "%65", "%66", "%67", "%68", "%69", "%70")

#undef ANY4D_ACCUMULATORS_64

#undef ANY4D_MMA
#undef ANY4D_LIST
#undef ANY4D_32
#undef ANY4D_8

}  // namespace any4d::hopper
