// Element types as they cross from Python; any4d_fast/cuda/__init__.py has the same numbers.
#pragma once

namespace any4d {

enum class DType : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kUInt8 = 3,
};

}  // namespace any4d
