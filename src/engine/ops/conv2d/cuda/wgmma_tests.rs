//! Hopper's kernels against the plain f64 reference: every tile, boxes and runs of pixels, split and not, channels that
//! do not fill a step, maps that do not fill a tile.

use super::mma::MmaKernels;
use super::tests::{Bench, PRECISIONS};
use super::*;
use crate::engine::device::cuda::{MappedTensor, PixelGrid, TensorMap, testing};
use crate::engine::ops::conv2d::tests::{Case, case};

/// Every configuration of the forward pass and the data gradient.
fn every_tile(precision: Precision, case: Case) {
    for device in testing::devices().into_iter().filter(|d| d.chip().has_wgmma()) {
        let mma = MmaKernels::load(&device, precision).expect("it loads");
        let bench = Bench::new(&device, precision, case);
        let configs = bench.configs(Pass::Forward, true);
        assert!(!configs.is_empty());
        for config in configs {
            bench.forward(&mma, &config);
        }
        for (i, config) in bench.configs(Pass::BackwardData, true).iter().enumerate() {
            bench.backward_data(&mma, config, i % 2 == 1);
        }
    }
}

#[test]
fn wgmma_three_by_three_agrees_with_the_reference() {
    every_tile(Precision::Bf16, case((64, 72), 3, 1, (2, 8, 16), 0));
    every_tile(Precision::F16, case((72, 136), 3, 1, (3, 5, 7), 8));
}

#[test]
fn wgmma_one_by_one_agrees_with_the_reference() {
    every_tile(Precision::F16, case((200, 264), 1, 1, (1, 11, 13), 8));
    every_tile(Precision::Bf16, case((64, 8), 1, 1, (2, 1, 1), 0));
}

#[test]
fn wgmma_strides_and_other_kernels_agree_with_the_reference() {
    for (i, (kernel, stride)) in [(3, 2), (1, 2), (2, 1), (5, 1), (5, 3), (7, 2)].into_iter().enumerate() {
        every_tile(PRECISIONS[i % 2], case((8, 24), kernel, stride, (2, 11, 9), 8 * (i % 2)));
    }
    for size in [(3, 1, 1), (1, 1, 200), (1, 150, 1), (7, 3, 2)] {
        every_tile(Precision::Bf16, case((16, 16), 3, 1, size, 0));
    }
}

#[test]
fn wgmma_is_chosen_only_where_it_is_wanted() {
    let device = testing::devices().remove(0);
    let bench = Bench::new(&device, Precision::Bf16, case((64, 64), 3, 1, (1, 4, 4), 0));
    let hopper = Chip { major: 9, minor: 0, ..device.chip().clone() };
    let other = Chip { major: 10, minor: 0, ..device.chip().clone() };
    let found = |chip: &Chip, include_wgmma| {
        let shape = bench.shape(Pass::Forward);
        let all = MmaConfig::candidates(Pass::Forward, bench.params(), &shape, chip, include_wgmma);
        all.iter().any(MmaConfig::uses_wgmma)
    };
    assert!(found(&hopper, true));
    assert!(!found(&hopper, false) && !found(&other, true));
    if !wgmma::is_wanted(&hopper) {
        let shape = bench.shape(Pass::Forward);
        assert!(!MmaConfig::choose(Pass::Forward, bench.params(), &shape, &hopper).uses_wgmma());
    }
}

#[test]
fn tensor_maps_that_no_copy_engine_takes_are_refused() {
    for device in testing::devices().into_iter().filter(|d| d.chip().has_wgmma()) {
        let buffer = device.allocate(1 << 16).expect("memory");
        let at = |data| MappedTensor {
            precision: Precision::Bf16,
            data,
            sizes: &[64, 8, 8, 2],
            pitches: &[64, 512, 4096],
        };
        let (aligned, not) = (at(buffer.pointer()), at(buffer.pointer() + 8));
        assert!(TensorMap::tiled(&device, &aligned, &[64, 8, 4, 1]).is_ok());
        assert!(TensorMap::tiled(&device, &aligned, &[64, 257, 1, 1]).is_err(), "too long a box");
        assert!(
            TensorMap::tiled(&device, &aligned, &[128, 1, 1, 1]).is_err(),
            "rows longer than the swizzle"
        );
        assert!(TensorMap::tiled(&device, &not, &[64, 8, 4, 1]).is_err(), "an address of no multiple of 16");
        let grid = PixelGrid { first: [-1, -1], count: [8, 8], stride: 1 };
        assert!(TensorMap::pixels(&device, &aligned, &grid, 64, 128).is_ok());
        assert!(TensorMap::pixels(&device, &aligned, &grid, 64, 1025).is_err(), "too many pixels");
    }
}
