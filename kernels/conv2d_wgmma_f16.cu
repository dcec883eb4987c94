// Convolution on Hopper's warpgroups, f16: forward and data gradient, one kernel for each tile. What they compute, the
// bytes and FLOP they must move, how they are tiled and why: `conv2d_wgmma.cuh`.
// conv2d_wgmma_<pass>_<rows>x<columns>_f16.
#include "conv2d_wgmma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(BOXWRIGHT_EMULATOR)

#define TILE(rows, columns, stages, blocks) \
  KERNEL_RESIDENT(conv2d_wgmma_forward_##rows##x##columns##_f16, ConvWgmmaArgs, CONV_WGMMA_THREADS, blocks) { \
    conv_wgmma<f16, false, rows, columns, stages>(args); \
  } \
  KERNEL_RESIDENT(conv2d_wgmma_backward_##rows##x##columns##_f16, ConvWgmmaArgs, CONV_WGMMA_THREADS, blocks) { \
    conv_wgmma<f16, true, rows, columns, stages>(args); \
  }

TILE(128, 64, 4, 2)
TILE(128, 128, 3, 2)
TILE(128, 192, 4, 1)
TILE(128, 256, 4, 1)
TILE(256, 64, 4, 1)
TILE(256, 128, 4, 1)

#endif
