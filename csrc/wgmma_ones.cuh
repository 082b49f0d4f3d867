// The warpgroup product of wgmma.cuh for 72 columns: 64 of values, and 8 that sum the rows of A when B has ones there.
#pragma once

#include "wgmma.cuh"

namespace any4d::hopper {

#define ANY4D_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ANY4D_12(d, i) ANY4D_4(d, i), ANY4D_4(d, i + 4), ANY4D_4(d, i + 8)
#define ANY4D_MMA_72(T, TYPE)                                                                                      \
    template <>                                                                                                    \
    struct Mma<T, 72> {                                                                                            \
        template <bool TRANSPOSED_B = false>                                                                       \
        static __device__ __forceinline__ void registers(float (&d)[36], const uint32_t* a, uint64_t b, bool add) { \
            asm volatile(                                                                                          \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %41, 0;\nwgmma.mma_async.sync.aligned.m64n72k16.f32." TYPE "." TYPE \
                " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "  \
                "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35}, {%36, %37, %38, %39}, " \
                "%40, p, 1, 1, %42;\n}\n"                                                                          \
                : ANY4D_12(d, 0), ANY4D_12(d, 12), ANY4D_12(d, 24)                                                 \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(TRANSPOSED_B)));      \
        }                                                                                                          \
    };

ANY4D_MMA_72(__nv_bfloat16, "bf16")
ANY4D_MMA_72(__half, "f16")

#undef ANY4D_MMA_72
#undef ANY4D_12
#undef ANY4D_4

}  // namespace any4d::hopper
