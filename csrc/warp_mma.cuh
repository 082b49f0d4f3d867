// Matrix products of one warp on operands in shared memory: 16 x 8 x 16, sm_80 and later (PTX ISA, mma.sync, ldmatrix).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace any4d {

// Chunk of 16 bytes of a row of 128 bytes, in the copy engine's 128-byte swizzle.
template <typename T>
__device__ __forceinline__ const T* swizzled(const T* tile, int row, int chunk) {
    return tile + row * 64 + (chunk ^ (row % 8)) * 8;
}

// Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&found)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

// D[16, 8] += A[16, 16] B[16, 8]; D as a warp's part of wgmma's accumulators.
template <typename T>
struct WarpMma;

#define ANY4D_WARP_MMA(T, TYPE)                                                                                    \
    template <>                                                                                                    \
    struct WarpMma<T> {                                                                                            \
        static __device__ __forceinline__ void add(float* d, const uint32_t* a, const uint32_t* b) {               \
            asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                             \
                ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                             \
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
        }                                                                                                          \
    };

ANY4D_WARP_MMA(__nv_bfloat16, "bf16")
ANY4D_WARP_MMA(__half, "f16")

#undef ANY4D_WARP_MMA

}  // namespace any4d
