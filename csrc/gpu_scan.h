// The scan on a GPU as its host sees it. Each element type, float, double and Complex of either, is a file of its own.
#pragma once

#include "device.h"
#include "scan_tiles.h"

namespace s5eqx {

// The problem is not empty: a caller deals with that. `memory` holds workspace_bytes; `blocks` is the size of the grid,
// 0 for what fills the device. The result does not depend on it.
template <typename E>
Status scan_forward_on_gpu(const ScanShape&, const ForwardArrays<void>&, void* memory, int64_t blocks, Stream);
template <typename E>
Status scan_backward_on_gpu(const ScanShape&, const BackwardArrays<void>&, void* memory, int64_t blocks, Stream);

}  // namespace s5eqx
