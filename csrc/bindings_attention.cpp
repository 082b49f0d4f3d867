// Bindings of attention.

#include <pybind11/stl.h>

#include <array>
#include <string>

#include "attention_backward_sm90.h"
#include "attention_fp8_sm90.h"
#include "attention_sm90.h"
#include "bindings.h"
#include "dtype.h"

namespace py = pybind11;

namespace any4d {
namespace {

// [start, length, count, stride, groups, group_stride]
SegmentLayout segment_layout(const std::array<std::int64_t, 6>& segments) {
  const auto [start, length, count, stride, groups, group_stride] = segments;
  return {start, length, count, stride, groups, group_stride};
}

#ifdef ANY4D_SM90A
// A forward in 16 or 8 bits: `name`, `name`_workspace (bytes) and `name`_variants.
void bind_forward(py::module_& m, const char* name, cudaError_t (*launcher)(const AttentionForward&, cudaStream_t),
                  std::int64_t (*workspace_of)(const AttentionForward&), int (*variants)()) {
  m.def(
      name,
      [=](std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t out, std::uintptr_t lse, int dtype,
          std::int64_t row_stride, std::int64_t head_stride, std::int64_t rows, int heads,
          const std::array<std::int64_t, 6>& segments, float scale, int variant, std::uintptr_t workspace, int device,
          std::uintptr_t stream) {
        const AttentionForward call{pointer<const void>(q),
                                    pointer<const void>(k),
                                    pointer<const void>(v),
                                    pointer<void>(out),
                                    pointer<float>(lse),
                                    static_cast<DType>(dtype),
                                    row_stride,
                                    head_stride,
                                    rows,
                                    heads,
                                    segment_layout(segments),
                                    scale,
                                    pointer<void>(workspace),
                                    variant};
        launch(name, launcher, call, device, stream);
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("dtype"),
      py::arg("row_stride"), py::arg("head_stride"), py::arg("rows"), py::arg("heads"), py::arg("segments"),
      py::arg("scale"), py::arg("variant"), py::arg("workspace"), py::arg("device"), py::arg("stream"));
  m.def(
      (std::string(name) + "_workspace").c_str(),
      [=](int heads, const std::array<std::int64_t, 6>& segments, int device) {
        AttentionForward call{};
        call.heads = heads;
        call.segments = segment_layout(segments);
        const DeviceGuard guard(device, name);
        return workspace_of(call);
      },
      py::kw_only(), py::arg("heads"), py::arg("segments"), py::arg("device"));
  m.def((std::string(name) + "_variants").c_str(), variants);
}
#endif

}  // namespace

void bind_attention_backward_sm90(py::module_& m) {
#ifdef ANY4D_SM90A
  m.def(
      "attention_backward",
      [](std::uintptr_t grad_out, std::uintptr_t grad_lse, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v,
         std::uintptr_t out, std::uintptr_t lse, std::uintptr_t grad, std::uintptr_t workspace, int dtype,
         std::int64_t row_stride, std::int64_t head_stride, std::int64_t rows, int heads,
         const std::array<std::int64_t, 6>& segments, float scale, bool deterministic, int processors, int variant,
         int device, std::uintptr_t stream) {
        const AttentionBackward call{pointer<const void>(grad_out),
                                     pointer<const float>(grad_lse),
                                     pointer<const void>(q),
                                     pointer<const void>(k),
                                     pointer<const void>(v),
                                     pointer<const void>(out),
                                     pointer<const float>(lse),
                                     pointer<void>(grad),
                                     pointer<float>(workspace),
                                     static_cast<DType>(dtype),
                                     row_stride,
                                     head_stride,
                                     rows,
                                     heads,
                                     segment_layout(segments),
                                     scale,
                                     deterministic,
                                     processors,
                                     variant};
        launch("attention_backward", attention_backward, call, device, stream);
      },
      py::kw_only(), py::arg("grad_out"), py::arg("grad_lse"), py::arg("q"), py::arg("k"), py::arg("v"),
      py::arg("out"), py::arg("lse"), py::arg("grad"), py::arg("workspace"), py::arg("dtype"), py::arg("row_stride"),
      py::arg("head_stride"), py::arg("rows"), py::arg("heads"), py::arg("segments"), py::arg("scale"),
      py::arg("deterministic"), py::arg("processors"), py::arg("variant"), py::arg("device"), py::arg("stream"));
  m.def(
      "attention_backward_workspace",  // float32 elements
      [](std::int64_t length, std::int64_t units, int processors, bool deterministic, int variant) {
        return backward_plan(length, units, processors, deterministic, variant).workspace;
      },
      py::kw_only(), py::arg("length"), py::arg("units"), py::arg("processors"), py::arg("deterministic"),
      py::arg("variant"));
  m.def("attention_backward_variants", &attention_backward_variants);
#else
  (void)m;
#endif
}

void bind_attention_sm90(py::module_& m) {
#ifdef ANY4D_SM90A
  bind_forward(m, "attention_forward", attention_forward, attention_forward_workspace, attention_forward_variants);
#else
  (void)m;
#endif
}

void bind_attention_fp8_sm90(py::module_& m) {
#ifdef ANY4D_SM90A
  bind_forward(m, "attention_fp8", attention_fp8, attention_fp8_workspace, attention_fp8_variants);
#else
  (void)m;
#endif
}

}  // namespace any4d
