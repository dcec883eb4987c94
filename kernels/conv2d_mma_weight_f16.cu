// Weight gradient on the tensor cores, f16: one kernel for each tile. What they compute, the bytes they move, how they
// are tiled and why: `conv2d_mma_weight.cuh`. conv2d_weight_patch_<c_in>x<c_out>_f16: 3x3, all taps;
// conv2d_weight_tap_<c_in>x<c_out>_f16: one tap; conv2d_weight_reduce_f16: adds the splits.
#include "conv2d_mma_weight.cuh"

#if __CUDA_ARCH__ >= 800 || defined(BOXWRIGHT_EMULATOR)

KERNEL(conv2d_weight_patch_16x16_f16, ConvWeightArgs, 128) { conv_weight_patch<f16, 16, 16, 1, 1, 4>(args); }
KERNEL(conv2d_weight_patch_16x32_f16, ConvWeightArgs, 128) { conv_weight_patch<f16, 16, 32, 1, 2, 2>(args); }
KERNEL(conv2d_weight_patch_16x48_f16, ConvWeightArgs, 192) { conv_weight_patch<f16, 16, 48, 3, 1, 2>(args); }
KERNEL(conv2d_weight_patch_16x80_f16, ConvWeightArgs, 192) { conv_weight_patch<f16, 16, 80, 3, 1, 2>(args); }
KERNEL(conv2d_weight_patch_32x32_f16, ConvWeightArgs, 192) { conv_weight_patch<f16, 32, 32, 3, 1, 2>(args); }
KERNEL(conv2d_weight_patch_32x64_f16, ConvWeightArgs, 192) { conv_weight_patch<f16, 32, 64, 3, 2, 1>(args); }

KERNEL(conv2d_weight_tap_32x32_f16, ConvWeightArgs, 128) { conv_weight_tap<f16, 32, 32, 64, 1, 1, 4, 3>(args); }
KERNEL(conv2d_weight_tap_64x64_f16, ConvWeightArgs, 128) { conv_weight_tap<f16, 64, 64, 64, 2, 2, 1, 3>(args); }
KERNEL(conv2d_weight_tap_96x96_f16, ConvWeightArgs, 128) { conv_weight_tap<f16, 96, 96, 32, 2, 2, 1, 4>(args); }
KERNEL(conv2d_weight_tap_128x128_f16, ConvWeightArgs, 128) { conv_weight_tap<f16, 128, 128, 32, 2, 2, 1, 4>(args); }

KERNEL(conv2d_weight_reduce_f16, ConvWeightReduceArgs, 256) { conv_weight_reduce(args); }

#endif
