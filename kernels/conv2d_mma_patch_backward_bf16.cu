// 3x3 convolution over patches on the tensor cores, data gradient, bf16: one kernel for each tile. What it computes, the bytes it
// must move, how it is tiled and why: `conv2d_mma_patch.cuh`. conv2d_patch_backward_<rows>x<columns>_bf16.
#include "conv2d_mma_patch.cuh"

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)

KERNEL_RESIDENT(conv2d_patch_backward_128x16_bf16, ConvPatchArgs, 128, 4) { conv_patch<bf16, true, 128, 16, 4, 1>(args); }
KERNEL_RESIDENT(conv2d_patch_backward_256x16_bf16, ConvPatchArgs, 256, 2) { conv_patch<bf16, true, 256, 16, 8, 1>(args); }
KERNEL_RESIDENT(conv2d_patch_backward_128x32_bf16, ConvPatchArgs, 128, 4) { conv_patch<bf16, true, 128, 32, 4, 1>(args); }
KERNEL_RESIDENT(conv2d_patch_backward_256x32_bf16, ConvPatchArgs, 256, 2) { conv_patch<bf16, true, 256, 32, 8, 1>(args); }
KERNEL(conv2d_patch_backward_128x48_bf16, ConvPatchArgs, 128) { conv_patch<bf16, true, 128, 48, 4, 1>(args); }
KERNEL(conv2d_patch_backward_256x48_bf16, ConvPatchArgs, 256) { conv_patch<bf16, true, 256, 48, 8, 1>(args); }
KERNEL(conv2d_patch_backward_128x64_bf16, ConvPatchArgs, 128) { conv_patch<bf16, true, 128, 64, 4, 1>(args); }
KERNEL(conv2d_patch_backward_256x64_bf16, ConvPatchArgs, 256) { conv_patch<bf16, true, 256, 64, 8, 1>(args); }
KERNEL(conv2d_patch_backward_128x80_bf16, ConvPatchArgs, 128) { conv_patch<bf16, true, 128, 80, 4, 1>(args); }
KERNEL(conv2d_patch_backward_256x80_bf16, ConvPatchArgs, 256) { conv_patch<bf16, true, 256, 80, 8, 1>(args); }
KERNEL(conv2d_patch_backward_128x96_bf16, ConvPatchArgs, 128) { conv_patch<bf16, true, 128, 96, 2, 2>(args); }
KERNEL(conv2d_patch_backward_256x96_bf16, ConvPatchArgs, 256) { conv_patch<bf16, true, 256, 96, 4, 2>(args); }
KERNEL(conv2d_patch_backward_128x128_bf16, ConvPatchArgs, 128) { conv_patch<bf16, true, 128, 128, 2, 2>(args); }
KERNEL(conv2d_patch_backward_256x128_bf16, ConvPatchArgs, 256) { conv_patch<bf16, true, 256, 128, 4, 2>(args); }

#endif
