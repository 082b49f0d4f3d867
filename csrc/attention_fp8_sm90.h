// Launchers of the 8-bit attention forward for Hopper: queries, keys and values are rounded to e4m3 in a pass before, or,
// of segments of at most 1,024 rows, in the same kernel.
#pragma once

#include "attention_sm90.h"

namespace any4d {

// Calls are those of the 16-bit forward, but for a workspace of attention_fp8_workspace bytes (0 for short segments),
// 128-byte aligned.
int attention_fp8_variants();
int64_t attention_fp8_workspace(const AttentionForward& call);
cudaError_t attention_fp8(const AttentionForward& call, cudaStream_t stream);

}  // namespace any4d
