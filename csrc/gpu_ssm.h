// The state-space step on a GPU as its host sees it. Each scalar type is a file of its own.
#pragma once

#include "device.h"
#include "ssm_tiles.h"

namespace s5eqx {

// The problem is not empty and `takes` its sizes: a caller sees to that. `memory` holds ssm_workspace_bytes;
// `blocks` is the size of the grid, 0 for what fills the device. The result does not depend on it.
template <typename T>
Status ssm_forward_on_gpu(const SsmShape&, const SsmInputs<T>&, const SsmOutputs<T>&, Projection, void* memory,
                          int64_t blocks, Stream);
template <typename T>
Status ssm_backward_on_gpu(const SsmShape&, const SsmInputs<T>&, const SsmCotangents<T>&, Projection, void* memory,
                           int64_t blocks, Stream);

}  // namespace s5eqx
