// What the bindings of all ops share. Every op has one `bind_<op>`, in a bindings_*.cpp; its arguments are named, and
// checked in any4d_fast/cuda/<op>.py.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace any4d {

void bind_attention_sm90(pybind11::module_& m);
void bind_attention_backward_sm90(pybind11::module_& m);
void bind_attention_fp8_sm90(pybind11::module_& m);
void bind_compose_factors(pybind11::module_& m);
void bind_fuse_tokens(pybind11::module_& m);
void bind_tokenize(pybind11::module_& m);
void bind_unproject(pybind11::module_& m);

inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("any4d_fast: ") + op + ": " + cudaGetErrorString(error));
  }
}

// Makes `device` the current one and restores the one that was.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check(cudaGetDevice(&previous_), op);
    if (device != previous_) {
      check(cudaSetDevice(device), op);
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Launches on the device and stream that Python names. `launcher` is `cudaError_t (const Args&, cudaStream_t)`.
template <typename Args>
void launch(const char* op, cudaError_t (*launcher)(const Args&, cudaStream_t), const Args& args, int device,
            std::uintptr_t stream) {
  const DeviceGuard guard(device, op);
  check(launcher(args, reinterpret_cast<cudaStream_t>(stream)), op);
}

}  // namespace any4d
