// Gathered convolution on the tensor cores, forward, f16: one kernel for each tile. What it computes, the bytes it must
// move, how it is tiled and why: `conv2d_mma_gather.cuh`. conv2d_gather_forward_<rows>x<columns>_f16.
#include "conv2d_mma_gather.cuh"

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)

KERNEL_RESIDENT(conv2d_gather_forward_128x16_f16, ConvGatherArgs, 128, 4) { conv_gather<f16, false, 128, 16, 4, 1, 4>(args); }
KERNEL_RESIDENT(conv2d_gather_forward_128x32_f16, ConvGatherArgs, 128, 4) { conv_gather<f16, false, 128, 32, 4, 1, 4>(args); }
KERNEL(conv2d_gather_forward_128x48_f16, ConvGatherArgs, 128) { conv_gather<f16, false, 128, 48, 4, 1, 4>(args); }
KERNEL(conv2d_gather_forward_128x64_f16, ConvGatherArgs, 128) { conv_gather<f16, false, 128, 64, 4, 1, 4>(args); }
KERNEL(conv2d_gather_forward_128x80_f16, ConvGatherArgs, 128) { conv_gather<f16, false, 128, 80, 4, 1, 4>(args); }
KERNEL(conv2d_gather_forward_128x96_f16, ConvGatherArgs, 128) { conv_gather<f16, false, 128, 96, 2, 2, 4>(args); }
KERNEL(conv2d_gather_forward_128x128_f16, ConvGatherArgs, 128) { conv_gather<f16, false, 128, 128, 2, 2, 4>(args); }
KERNEL_RESIDENT(conv2d_gather_forward_64x64_f16, ConvGatherArgs, 128, 4) { conv_gather<f16, false, 64, 64, 2, 2, 4>(args); }
KERNEL(conv2d_gather_forward_256x128_f16, ConvGatherArgs, 256) { conv_gather<f16, false, 256, 128, 4, 2, 3>(args); }

#endif
