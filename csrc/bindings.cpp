// The Python module any4d_fast._C: pointers, sizes, strides, device and stream in; nothing is allocated or waited for.

#include "bindings.h"

#include "build_info.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of any4d_fast; call them through any4d_fast.ops";
  m.def("architectures", [] { return std::string(any4d::build_architectures()); });
  m.def("sources_key", [] { return std::string(any4d::build_sources_key()); });
  m.def("runtime_version", [] { return CUDART_VERSION; });
  m.def("driver_version", [] {
    int version = 0;  // stays 0 without a driver
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  });
  any4d::bind_attention_sm90(m);
  any4d::bind_attention_backward_sm90(m);
  any4d::bind_attention_fp8_sm90(m);
  any4d::bind_compose_factors(m);
  any4d::bind_unproject(m);
  any4d::bind_tokenize(m);
  any4d::bind_fuse_tokens(m);
}
