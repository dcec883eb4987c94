// Gathered convolution on the tensor cores, data gradient, f16: one kernel for each tile. What it computes, the bytes it must
// move, how it is tiled and why: `conv2d_mma_gather.cuh`. conv2d_gather_backward_<rows>x<columns>_f16.
#include "conv2d_mma_gather.cuh"

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)

KERNEL_RESIDENT(conv2d_gather_backward_128x16_f16, ConvGatherArgs, 128, 4) { conv_gather<f16, true, 128, 16, 4, 1, 4>(args); }
KERNEL_RESIDENT(conv2d_gather_backward_128x32_f16, ConvGatherArgs, 128, 4) { conv_gather<f16, true, 128, 32, 4, 1, 4>(args); }
KERNEL(conv2d_gather_backward_128x48_f16, ConvGatherArgs, 128) { conv_gather<f16, true, 128, 48, 4, 1, 4>(args); }
KERNEL(conv2d_gather_backward_128x64_f16, ConvGatherArgs, 128) { conv_gather<f16, true, 128, 64, 4, 1, 4>(args); }
KERNEL(conv2d_gather_backward_128x80_f16, ConvGatherArgs, 128) { conv_gather<f16, true, 128, 80, 4, 1, 4>(args); }
KERNEL(conv2d_gather_backward_128x96_f16, ConvGatherArgs, 128) { conv_gather<f16, true, 128, 96, 2, 2, 4>(args); }
KERNEL(conv2d_gather_backward_128x128_f16, ConvGatherArgs, 128) { conv_gather<f16, true, 128, 128, 2, 2, 4>(args); }
KERNEL_RESIDENT(conv2d_gather_backward_64x64_f16, ConvGatherArgs, 128, 4) { conv_gather<f16, true, 64, 64, 2, 2, 4>(args); }
KERNEL(conv2d_gather_backward_256x128_f16, ConvGatherArgs, 256) { conv_gather<f16, true, 256, 128, 4, 2, 3>(args); }

#endif
