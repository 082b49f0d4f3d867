// A kernel that starts while the one before it drains: programmatic dependent launch, sm_90 and later.
#pragma once

#include <cuda_runtime.h>

namespace any4d {

__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches a kernel that calls wait_for_previous_kernel() before it touches anything its predecessor writes.
template <typename Args>
cudaError_t launch_dependent(void (*kernel)(Args), unsigned blocks, unsigned threads, const Args& args,
                             cudaStream_t stream) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    // Code that was compiled for an older architecture does not wait: there, the stream's order has to do.
    config.numAttrs = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

// The same for a kernel that is compiled for sm_90a alone, with dynamic shared memory.
template <typename... Parameters>
cudaError_t launch_dependent_sm90(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int shared_bytes,
                                  cudaStream_t stream, const Parameters&... parameters) {
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
        return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, parameters...);
}

}  // namespace any4d
