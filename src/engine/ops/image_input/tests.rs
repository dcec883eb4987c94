use super::cpu::{forward_f32, forward_u8};
use crate::engine::tensor::{Dst, View};

#[test]
fn bytes_become_fractions_in_place() {
    let (n, h, w, c) = (2, 3, 5, 3);
    let bytes: Vec<u8> = (0..n * h * w * c).map(|i| (i * 7 % 256) as u8).collect();
    let mut buffer = vec![-1.0; View::storage_len(n, h, w, c, 1)];
    let view = View::new(0, n, h, w, c, 1);
    forward_u8(&bytes, Dst::of(&mut buffer, view));
    for image in 0..n {
        for y in 0..h {
            for x in 0..w * c {
                let got = buffer[view.at(image, y as isize, 0) + x];
                assert_eq!(got, f32::from(bytes[(image * h + y) * w * c + x]) / 255.0);
            }
        }
    }
    let border = buffer.iter().filter(|&&v| v == -1.0).count();
    assert_eq!(border, n * (5 * 7 - 15) * c, "the border is not touched");
}

#[test]
fn floats_go_into_a_channel_slice() {
    let floats: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let mut buffer = vec![-1.0; 12 * 5];
    forward_f32(&floats, Dst::of(&mut buffer, View::new(0, 1, 3, 4, 5, 0).slice(2, 2)));
    assert_eq!(&buffer[..10], &[-1.0, -1.0, 0.0, 1.0, -1.0, -1.0, -1.0, 2.0, 3.0, -1.0]);
}

#[test]
fn the_device_divides_too() {
    use super::cuda::ImageInputKernels;
    use crate::engine::ops::cuda_testing::{Floats, Layout, Map, normals, on_all, rounded};
    on_all(|bench| {
        let kernels = ImageInputKernels::load(&bench.device, bench.precision).expect("kernels");
        for (h, w, c, beyond, pad) in [(9, 31, 3, 0, 1), (3, 5, 8, 2, 0), (2, 2, 1, 0, 2)] {
            let at = Layout::dense(2, h, w, c);
            let bytes: Vec<u8> = (0..at.len()).map(|i| (i * 7 % 256) as u8).collect();
            let buffer = bench.device.allocate(bytes.len()).expect("memory");
            bench.stream.upload(&buffer, 0, &bytes).expect("a copy");
            let values = normals(crate::engine::device::cuda::Precision::F32, 1, at.len(), 0.0);
            let floats = Floats::of(bench, &values);
            let maps = [(); 2].map(|()| Map::poisoned(bench, at.within(beyond, pad)));
            // SAFETY: all live in this test and have the shapes said.
            unsafe {
                kernels.forward_u8(&bench.stream, buffer.pointer(), maps[0].tensor()).expect("a launch");
                kernels.forward_f32(&bench.stream, floats.pointer(), maps[1].tensor()).expect("a launch");
            }
            let fractions: Vec<f64> =
                bytes.iter().map(|b| rounded(bench.precision, f64::from(f32::from(*b) / 255.0))).collect();
            assert_eq!(maps[0].read_written(bench, true), fractions);
            let values: Vec<f64> = values.iter().map(|v| rounded(bench.precision, *v)).collect();
            assert_eq!(maps[1].read_written(bench, true), values);
        }
    });
}
