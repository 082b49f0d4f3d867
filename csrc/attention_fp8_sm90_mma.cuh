// Warpgroup matrix products of e4m3 operands (PTX ISA, wgmma.mma_async): A in registers, B in shared memory, both with
// the 32 summed-over bytes contiguous, as 8-bit types must be.
//
// Thread t of the warpgroup has D as in wgmma.cuh. Of A it has the rows row = 16 (t / 32) + t % 32 / 4 and row + 8, in
// a[0], a[1] bytes 4 (t % 4) .. + 3 of them, in a[2], a[3] the bytes 16 further on.
#pragma once

#include "hopper.cuh"

namespace any4d::hopper {

// Descriptor of 64 bytes a row in the 64-byte swizzle, 8 rows (512 bytes) an atom; 512-byte aligned.
__device__ __forceinline__ uint64_t operand_64_bytes(const void* pointer) {
    constexpr uint64_t kSwizzle64 = uint64_t(2) << 62;
    constexpr uint64_t kAtom = uint64_t(512 >> 4) << 32;
    return kSwizzle64 | kAtom | uint64_t(1) << 16 | ((smem_address(pointer) & 0x3ffff) >> 4);
}

#define ANY4D_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ANY4D_16(d, i) ANY4D_4(d, i), ANY4D_4(d, i + 4), ANY4D_4(d, i + 8), ANY4D_4(d, i + 12)

#define ANY4D_NUMBERS_32                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "    \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// D[64, 128] (+)= A[64, 32] B[32, 128].
__device__ __forceinline__ void mma_e4m3(float (&d)[64], const uint32_t* a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" ANY4D_NUMBERS_32
        ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1;\n}\n"
        : ANY4D_16(d, 0), ANY4D_16(d, 16), ANY4D_16(d, 32), ANY4D_16(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}

// D[64, 72] (+)= A[64, 32] B[32, 72].
__device__ __forceinline__ void mma_e4m3(float (&d)[36], const uint32_t* a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %41, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n72k32.f32.e4m3.e4m3 {" ANY4D_NUMBERS_32 ", %32, %33, %34, %35}, "
        "{%36, %37, %38, %39}, %40, p, 1, 1;\n}\n"
        : ANY4D_16(d, 0), ANY4D_16(d, 16), ANY4D_4(d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}

#undef ANY4D_NUMBERS_32
#undef ANY4D_16
#undef ANY4D_4

}  // namespace any4d::hopper
