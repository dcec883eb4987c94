// Weight gradient on the tensor cores, bf16: one kernel for each tile. What they compute, the bytes they move, how they
// are tiled and why: `conv2d_mma_weight.cuh`. conv2d_weight_patch_<c_in>x<c_out>_bf16: 3x3, all taps;
// conv2d_weight_tap_<c_in>x<c_out>_bf16: one tap; conv2d_weight_reduce_bf16: adds the splits.
#include "conv2d_mma_weight.cuh"

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)

KERNEL(conv2d_weight_patch_16x16_bf16, ConvWeightArgs, 128) { conv_weight_patch<bf16, 16, 16, 1, 1, 4>(args); }
KERNEL(conv2d_weight_patch_16x32_bf16, ConvWeightArgs, 128) { conv_weight_patch<bf16, 16, 32, 1, 2, 2>(args); }
KERNEL(conv2d_weight_patch_16x48_bf16, ConvWeightArgs, 192) { conv_weight_patch<bf16, 16, 48, 3, 1, 2>(args); }
KERNEL(conv2d_weight_patch_16x80_bf16, ConvWeightArgs, 192) { conv_weight_patch<bf16, 16, 80, 3, 1, 2>(args); }
KERNEL(conv2d_weight_patch_32x32_bf16, ConvWeightArgs, 192) { conv_weight_patch<bf16, 32, 32, 3, 1, 2>(args); }
KERNEL(conv2d_weight_patch_32x64_bf16, ConvWeightArgs, 192) { conv_weight_patch<bf16, 32, 64, 3, 2, 1>(args); }

KERNEL(conv2d_weight_tap_32x32_bf16, ConvWeightArgs, 128) { conv_weight_tap<bf16, 32, 32, 64, 1, 1, 4, 3>(args); }
KERNEL(conv2d_weight_tap_64x64_bf16, ConvWeightArgs, 128) { conv_weight_tap<bf16, 64, 64, 64, 2, 2, 1, 3>(args); }
KERNEL(conv2d_weight_tap_96x96_bf16, ConvWeightArgs, 128) { conv_weight_tap<bf16, 96, 96, 32, 2, 2, 1, 4>(args); }
KERNEL(conv2d_weight_tap_128x128_bf16, ConvWeightArgs, 128) { conv_weight_tap<bf16, 128, 128, 32, 2, 2, 1, 4>(args); }

KERNEL(conv2d_weight_reduce_bf16, ConvWeightReduceArgs, 256) { conv_weight_reduce(args); }

#endif
